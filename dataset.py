"""Brain slices in class folders: finding, checking, decoding once, augmenting; and the demo brains.

Layout: ROOT/{train,test}/CLASS/ID_SLICE.jpeg, or ROOT/CLASS/ID_SLICE.jpeg, which is then split by
id. The id, one scan or one subject, is the file name up to its last underscore. ADNI's set calls
its classes AD (Alzheimer's disease) and NC (normal control, CN in ADNI's own tables).
"""

import csv
import errno
import hashlib
import math
import os
import shutil
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from assets.demo_brains import write_demo
from config import Config, UserError
from utils import (
    SIGNALS,
    conditions,
    ensure_writable,
    first_line,
    make_array_once,
    map_on_cores,
    mark_used,
    num_ranks,
    partial_path,
    print_once,
    rank,
    stream_seed,
    width_of_c,
)

SPLITS = ("train", "test")
MOST_CLASSES = 20  # above which class folders are taken for patients
WAIT_SECONDS = 300  # for one batch of a worker, after which it is held for lost
SAMPLE_FORMAT, PHOTOMETRIC = 339, 262  # tags of TIFF
# Formats that Pillow reads by itself, without starting another program
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
MAX_SIDE = 8192  # pixels of a file
TEST_SHARE = 0.2  # of the ids of each class, where the folder itself has no split
MANIFEST = "manifest.csv"
CACHE_VERSION = 2  # part of every cache key: raise it when decoding changes


class SliceFile(NamedTuple):
    """One slice on disk: `label` is the index of its class folder in sorted order."""

    path: Path
    participant: str
    label: int

    @property
    def scan(self) -> str:
        """The id in its name: slices of one scan have one scale of grey."""
        return scan_of(self.path)


@dataclass(frozen=True)
class Slices:
    """Decoded slices of one split: images uint8 [n, R, R], labels int64 [n], subjects [n].

    Where a run conditions on it, levels [n]: the place of each slice, 0 lowest to 1 highest.
    """

    images: np.ndarray
    labels: np.ndarray
    participants: np.ndarray
    classes: list[str]
    positions: np.ndarray | None = None

    @property
    def c_dim(self) -> int:
        """Width of c."""
        return width_of_c(len(self.classes), self.positions is not None)

    def take(self, rows: np.ndarray) -> "Slices":
        """Some of the slices, in memory."""
        positions = None if self.positions is None else self.positions[rows]
        parts = np.array(self.images[rows]), self.labels[rows], self.participants[rows]
        return Slices(*parts, self.classes, positions)

    def conditions(self) -> Tensor:
        """c of each slice. -> [n, c_dim]."""
        return conditions(self.labels, self.positions, self.c_dim)


class Entry(NamedTuple):
    """What a table says of a scan or, where `scan` is empty, of all scans of a participant."""

    scan: str
    participant: str
    label: str  # class, "" if unknown
    age: float  # years, NaN if unknown
    sex: str  # F, M or ""


# Finding


