# SPDX-License-Identifier: Apache-2.0
"""LEALLA: align translations by labels, the teacher's vectors and the teacher's cosines.

Column 0 holds the source sentences, column 1 their translations. The paper's own normalisers could not be checked for this
file; what is a choice of ours is an argument, and said to be.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .base import DistillationLoss


class AdditiveMarginSoftmax(DistillationLoss):
    """Bidirectional additive-margin softmax over the translations of a batch.

    Source: LaBSE's objective (Feng et al. 2020, https://huggingface.co/papers/2007.01852; Yang et al. 2019,
    https://huggingface.co/papers/1902.08564), as LEALLA, Mao et al. 2023, https://huggingface.co/papers/2302.08387, uses it:
    the mean over pairs of both directions' cross-entropy, with the margin taken off the cosine of the true pair.
    Differs from the papers: cosines are multiplied by `scale` (their formula has none, and cosines in [-1, 1] hardly train).

    The negatives are the batch's of all processes. Pairs that share a sentence, on the same side or on opposite ones, are no
    negatives of each other: their translations would be true ones.

    Args:
        margin: Taken off the cosine of a true pair (LaBSE: 0.3).
        scale: What cosines are multiplied by.

    Raises:
        ValueError: If the margin is negative or the scale not positive.

    Example:
        >>> import torch
        >>> pairs = torch.eye(2).unsqueeze(1).expand(2, 2, 2)
        >>> AdditiveMarginSoftmax(0.0, 1.0)(pairs, torch.tensor([[0, 1], [2, 3]]))  # 2 log(1 + exp(-1))
        {'ams': tensor(0.6265)}
    """

    parts = ("ams",)
    needs = ()
    in_batch = True
    paper = "2302.08387"

    def __init__(self, margin: float = 0.3, scale: float = 20.0) -> None:
        if margin < 0 or scale <= 0:
            raise ValueError(
                f"AdditiveMarginSoftmax: margin is {margin}, scale {scale}, expected a margin >= 0 and a positive scale."
            )
        self.margin, self.scale = margin, scale

    def of(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part; of the batch it needs which texts are the same."""
        return self(outputs[self.output], batch["texts"])

    def __call__(self, student: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return {"ams": scalar >= 0}; zero for one pair.

        Args:
            student: [B, 2, D], with gradient.
            texts: [B, 2], a number for each distinct text.

        Raises:
            ValueError: If rows are not pairs.
        """
        cosines = _cosines(student, self)
        true = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
        again = (texts[:, None, :, None] == texts[None, :, None, :]).any((2, 3)) & ~true
        logits = (self.scale * (cosines - self.margin * true)).masked_fill(again, -torch.inf)
        target = torch.arange(len(logits), device=logits.device)
        return {"ams": nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)}


class FeatureDistillation(DistillationLoss):
    """Squared distance between the teacher's vectors and the student's, led to the teacher's width by a training-only head.

    Source: LEALLA, Mao et al. 2023, https://huggingface.co/papers/2302.08387, feature distillation: for each pair the squared
    norm of the difference, of both sides, a mean over pairs. Whether the paper sums or averages over dimensions, and whether
    the teacher is of unit length, was not verified: here it is a sum, of unit length unless `normalize` is False.

    The head is `StudentModel.add_training_head(teacher.dim)`; it is trained, kept in checkpoints, and never published.

    Args:
        normalize: Whether the teacher's vectors are scaled to unit length.

    Example:
        >>> import torch
        >>> FeatureDistillation()(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 2.0], [0.0, 2.0]]]))
        {'feature': tensor(3.)}
    """

    output = "feature"
    parts = ("feature",)
    paper = "2302.08387"

    def __init__(self, normalize: bool = True) -> None:
        self.normalize = normalize

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"feature": scalar >= 0}.

        Args:
            student: [B, C, D], the head's output, with gradient.
            teacher: [B, C, D].

        Raises:
            ValueError: If the shapes differ.
        """
        teacher = self._same_shape(student, teacher)
        if self.normalize:
            teacher = nn.functional.normalize(teacher, dim=-1)
        return {"feature": (student - teacher).square().sum((1, 2)).mean()}


class LogitDistillation(DistillationLoss):
    """Mean squared difference between the student's and the teacher's cosines of every source with every translation.

    Source: LEALLA, Mao et al. 2023, https://huggingface.co/papers/2302.08387, logit distillation: over all N x N pairs of a
    batch, divided by a temperature before squaring. Teacher and student may be of any width.

    The batch is that of all processes.

    Args:
        temperature: What differences are divided by; with a weight w on the part, only w / temperature² matters.

    Raises:
        ValueError: If it is not positive.

    Example:
        >>> import torch
        >>> LogitDistillation()(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[3.0], [-3.0]]]))
        {'logit': tensor(4.)}
    """

    parts = ("logit",)
    in_batch = True
    any_width = True
    paper = "2302.08387"

    def __init__(self, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"LogitDistillation: temperature is {temperature}, expected a positive number.")
        self.temperature = temperature

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"logit": scalar >= 0}.

        Args:
            student: [B, 2, D], with gradient.
            teacher: [B, 2, D'].

        Raises:
            ValueError: If rows are not pairs.
        """
        ours, theirs = _cosines(student, self), _cosines(teacher.to(student), self)
        return {"logit": ((ours - theirs) / self.temperature).square().mean()}


def _cosines(pairs: Tensor, loss: DistillationLoss) -> Tensor:
    """Return [B, B]: cosines of every source (rows) with every translation (columns)."""
    if pairs.ndim != 3 or pairs.shape[1] != 2:
        raise ValueError(
            f"{type(loss).__name__}: rows are {tuple(pairs.shape)}, expected [B, 2, D], a sentence and its translation. What a "
            "third column means is unknown. Name two text columns."
        )
    pairs = nn.functional.normalize(pairs, dim=-1)
    return pairs[:, 0] @ pairs[:, 1].T
