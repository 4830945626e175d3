"""Scans and a spreadsheet in, a training set out: volumes become slices in class folders.

    python prepare.py import SCANS --out AD_NC --table subjects.csv

A volume is a NIfTI file or, with the program dcm2niix, a folder of DICOM files, at any depth. Its
row of the table is the one whose scan or, if there is none, whose participant is a part of its
path: not a mere number within a name, which may be a date. Without a table SCANS/CLASS/... is the
class, and whose it is stands in the path (sub-01, 002_S_0295, OAS1_0001), or is the folder in that
of the class, or the file. CN becomes NC as a class of a table, and a CDR above 0 becomes AD.
"""

import csv
import hashlib
import io
import logging
import math
import os
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from config import UserError
from dataset import MANIFEST, SPLITS, Entry, manifest_rows
from scans.tables import RENAMED, EntryFinder, participant_in, plain_name, stem
from scans.volumes import CutSlices, ImportOptions, cut, find_converter, open_volume, read_volume
from utils import (
    delete_partials,
    ensure_writable,
    first_line,
    lock_folder,
    map_on_cores,
    print_once,
    printable,
    save_grey,
    sha256_of,
    write_atomically,
)

SUFFIXES = (".nii", ".nii.gz")
MOST_LETTERS = 80  # of an id
MANIFEST_SECONDS = 5  # of work that a kill may cost


# Finding


class Scan(NamedTuple):
    """A volume on disk, the name that its slices get, and what is known of it."""

    path: Path
    name: str
    entry: Entry


def find_volumes(root: Path, pattern: str) -> list[Path]:
    """NIfTI files, and folders that hold DICOM files. Raises UserError if there are none.

    What BIDS calls derivatives, masks and segmentations is left out.
    """
    if not root.is_dir():
        raise UserError(f"scans = {root}: no such folder")
    files = sorted(p for p in root.rglob("*") if p.name[0] != "." and p.is_file())
    files = [p for p in files if "derivatives" not in p.relative_to(root).parts]
    found = [path for path in files if path.name.lower().endswith(SUFFIXES)]
    found = [path for path in found if not stem(path.name).endswith(("_mask", "_dseg", "_probseg"))]
    found += sorted({path.parent for path in files if is_dicom(path)})
    found = [path for path in found if fnmatch(path.name, pattern)]
    if not found:
        raise UserError(f"{root}: no NIfTI file (.nii, .nii.gz), no DICOM folder called {pattern}")
    return found


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its name or, without an ending, by its first bytes."""
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def participant_of(inside: Path) -> str:
    """Whose a volume is by its path CLASS/.../FILE: as it says, or the folder within the class."""
    own = inside.parts[1] if len(inside.parts) > 2 else stem(inside.name)
    return participant_in(str(inside)) or own.strip()


def id_of(name: str) -> str:
    """A name that any file system takes, and that a slice's number can follow."""
    plain = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    if len(plain) <= MOST_LETTERS and plain:
        return plain
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f"{plain[: MOST_LETTERS - 9]}-{digest}"


