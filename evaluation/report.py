"""The report of an evaluation: tables, as Markdown and as JSON can hold them, and pictures."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dataset import Slices
from utils import printable, save_figure, tile, write_atomically

Rows = list[dict[str, Any]]  # of a table
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # of ratios


# Tables


def cell(value: Any) -> str:
    """A value of a table as text; an interval is a list."""
    if isinstance(value, list):
        return " to ".join(dict.fromkeys(map(cell, value)))
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not measured"
    return printable(value)


def plain(value: Any) -> Any:
    """Nested values as JSON can hold them: null where a number is not finite."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_table(rows: Rows) -> str:
    """Rows as a Markdown table, without what is only drawn: histograms and pairs."""
    columns = dict.fromkeys(k for r in rows for k, v in r.items() if not isinstance(v, dict))
    lines = [[c.replace("_", " ") for c in columns], ["---"] * len(columns)]
    lines += [[cell(row.get(c, "")) for c in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    text = "# Evaluation\n"
    for title, rows in report.items():
        if title == "what":
            rows = [{"of": k, "value": v} for k, v in rows.items()]
        text += f"\n## {title.capitalize().replace('_', ' ')}\n\n{as_table(rows)}"
    return text + (
        "\n'Not measured': too few slices or ids for that figure, or all of them alike. "
        "FD to unseen ids: samples that generalise have less than a perfect memory, which repeats "
        "the training slices; a perfect generator is known of the demo brains only. The audit "
        "looks for training slices that are turned, moved, mirrored, lit otherwise or blurred as "
        "in its planted copies; it finds no parts of slices, and is no guarantee of privacy. "
        "Figures of different extractors must not be compared.\n"
    )


def write_text(text: str, path: Path) -> None:
    write_atomically(path, lambda partial: partial.write_text(text))


# Figures


def draw_ratios(ax: Axes, rows: Rows) -> None:
    """FD of samples to unseen ids over that of others, with intervals."""
    points = [
        (f"{row['extractor']}, {name}", row[f"over_{name}"], row[f"over_{name}_interval"])
        for row in rows
        for name in ("memory", "perfect")
        if math.isfinite(row.get(f"over_{name}", math.nan))
    ]
    for place, (_, value, limits) in enumerate(points):
        reach = [[value - limits[0]], [limits[1] - value]]
        ax.errorbar(value, place, xerr=np.abs(reach), fmt="o", color="C0", capsize=4)
        ax.text(value, place - 0.08, f"{value:.3g}", ha="center", va="bottom")
    ax.axvline(1, color="k", ls="--", lw=1)
    ax.set(xscale="log", yticks=range(len(points)), yticklabels=[name for name, *_ in points])
    ax.set(ylim=(len(points) - 0.5, -0.5), title="Samples over a perfect memory or generator")
    ax.set_xlabel("ratio of FDs to unseen ids")
    ends = [1.0, *(end for *_, limits in points for end in limits)]
    ticks = [t for t in TICKS if min(ends) / 2 < t < max(ends) * 2]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()


def draw_histograms(
    ax: Axes, found: dict[str, list[float]], title: str, label: str, threshold: float | None = None
) -> None:
    """The densities of a `histogram` as steps, the real set in blue."""
    ax.set(title=title, xlabel=label, yticks=[], ylabel="density")
    for name in sorted(found.keys() - {"edges"}):
        color = "C1" if name == "fake" else "C0"
        ax.stairs(found[name], found["edges"], fill=True, alpha=0.45, color=color, label=name)
    ax.set_ylim(0, 1.35 * max(max(found[name]) for name in found.keys() - {"edges"}))  # legend
    if threshold is not None:
        ax.axvline(threshold, color="k", ls="--", lw=1, label="1st percentile of test")
    ax.legend(fontsize=8, loc="upper right")


def draw_labels(ax: Axes, rows: Rows) -> None:
    """AUC by id, that of synthetic tests by slice, with the spread over seeds."""
    bars = {r["figure"]: r for r in rows if (r["unit"] == "ids") != (r["figure"] == "TRTS")}
    bars = [bars[k] for k in ("TRTR", "TSTR", "TRTS", "TR+STR")]
    names = [f"{r['figure']}\nby {r['unit'][:-1]}" for r in bars]
    heights, errors = [r["auc"] for r in bars], [r["std_of_seeds"] for r in bars]
    ax.bar(names, heights, yerr=errors, capsize=4, color=["C0", "C1", "C1", "C2"])
    ax.axhline(0.5, color="k", ls="--", lw=1)
    for place, height in enumerate(heights):
        ax.text(place, 0.03, f"{height:.2f}", ha="center", color="w")
    ax.set(ylim=(0, 1.05), ylabel="AUC, std over seeds", title="Label fidelity")


def draw_report(report: dict[str, Any], path: Path) -> None:
    """One picture of what was measured, a panel for each figure."""
    panels: list[Callable[[Axes], None]] = []
    rows = [r for r in report.get("headline", ()) if r["set"] == "samples"]
    if any(math.isfinite(r.get("over_memory", math.nan)) for r in rows):
        panels.append(lambda ax: draw_ratios(ax, rows))
    for row in report.get("memorisation", ()):
        title = f"Memorisation, {row['space']}: {row['share_too_near']:.1%} too near"
        args = row["gaps"], title, "distance to the nearest training slice", row["threshold"]
        panels.append(lambda ax, args=args: draw_histograms(ax, *args))
    if bars := report.get("labels"):
        panels.append(lambda ax: draw_labels(ax, bars))
    for row in report.get("anatomy", ()):
        args = row["histogram"], f"Anatomy: {row['area']}", "share of the picture"
        panels.append(lambda ax, args=args: draw_histograms(ax, *args))
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines), layout="tight")
    for number, draw in enumerate(panels, 1):
        draw(figure.add_subplot(lines, columns, number))
    save_figure(figure, path)


def draw_pairs_of(row: dict[str, Any], fakes: Slices, train: Slices, path: Path) -> None:
    """The 20 samples nearest to a training slice, each above it, with their distance."""
    pairs = row["pairs"]
    blocks = np.array_split(np.arange(len(pairs["gap"])), 2)
    figure = Figure(figsize=(11, 5.4), layout="tight")
    for ax, block in zip(figure.subplots(2, 1), blocks, strict=True):
        rows = [source.images[np.array(pairs[k])[block]]
                for k, source in (("sample", fakes), ("train", train))]  # fmt: skip
        picture = tile(np.concatenate(rows), len(block))
        R = len(picture) / 2
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        ax.set_yticks([R * 0.5, R * 1.5], ["generated", "training"])
        middles = R * (np.arange(len(block)) + 0.5)
        ax.set_xticks(middles, [f"{pairs['gap'][i]:.3g}" for i in block])
    figure.axes[0].set_title(
        f"Nearest in {row['space']}: distances below; too near is under {row['threshold']:.3g}"
    )
    save_figure(figure, path)
