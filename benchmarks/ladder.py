# SPDX-License-Identifier: Apache-2.0
"""A recipe's parts beside each other, over seeds: `python benchmarks/ladder.py scifact ladder -- --collection $DATA/scifact`.

Runs the recipe for each rung of a ladder and seed with the flags behind `--`, one after the other, in outputs/NAME_LADDER;
finished runs are kept. The first one alone scores teacher and untrained student. Writes recipes/results/NAME_LADDER.json:
mean, least and greatest score over seeds. Rungs whose ranges overlap count as equal. The data are split by --split_seed, the
same for all.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_distill.evaluation.report import command, provenance, write_results
from hf_distill.evaluation.tables import table


ROOT = Path(__file__).parents[1]


@dataclass
class Ladder:
    """What is compared.

    recipe: Its name. rungs: Name -> the flags that differ. scores: Heading -> key. rows: Heading -> (rung, row of its results).
    reference: The row that the others are a share of. shares: By which scores; by the last one if none is named.
    dev: Settings are chosen by it, so it is scored on dev, and takes no --sts.
    """

    recipe: str
    rungs: dict[str, str]
    scores: dict[str, str]
    rows: dict[str, tuple[str, str]]
    reference: str = "teacher"
    shares: tuple[str, ...] = ()
    dev: bool = False


def climb(recipe: str, rungs: dict[str, str], scores: dict[str, str]) -> Ladder:
    """Return the ladder whose rows are the teacher and each rung's student."""
    rows = {"teacher": (next(iter(rungs)), "teacher"), **{rung: (rung, "student") for rung in rungs}}
    return Ladder(recipe, rungs, scores, rows)


SEARCH = {"dev": "dev_ndcg10", "test": "test_ndcg10"}
# The epochs are what dev asked for on SciFact: few where both towers learn, many where a query encoder alone learns.
SYMMETRIC = "--symmetric true --num_train_epochs 4"
UNMATCHED = f"{SYMMETRIC} --query_weight 0 --document_weight 0"
RATES = ("3e-4", "1e-3")
# What a student learns; the squared error is a mean over dimensions, so its gradient is small beside that of senses.
SENSES = {
    "senses": "--all_labels false",
    "senses and states": "--all_labels false --state_weight 100",
    "states": "--all_labels false --sense_weight 0 --state_weight 1",
}
# [dev] of each (recipes/results/minilm_rates.json), by the row that it is for: replaced; of states, not replaced. End avg.
RATE = {"senses": "3e-4", "senses and states": "3e-4", "states": "1e-3"}
TRANSLATIONS = {"dev": "dev_avg", "other languages": "tatoeba_other", "trained languages": "tatoeba_trained"}
LADDERS = {
    "ladder": climb(
        "embed_distill",
        {
            "labels": f"{UNMATCHED} --score_weight 0",
            "+ scores": UNMATCHED,
            "+ inherited documents": "--num_train_epochs 20 --query_weight 0",
            "+ query matching": "--num_train_epochs 20",
            "+ made queries": "--num_train_epochs 5 --spans 4",
        },
        SEARCH,
    ),
    "reranker": climb(  # what a cross-encoder teaches: RERANKER in the flags
        "embed_distill",
        {
            "labels": f"{UNMATCHED} --score_weight 0",
            "+ reranker's scores": f"{UNMATCHED} --reranker RERANKER",
            "+ dual pooling": f"{SYMMETRIC} --dual_pooling 256 --reranker RERANKER",
        },
        SEARCH,
    ),
    "parts": climb(
        "lealla",
        {
            "AMS": "--feature_weight 0 --logit_weight 0",
            "AMS + feature": "--logit_weight 0",
            "AMS + logit": "--feature_weight 0",
            "AMS + feature + logit": "",
        },
        TRANSLATIONS,
    ),
    "choices": climb(  # of recipes/configs/lealla_e5.yaml, on what benchmarks/by_corpus.py wrote: no test
        "lealla",
        {
            "as configured": "",
            "AMS alone": "--feature_weight 0 --logit_weight 0",
            "weights 1": "--feature_weight 1 --logit_weight 1",
            "weights 1, not centred": "--feature_weight 1 --logit_weight 1 --center false",
            "6 layers, 98,000 tokens": "--layers 0 1 2 3 4 5 --max_vocabulary 98000",
            "2 layers, table of 160": "--layers 0 1 --embedding_dim 160",
            "table of 256, 58,000 tokens": "--embedding_dim 256 --max_vocabulary 58000",
            "layers 0 3 7 11": "--layers 0 3 7 11",
            "learning rate 1e-3": "--learning_rate 1e-3",
            "learning rate 2e-3": "--learning_rate 2e-3",
        },
        {"dev": "dev_avg", "another corpus": "tatoeba_trained"},
    ),
    "start": climb(  # of the default run, whose 24 layers begin from random weights
        "lealla",
        {
            "mean pooling, weights 10 and 100": "--max_steps 235 --feature_weight 10 --logit_weight 100",
            "mean pooling, weights 1": "--max_steps 235",
            "[CLS] pooling, weights 10 and 100": "--max_steps 235 --feature_weight 10 --logit_weight 100 --pooling cls",
        },
        {"dev": "dev_avg"},
    ),
    "curve": climb(  # over data at equal steps, then over steps at equal data; between them lie parts, beyond them lealla_e5
        "lealla",
        {
            f"{pairs} pairs a language, {steps} steps": f"--max_pairs {pairs} --max_steps {steps}"
            for pairs, steps in ((500, 300), (8000, 300), (8000, 75))
        },
        TRANSLATIONS,
    ),
    "rates": Ladder(  # of the next one's rungs
        "multi_sense",
        {f"{what}, {rate}": f"{own} --learning_rate {rate}" for what, own in SENSES.items() for rate in RATES},
        {"STS-B dev": "sts_STS-B dev", "WiC": "wic", "SST-2": "sst2_few", "TREC": "trec_few", "end avg": "end_avg"},
        {"teacher": (f"senses, {RATES[0]}", "teacher")}
        | {
            f"{what}, {rate}{more}": (f"{what}, {rate}", row)
            for what in SENSES
            for rate in RATES
            for more, row in (("", "student, without senses"), (", replaced", "student"))
        },
        dev=True,
    ),
    "senses": Ladder(
        "multi_sense",
        {what: f"{own} --learning_rate {RATE[what]}" for what, own in SENSES.items()},
        {
            "STS avg": "sts_avg",
            "WiC": "wic",
            "WiC, new": "wic_new",
            "SST-2": "sst2_few",
            "TREC": "trec_few",
            "end avg": "end_avg",
            "state error": "state_error",
        },
        {
            f"{what}{more}": ("senses", f"{what}{more}")
            for what in ("teacher", "untrained student")
            for more in ("", ", replaced")
        }
        | {
            f"student of {what}{more}": (what, row)
            for what in SENSES
            for more, row in (("", "student, without senses"), (", replaced", "student"))
        },
        shares=("STS avg", "SST-2", "TREC", "end avg"),
    ),
}


