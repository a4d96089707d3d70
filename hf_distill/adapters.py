# SPDX-License-Identifier: Apache-2.0
"""Students trained by adapters (PEFT): the head is trained beside them, and both are merged before anything is published."""

import copy
import importlib.util
from typing import Any

from torch import nn

from .student import StudentModel


def add_adapter(student: StudentModel, peft_config: Any) -> Any:
    """Return the student as a `peft.PeftModel`: adapters in the backbone, every head trained whole.

    Args:
        student: The student; it is changed in place.
        peft_config: `peft.LoraConfig` or another. Heads are added to its modules_to_save; target_modules "all-linear" means
            those of the backbone, less a pooler that is never used.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If its targets match no module: only the head would be trained.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("hf_distill: adapters need peft. Install it with: pip install 'hf_distill[peft]'")
    from peft import get_peft_model

    config = copy.deepcopy(peft_config)
    heads = [name for name, module in student.named_children() if name != "backbone" and any(True for _ in module.parameters())]
    config.modules_to_save = sorted({*(config.modules_to_save or []), *heads})
    if config.target_modules == "all-linear" and not config.exclude_modules:
        # An adapter on the unused pooler would get no gradient, and DDP would wait for one.
        config.exclude_modules = rf"backbone\.pooler\..*|({'|'.join(heads) or '-'}).*"
    linear = sorted({name.rsplit(".", 1)[-1] for name, part in student.backbone.named_modules() if isinstance(part, nn.Linear)})
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise ValueError(
            f"hf_distill: target_modules {peft_config.target_modules!r} do not fit {type(student.backbone).__name__}, expected "
            f"names of its linear layers, {linear}, or 'all-linear'. Nothing but the head would learn. ({error})"
        ) from error


def student_of(model: Any) -> StudentModel:
    """Return the student inside a PEFT model, adapters active; or the student itself."""
    return model if isinstance(model, StudentModel) else model.get_base_model()


def merged(model: Any) -> StudentModel:
    """Return a student with its adapters merged into the weights, a copy; or the student itself."""
    return model if isinstance(model, StudentModel) else copy.deepcopy(model).merge_and_unload()
