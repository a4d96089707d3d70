# SPDX-License-Identifier: Apache-2.0
"""What a run measured: results.json, tables and plots."""

import contextlib
import csv
import importlib
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
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..hub import NOT_PUBLISHED, PROJECTION_FILE, files_of
from ..layout import check_layout, open_student
from ..processes import score
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
        scores = score(self.evaluators, encode)
        scores = {key: value for key, value in scores.items() if prefixes or not key.partition("@")[2].isdigit()}
        own = [getattr(evaluator, "intervals", dict)() for evaluator in self.evaluators]  # a plain function has none
        intervals = {key: value for found in own for key, value in found.items()}
        self.rows[name] = {"parameters": parameters, "dim": dim, "scores": scores}
        self.rows[name] |= {"intervals": intervals} if intervals else {}

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


def measure_speed(trainer: Any, folder: Path, count: int = 64) -> dict[str, Any]:
    """Return texts per second of the live teacher and of the student in the folder, side by side; and the student's megabytes.

    Args:
        trainer: The `DistillationTrainer`, whose first texts (of the first column) are encoded.
        folder: Where the student was saved.
        count: Texts at once.
    """
    student = open_student(folder).to(trainer.args.device)
    texts = [row[trainer.columns[0]] for row in islice(iter(trainer.train_dataset), count)]
    encoders, precisions = {"student": student.encode}, {"student": str(student.dtype).removeprefix("torch.")}
    live = trainer.teacher and trainer.teacher.live
    if live is not None:
        encoders, precisions["teacher"] = {"teacher": live.encode, **encoders}, live.fingerprint.get("dtype")
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


def table(rows: Mapping[str, Mapping[str, Any]], first: str = "") -> str:
    """Return a Markdown table: a line a row, a column a score; a dash where a row lacks it.

    Args:
        rows: Name of a row -> its cells by column.
        first: Heading of the column of names.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[first, *columns]]
    for name, row in rows.items():
        cells = [row.get(column, "–") for column in columns]
        lines.append([name, *(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


_MARKERS = "os^vDP*X"
# What stands first in a table, and what is shown of the first k dimensions.
_FIRST = ("sts_avg", "tatoeba_avg", "test_ndcg10")
_BY_DIMENSION = ("sts_avg", "fidelity_spearman", "dev_ndcg10", "test_ndcg10", "tatoeba_avg")


def score_table(results: Mapping[str, Any]) -> str:
    """Return the rows of results.json as a table: the scores at full width, with short headings."""
    rows = {}
    for name, row in results.get("rows", {}).items():
        sure = {key: f" ({low:.2f}–{high:.2f})" for key, (low, high) in row.get("intervals", {}).items()}
        ordered = sorted(row["scores"].items(), key=lambda score: score[0] not in _FIRST)  # a wide table is cut on the right
        scores = {key: f"{value:.2f}{sure[key]}" if key in sure else value for key, value in ordered}
        cells = {_heading(key): value for key, value in scores.items() if _heading(key) and not set(key) & set("@:")}
        rows[name] = {"params": f"{row['parameters'] / 1e6:.1f}M", "dim": row["dim"], **cells}
    return table(rows) if rows else ""


def _heading(key: str) -> str | None:
    """Return the heading of a score; None for one that only results.json holds."""
    short = {"fidelity_spearman": "fidelity ρ", "fidelity_neighbours": "same 10-NN", "sts_avg": "STS avg"}
    ranking = {"ndcg10": "nDCG@10", "mrr10": "MRR@10", "recall10": None, "recall100": "recall@100", "map100": None}
    queries, _, measure = key.rpartition("_")
    if measure in ranking:
        return ranking[measure] and f"{queries} {ranking[measure]}"
    return short.get(key, key.removeprefix("sts_").replace("_", " "))


def dimension_table(results: Mapping[str, Any]) -> str:
    """Return the scores of the first k dimensions, for each k that was measured; "" for none."""
    return _form_table(results, str.isdigit)


def precision_table(results: Mapping[str, Any]) -> str:
    """Return the scores with 8 bits a number and with one, where they were measured; "" for none."""
    return _form_table(results, lambda form: not form.isdigit())


def _form_table(results: Mapping[str, Any], wanted: Callable[[str], bool]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for name, row in results.get("rows", {}).items():
        for key, value in row["scores"].items():
            score, _, form = key.partition("@")
            if form and wanted(form) and score in _BY_DIMENSION:
                rows.setdefault(name, {})[f"{_heading(score)} @{form}"] = value
    return table(rows) if rows else ""


def speed_table(results: Mapping[str, Any]) -> str:
    """Return texts per second of teacher and student, side by side; "" where they were not measured."""
    rows = results.get("speed", {}).get("rows", {})
    short = {"precision": "precision", "texts_per_s": "texts/s", "times_faster": "× as fast", "from": "from", "to": "to"}
    shown = {name: {short[key]: row[key] for key in short if row.get(key)} for name, row in rows.items()}
    return table(shown) if shown else ""


def onnx_table(results: Mapping[str, Any]) -> str:
    """Return what each exported graph weighs, and how close it comes to the student; "" where none was exported."""
    short = {"sts_avg": "STS avg", "fidelity_spearman": "fidelity ρ", "fidelity_neighbours": "same 10-NN"}
    rows = {}
    for file, row in results.get("onnx", {"files": {}})["files"].items():
        cosines = {"smallest cosine": f"{row['cosine_min']:.4f}", "mean cosine": f"{row['cosine_mean']:.4f}"}
        scores = {heading: row["scores"][key] for key, heading in short.items() if key in row["scores"]}
        rows[f"`{file}`"] = {"MB": f"{row['mb']:.1f}", **cosines, **scores}
    return table(rows) if rows else ""


def language_table(results: Mapping[str, Any]) -> str:
    """Return a line a language: the pairs that were trained on, and every row's accuracy, both directions' mean; or ""."""
    found = _languages(results)
    pairs = results.get("data", {}).get("languages", {})
    trained, other = ([code for code in found if (code in pairs) == side] for side in (True, False))
    return table({code: {"pairs": pairs.get(code, 0), **found[code]} for code in trained + other}) if found else ""


def _languages(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return language -> row -> accuracy, of the test, or of dev where there is none."""
    keys = [key for key in _keys(results) if ":" in key and ">" not in key]
    test = next((name for name in ("tatoeba", "test", "dev") if any(key.startswith(f"{name}:") for key in keys)), None)
    codes = sorted(key.partition(":")[2] for key in keys if key.startswith(f"{test}:"))
    return {code: {name: row["scores"][f"{test}:{code}"] for name, row in results["rows"].items()} for code in codes}


