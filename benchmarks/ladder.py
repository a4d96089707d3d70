# SPDX-License-Identifier: Apache-2.0
"""EmbedDistill rung by rung, over seeds: `python benchmarks/ladder.py --name scifact -- --collection $DATA/scifact ...`.

Runs recipes/embed_distill.py for each rung and seed with the flags behind `--`, one after the other, in outputs/NAME; finished
runs are kept. Writes recipes/results/NAME_ladder.json: mean, least and greatest score over seeds. Rungs whose ranges overlap
count as equal. `--reranker R` compares what that cross-encoder teaches instead, as NAME_reranker.json. The epochs of a rung are
what dev asked for on SciFact: few where both towers learn, many where a query encoder alone learns from few queries.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_distill.evaluation.report import provenance, write_results
from hf_distill.evaluation.tables import table


ROOT = Path(__file__).parents[1]
SYMMETRIC = "--symmetric true --num_train_epochs 4"
UNMATCHED = f"{SYMMETRIC} --query_weight 0 --document_weight 0"
LADDERS = {
    "ladder": {
        "labels": f"{UNMATCHED} --score_weight 0",
        "+ scores": UNMATCHED,
        "+ inherited documents": "--num_train_epochs 20 --query_weight 0",
        "+ query matching": "--num_train_epochs 20",
        "+ made queries": "--num_train_epochs 5 --spans 4",
    },
    "reranker": {
        "labels": f"{UNMATCHED} --score_weight 0",
        "+ reranker's scores": f"{UNMATCHED} --reranker {{}}",
        "+ dual pooling": f"{SYMMETRIC} --dual_pooling 256 --reranker {{}}",
    },
}


def main() -> None:
    """Run what is not finished; put the scores beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--reranker")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("flags", nargs="*", help="of the recipe, behind --")
    options = parser.parse_args()
    ladder = "reranker" if options.reranker else "ladder"
    folder = ROOT / "outputs" / f"{options.name}_{ladder}"
    rungs: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for number, (rung, more) in enumerate(LADDERS[ladder].items()):
            output = folder / f"{number}-{seed}"
            if not (output / "results.json").exists():
                own = [*more.format(options.reranker).split(), "--seed", str(seed), "--output_dir", str(output)]
                recipe = [sys.executable, str(ROOT / "recipes" / "embed_distill.py")]
                subprocess.run([*recipe, *options.flags, *own, "--index_report", "false"], check=True)
            rungs.setdefault(rung, []).append(json.loads((output / "results.json").read_text("utf-8")))
    rows = {"teacher": cells([results["rows"]["teacher"] for results in next(iter(rungs.values()))])}
    rows |= {rung: cells([results["rows"]["student"] for results in found]) for rung, found in rungs.items()}
    for cell in rows.values():
        cell["of the teacher"] = 100 * cell["test"] / rows["teacher"]["test"]
    runs = {rung: [results["provenance"] for results in found] for rung, found in rungs.items()}
    results = {"table": rows, "seeds": options.seeds, "runs": runs, "provenance": provenance(options.seeds[0])}
    write_results(ROOT / "recipes" / "results", results, f"{options.name}_{ladder}")
    print(table(rows))


def cells(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parameters, and nDCG@10 of dev and test, times 100: mean, and the range over the seeds."""
    row: dict[str, Any] = {"params": f"{found[0]['parameters'] / 1e6:.1f}M"}
    for split in ("dev", "test"):
        values = [one["scores"][f"{split}_ndcg10"] for one in found]
        row |= {split: statistics.mean(values), f"{split}, range": f"{min(values):.2f}–{max(values):.2f}"}
    return row


if __name__ == "__main__":
    main()
