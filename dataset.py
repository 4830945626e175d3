"""Find, decode, augment and load brain slices that lie in class folders.

Layout: ROOT/{train,test}/CLASS/ID_SLICE.jpeg, or ROOT/CLASS/ID_SLICE.jpeg, which is then split by
participant. The id of a scan is the file name up to its last underscore. Its participant is the one
that a table or ROOT/manifest.csv names, else the one that its id shows (sub-01, 002_S_0295,
OAS1_0001), else the scan counts as a participant of its own. ADNI's set calls its classes AD
(Alzheimer's disease) and NC (normal control; CN in ADNI's own tables).
"""

import errno
import hashlib
import math
import os
import shutil
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import utils
from assets.demo_brains import write_demo
from config import Config, UserError
from participants.matching import PARTICIPANTS, find_entries, participants_by_scan
from participants.names import normalized, number_of
from participants.tables import MANIFEST, Entry

SPLITS = ("train", "test")
MAX_CLASSES = 20  # more class folders than this are probably patients
WAIT_SECONDS = 300  # a worker that needs longer for a batch counts as lost
SAMPLE_FORMAT, PHOTOMETRIC = 339, 262  # TIFF tags
# Formats that Pillow reads by itself, without starting another program
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
MAX_SIDE = 8192  # pixels, of a file's longer side
TEST_SHARE = 0.2  # of the participants of each class, for a folder without train/ and test/
LEFT_OUT = "left_out.csv"  # written by the import
MACOSX = "__MACOSX"  # a folder that its archives leave behind
MAX_SEEN = 20_000  # files that are looked at where slices are missing
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".7z", ".rar")
# Names of folders, in any case, that stand for a split
SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation")
CACHE_VERSION = 2  # part of every cache key: raise it when decoding changes


class SliceFile(NamedTuple):
    """One slice on disk: `label` is the index of its class folder in sorted order."""

    path: Path
    participant: str
    label: int

    @property
    def scan(self) -> str:
        """Id of the scan, which has one grey scale: the file name up to its last underscore."""
        return self.path.stem.rpartition("_")[0] or self.path.stem


@dataclass(frozen=True)
class Slices:
    """Decoded slices."""

    images: np.ndarray  # uint8 [n, R, R]
    labels: np.ndarray  # int64 [n]
    participants: np.ndarray  # [n]
    classes: list[str]
    positions: np.ndarray | None = None  # [n], see `find_positions`; None: no condition
    scans: np.ndarray | None = None  # [n], None for samples
    files: np.ndarray | None = None  # [n] paths within the data's folder; None: no files

    @property
    def c_dim(self) -> int:
        """Number of entries of c."""
        return utils.width_of_c(len(self.classes), self.positions is not None)

    def take(self, rows: np.ndarray | slice) -> "Slices":
        """Some of the slices: copies if `rows` is an array, views if it is a slice."""
        optional = (self.positions, self.scans, self.files)
        optional = (None if x is None else x[rows] for x in optional)
        parts = self.images[rows], self.labels[rows], self.participants[rows]
        return Slices(*parts, self.classes, *optional)

    def conditions(self) -> Tensor:
        """c of each slice. -> [n, c_dim]."""
        return utils.conditions(self.labels, self.positions, self.c_dim)


Splits = dict[str, list[SliceFile]]


# Finding


def rows_by_scan(files: list[SliceFile]) -> list[list[int]]:
    """Indices into `files`, grouped by scan, in order."""
    rows_of = defaultdict(list)
    for row, file in enumerate(files):
        rows_of[file.path.parent, file.scan].append(row)
    return list(rows_of.values())


