# SPDX-License-Identifier: Apache-2.0
"""What results.json holds, as Markdown tables."""

from collections.abc import Callable, Mapping
from typing import Any


def table(rows: Mapping[str, Mapping[str, Any]], first: str = "") -> str:
    """Return a Markdown table: a line a row, a column a score; a dash where a row lacks it.

    Args:
        rows: Name of a row -> its cells by column.
        first: Heading of the column of names.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[first, *columns]]
    for name, row in rows.items():
        cells = [row.get(column, "–") for column in columns]
        lines.append([name, *(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


# What stands first in a table, and what is shown of the first k dimensions.
_FIRST = ("sts_avg", "tatoeba_avg", "test_ndcg10")
BY_DIMENSION = ("sts_avg", "fidelity_spearman", "dev_ndcg10", "test_ndcg10", "tatoeba_avg")


def score_table(results: Mapping[str, Any]) -> str:
    """Return the rows of results.json as a table: the scores at full width, with short headings."""
    rows = {}
    for name, row in results.get("rows", {}).items():
        sure = {key: f" ({low:.2f}–{high:.2f})" for key, (low, high) in row.get("intervals", {}).items()}
        ordered = sorted(row["scores"].items(), key=lambda score: score[0] not in _FIRST)  # a wide table is cut on the right
        scores = {key: f"{value:.2f}{sure[key]}" if key in sure else value for key, value in ordered}
        cells = {heading(key): value for key, value in scores.items() if heading(key) and not set(key) & set("@:")}
        rows[name] = {"params": f"{row['parameters'] / 1e6:.1f}M", "dim": row["dim"], **cells}
    return table(rows) if rows else ""


def heading(key: str) -> str | None:
    """Return the heading of a score; None for one that only results.json holds."""
    short = {"fidelity_spearman": "fidelity ρ", "fidelity_neighbours": "same 10-NN", "sts_avg": "STS avg"}
    ranking = {"ndcg10": "nDCG@10", "mrr10": "MRR@10", "recall10": None, "recall100": "recall@100", "map100": None}
    queries, _, measure = key.rpartition("_")
    if measure in ranking:
        return ranking[measure] and f"{queries} {ranking[measure]}"
    return short.get(key, key.removeprefix("sts_").replace("_", " "))


def dimension_table(results: Mapping[str, Any]) -> str:
    """Return the scores of the first k dimensions, for each k that was measured; "" for none."""
    return _form_table(results, str.isdigit)


def precision_table(results: Mapping[str, Any]) -> str:
    """Return the scores with 8 bits a number and with one, where they were measured; "" for none."""
    return _form_table(results, lambda form: not form.isdigit())


def _form_table(results: Mapping[str, Any], wanted: Callable[[str], bool]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for name, row in results.get("rows", {}).items():
        for key, value in row["scores"].items():
            score, _, form = key.partition("@")
            if form and wanted(form) and score in BY_DIMENSION:
                rows.setdefault(name, {})[f"{heading(score)} @{form}"] = value
    return table(rows) if rows else ""


def speed_table(results: Mapping[str, Any]) -> str:
    """Return texts per second of teacher and student, side by side; "" where they were not measured."""
    rows = results.get("speed", {}).get("rows", {})
    short = {"precision": "precision", "texts_per_s": "texts/s", "times_faster": "× as fast", "from": "from", "to": "to"}
    shown = {name: {short[key]: row[key] for key in short if row.get(key)} for name, row in rows.items()}
    return table(shown) if shown else ""


def onnx_table(results: Mapping[str, Any]) -> str:
    """Return what each exported graph weighs, and how close it comes to the student; "" where none was exported."""
    short = {"sts_avg": "STS avg", "fidelity_spearman": "fidelity ρ", "fidelity_neighbours": "same 10-NN"}
    rows = {}
    for file, row in results.get("onnx", {"files": {}})["files"].items():
        cosines = {"smallest cosine": f"{row['cosine_min']:.4f}", "mean cosine": f"{row['cosine_mean']:.4f}"}
        scores = {title: row["scores"][key] for key, title in short.items() if key in row["scores"]}
        rows[f"`{file}`"] = {"MB": f"{row['mb']:.1f}", **cosines, **scores}
    return table(rows) if rows else ""


def language_table(results: Mapping[str, Any]) -> str:
    """Return a line a language: the pairs that were trained on, and every row's accuracy, both directions' mean; or ""."""
    found = accuracy_by_language(results)
    pairs = results.get("data", {}).get("languages", {})
    trained, other = ([code for code in found if (code in pairs) == side] for side in (True, False))
    return table({code: {"pairs": pairs.get(code, 0), **found[code]} for code in trained + other}) if found else ""


def accuracy_by_language(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return language -> row -> accuracy, of the test, or of dev where there is none."""
    keys = [key for key in score_keys(results) if ":" in key and ">" not in key]
    test = next((name for name in ("tatoeba", "test", "dev") if any(key.startswith(f"{name}:") for key in keys)), None)
    codes = sorted(key.partition(":")[2] for key in keys if key.startswith(f"{test}:"))
    return {code: {name: row["scores"][f"{test}:{code}"] for name, row in results["rows"].items()} for code in codes}


def comparison_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of an encoder beside others: size, scores with their intervals, speed."""
    cells = {"parameters M": row["parameters"] / 1e6, "dim": row["dim"]}
    for key, (low, high) in row["intervals"].items():
        cells |= {key: row["scores"][key], f"{key}, 95 %": f"{low:.2f}–{high:.2f}"}
    return cells | {"texts/s": row["speed"]["texts_per_s"], "times as fast": row["speed"]["times_faster"]}


def index_table(results: Mapping[str, Any]) -> str:
    """Return the report of indexes as a table with short headings; "" where there is none."""
    rows = results.get("index", {})
    short = {
        "dim": "dim",
        "mb_per_million": "MB per million",
        "times_smaller": "× smaller",
        "recall": "recall@10",
        "ndcg": "nDCG@10",
        "overlap": "same 10",
        "p50_ms": "p50 ms",
        "p95_ms": "p95 ms",
        "times_faster": "× faster",
        "batch_qps": "queries/s, batch",
        "times_faster_batch": "× faster, batch",
        "build_s": "build s",
    }
    return table({name: {title: row[key] for key, title in short.items()} for name, row in rows.items()}) if rows else ""


def score_keys(results: Mapping[str, Any]) -> set[str]:
    """Return the names of all scores of all rows."""
    return {key for row in results.get("rows", {}).values() for key in row["scores"]}
