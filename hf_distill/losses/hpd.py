# SPDX-License-Identifier: Apache-2.0
"""Homomorphic projective distillation."""

from torch import Tensor, nn

from .base import DistillationLoss


class HPDLoss(DistillationLoss):
    """Mean squared difference between the student's projected embedding and the teacher's PCA coordinates.

    Source: HPD, Zhao et al. 2022, https://huggingface.co/papers/2203.07687, Fig. 1 ("mean square loss"); the mean is over
    batch and dimensions, as in the released code.
    Differs from the paper: nothing by default. With normalize=True both sides are scaled to unit length first, which makes
    it 2 (1 - cos) / D: blind to length, as the cosine that embeddings are compared with.

    Args:
        normalize: Whether both sides are scaled to unit length before they are compared.

    Example:
        >>> import torch
        >>> HPDLoss()(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
        {'mse': tensor(2.5000)}
    """

    output = "projected"
    parts = ("mse",)
    paper = "2203.07687"

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"mse": scalar >= 0}.

        Args:
            student: [B, C, D], before normalisation, with gradient.
            teacher: [B, C, D], the teacher's vectors after PCA.

        Raises:
            ValueError: If the shapes differ.
        """
        teacher = self._same_shape(student, teacher)
        if self.normalize:
            student, teacher = nn.functional.normalize(student, dim=-1), nn.functional.normalize(teacher, dim=-1)
        return {"mse": nn.functional.mse_loss(student, teacher)}