def visible_paths(folder: Path) -> list[Path]:
    """All files and folders in a folder but hidden ones. Raises UserError if it cannot be read."""
    try:
        return [path for path in folder.iterdir() if path.name[0] != "." and path.name != MACOSX]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def image_suffixes() -> set[str]:
    """Endings of the names of image files."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def what_to_do_with(path: Path) -> str:
    """What lies at a path that holds no slices where they should be, and what to do, or ""."""
    walk = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    files = [path] if path.is_file() else list(islice(walk, MAX_SEEN))
    files = [file for file in files if file.name[0] != "."]
    ends = {"NIfTI volume": (".nii", ".nii.gz"), "archive": ARCHIVES, "image": image_suffixes()}
    found = {k: [f for f in files if f.name.lower().endswith(tuple(e))] for k, e in ends.items()}
    found["DICOM file"] = [file for file in files if utils.is_dicom(file)]
    for kind in ("NIfTI volume", "DICOM file"):
        if found[kind]:
            command = f"python prepare.py import {path if path.is_dir() else path.parent}"
            return f"; found {len(found[kind])} {kind}(s): {command} --out FOLDER cuts slices"
    images = sorted(found["image"])
    folders = {file.parent for file in images}
    parents = {folder.parent for folder in folders}
    roots = {p.parent if p.name.lower() in SPLIT_NAMES else p for p in parents}
    if path in folders:
        text = f"{len(images)} images lie in {path} itself"
        return f"; {text}: they belong into a folder for each class, such as {path / 'NC'}"
    if images and path not in parents | roots:
        deep = f"images lie too deep, such as {images[0]}: move them to CLASS/SCAN_SLICE"
        return f"; did you mean {min(roots)}?" if len(roots) == 1 else f"; {deep}"
    return f"; unpack {found['archive'][0]} first" if found["archive"] else ""


def list_slices(folder: Path, label: int) -> list[SliceFile]:
    """The images of a class folder, sorted by scan and slice. Raises UserError if it has none."""
    suffixes = image_suffixes()
    paths = [path for path in visible_paths(folder) if path.suffix.lower() in suffixes]
    if not paths:
        raise UserError(f"class folder {folder} holds no image files")
    files = [SliceFile(p, "", label) for p in paths]
    files = [f._replace(participant=f.scan) for f in files]
    return sorted(files, key=lambda f: (f.scan, number_of(f.path.stem), f.path.name))


def split_by_participant(files: list[SliceFile]) -> Splits:
    """Move a share of each class's participants to test, by a hash. Raises UserError if too few."""
    test: set[str] = set()
    for label in sorted({f.label for f in files}):
        names = sorted({f.participant for f in files if f.label == label})
        names.sort(key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        test.update(names[: math.ceil(TEST_SHARE * len(names))])
    splits: Splits = {split: [] for split in SPLITS}
    for file in files:
        splits["test" if file.participant in test else "train"].append(file)
    present = set.intersection(*({f.label for f in part} for part in splits.values()))
    for file in files:
        if file.label not in present:
            text = "too few participants to split them, by files named SCAN_SLICE"
            raise UserError(f"{file.path.parent}: {text}; make train/ and test/")
    return splits


def find_class_folders(folder: Path) -> tuple[list[str], list[SliceFile]]:
    """Class names and files of FOLDER/CLASS/*. Raises UserError if there are none."""
    classes = [path.name for path in visible_paths(folder) if path.is_dir()]
    classes.sort(key=normalized)  # both ways to write an accent have one place
    try:
        if not classes:
            raise UserError(f"{folder} holds no class folders (CLASS/ID_SLICE.jpeg)")
        return classes, [f for i, c in enumerate(classes) for f in list_slices(folder / c, i)]
    except UserError as error:
        raise UserError(f"{error}{what_to_do_with(folder)}") from error


def find_slices(
    root: Path, any_classes: bool = False, table: Path | None = None
) -> tuple[list[str], Splits]:
    """As `read_splits`; also raises UserError if a participant is on both sides of the split."""
    classes, splits, _ = read_splits(root, any_classes, table)
    for problem in shared_participants(splits):
        raise UserError(f"{root}: {problem}")
    return classes, splits


def shared_participants(splits: Splits) -> list[str]:
    """A list with a message if participants are on both sides of the split, else an empty list."""
    shared = {f.participant for f in splits["train"]} & {f.participant for f in splits["test"]}
    first = ", ".join(sorted(shared)[:5])
    text = f"{len(shared)} participant(s) on both sides of the split: {first}"
    advice = "move all slices to CLASS folders without train/ and test/: then they are split anew"
    names = "if these name no people, rename files to SCAN_SLICE or give --table"
    return [f"{text}; {advice}; {names}"] if shared else []


def read_splits(
    root: Path, any_classes: bool, table: Path | None = None, columns: Mapping[str, str] = {}
) -> tuple[list[str], Splits, dict[str, Entry]]:
    """Class names, the files of each split with their participants, and the entries of scans.

    Raises UserError for a missing folder, no classes, an empty class, other classes in test, a
    damaged manifest or table or, unless `any_classes`, classes that look like patients.
    """
    if not root.is_dir():
        kind = f"is no folder{what_to_do_with(root)}" if root.exists() else "no such folder"
        raise UserError(f"data_root = {root}: {kind}")
    has_split = (root / "train").is_dir()
    if not has_split or not (root / "test").is_dir():
        folders = sorted(path.name for path in visible_paths(root) if path.is_dir())
        similar = [name for name in folders if name.lower() in SPLIT_NAMES and name != "train"]
        if has_split:
            rename = f"rename {', '.join(similar)} to test"
            advice = rename if similar else "add test/, or leave out both"
            raise UserError(f"{root} has train/ but no test/; {advice}")
        if len(similar) > 1 and any("train" in name.lower() for name in similar):
            raise UserError(f"{root} has {' and '.join(similar)}: rename them to train and test")
    parents = [root / split for split in SPLITS] if has_split else [root]
    names, found = zip(*map(find_class_folders, parents), strict=True)
    if has_split and [*map(normalized, names[0])] != [*map(normalized, names[1])]:
        raise UserError(f"classes differ: {parents[0]} has {names[0]}, {parents[1]} {names[1]}")
    scans = {file.scan for files in found for file in files}
    entries = find_entries(scans, root, table, columns)
    whose = participants_by_scan(scans, entries)
    found = [[f._replace(participant=whose[f.scan]) for f in files] for files in found]
    if not any_classes and (doubt := doubtful_classes(names[0], found[0])):
        raise UserError(f"{root}: {doubt}; if these are the classes, add --any-classes")
    splits = dict(zip(SPLITS, found, strict=True)) if has_split else split_by_participant(found[0])
    return names[0], splits, entries


def doubtful_classes(classes: list[str], files: list[SliceFile]) -> str | None:
    """A message if the class folders look like patients, else None."""
    found = f"{len(classes)} class folders ({', '.join(classes[:3])}, ...)"
    if len(classes) > MAX_CLASSES:
        return f"{found}, more than {MAX_CLASSES}, may be patients"
    if len(classes) == len({(f.label, f.participant) for f in files}) > 2:
        return f"{found} with a single participant each may be patients"
    return None


def ignored_files(root: Path, used: set[Path]) -> list[str]:
    """How many files under `root` are unused, in each topmost folder that holds no used file."""
    parents = {parent for path in used for parent in path.parents}
    counts: Counter[Path] = Counter()
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name[0] != "."]
        unused = sum(n[0] != "." and Path(folder, n) not in used for n in files)
        top = Path(folder)
        while top not in parents and top.parent not in parents and top != root:
            top = top.parent
        counts[top] += unused
    return [f"{n} in {folder}" for folder, n in sorted(counts.items()) if n]