def match_to_table(
    options: ImportOptions, volumes: list[Path], problems: dict[str, str]
) -> list[Scan]:
    """Each volume with its class and participant; why not, for the others, in `problems`.

    Raises:
        UserError: a table that cannot be read.
    """
    finder = EntryFinder(options.table, options.columns) if options.table else None
    labels: set[str] = set()
    wanted = options.classes and {
        RENAMED.get(name, name) if finder else name for name in options.classes
    }
    found, names = [], Counter(stem(path.name) for path in volumes)
    for path in volumes:
        inside = path.relative_to(options.scans)
        try:
            if finder:
                entry = finder.named_in(inside.parent / stem(path.name))
                if entry is None:
                    raise ValueError("no row of the table names it")
                if not entry.label:
                    raise ValueError("its row has no class, or its participant's have several")
            elif len(inside.parts) < 2:
                raise ValueError("lies in no class folder, and there is no --table")
            else:
                entry = Entry("", participant_of(inside), inside.parts[0], math.nan, "")
            if not plain_name(entry.label):
                raise ValueError("its folder is no name of a class")
        except ValueError as error:
            problems[str(inside)] = str(error)
            continue
        labels.add(entry.label)
        unique = names[stem(path.name)] == 1
        name = entry.scan or (stem(path.name) if unique else str(inside.parent / stem(path.name)))
        if wanted is None or entry.label in wanted:
            found.append(Scan(path, id_of(name), entry))
    if missing := sorted((wanted or set()) - labels):
        raise UserError(f"classes: no {', '.join(missing)}; there are {', '.join(sorted(labels))}")
    for name, count in Counter(scan.name for scan in found).items():
        if count > 1:
            twice = [str(s.path.relative_to(options.scans)) for s in found if s.name == name]
            problems |= dict.fromkeys(twice, f"{count} volumes would be {name}")
            found = [s for s in found if s.name != name]
    return found


# Splitting


def split_participants(
    scans: list[Scan], share: float, seed: int, before: dict[str, str]
) -> dict[str, str]:
    """train or test for each participant: a share of each class, even in sex and age.

    Those of a class lie in order of sex and age; of every so many one is drawn. Who was split
    `before` stays there. Raises UserError where a class would lack one side.
    """
    people: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        people[scan.entry.participant].append(scan)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, own in people.items():
        strata[tuple(sorted({s.entry.label for s in own}))].append(name)

    def order(name: str) -> tuple:
        entry = people[name][0].entry
        return entry.sex, math.isnan(entry.age), entry.age if entry.age == entry.age else 0, name

    rng, split = np.random.default_rng(seed), {}
    for label in sorted(strata):
        names = sorted(strata[label], key=order)
        count = math.ceil(share * len(names)) if len(names) > 1 else 0
        edges = np.linspace(0, len(names), count + 1).astype(int)
        drawn = set(edges[:-1] + (rng.random(count) * np.diff(edges)).astype(int))
        split |= {name: "test" if i in drawn else "train" for i, name in enumerate(names)}
    split |= before
    for label, _ in one_sided(scans, split):
        raise UserError(f"class {label}: too few participants to split them")
    return split


def one_sided(scans: list[Scan], split: dict[str, str]) -> list[tuple[str, str]]:
    """Classes that are on one side of the split only, and on which."""
    sides: dict[str, set[str]] = defaultdict(set)
    for scan in scans:
        sides[scan.entry.label].add(split[scan.entry.participant])
    return [(label, *there) for label, there in sorted(sides.items()) if len(there) == 1]


def balance(scans: Iterable[Scan], split: dict[str, str]) -> list[str]:
    """How even the split is: participants, mean age and share of women of each class and side."""
    people = {s.entry.participant: s.entry for s in scans}
    lines = []
    for label in sorted({e.label for e in people.values()}):
        for side in ("train", "test"):
            own = [e for e in people.values() if e.label == label and split[e.participant] == side]
            ages = [e.age for e in own if not math.isnan(e.age)]
            sexes = [e.sex for e in own if e.sex]
            text = f"{side}/{label}: {len(own)} participants"
            if ages:
                text += f", age {np.mean(ages):.1f} (deviation {np.std(ages):.1f})"
            lines.append(
                text + (f", {np.mean([s == 'F' for s in sexes]):.0%} women" if sexes else "")
            )
    return lines


# Writing


def option_columns(options: ImportOptions) -> dict[str, str]:
    """Every choice that concerns all scans, for the manifest."""
    window = "percentile" if options.window is None else " ".join(f"{v:g}" for v in options.window)
    return {
        "axis": options.axis,
        "centre": "ventricles" if options.centre is None else f"{options.centre:g} mm",
        "slices": str(options.slices),
        "spacing_mm": f"{options.spacing:g}",
        "size": str(options.size),
        "window": window,
        "bits": str(options.bits),
        "test_share": f"{options.test_share:g}",
        "seed": str(options.seed),
    }


