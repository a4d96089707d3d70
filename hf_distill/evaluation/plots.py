# SPDX-License-Identifier: Apache-2.0
"""What results.json holds, as plots."""

import importlib
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from .tables import BY_DIMENSION, accuracy_by_language, heading, score_keys


_MARKERS = "os^vDP*X"
_PANEL = 40  # languages side by side, readable on a page


def draw_plots(folder: str | Path, results: Mapping[str, Any]) -> list[str]:
    """Draw training.png (loss over steps), dimensions.png (quality over dimensions), index.png; return their names."""
    plt = pyplot()
    folder, drawn = Path(folder), []
    steps = [line for line in results["log_history"] if "loss" in line]
    if len(steps) > 1:
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for part in sorted({key for line in steps for key in line if key.startswith("loss_")}):
            values = [line[part] for line in steps]
            if max(values) > 1e-6:  # what is zero by its definition, but for rounding, would set the scale
                axes.plot([line["step"] for line in steps], values, label=part.removeprefix("loss_"))
        axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss")
        axes.legend(title="part")
        axes.grid(alpha=0.3)
        figure.savefig(folder / "training.png", dpi=120)
        drawn.append("training.png")
    cut = {key.partition("@")[0] for key in score_keys(results) if key.partition("@")[2].isdigit()}
    kinds = [kind for kind in BY_DIMENSION if kind in cut]
    if kinds:
        figure, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 3.5), layout="constrained", squeeze=False)
        for axes, kind in zip(panels[0], kinds, strict=True):
            for name, row in results["rows"].items():
                parts = ((*key.partition("@")[::2], value) for key, value in row["scores"].items())
                points = [(int(dim), value) for score, dim, value in parts if score == kind and dim.isdigit()]
                if points:
                    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
                elif kind in row["scores"]:
                    axes.axhline(row["scores"][kind], color="black", linestyle=":", label=f"{name} ({row['dim']}-d)")
            axes.set(xlabel="first dimensions used", ylabel=f"{heading(kind)} × 100", title=heading(kind))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(folder / "dimensions.png", dpi=120)
        drawn.append("dimensions.png")
    plt.close("all")
    if "index" in results:
        draw_index(folder / "index.png", results["index"])
        drawn.append("index.png")
    languages = accuracy_by_language(results)
    if languages:
        draw_languages(folder / "languages.png", languages, results["data"].get("languages", {}))
        drawn.append("languages.png")
    return drawn


def draw_languages(path: Path, languages: Mapping[str, Mapping[str, float]], trained: Container[str]) -> None:
    """Draw a group of bars a language, those that the first row does best first; the trained ones in panels of their own."""
    plt = pyplot()
    names = list(next(iter(languages.values())))
    order = sorted(languages, key=lambda code: -languages[code][names[0]])
    panels: list[tuple[str, list[str]]] = []
    for title in ("trained languages", "other languages"):
        codes = [code for code in order if (code in trained) == (title == "trained languages")]
        if codes:
            each = math.ceil(len(codes) / math.ceil(len(codes) / _PANEL))
            panels += [(title, codes[i : i + each]) for i in range(0, len(codes), each)]
    widest = max(len(codes) for _, codes in panels)
    size = (max(6, 0.25 * widest + 2), 1 + 2.2 * len(panels))
    figure, rows = plt.subplots(len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (title, codes) in zip(rows[:, 0], panels, strict=True):
        for place, name in enumerate(names):
            shifted = [i + (place - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(codes))]
            axes.bar(shifted, [languages[code][name] for code in codes], width=0.8 / len(names), label=name)
        axes.set_xticks(range(len(codes)), codes, rotation=90 if widest > 12 else 0)
        axes.set(ylabel="accuracy × 100", title=title, ylim=(0, 100), xlim=(-0.7, widest - 0.3))
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("Translations found, mean of both directions")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_index(path: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Draw quality over memory and over the latency of one query, a colour a space, a marker a kind of index."""
    plt = pyplot()
    from matplotlib import lines

    spaces, kinds = (list(dict.fromkeys(name.split(", ", 1)[side] for name in rows)) for side in (0, 1))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, key, label in zip(panels, ("mb_per_million", "p50_ms"), ("MB per million vectors", "ms a query"), strict=True):
        for name, row in rows.items():
            space, kind = name.split(", ", 1)
            style = {"color": f"C{spaces.index(space)}", "marker": _MARKERS[kinds.index(kind) % len(_MARKERS)]}
            axes.plot(row[key], row["recall"], linestyle="", markersize=8, alpha=0.8, **style)
        axes.set(xlabel=label)
        _scale(axes)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="recall@10 × 100")
    shown = [lines.Line2D([], [], color=f"C{i}", linewidth=4, label=space) for i, space in enumerate(spaces)]
    shown += [
        lines.Line2D([], [], color="black", linestyle="", marker=_MARKERS[i % len(_MARKERS)], label=kind)
        for i, kind in enumerate(kinds)
    ]
    figure.legend(handles=shown, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _scale(axes: Any) -> None:
    """Let the horizontal axis be logarithmic, with plain numbers."""
    from matplotlib import ticker

    axes.set(xscale="log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def draw_comparison(path: Path, rows: Mapping[str, Mapping[str, Any]], score: str) -> None:
    """Draw a score over "parameters M" and over "times as fast", a point an encoder."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, what in zip(panels, ("parameters M", "times as fast"), strict=True):
        for name, row in rows.items():
            axes.plot(row[what], row[score], "o")
            axes.annotate(name, (row[what], row[score]), textcoords="offset points", xytext=(6, 4), fontsize="small")
        values = [row[what] for row in rows.values()]
        if max(values) > 5 * min(values):
            _scale(axes)
        axes.margins(x=0.25)  # room for the names
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"{heading(score)} × 100", xlabel="parameters (millions)")
    panels[1].set(xlabel=f"encode speed, times that of {next(iter(rows))}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib. Install it with: pip install 'hf_distill[eval]'") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")