def describe(
    root: Path | None, classes: list[str], splits: Splits, table: Path | None = None
) -> None:
    """Print, on rank 0, the participants and slices of each class; note odd files in `root`."""
    if utils.rank() > 0:
        return
    for split, files in splits.items():
        parts = []
        for label, name in enumerate(classes):
            own = [f.participant for f in files if f.label == label]
            parts.append(f"{name} {len(set(own))} participants, {len(own)} slices")
        utils.print_once(f"{split}: {'; '.join(parts)}")
    if root is None:
        return
    files = splits["train"] + splits["test"]
    known = {root / name for name in (MANIFEST, LEFT_OUT, *PARTICIPANTS)}
    if table and table.resolve().parent == root.resolve():
        known.add(root / table.name)
    if ignored := ignored_files(root, {f.path for f in files} | known):
        more = f", and {len(ignored) - 5} more folders" if len(ignored) > 5 else ""
        utils.print_once(f"note: unused files: {'; '.join(ignored[:5])}{more}")
    if len({f.participant for f in files}) == len(files):
        text = f"such as {files[0].path.name}; if some show the same scan, name them ID_SLICE"
        utils.print_once(f"note: every file counts as a participant of its own, {text}")


# Decoding


def deep_values(image: Image.Image) -> np.ndarray | None:
    """The values as stored in the file, if they are not 8-bit unsigned; else None."""
    tags = getattr(image, "tag_v2", {})  # only TIFF has tags; Pillow ignores some of them
    signed, white_is_zero = tags.get(SAMPLE_FORMAT, (1,))[0] == 2, tags.get(PHOTOMETRIC) == 0
    values = np.array(image)
    if image.mode == "L" and signed:
        return values.view(np.int8)
    if image.mode == "I" and tags and not signed:
        values = values.view(np.uint32)
    if image.mode.startswith("I;16") and white_is_zero:
        values = 65535 - values
    return values if image.mode == "F" or image.mode.startswith("I") else None


