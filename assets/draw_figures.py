"""Draw the README's pictures that need no trained network.

    python -m assets.draw_figures      # from the project's folder

Writes architecture.png, data_samples.png, augmentation.png and ada.png beside itself; all but the
first show demo brains, which are made first if need be.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from config import CPU, Config
from dataset import SPLITS, Slices, TrainingSlices, load_slices, normalize
from modules import AdaptiveAugment
from utils import new_figure, save_figure, save_grey, tile, to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent
NUM_SUBJECTS, NUM_LEVELS, NUM_DRAWS = 3, 5, 6
STRENGTHS = ("ada_flip", "ada_translation", "ada_scale", "ada_anisotropy", "ada_rotation",
             "ada_brightness", "ada_contrast", "ada_noise", "ada_cutout")  # fmt: skip
COLOURS = {"style": "#cfe2f3", "conv": "#d9ead3", "image": "#fff2cc", "plain": "#eeeeee"}


def box(ax: "Axes", x: float, y: float, text: str, kind: str = "plain", width: float = 2.6) -> None:
    """A labelled box centred at (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, boxstyle="round,pad=0.04")
    shape.set(facecolor=COLOURS[kind], edgecolor="black", linewidth=0.8)
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(ax: "Axes", start: tuple[float, float], end: tuple[float, float]) -> None:
    """A straight arrow."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": 0.9})


def chain(
    ax: "Axes", x: float, top: float, parts: list[tuple[str, str]], width: float = 2.6
) -> None:
    """Boxes one below the other, from `top` down, joined by arrows."""
    for i, (text, kind) in enumerate(parts):
        box(ax, x, top - i, text, kind, width)
        if i:
            arrow(ax, (x, top - i + 0.66), (x, top - i + 0.34))


def draw_mapping(ax: "Axes") -> None:
    """z and the label to w."""
    box(ax, 0.9, 9, "z ~ N(0, 1)", width=1.6)
    box(ax, 3.0, 9, "label c", width=1.6)
    box(ax, 0.9, 8, "normalize", width=1.5)
    box(ax, 3.0, 8, "embed, normalize", width=2.2)
    for x in (0.9, 3.0):
        arrow(ax, (x, 8.66), (x, 8.34))
        arrow(ax, (x, 7.66), (1.95 + (x - 1.95) / 3, 7.34))
    parts = [
        ("concatenate", "plain"),
        ("8 x FC, leaky ReLU", "style"),
        ("w, one per layer", "style"),
    ]
    chain(ax, 1.95, 7, parts)
    ax.text(1.95, 4.2, "learning rate x 0.01\ntruncation: towards\nthe mean w of the class",
            ha="center", va="top", fontsize=8)  # fmt: skip


def draw_synthesis(ax: "Axes") -> None:
    """One block of the generator, and how the image is summed."""
    x = 7.4
    parts = [("const 4x4, or block before", "plain"), ("scale by style s = A(w)", "style"),
             ("up: conv 3x3, stride 1/2; FIR", "conv"), ("demodulate by norm of s W", "style"),
             ("+ noise x strength, + bias", "plain"), ("leaky ReLU", "plain"),
             ("the same without up", "conv"), ("to the next block", "plain")]  # fmt: skip
    chain(ax, x, 9, parts, width=3.3)
    for y in (8, 6):
        ax.annotate("", (x - 1.66, y), (3.34, 5), arrowprops={"arrowstyle": "->", "lw": 0.9})
    box(ax, 10.6, 3, "ToRGB: mod. 1x1", "image", 2.5)
    chain(ax, 13.2, 5, [("image so far", "image"), ("upsample (FIR)", "image")], 1.9)
    chain(ax, 13.2, 3, [("+", "image"), ("image", "image")], 1.9)
    arrow(ax, (13.2, 3.66), (13.2, 3.34))
    arrow(ax, (11.9, 3), (12.2, 3))
    arrow(ax, (9.06, 3), (9.3, 3))


def draw_discriminator(ax: "Axes") -> None:
    """Residual blocks down to 4x4, then the logit."""
    x = 16.9
    parts = [("real or generated", "image"), ("fromRGB: conv 1x1", "conv"),
             ("conv 3x3", "conv"), ("FIR, conv 3x3, stride 2", "conv"), ("sum / sqrt 2", "plain"),
             ("minibatch std", "plain"), ("conv 3x3, FC", "conv"),
             ("logit: FC + <embed(c), x>", "style")]  # fmt: skip
    chain(ax, x, 9, parts, width=3.0)
    box(ax, 19.7, 6.5, "FIR, conv 1x1", "conv", 1.8)
    arrow(ax, (x + 1.54, 7.9), (19.6, 6.84))
    arrow(ax, (19.6, 6.16), (x + 1.54, 5.1))
    ax.text(19.7, 7.75, "repeat\nto 4x4", ha="center", fontsize=8)


def draw_architecture() -> None:
    """The whole, in one figure."""
    figure = new_figure(figsize=(14, 6.2))
    ax = figure.subplots()
    draw_mapping(ax)
    draw_synthesis(ax)
    draw_discriminator(ax)
    for x, title in ((1.95, "Mapping network"), (9.2, "Synthesis block (one per resolution)"),
                     (17.4, "Discriminator (residual)")):  # fmt: skip
        ax.text(x, 9.75, title, ha="center", fontsize=11, weight="bold")
    ax.set(xlim=(-0.2, 20.8), ylim=(1.4, 10.2))
    ax.axis("off")
    save_figure(figure, FOLDER / "architecture.png")


def draw_samples(slices: Slices) -> None:
    """Some levels of the first subjects of each class, AD above NC."""
    rows = []
    for label in range(len(slices.classes)):
        for participant in np.unique(slices.participants[slices.labels == label])[:NUM_SUBJECTS]:
            found = np.flatnonzero(slices.participants == participant)
            rows.append(
                slices.images[found[np.linspace(0, len(found) - 1, NUM_LEVELS).astype(int)]]
            )
    half = len(rows) // 2
    blocks = [tile(np.concatenate(rows[i : i + half]), NUM_LEVELS) for i in (0, half)]
    save_grey(np.concatenate(blocks, 1), FOLDER / "data_samples.png")


def draw_augmentation(slices: Slices, config: Config) -> None:
    """Slices as they are (left) and as several passes over the data show them."""
    plain, changed = (
        TrainingSlices(slices, replace(config, augment=a)) for a in ("none", "dataset")
    )
    n, pictures = len(slices.images), []
    for image in plain[range(NUM_SUBJECTS)][0]:
        places = [find(plain, image, epoch * n, n) for epoch in range(NUM_DRAWS)]
        pictures += [image, *(changed[range(p, p + 1)][0][0] for p in places)]
    save_grey(tile(np.stack(pictures), NUM_DRAWS + 1), FOLDER / "augmentation.png")


def find(stream: TrainingSlices, image: np.ndarray, start: int, count: int) -> int:
    """Position in an epoch at which the stream shows the same slice again."""
    return start + next(
        i
        for i, shown in enumerate(stream[range(start, start + count)][0])
        if np.array_equal(shown, image)
    )


def draw_ada(slices: Slices, config: Config) -> None:
    """Slices as they are (left), under each kind of change alone, and under all at p = 0.8."""
    img = normalize(torch.from_numpy(slices.images[[7, 1607, 2407]]))
    columns = [img]
    torch.manual_seed(1)
    for kind in STRENGTHS:
        alone = dict.fromkeys(set(STRENGTHS) - {kind}, 0.0)
        columns.append(AdaptiveAugment(replace(config, ada_p=1.0, **alone))(img))
    columns += [AdaptiveAugment(replace(config, ada_p=0.8))(img) for _ in range(2)]
    picture = torch.stack(columns, 1).flatten(0, 1)
    save_grey(tile(to_uint8(picture), len(columns)), FOLDER / "ada.png")


def main() -> None:
    """Draw all four."""
    draw_architecture()
    config = Config(**CPU | {"img_resolution": 128})
    slices = load_slices(config)[0][SPLITS[0]]
    draw_samples(slices)
    draw_augmentation(slices, config)
    draw_ada(slices, config)


if __name__ == "__main__":
    main()
