# SPDX-License-Identifier: Apache-2.0
"""Similarity (STS) and fidelity to the teacher."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data import load_texts, normal_form, only_file
from .metrics.cosine_spearman import cosine_spearman, cosines, rank_correlation
from .metrics.embedding_fidelity import embedding_fidelity
from .uncertainty import interval


logger = logging.get_logger(__name__)
Encode = Callable[[list[str]], Any]

# The seven sets of SentEval as SimCSE and HPD report them: name -> (file in a local folder, Hub id, split there).
STS_SETS = {
    "STS12": ("sts12", "mteb/sts12-sts", "test"),
    "STS13": ("sts13", "mteb/sts13-sts", "test"),
    "STS14": ("sts14", "mteb/sts14-sts", "test"),
    "STS15": ("sts15", "mteb/sts15-sts", "test"),
    "STS16": ("sts16", "mteb/sts16-sts", "test"),
    "STS-B": ("stsb-test", "mteb/stsbenchmark-sts", "test"),
    "SICK-R": ("sick-test", "mteb/sickr-sts", "test"),
}
STS_DEV_SETS = {"STS-B dev": ("stsb-dev", "mteb/stsbenchmark-sts", "validation")}


class STSEvaluator:
    """Spearman's correlation of the cosine with human scores, times 100, on each set, and their mean.

    One correlation over all pairs of a set (the "all" setting), no regressor, as SimCSE and HPD report it (HPD, Zhao et al.
    2022, https://huggingface.co/papers/2203.07687, Table 1).

    Args:
        source: Folder with a file a set (`sts12.tsv.gz`, `stsb-test.tsv.gz`, ... with sentence1, sentence2, score), or None
            for the Hub.
        sets: Name -> (file, Hub id, split); the seven test sets, or STS_DEV_SETS to choose on.
        dims: Also score the first so many dimensions of each embedding, as `sts_avg@32`.

    Raises:
        FileNotFoundError: If a set is missing: the mean of the others would be read as the mean of all.
    """

    def __init__(
        self,
        source: str | Path | None = None,
        sets: dict[str, tuple[str, str, str]] | None = None,
        dims: Sequence[int] = (),
    ) -> None:
        self.dims = dims
        self._last: dict[str, np.ndarray] = {}  # cosines of the pairs, by set
        self.sets: dict[str, tuple[list[str], list[str], np.ndarray]] = {}
        for name, (file, hub_id, split) in (sets or STS_SETS).items():
            rows = load_texts(only_file(Path(source), file, "STSEvaluator") if source else hub_id, split=split)
            missing = {"sentence1", "sentence2", "score"} - set(rows.column_names)
            if missing:
                raise ValueError(f"STSEvaluator: {name} has columns {rows.column_names}, but not {sorted(missing)}.")
            human = np.asarray(rows["score"], np.float64)
            if np.isnan(human).any():
                raise ValueError(f"STSEvaluator: {name} has no score in row {int(np.isnan(human).argmax())}, expected numbers.")
            self.sets[name] = (list(rows["sentence1"]), list(rows["sentence2"]), human)
        self._texts = self._distinct()

    def texts(self) -> list[str]:
        """Return every distinct sentence, of pairs that are left out, too: what the leak check compares with."""
        return self._texts

    def _distinct(self) -> list[str]:
        return list(dict.fromkeys(text for first, second, _ in self.sets.values() for text in first + second))

    def leave_out(self, others: Sequence["STSEvaluator"]) -> None:
        """Score no pair that stands in another's sets, too, in either order, of whatever case and punctuation.

        For a dev set: STS-B was drawn from the sets of 2012 to 2017, and most of its dev pairs are test pairs of these.

        Raises:
            ValueError: If fewer than three pairs of a set are left.
        """
        pairs = [zip(first, second, strict=True) for other in others for first, second, _ in other.sets.values()]
        known = {frozenset(map(normal_form, pair)) for rows in pairs for pair in rows}
        for name, (first, second, human) in self.sets.items():
            sides = zip(first, second, strict=True)
            kept = [row for row, pair in enumerate(sides) if frozenset(map(normal_form, pair)) not in known]
            if len(kept) < 3:
                raise ValueError(
                    f"STSEvaluator: {len(kept)} of {len(first)} pairs of {name} are in no test set, expected 3 or more. What "
                    "is chosen by them would be chosen on the test. Take another set to choose on."
                )
            if len(kept) < len(first):
                logger.info(f"{name}: {len(first) - len(kept)} of {len(first)} pairs stand in test sets and are not scored.")
            self.sets[name] = ([first[row] for row in kept], [second[row] for row in kept], human[kept])

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Return {"sts_STS12": ..., ..., "sts_avg": ...} and the mean of each of the `forms`; of one set no mean."""
        row = {text: i for i, text in enumerate(self._distinct())}
        vectors = np.asarray(encode(list(row)))
        scores: dict[str, float] = {}
        means: dict[str, list[float]] = {}
        for form, reduced in forms(vectors, self.dims).items():
            for name, (first, second, human) in self.sets.items():
                a, b = (reduced[[row[text] for text in side]] for side in (first, second))
                score = cosine_spearman(a, b, human)
                if not form:
                    scores[f"sts_{name}"] = score
                    self._last[name] = cosines(a, b)
                means.setdefault(f"sts_avg{form}", []).append(score)
        if len(self.sets) == 1:
            return scores
        return scores | {name: float(np.mean(values)) for name, values in means.items()}

    def intervals(self) -> dict[str, list[float]]:
        """Return the 95 % bootstrap interval of the last call's mean (of the only set, where there is one) over its pairs."""
        both = {name: (own, self.sets[name][2]) for name, own in self._last.items()}
        parts = [
            (len(human), lambda rows, own=own, human=human: rank_correlation(own[rows], human[rows]))
            for own, human in both.values()
        ]
        return {"sts_avg" if len(parts) > 1 else f"sts_{next(iter(self.sets))}": interval(parts)} if parts else {}


class FidelityEvaluator:
    """How far the student agrees with its teacher on held-out texts; needs no labels.

    Args:
        texts: N held-out texts.
        teacher: [N, D_t], the teacher's vectors of them.
        dims: Also score the first so many dimensions, as `fidelity_spearman@32`.
        neighbours: How many nearest neighbours are compared.
    """

    def __init__(self, texts: list[str], teacher: Any, dims: Sequence[int] = (), neighbours: int = 10) -> None:
        self.held_out, self.teacher, self.dims, self.neighbours = list(texts), np.asarray(teacher), dims, neighbours

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Return fidelity_spearman and fidelity_neighbours, both times 100, of each of the `forms`."""
        scores = {}
        for form, reduced in forms(np.asarray(encode(self.held_out)), self.dims).items():
            found = embedding_fidelity(reduced, self.teacher, self.neighbours)
            scores |= {f"{name}{form}": value for name, value in found.items()}
        return scores


def forms(vectors: np.ndarray, dims: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """Return embeddings as they are ("") and as they may be kept to save space, by the ending of their scores' names.

    "@32": the first so many dimensions. "@int8": 8 bits a number, each dimension scaled by its largest value. "@binary": the
    signs alone, one bit a number.

    Args:
        vectors: [N, D].
        dims: Of which the first are kept; those beyond D are left out.
    """
    scale = np.maximum(np.abs(vectors).max(0, initial=0), 1e-12) / 127
    found = {"": vectors, **{f"@{dim}": vectors[:, :dim] for dim in dims if dim <= vectors.shape[1]}}
    return found | {"@int8": np.rint(vectors / scale) * scale, "@binary": np.where(vectors > 0, 1.0, -1.0)}