def decode(path: Path) -> Tensor:
    """One file, upright, as grey [1, H, W]: uint8, or float32 with the file's values if not 8-bit.

    Raises an exception of some type if the file is damaged or does not hold exactly one image.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # reading from a pipe could wait forever
    if not (content := path.read_bytes()):
        raise ValueError("empty file")
    if content[1:4] == b"PNG" and content[24:26] in (b"\x10\2", b"\x10\4", b"\x10\6"):
        raise ValueError("16 bits of each colour cannot be read: save it as grey")
    # Pillow 13.0 rotates an uncompressed TIFF wrongly when it maps the file: decode from memory
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        if max(image.size) > MAX_SIDE:  # checked before `load` takes memory
            raise ValueError("{} x {} pixels: a side has at most {}".format(*image.size, MAX_SIDE))
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("holds more than one image")
        image.load()
        if image.format != "TIFF":  # Pillow turns TIFFs upright while loading
            ImageOps.exif_transpose(image, in_place=True)
        if (deep := deep_values(image)) is not None:
            values = torch.from_numpy(deep.astype(np.float32))[None]
            if not values.isfinite().all():
                raise ValueError("holds values that are not finite")
            return values
        if "A" in image.getbands() or "transparency" in image.info:
            rgba = image.convert("RGBA")  # transparent pixels become black
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
        grey = image if image.mode == "L" else image.convert("RGB").convert("L")
        return torch.from_numpy(np.array(grey))[None]


def pad_to_square(image: Tensor) -> Tensor:
    """[1, H, W] -> [1, S, S] with S = max(H, W): adds black borders, stretches nothing."""
    H, W = image.shape[-2:]
    top, left = (max(H, W) - H) // 2, (max(H, W) - W) // 2
    return F.pad(image, (left, max(H, W) - W - left, top, max(H, W) - H - top))


def decode_scan(paths: list[Path]) -> tuple[list[Tensor], tuple[float, float], list[str]]:
    """The slices of one scan, the values that become black and white, and a list of problems.

    8-bit files keep their values. Otherwise white is the 99.9th percentile of all slices, so that
    they stay comparable and no single bright pixel darkens them; black is 0, or the 0.1th
    percentile if some values are negative.
    """
    images, problems = [], []
    for path in paths:
        try:
            images.append(decode(path))
        except UnidentifiedImageError:
            problems.append(f"{path}: not an image")
        except Exception as error:  # Pillow raises many types of errors
            reason = getattr(error, "strerror", None) or utils.first_line(error)
            problems.append(f"{path}: {reason}")
    deep = [image.is_floating_point() for image in images]
    if any(deep) and not all(deep):
        problems.append(f"{paths[0]}: 8-bit and other files in one scan have no common grey scale")
    if problems or not any(deep):
        return images, (0.0, 255.0), problems
    values = np.concatenate([image.flatten().numpy() for image in images])
    low, high = np.percentile(values, [0.1, 99.9])
    return images, (float(low) if values.min() < 0 else 0.0, float(high)), []


def to_grey_levels(image: Tensor, low: float, high: float) -> Tensor:
    """Scale an image so that `low` becomes 0 and `high` 255; other values may lie outside."""
    return (image.float() - low) * (255 / max(high - low, 1e-8))


def resized_scan(paths: list[Path], resolution: int) -> tuple[Tensor | None, list[str]]:
    """All slices of one scan as uint8 [n, R, R], and no problem; or None, and the problems."""
    from torchvision.transforms import v2  # takes seconds: it imports the compiler

    resize = v2.Resize([resolution, resolution], v2.InterpolationMode.BICUBIC, antialias=True)
    images, (low, high), problems = decode_scan(paths)
    if problems:
        return None, problems
    if images[0].is_floating_point():
        images = [to_grey_levels(image, low, high) for image in images]
    images = [resize(pad_to_square(image)) for image in images]
    return torch.cat([image.round().clamp(0, 255).byte() for image in images]), []


def file_stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time (ns) of a file; (-1, -1) if it cannot be reached."""
    try:
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    except OSError:
        return -1, -1


