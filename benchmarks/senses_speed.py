# SPDX-License-Identifier: Apache-2.0
"""What senses cost in time: `python benchmarks/senses_speed.py --max_texts 4000`.

Making a dictionary beside encoding the same texts plainly, and replacing the states of a batch beside the forward pass that
makes them, in turn, on one machine; the ratios of single rounds. Takes the recipe's flags. Writes
recipes/results/senses_speed.json.
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
    defaults = {**demo_defaults("senses_speed"), "max_texts": 4000, "teacher_batch_size": 32}
    recipe, args = parse_arguments(MultiSenseArguments, DistillationTrainingArguments, **defaults)
    fill_in(recipe)
    texts = list(training_texts(recipe, args, []).all())
    teacher = TokenTeacher(recipe.teacher[0], max_length=recipe.teacher_max_length)
    teacher.encode(texts[:200])  # warm
    plain, build, forward, replace, made = [], [], [], [], []
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
        replace.append(seconds(lambda found=found: [dictionary.lookup(*batch, recipe.select) for batch in found]))
    rows = {
        "building / encoding, speed": ratios(plain, build),
        "replacing / forward pass, time": ratios(replace, forward),
    }
    facts = {"texts": len(texts), "senses": len(dictionary.senses), "k": recipe.k, "select": recipe.select}
    write_results(RECIPES / "results", {"table": rows, **facts, "provenance": provenance(args.seed)}, "senses_speed")
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
