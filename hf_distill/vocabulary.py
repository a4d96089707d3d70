# SPDX-License-Identifier: Apache-2.0
"""Vocabularies cut to what a corpus uses; texts all of whose tokens survive are tokenised as before."""

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from .student import StudentModel


logger = logging.get_logger(__name__)


@dataclass
class Pruned:
    """What `prune_vocabulary` kept.

    kept, of: Tokens. parameters: Weights saved. coverage: Share of the corpus's tokens that survive, in [0, 1].
    whole_texts: Share of its texts that are tokenised as before, in [0, 1]. languages: Language -> coverage.
    """

    kept: int
    of: int
    parameters: int
    coverage: float
    whole_texts: float
    languages: dict[str, float] = field(default_factory=dict)


def prune_vocabulary(
    student: StudentModel,
    texts: Iterable[str],
    max_tokens: int | None = None,
    languages: Iterable[str] | None = None,
    min_coverage: float = 0.9,
) -> Pruned:
    """Cut a student's vocabulary, in place, to the tokens that a corpus uses: WordPiece, Unigram or BPE.

    Special tokens and all single characters (and bytes) stay, so a word whose token went is spelt with shorter ones and none
    becomes unknown that was not. A text all of whose tokens survive is tokenised exactly as before. WordPiece takes the longest
    match from the left, and the longest of all is still the longest of those left; Unigram takes the likeliest segmentation,
    which is still the likeliest of those left; of BPE, every token that a kept one is merged from stays, too, with its merge.

    Args:
        student: Its token embeddings and tokenizer are replaced, its other weights stay.
        texts: The corpus. Its tokens are in memory meanwhile, 5 bytes each, more for those that go.
        max_tokens: Keep at most so many, the most frequent ones; None for all that are used.
        languages: The language of each text: frequencies are then relative to each language's own, summed, so that a small
            language keeps its tokens beside a large one, and coverage is reported for each.
        min_coverage: A language below it is warned about, in [0, 1].

    Raises:
        ValueError: If the tokenizer is of another kind (shorter pieces would not be found the same way), or max_tokens leaves
            no room for special tokens and characters.
    """
    tokenizer = student.tokenizer
    counts: dict[str | None, Counter[int]] = {}
    used, ends = array("i"), array("q", [0])  # the tokens of all texts, and where each text ends
    for language, ids in _tokens(tokenizer, texts, languages):
        counts.setdefault(language, Counter()).update(ids)
        used.extend(ids)
        ends.append(len(used))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = _vocabulary(content)
        keep = _choose(content, vocabulary, counts, max_tokens)
        place = {old: new for new, old in enumerate(keep)}
        _cut(content, vocabulary, place)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        for other in folder.glob("vocab.*"):
            other.unlink()  # the whole vocabulary in its old form; tokenizer.json is what is read
        pruned = AutoTokenizer.from_pretrained(folder)
    pruned.model_max_length = tokenizer.model_max_length
    saved = student.num_parameters()
    _keep_rows(student, keep, place)
    saved -= student.num_parameters()
    student.tokenizer = pruned
    gone = np.searchsorted(np.flatnonzero(~np.isin(used, keep)), ends)  # how many tokens up to the end of each text
    whole, total = int((np.diff(gone) == 0).sum()), len(ends) - 1
    coverage = {
        language: sum(n for i, n in found.items() if i in place) / max(found.total(), 1) for language, found in counts.items()
    }
    tokens = {language: found.total() for language, found in counts.items()}
    covered = sum(coverage[language] * tokens[language] for language in counts) / max(sum(tokens.values()), 1)
    named = {language: share for language, share in coverage.items() if language is not None}
    report = Pruned(len(keep), len(tokenizer), saved, covered, whole / max(total, 1), named)
    student.settings["vocabulary"] = asdict(report)
    logger.info(
        f"StudentModel: {report.kept} of {report.of} tokens kept, {saved / 1e6:.1f}M parameters saved; they are "
        f"{100 * covered:.2f} % of the corpus, {100 * report.whole_texts:.1f} % of its texts are tokenised as before."
    )
    _name_languages(named, min_coverage)
    return report


