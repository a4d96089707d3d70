# SPDX-License-Identifier: Apache-2.0
"""How many senses, chosen how, of which layer: `python benchmarks/senses.py --sts_dev $DATA/sts --wic $DATA/wic ...`.

Makes a dictionary for each layer and k, and scores the teacher with its states replaced, by each selection, beside the teacher
itself, on dev: with senses of [CLS] and [SEP], and with the states of these kept. Nothing is trained. Takes the recipe's flags;
`--layers` and `--numbers` are the layers and the k to try. Every test is read once a layer, for all of its rows. Writes
recipes/results/senses_<teacher>.json, again after each layer; the same command goes on from there. With `--words` and no test
of sentences only words are compared, and it is words_<teacher>.json.

The rule, fixed before the first run: the tasks are STS-B, WiC, SST-2 and TREC, dev of each (of TREC a tenth of its training
texts), and count alike, classification with 8 texts a label. Of the last layer's dictionaries (its states are what the teacher
is known for; other layers are for comparison) whose mean is within 0.2 of the best one's, those of the smallest k stay; the
best of these is taken. With it the recipe runs on the tests (`benchmarks/ladder.py NAME senses`), seeds 1, 2 and 3: there the
seven STS sets, WiC, SST-2 and TREC count alike.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_distill.arguments import DistillationTrainingArguments, parse_arguments
from hf_distill.cache import cache_folder
from hf_distill.evaluation.report import RunReport, provenance, write_results
from hf_distill.evaluation.tables import table
from hf_distill.evaluation.word_sense import TokenStates, sense_vectors, statistics, word_similarity
from hf_distill.losses import SenseLoss
from hf_distill.sense_builder import build_senses
from hf_distill.senses import SELECTIONS, SenseDictionary
from hf_distill.token_teacher import TokenTeacher


RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

from demo import demo_defaults, fill_in  # noqa: E402
from inputs import training_texts  # noqa: E402
from multi_sense import MultiSenseArguments  # noqa: E402
from words import EndTasks  # noqa: E402


@dataclass
class Sweep(MultiSenseArguments):
    """What is compared, beside the recipe's flags."""

    numbers: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50], metadata={"help": "Senses a token, to compare."})
    name: str | None = field(default=None, metadata={"help": "Of the file of results, if not as above."})


def main() -> None:
    """Score every combination of a layer from one reading of the tests."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)
    defaults = {**demo_defaults("senses_sweep"), "split": "dev", "all_labels": False, "dims": []}
    recipe, args = parse_arguments(Sweep, DistillationTrainingArguments, **defaults)
    if recipe.sts or recipe.split != "dev":
        raise SystemExit(f"--sts is {recipe.sts}, --split {recipe.split}, expected --sts_dev and dev: tests are not chosen on.")
    if recipe.teacher_layer or (recipe.k, recipe.select) != (Sweep.k, Sweep.select):
        raise SystemExit("--teacher_layer, --k and --select are compared here, expected --layers and --numbers in their place.")
    layers = recipe.layers or [-1]
    fill_in(recipe)
    report = RunReport("multi_sense", SenseLoss.paper)
    tasks = EndTasks(recipe, report)
    texts = training_texts(recipe, args, tasks.seen)
    rows: dict[str, dict[str, Any]] = {}
    name = recipe.teacher_name or Path(recipe.teacher[0]).name
    called = recipe.name or f"{'senses' if tasks.ends else 'words'}_{Path(name).name.lower()}"
    file = RECIPES / "results" / f"{called}.json"
    run = provenance(recipe.split_seed)
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if known.get("provenance", {}).get("command") == run["command"]:  # stopped before
        rows |= known["table"]
    facts = {"teacher": name, "split": recipe.split, "texts": texts.facts(recipe.texts_name)}

    for layer in layers:
        if f"layer {layer}" in {row.partition(",")[0] for row in rows}:
            continue
        options = {"layer": layer, "max_length": recipe.teacher_max_length or recipe.max_length}
        teacher = TokenTeacher(recipe.teacher[0], recipe.teacher_revision, bidirectional=recipe.bidirectional, **options)
        teacher.name = name  # as the recipe calls it, so that both read the texts once
        made = dictionaries(recipe, teacher, texts)
        if tasks.ends:
            tasks.add([f"layer {layer}", *made], all_states(teacher, made), teacher, teacher.num_parameters)
            for row in (f"layer {layer}", *made):
                rows[row] = cells(report.rows[row]["scores"]) | (made[row][2] if row in made else {})
        else:
            rows |= {f"layer {layer}, k {more['k']}": more for _, _, more in made.values()}
        write_results(file.parent, {"table": rows, "chosen": choose(rows), **facts, "provenance": run}, file.stem)
    print(table(rows), f"\n\nChosen: {choose(rows)}")


def dictionaries(recipe: Any, teacher: TokenTeacher, texts: Any) -> dict[str, tuple[SenseDictionary, str, dict[str, Any]]]:
    """Return row -> (dictionary, selection, what else the table shows of it), for every combination of a layer."""
    states = cache_folder(recipe.cache_dir, teacher)
    states = states.with_name(f"{states.name}-states")
    made: dict[str, tuple[SenseDictionary, str, dict[str, Any]]] = {}
    for k in recipe.numbers:
        whole = build_senses(teacher, texts.all(), states, k, recipe.cap, recipe.split_seed, recipe.teacher_batch_size)
        more = {"k": k, "MB": statistics(whole, texts.held_out)["mb"]}
        if recipe.words:
            more["words"] = word_similarity(sense_vectors(whole), recipe.words)["words_avg"]
        for dictionary, apart in ((whole, ""), (whole.without_special_tokens(), ", special tokens kept")):
            for select in SELECTIONS if k > 1 else SELECTIONS[:1]:
                made[f"layer {teacher.layer}, k {k}, {select}{apart}"] = (dictionary, select, more)
    return made


def all_states(teacher: TokenTeacher, made: dict[str, tuple[SenseDictionary, str, dict[str, Any]]]) -> TokenStates:
    """Return texts -> (the teacher's states [N, T, D], these replaced by each dictionary, mask [N, T])."""

    def read(batch: list[str]) -> tuple[torch.Tensor, ...]:
        states, ids, mask = teacher.read(batch)
        return states, *(dictionary.lookup(states, ids, mask, select)[0] for dictionary, select, _ in made.values()), mask

    return read


def choose(rows: dict[str, dict[str, Any]]) -> str | None:
    """Return the dictionary that the rule above takes; None before the first."""
    made = {name: row for name, row in rows.items() if name.startswith("layer -1, ") and "end avg" in row}
    near = [name for name, row in made.items() if row["end avg"] >= max(other["end avg"] for other in made.values()) - 0.2]
    return min(near, key=lambda name: (made[name]["k"], -made[name]["end avg"]), default=None)


def cells(scores: dict[str, float]) -> dict[str, float]:
    """Return what the table shows."""
    return {
        key.removeprefix("sts_").replace("_", " "): value
        for key, value in scores.items()
        if not key.endswith("_std") and "@" not in key
    }


if __name__ == "__main__":
    main()