def index_table(results: Mapping[str, Any]) -> str:
    """Return the report of indexes as a table with short headings; "" where there is none."""
    rows = results.get("index", {})
    short = {
        "dim": "dim",
        "mb_per_million": "MB per million",
        "times_smaller": "× smaller",
        "recall": "recall@10",
        "ndcg": "nDCG@10",
        "overlap": "same 10",
        "p50_ms": "p50 ms",
        "p95_ms": "p95 ms",
        "times_faster": "× faster",
        "batch_qps": "queries/s, batch",
        "times_faster_batch": "× faster, batch",
        "build_s": "build s",
    }
    return table({name: {heading: row[key] for key, heading in short.items()} for name, row in rows.items()}) if rows else ""


def draw_plots(folder: str | Path, results: Mapping[str, Any]) -> list[str]:
    """Draw training.png (loss over steps), dimensions.png (quality over dimensions), index.png; return their names."""
    plt = pyplot()
    folder, drawn = Path(folder), []
    steps = [line for line in results["log_history"] if "loss" in line]
    if len(steps) > 1:
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for part in sorted({key for line in steps for key in line if key.startswith("loss_")}):
            values = [line[part] for line in steps]
            if max(values) > 1e-6:  # what is zero by its definition, but for rounding, would set the scale
                axes.plot([line["step"] for line in steps], values, label=part.removeprefix("loss_"))
        axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss")
        axes.legend(title="part")
        axes.grid(alpha=0.3)
        figure.savefig(folder / "training.png", dpi=120)
        drawn.append("training.png")
    cut = {key.partition("@")[0] for key in _keys(results) if key.partition("@")[2].isdigit()}
    kinds = [kind for kind in _BY_DIMENSION if kind in cut]
    if kinds:
        figure, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 3.5), layout="constrained", squeeze=False)
        for axes, kind in zip(panels[0], kinds, strict=True):
            for name, row in results["rows"].items():
                parts = ((*key.partition("@")[::2], value) for key, value in row["scores"].items())
                points = [(int(dim), value) for score, dim, value in parts if score == kind and dim.isdigit()]
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
                elif kind in row["scores"]:
                    axes.axhline(row["scores"][kind], color="black", linestyle=":", label=f"{name} ({row['dim']}-d)")
            axes.set(xlabel="first dimensions used", ylabel=f"{_heading(kind)} × 100", title=_heading(kind))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(folder / "dimensions.png", dpi=120)
        drawn.append("dimensions.png")
    plt.close("all")
    if "index" in results:
        draw_index(folder / "index.png", results["index"])
        drawn.append("index.png")
    languages = _languages(results)
    if languages:
        draw_languages(folder / "languages.png", languages)
        drawn.append("languages.png")
    return drawn


