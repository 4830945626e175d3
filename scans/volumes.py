"""Read volumes, and cut slices from them on a grid in millimetres.

Positions are in mm of a volume's affine: x to the patient's right, y to the front, z up. There is
no registration and no skull stripping.
"""

import gzip
import math
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import nibabel
import numpy as np
import tyro
from nibabel.spatialimages import SpatialImage
from scipy import ndimage

from config import Range, Seed, UserError, check_fields
from scans.finding import CONTRASTS, contrast_of, other_contrast
from scans.heads import otsu_threshold

MAX_VOXELS = 512**3
MAX_GZIP_RATIO = 1100  # of the size of the content to the size of the file
MAX_EXTRA = 2**24  # bytes of a file beside its values
MAX_LABELS = 32  # distinct values of a segmentation; a scan has more
VOXEL_MM, EXTENT_MM = (0.1, 12), (60, 600)  # allowed ranges for a volume that shows a head
DIAMETER_MM = (90, 260)  # allowed range for a head
COARSE = 2  # mm, voxel size for the search of the head
VENTRICLES_BELOW_TOP = 0.43  # of the lateral ventricles, in head diameters, to about 7 mm
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
CONVERTER = "dcm2niix"
CONVERT_SECONDS = 600
FEW_SLICES = 10  # a series with fewer is a localizer, if there are others
# Warnings of dcm2niix that mean a gap between slices
GAP = re.compile(
    r"missing (images|DICOMs)|images may be missing|interslice distance varies|positions repeated",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ImportOptions:
    """Which slices to cut. Raises UserError naming the option, its value and what is allowed."""

    scans: tyro.conf.Positional[Path]
    """Folder that holds volumes (NIfTI and others), or folders of DICOM files, at any depth."""
    out: Path
    """Folder for {train,test}/CLASS/ID_SLICE.png, manifest.csv, left_out.csv; repeat to resume."""
    table: Path | None = None
    """CSV or TSV of scans or participants (ADNI, OASIS, BIDS); None: SCANS/participants.tsv of a
    BIDS data set, if it has classes; else SCANS/CLASS/ is the class."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other names of the columns class, age, scan, participant, sex, visit, date: class DX age AGE.
    An empty name says that the table has no such column."""
    unknown_visit: Literal["none", "first", "last"] = "none"
    """Row that gives the class where rows of a participant differ and a path shows no visit."""
    classes: tuple[str, ...] | None = None
    """Classes to import; None: all."""
    pattern: str = "*"
    """Pattern for names of files or DICOM folders, such as *mpr-1*; masks are never imported."""
    contrast: str = "T1w"
    """Contrast to import (T1w, T2w, FLAIR, ...) where a name tells it; any: all contrasts."""
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Orientation of the slices."""
    centre: float | None = None
    """Position of the middle slice, in mm of the affine; None: at the ventricles, by head size."""
    slices: Annotated[int, Range(1, 1000)] = 20
    """Number of slices per scan, 1 or more."""
    spacing: Annotated[float, Range(0, 100, above=True)] = 1.0
    """Distance from one slice to the next in mm, above 0."""
    size: Annotated[int, Range(64, 512)] = 240
    """Side of a slice in mm and in pixels, centred on the head: 64 to 512."""
    window: tuple[float, float] | None = None
    """Black and white values; None: 0 (0.1th percentile if any is negative), 99.9th percentile."""
    bits: Literal[8, 16] = 8
    """Bits per pixel."""
    test_share: Annotated[float, Range(0.001, 0.999)] = 0.2
    """Share of each class's participants that go to the test set, above 0 and below 1."""
    seed: Seed = 0
    """Seed of the split."""
    unoriented: bool = False
    """Import volumes of unknown left and right too, such as Analyze; assume the usual order."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window is not None and self.window[0] >= self.window[1]:
            raise UserError(f"window = {self.window}: black must be below white")
        if self.contrast not in ("any", *CONTRASTS):
            allowed = ", ".join(("any", *CONTRASTS))
            raise UserError(f"contrast = {self.contrast}: must be one of {allowed}")
        if self.axis != "axial" and self.centre is None:
            raise UserError(f"axis = {self.axis}: needs a --centre in mm")


def read_volume(
    path: Path, unoriented: bool, contrast: str = "any", warnings: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 [X, Y, Z], NaN as 0, and affine [4, 4] to mm. Raises ValueError if bad.

    Of a DICOM folder the series of that contrast is read; `warnings` gets those of the converter.
    """
    if path.is_dir():
        with tempfile.TemporaryDirectory() as name:
            file, said = convert_dicom(path, Path(name), contrast)
            if warnings is not None:
                warnings += said
            return read_volume(file, unoriented)
    volume, affine = open_volume(path, unoriented)
    if path.suffix.lower() in (".gz", ".mgz"):
        content = unzip(path, data_bytes(volume) + MAX_EXTRA)
        if hasattr(volume, "from_bytes"):  # a format of one file
            volume = type(volume).from_bytes(content)
    values = np.asanyarray(volume.dataobj).reshape(volume.shape[:3]).astype(np.float32)
    if np.isinf(values).any():
        raise ValueError("holds values that are infinite")
    values = np.nan_to_num(values, copy=False, nan=0)
    distinct = np.unique(values[tuple(slice(None, None, -(-n // 48)) for n in values.shape)])
    if 1 < len(distinct) <= MAX_LABELS and (distinct == distinct.round()).all():
        raise ValueError("a segmentation: it holds few values, all whole numbers")
    return values, affine


def unzip(path: Path, most: int) -> bytes:
    """The content of a gzip file of at most so many bytes. Raises ValueError if it is damaged."""
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)  # with the end of the file its checksum is compared
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError("damaged: its gzip checksum or data are wrong") from error
    if len(content) > most:
        raise ValueError("holds more data than its header says")
    return content


def data_bytes(volume: SpatialImage) -> int:
    """Bytes of the values of a volume in its file, before any compression."""
    return math.prod(volume.shape) * volume.get_data_dtype().itemsize


def open_volume(path: Path, unoriented: bool) -> tuple[SpatialImage, np.ndarray]:
    """A volume and its affine, after checks of its header. Raises ValueError with the reason."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("empty file")
    try:
        volume = nibabel.load(path)
    except ModuleNotFoundError as error:
        text = f"{path.suffix} of this kind needs {error.name}: pip install {error.name}"
        raise ValueError(text) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError("damaged: its gzip checksum or data are wrong") from error
    except nibabel.filebasedimages.ImageFileError as error:
        text = "its content is of no known format, or its header file is missing"
        raise ValueError(text) from error
    if not isinstance(volume, SpatialImage):
        raise ValueError(f"{type(volume).__name__} is no volume")
    for kind, file in volume.file_map.items():
        if kind != "mat" and not Path(file.filename).exists():  # SPM's .mat file may be missing
            raise ValueError(f"there is no {Path(file.filename).name} beside it")
    shape = [n for i, n in enumerate(volume.shape) if i < 3 or n != 1]
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"is no volume but {' x '.join(map(str, volume.shape))}")
    dtype = volume.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"holds values of type {dtype}, not numbers")
    needed, text = data_bytes(volume), " x ".join(map(str, shape))
    if math.prod(shape) > MAX_VOXELS or needed > size * MAX_GZIP_RATIO:
        raise ValueError(f"{text} voxels: too many for a file of {size} bytes")
    if path.suffix.lower() in (".nii", ".img", ".rec", ".brik", ".mgh") and needed > size:
        raise ValueError(f"truncated: {size} bytes of {needed}")
    affine = affine_of(volume, unoriented)
    voxel = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    extent = voxel * shape
    if not (VOXEL_MM[0] <= voxel.min() <= voxel.max() <= VOXEL_MM[1]):
        raise ValueError(f"voxels of {' x '.join(f'{v:.3g}' for v in voxel)} mm")
    if not (EXTENT_MM[0] <= extent.min() <= extent.max() <= EXTENT_MM[1]):
        text = " x ".join(f"{v:.0f}" for v in extent)
        raise ValueError(f"is {text} mm large: not the size of a head")
    if abs(np.linalg.det(affine[:3, :3] / voxel)) < 0.5:
        raise ValueError("its axes are not perpendicular")
    return volume, affine


def affine_of(volume: SpatialImage, unoriented: bool) -> np.ndarray:
    """The affine [4, 4] to mm. Raises ValueError if left and right are unknown, unless allowed."""
    header, affine = volume.header, volume.affine
    if isinstance(volume, nibabel.Nifti1Pair):  # NIfTI-2 is a subclass
        if not unoriented and not header["sform_code"] and not header["qform_code"]:
            raise ValueError("no orientation in its header (sform and qform code 0): --unoriented")
        usable = np.isfinite(affine).all() and np.linalg.det(affine[:3, :3]) != 0
        return affine if usable or not header["qform_code"] else header.get_qform()
    if not isinstance(volume, nibabel.AnalyzeImage):
        return affine
    if not unoriented:
        raise ValueError("left and right are unknown, as in all Analyze files: --unoriented")
    if not np.array_equal(affine, header.get_best_affine()):
        return affine  # a .mat file beside it
    orient = bytes(header["orient"].item()) or b"\0"
    if (code := orient[0]) > 2:
        raise ValueError(f"its orient is {code}: only 0, 1 and 2 are known")
    # x, y or z of each axis of the volume, if it was scanned transverse, coronal or sagittal
    order = ((0, 1, 2), (0, 2, 1), (1, 2, 0))[code]
    steps = np.abs(np.diag(header.get_base_affine()))[:3]
    turned = np.eye(4)
    turned[:3, :3] = 0
    turned[order, range(3)] = steps * [-1 if axis == 0 else 1 for axis in order]
    turned[:3, 3] = -turned[:3, :3] @ (np.array(volume.shape[:3]) - 1) / 2
    return affine if code == 0 else turned


def find_converter() -> str:
    """The path of the program that reads DICOM. Raises ValueError that says how to install it."""
    beside = Path(sys.executable).parent  # of an environment that may not be activated
    program = shutil.which(CONVERTER) or shutil.which(CONVERTER, path=beside)
    if program is None:
        raise ValueError(f"DICOM needs {CONVERTER}: pip install {CONVERTER}")
    return program


def convert_dicom(folder: Path, out: Path, contrast: str) -> tuple[Path, list[str]]:
    """The series of a contrast in a DICOM folder, as a NIfTI file, and the converter's warnings.

    Raises ValueError with the reason if no series or several could be meant, or slices are missing.
    """
    flags = ["-z", "n", "-b", "n", "-d", "0", "-f", "%s_%d"]
    command = [find_converter(), *flags, "-o", out, with_preambles(folder, out / "dicom")]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CONVERT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{CONVERTER} took more than {CONVERT_SECONDS} s") from error
    lines = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
    series: dict[str, list[str]] = {}  # warnings by name; they precede the line of their series
    warnings: list[str] = []
    for line in lines:
        if line.startswith("Warning: "):
            warnings.append(line.removeprefix("Warning: "))
        elif made := re.match(r"Convert \d+ DICOM as (.+) \(\d+x", line):
            series[Path(made[1]).name], warnings = warnings, []
    # other files are copies of a series, such as one that fills its gaps
    files = {path.name[:-4]: path for path in sorted(out.glob("*.nii"))}
    files = {name: path for name, path in files.items() if name in series}
    if not files:
        raise ValueError(f"{CONVERTER} made no volume of it: {' '.join(lines[-1:])}")
    name = choose_series(files, contrast)
    if gaps := [text.rstrip(".") for text in series[name] if GAP.search(text)]:
        raise ValueError(f"{CONVERTER}: {'; '.join(gaps)}")
    return files[name], series[name]


def with_preambles(folder: Path, copy: Path) -> Path:
    """A folder of DICOM files, or a copy if files start with group 2: the converter fails there."""

    def is_bare(path: Path) -> bool:
        with open(path, "rb") as file:
            start = file.read(132)
        return start[:4] == b"\2\0\0\0" and start[128:] != b"DICM"

    files = [path for path in folder.iterdir() if path.is_file()]
    if not any(map(is_bare, files)):
        return folder
    copy.mkdir()
    for path in files:
        before = bytes(128) + b"DICM" if is_bare(path) else b""
        (copy / path.name).write_bytes(before + path.read_bytes())
    return copy


def choose_series(files: dict[str, Path], contrast: str) -> str:
    """The one series, named by number and description, that is the scan. Raises ValueError."""
    why = {}
    for name, path in files.items():
        few = min(nibabel.load(path).shape[:3]) < FEW_SLICES
        if len(files) > 1 and (few or contrast_of(name) == "localizer"):
            why[name] = "localizer"
        elif re.search(r"_(ph|real|imaginary)[a-z]?$", name):
            why[name] = "phase image"
        else:
            why[name] = other_contrast(name, contrast)
    left = [name for name in files if not why[name]]
    left = [name for name in left if contrast_of(name) == contrast] or left
    if len(left) == 1:
        return left[0]
    if len(files) == 1:
        raise ValueError(next(iter(why.values())))
    if left:
        raise ValueError(f"{len(left)} series could be the scan: {', '.join(left)}")
    raise ValueError(f"no series is the scan: {', '.join(f'{n} ({w})' for n, w in why.items())}")


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

    If the voxels are closer together than the points, the values are smoothed first. Points outside
    get 0, or the lowest value if that is below 0.
    """
    to_voxel = np.linalg.inv(affine)
    matrix, offset = to_voxel[:3, :3] @ steps, to_voxel[:3, :3] @ corner + to_voxel[:3, 3]
    ends = offset[:, None] + matrix @ corners_of(shape)
    length = np.linalg.norm(steps, axis=0)
    within = matrix * np.minimum(1, length[1:].max() / length)  # no smoothing across distant slices
    spread = np.abs(within).max(1)  # voxels from one point to the next
    margin = 8 + 2 * spread  # voxels around the points that splines and smoothing need
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
    """Where a head lies in mm, and how bright it is."""

    low: np.ndarray  # lowest x, y, z
    high: np.ndarray  # highest x, y, z
    diameter: float  # of a disc with the area of the largest axial section
    threshold: float  # voxels of the head are brighter


def find_head(values: np.ndarray, affine: np.ndarray) -> Head:
    """The largest bright object, down to 110 mm below its top. Raises ValueError if no head."""
    ends = affine[:3, :3] @ corners_of(values.shape) + affine[:3, 3:]
    low, high = ends.min(1), ends.max(1)
    shape = np.ceil((high - low) / COARSE).astype(int) + 1
    coarse = resample(values, affine, low, np.eye(3) * COARSE, shape, order=1)
    black, white = np.percentile(coarse, [1, 99.9]).tolist()
    if white <= black:
        raise ValueError("all voxels have one value")
    limit = otsu_threshold(((coarse - black) / (white - black) * 255).clip(0, 255)) / 2
    threshold = black + limit / 255 * (white - black)
    parts, count = ndimage.label(ndimage.binary_opening(coarse > threshold, iterations=2))
    if count == 0:
        raise ValueError("holds nothing that could be a head")
    head = ndimage.binary_fill_holes(parts == 1 + np.bincount(parts.ravel())[1:].argmax())
    top = np.flatnonzero(head.any((0, 1)))[-1]
    head[:, :, : max(0, top - round(110 / COARSE))] = False
    diameter = 2 * math.sqrt(head.sum((0, 1)).max() * COARSE**2 / math.pi)
    if not DIAMETER_MM[0] <= diameter <= DIAMETER_MM[1]:
        raise ValueError(f"its largest object is {diameter:.0f} mm wide: not the size of a head")
    places = np.argwhere(head)
    return Head(low + places.min(0) * COARSE, low + places.max(0) * COARSE, diameter, threshold)


class CutSlices(NamedTuple):
    """Slices of a volume, lowest first, and the values that become black and white."""

    images: np.ndarray  # float32 [slices, size, size]
    positions: np.ndarray  # mm [slices]
    black: float
    white: float
    reaches_out: bool  # the head is larger than the slice


def cut(values: np.ndarray, affine: np.ndarray, options: ImportOptions) -> CutSlices:
    """The slices that the options ask for. Raises ValueError with the reason if there are none.

    Axial slices show the front at the top, the others the top of the head. The patient's left is on
    the left; in sagittal slices the front is on the right.
    """
    head, axis = find_head(values, affine), AXES[options.axis]
    middle = options.centre
    if middle is None:
        middle = head.high[2] - VENTRICLES_BELOW_TOP * head.diameter
    positions = middle + (np.arange(options.slices) - (options.slices - 1) / 2) * options.spacing
    column, row = [i for i in range(3) if i != axis]
    corner, steps, half = (head.low + head.high) / 2, np.zeros((3, 3)), (options.size - 1) / 2
    corner += np.eye(3)[row] * half - np.eye(3)[column] * half
    corner[axis] = positions[0]
    steps[axis, 0], steps[row, 1], steps[column, 2] = options.spacing, -1, 1
    images = resample(values, affine, corner, steps, (options.slices, options.size, options.size))
    inside = images[images > head.threshold]
    if len(inside) < 0.05 * images.size:
        raise ValueError(f"shows no head from {positions[0]:.0f} to {positions[-1]:.0f} mm")
    low = float(np.percentile(images, 0.1)) if values.min() < 0 else 0.0
    black, white = options.window or (low, float(np.percentile(inside, 99.9)))
    if white <= black:
        raise ValueError(f"values from {black:g} to {white:g}: no contrast")
    extent = np.delete(head.high - head.low, axis)  # below its top a head counts to 110 mm
    return CutSlices(images, positions, black, white, bool(extent.max() > options.size))
