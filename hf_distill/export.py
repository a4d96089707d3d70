# SPDX-License-Identifier: Apache-2.0
"""The student as an ONNX graph, compared with the student itself, and in 8 bits with what that costs."""

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from .layout import MIN_COSINE, SAMPLE_TEXTS
from .student import StudentModel, encode_sorted


FLOAT_FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_qint8.onnx"
_OUTPUTS = ("last_hidden_state", "sentence_embedding")


def export_onnx(
    folder: str | Path,
    *,
    int8: bool = False,
    texts: Sequence[str] = (),
    evaluators: Sequence[Callable[[Any], dict[str, float]]] = (),
) -> dict[str, Any]:
    """Write the student of a folder as onnx/model.onnx beside its weights, for onnxruntime and a tokenizer alone.

    One graph of float32 serves both kinds of user, at any number of texts and any length:

    * `sentence_embedding` [N, D] is what `encode` gives: pooling, projection and normalisation are inside.
    * `last_hidden_state` [N, T, H] is the backbone's: `SentenceTransformer(folder, backend="onnx")` finds the file by its
      name, reads this output through optimum, and pools and projects by its own modules.

    The inputs are what the tokenizer gives: input_ids and attention_mask (token_type_ids), each [N, T].

    Args:
        folder: What `StudentModel.save_pretrained` wrote.
        int8: Also write onnx/model_qint8.onnx: weights of 8 bits, states rounded by what their batch holds, so that a text's
            vector depends a little on its neighbours.
        texts: What each file is compared with the student on: cosines and fidelity; cosines of a few of our own, if none.
        evaluators: What else it is scored by.

    Returns:
        Section "onnx" of results.json: {"files": {file: {"mb", "cosine_min", "cosine_mean", "scores"}}, and what made them}.

    Raises:
        ImportError: If the extra is not installed.
        ValueError: If the graph gives other vectors than the student, or it is a student that a graph can't hold. Nothing is
            left in onnx/ that was not compared.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"hf_distill: the export needs {missing}. Install it with: pip install 'hf_distill[onnx]'")
    import onnxruntime

    from .evaluation.report import provenance, write_results
    from .evaluation.similarity import FidelityEvaluator

    folder, texts = Path(folder), list(texts)
    student = _open(folder)
    evaluators = [*evaluators, *([FidelityEvaluator(texts, student.encode(texts))] if texts else [])]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as made:
        place = Path(made)
        (place / "onnx").mkdir()
        _write_graph(student, place / FLOAT_FILE)
        _require_equal(student, place / FLOAT_FILE)
        if int8:
            _write_int8(place / FLOAT_FILE, place / INT8_FILE)
        files = [file for file in (FLOAT_FILE, INT8_FILE) if (place / file).exists()]
        rows = {file: _measure(student, place / file, texts or list(SAMPLE_TEXTS), evaluators) for file in files}
        (folder / "onnx").mkdir(exist_ok=True)
        (folder / INT8_FILE).unlink(missing_ok=True)  # of an earlier export, and maybe of other weights
        for file in files:
            (place / file).replace(folder / file)
    section = {"files": rows, "texts": len(texts), "onnxruntime": onnxruntime.__version__, "provenance": provenance(None)}
    known = folder / "results.json"
    write_results(folder, {**(json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}), "onnx": section})
    return section


def onnx_encode(path: str | Path, student: StudentModel, batch_size: int = 32) -> Callable[[list[str]], Tensor]:
    """Return texts -> [N, D] float32 by onnxruntime on the CPU, tokenised as the student does it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def embed(batch: list[str]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": student.settings["max_length"]}
        inputs = dict(student.tokenizer(batch, return_tensors="np", **options))
        return torch.from_numpy(session.run([_OUTPUTS[1]], inputs)[0])

    return lambda texts: encode_sorted(embed, texts, batch_size)


def _open(folder: Path) -> StudentModel:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"export: {folder} has no config.json, expected a student's folder, into which the graph goes. Fetch a student of "
            f"the Hub first: hf download {folder} --local-dir student"
        )
    if "senses" in (getattr(AutoConfig.from_pretrained(folder), "hf_distill", None) or {}):
        raise ValueError(
            f"export: {folder} is a MultiSenseStudent, expected a StudentModel. A graph would not replace states by senses: "
            "other vectors than were measured. Open it with MultiSenseStudent."
        )
    return StudentModel.from_pretrained(str(folder), dtype=torch.float32)


class _Graph(nn.Module):
    def __init__(self, student: StudentModel) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output = self.student(
            input_ids, attention_mask, **({} if token_type_ids is None else {"token_type_ids": token_type_ids})
        )
        return output.last_hidden_state, output.embedding


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch and onnxruntime warn of their own insides; what they wrote is compared instead."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_graph(student: StudentModel, path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    inputs = dict(student.tokenizer([SAMPLE_TEXTS[0], SAMPLE_TEXTS[2]], padding=True, return_tensors="pt"))
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in inputs}
    names = {"input_names": list(inputs), "output_names": list(_OUTPUTS)}
    try:
        with _quiet():
            program = torch.onnx.export(
                _Graph(student).eval(), kwargs=inputs, dynamo=True, dynamic_shapes=axes, verbose=False, **names
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"export: torch {torch.__version__} can't write {type(student.backbone).__name__} as a graph, expected an encoder "
            f"whose steps do not depend on the values of its states. Use the student itself. ({error.__cause__ or error})"
        ) from error
    ClearMetadataAndDocStringPass()(program.model)  # each node names the source file, on this machine, that it came from
    program.save(path, external_data=False)


def _write_int8(source: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        # One scale for a whole matrix costs several times as much. The range is that of 7 bits: CPUs without VNNI add pairs of
        # products in 16 bits, which 8 would overflow, and a score would hold on the machine that measured it only.
        quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


def _require_equal(student: StudentModel, path: Path) -> None:
    ours = student.encode(list(SAMPLE_TEXTS), convert_to_tensor=True).double()
    for size in (1, 2):  # alone, and padded
        least = torch.cosine_similarity(ours, onnx_encode(path, student, size)(list(SAMPLE_TEXTS)).double()).min().item()
        if not least >= MIN_COSINE:
            raise ValueError(
                f"export: the graph of {student.name_or_path} gives other vectors than it does (smallest cosine {least:.6f} in "
                f"batches of {size}), expected at least {MIN_COSINE}. Users would not get the model that was measured, so the "
                f"graph was not kept. Use the student itself, or try another torch (this is {torch.__version__})."
            )


def _measure(student: StudentModel, path: Path, texts: list[str], evaluators: Sequence[Any]) -> dict[str, Any]:
    encode = onnx_encode(path, student)
    cosines = torch.cosine_similarity(student.encode(texts, convert_to_tensor=True).double(), encode(texts).double())
    facts = {"mb": path.stat().st_size / 1e6, "cosine_min": cosines.min().item(), "cosine_mean": cosines.mean().item()}
    return {**facts, "scores": {name: value for evaluator in evaluators for name, value in evaluator(encode).items()}}
