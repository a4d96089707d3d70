# SPDX-License-Identifier: Apache-2.0
"""What every loss has in common.

Letters in shapes: B rows of a batch, C text columns of a row, N = B * C texts, T tokens, H the backbone's width, D the
dimension of an embedding.
"""

from abc import ABC, abstractmethod

from torch import Tensor


class DistillationLoss(ABC):
    """A formula on tensors. It owns no model, no data and no parameters.

    output: Which field of the student's output it compares: "embedding" (what is deployed), "projected" (the same before
        normalisation) or "last_hidden_state".
    parts: Names of what it returns, known before the first batch.
    paper: Where the formula comes from.
    """

    output: str = "embedding"
    parts: tuple[str, ...] = ()
    paper: str = ""

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