def names_and_sizes(files: Iterable[SliceFile], root: Path) -> list[str]:
    """Name within `root` and size of each file: the same when the folder is copied or moved."""
    return [f"{f.path.relative_to(root).as_posix()} {file_stamp(f.path)[0]}" for f in files]


def data_identity(lines: Iterable[str]) -> str:
    """Hash of the names and sizes of files."""
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def check_result(lines: Iterable[str], files: Iterable[SliceFile], cache: Path) -> Path:
    """The file of what `prepare.py check` found in files of these names, sizes and participants."""
    whose = zip(lines, [f.participant for f in files], strict=True)
    return cache / f"check-{data_identity(sorted(map(str, whose)))[:16]}.txt"


def print_last_check(path: Path) -> None:
    """Print what `prepare.py check` last found in the same slices."""
    try:
        problems = path.read_text("utf-8", "replace").splitlines()
        utils.mark_used(path)
    except OSError:
        utils.print_once("note: prepare.py check has not looked for leaks in these slices")
        return
    if problems:
        text = f"prepare.py check found {len(problems)} problems in these slices, such as:"
        utils.print_once(f"warning: {text} {problems[0]}")


def allocate(path: Path) -> None:
    """Reserve a file's disk space: if the disk were full, writing to its map would end the process.

    Does nothing on file systems that cannot reserve space. Raises OSError if there is no space.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise


def decode_all(files: list[SliceFile], resolution: int, target: Path) -> None:
    """Decode files to uint8 [n, R, R] on disk. Raises UserError for bad files and a full disk."""
    needed = len(files) * resolution**2
    if needed > shutil.disk_usage(target.parent).free:
        raise UserError(f"cache = {target.parent}: needs {needed / 1e9:.1f} GB, but less is free")
    images = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), *[resolution] * 2))
    allocate(target)
    problems: list[str] = []

    def work(rows: list[int]) -> None:
        result, bad = resized_scan([files[row].path for row in rows], resolution)
        problems.extend(bad)
        if result is not None:
            images[rows] = result.numpy()

    utils.map_on_cores(work, rows_by_scan(files), "decoding", "scan")
    if problems:
        table = "\n  ".join(sorted(problems))
        raise UserError(f"{len(problems)} of {len(files)} files cannot be used:\n  {table}")
    images.flush()


def decoded(files: list[SliceFile], root: Path, resolution: int, cache: Path) -> np.ndarray:
    """All files as a memory-mapped uint8 [n, R, R]; they are decoded again only if they change."""
    stamps = [(f.path.relative_to(root).as_posix(), *file_stamp(f.path)) for f in files]
    stamp = repr((CACHE_VERSION, resolution, stamps))
    path = cache / f"{hashlib.sha256(stamp.encode()).hexdigest()[:16]}-{resolution}.npy"
    return utils.make_array_once(path, lambda partial: decode_all(files, resolution, partial))


def require_no_class(name: str, folder: Path, root: Path | None) -> None:
    """Raises UserError if a folder to write lies where `find_slices` looks for classes."""
    path = folder.resolve()
    if root and path.is_relative_to(root.resolve()):
        first = (*path.relative_to(root.resolve()).parts, "")[0]
        if (root / "train").is_dir():
            among_classes = first in SPLITS or (name == "out" and not first)
        else:
            among_classes = first[:1] != "."
        if among_classes:
            raise UserError(f"{name} = {folder}: lies in {root}, where folders are classes")


def find_positions(scans: np.ndarray) -> np.ndarray:
    """Position of each slice in its scan, 0 lowest to 1 highest, 0.5 if it is alone. -> [n].

    `scans` [n] names the scan of each slice; the slices of a scan come in order.
    """
    positions, codes = np.empty(len(scans)), np.unique(scans, return_inverse=True)[1]
    for rows in np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]):
        positions[rows] = np.linspace(0, 1, len(rows)) if len(rows) > 1 else 0.5
    return positions


def load_slices(config: Config) -> tuple[dict[str, Slices], str]:
    """Both splits, decoded, and the data's identity. Raises UserError as `find_slices` does."""
    root = config.data_root or folder_once(config.cache / f"demo-{CACHE_VERSION}", write_demo)
    any_classes = config.any_classes or not config.conditional
    classes, splits = find_slices(root, any_classes, config.table)
    describe(config.data_root, classes, splits, config.table)
    if not config.conditional:
        classes, splits = ["all"], {k: [f._replace(label=0) for f in v] for k, v in splits.items()}
    files, first = splits["train"] + splits["test"], len(splits["train"])
    lines = names_and_sizes(files, root)
    if config.data_root:
        print_last_check(check_result(lines, files, config.cache))
    images = decoded(files, root, config.img_resolution, config.cache)
    labels = np.array([f.label for f in files])
    participants = np.array([f.participant for f in files])
    scans = np.array([str(f.path.parent / f.scan) for f in files])
    positions = find_positions(scans) if config.condition_position else None
    names = np.array([str(f.path.relative_to(root)) for f in files])
    both = Slices(images, labels, participants, classes, positions, scans, names)
    splits = {"train": both.take(slice(first)), "test": both.take(slice(first, None))}
    return splits, data_identity(lines)


