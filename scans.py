"""Scans and a spreadsheet in, a training set out: volumes become slices in class folders.

    python dataset.py import SCANS --out AD_NC --table subjects.csv

A volume is a NIfTI file or, with the program dcm2niix, a folder of DICOM files. Places are in mm of
a volume's affine: x to the right of the patient, y to the front, z up. Nothing is registered and no
skull is stripped: what is done to the scans before is done to the slices.
"""

import csv
import hashlib
import io
import logging
import math
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import nibabel
import numpy as np
import tyro
from scipy import ndimage

from config import UserError
from dataset import SPLITS
from metrics import otsu
from storage import save_grey, sweep, write_atomically
from tables import (
    MANIFEST,
    Entry,
    EntryFinder,
    participant_in,
    plain_name,
    read_manifest,
    read_rows,
)
from utils import ensure_writable, first_line, map_on_cores, say

SUFFIXES = (".nii", ".nii.gz")
MAX_VOXELS = 512**3
MOST_DEFLATED = 1100  # times its size that a gzip file can hold
VOXEL_MM, EXTENT_MM = (0.1, 12), (60, 600)  # of a volume: what may be a head
DIAMETER_MM = (90, 260)  # of a head
COARSE = 2  # mm, in which a head is looked for
LEVEL_BELOW_TOP = 0.43  # of a head's diameter: the lateral ventricles, to about 6 mm
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
CONVERTER = "dcm2niix"
CONVERT_SECONDS = 600
MANIFEST_SECONDS = 5  # of work that a kill may cost


@dataclass(frozen=True)
class Import:
    """What to cut. Raises UserError naming the option, its value and what is allowed."""

    scans: tyro.conf.Positional[Path]
    """Folder of NIfTI files or of folders of DICOM files, at any depth."""
    out: Path
    """Folder for OUT/{train,test}/CLASS/ID_SLICE.png and manifest.csv; the same command resumes."""
    table: Path | None = None
    """CSV or TSV of scans or participants (ADNI, OASIS, BIDS); None: SCANS/CLASS/ is the class."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns that are called otherwise, such as: class DX age AGE. Also scan, participant, sex."""
    classes: tuple[str, ...] | None = None
    """Classes to take; None: all."""
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Across which the slices lie."""
    level: float | None = None
    """Middle of the slices, mm of the affine; None: the ventricles' by the size of the head."""
    slices: int = 20
    """Slices of a scan, 1 or more."""
    spacing: float = 1.0
    """mm from one to the next, above 0."""
    size: int = 240
    """Side of a slice in mm, of a pixel each, around the head: 64 to 512."""
    window: tuple[float, float] | None = None
    """Values that become black and white; None: 0 (or a percentile below 0), 99.9th percentile."""
    bits: Literal[8, 16] = 8
    """Of a pixel."""
    test_share: float = 0.2
    """Of the participants of each class, above 0, below 1."""
    seed: int = 0
    """Of the split."""
    unoriented: bool = False
    """Take volumes whose header gives no orientation, as they lie."""

    def __post_init__(self) -> None:
        for name, valid, allowed in (
            ("slices", 1 <= self.slices <= 1000, "1 to 1000"),
            ("spacing", 0 < self.spacing <= 100, "above 0, up to 100 mm"),
            ("size", 64 <= self.size <= 512, "64 to 512"),
            ("test_share", 0 < self.test_share < 1, "above 0, below 1"),
            ("window", self.window is None or self.window[0] < self.window[1], "black below white"),
        ):
            if not valid:
                raise UserError(f"{name} = {getattr(self, name)}: must be {allowed}")
        if self.axis != "axial" and self.level is None:
            raise UserError(f"axis = {self.axis}: needs a level in mm")


# Finding


class Scan(NamedTuple):
    """A volume on disk, the name that its slices get, and what is known of it."""

    path: Path
    name: str
    entry: Entry


