# SPDX-License-Identifier: Apache-2.0
"""The choices HPD leaves open, measured side by side on held-out text: `python benchmarks/hpd_choices.py`.

One short run of the recipe each, on the same sample of the embedded default's text; the score is fidelity to the teacher on
held-out texts, which needs no labels and is no test set. Writes recipes/results/hpd_choices.json.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from hf_distill.evaluation.report import provenance, write_results
from hf_distill.evaluation.tables import table


RECIPES = Path(__file__).parents[1] / "recipes"
CHOICES = {
    "default (pca start, identity, not centred, normalised loss)": [],
    "the same, another seed": ["--seed", "43"],
    "random start": ["--start", "random"],
    "tanh": ["--activation", "tanh"],
    "centred": ["--center", "true"],
    "loss on plain outputs": ["--normalize_loss", "false"],
    "dropout 0.1": ["--dropout", "0.1"],
}


def main() -> None:
    """Run the recipe once a choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=16_000)
    parser.add_argument("--cache_dir", default="outputs/teacher-cache")
    options = parser.parse_args()
    sys.path.insert(0, str(RECIPES))
    import hpd

    # The texts are drawn by the seed: with another one the sample is another one too, so it also shows that spread.
    common = ["--max_texts", str(options.texts), "--num_train_epochs", "1", "--save_strategy", "no", "--dims", "32", "128"]
    rows = {}
    for name, flags in CHOICES.items():
        with tempfile.TemporaryDirectory() as folder:
            hpd.main([*common, "--disable_tqdm", "true", "--cache_dir", options.cache_dir, "--output_dir", folder, *flags])
            results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        rows[name] = {"untrained": results["rows"]["untrained student"]["scores"]["fidelity_spearman"]}
        rows[name] |= results["rows"]["student"]["scores"] | {"training s": results["timings_s"]["training"]}
    write_results(RECIPES / "results", {"choices": rows, "texts": options.texts, "provenance": provenance(42)}, "hpd_choices")
    print(table(rows, f"{options.texts} texts, 1 epoch"))


if __name__ == "__main__":
    main()
