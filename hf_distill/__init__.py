# SPDX-License-Identifier: Apache-2.0
"""Distil large embedding models into small, fast, compact students."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import DistillationTrainingArguments, parse_arguments
    from .cache import TeacherCache
    from .cross_encoder import CrossEncoderTeacher
    from .losses import DistillationLoss, HPDLoss, WeightedLoss
    from .projection import PCAProjection
    from .student import StudentModel, StudentOutput
    from .teachers import EncoderTeacher, JointTeacher, ProjectedTeacher, Teacher, TwoTowerTeacher
    from .trainer import DistillationTrainer

__version__ = "0.1.0"

# Public name -> its module, imported when first asked for: `import hf_distill` itself costs nothing.
_HOMES = {
    "CrossEncoderTeacher": "cross_encoder",
    "DistillationLoss": "losses",
    "DistillationTrainer": "trainer",
    "DistillationTrainingArguments": "arguments",
    "EncoderTeacher": "teachers",
    "HPDLoss": "losses",
    "JointTeacher": "teachers",
    "PCAProjection": "projection",
    "ProjectedTeacher": "teachers",
    "StudentModel": "student",
    "StudentOutput": "student",
    "Teacher": "teachers",
    "TeacherCache": "cache",
    "TwoTowerTeacher": "teachers",
    "WeightedLoss": "losses",
    "parse_arguments": "arguments",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
