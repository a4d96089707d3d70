# SPDX-License-Identifier: Apache-2.0
"""What cutting a vocabulary changes: `python benchmarks/pruning.py BACKBONE 45000 130000 -- --pairs $DATA/parallel ...`.

Counts on the pairs that the flags of recipes/lealla.py name, and compares the cut tokenizer with the whole one on sentences of
the test (`--tatoeba`), which were not counted. Writes recipes/results/pruning.json.
"""

import argparse
import copy
import logging
import sys
from pathlib import Path

import torch

from hf_distill import StudentModel
from hf_distill.arguments import DistillationTrainingArguments, parse_arguments
from hf_distill.evaluation.report import provenance, write_results
from hf_distill.evaluation.tables import table
from hf_distill.vocabulary import prune_vocabulary


RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    """Cut to each size; compare tokens, and the vectors of some texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--encoded", type=int, default=500, help="texts that are encoded, too")
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    sys.path.insert(0, str(RECIPES))
    from lealla import LEALLAArguments
    from translations import open_translations

    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)
    data = open_translations(parse_arguments(LEALLAArguments, DistillationTrainingArguments, argv=flags)[0])
    trained, test = data.facts["languages"], data.evaluators[-1]
    texts = list(dict.fromkeys(text for code in sorted(trained) for side in test.pairs.get(code, ()) for text in side))
    whole = StudentModel.from_backbone(options.backbone, layers=[0], pooling="mean")
    tokens = [whole.tokenizer.convert_ids_to_tokens(ids) for ids in whole.tokenizer(texts)["input_ids"]]
    rows, coverage = {}, {}
    for size in options.sizes:
        student = copy.deepcopy(whole)
        report = prune_vocabulary(student, data.corpus, size, data.languages)
        kept = student.tokenizer.get_vocab().keys()
        survive = [i for i, found in enumerate(tokens) if kept >= set(found)]
        after = student.tokenizer([texts[i] for i in survive])["input_ids"]
        otherwise = sum(
            student.tokenizer.convert_ids_to_tokens(ids) != tokens[i] for i, ids in zip(survive, after, strict=True)
        )
        some = [texts[i] for i in survive[:: max(len(survive) // options.encoded, 1)]]
        change = (torch.as_tensor(student.encode(some)) - torch.as_tensor(whole.encode(some))).abs().max().item()
        worst = min(report.languages, key=report.languages.__getitem__)
        coverage[f"{report.kept} tokens"] = report.languages
        rows[f"{report.kept} tokens"] = {
            "weights saved": f"{report.parameters / 1e6:.1f}M",
            "single characters": sum(len(token) == 1 for token in kept),  # special tokens stay beside them
            "coverage": 100 * sum(report.languages.values()) / len(report.languages),
            "least": f"{worst} {100 * report.languages[worst]:.2f}",
            "sentences": len(texts),
            "all tokens kept": len(survive),
            "of these cut otherwise": otherwise,
            "largest change of a vector": f"{change:.1e}",
        }
    write_results(
        RECIPES / "results", {"table": rows, "languages": trained, "coverage": coverage, "provenance": provenance(0)}, "pruning"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