def _name_languages(coverage: dict[str, float], least: float) -> None:
    """Say which languages keep the smallest share of their tokens; warn of those that keep less than `least`."""
    worst = [f"{language} {100 * share:.2f} %" for language, share in sorted(coverage.items(), key=lambda item: item[1])[:10]]
    if worst:
        logger.info(f"StudentModel: tokens kept by language, the least first: {', '.join(worst)}.")
    poor = [f"{language} {100 * share:.1f} %" for language, share in sorted(coverage.items()) if share < least]
    if poor:
        logger.warning(
            f"prune_vocabulary: the kept tokens are less than {100 * least:.0f} % of {', '.join(poor)}. Such text is "
            "spelt in shorter pieces than its embeddings were trained for. Raise max_tokens."
        )


def vocabulary_for(
    tokenizer: Any, texts: Iterable[str], languages: Iterable[str] | None = None, coverage: float = 0.995
) -> int:
    """Return how many tokens `prune_vocabulary` must keep to cover a share of a corpus, in [0, 1], the mean over languages."""
    counts: dict[str | None, Counter[int]] = {}
    for language, ids in _tokens(tokenizer, texts, languages):
        counts.setdefault(language, Counter()).update(ids)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = _vocabulary(content)
    keep, parts, ranked = _always(content, vocabulary), _parts(content["model"], vocabulary), _ranked(counts)
    shares = dict(ranked)
    covered, wanted = sum(shares.get(i, 0.0) for i in keep), coverage * sum(shares.values())
    for i in shares:
        if covered >= wanted:
            break
        new = parts(i) - keep  # of BPE what it is merged from, too, which is used by itself as well
        keep |= new
        covered += sum(shares.get(part, 0.0) for part in new)
    return len(keep)


def _tokens(tokenizer: Any, texts: Iterable[str], languages: Iterable[str] | None) -> Iterable[tuple[str | None, list[int]]]:
    rows = zip(texts, repeat(None), strict=False) if languages is None else zip(texts, languages, strict=True)
    while batch := list(islice(rows, 1000)):
        ids = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip((language for _, language in batch), ids, strict=True)


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """Return token -> id of a tokenizer.json."""
    model = content["model"]
    if model["type"] == "Unigram":
        return {token: i for i, (token, _) in enumerate(model["vocab"])}
    if model["type"] not in ("WordPiece", "BPE"):
        raise ValueError(
            f"prune_vocabulary: the tokenizer is {model['type']}, expected WordPiece, Unigram or BPE. Texts would be cut "
            "otherwise than the embeddings were trained for. Keep the whole vocabulary."
        )
    return model["vocab"]


def _choose(
    content: dict[str, Any], vocabulary: dict[str, int], counts: dict[str | None, Counter[int]], max_tokens: int | None
) -> list[int]:
    """Return the ids to keep, in order: what always stays, then the most frequent ones with what they are made of."""
    keep, parts = _always(content, vocabulary), _parts(content["model"], vocabulary)
    if max_tokens is not None and max_tokens < len(keep):
        raise ValueError(
            f"prune_vocabulary: max_tokens is {max_tokens}, expected at least {len(keep)}, the special tokens and single "
            "characters. Words would become unknown. Raise it."
        )
    for i, _ in _ranked(counts):
        new = parts(i) - keep
        if max_tokens is None or len(keep) + len(new) <= max_tokens:
            keep |= new
    return sorted(keep)


