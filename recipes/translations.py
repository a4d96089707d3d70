# SPDX-License-Identifier: Apache-2.0
"""What a recipe on translations is given: pairs by language, dev pairs held out of them, Tatoeba's test."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from demo import EMBEDDED_PAIRS, bible_pairs
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_distill.build import LEALLA_SHAPES, plan
from hf_distill.data import find_leaks, load_texts, mix_languages, normal_form, require_texts, split_source, text_columns
from hf_distill.evaluation.bitext import BitextEvaluator, load_bitext
from hf_distill.vocabulary import vocabulary_for


logger = logging.get_logger("hf_distill.translations")


@dataclass
class Translations:
    """Pairs to train on (english, translation, language), and evaluators of pairs held out and of the test.

    evaluators: dev and, with `--tatoeba`, the test; averages over the trained languages and the others. facts: What
    results.json says.
    """

    train: Dataset
    evaluators: list[BitextEvaluator]
    facts: dict[str, Any]


def open_translations(recipe: Any) -> Translations:
    """Return what `--pairs` names, without what `--tatoeba` holds, small languages repeated by `--language_temperature`."""
    (everything, test), seed = open_pairs(recipe), recipe.split_seed
    if recipe.tatoeba:
        test = load_bitext(recipe.tatoeba)
    seen = {text for first, second in test.values() for text in first + second}
    held = _held_out(everything, recipe.held_out, seed)
    parts, dev, leaked, identical = {}, {}, 0, 0
    for code, dataset in everything.items():
        columns = dataset.column_names
        require_texts(dataset, columns)
        rows, texts = find_leaks(dataset, columns, seen)
        leaks, leaked = set(rows), leaked + len(texts)
        english, translation = (dataset[column] for column in columns)
        same = {i for i, pair in enumerate(zip(english, translation, strict=True)) if pair[0].strip() == pair[1].strip()}
        if len(same) == len(dataset):
            raise ValueError(
                f"lealla: all {len(same)} pairs of {code} have two identical sides, expected translations. The student would "
                "learn to find a sentence by itself. Check the columns that --pairs names."
            )
        identical += len(same)
        kept = [i for i in range(len(dataset)) if i not in leaks and i not in same]
        keys = {i: normal_form(english[i]) in held for i in kept}
        train, apart = ([i for i in kept if keys[i] == side] for side in (False, True))
        apart = apart[: recipe.held_out]
        dev[code] = ([translation[i] for i in apart], [english[i] for i in apart])
        if recipe.max_pairs and len(train) > recipe.max_pairs:
            train = sorted(random.Random(seed).sample(train, recipe.max_pairs))
        parts[code] = dataset.select(train).rename_columns(dict(zip(columns, ("english", "translation"), strict=True)))
    empty = sorted(code for code, part in parts.items() if not len(part))
    if empty:
        raise ValueError(f"lealla: no pair of {empty} is left to train on, expected some. Lower --held_out, or leave them out.")
    if identical or leaked:
        logger.info(f"Pairs: {leaked} sentences of the test and {identical} pairs of identical sides are left out.")
    mixed = mix_languages(parts, recipe.language_temperature, seed)
    facts = {"name": str(recipe.texts_name), "rows": len(mixed), "columns": ["english", "translation"], "leaked": leaked}
    facts |= {"held_out": sum(len(first) for first, _ in dev.values()), "identical": identical}
    facts |= {"languages": {code: len(part) for code, part in parts.items()}}
    facts |= {"sha256": require_texts(mixed, ["english", "translation"])}
    dev = {code: sides for code, sides in dev.items() if sides[0]}
    evaluators = [BitextEvaluator(dev, name="dev")] if dev else []
    if test:
        trained = sorted(parts.keys() & test.keys())
        groups = {"trained": trained, "other": sorted(test.keys() - parts.keys())}
        groups = {name: codes for name, codes in groups.items() if codes}
        evaluators.append(BitextEvaluator(test, groups, recipe.dims, "tatoeba" if recipe.tatoeba else "test"))
    return Translations(mixed, evaluators, facts)


def shape_student(recipe: Any, corpus: list[str], languages: list[str]) -> None:
    """Make `--shape`, or what fits in `--max_params` with the backbone's vocabulary, the student's `--from_scratch`."""
    if recipe.max_params:
        tokenizer = AutoTokenizer.from_pretrained(recipe.backbone)  # the student's, too
        found = plan(recipe.max_params, vocabulary_for(tokenizer, corpus, languages, recipe.coverage))
        recipe.from_scratch = [found.hidden_size, found.layers, found.heads, found.intermediate_size]
        recipe.max_vocabulary = found.vocabulary
    elif recipe.shape:
        recipe.from_scratch = list(LEALLA_SHAPES[recipe.shape])


def open_pairs(recipe: Any) -> tuple[dict[str, Dataset], dict[str, tuple[list[str], list[str]]]]:
    """Return (language -> data set of an English and a translated column; the embedded default's test pairs).

    Raises:
        ValueError: If `--languages` names one that is not there, or two files are of unequal length.
    """
    test: dict[str, Any] = {}
    found: dict[str, Dataset] = {}
    for name in recipe.pairs:
        code, _, source = name.rpartition("=")
        if name == EMBEDDED_PAIRS:
            more, test = bible_pairs()
        elif code and "," in source and all(Path(part).is_file() for part in source.split(",")):
            more = {code: _aligned(code, *source.split(","))}
        elif code:
            more = {code: _two_columns(*split_source(source))}
        elif Path(source).is_dir():
            files = sorted(path for path in Path(source).iterdir() if path.name.startswith("eng-"))
            more = {path.name.removeprefix("eng-").split(".")[0]: _two_columns(str(path), None) for path in files}
        else:
            more = _by_language(*split_source(source))
        found |= more
    unknown = sorted(set(recipe.languages or ()) - found.keys())
    if unknown or not found:
        raise ValueError(
            f"lealla: --pairs {recipe.pairs} have {sorted(found)}, but not {unknown}, expected codes of languages that are "
            "there. The averages would be over other languages than asked for."
        )
    return {code: found[code] for code in recipe.languages or found}, test


def _two_columns(source: str, columns: list[str] | None) -> Dataset:
    name, _, subset = (source, "", "") if Path(source).exists() else source.partition("@")
    dataset = load_texts(name, subset or None)
    columns = columns or text_columns(dataset)[:2]
    if len(columns) != 2:
        raise ValueError(f"lealla: {source} has the text columns {columns}, expected two: English and its translation.")
    return dataset.select_columns(text_columns(dataset, columns))


def _by_language(source: str, columns: list[str] | None) -> dict[str, Dataset]:
    dataset = load_texts(source)
    if "language" not in dataset.column_names:
        raise ValueError(
            f"lealla: {source} has {dataset.column_names}, expected a column `language`, or a code before it: deu={source}."
        )
    rows: dict[str, list[int]] = {}
    for row, code in enumerate(dataset["language"]):
        rows.setdefault(code, []).append(row)
    columns = columns or [name for name in text_columns(dataset) if name != "language"][:2]
    return {code: dataset.select(places).select_columns(columns) for code, places in rows.items()}


def _aligned(code: str, english: str, translation: str) -> Dataset:
    """Return two plain files, a sentence a line, as OPUS gives them."""
    sides = [Path(name).read_text(encoding="utf-8").rstrip("\n").split("\n") for name in (english, translation)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"lealla: {english} has {len(sides[0])} lines and {translation} {len(sides[1])}, expected as many. From the first "
            f"missing one on, {code} would be aligned with other sentences."
        )
    rows = [pair for pair in zip(*sides, strict=True) if all(map(str.strip, pair))]
    return Dataset.from_dict({"english": [a for a, _ in rows], "translation": [b for _, b in rows]})


def _held_out(everything: dict[str, Dataset], count: int, seed: int) -> set[str]:
    """Return English sentences, in normal form, that no language trains on: `count` a language, at most a tenth of its own."""
    held: set[str] = set()
    for code in sorted(everything):
        english = sorted({normal_form(text) for text in everything[code][everything[code].column_names[0]]})
        wanted = min(count, len(english) // 10) - len(held.intersection(english))
        rest = [text for text in english if text not in held]
        held |= set(random.Random(f"{seed} {code}").sample(rest, max(wanted, 0)))
    return held
