"""The report of an evaluation: tables for Markdown and JSON, and pictures."""

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset import Slices
from evaluation.metrics import interval
from evaluation.verdict import LOW_PRECISION, Row, Rows, precision_of, verdict
from utils import (
    label,
    new_figure,
    print_once,
    printable,
    save_figure,
    show_tiles,
    tile,
    write_atomically,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLUMNS = 7  # of a table in Markdown
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # axis of ratios


def cell(value: Any) -> str:
    """A value of a table as text; a list is an interval."""
    if value == "fake":  # in JSON; figures and tables say "generated"
        return "generated"
    if isinstance(value, list):
        if value[-1:] == [math.inf]:
            return f"{cell(value[0])} or more"
        return " to ".join(dict.fromkeys(map(cell, value)))
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "not measured"  # JSON has null for such a number
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(value).replace("|", r"\|")  # ends no cell


def plain(value: Any) -> Any:
    """Nested values for JSON; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(value: Any) -> Any:
    """Nested values of JSON, with NaN for the null that `plain` made of it."""
    if isinstance(value, dict):
        return {name: with_nan(v) for name, v in value.items()}
    if isinstance(value, list):
        return [with_nan(v) for v in value]
    return math.nan if value is None else value


def heading(column: str) -> str:
    return column.replace("_", " ").replace("fake", "generated")


def columns_of(rows: Rows) -> list[str]:
    """The columns of rows, without those of dictionaries: histograms and pairs are only drawn."""
    return list(dict.fromkeys(k for r in rows for k, v in r.items() if not isinstance(v, dict)))


def joined(lines: list[list[str]]) -> str:
    """Cells, line by line, as a Markdown table."""
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_table(rows: Rows) -> str:
    """Rows as a Markdown table."""
    columns = columns_of(rows)
    lines = [[heading(c) for c in columns], ["---"] * len(columns)]
    return joined(lines + [[cell(row.get(c, "")) for c in columns] for row in rows])


def as_narrow_tables(rows: Rows) -> str:
    """Rows as Markdown tables of at most seven columns: a wider one has a column for each row."""
    if len(columns := columns_of(rows)) <= MAX_COLUMNS:
        return as_table(rows)
    texts = []
    for block in np.array_split(np.arange(len(rows)), math.ceil(len(rows) / (MAX_COLUMNS - 1))):
        lines = [[heading(c), *(cell(rows[i].get(c, "")) for i in block)] for c in columns]
        texts.append(joined([lines[0], ["---"] * (len(block) + 1), *lines[1:]]))
    return "\n".join(texts)


def as_markdown(report: dict[str, Any]) -> str:
    """The report: its verdict, then tables."""
    text = f"# Evaluation\n\n{verdict(report)}"
    precision = precision_of(report)
    for title, rows in report.items():
        if title == "what":
            rows = [{"of": k.replace("fake", "generated"), "value": v} for k, v in rows.items()]
        text += f"\n## {title.capitalize().replace('_', ' ')}\n\n"
        if precision < LOW_PRECISION and title in ("labels", "anatomy", "membership"):
            text += f"**Precision is {precision:.2g}**: few samples look like real slices, "
            text += "so this table says little.\n\n"
        text += as_narrow_tables(rows)
    return text + (
        "\n'Not measured': there are too few slices or participants, or all are alike. FD to "
        "unseen participants: a generator that copies the training slices scores like a perfect "
        "one, whose FD only the demo brains show; the audit tells them apart. It finds "
        "whole training slices, also rotated, moved, mirrored, blurred or darkened as "
        "its planted copies are, but no copied parts: it is no guarantee of privacy. Measurements "
        "of different extractors cannot be compared.\n"
    )


def over_runs(reports: list[dict[str, Any]]) -> Rows:
    """Headline of the samples over several runs: means, ranges, intervals of all draws together."""
    rows = []
    heads = [[r for r in tables["headline"] if r["set"] == "samples"] for tables in reports]
    for same in zip(*heads, strict=True):
        row = {"extractor": same[0]["extractor"], "runs": len(same)}
        for name in ("fd_test", "fd_infinite", "over_memory", "over_perfect"):
            values = [r[name] for r in same if name in r]
            if len(values) == len(same):
                row |= {name: float(np.mean(values)), f"{name}_range": [min(values), max(values)]}
            if draws := [r[f"{name}_draws"]["values"] for r in same if f"{name}_draws" in r]:
                row[f"{name}_interval"] = interval(np.concatenate(draws))
        rows.append(row)
    return rows


def text_of_runs(reports: list[dict[str, Any]]) -> str:
    """What several runs are, and the table of `over_runs` if they were measured with equal data."""
    text, named = f"# Over {len(reports)} runs\n\n", ("weights", "kimg", "sha256", "seed", "n_fake")
    whats = [tables["what"] for tables in reports]
    text += as_table([{name: what.get(name) for name in named} for what in whats]) + "\n"
    if len({what.get("data", "").partition(":")[0] for what in whats}) > 1:
        return text + "Not averaged: they were measured with different real slices.\n"
    return text + as_narrow_tables(over_runs(reports))


def write_text(text: str, path: Path) -> None:
    """Write a text file; readers see the old file or the whole new one."""
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8", "backslashreplace"))


def keep_other_report(out: Path, tables: dict[str, Any]) -> None:
    """Move a report in `out` that these tables do not replace into a folder beside it, and say so.

    They replace one of the same weights, samples and settings, without other groups of tables.
    """
    try:
        before = json.loads((out / "evaluation.json").read_text("utf-8"))
        if before["what"] == plain(tables["what"]) and before.keys() <= tables.keys():
            return
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # there is none, or it is damaged
    out = out.resolve()  # "." has no name
    numbers = (f"{out.name}_before{i or ''}" for i in count())
    folder = next(path for name in numbers if not (path := out.with_name(name)).exists())
    folder.mkdir()
    for path in (*out.glob("evaluation.*"), *out.glob("nearest_*.png")):
        path.rename(folder / path.name)
    print_once(f"note: a report of other settings, weights or groups was here; now in {folder}")


def draw_ratios(ax: "Axes", rows: Rows) -> None:
    """FD of samples to unseen participants over that of memory or generator, with intervals."""
    points = [
        (f"{row['extractor']}, {name}", row[f"over_{name}"], row[f"over_{name}_interval"])
        for row in rows
        for name in ("memory", "perfect")
        if math.isfinite(row.get(f"over_{name}", math.nan))
    ]
    for place, (_, value, (low, high)) in enumerate(points):
        low, high = (x if math.isfinite(x) else value for x in (low, high))
        reach = np.abs([[value - low], [high - value]])
        ax.errorbar(value, place, xerr=reach, fmt="o", color="C0", capsize=4)
        ax.text(value, place - 0.08, f"{value:.3g}", ha="center", va="bottom")
    ax.axvline(1, color="k", ls="--", lw=1)
    ax.set(xscale="log", yticks=range(len(points)), yticklabels=[name for name, *_ in points])
    ax.set(ylim=(len(points) - 0.5, -0.5), title="FD of samples over that of a reference")
    text = "ratio of FDs to unseen participants\nmemory: a G that repeats the training slices"
    if any("perfect" in name for name, *_ in points):
        text += "\nperfect: a G that draws new subjects as the demo brains do"
    ax.set(xlabel=text, ylabel="extractor, reference")
    ends = [1.0, *(end for *_, limits in points for end in limits if 0 < end < math.inf)]
    ticks = [t for t in TICKS if min(ends) / 2 < t < max(ends) * 2]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()


def draw_histograms(
    ax: "Axes",
    found: dict[str, list[float]],
    title: str,
    label: str,
    threshold: float | None = None,
) -> None:
    """The densities of a `histogram` as steps, the real set in blue."""
    ax.set(title=title, xlabel=label, yticks=[], ylabel="density")
    names = sorted(found.keys() - {"edges"})
    for name in names:
        color = "C1" if name == "fake" else "C0"
        text = "generated" if name == "fake" else name
        ax.stairs(found[name], found["edges"], fill=True, alpha=0.45, color=color, label=text)
    ax.set_ylim(0, 1.35 * max(max(found[name]) for name in names))  # room for the legend
    if threshold is not None:
        ax.axvline(threshold, color="k", ls="--", lw=1, label="1st percentile of test")
    ax.legend(fontsize=8, loc="upper right")


def draw_labels(ax: "Axes", rows: Rows) -> None:
    """AUC by participant, for synthetic tests by slice, with the standard deviation over seeds."""
    units = dict.fromkeys(("TRTR", "TSTR", "TRTS", "TR+STR"), "participants") | {"TRTS": "slices"}
    found = {(r["measurement"], r["unit"]): r for r in rows}
    bars = [found[pair] for pair in units.items()]
    names = [f"{name}\nby\n{unit[:-1]}" for name, unit in units.items()]
    heights, errors = [r["auc"] for r in bars], [r["std_of_seeds"] for r in bars]
    ax.bar(names, heights, yerr=errors, capsize=4, color=["C0", "C1", "C1", "C2"])
    ax.axhline(0.5, color="k", ls="--", lw=1)
    for place, height in enumerate(heights):
        ax.text(place, 0.03, f"{height:.2f}", ha="center", color="w")
    ax.set(ylim=(0, 1.05), ylabel="AUC, std over seeds", title="Label fidelity")
    ax.set_xlabel("trained (T) and tested on real (R) or generated slices (S)")


def draw_report(report: dict[str, Any], path: Path) -> None:
    """One picture of the report, with a panel for each measurement."""
    panels: list[Callable[[Axes], None]] = []
    rows = [r for r in report.get("headline", ()) if r["set"] == "samples"]
    if any(math.isfinite(r.get("over_memory", math.nan)) for r in rows):
        panels.append(lambda ax: draw_ratios(ax, rows))
    for row in report.get("memorisation", ()):
        title = f"Memorisation, {row['space']}: {row['share_too_near']:.1%} too near"
        args = row["gaps"], title, "distance to the nearest training slice", row["threshold"]
        panels.append(lambda ax, args=args: draw_histograms(ax, *args))
    if profiles := report.get("variety"):
        panels.append(lambda ax: draw_profiles(ax, profiles))
    if bars := report.get("labels"):
        panels.append(lambda ax: draw_labels(ax, bars))
    for row in report.get("anatomy", ()):
        args = row["histogram"], f"Anatomy: {row['area']}", "share of the picture"
        panels.append(lambda ax, args=args: draw_histograms(ax, *args))
    if not panels:
        return
    columns, lines = min(3, len(panels)), math.ceil(len(panels) / 3)
    figure = new_figure(figsize=(4.6 * columns, 3.6 * lines), layout="tight")
    for number, draw in enumerate(panels, 1):
        draw(figure.add_subplot(lines, columns, number))
    save_figure(figure, path)


def draw_profiles(ax: "Axes", rows: Rows) -> None:
    """The deviation of each set along each principal component, over that of training slices."""
    for row in rows:
        values = row["deviations"]["values"]
        name = row["set"].replace("samples", "generated")
        ax.plot(range(1, len(values) + 1), values, ".-", ms=4, label=name)
    ax.axhline(1, color="grey", lw=0.8)
    ax.set(xlabel="principal component of real pixels", ylabel="deviation over the real one")
    ax.set_ylim(bottom=0)
    ax.set_title("Variety of shapes (1: as training slices)", fontsize=9)
    ax.legend(fontsize=7, frameon=False)


def name_of(slices: Slices, row: int) -> str:
    """The file of a slice, or its participant if it has no file."""
    return str(slices.participants[row] if slices.files is None else slices.files[row])


def draw_nearest(row: Row, fakes: Slices, train: Slices, path: Path) -> None:
    """The 20 samples nearest to a training slice, each above that slice, with distance and name."""
    pairs = {name: np.array(values) for name, values in row["pairs"].items()}
    figure = new_figure(figsize=(13, 8.2), layout="constrained")
    blocks = np.array_split(np.arange(len(pairs["gap"])), min(2, len(pairs["gap"])))
    for ax, block in zip(figure.subplots(len(blocks), 1, squeeze=False).flat, blocks, strict=True):
        real = train.images[pairs["train"][block]]
        real = np.where(pairs["mirrored"][block, None, None], real[:, :, ::-1], real)
        rows = fakes.images[pairs["sample"][block]], real
        picture = tile(np.concatenate(rows), len(block))
        names = [label(name_of(train, pairs["train"][i]), 22, 5) for i in block]
        notes = [f"{pairs['gap'][i]:.3g}{', mirrored' * pairs['mirrored'][i]}" for i in block]
        names = [f"{note}\n{name}" for note, name in zip(notes, names, strict=True)]
        show_tiles(ax, picture, ["generated", "training"], names)
        ax.set_xlabel("distance, and training slice")
        ax.tick_params(axis="x", labelsize=7)
    title = f"Nearest in {row['space']}, with distances; below {row['threshold']:.3g} is too near"
    figure.axes[0].set_title(title)
    save_figure(figure, path)
