"""Figures of images beside signed differences, and files of numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import utils
from evaluation import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS = 32  # of a figure
SIGNED = "RdBu_r"  # red: brighter, blue: darker, white: no difference


def scale_of(*differences: np.ndarray) -> float:
    """A limit of the colours: 99.5 % of all differences are smaller, in grey levels, 1 or more."""
    return max(1.0, *(float(np.percentile(np.abs(values), 99.5)) for values in differences))


def draw_columns(
    columns: dict[str, np.ndarray], rows: Sequence[str], title: str, path: Path
) -> None:
    """A column for each title: images uint8 [N, R, R], or differences float [N, R, R] in colours.

    All differences have one scale, symmetric about 0, in grey levels. The title says which rows are
    drawn if there are more than MAX_ROWS.
    """
    if len(rows) > MAX_ROWS:
        title = f"{title}\nthe first {MAX_ROWS} of {len(rows)}"
        columns, rows = {k: v[:MAX_ROWS] for k, v in columns.items()}, rows[:MAX_ROWS]
    signed = [values for values in columns.values() if values.dtype != np.uint8]
    limit = scale_of(*signed) if signed else 1.0
    width, height = 1.7 * len(columns) + 1.6, 1.55 * len(rows) + 1
    figure = utils.new_figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    colours = None
    for ax, (name, values) in zip(axes, columns.items(), strict=True):
        names = [utils.label(row, 18) for row in rows] if ax is axes[0] else [""] * len(rows)
        if values.dtype == np.uint8:
            utils.show_tiles(ax, utils.tile(values, 1), names, [""])
        else:
            colours = draw_difference(ax, values.reshape(-1, values.shape[-1]), limit)
        ax.set_title(utils.label(name, 18), fontsize=9)
    if colours is not None:
        figure.colorbar(colours, ax=axes, label="grey levels", shrink=min(1, 3 / height), pad=0.02)
    figure.suptitle(title, fontsize=9)
    utils.save_figure(figure, path)


def draw_difference(ax: "Axes", values: np.ndarray, limit: float) -> Any:
    """Signed differences [H, W] in symmetric colours. -> what a colour bar needs."""
    ax.set(xticks=[], yticks=[])
    return ax.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")


def write_report(title: str, tables: dict[str, Any], out: Path, name: str) -> None:
    """Write sentences and tables as OUT/NAME.md and OUT/NAME.json, and print the former."""
    text = f"# {title}\n"
    for heading, content in tables.items():
        text += f"\n## {heading.capitalize()}\n\n" if isinstance(content, list) else "\n"
        text += report.as_table(content) if isinstance(content, list) else f"{content}\n"
    report.write_text(text, out / f"{name}.md")
    report.write_text(json.dumps(report.plain(tables), indent=2) + "\n", out / f"{name}.json")
    utils.print_once(text)
