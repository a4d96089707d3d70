# SPDX-License-Identifier: Apache-2.0
"""What the repository of a sentence-transformers model says: modules, pooling, prompts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from .student import POOLINGS


# The names of prompts, in the order in which sentence-transformers' encode_query and encode_document look for them.
SIDES = {"query": ("query",), "document": ("document", "passage", "corpus"), None: ()}


def read_layout(folder: Path, name: str, pooling: str | None, normalize: bool | None) -> dict[str, Any]:
    """Return what modules.json and its neighbours say of how a text becomes a vector."""
    layout: dict[str, Any] = {"path": "", "pooling": pooling, "normalize": normalize, "dense": [], "prompts": {}}
    layout |= {"lower": False, "max_length": None, "include_prompt": True}
    modules = _read_json(folder / "modules.json")
    if not modules:
        known = [*sorted(POOLINGS), "pooler"]
        if pooling not in known:
            raise ValueError(
                f"EncoderTeacher: {name} has no modules.json, so its pooling is unknown (pooling={pooling!r}), expected "
                f"one of {known}. A guess would give wrong targets. Pass pooling=... as the model's card says."
            )
        layout["normalize"] = True if normalize is None else normalize
        return layout
    if pooling is not None:
        raise ValueError(f"EncoderTeacher: pooling is {pooling!r}, but {name} says its own in modules.json. Leave pooling out.")
    found_normalize = False
    for position, module in enumerate(modules):
        kind, path = module["type"].rsplit(".", 1)[-1], module["path"]
        early = kind == "Dense" and layout["pooling"] is None
        if (kind == "Transformer") != (position == 0) or found_normalize or early:
            kind = f"{kind} out of order"
        if kind == "Transformer":
            settings = _read_json(folder / path / "sentence_bert_config.json")
            layout |= {"path": path, "max_length": settings.get("max_seq_length")}
            layout["lower"] = settings.get("do_lower_case", False)
        elif kind == "Pooling":
            settings = _read_json(folder / path / "config.json")
            layout |= {"pooling": _pooling_of(settings, name), "include_prompt": settings.get("include_prompt", True)}
        elif kind == "Dense":
            layout["dense"].append(path)
        elif kind == "Normalize":
            found_normalize = True
        else:
            raise ValueError(
                f"EncoderTeacher: {name} has the module {module['type']} (position {position}), expected Transformer, "
                "Pooling, Dense, Normalize in this order. Targets without it would be others than the teacher's. Encode "
                "with sentence-transformers and use TeacherCache.from_embeddings."
            )
    if layout["pooling"] is None:
        raise ValueError(f"EncoderTeacher: {name} has no Pooling in modules.json, expected one. Its vectors are unknown.")
    layout["normalize"] = found_normalize if normalize is None else normalize
    settings = _read_json(folder / "config_sentence_transformers.json")
    layout["prompts"] = dict(settings.get("prompts") or {})
    if settings.get("default_prompt_name"):
        layout["prompts"][None] = layout["prompts"][settings["default_prompt_name"]]
    return layout


def _pooling_of(settings: Mapping[str, Any], name: str) -> str:
    """Return our name of the pooling, from the flags of versions 2 to 5 or the `pooling_mode` of version 6."""
    short = {_short(flag): ours for ours, flag in POOLINGS.items()}
    modes = settings.get("pooling_mode", [key for key, on in settings.items() if key.startswith("pooling_mode_") and on])
    modes = [_short(mode) for mode in ([modes] if isinstance(modes, str) else modes)]
    if len(modes) != 1 or modes[0] not in short:
        raise ValueError(
            f"EncoderTeacher: {name} pools by {modes}, expected exactly one of {sorted(short)}. Another pooling would give "
            "wrong targets. Encode with sentence-transformers and use TeacherCache.from_embeddings."
        )
    return short[modes[0]]


def _short(mode: str) -> str:
    return mode.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")


def load_dense(folder: Path, name: str) -> nn.Sequential:
    """Return Linear and activation of a sentence-transformers Dense module."""
    settings = _read_json(folder / "config.json")
    path = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = getattr(nn, path.rsplit(".", 1)[-1], None) if path.startswith("torch.nn.") else None
    if activation is None or settings.get("use_residual"):
        raise ValueError(
            f"EncoderTeacher: the Dense in {folder.name} of {name} has activation {path} and use_residual="
            f"{settings.get('use_residual', False)}, expected a torch.nn activation and no residual. Its vectors would be "
            "others. Encode with sentence-transformers and use TeacherCache.from_embeddings."
        )
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise OSError(f"{name} has no weights in safetensors in {folder.name}/, expected model.safetensors, not a pickle.")
    linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    linear.load_state_dict({key.removeprefix("linear."): value for key, value in load_file(weights).items()})
    return nn.Sequential(linear.float(), activation())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