def cut_columns(scan: Scan, made: CutSlices) -> dict[str, str]:
    """What is known of a scan once it is cut."""
    return {
        "sha256": sha256_of(scan.path),
        "lowest_mm": f"{made.positions[0]:.2f}",
        "highest_mm": f"{made.positions[-1]:.2f}",
        "black": f"{made.black:g}",
        "white": f"{made.white:g}",
    }


def row_of(scan: Scan, side: str, made: CutSlices | None, options: ImportOptions) -> dict[str, str]:
    """A scan's row of the manifest, before it is cut or after."""
    entry = scan.entry
    return {
        "id": scan.name,
        "participant": entry.participant,
        "class": entry.label,
        "age": "" if math.isnan(entry.age) else f"{entry.age:g}",
        "sex": entry.sex,
        "split": side,
        "source": printable(scan.path.relative_to(options.scans)),
        **dict.fromkeys(("sha256", "lowest_mm", "highest_mm", "black", "white"), ""),
        **(cut_columns(scan, made) if made else {}),
        **option_columns(options),
    }


def slice_paths(scan: Scan, side: str, options: ImportOptions) -> list[Path]:
    """The files of a scan's slices, lowest first."""
    folder = options.out / side / scan.entry.label
    return [folder / f"{scan.name}_{number}.png" for number in range(options.slices)]


def write_slices(scan: Scan, side: str, made: CutSlices, options: ImportOptions) -> None:
    """One PNG for each slice."""
    top = 2**options.bits - 1
    grey = (made.images - made.black) * (top / (made.white - made.black))
    images = grey.round().clip(0, top).astype(f"uint{options.bits}")
    for image, path in zip(images, slice_paths(scan, side, options), strict=True):
        save_grey(image, path)


def write_manifest(rows: dict[str, dict[str, str]], path: Path) -> None:
    """Write the rows in the order of their ids."""
    text = io.StringIO()
    columns = list(next(iter(rows.values()), ("id", "participant", "class")))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    write_atomically(path, lambda partial: partial.write_text(text.getvalue(), "utf-8"))


def rows_before(scans: list[Scan], options: ImportOptions) -> dict[str, dict[str, str]]:
    """Rows of the manifest that an earlier call left, by id.

    Raises:
        UserError: it made other choices, or has other classes or participants for these scans.
    """
    path = options.out / MANIFEST
    if not path.exists():
        if options.out.is_dir() and any(p.name[0] != "." for p in options.out.iterdir()):
            raise UserError(f"out = {options.out}: is not empty, and has no {MANIFEST}")
        return {}
    rows = manifest_rows(options.out)
    wanted = {scan.name: scan.entry for scan in scans}
    for name, row in rows.items():
        entry = wanted.get(name)
        expected = {"class": entry.label, "participant": entry.participant} if entry else {}
        for key, value in (option_columns(options) | expected).items():
            if row.get(key) != value:
                raise UserError(
                    f"{path}: {name} has {key} = {row.get(key)}, now {value}; use another --out"
                )
        if row.get("split") not in SPLITS or not plain_name(name):
            raise UserError(f"{path}: {name[:40]!r} has no split, or is no name")
    return rows


def is_done(scan: Scan, row: dict[str, str] | None, options: ImportOptions) -> bool:
    """Whether all slices of a scan are there, of a file that is still the same."""
    if row is None or not row.get("sha256"):
        return False
    whole = all(path.exists() for path in slice_paths(scan, row["split"], options))
    return whole and row["sha256"] == sha256_of(scan.path)