def _always(content: dict[str, Any], vocabulary: dict[str, int]) -> set[int]:
    """Return the ids of special tokens, single characters and bytes."""
    model = content["model"]
    affixes = [model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    keep = {token["id"] for token in content["added_tokens"]}
    for token, i in vocabulary.items():
        if len(token.removeprefix(affixes[0]).removesuffix(affixes[1])) == 1 or (token.startswith("<0x") and len(token) == 6):
            keep.add(i)
    if model["type"] == "Unigram":
        # An unknown character counts as the unlikeliest token less a constant: were that one gone, texts with one could be
        # cut otherwise.
        keep.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
        keep |= {model["unk_id"]} - {None}
    return keep | ({vocabulary[model["unk_token"]]} if model.get("unk_token") in vocabulary else set())


def _ranked(counts: dict[str | None, Counter[int]]) -> list[tuple[int, float]]:
    """Return (id, frequency relative to each language, summed), the most frequent first."""
    weight: Counter[int] = Counter()
    for found in counts.values():
        total = found.total()
        for i, number in found.items():
            weight[i] += number / total
    return sorted(weight.items(), key=lambda item: (-item[1], item[0]))


def _parts(model: dict[str, Any], vocabulary: dict[str, int]) -> Callable[[int], set[int]]:
    """Return a function: id -> the ids without which it would not be found, its own among them."""
    if model["type"] != "BPE":
        return lambda i: {i}
    makers: dict[int, list[tuple[int, int]]] = {}
    for first, second in _merges(model):
        makers.setdefault(vocabulary[_merged(model, first, second)], []).append((vocabulary[first], vocabulary[second]))

    def parts(i: int) -> set[int]:
        found, open_ = {i}, [i]
        while open_:
            for pair in makers.get(open_.pop(), ()):
                new = set(pair) - found
                found |= new
                open_ += new
        return found

    return parts


def _merges(model: dict[str, Any]) -> list[Sequence[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _merged(model: dict[str, Any], first: str, second: str) -> str:
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _cut(content: dict[str, Any], vocabulary: dict[str, int], place: dict[int, int]) -> None:
    """Leave the kept tokens in a tokenizer.json, under their new ids."""
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [row for i, row in enumerate(model["vocab"]) if i in place]
        model["unk_id"] = None if model["unk_id"] is None else place[model["unk_id"]]
    else:
        model["vocab"] = {token: place[i] for token, i in vocabulary.items() if i in place}
    if model["type"] == "BPE":
        kept = model["vocab"]
        model["merges"] = [
            merge for merge in map(list, _merges(model)) if all(part in kept for part in (*merge, _merged(model, *merge)))
        ]
    for token in content["added_tokens"]:
        token["id"] = place[token["id"]]
    _renumber(content["post_processor"], place)
    if content["padding"]:
        content["padding"]["pad_id"] = place[content["padding"]["pad_id"]]


def _renumber(processor: dict[str, Any] | None, place: dict[int, int]) -> None:
    """Give the special tokens that are put around a text their new ids."""
    kind = None if processor is None else processor["type"]
    if kind == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [place[i] for i in token["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for side in ("sep", "cls"):
            processor[side][1] = place[processor[side][1]]
    elif kind == "Sequence":
        for part in processor["processors"]:
            _renumber(part, place)
    elif kind not in (None, "ByteLevel"):
        raise ValueError(
            f"prune_vocabulary: the tokenizer's post-processor is {kind}, expected a template, or that of BERT or RoBERTa. The "
            "special tokens around a text would be others. Keep the whole vocabulary."
        )


@torch.no_grad()
def _keep_rows(student: StudentModel, keep: list[int], place: dict[int, int]) -> None:
    table = student.backbone.get_input_embeddings()  # stays what it is: Gemma's scales what it looks up
    table.weight = nn.Parameter(table.weight[keep], requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(keep)
    if table.padding_idx is not None:
        table.padding_idx = place[table.padding_idx]
    for config in {id(c): c for c in (student.config, student.backbone.config)}.values():
        config.vocab_size = len(keep)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
            old = getattr(config, name, None)
            if old is not None:  # of several ends of a text, those that are kept
                setattr(config, name, [place[i] for i in old if i in place] if isinstance(old, list) else place.get(old))
