# SPDX-License-Identifier: Apache-2.0
"""Quality over size and speed of several students: `python benchmarks/shapes.py TEACHER outputs/a outputs/b ...`.

Each folder is the output of a run. All encode the same texts in turn, several rounds, in this one process, and what counts is
the ratio to the teacher in the same round: machines are noisy. Writes recipes/results/NAME.json and NAME.png.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from compare import origin

from hf_distill import EncoderTeacher
from hf_distill.evaluation.plots import draw_comparison
from hf_distill.evaluation.report import provenance, write_results
from hf_distill.evaluation.tables import table
from hf_distill.evaluation.uncertainty import timings


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
    speeds = timings(
        {name: partial(encoder.encode, batch_size=32) for name, encoder in encoders.items()}, texts, options.rounds
    )
    rows = {}
    for name, encoder in encoders.items():
        row = teacher_row if name == "teacher" else results[name]["rows"]["student"]
        start = {} if name == "teacher" else {"STS avg before": results[name]["rows"]["untrained student"]["scores"]["sts_avg"]}
        rows[name] = {
            "parameters M": encoder.num_parameters / 1e6,
            "dim": encoder.dim,
            **start,
            "STS avg": row["scores"]["sts_avg"],
            "fidelity": row["scores"]["fidelity_spearman"],
            "texts/s": speeds[name]["texts_per_s"],
            "times as fast": speeds[name]["times_faster"],
            "from": speeds[name]["from"],
            "to": speeds[name]["to"],
        }
    runs = {name: origin(run) for name, run in results.items()}
    write_results(RECIPES / "results", {"table": rows, "runs": runs, "provenance": provenance(None)}, options.name)
    draw_comparison(RECIPES / "results" / f"{options.name}.png", rows, "STS avg")
    print(table(rows))


if __name__ == "__main__":
    main()
