"""The protocol of evaluate.py applied to impostors whose rank is known before: a table and JSON.

    python tests/impostors.py RUN                            # all but the classifiers
    python tests/impostors.py RUN --extractors encoder --metrics distribution memorisation
    python tests/impostors.py RUN --data-root AD_NC --out FOLDER

The options are those of evaluate.py. Impostors take the place of samples. All sets have equally
many slices and the class proportions of the training slices:

- perfect: fresh subjects of the demo brains, but not those that evaluate.py compares with. With
  other data: slices of half of the test participants. The other half is then the test split for
  all sets, so that measurements differ from those of evaluate.py.
- copied: training slices, mirrored, with noise of 2 grey levels. Their FD to the training slices is
  low, their FD to unseen participants is higher, and the audit must find them.
- dropped: the same, from half of the training participants.
- degraded: the perfect slices, blurred by 0.6 pixels.
- samples: the samples of the run.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError
from dataset import Slices
from evaluate import Options, References, counts, fakes_of, measure, prepare
from evaluation import features, samples
from evaluation.metrics import halves_by_participant
from evaluation.report import Rows, as_table, write_text
from training.runs import run_folder
from utils import run_command

DISTRIBUTION = ("fid_train", "kid_train", "precision", "recall", "coverage")
HEADLINE = ("fd_test", "fd_infinite", "over_memory", "over_perfect", "over_perfect_interval")


def largest_mix(labels: np.ndarray, available: list[np.ndarray], most: int) -> np.ndarray:
    """The most labels, in the proportions of the given labels, for which every set has slices."""
    top = np.min([np.bincount(a, minlength=labels.max() + 1) for a in available], 0)
    for n in range(most, 0, -1):
        wanted = samples.labels_in_proportion(labels, n)
        if (np.bincount(wanted, minlength=len(top)) <= top).all():
            return wanted
    raise UserError(
        "half of the test participants lacks a class: too few participants for impostors"
    )


def choose(slices: Slices, wanted: np.ndarray, rng: np.random.Generator) -> Slices:
    """Random slices, as many of each class as wanted."""
    classes, numbers = np.unique(wanted, return_counts=True)
    rows = [
        rng.choice(np.flatnonzero(slices.labels == label), number, replace=False)
        for label, number in zip(classes, numbers, strict=True)
    ]
    return slices.take(np.sort(np.concatenate(rows)))


def impostors(
    samples: Slices, references: References, other: Slices | None = None
) -> tuple[dict[str, Slices], References]:
    """The sets by name, and their references; `other` holds slices of a perfect generator."""
    train, rng = references.splits["train"], np.random.default_rng(references.seed)
    if other is None:
        test = references.splits["test"]
        half, rest = (
            test.take(r) for r in halves_by_participant(test.participants, test.labels, rng)
        )
        other, references = half, references._replace(splits={"train": train, "test": rest})
    few = train.take(halves_by_participant(train.participants, train.labels, rng)[0])
    labels = [s.labels for s in (other, few, samples)]
    wanted = largest_mix(train.labels, labels, len(samples.labels))
    perfect, *copied = (choose(s, wanted, rng) for s in (other, train, few))
    copied, dropped = (
        replace(
            s, images=features.planted_copies(s.images[:, :, ::-1].copy(), references.seed)["noisy"]
        )
        for s in copied
    )
    sets = {
        "perfect": perfect,
        "copied": copied,
        "dropped": dropped,
        "degraded": replace(perfect, images=features.blurred(perfect.images, 0.6)),
        "samples": choose(samples, wanted, rng),
    }
    return sets, references


def row_of(name: str, tables: dict[str, Rows]) -> dict[str, Any]:
    """The row of a set in the table of all sets."""
    row: dict[str, Any] = {"set": name}
    for found in tables.get("distribution", ()):
        if found["set"] == "all":
            row |= {f"{k}, {found['extractor']}": found[k] for k in DISTRIBUTION}
    for found in tables.get("headline", ()):
        if found["set"] == "samples":
            row |= {f"{k}, {found['extractor']}": found[k] for k in HEADLINE if k in found}
    for found in tables.get("diversity", ()):
        row |= {"ms_ssim": found["ms_ssim"]} if found["pairs"] == "fake" else {}
    for found in tables.get("memorisation", ()):
        row[f"too_near, {found['space']}"] = found["share_too_near"]
    for found in tables.get("labels", ()):
        row[f"{found['measurement']}, {found['unit']}"] = found["auc"]
    for found in tables.get("anatomy", ()):
        row[f"{found['area']}_distance"] = found["distance_in_sd"]
    return row


def compare(options: Options) -> Rows:
    """Measure all sets and write the report. Raises UserError as `evaluate.evaluate` does."""
    G, references, what = prepare(options)
    samples, origin = fakes_of(options, G, references)
    other = None
    if references.fresh is not None:
        count = len(references.fresh.labels)
        other = features.fresh_slices(references.splits["train"], references.cache, count, seed=1)
    sets, references = impostors(samples, references, other)
    tables = {}
    for name, fakes in sets.items():
        print(name, flush=True)
        tables[name] = measure(fakes, references, options.metrics)
    rows = [row_of(name, found) for name, found in tables.items()]
    what = what | origin | counts({**references.splits, "fake": sets["perfect"]})
    out = options.out or run_folder(Path(what["weights"])) / "evaluation"
    report = {"what": what, "table": rows, "sets": tables}
    write_text(json.dumps(report, indent=2) + "\n", out / "impostors.json")
    write_text(as_table(rows), out / "impostors.md")
    print(as_table(rows))
    return rows


if __name__ == "__main__":
    default = Options(metrics=("distribution", "diversity", "anatomy", "memorisation"))
    run_command(lambda: compare(tyro.cli(Options, default=default, description=__doc__)))
