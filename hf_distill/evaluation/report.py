# SPDX-License-Identifier: Apache-2.0
"""What a run measured: results.json."""

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..hub import NOT_PUBLISHED, PROJECTION_FILE, files_of
from ..layout import check_layout, open_student
from ..processes import score
from .plots import draw_plots
from .tables import dimension_table, score_table
from .uncertainty import timings


_PACKAGES = ("hf_distill", "torch", "transformers", "datasets", "accelerate", "sentence-transformers", "safetensors")


class RunReport:
    """Collects what a recipe measures and writes it: results.json, plots, the card, the closing table.

    Args:
        recipe: Its name.
        paper: arXiv id.
    """

    def __init__(self, recipe: str, paper: str) -> None:
        self.recipe, self.paper = recipe, paper
        self.evaluators: list[Callable[[Any], dict[str, float]]] = []
        self.rows: dict[str, dict[str, Any]] = {}
        self.timings_s: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of the block to `what`."""
        started = time.perf_counter()
        yield
        self.timings_s[what] = self.timings_s.get(what, 0.0) + time.perf_counter() - started

    def add(self, name: str, encode: Callable[[list[str]], Any], parameters: int, dim: int, prefixes: bool = True) -> None:
        """Score an encoder as a row of the table.

        Args:
            name: Of the row.
            encode: texts -> [N, dim].
            parameters: How many weights it has.
            dim: Length of its embeddings.
            prefixes: Whether its first dimensions are an embedding of their own.
        """
        row = {"parameters": parameters, "dim": dim, **score_with_intervals(self.evaluators, encode)}
        row["scores"] = {key: value for key, value in row["scores"].items() if prefixes or not key.partition("@")[2].isdigit()}
        self.rows[name] = row

    def finish(self, trainer: Any, recipe: Any, data: Mapping[str, Any], **facts: Any) -> str:
        """Write everything into the trainer's output folder; return the closing table and how to load the student.

        Args:
            trainer: The `DistillationTrainer`, trained and saved.
            recipe: The recipe's arguments.
            data: What the student was trained on.
            **facts: More sections of results.json.

        Raises:
            ValueError: If the student's loaders disagree.
        """
        args, folder = trainer.args, Path(trainer.args.output_dir)
        if not trainer.is_world_process_zero():
            return ""
        if trainer.resumed_at:  # what came before, another process timed
            since = f"training since step {trainer.resumed_at}"
            self.timings_s = {since if name == "training" else name: value for name, value in self.timings_s.items()}
        shutil.rmtree(folder / "onnx", ignore_errors=True)  # its section of results.json goes, too
        results = {
            "recipe": self.recipe,
            "paper": self.paper,
            **trainer.run_facts,
            "data": data,
            **facts,
            "rows": self.rows,
            "speed": measure_speed(trainer, folder),
            "hyperparameters": {
                "steps": trainer.state.global_step,
                "epochs": round(trainer.state.epoch or 0, 2),
                "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "learning rate": args.learning_rate,
                "schedule": str(args.lr_scheduler_type).rsplit(".", 1)[-1].lower(),
                "warmup": args.warmup_steps,
                "bf16": args.bf16,
                "dropout": recipe.dropout,
            },
            "timings_s": self.timings_s,
            "co2_eq_emissions": _emissions(folder),
            "license": recipe.license,
            "language": recipe.language,
            "provenance": provenance(args.seed),
            "layout": check_layout(folder),
            "log_history": trainer.state.log_history,
        }
        write_results(folder, results)
        draw_plots(folder, results)
        trainer.create_model_card()
        opened = ["from sentence_transformers import SentenceTransformer", f'model = SentenceTransformer("{folder}")']
        if "senses" in results["student"]:  # sentence-transformers would not replace states
            opened = ["from hf_distill.multi_sense import MultiSenseStudent"]
            opened.append(f'model = MultiSenseStudent.from_pretrained("{folder}")')
        minutes = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in self.timings_s.items())
        return "\n".join(
            [
                "",
                score_table(results),
                "",
                dimension_table(results),
                "",
                f"{minutes}. All of it, with the card and the plots, lies in {folder}.",
                "",
                *opened,
                'model.encode(["A text."])',
            ]
        )


def score_with_intervals(evaluators: Sequence[Callable[[Any], dict[str, float]]], encode: Any) -> dict[str, dict[str, Any]]:
    """Return "scores", and the "intervals" of those that have one; see `hf_distill.processes.score`."""
    scores = score(evaluators, encode)
    own = [getattr(evaluator, "intervals", dict)() for evaluator in evaluators]  # a plain function has none
    intervals = {key: value for found in own for key, value in found.items()}
    return {"scores": scores, **({"intervals": intervals} if intervals else {})}


def measure_speed(trainer: Any, folder: Path, count: int = 64) -> dict[str, Any]:
    """Return texts per second of the live teacher and of the student in the folder, side by side; and the student's megabytes.

    Both compute in the teacher's precision: where bfloat16 is multiplied faster, float32 beside it would favour the teacher.

    Args:
        trainer: The `DistillationTrainer`, whose first texts (of the first column) are encoded.
        folder: Where the student was saved.
        count: Texts at once.
    """
    student = open_student(folder).to(trainer.args.device)
    texts = [row[trainer.columns[0]] for row in islice(iter(trainer.train_dataset), count)]
    encoders, precisions = {"student": student.encode}, {}
    live = trainer.teacher and trainer.teacher.live
    if live is not None:
        encoders, precisions["teacher"] = {"teacher": live.encode, **encoders}, live.fingerprint.get("dtype")
        if precisions["teacher"] in ("bfloat16", "float16"):
            student.to(getattr(torch, precisions["teacher"]))
    precisions["student"] = str(student.dtype).removeprefix("torch.")
    weights = [path for path in files_of(folder, (*NOT_PUBLISHED, PROJECTION_FILE)).values() if path.suffix == ".safetensors"]
    megabytes = sum(path.stat().st_size for path in weights) / 1e6
    rows = {name: {"precision": precisions[name], **row} for name, row in timings(encoders, texts).items()}
    return {"texts": len(texts), "student_mb": megabytes, "rows": rows}


def _emissions(folder: Path) -> dict[str, Any] | None:
    """Return what codecarbon wrote (`--report_to codecarbon`), in grams, as the Hub's metadata want it; None for nothing."""
    path = folder / "emissions.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        grams = sum(1000 * float(row["emissions"]) for row in csv.DictReader(file))  # a row for each part of a resumed run
    source = "codecarbon; the training, without what caching the teacher took"
    return {"emissions": grams, "source": source, "training_type": "distillation", "hardware_used": _hardware()}


