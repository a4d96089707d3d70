# SPDX-License-Identifier: Apache-2.0
"""What a recipe on translations is given: pairs by language, dev pairs held out of them, Tatoeba's test."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Translation, Value, concatenate_datasets
from demo import EMBEDDED_PAIRS, bible_pairs
from torch.nn import functional
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_distill.build import LEALLA_SHAPES, plan
from hf_distill.data import (
    find_leaks,
    load_texts,
    mix_languages,
    normal_form,
    require_texts,
    split_language,
    split_source,
    text_columns,
)
from hf_distill.evaluation.bitext import BitextEvaluator, Pairs, load_bitext
from hf_distill.projection import PCAProjection, centred_map, least_squares
from hf_distill.student import StudentModel
from hf_distill.teachers import AnchoredTeacher, Teacher
from hf_distill.vocabulary import vocabulary_for


logger = logging.get_logger("hf_distill.translations")
_SIDES = Features({"english": Value("string"), "translation": Value("string")})


@dataclass
class Translations:
    """Pairs to train on (english, translation, language), and evaluators of pairs held out and of the test.

    corpus: Every distinct English sentence, then every translation, trained on or not: what a vocabulary is counted on.
    languages: The language of each. evaluators: dev and, with `--tatoeba`, the test; averages over the trained languages,
    those with few pairs and with many, and the others. facts: What results.json says.
    """

    train: Dataset
    corpus: list[str]
    languages: list[str]
    evaluators: list[BitextEvaluator]
    facts: dict[str, Any]


def open_translations(recipe: Any) -> Translations:
    """Return what `--pairs` names, without what `--tatoeba` holds, small languages repeated by `--language_temperature`.

    Raises:
        ValueError: If all pairs of a language have identical sides, or none is left to train on.
    """
    (pairs, test), seed = open_pairs(recipe), recipe.split_seed
    test = load_bitext(recipe.tatoeba) if recipe.tatoeba else test
    whole = concatenate_datasets([part.add_column("language", [code] * len(part)) for code, part in pairs.items()])
    require_texts(whole, list(_SIDES))
    leaked, found = find_leaks(whole, list(_SIDES), chain.from_iterable(chain.from_iterable(test.values())))
    english, translation, language = (whole[:][column] for column in (*_SIDES, "language"))
    same = {i for i, (first, second) in enumerate(zip(english, translation, strict=True)) if first.strip() == second.strip()}
    rows: dict[str, list[int]] = {code: [] for code in pairs}
    for i in sorted(set(range(len(whole))).difference(leaked, same)):
        rows[language[i]].append(i)
    for code, part in pairs.items():
        if sum(language[i] == code for i in same) == len(part):
            raise ValueError(
                f"lealla: all {len(part)} pairs of {code} have two identical sides, expected translations. The student would "
                "learn to find a sentence by itself. Check the columns that --pairs names."
            )
    held = _held_out({code: [english[i] for i in places] for code, places in rows.items()}, recipe.held_out, seed)
    parts, dev = {}, {}
    for code, places in rows.items():
        # A sentence that stands there twice would have two right answers, of which one counts.
        apart = _firsts([i for i in places if normal_form(english[i]) in held], translation)
        apart = _firsts(apart, english)[: recipe.held_out]
        dev[code] = ([translation[i] for i in apart], [english[i] for i in apart])
        train = [i for i in places if normal_form(english[i]) not in held]
        if recipe.max_pairs and len(train) > recipe.max_pairs:
            train = sorted(random.Random(seed).sample(train, recipe.max_pairs))
        parts[code] = whole.select(train).select_columns(list(_SIDES))
    empty = sorted(code for code, part in parts.items() if not len(part))
    if empty:
        raise ValueError(f"lealla: no pair of {empty} is left to train on, expected some. Lower --held_out, or leave them out.")
    if same or leaked:
        logger.info(f"Pairs: {len(leaked)} with a sentence of the test and {len(same)} of identical sides are left out.")
    mixed = mix_languages(parts, recipe.language_temperature, seed)
    facts = {"name": str(recipe.texts_name), "rows": len(mixed), "columns": list(_SIDES), "leaked": len(found)}
    facts |= {"held_out": sum(len(first) for first, _ in dev.values()), "identical": len(same)}
    facts |= {"languages": {code: len(part) for code, part in parts.items()}, "sha256": require_texts(mixed, list(_SIDES))}
    kept = sorted(chain.from_iterable(rows.values()))
    corpus = list(dict.fromkeys(english[i] for i in kept))
    languages = ["english"] * len(corpus) + [language[i] for i in kept]
    dev = {code: sides for code, sides in dev.items() if sides[0]}
    evaluators = [BitextEvaluator(dev, dims=recipe.dims, name="dev")] if dev else []
    if test:
        called = "tatoeba" if recipe.tatoeba else "test"
        evaluators.append(BitextEvaluator(test, _groups(facts["languages"], test), recipe.dims, called))
    return Translations(mixed, corpus + [translation[i] for i in kept], languages, evaluators, facts)


def shape_student(recipe: Any, data: Translations) -> None:
    """Make `--shape`, or what fits in `--max_params` with the backbone's vocabulary, the student's `--from_scratch`."""
    if recipe.max_params:
        tokenizer = AutoTokenizer.from_pretrained(recipe.backbone)  # the student's, too
        wanted = vocabulary_for(tokenizer, data.corpus, data.languages, recipe.coverage)
        found = plan(recipe.max_params, wanted, recipe.dim)
        recipe.from_scratch = [found.hidden_size, found.layers, found.heads, found.intermediate_size]
        recipe.max_vocabulary = found.vocabulary
    elif recipe.shape:
        recipe.from_scratch = list(LEALLA_SHAPES[recipe.shape])


def open_target(recipe: Any, teacher: Teacher, train: Dataset) -> Teacher:
    """Return what the student learns, cached: the teacher's vectors of both sides, or of the English one (`--anchor`).

    With `--center` their mean is subtracted. Where all cosines are high (0.7 and more with e5), the parts on features and
    cosines are nearly 0 for a student that gives one vector to all texts, and pull toward it.
    """
    columns = [train["english"]] if recipe.anchor else [train["english"], train["translation"]]
    teacher.add(*columns)
    target = AnchoredTeacher(teacher) if recipe.anchor else teacher
    if not recipe.center:
        return target
    return target.project(PCAProjection.centering(teacher.blocks(chain.from_iterable(columns))))


def start_student(recipe: Any, student: StudentModel, train: Dataset, teacher: Teacher) -> None:
    """Add the training-only head of feature distillation; behind a teacher's own layers, start it and the projection.

    The projection starts centred, the head by least squares: what a random one sends back harms what the layers know.
    """
    if recipe.feature_weight:
        student.add_training_head(teacher.dim)
    if recipe.from_scratch:
        return
    places = random.Random(recipe.split_seed).sample(range(len(train)), min(len(train), 2500))
    pairs = [(row["english"], row["translation"]) for row in train.select(places)]
    texts = list(chain.from_iterable(pairs))
    student.start_projection(*centred_map(student.pooled(texts), student.dim))
    if recipe.feature_weight:
        targets = functional.normalize(teacher.targets(pairs).flatten(0, 1).float(), dim=-1)
        weight, bias = least_squares(torch.from_numpy(student.encode(texts)), targets)
        student.training_head.load_state_dict({"weight": weight, "bias": bias})


def open_pairs(recipe: Any) -> tuple[dict[str, Dataset], dict[str, Pairs]]:
    """Return (language -> its pairs, english and translation, of all corpora; the embedded default's test pairs).

    Raises:
        ValueError: If `--languages` names one that is not there, a file holds no pairs, or two files are of unequal length.
    """
    test: dict[str, Pairs] = {}
    corpora: dict[str, list[Dataset]] = {}
    for name in recipe.pairs:
        code, source = split_language(name)
        if name == EMBEDDED_PAIRS:
            more, test = bible_pairs()
        elif code and "," in source and all(Path(part).is_file() for part in source.split(",")):
            more = {code: _aligned(code, *source.split(","))}
        elif code:
            more = {code: _table(*split_source(source))}
        elif Path(source).is_dir():
            files = sorted(path for path in Path(source).iterdir() if path.name.startswith("eng-"))
            if not files:
                raise FileNotFoundError(
                    f"lealla: the folder {source} holds no file eng-*, expected eng-deu.tsv.gz and the like. The language of "
                    f"another name is unknown. Say it: deu={source}/<file>."
                )
            more = {path.name.removeprefix("eng-").split(".")[0]: _table(str(path)) for path in files}
        else:
            more = _by_language(*split_source(source))
        for code, part in more.items():
            corpora.setdefault(code, []).append(part)
    unknown = sorted(set(recipe.languages or ()) - corpora.keys())
    if unknown or not corpora:
        raise ValueError(
            f"lealla: --pairs {recipe.pairs} have {sorted(corpora)}, but not {unknown}, expected codes of languages that are "
            "there. The averages would be over other languages than asked for."
        )
    return {code: concatenate_datasets(corpora[code]) for code in recipe.languages or corpora}, test


def _table(source: str, columns: list[str] | None = None) -> Dataset:
    """Return the pairs of a file or Hub data set."""
    return _sides(_load(source), columns, source)


def _load(source: str) -> Dataset:
    """Return a file or Hub data set, org/data@configuration; its sides as columns, where it holds {"en": ..., "de": ...}."""
    name, _, subset = (source, "", "") if Path(source).exists() else source.partition("@")
    dataset = load_texts(name, subset or None)
    if isinstance(dataset.features.get("translation"), (dict, Translation)):  # OPUS on the Hub
        dataset = dataset.flatten()
        nested = [column for column in dataset.column_names if column.startswith("translation.")]
        dataset = dataset.select_columns(nested + [name for name in dataset.column_names if name == "language"])
        dataset = dataset.rename_columns({column: column.removeprefix("translation.") for column in nested})
    return dataset


def _by_language(source: str, columns: list[str] | None) -> dict[str, Dataset]:
    dataset = _load(source)
    if "language" not in dataset.column_names:
        raise ValueError(
            f"lealla: {source} has {dataset.column_names}, expected a column `language`, or a code before it: deu={source}."
        )
    rows: dict[str, list[int]] = {}
    for row, code in enumerate(dataset[:]["language"]):
        rows.setdefault(code, []).append(row)
    pairs = _sides(dataset, columns, source)
    return {code: pairs.select(places) for code, places in rows.items()}


def _sides(dataset: Dataset, columns: list[str] | None, source: str) -> Dataset:
    """Return two columns of a table as english and translation: those named; or the one called so and the first other one."""
    names = columns or text_columns(dataset)
    if not columns and len(names) > 1:
        first = next((name for name in names if name.casefold() in ("english", "eng", "en")), None)
        if first is None:
            first = names[0]
            logger.warning(f"lealla: {source} has no column english; {first} is taken for it. Name both: {source}:eng,deu.")
        names = [first, next(name for name in names if name != first)]
    if len(names) != 2:
        raise ValueError(
            f"lealla: {source} has the text columns {names}, expected two: English and its translation. What belongs together "
            f"is unknown. Name them: {source}:english,german."
        )
    pairs = dataset.select_columns(text_columns(dataset, names))
    pairs = pairs.rename_columns(dict(zip(names, _SIDES, strict=True)))
    return _whole(pairs if pairs.features == _SIDES else pairs.cast(_SIDES), source)


def _whole(pairs: Dataset, source: str) -> Dataset:
    """Return the pairs that have both sides."""
    sides = zip(pairs["english"], pairs["translation"], strict=True)
    kept = [row for row, (first, second) in enumerate(sides) if (first or "").strip() and (second or "").strip()]
    if len(kept) == len(pairs):
        return pairs
    logger.info(f"Pairs: {len(pairs) - len(kept)} of {source} lack a side and are left out.")
    return pairs.select(kept)


def _aligned(code: str, english: str, translation: str) -> Dataset:
    """Return two plain files, a sentence a line, as OPUS gives them."""
    sides = [Path(name).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n") for name in (english, translation)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"lealla: {english} has {len(sides[0])} lines and {translation} {len(sides[1])}, expected as many. From the first "
            f"missing one on, {code} would be aligned with other sentences."
        )
    return _whole(Dataset.from_dict(dict(zip(_SIDES, sides, strict=True)), _SIDES), f"{english},{translation}")


def _held_out(english: Mapping[str, list[str]], count: int, seed: int) -> set[str]:
    """Return English sentences, in normal form, that no language trains on: `count` a language, at most a tenth of its own."""
    held: set[str] = set()
    for code in sorted(english):
        distinct = sorted(set(map(normal_form, english[code])))
        wanted = min(count, len(distinct) // 10) - len(held.intersection(distinct))
        rest = [text for text in distinct if text not in held]
        held |= set(random.Random(f"{seed} {code}").sample(rest, max(wanted, 0)))
    return held


def _firsts(places: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Return the first place of each text in normal form, in order."""
    return sorted({normal_form(texts[i]): i for i in sorted(places, reverse=True)}.values())


def _groups(trained: Mapping[str, int], test: Mapping[str, Pairs]) -> dict[str, list[str]]:
    """Return the test's languages that are averaged: trained, of these the ones below the median of pairs, and others.

    Raises:
        ValueError: If no trained language is in the test.
    """
    known, missing = sorted(trained.keys() & test.keys()), sorted(trained.keys() - test.keys())
    if not known:
        raise ValueError(
            f"lealla: --pairs has {missing}, the test {sorted(test)}, expected a language in both. The codes may be of another "
            "kind (de, deu), and the test would say nothing of what was trained. Name pairs with the test's: deu=file."
        )
    if missing:
        logger.warning(f"lealla: the test has no {', '.join(missing)}; what is learned there is not measured. Is it the code?")
    median = statistics.median(trained[code] for code in known)
    groups = {"trained": known, "few_pairs": [code for code in known if trained[code] < median]}
    groups["many_pairs"] = [code for code in known if trained[code] >= median] if groups["few_pairs"] else []
    groups["other"] = sorted(test.keys() - trained.keys())
    return {name: codes for name, codes in groups.items() if codes}
