# SPDX-License-Identifier: Apache-2.0
"""What more text, and more dimensions, bring: `python benchmarks/hpd_curve.py outputs/a outputs/b ...`.

Each folder is the output of a run of recipes/hpd.py, alike but for `--max_texts` or `--dim`. Writes recipes/results/NAME.json
(with the command and commit of every run) and NAME.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_distill.evaluation.report import provenance, table, write_results


RESULTS = Path(__file__).parents[1] / "recipes" / "results"


def points(row: dict[str, float]) -> list[tuple[int, float]]:
    """Return (first dimensions, STS average) of a row of scores, in order."""
    return sorted((int(key.split("@")[1]), value) for key, value in row.items() if key.startswith("sts_avg@"))


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the STS average over the texts and, a line a run, over the dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    dim = min(run["dim"] for run in runs.values())
    alike = [run for run in runs.values() if run["dim"] == dim]
    left.plot([run["texts"] for run in alike], [run["student"]["sts_avg"] for run in alike], marker="o", label="student")
    for name, style in (("teacher", ":"), ("reduced", "--"), ("untrained", "-.")):
        label = f"teacher, PCA {dim}" if name == "reduced" else name
        left.axhline(alike[-1][name]["sts_avg"], color="black", linestyle=style, label=label)
    left.set(xscale="log", xlabel="training texts", ylabel="STS average × 100", title=f"{dim} dimensions")
    widest = max(runs.values(), key=lambda run: run["dim"])
    right.plot(*zip(*points(widest["reduced"]), strict=True), color="black", linestyle="--", marker=".", label="teacher, PCA")
    for name, run in runs.items():
        right.plot(*zip(*points(run["student"]), strict=True), marker="o", label=name)
    right.set(xscale="log", xlabel="first dimensions used", title="of each student")
    right.set_xticks([d for d, _ in points(widest["student"])], [str(d) for d, _ in points(widest["student"])], minor=False)
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the runs, write one table and one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--name", default="hpd_curve")
    options = parser.parse_args()
    runs = {}
    for folder in options.runs:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        scores = {name: row["scores"] for name, row in results["rows"].items()}
        dim = results["projection"]["dim"]
        runs[f"{results['data']['rows']} texts, {dim} dimensions"] = {
            "texts": results["data"]["rows"],
            "dim": dim,
            "teacher": scores["teacher"],
            "reduced": scores[f"teacher, PCA {dim}"],
            "untrained": scores["untrained student"],
            "student": scores["student"],
            "timings_s": results["timings_s"],
            "made_by": {key: results["provenance"][key] for key in ("command", "commit", "seed")},
        }
    runs = dict(sorted(runs.items(), key=lambda item: (item[1]["dim"], item[1]["texts"])))
    write_results(RESULTS, {"curve": runs, "provenance": provenance(None)}, options.name)
    draw(runs, RESULTS / f"{options.name}.png")
    print(table({name: dict((f"@{d}", value) for d, value in points(run["student"])) for name, run in runs.items()}))


if __name__ == "__main__":
    main()
