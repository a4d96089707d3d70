# SPDX-License-Identifier: Apache-2.0
"""How far a student orders texts as its teacher does, as an `evaluate.Metric` (self-contained, as its loader wants)."""

import datasets
import evaluate
import numpy as np
import scipy.stats


def embedding_fidelity(student: np.ndarray, teacher: np.ndarray, neighbours: int = 10) -> dict[str, float]:
    """Return two scores that need no labels.

    fidelity_spearman: rank correlation times 100 of student's and teacher's cosines over all N (N - 1) / 2 pairs.
    fidelity_neighbours: share of the teacher's nearest neighbours that are the student's too, times 100, averaged.

    Args:
        student: [N, D_s], embeddings of N held-out texts.
        teacher: [N, D_t], the teacher's of the same texts.
        neighbours: How many nearest neighbours of each text.

    Raises:
        ValueError: If there are too few texts: of 11 texts every one is among the 10 neighbours, and the overlap is 100.
    """
    if len(student) != len(teacher) or len(student) <= neighbours + 1:
        raise ValueError(
            f"embedding_fidelity: {len(student)} student and {len(teacher)} teacher vectors, expected as many of both and "
            f"more than {neighbours + 1}. The overlap of neighbours would say nothing. Give more held-out texts."
        )
    cosines, nearest = [], []
    for vectors in (student, teacher):
        vectors = np.asarray(vectors, np.float32)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        matrix = vectors @ vectors.T
        cosines.append(matrix[np.triu_indices(len(matrix), 1)])
        np.fill_diagonal(matrix, -np.inf)
        nearest.append(np.argpartition(-matrix, neighbours, axis=1)[:, :neighbours])
    shared = [len(np.intersect1d(a, b)) / neighbours for a, b in zip(*nearest, strict=True)]
    same = any(np.ptp(values) == 0 for values in cosines)  # there is no order to agree with
    return {
        "fidelity_spearman": 0.0 if same else 100 * float(scipy.stats.spearmanr(*cosines).statistic),
        "fidelity_neighbours": 100 * float(np.mean(shared)),
    }


class EmbeddingFidelity(evaluate.Metric):
    """compute(predictions=[N, D_s] of the student, references=[N, D_t] of the teacher) -> the two scores."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Agreement of a student's similarities and nearest neighbours with its teacher's (times 100).",
            citation="",
            inputs_description="predictions: [N, D_s] student embeddings; references: [N, D_t] teacher embeddings.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions: list, references: list, neighbours: int = 10) -> dict[str, float]:
        return embedding_fidelity(np.asarray(predictions), np.asarray(references), neighbours)
