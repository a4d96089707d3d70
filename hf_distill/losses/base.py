# SPDX-License-Identifier: Apache-2.0
"""What every loss has in common.

Letters in shapes: B rows of a batch, C text columns of a row, N = B * C texts, T tokens, H the backbone's width, D the
dimension of an embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class DistillationLoss(ABC):
    """A formula on tensors. It owns no model, no data and no parameters.

    output: Which field of the student's output it compares: "embedding" (what is deployed), "projected" (the same before
        normalisation) or "last_hidden_state".
    parts: Names of what it returns and what is summed, known before the first batch.
    monitored: Names of what it returns beside, which is logged and not summed.
    needs: What it needs of the batch beside the student's outputs: "targets" (a teacher's vectors) or "scores" (a reranker's).
    in_batch: Whether it compares rows of a batch with each other, so that it sees the rows of all processes as one batch.
    any_width: Whether the teacher's vectors may be of another dimension than the student's.
    paper: Where the formula comes from.
    """

    output: str = "embedding"
    parts: tuple[str, ...] = ()
    monitored: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("targets",)
    in_batch: bool = False
    any_width: bool = False
    paper: str = ""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The fields of the student's output that it compares."""
        return (self.output,)

    @property
    def as_wide(self) -> tuple[str, ...]:
        """The fields of the student's output that must be as wide as the teacher's vectors."""
        return self.outputs if "targets" in self.needs and not self.any_width else ()

    def facts(self) -> dict[str, Any]:
        """Return its name and settings, as plain JSON."""
        return {"name": type(self).__name__, **vars(self)}

    def require_batch(self, rows: int, columns: int) -> None:
        """Check that a batch, of all processes, has something to tell a text from.

        Raises:
            ValueError: If the loss compares rows and there is one, of one text or of a pair. Nothing would be learned.
        """
        if self.in_batch and rows * max(columns - 1, 1) < 2:
            raise ValueError(
                f"{type(self).__name__}: it compares the texts of a batch with each other, and a batch is {rows} row of "
                f"{columns} texts, expected two rows or more. There would be nothing to tell a text from. Use a larger "
                "per_device_train_batch_size."
            )

    def of(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the named parts for a student's outputs; what a loss needs of the batch, it takes here.

        Args:
            outputs: Name of an output field -> [B, C, ...], with gradient.
            batch: "targets" [B, C, D], the teacher's vectors; "scores" [B, C - 1], a reranker's of the first column with each
                of the others; "texts" [B, C], a number for each distinct text. What a run has no teacher for is not there.
        """
        return self(outputs[self.output], batch["targets"])

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return named parts, a scalar each; their sum is the loss and each is logged.

        Args:
            student: [B, C, D], with gradient.
            teacher: [B, C, D], no gradient, any dtype; cast to the student's.
        """

    def _same_shape(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the teacher in the student's dtype and on its device.

        Raises:
            ValueError: If the shapes differ. A [B, 1, D] teacher would broadcast over the columns and train every column
                toward the first one, at a loss that looks fine.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"{type(self).__name__}: student is {tuple(student.shape)}, teacher {tuple(teacher.shape)}, expected equal "
                "[B, C, D]. Broadcasting would train toward the wrong targets. Give the student projection_dim="
                f"{teacher.shape[-1]}, or project the teacher to {student.shape[-1]} dimensions (PCAProjection)."
            )
        return teacher.to(student)


class WeightedLoss(DistillationLoss):
    """A weighted sum of losses, each on the student's output that it asks for.

    Every part is logged as it enters the sum, that is, with its weight.

    Args:
        losses: Two losses or more; no two may have a part of the same name.
        weights: Part -> weight; 1 for a part that is not named.

    Raises:
        ValueError: If a weight is for a part that no loss has (it would have no effect) or negative (the student would be led
            away from the teacher), or two parts have one name.

    Example:
        >>> from hf_distill.losses import HPDLoss
        >>> WeightedLoss([HPDLoss()], {"mse": 0.5}).parts
        ('mse',)
    """

    def __init__(self, losses: Sequence[DistillationLoss], weights: Mapping[str, float] | None = None) -> None:
        self.losses, self.weights = list(losses), dict(weights or {})
        self.parts = tuple(part for loss in self.losses for part in loss.parts)
        unknown = sorted(self.weights.keys() - set(self.parts))
        if unknown:
            raise ValueError(
                f"WeightedLoss: there is a weight for {unknown}, expected parts of the losses, {sorted(self.parts)}. It would "
                "weigh nothing. Correct its name."
            )
        negative = {part: weight for part, weight in self.weights.items() if weight < 0}
        if negative:
            raise ValueError(
                f"WeightedLoss: the weights {negative} are negative, expected 0 or more. The student would be led away from "
                "the teacher. Correct their sign."
            )
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"WeightedLoss: the parts are {list(self.parts)}, expected different names. One would hide the other. "
                "Give one of the losses another name for its part."
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those of all losses."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.outputs))

    @property
    def needs(self) -> tuple[str, ...]:
        """What all losses need."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.needs))

    @property
    def monitored(self) -> tuple[str, ...]:
        """Those of all losses."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.monitored))

    @property
    def in_batch(self) -> bool:
        """Whether one of them compares rows of a batch."""
        return any(loss.in_batch for loss in self.losses)

    @property
    def as_wide(self) -> tuple[str, ...]:
        """Those of all losses."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.as_wide))

    def facts(self) -> dict[str, Any]:
        """Return the weights and what the losses are."""
        return {"name": "WeightedLoss", "weights": self.weights, "losses": [loss.facts() for loss in self.losses]}

    def of(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted parts of every loss, and what is monitored."""
        found = {name: value for loss in self.losses for name, value in loss.of(outputs, batch).items()}
        return {name: self.weights.get(name, 1.0) * value for name, value in found.items()}

    def __call__(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return the weighted parts where every loss looks at the same output."""
        return self.of(dict.fromkeys(self.outputs, student), {"targets": teacher})
