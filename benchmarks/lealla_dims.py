# SPDX-License-Identifier: Apache-2.0
"""How small a frozen teacher's vectors may be: `python benchmarks/lealla_dims.py --pairs $DATA/parallel --tatoeba FILE ...`.

LEALLA, Mao and Nakagawa 2023, https://huggingface.co/papers/2302.08387, section 3: the teacher stays as it is, and one Linear
to k dimensions is trained with the additive-margin softmax, on vectors from the cache. Beside it the k main directions of the
same vectors (PCA), which learn nothing from the pairs: what these lose is lost to the number of dimensions alone. Takes the
recipe's flags, and --dims. Writes recipes/results/lealla_dims.json.
"""

import logging
import sys
from pathlib import Path

import torch
from torch import nn

from hf_distill.arguments import DistillationTrainingArguments, parse_arguments
from hf_distill.evaluation.report import provenance, write_results
from hf_distill.evaluation.tables import table
from hf_distill.losses import AdditiveMarginSoftmax


RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

from demo import demo_defaults, fill_in  # noqa: E402
from inputs import open_teacher  # noqa: E402
from lealla import LEALLAArguments  # noqa: E402
from translations import open_target, open_translations  # noqa: E402


def main() -> None:
    """Train a Linear for each width; score the teacher and all of them."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)
    defaults = {**demo_defaults("lealla_dims"), "dims": [384, 256, 192, 128, 64, 32], "per_device_train_batch_size": 512}
    recipe, args = parse_arguments(LEALLAArguments, DistillationTrainingArguments, max_steps=5000, **defaults)
    fill_in(recipe)
    dims, recipe.dims = recipe.dims, []
    data = open_translations(recipe)
    teacher = open_teacher(recipe, recipe.teacher_prompt)
    target = open_target(recipe, teacher, data.train)
    teacher.add(data.train["translation"], [text for evaluator in data.evaluators for text in evaluator.texts()])
    pairs = torch.stack([target.encode(list(data.train[side])) for side in ("english", "translation")], dim=1)
    texts = torch.tensor([[hash(row["english"]), hash(row["translation"])] for row in data.train])

    rows = {"teacher": scores(data, teacher.encode)}
    if recipe.center:
        rows["teacher, centred"] = scores(data, target.encode)
    main_directions = torch.linalg.eigh(torch.cov(pairs.flatten(0, 1).T))[1].flip(1)
    loss = AdditiveMarginSoftmax(recipe.margin, recipe.scale)
    for dim in [dim for dim in dims if dim <= teacher.dim]:
        main = main_directions[:, :dim]
        rows[f"{dim}, PCA"] = scores(data, lambda found, main=main: (target.encode(found) @ main).numpy())
        torch.manual_seed(args.seed)
        head = nn.Linear(teacher.dim, dim)
        optimizer = torch.optim.AdamW(head.parameters(), args.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.max_steps)
        for _ in range(args.max_steps):
            batch = torch.randint(len(pairs), (args.per_device_train_batch_size,))
            optimizer.zero_grad()
            loss(head(pairs[batch]), texts[batch])["ams"].backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            rows[f"{dim}, trained"] = scores(data, lambda found, head=head: head(target.encode(found)).numpy())
    facts = {"languages": data.facts["languages"], "steps": args.max_steps, "batch": args.per_device_train_batch_size}
    facts |= {"learning_rate": args.learning_rate, "margin": recipe.margin, "scale": recipe.scale}
    results = {"table": rows, **facts, "provenance": provenance(args.seed)}
    write_results(RECIPES / "results", results, "lealla_dims")
    print(table(rows))


def scores(data: object, encode: object) -> dict[str, float]:
    """Return the averages of every evaluator."""
    found = {key: value for evaluator in data.evaluators for key, value in evaluator(encode).items() if ":" not in key}
    return {key.replace("_", " "): value for key, value in found.items()}


if __name__ == "__main__":
    main()
