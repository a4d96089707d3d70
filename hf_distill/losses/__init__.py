# SPDX-License-Identifier: Apache-2.0
"""The losses, a file a paper: tensors in, named parts out."""

from .base import DistillationLoss, WeightedLoss
from .embed_distill import ContrastiveLoss, EmbeddingMatching, ScoreDistillation
from .hpd import HPDLoss
from .lealla import AdditiveMarginSoftmax, FeatureDistillation, LogitDistillation
from .multi_sense import SenseLoss, StateLoss
from .similarity import SimilarityLoss


__all__ = [
    "AdditiveMarginSoftmax",
    "ContrastiveLoss",
    "DistillationLoss",
    "EmbeddingMatching",
    "FeatureDistillation",
    "HPDLoss",
    "LogitDistillation",
    "ScoreDistillation",
    "SenseLoss",
    "SimilarityLoss",
    "StateLoss",
    "WeightedLoss",
]
