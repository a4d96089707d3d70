# SPDX-License-Identifier: Apache-2.0
"""The losses, a file a paper: tensors in, named parts out."""

from .base import DistillationLoss, WeightedLoss
from .embed_distill import ContrastiveLoss, EmbeddingMatching, ScoreDistillation
from .hpd import HPDLoss
from .similarity import SimilarityLoss


__all__ = [
    "ContrastiveLoss",
    "DistillationLoss",
    "EmbeddingMatching",
    "HPDLoss",
    "ScoreDistillation",
    "SimilarityLoss",
    "WeightedLoss",
]
