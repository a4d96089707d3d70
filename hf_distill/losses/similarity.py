# SPDX-License-Identifier: Apache-2.0
"""Similarity-preserving distillation."""

import torch
from torch import Tensor, nn

from .base import DistillationLoss


class SimilarityLoss(DistillationLoss):
    """Mean squared difference between the cosines of all pairs of texts in a batch, the student's and the teacher's.

    Coordinates that a small student can't predict are pulled toward their mean by a squared error of coordinates, and the
    cosines they made go with them; this loss holds the cosines themselves. Alone it leaves the student free to turn its
    space: put it beside `HPDLoss` (`WeightedLoss`) where vectors are compared with the teacher's.

    Source: Tung and Mori 2019, https://huggingface.co/papers/1907.09682.
    Differs from the paper: cosines, whose diagonal is always 1 and is left out, in place of products scaled by row.

    The pairs are those of one batch, on all processes; accumulation over two batches is not one batch of twice the size.

    Example:
        >>> import torch
        >>> SimilarityLoss()(torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]]), torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]))
        {'similarity': tensor(1.)}
    """

    output = "projected"
    parts = ("similarity",)
    in_batch = True
    paper = "1907.09682"

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"similarity": scalar in [0, 4]}; zero for a batch of one text.

        Args:
            student: [B, C, D], with gradient; all B * C texts are paired.
            teacher: [B, C, D].

        Raises:
            ValueError: If the shapes differ.
        """
        teacher = self._same_shape(student, teacher)
        ours, theirs = (nn.functional.normalize(side.flatten(0, 1), dim=-1) for side in (student, teacher))
        count = len(ours)
        difference = (ours @ ours.T - theirs @ theirs.T).masked_fill(torch.eye(count, dtype=torch.bool, device=ours.device), 0)
        return {"similarity": difference.square().sum() / max(count * (count - 1), 1)}
