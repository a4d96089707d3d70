# SPDX-License-Identifier: Apache-2.0
"""Publishing a folder: one commit, whole or not at all, without secrets, and errors that say what to do."""

import re
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What lies beside a student: what its run was told, and how its teacher was reduced.
RUN_FILE, PROJECTION_FILE = "distillation.json", "teacher_projection.safetensors"
# What a run measured of these weights, and of no others.
MEASURED = ("results.json", "training.png", "dimensions.png", "index.png", "languages.png")

# What a run needs to go on, and nobody else should get: training_args.bin holds the token in clear, others name the machine.
NOT_PUBLISHED = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin", "training_head.safetensors",
    "checkpoint-*", "_*", ".*", "emissions.csv", "runs", "*tfevents*", "explained",
)  # fmt: skip
# What a loader would read although it belongs to an earlier push.
_LAYOUT = re.compile(
    r"[^/]*\.safetensors(\.index\.json)?|[0-9]_[^/]*/.*|modules\.json|(student|multi_sense|senses)\.py"
    r"|onnx/[^/]*\.onnx"
)
_TEXT = (".json", ".md", ".py", ".txt", ".yaml", ".yml", ".jsonl")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_PAUSES = (0.5, 2.0)  # seconds before a commit is tried again


def publish(
    folder: str | Path,
    name: str,
    *,
    kind: str = "model",
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = "Upload",
    also: Mapping[str, str | Path] | None = None,
) -> str:
    """Put the files of a folder into a repository, in one commit; return the address of its page.

    What a run needs to go on (`NOT_PUBLISHED`) stays here. A push that fails leaves the branch as it was; run again, it
    completes, and what was uploaded is not sent again. Weights and module files of an earlier push that this one lacks are
    deleted with the same commit, so that no loader mixes them.

    Args:
        folder: What `save_pretrained` or a trainer wrote.
        name: Of the repository, with or without its namespace; it is made if there is none.
        kind: "model" or "dataset".
        revision: Branch, made if there is none; main if not given.
        private: Whether a new repository is private; as the namespace's settings say if not given.
        token: Of the Hub; the one that is logged in with (or HF_TOKEN) if not given.
        message: Title of the commit.
        also: Folder of the repository -> folder here that goes there, all of it.

    Raises:
        ValueError: Before any file is sent, if the name is none, the folder is empty, the card's metadata are refused, a file
            holds a token or names this machine's home folder, or private is asked of a repository that is public.
        PermissionError: If the token is missing, unknown or may not write.
        ConnectionError: If the Hub, or its storage, fails again and again, or somebody else has pushed meanwhile.
    """
    require_name(name)
    api, paths = HfApi(token=token), files_of(Path(folder), NOT_PUBLISHED)
    if not paths:
        raise ValueError(f"publish: {folder} holds no file to publish, expected a student. The repository would be empty.")
    for place, other in (also or {}).items():
        paths |= {f"{place}/{path}": file for path, file in files_of(Path(other)).items()}
    _require_no_secrets(paths, token or get_token())
    target = {"repo_id": open_repository(name, kind, private, token), "repo_type": kind}
    try:
        parent = _branch(api, target, revision)
        # `upload_folder` would send several commits where there are many files, or where one fails.
        for pause in (*_PAUSES, None):
            # Asked anew each time: a commit whose answer was lost has deleted them already. A projection, say, deletes nothing.
            known = set(api.list_repo_files(**target, revision=revision)) if "config.json" in paths else set()
            stale = sorted(path for path in known - paths.keys() if path in MEASURED or _LAYOUT.fullmatch(path))
            deletions = [CommitOperationDelete(path) for path in stale]
            additions = [CommitOperationAdd(path, file) for path, file in paths.items()]
            try:
                api.create_commit(
                    **target,
                    operations=[*deletions, *additions],
                    commit_message=message,
                    revision=revision,
                    parent_commit=parent,
                )
                break
            except Exception as error:
                if pause is None or not _passes(error):
                    raise
                logger.warning(f"publish: the Hub failed ({error}); once more in {pause} s.")
                time.sleep(pause)
    except Exception as error:
        raise _explained(error, name, revision) from error
    address = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{target['repo_id']}"
    logger.warning(f"Published: {address}" + (f"/tree/{revision}" if revision else ""))
    return address


def open_repository(name: str, kind: str = "model", private: bool | None = None, token: str | None = None) -> str:
    """Make a repository, if there is none; return its full id.

    Raises:
        ValueError: If the name is none, or private is asked of a repository that is public: anybody could read it.
        OSError: As `publish` says.
    """
    require_name(name)
    api = HfApi(token=token)
    try:
        found = api.create_repo(name, repo_type=kind, private=private, exist_ok=True).repo_id
        public = private and not api.repo_info(found, repo_type=kind).private
    except Exception as error:
        raise _explained(error, name, None) from error
    if public:
        raise ValueError(
            f"publish: {found} is there already, and public, expected a private one. Anybody could read what is pushed. Make "
            "it private in its settings, or take another name."
        )
    return found


def require_name(name: str) -> None:
    """Raise unless it may name a repository.

    Raises:
        ValueError: If not: the push would fail after long work.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"publish: {name!r} is no name of a repository: {error} Give one like user/name.") from error


def is_hub_id(name: str | None) -> bool:
    """Return whether it looks like user/name, no folder."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def files_of(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, Path]:
    """Return path in the folder -> file, in order."""

    def kept(path: Path) -> bool:
        return not any(fnmatch(part, pattern) for part in path.parts for pattern in leave_out)

    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path.as_posix(): file for path, file in found.items() if kept(path)}


def _require_no_secrets(paths: dict[str, Path], token: str | None) -> None:
    home = f"{Path.home()}/".encode()
    for path, file in paths.items():
        if file.suffix in _TEXT:
            data = file.read_bytes()
            if _TOKEN.search(data) or (token and token.encode() in data):
                raise ValueError(f"publish: {path} holds a token of the Hub; it would be public. Remove it, and revoke it.")
            if len(home) > 2 and home in data:
                raise ValueError(f"publish: {path} names {Path.home()}, a folder of this machine, expected none. Remove it.")


def _branch(api: HfApi, target: dict[str, str], revision: str | None) -> str:
    """Return where the branch stands; it is made if there is none."""
    try:
        return api.repo_info(**target, revision=revision).sha
    except RevisionNotFoundError:
        api.create_branch(**target, branch=revision, exist_ok=True)
        return api.repo_info(**target, revision=revision).sha


def _passes(error: Exception) -> bool:
    """Return whether it may work in a moment: the server's fault, or the connection's."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx")


def _explained(error: Exception, name: str, revision: str | None) -> Exception:
    """Return what to raise: what failed, how the repository stands, what to do."""
    status: Any = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = str(error).strip()
    branch = f"The branch {revision or 'main'} of {name} is as it was."
    if status == 401:
        return PermissionError(
            f"publish: there is no token, or one that the Hub does not know. Log in: `hf auth login`. ({said})"
        )
    if status in (403, 404):
        return PermissionError(
            f"publish: this token may not write to {name}. {branch} Take a token with write access (`hf auth login`), or a "
            f"name in a namespace that it belongs to. ({said})"
        )
    if status == 412:
        return ConnectionError(
            f"publish: somebody has pushed to {name} meanwhile. {branch.split(' is ')[0]} has theirs. Run again."
        )
    if isinstance(error, ValueError) and "metadata" in said:
        return ValueError(f"publish: the Hub refuses the card, no file was sent. {said}")
    return ConnectionError(f"publish: {type(error).__name__} of the Hub or its storage. {branch} Run it again. ({said})")