def find_volumes(root: Path) -> list[Path]:
    """NIfTI files, and folders that hold DICOM files. Raises UserError if there are none."""
    if not root.is_dir():
        raise UserError(f"scans = {root}: no such folder")
    files = sorted(p for p in root.rglob("*") if p.name[0] != "." and p.is_file())
    found = [path for path in files if path.name.lower().endswith(SUFFIXES)]
    found += sorted({path.parent for path in files if is_dicom(path)})
    if not found:
        raise UserError(f"{root} holds no NIfTI file (.nii, .nii.gz) and no DICOM folder")
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


def stem_of(path: Path) -> str:
    return re.sub(r"(\.nii)?(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def match(options: Import, volumes: list[Path], problems: dict[str, str]) -> list[Scan]:
    """Each volume with its class and participant; why not, for the others, in `problems`.

    Raises:
        UserError: a table that cannot be read.
    """
    finder = EntryFinder(options.table, options.columns) if options.table else None
    found, names = [], Counter(stem_of(path) for path in volumes)
    for path in volumes:
        inside = path.relative_to(options.scans)
        try:
            if finder:
                entry = finder.named_in(inside.parent / stem_of(path))
                if entry is None:
                    raise ValueError("no row of the table names it")
            elif len(inside.parts) < 2:
                raise ValueError("lies in no class folder, and there is no --table")
            else:
                person = participant_in(str(inside))
                entry = Entry("", person or stem_of(path), inside.parts[0], math.nan, "")
            if not plain_name(entry.label):
                raise ValueError(
                    "its row has no class" if options.table else "its folder is no class"
                )
        except ValueError as error:
            problems[str(inside)] = str(error)
            continue
        unique = names[stem_of(path)] == 1
        name = entry.scan or (stem_of(path) if unique else str(inside.parent / stem_of(path)))
        if options.classes is None or entry.label in options.classes:
            found.append(Scan(path, re.sub(r"[^A-Za-z0-9.+_-]+", "-", name).lstrip("."), entry))
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
    for label in sorted({s.entry.label for s in scans}):
        sides = {split[s.entry.participant] for s in scans if s.entry.label == label}
        if len(sides) < 2:
            raise UserError(f"class {label}: too few participants to split them")
    return split


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


# Reading volumes


def read_volume(path: Path, unoriented: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 [X, Y, Z] and the affine [4, 4], voxel to mm. Raises ValueError with a reason.

    What is not a number counts as 0.
    """
    if path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            return read_volume(convert_dicom(path, Path(folder)), unoriented)
    if path.stat().st_size == 0:
        raise ValueError("empty file")
    volume = nibabel.load(path)
    header = volume.header
    if not isinstance(volume, nibabel.Nifti1Pair):  # NIfTI-2 too
        raise ValueError(f"{type(volume).__name__} is not NIfTI")
    shape = [n for i, n in enumerate(volume.shape) if i < 3 or n != 1]
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"is no volume but {' x '.join(map(str, volume.shape))}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"holds values of type {dtype}, not numbers")
    size, needed = path.stat().st_size, math.prod(shape) * dtype.itemsize
    if math.prod(shape) > MAX_VOXELS or needed > size * MOST_DEFLATED:
        raise ValueError(
            f"{' x '.join(map(str, shape))} voxels: too many for a file of {size} bytes"
        )
    if path.suffix.lower() == ".nii" and needed > size:
        raise ValueError(f"truncated: {size} bytes of {needed}")
    if not unoriented and not header["sform_code"] and not header["qform_code"]:
        raise ValueError("its header gives no orientation (sform and qform code 0): --unoriented")
    affine = volume.affine
    voxel = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    extent = voxel * shape
    if not (VOXEL_MM[0] <= voxel.min() <= voxel.max() <= VOXEL_MM[1]):
        raise ValueError(f"voxels of {' x '.join(f'{v:.3g}' for v in voxel)} mm")
    if not (EXTENT_MM[0] <= extent.min() <= extent.max() <= EXTENT_MM[1]):
        raise ValueError(f"is {' x '.join(f'{v:.0f}' for v in extent)} mm large: no head")
    if abs(np.linalg.det(affine[:3, :3] / voxel)) < 0.5:
        raise ValueError("its axes do not stand upright on each other")
    values = np.asanyarray(volume.dataobj).reshape(shape).astype(np.float32)
    if np.isinf(values).any():
        raise ValueError("holds values that are infinite")
    return np.nan_to_num(values, copy=False, nan=0), affine


def convert_dicom(folder: Path, out: Path) -> Path:
    """The one series of a folder as a NIfTI file. Raises ValueError with a reason."""
    program = shutil.which(CONVERTER)
    if program is None:
        raise ValueError(f"DICOM needs {CONVERTER}: pip install {CONVERTER}")
    command = [program, "-z", "n", "-b", "n", "-d", "0", "-f", "series%s", "-o", out, folder]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CONVERT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{CONVERTER} took more than {CONVERT_SECONDS} s") from error
    found = sorted(out.glob("*.nii"))
    if len(found) != 1:
        last = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{CONVERTER} made {len(found)} volumes of it, not one: {' '.join(last)}")
    return found[0]


# Cutting


def corners_of(shape: Sequence[int]) -> np.ndarray:
    """Indices of the eight corners of a grid. -> [3, 8]."""
    return np.indices((2, 2, 2)).reshape(3, 8) * (np.array(shape) - 1)[:, None]


def resample(
    values: np.ndarray,
    affine: np.ndarray,
    corner: np.ndarray,
    steps: np.ndarray,
    shape: Sequence[int],
    order: int = 3,
) -> np.ndarray:
    """Values at the points corner + steps @ (i, j, k), in mm, by splines. -> float32 of `shape`.

    Where voxels lie closer than the points, they are smoothed before. Outside is 0, or the least
    value if that is lower.
    """
    to_voxel = np.linalg.inv(affine)
    matrix, offset = to_voxel[:3, :3] @ steps, to_voxel[:3, :3] @ corner + to_voxel[:3, 3]
    ends = offset[:, None] + matrix @ corners_of(shape)
    spread = np.abs(matrix).max(1)  # voxels from one point to the next
    margin = 8 + 2 * spread  # of which a spline, or the smoothing, sees nothing
    low = np.clip(np.floor(ends.min(1) - margin), 0, values.shape).astype(int)
    high = np.clip(np.ceil(ends.max(1) + margin), 0, values.shape).astype(int)
    outside = float(min(values.min(), 0))
    if (high - low < 2).any():
        return np.full(shape, outside, np.float32)
    part = values[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    part = ndimage.gaussian_filter(part, 0.5 * np.sqrt(np.maximum(spread**2 - 1, 0)))
    found = ndimage.affine_transform(
        part, matrix, offset - low, tuple(shape), np.float32, order, cval=outside
    )
    return found.clip(min(part.min(), outside), part.max())  # splines overshoot at edges


class Head(NamedTuple):
    """Where a head lies in mm, and the value above which it does."""

    low: np.ndarray  # least x, y, z
    high: np.ndarray
    diameter: float  # of a disc as large as its largest axial section
    threshold: float


def find_head(values: np.ndarray, affine: np.ndarray) -> Head:
    """The largest thing brighter than half of Otsu's threshold, down to 110 mm below its top.

    Raises:
        ValueError: nothing that may be a head.
    """
    ends = affine[:3, :3] @ corners_of(values.shape) + affine[:3, 3:]
    low, high = ends.min(1), ends.max(1)
    shape = np.ceil((high - low) / COARSE).astype(int) + 1
    coarse = resample(values, affine, low, np.eye(3) * COARSE, shape, order=1)
    black, white = np.percentile(coarse, [1, 99.9]).tolist()
    if white <= black:
        raise ValueError("all of it has one value")
    limit = otsu(((coarse - black) / (white - black) * 255).clip(0, 255)) / 2
    threshold = black + limit / 255 * (white - black)
    parts, count = ndimage.label(ndimage.binary_opening(coarse > threshold, iterations=2))
    if count == 0:
        raise ValueError("holds nothing that may be a head")
    head = ndimage.binary_fill_holes(parts == 1 + np.bincount(parts.ravel())[1:].argmax())
    top = np.flatnonzero(head.any((0, 1)))[-1]
    head[:, :, : max(0, top - round(110 / COARSE))] = False
    diameter = 2 * math.sqrt(head.sum((0, 1)).max() * COARSE**2 / math.pi)
    if not DIAMETER_MM[0] <= diameter <= DIAMETER_MM[1]:
        raise ValueError(f"its largest thing is {diameter:.0f} mm wide: no head")
    places = np.argwhere(head)
    return Head(low + places.min(0) * COARSE, low + places.max(0) * COARSE, diameter, threshold)


class Cut(NamedTuple):
    """Slices of a volume, lowest first."""

    images: np.ndarray  # float32 [slices, size, size]
    levels: np.ndarray  # mm [slices]
    black: float
    white: float


def cut(values: np.ndarray, affine: np.ndarray, options: Import) -> Cut:
    """The slices asked for. Raises ValueError with a reason.

    In a picture the patient's left is left, or the front is right (sagittal); front or top is up.
    """
    head, axis = find_head(values, affine), AXES[options.axis]
    middle = options.level
    if middle is None:
        middle = head.high[2] - LEVEL_BELOW_TOP * head.diameter
    levels = middle + (np.arange(options.slices) - (options.slices - 1) / 2) * options.spacing
    column, row = [i for i in range(3) if i != axis]
    corner, steps, half = (head.low + head.high) / 2, np.zeros((3, 3)), (options.size - 1) / 2
    corner += np.eye(3)[row] * half - np.eye(3)[column] * half
    corner[axis] = levels[0]
    steps[axis, 0], steps[row, 1], steps[column, 2] = options.spacing, -1, 1
    images = resample(values, affine, corner, steps, (options.slices, options.size, options.size))
    inside = images[images > head.threshold]
    if len(inside) < 0.05 * images.size:
        raise ValueError(f"shows no head from {levels[0]:.0f} to {levels[-1]:.0f} mm")
    low = float(np.percentile(images, 0.1)) if values.min() < 0 else 0.0
    black, white = options.window or (low, float(np.percentile(inside, 99.9)))
    if white <= black:
        raise ValueError(f"values from {black:g} to {white:g}: no contrast")
    return Cut(images, levels, black, white)


# Writing


def sha256_of(path: Path) -> str:
    """Of a file, or of the files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def choices(options: Import) -> dict[str, str]:
    """Every choice that concerns all scans, for the manifest."""
    window = "percentile" if options.window is None else " ".join(f"{v:g}" for v in options.window)
    return {
        "axis": options.axis,
        "level": "ventricles" if options.level is None else f"{options.level:g} mm",
        "slices": str(options.slices),
        "spacing_mm": f"{options.spacing:g}",
        "size": str(options.size),
        "window": window,
        "bits": str(options.bits),
        "test_share": f"{options.test_share:g}",
        "seed": str(options.seed),
    }


def row_of(scan: Scan, side: str, made: Cut, options: Import) -> dict[str, str]:
    """A scan's row of the manifest."""
    entry = scan.entry
    return {
        "id": scan.name,
        "participant": entry.participant,
        "class": entry.label,
        "age": "" if math.isnan(entry.age) else f"{entry.age:g}",
        "sex": entry.sex,
        "split": side,
        "source": str(scan.path.relative_to(options.scans)),
        "sha256": sha256_of(scan.path),
        "lowest_mm": f"{made.levels[0]:.2f}",
        "highest_mm": f"{made.levels[-1]:.2f}",
        "black": f"{made.black:g}",
        "white": f"{made.white:g}",
        **choices(options),
    }


def write_slices(scan: Scan, side: str, made: Cut, options: Import) -> None:
    """One PNG for each slice."""
    top = 2**options.bits - 1
    grey = (made.images - made.black) * (top / (made.white - made.black))
    for number, image in enumerate(grey.round().clip(0, top).astype(f"uint{options.bits}")):
        save_grey(image, options.out / side / scan.entry.label / f"{scan.name}_{number}.png")


def write_manifest(rows: dict[str, dict[str, str]], path: Path) -> None:
    """Write the rows in the order of their ids."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(next(iter(rows.values()))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(path, lambda partial: partial.write_bytes(content))


def rows_before(scans: list[Scan], options: Import) -> dict[str, dict[str, str]]:
    """Rows of the manifest that an earlier call left, by id.

    Raises:
        UserError: it made other choices, or has other classes or participants for these scans.
    """
    path = options.out / MANIFEST
    if not path.exists():
        if options.out.is_dir() and any(p.name[0] != "." for p in options.out.iterdir()):
            raise UserError(f"out = {options.out}: is not empty, and has no {MANIFEST}")
        return {}
    read_manifest(options.out)
    rows = {row["id"]: row for row in read_rows(path)[1]}
    wanted = {scan.name: scan.entry for scan in scans}
    for name, row in rows.items():
        entry = wanted.get(name)
        expected = {"class": entry.label, "participant": entry.participant} if entry else {}
        for key, value in (choices(options) | expected).items():
            if row.get(key) != value:
                raise UserError(
                    f"{path}: {name} has {key} = {row.get(key)}, now {value}; use another --out"
                )
        if row.get("split") not in SPLITS or not plain_name(name):
            raise UserError(f"{path}: {name[:40]!r} has no split, or is no name")
    return rows


def is_done(scan: Scan, row: dict[str, str] | None, options: Import) -> bool:
    """Whether all slices of a scan are there, of a file that is still the same."""
    if row is None:
        return False
    folder = options.out / row["split"] / scan.entry.label
    whole = all((folder / f"{scan.name}_{i}.png").exists() for i in range(options.slices))
    return whole and row.get("sha256") == sha256_of(scan.path)


def import_scans(options: Annotated[Import, tyro.conf.arg(name="")]) -> None:
    """Cut every scan into slices; say at the end what was left out, and why.

    Raises:
        UserError: bad options, table or folder, before anything is written; no scan that can be
            used.
    """
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what is wrong is said here
    volumes, problems = find_volumes(options.scans), {}
    scans = match(options, volumes, problems)
    if not scans:
        why = "; ".join(f"{n} {reason}" for reason, n in Counter(problems.values()).most_common(3))
        raise UserError(f"{options.scans}: none of {len(volumes)} volumes can be used: {why}")
    ensure_writable(options.out)
    rows = rows_before(scans, options)
    before = {row["participant"]: row["split"] for row in rows.values()}
    split = split_participants(scans, options.test_share, options.seed, before)
    todo = [scan for scan in scans if not is_done(scan, rows.get(scan.name), options)]
    path, lock, written = options.out / MANIFEST, threading.Lock(), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(options.out)

    def work(scan: Scan) -> None:
        nonlocal written
        side = split[scan.entry.participant]
        try:
            made = cut(*read_volume(scan.path, options.unoriented), options)
            row = row_of(scan, side, made, options)
        except Exception as error:  # nibabel's are of many types
            problems[str(scan.path.relative_to(options.scans))] = first_line(error)
            return
        write_slices(scan, side, made, options)
        with lock:
            rows[scan.name] = row
            if time.monotonic() > written + MANIFEST_SECONDS:
                write_manifest(rows, path)
                written = time.monotonic()

    try:
        map_on_cores(work, todo, "scans", "scan")
    finally:
        if rows:
            write_manifest(rows, path)
    report([scan for scan in scans if scan.name in rows], split, problems, options)


def report(
    scans: list[Scan], split: dict[str, str], problems: dict[str, str], options: Import
) -> None:
    """Say what was imported, how even the split is, and what was left out."""
    for line in balance(scans, split):
        say(line)
    if problems:
        say(f"{len(problems)} volumes left out:")
    for name, why in sorted(problems.items()):
        say(f"  {name}: {why}")
    if not scans:
        raise UserError(f"{options.scans}: no volume could be used")
    for label in sorted({scan.entry.label for scan in scans}):
        sides = {split[s.entry.participant] for s in scans if s.entry.label == label}
        if len(sides) < 2:
            say(f"warning: all volumes of class {label} that could be read are in {sides.pop()}/")
    people = len({scan.entry.participant for scan in scans})
    say(f"{len(scans)} scans of {people} participants in {options.out}")
    say(f"look at them: python dataset.py check {options.out}")
