# SPDX-License-Identifier: Apache-2.0
"""Bitext: translations found among candidates (Tatoeba), and mined from two monolingual lists (BUCC)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import load_texts
from .uncertainty import interval


Encode = Callable[[list[str]], Any]
Pairs = tuple[list[str], list[str]]

MARGINS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ratio": lambda cosine, mean: cosine / mean,
    "distance": lambda cosine, mean: cosine - mean,
    "absolute": lambda cosine, mean: cosine,
}


def load_bitext(source: str | Path, languages: Sequence[str] | None = None) -> dict[str, Pairs]:
    """Return language -> (its sentences, their English translations), row by row.

    Args:
        source: A file or Hub id with columns language, source and english; or a folder in LASER's layout
            (`tatoeba.deu-eng.deu` beside `tatoeba.deu-eng.eng`, a sentence a line).
        languages: Codes to take; all if None.

    Raises:
        ValueError: If a code is not there, or a column is missing. What the rows hold is checked by `BitextEvaluator`.
    """
    pairs: dict[str, Pairs] = {}
    if Path(source).is_dir():
        for path in sorted(Path(source).glob("*-eng.eng")):
            code = path.name.removesuffix("-eng.eng").rpartition(".")[2]
            sides = (path.with_name(path.name.removesuffix("eng") + code), path)
            first, second = (side.read_text(encoding="utf-8-sig").rstrip("\n").split("\n") for side in sides)
            pairs[code] = (first, second)
    else:
        table = load_texts(source)
        missing = {"language", "source", "english"} - set(table.column_names)
        if missing:
            raise ValueError(f"load_bitext: {source} has columns {table.column_names}, but not {sorted(missing)}.")
        for code, first, second in zip(table["language"], table["source"], table["english"], strict=True):
            for side, text in zip(pairs.setdefault(code, ([], [])), (first, second), strict=True):
                side.append(text)
    unknown = sorted(set(languages or ()) - pairs.keys())
    if unknown or not pairs:
        raise ValueError(f"load_bitext: {source} has {sorted(pairs)}, but not {unknown}, expected codes as in its rows (deu).")
    return {code: sides for code, sides in pairs.items() if languages is None or code in languages}


class BitextEvaluator:
    """Accuracy of the nearest neighbour by cosine, times 100, in both directions: Tatoeba's protocol.

    Source: Artetxe and Schwenk 2019 (LASER), https://huggingface.co/papers/1812.10464; the mean of both directions, then over
    languages, as LEALLA, Mao et al. 2023, https://huggingface.co/papers/2302.08387, reports it. Row i is right for row i only,
    also where a sentence stands there twice.

    Args:
        pairs: Language -> (sentences, English translations).
        groups: Name -> languages, for averages of their own (those that were trained, and the others).
        dims: Also score the first so many dimensions, as `tatoeba_avg@64`.
        name: What the scores begin with.

    Raises:
        ValueError: If two sides are of unequal length, empty or identical, or a group names a language that is not there.
    """

    def __init__(
        self,
        pairs: Mapping[str, Pairs],
        groups: Mapping[str, Sequence[str]] | None = None,
        dims: Sequence[int] = (),
        name: str = "tatoeba",
    ) -> None:
        for code, (first, second) in pairs.items():
            if len(first) != len(second) or not first or first == second or not all(map(str.strip, [*first, *second])):
                raise ValueError(
                    f"BitextEvaluator: {code} has {len(first)} sentences and {len(second)} translations (identical: "
                    f"{first == second}), expected as many, none of them empty, and translations. Accuracy would be that of "
                    "other pairs. Correct the files."
                )
        self.pairs, self.groups, self.dims, self.name = dict(pairs), dict(groups or {}), dims, name
        self._last: list[np.ndarray] = []  # for each language, how much of each pair was found: 0, 50 or 100
        unknown = sorted({code for codes in self.groups.values() for code in codes} - pairs.keys())
        if unknown or not all(self.groups.values()):
            raise ValueError(f"BitextEvaluator: groups name {unknown}, expected languages of the set, {sorted(pairs)}.")

    def texts(self) -> list[str]:
        """Return every distinct sentence: what the leak check compares with, and what an encoder is given."""
        return list(dict.fromkeys(text for first, second in self.pairs.values() for text in first + second))

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Return {"tatoeba_avg", "tatoeba_<group>", ...} and, by language, "tatoeba:deu>eng", "tatoeba:eng>deu", the mean."""
        row = {text: i for i, text in enumerate(self.texts())}
        vectors = np.asarray(encode(list(row)))
        scores: dict[str, float] = {}
        self._last = []
        for dim in (None, *(dim for dim in self.dims if dim <= vectors.shape[1])):
            found = {}
            for code, sides in self.pairs.items():
                first, second = (_unit(vectors[[row[text] for text in side], :dim]) for side in sides)
                cosines, rows = first @ second.T, np.arange(len(first))
                right = 100.0 * np.stack([cosines.argmax(axis) == rows for axis in (1, 0)])
                both = right.mean(1).tolist()
                found[code] = float(np.mean(both))
                if dim is None:
                    self._last.append(right.mean(0))
                    scores[f"{self.name}:{code}>eng"], scores[f"{self.name}:eng>{code}"] = both
                    scores[f"{self.name}:{code}"] = found[code]
            for group, codes in {"avg": list(found), **self.groups}.items():
                name = f"{self.name}_{group}" if dim is None else f"{self.name}_{group}@{dim}"
                scores[name] = float(np.mean([found[code] for code in codes]))
        return scores

    def intervals(self) -> dict[str, list[float]]:
        """Return the 95 % bootstrap interval of the last call's mean over the languages, over the pairs of each."""
        parts = [(len(values), lambda rows, values=values: values[rows].mean()) for values in self._last]
        return {f"{self.name}_avg": interval(parts)} if parts else {}