def provenance(seed: int) -> dict[str, Any]:
    """Return what it takes to run it again: command, commit, seed, versions, hardware."""
    return {
        "command": command(sys.argv),
        "commit": commit(),
        "seed": seed,
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
    }


def command(argv: list[str]) -> str:
    """Return the command line without secrets and without the names of this machine's folders."""
    words, secret = [], False
    for word in argv:
        flag, _, value = word.partition("=")
        if secret:
            word = "…"
        secret = flag.startswith("--") and "token" in flag and not value
        if flag.startswith("--") and "token" in flag and value:
            word = f"{flag}=…"
        words.append(re.sub(r"(^|[=,:])/(?:[^/=,]+/)*([^/=,]+)", r"\1…/\2", word))
    return " ".join(shlex.quote(word.replace("…", "_")).replace(word.replace("…", "_"), word) for word in words)


def commit() -> str | None:
    """Return the commit of the package's source, with "+changes" if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parents[2])]
    try:
        # Installed inside the folder of another project, the commit would be that project's.
        subprocess.run([*git, "ls-files", "--error-unmatch", str(here)], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    features = torch.cpu.get_capabilities()
    return f"{os.cpu_count()} cores of {features.get('cpu_name', platform.machine())}"


def write_results(folder: str | Path, results: Mapping[str, Any], name: str = "results") -> Path:
    """Write results.json (or another name), numbers rounded to what they are good for."""
    path = Path(folder) / f"{name}.json"
    # What identifies the run is compared with what its folder says, to the last digit.
    exact = {key: results[key] for key in ("student", "teacher_fingerprint", "loss") if key in results}
    path.write_text(json.dumps({**_rounded(results), **exact}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
