"""Read volumes, and cut slices from them on a grid in millimetres.

Positions are in mm of a volume's affine: x to the patient's right, y to the front, z up. There is
no registration and no skull stripping.
"""

import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import nibabel
import numpy as np
import tyro
from scipy import ndimage

from config import Range, Seed, UserError, check_fields
from utils import otsu_threshold

MAX_VOXELS = 512**3
MAX_GZIP_RATIO = 1100  # of the size of the content to the size of the file
VOXEL_MM, EXTENT_MM = (0.1, 12), (60, 600)  # allowed ranges for a volume that shows a head
DIAMETER_MM = (90, 260)  # allowed range for a head
COARSE = 2  # mm, voxel size for the search of the head
VENTRICLES_BELOW_TOP = 0.43  # of the lateral ventricles, in head diameters, to about 7 mm
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
CONVERTER = "dcm2niix"
CONVERT_SECONDS = 600


@dataclass(frozen=True)
class ImportOptions:
    """Which slices to cut. Raises UserError naming the option, its value and what is allowed."""

    scans: tyro.conf.Positional[Path]
    """Folder that holds NIfTI files, or folders of DICOM files, at any depth."""
    out: Path
    """Folder for OUT/{train,test}/CLASS/ID_SLICE.png and manifest.csv; the same command resumes."""
    table: Path | None = None
    """CSV or TSV of scans or participants (ADNI, OASIS, BIDS); None: SCANS/CLASS/ is the class."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other names of the columns class, age, scan, participant, sex, visit, date: class DX age AGE.
    An empty name says that the table has no such column."""
    unknown_visit: Literal["none", "first", "last"] = "none"
    """Row that gives the class where rows of a participant differ and a path shows no visit."""
    classes: tuple[str, ...] | None = None
    """Classes to import; None: all."""
    pattern: str = "*"
    """Pattern for names of files or DICOM folders, such as *T1w*; masks are never imported."""
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
    """Also import volumes whose header gives no orientation, without turning them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window is not None and self.window[0] >= self.window[1]:
            raise UserError(f"window = {self.window}: black must be below white")
        if self.columns and self.table is None:
            raise UserError("columns: there is no --table that has them")
        if self.axis != "axial" and self.centre is None:
            raise UserError(f"axis = {self.axis}: needs a --centre in mm")


def read_volume(path: Path, unoriented: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values float32 [X, Y, Z], NaN as 0, and affine [4, 4] to mm. Raises ValueError if bad."""
    if path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            return read_volume(convert_dicom(path, Path(folder)), unoriented)
    volume = open_volume(path, unoriented)
    values = np.asanyarray(volume.dataobj).reshape(volume.shape[:3]).astype(np.float32)
    if np.isinf(values).any():
        raise ValueError("holds values that are infinite")
    return np.nan_to_num(values, copy=False, nan=0), volume.affine


def open_volume(path: Path, unoriented: bool) -> nibabel.Nifti1Pair:
    """A volume, after checks of its header only. Raises ValueError with the reason."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("empty file")
    volume = nibabel.load(path)
    header = volume.header
    if not isinstance(volume, nibabel.Nifti1Pair):  # NIfTI-2 is a subclass
        raise ValueError(f"{type(volume).__name__} is not NIfTI")
    shape = [n for i, n in enumerate(volume.shape) if i < 3 or n != 1]
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"is no volume but {' x '.join(map(str, volume.shape))}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"holds values of type {dtype}, not numbers")
    needed, text = math.prod(shape) * dtype.itemsize, " x ".join(map(str, shape))
    if math.prod(shape) > MAX_VOXELS or needed > size * MAX_GZIP_RATIO:
        raise ValueError(f"{text} voxels: too many for a file of {size} bytes")
    if path.suffix.lower() == ".nii" and needed > size:
        raise ValueError(f"truncated: {size} bytes of {needed}")
    if not unoriented and not header["sform_code"] and not header["qform_code"]:
        raise ValueError("no orientation in its header (sform and qform code 0): --unoriented")
    affine = volume.affine
    voxel = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    extent = voxel * shape
    if not (VOXEL_MM[0] <= voxel.min() <= voxel.max() <= VOXEL_MM[1]):
        raise ValueError(f"voxels of {' x '.join(f'{v:.3g}' for v in voxel)} mm")
    if not (EXTENT_MM[0] <= extent.min() <= extent.max() <= EXTENT_MM[1]):
        text = " x ".join(f"{v:.0f}" for v in extent)
        raise ValueError(f"is {text} mm large: not the size of a head")
    if abs(np.linalg.det(affine[:3, :3] / voxel)) < 0.5:
        raise ValueError("its axes are not perpendicular")
    return volume


def find_converter() -> str:
    """The path of the program that reads DICOM. Raises ValueError that says how to install it."""
    program = shutil.which(CONVERTER)
    if program is None:
        raise ValueError(f"DICOM needs {CONVERTER}: pip install {CONVERTER}")
    return program


def convert_dicom(folder: Path, out: Path) -> Path:
    """The only series of a DICOM folder, as a NIfTI file. Raises ValueError with the reason."""
    flags = ["-z", "n", "-b", "n", "-d", "0", "-f", "series%s"]
    command = [find_converter(), *flags, "-o", out, folder]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CONVERT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{CONVERTER} took more than {CONVERT_SECONDS} s") from error
    found = sorted(out.glob("*.nii"))
    if len(found) != 1:
        last = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{CONVERTER} made {len(found)} volumes of it, not 1: {' '.join(last)}")
    return found[0]


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
    return CutSlices(images, positions, black, white)
