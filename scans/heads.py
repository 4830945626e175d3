"""Where a head lies in a picture, and how bright it is."""

import numpy as np
import torch
from torch.nn import functional as F


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold in grey values [0, 255] with the most variance between its two sides."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(float)
    below, mass = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(np.nan_to_num(between).argmax())


def moments(grey: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where a head lies in pictures [n, R, R]. -> x, y, tilt, side, each [n].

    x and y: centre of grey, pixels from the middle. tilt: of the long axis to the right, degrees.
    side: grey of the right half minus that of the left half, as a share of all grey.
    """
    at = np.arange(grey.shape[-1]) - (grey.shape[-1] - 1) / 2
    grey = grey.astype(np.float32) + 1e-3
    grey /= grey.sum((1, 2), keepdims=True)
    columns, rows = grey.sum(1), grey.sum(2)  # each [n, R]
    x, y = columns @ at, rows @ at
    xx, yy = columns @ at**2 - x**2, rows @ at**2 - y**2
    xy = np.einsum("nyx,y,x->n", grey, at, at) - x * y
    return x, y, np.degrees(0.5 * np.arctan2(-2 * xy, yy - xx)), columns @ np.sign(at)


def rotate_and_centre(
    grey: np.ndarray, x: np.ndarray, y: np.ndarray, tilt: np.ndarray, scale: np.ndarray | float = 1
) -> np.ndarray:
    """Move (x, y) of pictures [n, R, R] to the middle, undo tilt, shrink by `scale`. -> uint8."""
    cos, sin = scale * np.cos(np.radians(tilt)), scale * np.sin(np.radians(tilt))
    sides = grey.shape[-1] / 2
    rows = np.array([[cos, -sin, x / sides], [sin, cos, y / sides]], np.float32)
    shape = [len(grey), 1, *grey.shape[1:]]
    grid = F.affine_grid(torch.from_numpy(rows).movedim(2, 0), shape, align_corners=False)
    found = F.grid_sample(torch.from_numpy(grey)[:, None], grid, align_corners=False)
    return found[:, 0].round().clamp(0, 255).byte().numpy()
