"""Demo brains: synthetic, template-derived slices in the layout of ADNI's AD_NC; not clinical."""

import csv
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils import map_on_cores

TEMPLATE = Path(__file__).with_name("icbm152_slices.npz")
SLICES, HEIGHT, WIDTH = 20, 224, 184  # the part of each image that is computed; the rest is black
IMAGE_SIZE = 240, 256
CENTRE = 10.0, -17.0, 0.0  # MNI (z, y, x) in mm of the middle of that part
STEP = 2.0, -0.945, 0.945  # mm from one slice, row and column to the next: a brain fills 80 %
WARPS = (2.2, 35), (1.6, 10), (1.0, 5)  # mm of displacement, and over how many mm it varies
FRESH = 1_000_000  # the number of the first subject that is in no demo set
RADII = 60.0, 75.0, 52.0  # mm (z, y, x), of the ellipsoid whose surface is cortex


@dataclass(frozen=True)
class Template:
    maps: Tensor  # [5, K, H, W]: T1 residue, WM, sulci (log CSF), inside of the head, distance
    pull: Tensor  # [4, K, H, W]: distance to the ventricles (mm) and its gradient (z, y, x)
    origin: Tensor  # [3] MNI (z, y, x) in mm of voxel (0, 0, 0), and mm to the next one:
    spacing: Tensor  # [3]
    sorted_distance: Tensor  # [K * H * W] mm


@cache
def load_template(path: Path = TEMPLATE) -> Template:
    """Read the slices, mirror them at the midline and derive what each subject samples."""
    file = np.load(path)
    half = torch.from_numpy(np.stack([file[k] for k in ("t1", "gm", "wm", "distance")])).float()
    t1, gm, wm, distance = torch.cat([half, half[..., :-1].flip(-1)], -1)
    distance = file["distance_offset"].item() + file["distance_step"].item() * distance
    head, gm, wm = (t1 > 0).float(), gm / 255, wm / 255
    csf = (1 - gm - wm).clamp(0, 1)  # also outside the head, so that no rim of tissue is left
    residue = (t1 / 255 - 0.30 * csf - 0.65 * gm - 0.87 * wm) * head
    t1 = torch.where(head > 0, t1 / 255, 0.65)
    valley = F.avg_pool2d(t1, 7, 1, 3) - t1
    sulci = (csf + 0.02).log() + 8 * valley
    maps = torch.stack([residue, wm, sulci, head, distance])
    gradient = torch.stack(torch.gradient(distance, spacing=file["spacing"].tolist()))
    gradient = gradient / gradient.square().sum(0).clamp(min=0.7)  # mm per mm of distance
    origin, spacing = (torch.tensor(file[k]).float() for k in ("origin", "spacing"))
    distances = torch.cat([distance[None], gradient])
    return Template(maps, distances, origin, spacing, distance.flatten().sort().values)


def subject_rng(seed: int, number: int) -> torch.Generator:
    """Return a generator that depends on nothing else; neighbouring raw seeds would correlate."""
    mixed = np.random.SeedSequence((seed, number)).generate_state(1)
    return torch.Generator().manual_seed(mixed.item())


def draw_subject(is_ad: bool, rng: torch.Generator) -> dict[str, float]:
    """Draw what tells one subject from another; only the three kinds of atrophy depend on AD."""
    n = torch.randn(15, generator=rng).tolist()
    return {
        "ventricle_ml": 29.0 * math.exp(math.log(1.32) * (is_ad + n[0] / 0.5)),
        "cortical_z": n[1] - 1.0 * is_ad,  # thickness, in SD of NC
        "temporal_z": n[2] - 1.5 * is_ad,
        "size": 1 + 0.025 * n[3],
        "aspect": 1 + 0.02 * n[4],  # length over width
        "yaw_deg": 1.2 * n[5],
        "pitch_deg": 1.5 * n[6],
        "shift_z_mm": 1.0 * n[7],
        "shift_y_mm": 1.0 * n[8],
        "shift_x_mm": 1.0 * n[9],
        "csf": 0.17 + 0.015 * n[10],  # intensities, white matter at about 0.8 of the grey scale
        "gm": 0.56 + 0.02 * n[11],
        "wm": 0.82 + 0.02 * n[12],
        "bias": 0.03 * math.exp(0.3 * n[13]),
        "noise": 0.018 * math.exp(0.3 * n[14]),
    }