def import_scans(options: Annotated[ImportOptions, tyro.conf.arg(name="")]) -> None:
    """Cut every scan into slices; say at the end what was left out, and why.

    Raises:
        UserError: bad options, table or folder, before anything is written; no scan that can be
            used.
    """
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what is wrong is said here
    volumes, problems = find_volumes(options.scans, options.pattern), {}
    scans = match_to_table(options, volumes, problems)
    if not scans:
        why = "; ".join(f"{n} {reason}" for reason, n in Counter(problems.values()).most_common(3))
        raise UserError(f"{options.scans}: none of {len(volumes)} volumes can be used: {why}")
    ensure_writable(options.out)
    rows = rows_before(scans, options)
    before = {row["participant"]: row["split"] for row in rows.values()}
    scans = [scan for scan in scans if has_header(scan, problems, options)]
    try:
        split = split_participants(scans, options.test_share, options.seed, before)
    except UserError:
        print_problems(problems)
        raise
    with lock_folder(options.out, "importing"):
        if rows_before(scans, options) != rows:
            raise UserError(f"{options.out}: another process imported there; run this again")
        delete_partials(options.out)
        cut_all(scans, split, rows, problems, options)
    if gone := sorted(rows.keys() - {scan.name for scan in scans}):
        print_once(f"note: {len(gone)} scans of an earlier import stay: {', '.join(gone[:5])}")
    print_report([scan for scan in scans if scan.name in rows], split, problems, options)


def cut_all(
    scans: list[Scan],
    split: dict[str, str],
    rows: dict[str, dict[str, str]],
    problems: dict[str, str],
    options: ImportOptions,
) -> None:
    """Cut and write what is not there yet; moves `rows`, of which the manifest is written.

    The first manifest holds what is planned: a kill leaves nothing that the same command would not
    go on with.
    """
    todo = [scan for scan in scans if not is_done(scan, rows.get(scan.name), options)]
    rows |= {s.name: row_of(s, split[s.entry.participant], None, options) for s in todo}
    manifest, guard = options.out / MANIFEST, threading.Lock()
    write_manifest(rows, manifest)
    written = time.monotonic()

    def work(scan: Scan) -> None:
        nonlocal written
        side = split[scan.entry.participant]
        try:
            made = cut(*read_volume(scan.path, options.unoriented), options)
            row = row_of(scan, side, made, options)
        except Exception as error:  # nibabel's are of many types
            problems[str(scan.path.relative_to(options.scans))] = first_line(error)
            for path in slice_paths(scan, side, options):  # of the file as it was before
                path.unlink(missing_ok=True)
            with guard:
                del rows[scan.name]
            return
        write_slices(scan, side, made, options)
        with guard:
            rows[scan.name] = row
            if time.monotonic() > written + MANIFEST_SECONDS:
                write_manifest(rows, manifest)
                written = time.monotonic()

    try:
        map_on_cores(work, todo, "scans", "scan")
    finally:
        write_manifest(rows, manifest)


def has_header(scan: Scan, problems: dict[str, str], options: ImportOptions) -> bool:
    """Whether a volume can be read by its header: a bad one shall take no place in test."""
    try:
        find_converter() if scan.path.is_dir() else open_volume(scan.path, options.unoriented)
    except Exception as error:  # nibabel's are of many types
        problems[str(scan.path.relative_to(options.scans))] = first_line(error)
        return False
    return True


def print_problems(problems: dict[str, str]) -> None:
    """Say which volumes are left out, and why."""
    if problems:
        print_once(f"{len(problems)} volumes left out:")
    for name, why in sorted(problems.items()):
        print_once(f"  {name}: {why}")


def print_report(
    scans: list[Scan], split: dict[str, str], problems: dict[str, str], options: ImportOptions
) -> None:
    """Say what was imported, how even the split is, and what was left out."""
    for line in balance(scans, split):
        print_once(line)
    print_problems(problems)
    if not scans:
        raise UserError(f"{options.scans}: no volume could be used")
    for label, side in one_sided(scans, split):
        text = f"all volumes of class {label} that could be read are in {side}/"
        raise UserError(f"{text}; use another --out, without those that could not")
    people = len({scan.entry.participant for scan in scans})
    print_once(f"{len(scans)} scans of {people} participants in {options.out}")
    print_once(f"look at them: python prepare.py check {options.out}")
