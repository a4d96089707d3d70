"""What is refused in the YAML head of a card. The Hub's own checks know more."""

import re
from typing import Any

import yaml

from hf_distill.licenses import LICENSES


_HEAD = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|\Z)", re.DOTALL)
_TASKS = {"sentence-similarity", "feature-extraction", "text-ranking", "fill-mask", "text-classification"}
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def head_of(card: str) -> str | None:
    """Return the YAML text between the first two lines of dashes; None if there is none."""
    found = _HEAD.match(card)
    return found and found[1]


def problems_of(card: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """Return (errors, warnings) of a card."""
    head = head_of(card)
    if head is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(head)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return [f"the metadata must be a mapping, not {type(data).__name__}"], []
    errors = []

    def require(key: str, fits: Any, expected: str) -> None:
        if key in data and not fits(data[key]):
            errors.append(f'"{key}" must be {expected}, not {data[key]!r}')

    require("license", lambda v: v in LICENSES, "one of the known license ids")
    require("tags", _is_list, "an array of strings")
    require("language", lambda v: all(_is_code(c) for c in _many(v)), "an ISO 639 code or an array of them")
    require("datasets", lambda v: all(_is_id(c) for c in _many(v)), "an id of a data set or an array of them")
    if kind == "model":
        require("base_model", lambda v: all(_is_id(c) for c in _many(v)), "an id of a model or an array of them")
        require("pipeline_tag", lambda v: v in _TASKS, f"one of {sorted(_TASKS)}")
        require("library_name", lambda v: isinstance(v, str), "a string")
        require("model-index", _is_index, "an array of models, each with name and results of task, dataset and metrics")
    return errors, [] if "license" in data else ["empty license"]


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_code(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)*|code|multilingual", value) is not None


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None and ".." not in value


def _is_index(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for model in value:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            return False
        for result in model["results"]:
            dataset, metrics = result.get("dataset", {}), result.get("metrics", [])
            named = all(isinstance(part.get("type"), str) for part in (result.get("task", {}), dataset, *metrics))
            measured = all(isinstance(part.get("value"), (int, float)) for part in metrics)
            if not named or not measured or not metrics or not isinstance(dataset.get("name"), str):
                return False
    return True