def axes() -> list[Tensor]:
    """Return the positions in mm of the computed slices, rows and columns."""
    return [
        c + p * (torch.arange(n) - (n - 1) / 2)
        for c, p, n in zip(CENTRE, STEP, (SLICES, HEIGHT, WIDTH), strict=True)
    ]


def smooth_field(channels: int, scale: float, levels: slice, rng: torch.Generator) -> Tensor:
    """Return a unit-variance Gaussian field [C, Z, Y, X] whose features are scale mm wide."""
    bases = []
    for x in axes():
        nodes = torch.arange(x.min() - 2 * scale, x.max() + 2 * scale, scale)
        basis = torch.exp(-(((x[:, None] - nodes) / scale) ** 2))
        bases.append(basis / basis.norm(dim=1, keepdim=True))  # unit variance between nodes too
    field = torch.randn(channels, *(b.shape[1] for b in bases), generator=rng)
    return bases[1] @ torch.einsum("zk,cklm->czlm", bases[0][levels], field) @ bases[2].T


def sample(volume: Tensor, points: Tensor, template: Template) -> Tensor:
    """Return volume [C, K, H, W] at MNI points [3, Z, Y, X] -> [C, Z, Y, X]."""
    size = torch.tensor(volume.shape[1:])
    index = (points.movedim(0, -1) - template.origin) / template.spacing
    grid = (index * 2 / (size - 1) - 1).flip(-1)  # [Z, Y, X, 3], in the order x, y, z
    return F.grid_sample(volume[None], grid[None], padding_mode="border", align_corners=True)[0]


def place_head(subject: dict[str, float], levels: slice, rng: torch.Generator) -> Tensor:
    """Return the template's MNI point [3, Z, Y, X] for each pixel: pose and two deformations."""
    z, y, x = torch.meshgrid(*axes(), indexing="ij")
    y, size, aspect = y - CENTRE[1], subject["size"], subject["aspect"] ** 0.5
    yaw, pitch = (math.radians(subject[k]) for k in ("yaw_deg", "pitch_deg"))
    y, x = y * math.cos(yaw) - x * math.sin(yaw), y * math.sin(yaw) + x * math.cos(yaw)
    z = z + y * math.tan(pitch) + subject["shift_z_mm"]
    y = y / size / aspect + CENTRE[1] + subject["shift_y_mm"]
    points = torch.stack([z, y, x / size * aspect + subject["shift_x_mm"]])
    centre, points = points.mean((1, 2, 3), keepdim=True), points[:, levels]
    coarse, *fine = (mm * smooth_field(3, scale, levels, rng) for mm, scale in WARPS)
    # The cortex differs more between people than the core does: 0 at the centre, 1 in the cortex
    radius = (points - centre) / torch.tensor(RADII).view(3, 1, 1, 1)
    return points + coarse + sum(fine) * radius.square().sum(0).clamp(max=1)


def enlarge_ventricles(points: Tensor, millilitres: float, template: Template) -> Tensor:
    """Move points along the distance to the ventricles until these have the asked volume."""
    b = template.sorted_distance[int(millilitres * 1e3 / template.spacing.prod().abs())]
    distance, *gradient = sample(template.pull, points, template)
    # Inside, never further than 1.5 mm past the outline, or a second outline would show
    inside = (distance + 1.5).clamp(min=0).minimum(b)
    shift = torch.where(distance <= b, inside, b * torch.exp((b - distance) / 12))
    return points - shift * torch.stack(gradient)


def temporal_weight(points: Tensor) -> Tensor:
    """Return 0 to 1 at MNI points: near the temporal lobes and Sylvian fissures -> [Z, Y, X]."""
    z, y, x = points
    return torch.exp(-(((x.abs() - 42) / 16) ** 2 + ((y + 8) / 32) ** 2 + ((z + 2) / 16) ** 2) / 2)