def finite_number(text: str) -> float:
    """The number that a cell holds; NaN if it holds none, or an infinite one."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def manifest_rows(root: Path) -> dict[str, dict[str, str]]:
    """The rows of ROOT/manifest.csv by scan, each by column; none where there is no manifest.

    Raises:
        UserError: a file that is no table, lacks a column, or has two rows for one scan.
    """
    path, rows = root / MANIFEST, {}
    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row or None in row.values():
                    raise ValueError(f"row {len(rows) + 2} is longer or shorter than the header")
                if row["id"] in rows:
                    raise ValueError(f"an id stands in two rows: {row['id']}")
                if not row["participant"]:
                    raise ValueError(f"id {row['id']} has no participant")
                rows[row["id"]] = row
    except KeyError as error:
        raise UserError(f"{path} has no column {error}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    return rows


def read_manifest(root: Path) -> dict[str, Entry]:
    """The entry of each scan in ROOT/manifest.csv. Raises UserError as `manifest_rows` does."""
    return {
        name: Entry(
            name,
            row["participant"],
            row.get("class", ""),
            finite_number(row.get("age", "")),
            row.get("sex", ""),
        )
        for name, row in manifest_rows(root).items()
    }


def scan_of(path: Path) -> str:
    """The id in the name of a slice: up to its last underscore."""
    return path.stem.rpartition("_")[0] or path.stem


def rows_by_scan(files: list[SliceFile]) -> list[list[int]]:
    """The rows of the slices of each scan, in their order."""
    rows_of = defaultdict(list)
    for row, file in enumerate(files):
        rows_of[file.path.parent, file.scan].append(row)
    return list(rows_of.values())


def set_participants(files: list[SliceFile], entries: Mapping[str, Entry]) -> None:
    """Put whose scan it is in the place of the id, where entries say so."""
    for row, file in enumerate(files):
        if entry := entries.get(file.scan):
            files[row] = file._replace(participant=entry.participant)


def subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in entries(folder) if p.is_dir())


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden things aside. Raises UserError where it cannot be read."""
    try:
        return [path for path in folder.iterdir() if path.name[0] != "."]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def list_slices(folder: Path, label: int) -> list[SliceFile]:
    """The image files of one class folder, by id and slice number. Raises UserError if none."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    paths = [p for p in entries(folder) if p.suffix.lower() in suffixes]
    if not paths:
        raise UserError(f"class folder {folder} holds no image files")
    files = [SliceFile(p, scan_of(p), label) for p in paths]
    return sorted(files, key=lambda f: (f.participant, len(f.path.stem), f.path.name))


def split_by_id(files: list[SliceFile]) -> dict[str, list[SliceFile]]:
    """Give whole ids to test, a fixed share of each class, by a hash of the id."""
    test: set[str] = set()
    for label in sorted({f.label for f in files}):
        ids = sorted({f.participant for f in files if f.label == label})
        ids.sort(key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        test.update(ids[: math.ceil(TEST_SHARE * len(ids))])
    splits = {
        "train": [f for f in files if f.participant not in test],
        "test": [f for f in files if f.participant in test],
    }
    present = set.intersection(*({f.label for f in part} for part in splits.values()))
    for file in files:
        if file.label not in present:
            raise UserError(f"{file.path.parent}: too few ids to split them; make train/ and test/")
    return splits


def find_class_folders(folder: Path) -> tuple[list[str], list[SliceFile]]:
    """Class names and files of FOLDER/CLASS/*. Raises UserError if there are none."""
    classes = [path.name for path in subfolders(folder)]
    if not classes:
        raise UserError(f"{folder} holds no class folders (CLASS/ID_SLICE.jpeg)")
    return classes, [f for i, c in enumerate(classes) for f in list_slices(folder / c, i)]


def find_slices(
    root: Path, any_classes: bool = False
) -> tuple[list[str], dict[str, list[SliceFile]]]:
    """Class names and the files of each split, see `read_splits`.

    Raises:
        UserError: an id, or a participant of the manifest, is on both sides.
    """
    classes, splits = read_splits(root, any_classes)
    for problem in shared_ids(splits):
        raise UserError(f"{root}: {problem}")
    return classes, splits


def shared_ids(splits: dict[str, list[SliceFile]]) -> list[str]:
    """What is wrong with a split, in words: ids or participants on both sides."""
    shared = {f.participant for f in splits["train"]} & {f.participant for f in splits["test"]}
    first = ", ".join(sorted(shared)[:5])
    return [f"{len(shared)} id(s) on both sides of the split: {first}"] if shared else []


def read_splits(root: Path, any_classes: bool) -> tuple[list[str], dict[str, list[SliceFile]]]:
    """Class names and the files of each split; whose a scan is may stand in ROOT/manifest.csv.

    Raises:
        UserError: no folder, no classes, an empty class, classes that differ between the splits,
            a damaged manifest, or, unless `any_classes`, classes that look like patients.
    """
    if not root.is_dir():
        raise UserError(f"data_root = {root}: no such folder")
    has_split = (root / "train").is_dir()
    if has_split and not (root / "test").is_dir():
        raise UserError(f"{root} has train/ but no test/; class folders alone are split by id")
    parents = [root / split for split in SPLITS] if has_split else [root]
    names, found = zip(*map(find_class_folders, parents), strict=True)
    if has_split and names[0] != names[1]:
        raise UserError(f"classes differ: {parents[0]} has {names[0]}, {parents[1]} {names[1]}")
    if not any_classes and (doubt := doubtful_classes(names[0], found[0])):
        raise UserError(f"{root}: {doubt}; if they are right, say --any-classes")
    manifest = read_manifest(root)
    for files in found:
        set_participants(files, manifest)
    splits = dict(zip(SPLITS, found, strict=True)) if has_split else split_by_id(found[0])
    return names[0], splits


def doubtful_classes(classes: list[str], files: list[SliceFile]) -> str | None:
    """Why the class folders may be something else, in words."""
    found = f"{len(classes)} class folders ({', '.join(classes[:3])}, ...)"
    if len(classes) > MOST_CLASSES:
        return f"{found}, more than {MOST_CLASSES}, may be patients"
    if len(classes) == len({(f.label, f.participant) for f in files}) > 2:
        return f"{found} of a single id each may be patients"
    return None


def ignored_files(root: Path, used: set[Path]) -> list[str]:
    """How many files under `root` are not used, by the highest folder that has no use."""
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


def describe(root: Path | None, classes: list[str], splits: dict[str, list[SliceFile]]) -> None:
    """Say, on rank 0, what was found, and what of a user's folder is left out or looks odd."""
    if rank() > 0:
        return
    for split, files in splits.items():
        rows = [[f for f in files if f.label == label] for label in range(len(classes))]
        parts = [
            f"{name} {len({f.participant for f in row})} ids, {len(row)} slices"
            for name, row in zip(classes, rows, strict=True)
        ]
        print_once(f"{split}: {'; '.join(parts)}")
    if root is None:
        return
    files = splits["train"] + splits["test"]
    if ignored := ignored_files(root, {f.path for f in files} | {root / MANIFEST}):
        more = f", and {len(ignored) - 5} more folders" if len(ignored) > 5 else ""
        print_once(f"note: files that are not used: {'; '.join(ignored[:5])}{more}")
    if len({f.participant for f in files}) == len(files):  # a split by id is then a split by file
        name = files[0].path.name
        print_once(
            f"note: every file is an id of its own; if {name} has sisters, name them ID_SLICE"
        )


# Decoding


def deep_values(image: Image.Image) -> np.ndarray | None:
    """The values of a file that is not 8-bit unsigned, as they were written; None if it is."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF: its sample format tells what Pillow does not
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
    """One file, upright, as grey [1, H, W]: uint8, or float32 if of another type. Raises on damage.

    The float32 values are those of the file, negative ones too.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # a pipe would be waited for without end
    # from memory: a file that it maps itself, Pillow turns wrongly (uncompressed TIFF, 13.0)
    with Image.open(BytesIO(path.read_bytes()), formats=FORMATS) as image:
        if max(image.size) > MAX_SIDE:  # before memory is taken: it becomes a square
            raise ValueError("{} x {} pixels: a side is {} at most".format(*image.size, MAX_SIDE))
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("holds more than one image")
        image.load()
        if image.format != "TIFF":  # those are upright when loaded
            ImageOps.exif_transpose(image, in_place=True)
        if (deep := deep_values(image)) is not None:
            values = torch.from_numpy(deep.astype(np.float32))[None]
            if not values.isfinite().all():
                raise ValueError("holds values that are not finite")
            return values
        if "A" in image.getbands() or "transparency" in image.info:  # what is transparent is black
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
        grey = image if image.mode == "L" else image.convert("RGB").convert("L")
        return torch.from_numpy(np.array(grey))[None]


def pad_to_square(image: Tensor) -> Tensor:
    """[1, H, W] -> [1, S, S] with S = max(H, W): black borders, nothing stretched."""
    H, W = image.shape[-2:]
    top, left = (max(H, W) - H) // 2, (max(H, W) - W) // 2
    return F.pad(image, (left, max(H, W) - W - left, top, max(H, W) - H - top))


def reason(path: Path, error: Exception) -> str:
    """Why a file cannot be used, in one line."""
    if path.is_file() and file_stamp(path)[0] == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return first_line(error)


def grey_range(images: list[Tensor]) -> tuple[float, float]:
    """The values of one id that become black and white: 0 and 255 where its files are 8-bit.

    Else white is the 99.9th percentile of all its slices, so that they stay comparable and no
    single bright pixel darkens them, and black is 0, or the 0.1th where there are negative values.

    Raises:
        ValueError: files of both kinds, which have no common scale.
    """
    deep = [image.is_floating_point() for image in images]
    if not any(deep):
        return 0, 255
    if not all(deep):
        raise ValueError("8-bit and other files in one id have no common scale")
    values = np.concatenate([image.flatten().numpy() for image in images])
    low, high = np.percentile(values, [0.1, 99.9])
    return (float(low) if values.min() < 0 else 0.0), float(high)


def decode_scan(paths: list[Path]) -> tuple[list[Tensor], tuple[float, float], list[str]]:
    """The slices of one id, the values that become black and white, and what is wrong."""
    images, limits, problems = [], (0.0, 255.0), []
    for path in paths:
        try:
            images.append(decode(path))
        except Exception as error:  # PIL raises a different type for each kind of damage
            problems.append(f"{path}: {reason(path, error)}")
    try:
        limits = grey_range(images)
    except ValueError as error:
        problems.append(f"{paths[0]}: {error}")
    return images, limits, problems


def resized_scan(paths: list[Path], resolution: int) -> tuple[Tensor | None, list[str]]:
    """All slices of one id as uint8 [n, R, R], or None, with what is wrong with each bad file."""
    from torchvision.transforms import v2  # imports the compiler: seconds

    resize = v2.Resize([resolution, resolution], v2.InterpolationMode.BICUBIC, antialias=True)
    images, (low, high), problems = decode_scan(paths)
    if problems:
        return None, problems
    if images[0].is_floating_point():
        images = [(image - low) * (255 / max(high - low, 1e-8)) for image in images]
    images = [resize(pad_to_square(image)) for image in images]
    return torch.cat([image.round().clamp(0, 255).byte() for image in images]), []


def file_stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change of a file; (-1, -1) if it cannot be reached."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return -1, -1


def data_identity(files: Iterable[SliceFile], root: Path) -> str:
    """Hash of names and sizes: the same after a copy to another place."""
    lines = [f"{f.path.relative_to(root)} {file_stamp(f.path)[0]}" for f in files]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def allocate(path: Path) -> None:
    """Take the space of a file: a disk that fills while it is mapped would end the process.

    Raises:
        OSError: no space left, or allowed. On file systems that cannot do it nothing happens.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise


def decode_all(files: list[SliceFile], resolution: int, target: Path) -> None:
    """Decode every file into one uint8 array [n, R, R] on disk, with a progress bar.

    Raises:
        UserError: too little disk space, or a table of every unusable file.
    """
    needed = len(files) * resolution**2
    if needed > shutil.disk_usage(target.parent).free:
        raise UserError(f"cache = {target.parent}: {needed / 1e9:.1f} GB needed, less is free")
    images = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), *[resolution] * 2))
    allocate(target)
    problems: list[str] = []

    def work(rows: list[int]) -> None:
        result, bad = resized_scan([files[row].path for row in rows], resolution)
        problems.extend(bad)
        if result is not None:
            images[rows] = result.numpy()

    map_on_cores(work, rows_by_scan(files), "decoding", "id")
    if problems:
        table = "\n  ".join(sorted(problems))
        raise UserError(f"{len(problems)} of {len(files)} files cannot be used:\n  {table}")
    images.flush()


def decoded(files: list[SliceFile], root: Path, resolution: int, cache: Path) -> np.ndarray:
    """All files as a memory-mapped uint8 [n, R, R], decoded once for each state of the files."""
    times = [file_stamp(f.path)[1] for f in files]
    stamp = repr((CACHE_VERSION, resolution, data_identity(files, root), times))
    path = cache / f"{hashlib.sha256(stamp.encode()).hexdigest()[:16]}-{resolution}.npy"
    return make_array_once(path, lambda partial: decode_all(files, resolution, partial))


def find_positions(ids: np.ndarray) -> np.ndarray:
    """Place of each slice among those of its id, 0 lowest to 1: slices are in order. -> [n]."""
    positions = np.full(len(ids), 0.5)
    for name in np.unique(ids):
        rows = np.flatnonzero(ids == name)
        if len(rows) > 1:
            positions[rows] = np.linspace(0, 1, len(rows))
    return positions


def load_slices(config: Config) -> tuple[dict[str, Slices], str]:
    """Both splits, decoded, and the data's identity. Raises UserError as `find_slices` does."""
    root = config.data_root or demo_root(config.cache)
    classes, splits = find_slices(root, config.any_classes or not config.conditional)
    describe(config.data_root, classes, splits)
    if not config.conditional:
        classes, splits = ["all"], {k: [f._replace(label=0) for f in v] for k, v in splits.items()}
    files = splits["train"] + splits["test"]
    images = decoded(files, root, config.img_resolution, config.cache)
    labels = np.array([f.label for f in files])
    participants = np.array([f.participant for f in files])
    scans = np.array([str(f.path.parent / f.scan) for f in files])
    positions = find_positions(scans) if config.condition_position else None
    parts = {"train": slice(len(splits["train"])), "test": slice(len(splits["train"]), None)}
    slices = {
        k: Slices(
            images[s],
            labels[s],
            participants[s],
            classes,
            None if positions is None else positions[s],
        )
        for k, s in parts.items()
    }
    return slices, data_identity(files, root)


def demo_root(cache: Path) -> Path:
    """Folder of the demo brains, written at the first call. Raises UserError if it cannot be."""
    return folder_once(cache / f"demo-{CACHE_VERSION}", write_demo)


def folder_once(root: Path, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, which is written if it is not there. Raises UserError."""
    if not root.exists():
        ensure_writable(root.parent)
        partial = partial_path(root)
        try:
            write(partial)
            partial.rename(root)
        except OSError:
            if not root.exists():  # else another run was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    mark_used(root)
    return root


# Loading


def augment(images: Tensor, draws: Tensor, config: Config) -> Tensor:
    """Flip, rotate, and change brightness and contrast, each image by its own draws.

    Args:
        images: float32 [N, 1, R, R] in [0, 1].
        draws: [N, 4], uniform in [0, 1).

    Returns:
        float32 [N, 1, R, R] in [0, 1]; what a rotation brings in is black.
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
    """The endless stream of training slices: what lies at a position depends only on (seed, it).

    Each epoch is a new permutation of all slices. An item is a batch, asked for by its positions:
    images uint8 [N, R, R] and which slices they are [N], arrays rather than tensors, which workers
    would send through the shared memory that containers have little of.
    """

    def __init__(self, slices: Slices, config: Config) -> None:
        self.images, self.config = slices.images, config
        self.epoch, self.order = -1, np.zeros(0, int)

    def __getitem__(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
        indices = np.array([self.index(nimg) for nimg in numbers])
        images = np.array(self.images[indices])
        if self.config.augment == "dataset":
            seeds = (stream_seed("augment", self.config.seed, p) for p in numbers)
            draws = np.stack([np.random.default_rng(seed).random(4) for seed in seeds])
            grey = torch.from_numpy(images)[:, None].float() / 255
            grey = augment(grey, torch.from_numpy(draws).float(), self.config)
            images = (grey[:, 0] * 255).round().byte().numpy()
        return images, indices

    def __getstate__(self) -> dict[str, Any]:
        """Of pixels that lie in a file, its name: a worker that is spawned maps it again."""
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
        """The slice shown at a position."""
        epoch, place = divmod(nimg, len(self.images))
        if epoch != self.epoch:
            rng = np.random.default_rng(stream_seed("order", self.config.seed, epoch))
            self.epoch, self.order = epoch, rng.permutation(len(self.images))
        return int(self.order[place])


def ignore_signals(_: int) -> None:
    """In a worker: signals reach the whole process group, but only training answers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def normalize(images: Tensor) -> Tensor:
    """uint8 [N, R, R] -> float32 [N, 1, R, R] in [-1, 1]: mean 0.5 and deviation 0.5 of [0, 1]."""
    return images[:, None].float() / 255 * 2 - 1


def as_it_is(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """In the place of a collation that makes tensors."""
    return batch


class ImageNumbers(Sampler):
    """The positions of each batch, made one by one: of a long run there are many."""

    def __init__(self, starts: range, share: int) -> None:
        self.starts, self.share = starts, share

    def __iter__(self) -> Iterator[range]:
        return (range(start, start + self.share) for start in self.starts)

    def __len__(self) -> int:
        return len(self.starts)


def make_loader(slices: Slices, config: Config, start: int, stop: int) -> DataLoader:
    """This rank's share of each batch of the stream, from image `start` to `stop`, in order."""
    batch = config.batch_size
    share = batch // num_ranks()
    first = start + rank() * share
    return DataLoader(
        TrainingSlices(slices, config),
        batch_size=None,  # an item is a batch
        sampler=ImageNumbers(range(first, stop - batch + 1 + rank() * share, batch), share),
        collate_fn=as_it_is,
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
        timeout=WAIT_SECONDS if config.num_workers else 0,
    )
