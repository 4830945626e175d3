"""The two logs of a run: losses.csv has a line for each step, log.jsonl one for each epoch."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import Config
from utils import print_once, write_atomically

# Statistics of a step, in the order in which they are computed
STATS = (
    "g_loss", "g_main_grad", "path_length", "d_loss", "real_logit", "real_sign", "fake_logit",
    "fake_sign", "d_main_grad", "r1", "r2", "ada_p",
)  # fmt: skip
VALUE = r",(?:-?\d+(?:\.\d+)?(?:e[-+]\d+)?|-?inf)?"  # in losses.csv; empty if it was not due
LEAD = 5  # FID counts once z moves a pixel this many times as far as noise does


def due_statistics(config: Config, nimg: int) -> dict[str, bool]:
    """Which of the optional statistics are computed in the step that starts at image `nimg`."""
    step = nimg // config.batch_size
    penalties = step % config.r1_interval == 0
    return {
        "r1": penalties,
        "r2": penalties and config.relativistic,
        "path_length": config.pl_weight > 0 and step % config.pl_interval == 0,
        "ada_p": config.augment == "ada",
    }


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file, without an unfinished last line; no lines if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return content.decode(errors="replace").split("\n")[:-1]


def number(value: Any) -> float:
    """A finite number unchanged, NaN for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < 1e300 else math.nan


def read_losses(run: Path) -> np.ndarray:
    """Rows (nimg, *STATS) of losses.csv; NaN for a statistic that was not due.

    A line is left out if it is damaged or its `nimg` is not above that of every line before.
    """
    header, *lines = whole_lines(run / "losses.csv") or [""]
    names = header.split(",")
    row = re.compile(r"\d+" + VALUE * (len(names) - 1))
    lines = [line for line in lines if row.fullmatch(line)] if names[0] == "nimg" else []
    text = ",".join([*lines, ""]).replace(",,", ",nan,").replace(",,", ",nan,")
    values = np.fromstring(text.removesuffix(","), sep=",").reshape(-1, len(names))
    columns = dict(zip(names, values.T, strict=True))
    missing = np.full(len(values), math.nan)
    rows = np.column_stack([columns.get(name, missing) for name in ("nimg", *STATS)])
    latest = np.maximum.accumulate(rows[:, 0])
    return rows[np.diff(latest, prepend=-1) > 0]


def losses_text(rows: np.ndarray) -> str:
    """Rows (nimg, *STATS) as lines of losses.csv."""
    cells = ((f"{r[0]:.0f}", *("" if np.isnan(v) else f"{v:.9g}" for v in r[1:])) for r in rows)
    return "".join(",".join(line) + "\n" for line in cells)


def append_losses(run: Path, rows: np.ndarray) -> None:
    """Append rows (nimg, *STATS) to losses.csv."""
    with open(run / "losses.csv", "a", newline="\n") as file:
        file.write(losses_text(rows))


def read_log(run: Path) -> list[dict[str, Any]]:
    """The undamaged lines of log.jsonl, each a later epoch: numbers, or None, by name."""
    found: list[dict[str, Any]] = []
    for text in whole_lines(run / "log.jsonl"):
        try:
            line = json.loads(text)
            nimg, epoch = number(line["nimg"]), number(line["epoch"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        last = found[-1]["nimg"] if found else -1
        if last < nimg and not math.isnan(epoch):
            found.append({k: v for k, v in line.items() if v is None or not math.isnan(number(v))})
    return found


def truncate_logs(run: Path, up_to: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Start both logs, or remove damaged lines and lines of images that no checkpoint has seen.

    The last checkpoint has seen `up_to` images. -> the remaining lines of log.jsonl and rows
    (nimg, *STATS) of losses.csv.
    """
    log, rows = read_log(run), read_losses(run)
    lines, kept = [line for line in log if line["nimg"] <= up_to], rows[rows[:, 0] <= up_to]
    header = ",".join(("nimg", *STATS)) + "\n"
    replace_log(
        run / "log.jsonl", "", len(log), len(lines),
        lambda: "".join(json.dumps(line) + "\n" for line in lines),
    )  # fmt: skip
    replace_log(run / "losses.csv", header, len(rows), len(kept), lambda: losses_text(kept))
    return lines, kept


def replace_log(
    path: Path, header: str, undamaged: int, kept: int, text: Callable[[], str]
) -> None:
    """Write a log anew, if lines are damaged or not kept; `text` makes the lines that are kept."""
    content = path.read_bytes() if path.exists() else b""
    if (damaged := content.count(b"\n") - header.count("\n") - undamaged) > 0:
        print_once(f"note: {path}: {damaged} lines that cannot be read are left out")
    sound = content.startswith(header.encode()) and content.endswith(b"\n")
    if damaged > 0 or kept < undamaged or not sound:
        whole = header + text()
        write_atomically(path, lambda partial: partial.write_text(whole, newline="\n"))


class History(NamedTuple):
    """Columns by name, with NaN for no value: per epoch (log.jsonl) and per step (losses.csv)."""

    epochs: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]

    def recent(self, name: str, min_values: int = 1, last: int = 3) -> float:
        """Mean of the last values of an epoch column; NaN if it has fewer than asked for.

        NaN, too, if the newest measurement, the newest epoch with an FID, gave none.
        """
        values = self.measured(name)
        measured = np.flatnonzero(np.isfinite(self.epochs.get("fid", np.zeros(0))))
        if len(measured) and not np.isfinite(self.epochs.get(name, [])[measured[-1] :]).any():
            return math.nan
        return float(values[-last:].mean()) if len(values) >= min_values else math.nan

    def measured(self, name: str) -> np.ndarray:
        """The finite values of an epoch column, in order."""
        values = self.epochs.get(name, np.zeros(0))
        return values[np.isfinite(values)]

    def fids(self) -> np.ndarray:
        """The meaningful FIDs, in order: of epochs in which z moves pixels far more than noise.

        Before, samples are no slices yet, and the encoder, which has seen nothing but slices, was
        found to take such samples for good ones.
        """
        none = np.full(len(self.epochs.get("nimg", ())), math.nan)
        fid, z, noise = (self.epochs.get(name, none) for name in ("fid", "vary_z", "vary_noise"))
        return fid[(z > LEAD * noise) & np.isfinite(fid)]


def history_of(log: list[dict[str, Any]], rows: np.ndarray) -> History:
    """Lines of log.jsonl and rows (nimg, *STATS) of losses.csv, by column."""
    names = sorted({name for line in log for name in line})
    epochs = {n: np.array([line.get(n) for line in log], dtype=float) for n in names}
    return History(epochs, dict(zip(("nimg", *STATS), rows.T, strict=True)))


def read_history(run: Path) -> History:
    """Both logs of a run, by column."""
    return history_of(read_log(run), read_losses(run))


def meaningful_fid(line: dict[str, Any]) -> float:
    """FID of a line of log.jsonl; infinite if the line has none or it is not meaningful."""
    fids = history_of([line], np.zeros((0, 1 + len(STATS)))).fids()
    return float(fids[0]) if len(fids) else math.inf
