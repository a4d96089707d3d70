# SPDX-License-Identifier: Apache-2.0
"""Quality over size and speed of several students: `python benchmarks/shapes.py TEACHER outputs/a outputs/b ...`.

Each folder is the output of a run. All encode the same texts in turn, several rounds, in this one process, and what counts is
the ratio to the teacher in the same round: machines are noisy. Writes recipes/results/NAME.json and NAME.png.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from compare import origin

from hf_distill import EncoderTeacher
from hf_distill.evaluation.report import provenance, pyplot, table, write_results


RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    """Measure the speeds, put them beside the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("students", type=Path, nargs="+")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="hpd_shapes")
    options = parser.parse_args()
    sys.path.insert(0, str(RECIPES))
    from demo import gcide_texts

    texts = gcide_texts().shuffle(seed=0)["text"][: options.texts]
    results = {folder.name: json.loads((folder / "results.json").read_text("utf-8")) for folder in options.students}
    teacher_row = next(iter(results.values()))["rows"]["teacher"]
    # One precision for all: a CPU that multiplies bfloat16 in hardware would favour the larger model.
    encoders = {"teacher": EncoderTeacher(options.teacher, dtype="float32")}
    encoders |= {folder.name: EncoderTeacher(folder, dtype="float32") for folder in options.students}
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for encoder in encoders.values():
        encoder.encode(texts[:64])
    for _ in range(options.rounds):
        for name, encoder in encoders.items():
            started = time.perf_counter()
            encoder.encode(texts, 32, show_progress_bar=False)
            seconds[name].append(time.perf_counter() - started)
    rows = {}
    for name, encoder in encoders.items():
        ratios = [a / b for a, b in zip(seconds["teacher"], seconds[name], strict=True)]
        row = teacher_row if name == "teacher" else results[name]["rows"]["student"]
        start = {} if name == "teacher" else {"STS avg before": results[name]["rows"]["untrained student"]["scores"]["sts_avg"]}
        rows[name] = {
            "parameters M": encoder.num_parameters / 1e6,
            "dim": encoder.dim,
            **start,
            "STS avg": row["scores"]["sts_avg"],
            "fidelity": row["scores"]["fidelity_spearman"],
            "texts/s": options.texts / statistics.median(seconds[name]),
            "times as fast": statistics.median(ratios),
            "from": min(ratios),
            "to": max(ratios),
        }
    runs = {name: origin(run) for name, run in results.items()}
    write_results(RECIPES / "results", {"table": rows, "runs": runs, "provenance": provenance(None)}, options.name)
    draw(rows, RECIPES / "results" / f"{options.name}.png")
    print(table(rows))


def draw(rows: dict[str, dict], path: Path) -> None:
    """Draw quality over parameters, and over speed."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, what in zip(panels, ("parameters M", "times as fast"), strict=True):
        for name, row in rows.items():
            axes.plot(row[what], row["STS avg"], "o")
            axes.annotate(name, (row[what], row["STS avg"]), textcoords="offset points", xytext=(6, 4), fontsize="small")
        axes.set(xscale="log")
        axes.margins(x=0.25)  # room for the names
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="STS average × 100", xlabel="parameters (millions)")
    panels[1].set(xlabel="encode speed, times the teacher's")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