def draw_languages(path: Path, languages: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a group of bars a language, those that the first row does best first."""
    plt = pyplot()
    names = list(next(iter(languages.values())))
    order = sorted(languages, key=lambda code: -languages[code][names[0]])
    figure, axes = plt.subplots(figsize=(max(6, 0.22 * len(order) * len(names) ** 0.5 + 2), 3.5), layout="constrained")
    for place, name in enumerate(names):
        shifted = [i + (place - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(order))]
        axes.bar(shifted, [languages[code][name] for code in order], width=0.8 / len(names), label=name)
    axes.set_xticks(range(len(order)), order, rotation=90 if len(order) > 12 else 0)
    axes.set(ylabel="accuracy × 100", title="Translations found, mean of both directions", ylim=(0, 100))
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_index(path: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Draw quality over memory and over the latency of one query, a colour a space, a marker a kind of index."""
    plt = pyplot()
    from matplotlib import lines

    spaces, kinds = (list(dict.fromkeys(name.split(", ", 1)[side] for name in rows)) for side in (0, 1))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, key, label in zip(panels, ("mb_per_million", "p50_ms"), ("MB per million vectors", "ms a query"), strict=True):
        for name, row in rows.items():
            space, kind = name.split(", ", 1)
            style = {"color": f"C{spaces.index(space)}", "marker": _MARKERS[kinds.index(kind) % len(_MARKERS)]}
            axes.plot(row[key], row["recall"], linestyle="", markersize=8, alpha=0.8, **style)
        axes.set(xlabel=label)
        _scale(axes)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="recall@10 × 100")
    shown = [lines.Line2D([], [], color=f"C{i}", linewidth=4, label=space) for i, space in enumerate(spaces)]
    shown += [
        lines.Line2D([], [], color="black", linestyle="", marker=_MARKERS[i % len(_MARKERS)], label=kind)
        for i, kind in enumerate(kinds)
    ]
    figure.legend(handles=shown, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _scale(axes: Any) -> None:
    """Let the horizontal axis be logarithmic, with plain numbers."""
    from matplotlib import ticker

    axes.set(xscale="log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def draw_comparison(path: Path, rows: Mapping[str, Mapping[str, Any]], score: str) -> None:
    """Draw a score over "parameters M" and over "times as fast", a point an encoder."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, what in zip(panels, ("parameters M", "times as fast"), strict=True):
        for name, row in rows.items():
            axes.plot(row[what], row[score], "o")
            axes.annotate(name, (row[what], row[score]), textcoords="offset points", xytext=(6, 4), fontsize="small")
        values = [row[what] for row in rows.values()]
        if max(values) > 5 * min(values):
            _scale(axes)
        axes.margins(x=0.25)  # room for the names
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"{_heading(score)} × 100", xlabel="parameters (millions)")
    panels[1].set(xlabel=f"encode speed, times that of {next(iter(rows))}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib. Install it with: pip install 'hf_distill[eval]'") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _keys(results: Mapping[str, Any]) -> set[str]:
    return {key for row in results.get("rows", {}).values() for key in row["scores"]}