def main() -> None:
    """Run what is not finished; put the scores beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the data")
    parser.add_argument("ladder", choices=LADDERS)
    parser.add_argument("--reranker")
    parser.add_argument("--rungs", nargs="+", help="only these, beside the first, whose teacher the others are a share of")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("flags", nargs="*", help="of the recipe, behind --")
    options = parser.parse_intermixed_args()
    ladder = LADDERS[options.ladder]
    if ladder.dev and any(flag.partition("=")[0] == "--sts" for flag in options.flags):
        parser.error(f"{options.ladder} is what settings are chosen by, expected --sts_dev in place of --sts, the tests.")
    climbed = list(ladder.rungs) if options.rungs is None else [next(iter(ladder.rungs)), *options.rungs]
    if unknown := set(climbed) - ladder.rungs.keys():
        parser.error(f"--rungs {sorted(unknown)} are none of {options.ladder}, expected some of {list(ladder.rungs)}.")
    folder = ROOT / "outputs" / f"{options.name}_{options.ladder}"
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for number, (rung, more) in enumerate(ladder.rungs.items()):
            if rung not in climbed:
                continue
            output = folder / f"{number}-{seed}"
            own = [options.reranker if word == "RERANKER" else word for word in more.split()]
            own += ["--seed", str(seed), "--output_dir", str(output)]
            own += ["--index_report", "false"] if ladder.recipe == "embed_distill" else []
            own += ["--split", "dev"] if ladder.dev else []
            own += ["--baselines", "false"] if runs else []
            recipe = [str(ROOT / "recipes" / f"{ladder.recipe}.py"), *options.flags, *own]
            if not (output / "results.json").exists():
                subprocess.run([sys.executable, *recipe], check=True)
            results = json.loads((output / "results.json").read_text("utf-8"))
            if results["provenance"]["command"] != command(recipe):
                parser.error(
                    f"{output} is of the command {results['provenance']['command']}, expected {command(recipe)}. Its "
                    "scores would stand beside those of other flags. Delete it, or take another name."
                )
            runs.setdefault(rung, []).append(results)
    rows = {
        heading: cells([results["rows"][row] for results in runs[rung] if row in results["rows"]], ladder.scores)
        for heading, (rung, row) in ladder.rows.items()
        if rung in runs
    }
    measured = rows[ladder.reference].copy()
    last = [heading for heading in ladder.scores if heading in measured][-1]
    for cell in rows.values():
        for heading in ladder.shares or (last,):
            name = f"{heading}, of the {ladder.reference}" if ladder.shares else f"of the {ladder.reference}"
            cell[name] = 100 * cell[heading] / measured[heading]
    made = {rung: [results["provenance"] for results in found] for rung, found in runs.items()}
    results = {"table": rows, "seeds": options.seeds, "runs": made, "provenance": provenance(options.seeds[0])}
    write_results(ROOT / "recipes" / "results", results, f"{options.name}_{options.ladder}")
    print(table(rows))


def cells(found: list[dict[str, Any]], scores: dict[str, str]) -> dict[str, Any]:
    """Return the parameters, and each score that was measured: mean, and the range over the seeds."""
    row: dict[str, Any] = {"params": f"{found[0]['parameters'] / 1e6:.1f}M"}
    for heading, key in scores.items():
        if key in found[0]["scores"]:
            values = [one["scores"][key] for one in found]
            row |= {heading: statistics.mean(values), f"{heading}, range": f"{min(values):.2f}–{max(values):.2f}"}
    return row


if __name__ == "__main__":
    main()
