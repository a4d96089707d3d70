# SPDX-License-Identifier: Apache-2.0
"""Rank correlation of cosine similarity with human scores, as an `evaluate.Metric` (self-contained, as its loader wants)."""

import datasets
import evaluate
import numpy as np
import scipy.stats


def cosine_spearman(first: np.ndarray, second: np.ndarray, scores: np.ndarray) -> float:
    """Return Spearman's rank correlation times 100, in [-100, 100], ties averaged.

    Args:
        first: [N, D], embeddings of the first texts.
        second: [N, D], of the second texts.
        scores: [N], how similar people find each pair.
    """
    return rank_correlation(cosines(first, second), scores)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation of two lists of N numbers, times 100, ties averaged; 0 where one is all the same."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return 100 * float(np.corrcoef(scipy.stats.rankdata(first), scipy.stats.rankdata(second))[0, 1])


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair, [N] float64."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.maximum(lengths, 1e-12)


class CosineSpearman(evaluate.Metric):
    """compute(predictions=[(embedding, embedding), ...] as [N, 2, D], references=[N]) -> {"cosine_spearman": ...}."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Spearman correlation (times 100) between the cosine of two embeddings and a human score.",
            citation="Agirre et al., SemEval semantic textual similarity tasks, 2012 to 2016",
            inputs_description="predictions: [N, 2, D] pairs of embeddings; references: [N] scores.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                    "references": datasets.Value("float32"),
                }
            ),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        pairs = np.asarray(predictions)
        return {"cosine_spearman": cosine_spearman(pairs[:, 0], pairs[:, 1], np.asarray(references))}
