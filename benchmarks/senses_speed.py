# SPDX-License-Identifier: Apache-2.0
"""What senses cost in time: `python benchmarks/senses_speed.py`.

Making a dictionary beside encoding the same texts plainly, and replacing the states of a batch beside the forward pass that
makes them by each selection, in turn, on one machine; the ratios of single rounds. Takes the recipe's flags. Writes
recipes/results/senses_speed_<teacher>.json.
"""

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_distill.arguments import DistillationTrainingArguments, parse_arguments
from hf_distill.evaluation.report import provenance, write_results
from hf_distill.evaluation.tables import table
from hf_distill.sense_builder import build_senses
from hf_distill.senses import SELECTIONS
from hf_distill.token_teacher import TokenTeacher


RECIPES = Path(__file__).parents[1] / "recipes"
ROUNDS = 3
sys.path.insert(0, str(RECIPES))

from demo import demo_defaults, fill_in  # noqa: E402
from inputs import training_texts  # noqa: E402
from multi_sense import MultiSenseArguments  # noqa: E402


def main() -> None:
    """Time both, in turn."""
    logging.basicConfig(format="%(message)s")
    defaults = {**demo_defaults("senses_speed"), "max_texts": 30_000, "teacher_batch_size": 32}
    recipe, args = parse_arguments(MultiSenseArguments, DistillationTrainingArguments, **defaults)
    fill_in(recipe)
    texts = list(training_texts(recipe, args, []).all())
    options = {"layer": -1 if recipe.teacher_layer is None else recipe.teacher_layer, "bidirectional": recipe.bidirectional}
    max_length = recipe.teacher_max_length or recipe.max_length
    teacher = TokenTeacher(recipe.teacher[0], recipe.teacher_revision, max_length=max_length, **options)
    teacher.name = recipe.teacher_name or teacher.name
    teacher.encode(texts[:200])  # warm
    plain, build, forward, made = [], [], [], []
    replace: dict[str, list[float]] = {select: [] for select in SELECTIONS}
    settings = (recipe.k, recipe.cap, recipe.split_seed, recipe.teacher_batch_size)
    for _ in range(ROUNDS):
        plain.append(seconds(lambda: teacher.encode(texts, batch_size=recipe.teacher_batch_size)))
        with tempfile.TemporaryDirectory() as folder:
            build.append(seconds(lambda folder=folder: made.append(build_senses(teacher, texts, folder, *settings))))
    dictionary, ordered = made[-1], sorted(texts, key=len)
    batches = [ordered[start : start + 32] for start in range(0, len(ordered), 32)]
    for _ in range(ROUNDS):
        found = []
        forward.append(seconds(lambda found=found: found.extend(teacher.read(batch) for batch in batches)))
        for select, times in replace.items():
            times.append(seconds(lambda found=found, by=select: [dictionary.lookup(*batch, by) for batch in found]))
    rows = {"building / encoding, speed": ratios(plain, build)}
    rows |= {f"replacing by {select} / forward pass, time": ratios(times, forward) for select, times in replace.items()}
    facts = {"teacher": teacher.name, "dtype": str(teacher.dtype), "texts": len(texts), "senses": len(dictionary.senses)}
    results = {"table": rows, **facts, "k": recipe.k, "provenance": provenance(args.seed)}
    write_results(RECIPES / "results", results, f"senses_speed_{Path(teacher.name).name.lower()}")
    print(table(rows))


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes, with all that it left to a GPU."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratios(first: list[float], second: list[float]) -> dict[str, float]:
    """Return the ratio of each round: the median, the least and the greatest, and the seconds of both."""
    found = [a / b for a, b in zip(first, second, strict=True)]
    row = {"median": statistics.median(found), "from": min(found), "to": max(found)}
    return row | {"s of the first": statistics.median(first), "s of the second": statistics.median(second)}


if __name__ == "__main__":
    main()
