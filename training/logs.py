"""The two logs of a run: losses.csv has a line for each step, log.jsonl one for each epoch."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import Config
from utils import print_once, write_atomically

# Statistics of each step, in the order in which they arise
STATS = (
    "g_loss", "path_length", "d_loss", "real_logit", "fake_logit", "r1", "real_sign", "fake_sign",
    "g_main_grad", "d_main_grad", "ada_p",
)  # fmt: skip
VALUE = r",(?:-?\d+(?:\.\d+)?(?:e[-+]\d+)?|-?inf)?"  # of losses.csv; none: it was not due


def due_statistics(config: Config, nimg: int) -> dict[str, bool]:
    """Which statistics belong to the step that starts at image `nimg`, of those that may not."""
    step = nimg // config.batch_size
    return {
        "r1": step % config.r1_interval == 0,
        "path_length": config.pl_weight > 0 and step % config.pl_interval == 0,
        "ada_p": config.augment == "ada",
    }


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file, without a last one that was cut off; none without the file."""
    content = path.read_bytes() if path.exists() else b""
    return content.decode(errors="replace").split("\n")[:-1]


def number(value: Any) -> float:
    """A finite number, as it is; NaN for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < 1e300 else math.nan


def read_losses(run: Path) -> np.ndarray:
    """Rows (nimg, *STATS) of losses.csv; NaN where a statistic was not due.

    Lines that are damaged, or not at a later image than all before them, are left out.
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
    return "".join(",".join("" if np.isnan(v) else f"{v:.9g}" for v in r) + "\n" for r in rows)


def append_losses(run: Path, rows: np.ndarray) -> None:
    """Append rows (nimg, *STATS) to losses.csv."""
    with open(run / "losses.csv", "a") as file:
        file.write(losses_text(rows))


def read_log(run: Path) -> list[dict[str, Any]]:
    """Lines of log.jsonl that are whole: numbers by name, an epoch at a later image each."""
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
    """Start both logs, or cut them back to what the last checkpoint has seen and what is whole.

    Returns:
        What is left: lines of log.jsonl, rows (nimg, *STATS) of losses.csv.
    """
    log, rows = read_log(run), read_losses(run)
    whole = {"log.jsonl": len(log), "losses.csv": 1 + len(rows)}  # lines, with the header
    left = [line for line in log if line["nimg"] <= up_to], rows[rows[:, 0] <= up_to]
    texts = {
        "log.jsonl": lambda: "".join(json.dumps(line) + "\n" for line in left[0]),
        "losses.csv": lambda: ",".join(("nimg", *STATS)) + "\n" + losses_text(left[1]),
    }
    for name, count in whole.items():
        path = run / name
        if lost := max(0, len(whole_lines(path)) - count):
            print_once(f"note: {path}: {lost} lines that cannot be read are left out")
        kept = (len(left[0]), 1 + len(left[1]))[name == "losses.csv"]
        if lost or kept < count or not ends_whole(path):
            write_atomically(path, lambda partial, name=name: partial.write_text(texts[name]()))
    return left


def ends_whole(path: Path) -> bool:
    """Whether a text file is there and its last line is not cut off."""
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


# Diagnosis


class History(NamedTuple):
    """Columns by name: of each epoch (log.jsonl) and of each step (losses.csv); NaN: no value."""

    epochs: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]

    def last(self, name: str, least: int = 1) -> float:
        """Mean of the last three values of a column; NaN, for which no rule holds, if too few."""
        values = self.measured(name)
        return float(values[-3:].mean()) if len(values) >= least else math.nan

    def measured(self, name: str) -> np.ndarray:
        """The values that an epoch column has."""
        values = self.epochs.get(name, np.zeros(0))
        return values[np.isfinite(values)]

    def fids(self) -> np.ndarray:
        """FID of the epochs whose FID counts."""
        none = np.full(len(self.epochs.get("nimg", ())), math.nan)
        fid, z, noise = (self.epochs.get(name, none) for name in ("fid", "vary_z", "vary_noise"))
        return fid[(z > noise) & np.isfinite(fid)]


def history_of(log: list[dict[str, Any]], rows: np.ndarray) -> History:
    """Lines of log.jsonl and rows of losses.csv by column."""
    names = sorted({name for line in log for name in line})
    epochs = {n: np.array([line.get(n) for line in log], dtype=float) for n in names}
    return History(epochs, dict(zip(("nimg", *STATS), rows.T, strict=True)))


def read_history(run: Path) -> History:
    """The logs of a run."""
    return history_of(read_log(run), read_losses(run))


def meaningful_fid(line: dict[str, Any]) -> float:
    """FID of an epoch where it counts: z moves a pixel further than noise does. Else infinite.

    Before, samples are no slices yet, and an encoder that has seen nothing but slices was found to
    hold them for good ones.
    """
    fids = history_of([line], np.zeros((0, 1 + len(STATS)))).fids()
    return float(fids[0]) if len(fids) else math.inf
