# SPDX-License-Identifier: Apache-2.0
"""Make the tables and cards of the committed results again: `make cards`; a difference afterwards is an error."""

import json
import re
from pathlib import Path

from hf_distill.card import run_card
from hf_distill.evaluation.tables import dimension_table, index_table, language_table, score_table, table


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What the README shows of the default runs: between these two lines, made by `make cards`.
SHOWN = re.compile(r"(<!-- results of (\w+): made by `make cards` -->\n).*?(\n<!-- end of results -->)", re.DOTALL)


def section(name: str, results: dict, indexes: bool = True) -> str:
    """Return the tables of one run, and how it was made; the long one of kinds of index if it is wanted."""
    provenance, data = results["provenance"], results["data"]
    minutes = ", ".join(f"{what} {seconds / 60:.0f} min" for what, seconds in results["timings_s"].items())
    text = f"Text: {data['rows']} of {data['name']}."
    if "languages" in data:
        text = f"{data['rows']} pairs of {len(data['languages'])} languages: {data['name']}."
    if "documents" in data:
        text = f"{data['queries']} queries to train on, {data['documents']} documents: {data['name']}."
    parts = [score_table(results), dimension_table(results), language_table(results)]
    parts.append(index_table(results) if indexes else "")
    return "\n\n".join(
        [
            *filter(None, parts),
            f"`{provenance['command']}`, seed {provenance['seed']}, commit {provenance['commit']}; {minutes} on "
            f"{provenance['hardware']}. {text} "
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
        plots = [path.name for path in sorted(HERE.glob(f"{name}.*.png"))]
        text += f"\n## {name}\n\n{section(name, results)}\n".replace("(recipes/results/", "(").replace(
            "(model_cards/", "(../../model_cards/"
        )
        text += "".join(f"\n![{plot.split('.')[-2]} of {name}]({plot})\n" for plot in plots)
        card = run_card(results, name, [f"../recipes/results/{plot}" for plot in plots], "projection" in results)
        (ROOT / "model_cards" / f"{name}.md").write_text(card + "\n", encoding="utf-8")
    (HERE / "README.md").write_text(text, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = SHOWN.sub(lambda part: f"{part[1]}\n{section(part[2], runs[part[2]], indexes=False)}\n{part[3]}", readme)
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
