# SPDX-License-Identifier: Apache-2.0
"""The model card: what results.json says, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging


logger = logging.get_logger(__name__)
_TEMPLATE = Path(__file__).parent / "card_template.md"
_PAPERS = {
    "2203.07687": "Compressing Sentence Representation for Semantic Retrieval via Homomorphic Projective Distillation "
    "(Zhao, Yu, Wu, Li; Findings of ACL 2022)",
}
_STS = {"task_type": "STS", "metric_type": "cosine_spearman", "metric_name": "Spearman × 100"}


def run_card(folder: str | Path, run: dict[str, Any], name: str | None = None) -> str:
    """Return the card of a student as Markdown with its YAML head.

    Args:
        folder: The student's folder; results.json there gives scores, data and provenance.
        run: What the trainer knows (teacher, loss, student), as in distillation.json.
        name: What the model is called; the folder's name if None.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    paper = results.get("paper", "")
    scores = dict(results["rows"]["student"]["scores"]) if results else {}
    student = run["student"]
    license_id = results.get("license")
    if results and license_id is None:
        logger.warning(f"card: {name} has no licence (--license); the card says none. A Hub user could not rely on it.")
    data = ModelCardData(
        model_name=name,
        language=results.get("language"),
        license=license_id,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "hf_distill", "knowledge-distillation", run["loss"]["name"]],
        base_model=[hub_id for hub_id in dict.fromkeys([student["base_model"], run["teacher"]]) if _is_hub_id(hub_id)] or None,
        datasets=[results["data"]["name"]] if _is_hub_id(results.get("data", {}).get("name")) else None,
        eval_results=[
            EvalResult(dataset_type=set_name, dataset_name=set_name, metric_value=round(scores[f"sts_{set_name}"], 2), **_STS)
            for set_name in [key.removeprefix("sts_") for key in scores if key.startswith("sts_") and "avg" not in key]
        ]
        or None,
    )
    tables = {}
    if results:
        from .evaluation.report import dimension_table, score_table

        tables = {"scores": score_table(results), "dimensions": dimension_table(results)}
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        run=run,
        student=student,
        results=results,
        tables=tables,
        paper=paper,
        paper_title=_PAPERS.get(paper, paper),
        plots=[plot for plot in ("training.png", "dimensions.png") if (folder / plot).exists()],
        has_projection=(folder / "teacher_projection.safetensors").exists(),
        repo=name,
    )
    return str(card)


def _is_hub_id(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
