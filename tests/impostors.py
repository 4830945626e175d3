"""The protocol of evaluate.py applied to impostors whose rank is known before: a table and JSON.

    python tests/impostors.py RUN                            # all but the classifiers
    python tests/impostors.py RUN --extractors encoder --metrics distribution memorisation
    python tests/impostors.py RUN --data-root AD_NC --out FOLDER

All options are those of evaluate.py. Four sets, equally many and with the classes mixed as in the
training slices, stand in the place of samples:

- real: slices of half of the test ids. It should win.
- copied: training slices with noise of 2 grey levels. FID likes it; the audit must catch it.
- blurred: the very slices of "real", blurred by 1/64 of their width and by a pixel at least. It
  should lose on FID.
- samples: those of the run.

The other half of the test ids is the test split of all four, so that no set is compared with
itself; figures therefore differ from evaluate.py's, which has all test ids.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError
from dataset import Slices
from evaluate import (
    Bench,
    Options,
    Rows,
    as_table,
    counts,
    fakes_of,
    measure,
    planted_copies,
    prepare,
    write_text,
)
from metrics import halves_by_id, spread_labels
from utils import run_command, run_folder

SHOWN = ("fid_train", "fid_test", "kid_train", "kid_test", "precision", "recall", "coverage")


def take(slices: Slices, rows: np.ndarray) -> Slices:
    parts = (part[rows] for part in (slices.images, slices.labels, slices.subjects))
    return Slices(*parts, slices.classes)


def largest_mix(labels: np.ndarray, available: list[np.ndarray], most: int) -> np.ndarray:
    """As many labels in the proportions of the given ones as every set can fill."""
    top = np.min([np.bincount(a, minlength=labels.max() + 1) for a in available], 0)
    for n in range(most, 0, -1):
        wanted = spread_labels(labels, n)
        if (np.bincount(wanted, minlength=len(top)) <= top).all():
            return wanted
    raise UserError("half of the test ids lacks a class: too few ids for impostors")


def choose(slices: Slices, wanted: np.ndarray, rng: np.random.Generator) -> Slices:
    """Random slices, as many of each class as wanted."""
    classes, numbers = np.unique(wanted, return_counts=True)
    rows = [
        rng.choice(np.flatnonzero(slices.labels == label), number, replace=False)
        for label, number in zip(classes, numbers, strict=True)
    ]
    return take(slices, np.sort(np.concatenate(rows)))


def impostors(samples: Slices, bench: Bench) -> tuple[dict[str, Slices], Bench]:
    """The four sets, and what to measure them against: the test ids that none of them has."""
    train, test = bench.splits["train"], bench.splits["test"]
    rng = np.random.default_rng(bench.seed)
    half, other = (take(test, r) for r in halves_by_id(test.subjects, test.labels, rng))
    labels = [s.labels for s in (half, train, samples)]
    wanted = largest_mix(train.labels, labels, len(samples.labels))
    real, copied = choose(half, wanted, rng), choose(train, wanted, rng)
    sigma = max(1, real.images.shape[-1] / 64)
    sets = {
        "samples": choose(samples, wanted, rng),
        "real": real,
        "copied": replace(copied, images=planted_copies(copied.images, bench.seed)["noisy"]),
        "blurred": replace(real, images=gaussian_filter(real.images, (0, sigma, sigma))),
    }
    return sets, bench._replace(splits={"train": train, "test": other})


def row_of(name: str, tables: dict[str, Rows]) -> dict[str, Any]:
    """One line of the table from all tables of a set."""
    row: dict[str, Any] = {"set": name}
    for found in tables.get("distribution", ()):
        if found["set"] == "all":
            row |= {f"{k}, {found['extractor']}": found[k] for k in SHOWN}
    for found in tables.get("relative_fd", ()):
        if found["set"] == "all":
            shown = ("relative_fd", "relative_fd_interval")
            row |= {f"{k}, {found['extractor']}": found[k] for k in shown}
    for found in tables.get("diversity", ()):
        row |= {"ms_ssim": found["ms_ssim"]} if found["pairs"] == "fake" else {}
    for found in tables.get("memorisation", ()):
        row[f"too_near, {found['space']}"] = found["share_too_near"]
    for found in tables.get("labels", ()):
        row[f"{found['figure']}, {found['level']}"] = found["auc"]
    for found in tables.get("anatomy", ()):
        row[f"{found['area']}_distance"] = found["distance_in_sd"]
    return row


def compare(options: Options) -> Rows:
    """Measure and write all four. Raises UserError as `evaluate.evaluate` does."""
    G, bench, what = prepare(options)
    samples, origin = fakes_of(options, G, bench)
    sets, bench = impostors(samples, bench)
    tables = {}
    for name, fakes in sets.items():
        print(name, flush=True)
        tables[name] = measure(fakes, bench, options.metrics)
    rows = [row_of(name, found) for name, found in tables.items()]
    what = what | origin | counts({**bench.splits, "fake": sets["samples"]})
    out = options.out or run_folder(Path(what["weights"])) / "evaluation"
    report = {"what": what, "table": rows, "sets": tables}
    write_text(json.dumps(report, indent=2) + "\n", out / "impostors.json")
    write_text(as_table(rows), out / "impostors.md")
    print(as_table(rows))
    return rows


if __name__ == "__main__":
    default = Options(metrics=("distribution", "diversity", "anatomy", "memorisation"))
    run_command(lambda: compare(tyro.cli(Options, default=default, description=__doc__)))
