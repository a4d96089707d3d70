# SPDX-License-Identifier: Apache-2.0
"""Whether the repository of a student opens the same way everywhere: checked from disk before it is published."""

import filecmp
import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from .card import write_card
from .hub import PROJECTION_FILE, RUN_FILE, files_of, publish, require_name
from .multi_sense import MultiSenseStudent
from .senses import SenseDictionary
from .student import StudentModel


logger = logging.get_logger(__name__)

# Short, long beyond any limit of this size, not English, not a letter.
SAMPLE_TEXTS = ("A cat sat on the mat.", "distillation " * 9000, "Ein kleines, schnelles Modell für alle.", "42 ?!")
MIN_COSINE = 0.99999


def open_student(folder: str | Path) -> StudentModel:
    """Return what was saved, with its senses if it has some."""
    settings = getattr(AutoConfig.from_pretrained(folder), "hf_distill", None) or {}
    kind = MultiSenseStudent if "senses" in settings else StudentModel
    return kind.from_pretrained(folder)


def check_layout(folder: str | Path, texts: tuple[str, ...] = SAMPLE_TEXTS) -> dict[str, float | str]:
    """Open a student in every way a user may, and compare the vectors.

    Args:
        folder: What `StudentModel.save_pretrained` wrote. Its student.py is run, so it must be one's own.
        texts: What is embedded.

    Returns:
        Loader -> smallest cosine with `StudentModel.from_pretrained`, or "skipped: why".

    Raises:
        ValueError: If two loaders give different vectors, or plain `AutoModel` misses or is left with weights. Somebody
            downstream would get other embeddings than those that were measured.
    """
    folder, sample = str(folder), list(texts)
    student = open_student(folder)
    kind = type(student)
    ours = student.encode(sample, convert_to_tensor=True)
    found: dict[str, float | str] = {}

    def compare(loader: str, vectors: Any) -> None:
        found[loader] = torch.cosine_similarity(ours.double(), torch.as_tensor(vectors).double()).min().item()
        if not found[loader] >= MIN_COSINE:
            raise ValueError(
                f"check_layout: {folder} gives other vectors through {loader} (smallest cosine {found[loader]:.6f}), expected "
                f"at least {MIN_COSINE}. Users of that loader would not get the model that was measured. Save or export it "
                "again."
            )

    remote = AutoModel.from_pretrained(folder, trust_remote_code=True)
    if type(remote).__name__ != kind.__name__:
        raise ValueError(f"check_layout: AutoModel with remote code opens {folder} as {type(remote).__name__}, not a student.")
    compare("AutoModel(trust_remote_code=True)", remote.encode(sample, convert_to_tensor=True))
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    left = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
    if left:
        raise ValueError(f"check_layout: plain AutoModel does not fit {folder}: {left}, expected every weight in its place.")
    found["AutoModel"] = "backbone whole"
    if importlib.util.find_spec("sentence_transformers") is None:
        found["SentenceTransformer"] = "skipped: sentence-transformers is not installed"
        logger.warning(f"check_layout: SentenceTransformer({folder}) was not compared: it is not installed.")
    else:
        from sentence_transformers import SentenceTransformer

        if kind is MultiSenseStudent:  # it knows of no senses
            ours = student.encode(sample, convert_to_tensor=True, replace=False)
        compare("SentenceTransformer", SentenceTransformer(folder, device="cpu").encode(sample, show_progress_bar=False))
    graph = Path(folder) / "onnx" / "model.onnx"
    if graph.exists() and importlib.util.find_spec("onnxruntime") is None:
        found["onnxruntime"] = "skipped: onnxruntime is not installed"
        logger.warning(f"check_layout: {graph} was not compared: onnxruntime is not installed.")
    elif graph.exists():
        from .export import onnx_encode

        ours = student.float().encode(sample, convert_to_tensor=True)  # as it was exported
        compare("onnxruntime", onnx_encode(graph, student, batch_size=2)(sample))
    return found


def publish_student(
    student: Any, name: str, max_shard_size: int | str = "50GB", commit_message: str = "Upload student", **options: Any
) -> str:
    """Publish a student that is at hand, with a card; return the address of its page.

    What its run measured (results.json, plots, the teacher's projection) and its ONNX graphs go along if it was opened from the
    run's folder and its weights are still those.

    Args:
        student: A `StudentModel`.
        name: Of the repository.
        max_shard_size: Largest file of backbone weights.
        commit_message: Title of the commit.
        **options: Of `publish`.

    Raises:
        ValueError: If its loaders disagree, or as `publish` says.
    """
    require_name(name)
    with tempfile.TemporaryDirectory() as made:
        folder, source = Path(made) / "student", Path(student.name_or_path or "/")
        student.save_pretrained(folder, max_shard_size=max_shard_size)
        senses = senses_beside(student.settings)
        if senses:
            student.dictionary.save_pretrained(folder.with_name(senses))
        weights = [path for path in files_of(folder) if path.endswith(".safetensors")]
        if all((source / path).is_file() and filecmp.cmp(folder / path, source / path, shallow=False) for path in weights):
            for pattern in ("results.json", RUN_FILE, PROJECTION_FILE, "*.png", "onnx/*.onnx"):
                for file in source.glob(pattern):
                    target = folder / file.relative_to(source)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copy2(file, target)
        check_layout(folder)
        write_card(folder, name)
        publish_senses(folder, name, options.get("private"), options.get("token"))
        return publish(folder, name, message=commit_message, **options)


def senses_beside(settings: Mapping[str, Any]) -> str | None:
    """Return what the sense dictionary beside a student is called; None if it has none, or one that the Hub knows by its id.

    Raises:
        ValueError: If it lies elsewhere on this machine: nobody who opens the student on another would find it.
    """
    name = (settings.get("senses") or {}).get("name", "")
    found = name.removeprefix("../")
    if name == found and not name.startswith(("/", ".")):
        return None
    if name == found or not re.fullmatch(r"\w[\w.-]*", found):
        raise ValueError(
            f"publish: the student's sense dictionary is {name}, expected one beside it (../name), or an id of the Hub. Who "
            'opens the student would not find it. Publish it (dictionary.push_to_hub("me/senses")), and save the student '
            'attached to that: student.attach(dictionary, "me/senses").'
        )
    return found


def publish_senses(folder: str | Path, name: str, private: bool | None = None, token: str | None = None) -> None:
    """Publish the sense dictionary beside a student's folder, if it has one, beside its repository, where it is looked for.

    Args:
        folder: Of the student.
        name: Of the student's repository.
        private: As `publish` takes it.
        token: As there.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    senses = senses_beside(config.get("hf_distill") or {})
    if senses:
        owner, slash, _ = name.rpartition("/")
        dictionary = SenseDictionary.from_pretrained(Path(folder).resolve().with_name(senses))
        dictionary.push_to_hub(owner + slash + senses, private=private, token=token)
