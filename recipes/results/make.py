# SPDX-License-Identifier: Apache-2.0
"""Make the tables and cards of the committed results again: `make cards`; a difference afterwards is an error."""

import json
from pathlib import Path

from hf_distill.card import run_card
from hf_distill.evaluation.report import dimension_table, score_table, table


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BEGIN, END = "<!-- results: made by `make cards` from recipes/results/*.json -->", "<!-- end of results -->"
README = "hpd"  # whose table the README shows: the default run


def section(name: str, results: dict) -> str:
    """Return the tables of one run, and how it was made."""
    provenance = results["provenance"]
    minutes = ", ".join(f"{what} {seconds / 60:.0f} min" for what, seconds in results["timings_s"].items())
    return "\n\n".join(
        [
            score_table(results),
            dimension_table(results),
            f"`{provenance['command']}`, seed {provenance['seed']}, commit {provenance['commit']}; {minutes} on "
            f"{provenance['hardware']}. Text: {results['data']['rows']} of {results['data']['name']}. "
            f"[JSON](recipes/results/{name}.json), [card](model_cards/{name}.md).",
        ]
    )


def choices(results: dict) -> str:
    """Return the table of benchmarks/hpd_choices.py."""
    short = {"untrained": "untrained", "fidelity_spearman": "fidelity ρ", "fidelity_neighbours": "same 10-NN"}
    short |= {"fidelity_spearman@32": "fidelity ρ @32"}
    rows = {name: {short[key]: row[key] for key in short} for name, row in results["choices"].items()}
    return table(rows, f"{results['texts']} texts, one epoch")


def main() -> None:
    """Write recipes/results/README.md, the table in the README, and model_cards/."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))}
    text = (HERE / "about.md").read_text(encoding="utf-8").replace("{hpd_choices}", choices(runs["hpd_choices"]))
    for name, results in runs.items():
        if "table" in results:
            text = text.replace(f"{{{name}}}", table(results["table"]))
    runs = {name: results for name, results in runs.items() if "rows" in results}
    for name, results in runs.items():
        text += f"\n## {name}\n\n{section(name, results)}\n".replace("(recipes/results/", "(").replace(
            "(model_cards/", "(../../model_cards/"
        )
        card = run_card(results, name, has_projection=True)
        (ROOT / "model_cards" / f"{name}.md").write_text(card + "\n", encoding="utf-8")
    (HERE / "README.md").write_text(text, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    shown = f"\n{section(README, runs[README])}\n" if README in runs else ""
    (ROOT / "README.md").write_text(f"{before}{BEGIN}\n{shown}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
