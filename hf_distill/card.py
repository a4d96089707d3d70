# SPDX-License-Identifier: Apache-2.0
"""The model card: what results.json says, and nothing else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from .hub import PROJECTION_FILE, RUN_FILE, is_hub_id
from .licenses import caution, require_license
from .papers import PAPERS, citations


logger = logging.get_logger(__name__)
_TEMPLATE = Path(__file__).parent / "card_template.md"
_STS = {"task_type": "STS", "metric_type": "cosine_spearman", "metric_name": "Spearman × 100"}
_BITEXT = {"task_type": "BitextMining", "metric_type": "accuracy", "metric_name": "accuracy × 100, mean of both directions"}
_SEARCH = {"task_type": "information-retrieval", "metric_type": "cosine_ndcg@10", "metric_name": "nDCG@10 × 100"}


def write_card(folder: str | Path, name: str, run: Mapping[str, Any] | None = None) -> Path:
    """Write README.md of a student's folder from what lies there: results.json, or without it what the run was told.

    Args:
        folder: The student's.
        name: What it is called: the id of its repository, if it has one.
        run: What the run was told; as distillation.json in the folder says if not given.

    Raises:
        ValueError: If there is no student, or results.json is of another: its numbers would stand on this one's card.
    """
    folder = Path(folder)
    config, known, results = (_read(folder / file) for file in ("config.json", RUN_FILE, "results.json"))
    student, run = config.get("hf_distill", {}), known if run is None else run
    if not student:
        raise ValueError(f"card: {folder} holds no student, expected what StudentModel.save_pretrained or a recipe wrote.")
    told, parts = {**run, "student": student}, ("student", "teacher_fingerprint", "loss")
    both = [(told[part], results[part]) for part in parts if told.get(part) and results.get(part)]
    changed = [(key, old[key], own[key]) for own, old in both for key in own if key in old and own[key] != old[key]]
    if changed:
        raise ValueError(
            "card: results.json in {} is of another student ({}: {!r} there, {!r} here), expected this one's. Its numbers "
            "would stand on its card. Delete it, or run the recipe again.".format(folder, *changed[0])
        )
    plots = sorted(plot.name for plot in folder.glob("*.png"))
    card = run_card({"student": student, **run, **results}, name, plots, (folder / PROJECTION_FILE).exists())
    (folder / "README.md").write_text(card + "\n", encoding="utf-8")
    return folder / "README.md"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_card(facts: Mapping[str, Any], name: str, plots: Sequence[str] = (), has_projection: bool = False) -> str:
    """Return the card of a student as Markdown with its YAML head.

    Args:
        facts: What results.json holds; or only what the trainer knows (teacher, loss, student), without scores.
        name: What the model is called.
        plots: Image files beside the card.
        has_projection: Whether teacher_projection.safetensors lies beside it.
    """
    measured = "rows" in facts
    require_license(facts.get("license"))
    scores = dict(facts["rows"]["student"]["scores"]) if measured else {}
    student, paper = facts["student"], PAPERS.get(facts.get("paper", ""))
    loss, teacher, text = facts.get("loss", {"losses": []}), facts.get("teacher"), facts.get("data", {}).get("name")
    losses = [part["name"] for part in loss.get("losses", [loss])]
    if measured and not facts.get("license"):
        logger.warning(f"card: {name} has no licence (--license); the card says none. A Hub user could not rely on it.")
    asked = caution(facts["teacher_license"]) if teacher and "teacher_license" in facts else None
    if measured and asked:
        logger.warning(f"card: {asked} (--teacher_license, if its card does not name it.) The card says so, too.")
    data = ModelCardData(
        model_name=name,
        language=facts.get("language"),
        license=facts.get("license"),
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "hf_distill", "knowledge-distillation", *losses]
        + ([f"arxiv:{paper.arxiv}"] if paper else []),
        base_model=[hub_id for hub_id in dict.fromkeys([student["base_model"], teacher]) if is_hub_id(hub_id)] or None,
        datasets=[text] if is_hub_id(text) else None,
        eval_results=_eval_results(scores, text, "senses" in student) or None,
        co2_eq_emissions=facts.get("co2_eq_emissions"),
    )
    tables = {}
    if measured or "onnx" in facts:
        from .evaluation import tables

        shown = {"scores": tables.score_table, "dimensions": tables.dimension_table, "index": tables.index_table}
        shown |= {"languages": tables.language_table, "speed": tables.speed_table, "precisions": tables.precision_table}
        shown["onnx"] = tables.onnx_table
        tables = {name: draw(facts) for name, draw in shown.items()}
    made_by = json.dumps(facts.get("teacher_fingerprint"), sort_keys=True).encode()
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        facts=facts,
        measured=measured,
        student=student,
        dim=student.get("projection_dim") or (facts["rows"]["student"]["dim"] if measured else None),
        losses=losses,
        caution=asked,
        tables=tables,
        paper=paper,
        pipeline=_pipeline(facts, losses),
        targets=hashlib.sha256(made_by).hexdigest()[:12] if teacher else None,
        citations=citations(paper, teacher if is_hub_id(teacher) else None),
        plots=plots,
        has_projection=has_projection,
    )
    return str(card)


def _eval_results(scores: Mapping[str, float], collection: str | None, replaced: bool) -> list[EvalResult]:
    """Return what the Hub lists: each STS set, the search of test queries, translations found."""
    sts = {**_STS, "metric_name": f"{_STS['metric_name']}, states replaced by senses (remote code)"} if replaced else _STS
    values = {key.removeprefix("sts_"): (value, sts) for key, value in scores.items() if key.startswith("sts_")}
    values = {name: value for name, value in values.items() if "avg" not in name}
    for key, called in (("tatoeba_avg", "Tatoeba, mean over languages"), ("test_avg", f"{collection}, test pairs")):
        if key in scores:
            values[called] = (scores[key], _BITEXT)
    if "test_ndcg10" in scores:
        values[f"{collection}, test queries"] = (scores["test_ndcg10"], _SEARCH)
    return [
        EvalResult(dataset_type=name.split(",")[0], dataset_name=name, metric_value=round(value, 2), **kind)
        for name, (value, kind) in values.items()
    ]


def _pipeline(facts: Mapping[str, Any], losses: Sequence[str]) -> str:
    """Return what learns from what, drawn with letters."""
    student, reduced = facts["student"], facts.get("projection")
    own = [f"{len(student['layers'])} layers", f"{student['pooling']} pooling"]
    own += ["states replaced by senses"] if "senses" in student else []
    own += [f"Linear to {student['projection_dim']}"] if student.get("projection_dim") else []
    own += ["unit length"] if student.get("normalize") else []
    lines = [["query" if student.get("document_encoder") else "text", *own]]
    if facts.get("teacher"):
        lines.insert(0, ["text", facts["teacher"], *([f"PCA to {reduced['dim']}"] if reduced else [])])
    drawn = [" ─► ".join(line) for line in lines]
    width = max(map(len, drawn)) + 1
    ends = [" ─┐", " ─┴─► " + " + ".join(losses)] if len(drawn) > 1 else [""]
    return "\n".join((line + " ").ljust(width, "─") + end.strip() for line, end in zip(drawn, ends, strict=True)).rstrip()
