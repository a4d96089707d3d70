# SPDX-License-Identifier: Apache-2.0
"""Finished runs of recipes/hpd.py side by side: `python benchmarks/compare.py outputs/a outputs/b ... --name hpd_curve`.

Writes recipes/results/NAME.json: a row a run, named by its folder, with its command and commit. `--plot` adds NAME.png: what
more text, and more dimensions, bring (the runs then differ in `--max_texts` and `--dim` only).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_distill.evaluation.plots import pyplot
from hf_distill.evaluation.report import provenance, write_results
from hf_distill.evaluation.tables import table


RESULTS = Path(__file__).parents[1] / "recipes" / "results"
COLUMNS = {
    "fidelity_spearman": "fidelity ρ",
    "fidelity_neighbours": "same 10-NN",
    "sts_STS-B dev": "STS-B dev",
    "sts_avg": "STS avg",
}


def row(results: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of one run: what it was, what its student scored, and had scored before the training."""
    before, after = (results["rows"][name]["scores"] for name in ("untrained student", "student"))
    cells = {"texts": results["data"]["rows"], "steps": results["hyperparameters"]["steps"]}
    cells["dim"] = results["projection"]["dim"]
    for key, heading in COLUMNS.items():
        if key in after:
            cells |= {f"{heading} before": before[key], heading: after[key]} if key.startswith("sts") else {heading: after[key]}
    return cells


def origin(results: dict[str, Any]) -> dict[str, Any]:
    """Return all scores of one run's student, and what made it."""
    made = {key: results["provenance"][key] for key in ("command", "commit", "seed")}
    return {"scores": results["rows"]["student"]["scores"], "timings_s": results["timings_s"], **made}


def points(scores: dict[str, float]) -> list[tuple[int, float]]:
    """Return (first dimensions, STS average) of a row of scores, in order."""
    return sorted((int(key.split("@")[1]), value) for key, value in scores.items() if key.startswith("sts_avg@"))


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the STS average over the texts and, a line a run, over the dimensions."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    scores = {name: {who: row["scores"] for who, row in run["rows"].items()} for name, run in runs.items()}
    dims = {name: run["projection"]["dim"] for name, run in runs.items()}
    narrow, wide = min(dims.values()), max(dims, key=lambda name: dims[name])
    alike = sorted((runs[name]["data"]["rows"], scores[name]) for name in runs if dims[name] == narrow)
    left.plot([texts for texts, _ in alike], [score["student"]["sts_avg"] for _, score in alike], marker="o", label="student")
    for who, style in (("teacher", ":"), (f"teacher, PCA {narrow}", "--"), ("untrained student", "-.")):
        left.axhline(alike[-1][1][who]["sts_avg"], color="black", linestyle=style, label=who)
    left.set(xscale="log", xlabel="training texts", ylabel="STS average × 100", title=f"{narrow} dimensions")
    reduced = points(scores[wide][f"teacher, PCA {dims[wide]}"])
    right.plot(*zip(*reduced, strict=True), color="black", linestyle="--", marker=".", label="teacher, PCA")
    for name in runs:
        right.plot(*zip(*points(scores[name]["student"]), strict=True), marker="o", label=name)
    right.set(xscale="log", xlabel="first dimensions used", title="of each student")
    right.set_xticks([dim for dim, _ in reduced], [str(dim) for dim, _ in reduced])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the runs, write one table and one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--name", required=True)
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    runs = {folder.name: json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in options.runs}
    first = next(iter(runs.values()))["rows"]
    teachers = {name: first[name]["scores"] for name in first if name.startswith("teacher")}
    rows = {name: {COLUMNS[key]: scores[key] for key in COLUMNS if key in scores} for name, scores in teachers.items()}
    results = {
        "table": {name: row(run) for name, run in runs.items()} | rows,
        "runs": {name: origin(run) for name, run in runs.items()},
        "provenance": provenance(None),
    }
    write_results(RESULTS, results, options.name)
    if options.plot:
        draw(runs, RESULTS / f"{options.name}.png")
    print(table(results["table"]))


if __name__ == "__main__":
    main()