def folder_once(root: Path, write: Callable[[Path], None]) -> Path:
    """A folder of the cache; `write` makes it unless it exists. Raises UserError if it cannot."""
    if not root.exists():
        utils.ensure_writable(root.parent)
        partial = utils.partial_path(root)
        try:
            write(partial)
            partial.rename(root)
        except OSError:
            if not root.exists():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    utils.mark_used(root)
    return root


# Loading


def augment(images: Tensor, draws: Tensor, config: Config) -> Tensor:
    """Flip, rotate, and change brightness and contrast. -> float32 [N, 1, R, R] in [0, 1].

    Images [N, 1, R, R] are float32 in [0, 1]. Draws [N, 4] are uniform in [0, 1). Corners that a
    rotation uncovers are black.
    """
    flip = 1 - 2 * (draws[:, 0] < config.flip_prob).float()  # -1 mirrors left and right
    angle, brightness, contrast = (draws[:, 1:] * 2 - 1).T
    angle = angle * math.radians(config.rotation)
    rows = [flip * angle.cos(), flip * -angle.sin(), angle.sin(), angle.cos()]
    rotation = torch.stack(rows, 1).view(-1, 2, 2)
    grid = F.affine_grid(F.pad(rotation, (0, 1)), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    brightness = 1 + config.brightness * brightness[:, None, None, None]
    images = (images * brightness).clamp(0, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    contrast = 1 + config.contrast * contrast[:, None, None, None]
    return (mean + (images - mean) * contrast).clamp(0, 1)


class TrainingSlices(Dataset):
    """The endless stream of training slices; image `nimg` depends only on the seed and `nimg`.

    Each epoch is a new permutation of all slices. An item is a batch, asked for by the range of
    its image numbers: images uint8 [N, R, R] and the indices of these slices [N]. They are arrays
    because workers send tensors through shared memory, of which containers have little.
    """

    def __init__(self, slices: Slices, config: Config) -> None:
        self.images, self.config = slices.images, config
        self.epoch, self.order = -1, np.zeros(0, int)

    def __getitem__(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
        indices = np.array([self.index(nimg) for nimg in numbers])
        images = np.array(self.images[indices])
        if self.config.augment == "dataset":
            seeds = (utils.stream_seed("augment", self.config.seed, p) for p in numbers)
            draws = np.stack([np.random.default_rng(seed).random(4) for seed in seeds])
            grey = torch.from_numpy(images)[:, None].float() / 255
            grey = augment(grey, torch.from_numpy(draws).float(), self.config)
            images = (grey[:, 0] * 255).round().byte().numpy()
        return images, indices

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the file name in place of mapped pixels; a spawned worker maps the file again."""
        state, images = dict(self.__dict__), self.images
        if isinstance(images, np.memmap):
            whole = images.base if isinstance(images.base, np.memmap) else images
            first = (images.ctypes.data - whole.ctypes.data) // images.strides[0]
            state["images"] = images.filename, first, len(images)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.images, tuple):
            path, first, count = self.images
            self.images = np.load(path, mmap_mode="r")[first : first + count]

    def index(self, nimg: int) -> int:
        """Index of the slice that is image `nimg` of the stream."""
        epoch, place = divmod(nimg, len(self.images))
        if epoch != self.epoch:
            rng = np.random.default_rng(utils.stream_seed("order", self.config.seed, epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self.images))
        return int(self.order[place])


def ignore_signals(_: int) -> None:
    """Ignore signals in a worker: the process group gets them too, but only training answers."""
    for number in utils.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def normalize(images: Tensor) -> Tensor:
    """uint8 [N, R, R] -> float32 [N, 1, R, R] in [-1, 1]."""
    return images[:, None].float() / 255 * 2 - 1


def make_loader(slices: Slices, config: Config, start: int, stop: int) -> DataLoader:
    """This rank's share of each batch, in order, from image `start` of the stream to `stop`."""
    batch = config.batch_size
    share = batch // utils.num_ranks()
    first = start + utils.rank() * share
    starts = range(first, stop - batch + 1 + utils.rank() * share, batch)
    return DataLoader(
        TrainingSlices(slices, config),
        batch_size=None,  # an item is a batch
        sampler=(range(s, s + share) for s in starts),  # one at a time: a long run has many
        collate_fn=tuple,  # the default makes tensors of arrays
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
        timeout=WAIT_SECONDS if config.num_workers else 0,
    )