def mine_bitext(sources: Any, targets: Any, k: int = 4, margin: str = "ratio") -> tuple[np.ndarray, np.ndarray]:
    """Return (scores [P], rows of a source and a target [P, 2]), best first: candidates for translations in two lists.

    The cosine of a pair is compared with the mean cosine of each side's k nearest neighbours in the other list. For every
    source the best of its neighbours is a candidate, and for every target; the best candidates are taken one by one, each
    sentence once ("max" retrieval).

    Source: Artetxe and Schwenk 2019, https://huggingface.co/papers/1811.01136, as LASER mines BUCC.

    Args:
        sources: [N, D].
        targets: [M, D].
        k: Neighbours.
        margin: "ratio" (the cosine over the mean), "distance" (less the mean) or "absolute" (the cosine alone).

    Raises:
        ImportError: If faiss is not installed.
        ValueError: If there is no such margin, or a list is shorter than k.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("Mining bitext needs faiss. Install it with: pip install 'hf_distill[retrieval]'") from error
    if margin not in MARGINS or min(len(sources), len(targets)) < k:
        raise ValueError(
            f"mine_bitext: margin is {margin!r} for {len(sources)} and {len(targets)} sentences, expected one of "
            f"{sorted(MARGINS)}, and at least k = {k} sentences a side."
        )
    sources, targets = _unit(sources), _unit(targets)
    there, right = faiss.knn(sources, targets, k, faiss.METRIC_INNER_PRODUCT)  # [N, k]
    back, left = faiss.knn(targets, sources, k, faiss.METRIC_INNER_PRODUCT)  # [M, k]
    near_source, near_target = there.mean(1), back.mean(1)
    forward = MARGINS[margin](there, (near_source[:, None] + near_target[right]) / 2)
    backward = MARGINS[margin](back, (near_target[:, None] + near_source[left]) / 2)
    best, rows = forward.argmax(1), np.arange(len(sources))
    candidates = [np.stack([rows, right[rows, best]], 1)]
    scores = [forward[rows, best]]
    best, rows = backward.argmax(1), np.arange(len(targets))
    candidates.append(np.stack([left[rows, best], rows], 1))
    scores.append(backward[rows, best])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    used: tuple[set[int], set[int]] = (set(), set())
    kept = []
    for place, (source, target) in zip(order, np.concatenate(candidates)[order].tolist(), strict=True):
        if source not in used[0] and target not in used[1]:
            used[0].add(source)
            used[1].add(target)
            kept.append(place)
    return np.concatenate(scores)[kept], np.concatenate(candidates)[kept]


def mining_threshold(scores: np.ndarray, pairs: np.ndarray, gold: Iterable[tuple[int, int]]) -> float:
    """Return the score that candidates must reach for the highest F1 against the gold pairs: to be tuned on a training set."""
    known, right, best, threshold = set(map(tuple, gold)), 0, -1.0, float("inf")
    for count, pair in enumerate(map(tuple, pairs.tolist()), start=1):
        right += pair in known
        f1 = 2 * right / (count + len(known))
        after = scores[count] if count < len(scores) else -np.inf
        if f1 > best and after < scores[count - 1]:  # no threshold divides equal scores
            best, threshold = f1, float(scores[count - 1] if after == -np.inf else (scores[count - 1] + after) / 2)
    return threshold


def mining_scores(scores: np.ndarray, pairs: np.ndarray, gold: Iterable[tuple[int, int]], threshold: float) -> dict[str, float]:
    """Return precision, recall and f1, times 100, of the candidates that reach the threshold."""
    known = set(map(tuple, gold))
    found = set(map(tuple, pairs[scores >= threshold].tolist()))
    right = len(known & found)
    precision, recall = right / max(len(found), 1), right / max(len(known), 1)
    f1 = 2 * right / max(len(found) + len(known), 1)
    return {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1}


def _unit(vectors: Any) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