def render(
    subject: dict[str, float],
    template: Template,
    rng: torch.Generator,
    levels: slice = slice(SLICES),
) -> Tensor:
    """Return the subject's slices [20, 240, 256] in 0 to 255, front up; or some levels of them."""
    points = place_head(subject, levels, rng)
    points = enlarge_ventricles(points, subject["ventricle_ml"], template)
    residue, wm, sulci, head, distance = sample(template.maps, points, template)
    folds = smooth_field(2, 5, levels, rng)
    # Averages over people are blurred; a threshold on them that varies in space makes one person
    loss = 0.5 * subject["cortical_z"] + subject["temporal_z"] * temporal_weight(points)
    csf = 4 * (sulci + 1.2 - 2 * torch.tanh(loss / 2) + 0.25 * folds[0])
    csf = torch.maximum(csf, -3 * distance).sigmoid()
    white = torch.sigmoid(8 * (wm - 0.55) + 1.2 * folds[1])
    tissue = subject["gm"] + (subject["wm"] - subject["gm"]) * white + residue
    tissue = tissue + 0.008 * smooth_field(1, 2, levels, rng)[0]
    image = tissue + (subject["csf"] - tissue) * csf
    image = image * (1 + subject["bias"] * smooth_field(1, 60, levels, rng)[0])
    noise = subject["noise"] * torch.randn(2, *image.shape, generator=rng)
    image = torch.hypot(image + noise[0], noise[1]) * (head > 0.6)  # Rician; stripped skull
    pad = [(n - m) // 2 for n, m in zip(IMAGE_SIZE, (HEIGHT, WIDTH), strict=True)]
    return F.pad(255 * image.clamp(0, 1), (pad[1], pad[1], pad[0], pad[0]))


def write_subject(
    root: Path, number: int, seed: int, split: str = "", one_level: bool = False, label: str = ""
) -> dict[str, str | float]:
    """Write the slices of one subject, or a random one, and return its line of the manifest."""
    rng = subject_rng(seed, number)
    label = label or ("NC", "AD")[number % 2]
    subject = draw_subject(label == "AD", rng)
    first = int(torch.randint(SLICES, (), generator=rng)) if one_level else 0
    levels = slice(first, first + 1 if one_level else SLICES)
    folder = root / split / label
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(render(subject, load_template(), rng, levels).byte().numpy(), first):
        Image.fromarray(image).save(folder / f"{1000 + number}_{78 + i}.jpeg", quality=95)
    values = {k: round(v, 4) for k, v in subject.items()}
    name = str(1000 + number)
    return {"id": name, "participant": name, "class": label, "split": split, **values}


def write_fresh(root: Path, count: int, seed: int = 0) -> None:
    """Write one slice each of `count` subjects that no demo set has, into root/AD and root/NC.

    They are what a perfect generator of the demo brains would draw.
    """
    numbers = range(FRESH, FRESH + count)
    map_on_cores(
        lambda n: write_subject(root, n, seed, one_level=True), numbers, "fresh brains", "subject"
    )


def write_twins(root: Path, count: int, seed: int = 0) -> None:
    """Write one slice each of `count` subjects that no demo set has, as AD and as NC.

    Everything but the class is drawn alike: they are the true effect of the class.
    """

    def write(number: int) -> None:
        for label in ("AD", "NC"):
            write_subject(root, number, seed, one_level=True, label=label)

    map_on_cores(write, range(FRESH, FRESH + count), "twins", "subject")


def write_demo(root: Path, num_train: int = 160, num_test: int = 40, seed: int = 0) -> None:
    """Write slices of num_train + num_test subjects, half AD, and last root/manifest.csv."""

    def write(number: int) -> dict[str, str | float]:
        return write_subject(root, number, seed, "train" if number < num_train else "test")

    rows = map_on_cores(write, range(num_train + num_test), "demo brains", "subject")
    with open(root / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
