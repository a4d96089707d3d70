# SPDX-License-Identifier: Apache-2.0
"""Which run a folder is of, and its checkpoints: what is mixed with another's is refused."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .hub import RUN_FILE
from .shards import write_whole


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest whole checkpoint: trainer_state.json is written last, so a killed save has none."""
    whole = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def claim_output_dir(folder: str | Path, facts: dict[str, Any]) -> None:
    """Mark an output folder as this run's, before any long work.

    Raises:
        ValueError: If it holds another run, or a model that no run of ours left there.
        OSError: If it can't be written.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).exists() and ((folder / "config.json").exists() or any(folder.glob("checkpoint-*"))):
        raise ValueError(
            f"DistillationTrainer: {folder} holds a model that is not of this run, expected a new or empty folder. It would be "
            "overwritten. Use another --output_dir."
        )
    require_same_run(folder, plain(facts), new=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, facts)
    except OSError as error:
        why = error.__cause__ or error  # of a file, as `write_whole` says it
        raise OSError(
            error.errno, f"DistillationTrainer: {folder} can't be written ({why}). Use another --output_dir"
        ) from error


def copy_checkpoint(checkpoint: str | Path, copy: Path) -> None:
    """Copy a checkpoint, by second names of its files, without what names folders of this machine: none of it is needed."""
    shutil.copytree(checkpoint, copy, copy_function=_link)
    for name in ("training_args.bin", "README.md"):
        (copy / name).unlink(missing_ok=True)
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("trainer_state.json", "best_model_checkpoint")):
        path = copy / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if content.get(key):
            path.unlink()  # one of two names of the file; the checkpoint itself stays as it is
            path.write_text(json.dumps({**content, key: Path(content[key]).name}, indent=2), encoding="utf-8")


def plain(facts: Any) -> Any:
    """Return facts as JSON gives them back; sets in order, for each process has another."""

    def other(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    return json.loads(json.dumps(facts, default=other))


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write facts into the folder's RUN_FILE, beside what it says already."""
    path = folder / RUN_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    # Every process of a launch writes it, and reads it, at the same time.
    write_whole(path, (json.dumps({**known, **plain(facts)}, indent=1) + "\n").encode())


def require_same_run(folder: Path, facts: dict[str, Any], new: bool = False) -> None:
    """Check that what a folder says of its run agrees.

    Args:
        folder: Of a run or a checkpoint.
        facts: What a run is; what else the folder says is not compared.
        new: Whether a folder that says nothing agrees.

    Raises:
        ValueError: If it differs, and where.
    """
    path = folder / RUN_FILE
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if new and not saved:
        return
    facts = {key: value for key, value in facts.items() if key != "teacher_license"}  # no other targets for that
    changed = [f"{key}: {a!r} there, {b!r} now" for key, a, b in _differences(saved, facts)]
    if changed:
        raise ValueError(
            f"DistillationTrainer: {folder} holds another run ({'; '.join(changed)}), expected the same teacher, loss, "
            "student, data and training settings. Weights would be trained toward other targets, or otherwise than is said of "
            "them. Use another output_dir, or delete it."
        )


def _differences(saved: Any, facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in facts.items():
        old = saved.get(key) if isinstance(saved, dict) else None
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value, f"{prefix}{key}.")
        elif old != value:
            yield f"{prefix}{key}", old, value


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
