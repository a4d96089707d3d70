# SPDX-License-Identifier: Apache-2.0
"""What more text brings: one run of the HPD recipe a size, and a plot over texts and over dimensions.

`python benchmarks/hpd_curve.py --sizes 10000 30000 0 --name hpd_mpnet_curve -- --teacher ... --sts ...` (0: all of the text).
A smaller size is a part of the larger one. Killed and called again, it goes on. Writes recipes/results/NAME.json and NAME.png.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_distill.evaluation.report import provenance, table, write_results


RECIPES = Path(__file__).parents[1] / "recipes"


def draw(curve: dict[str, dict], path: Path) -> None:
    """Draw the STS average over the texts and, a line a size, over the dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    last = list(curve.values())[-1]
    counts = [run["texts"] for run in curve.values()]
    left.plot(counts, [run["rows"]["student"]["sts_avg"] for run in curve.values()], marker="o", label="student")
    for name, style in (("teacher", ":"), (next(n for n in last["rows"] if n.startswith("teacher, PCA")), "--")):
        left.axhline(last["rows"][name]["sts_avg"], color="black", linestyle=style, label=name)
    left.set(xscale="log", xlabel="training texts", ylabel="STS average × 100", title="STS average over texts")
    for label, run in [*((f"{run['texts']} texts", run["rows"]["student"]) for run in curve.values())]:
        points = sorted((int(key.split("@")[1]), value) for key, value in run.items() if key.startswith("sts_avg@"))
        right.plot(*zip(*points, strict=True), marker="o", label=label)
    right.set(xlabel="first dimensions used", ylabel="STS average × 100", title="STS average over dimensions")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the recipe once a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 0])
    parser.add_argument("--name", default="hpd_curve")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: flags of recipes/hpd.py")
    options = parser.parse_args()
    flags = [flag for flag in options.flags if flag != "--"]
    sys.path.insert(0, str(RECIPES))
    import hpd

    curve = {}
    for size in options.sizes:
        folder = options.outputs / f"{options.name}_{size or 'all'}"
        if not (folder / "results.json").exists():
            hpd.main([*flags, *(["--max_texts", str(size)] if size else []), "--output_dir", str(folder)])
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows = {name: row["scores"] for name, row in results["rows"].items()}
        curve[str(size or "all")] = {"texts": results["data"]["rows"], "rows": rows, "timings_s": results["timings_s"]}
    write_results(RECIPES / "results", {"curve": curve, "provenance": provenance(None)}, options.name)
    draw(curve, RECIPES / "results" / f"{options.name}.png")
    print(table({f"{run['texts']} texts": run["rows"]["student"] for run in curve.values()}))


if __name__ == "__main__":
    main()
