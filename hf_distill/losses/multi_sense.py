# SPDX-License-Identifier: Apache-2.0
"""Multi-sense distillation: choose, for every token, the sense that the teacher chooses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .base import DistillationLoss


class SenseLoss(DistillationLoss):
    """Cross-entropy of the student's scores of a token's senses against the sense that the teacher's state has.

    Source: Wang et al. 2025, https://huggingface.co/papers/2504.06036, the objective of its released code: a mean over the
    tokens that are no padding and have senses.
    Differs from that code: senses that a token does not have count as -inf, not as 0, so neither padding nor what else is in
    the batch changes the loss.

    Args:
        temperature: What the student's scores are divided by, and the teacher's, if soft.
        soft: Compare with the softmax of the teacher's scores (`SenseTeacher(..., beside=["sense_scores"])`), in place of its
            choice; the teacher's entropy is subtracted, so the part is zero where both agree.

    Raises:
        ValueError: If the temperature is not positive.

    Example:
        >>> import torch
        >>> SenseLoss()(torch.zeros(1, 1, 2, 4), torch.tensor([[[3, -1]]]))["sense"]  # ln 4
        tensor(1.3863)
    """

    output = "sense_scores"
    parts = ("sense",)
    monitored = ("sense_accuracy",)
    any_width = True
    paper = "2504.06036"

    def __init__(self, temperature: float = 1.0, soft: bool = False) -> None:
        if temperature <= 0:
            raise ValueError(f"SenseLoss: temperature is {temperature}, expected a positive number.")
        self.temperature, self.soft = temperature, soft

    def of(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part, against the teacher's choices (a cached teacher's "targets") or its scores."""
        return self(outputs[self.output], _taught(self, batch, "sense_scores" if self.soft else "senses", not self.soft))

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"sense": scalar >= 0, "sense_accuracy": share of tokens with the teacher's sense, in [0, 1]}.

        Args:
            student: [B, C, T, K], with gradient; -inf where a token has no such sense.
            teacher: [B, C, T'], the sense of each token, -1 for none; or, soft, [B, C, T', K'] scores. T' may be longer, where
                it counts up to a fixed length.

        Raises:
            ValueError: If the teacher has a sense for a token that the student has none for: other tokens stand there.
        """
        length = student.shape[2]
        scores = teacher[:, :, :length] if self.soft else None
        chosen = teacher[:, :, :length].long() if scores is None else _best(scores)
        known = chosen >= 0
        ours = student[:, :, : chosen.shape[2]][known] / self.temperature  # [M, K]
        chosen = chosen[known]
        fits = ours.detach().gather(1, chosen[:, None].clamp(max=student.shape[-1] - 1))
        if ours.numel() and ((fits == -torch.inf).any() or chosen.max() >= student.shape[-1]):
            raise ValueError(
                "SenseLoss: the teacher has a sense for a token that the student has no score for, expected the same tokens "
                "at the same places. It would learn the senses of other words. Use one tokenizer, dictionary and max_length."
            )
        if not len(ours):
            return {"sense": student.nan_to_num(neginf=0).sum() * 0, "sense_accuracy": student.new_zeros(())}
        accuracy = (ours.detach().argmax(1) == chosen).float().mean()
        if scores is None:
            return {"sense": nn.functional.cross_entropy(ours, chosen), "sense_accuracy": accuracy}
        theirs = nn.functional.log_softmax(scores[known].to(ours) / self.temperature, dim=-1)
        ours = nn.functional.log_softmax(ours, dim=-1)[:, : theirs.shape[1]]
        terms = torch.where(theirs > -torch.inf, theirs.exp() * (theirs - ours), 0.0)
        return {"sense": terms.sum(1).mean(), "sense_accuracy": accuracy}


class StateLoss(DistillationLoss):
    """Mean squared difference between the student's token states and the teacher's, over real tokens and dimensions.

    What a student of senses is compared with, and may have beside them.

    Example:
        >>> import torch
        >>> StateLoss()(torch.tensor([[[[1.0, 1.0], [9.0, 9.0]]]]), torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]))
        {'state': tensor(0.5000)}
    """

    output = "states"
    parts = ("state",)
    any_width = True
    paper = "2504.06036"

    def of(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part, against the teacher's states (a `TokenTeacher`'s "targets")."""
        states = _taught(self, batch, "states")
        if states.dim() != 4:
            raise ValueError(
                f"StateLoss: the teacher gives {tuple(states.shape)}, expected states, [B, C, T, D]. Cached senses hold none. "
                'Give the trainer a TokenTeacher, or a live SenseTeacher(..., beside=["states"]).'
            )
        return self(outputs[self.output], states)

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"state": scalar >= 0}.

        Args:
            student: [B, C, T, D], with gradient.
            teacher: [B, C, T, D]; a state of zeros is padding.

        Raises:
            ValueError: If the shapes differ.
        """
        teacher = self._same_shape(student, teacher)
        real = teacher.abs().sum(-1) > 0
        return {"state": (student - teacher)[real].square().mean()}


def _taught(loss: DistillationLoss, batch: Mapping[str, Tensor], name: str, cached: bool = True) -> Tensor:
    """Return what a teacher gives under a name, or as its only targets."""
    if name not in batch and not (cached and "targets" in batch):
        raise ValueError(
            f"{type(loss).__name__}: the batch has {sorted(batch)}, expected {name!r}. Nothing would be learned of it. Give "
            f"the trainer a live SenseTeacher(..., beside=[{name!r}])."
        )
    return batch[name] if name in batch else batch["targets"]


def _best(scores: Tensor) -> Tensor:
    """Return the sense of highest score; -1 where a token has none."""
    return torch.where((scores > -torch.inf).any(-1), scores.argmax(-1), -1)
