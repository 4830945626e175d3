"""Directions in w: what an image does when its w moves along them.

Three kinds, none of which needs real slices: principal axes of w within the classes; the
closed-form factorisation of the weights that turn w into styles ([1], equation 5); and supervised
directions, in which w moves when what is measured in samples, or the class, changes.

References:
    [1] Shen and Zhou 2021, Closed-Form Factorization of Latent Semantics in GANs, arXiv:2007.06600
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import utils
from config import Range, Seed, Share, UserError
from evaluation import features
from evaluation.samples import images_of
from exploration import model as models
from exploration.figures import write_report
from exploration.model import ATTRIBUTES, CHUNK, Model, attributes
from modules import Generator

NUM_SAMPLES = 1000  # samples that supervised directions are fitted to
NUM_LATENTS = 4096  # latents whose w give axes and deviations
NUM_STYLES = 4  # first layers whose style weights are factorised
# columns of ATTRIBUTES
SUPERVISED = {"larger ventricles": 0, "larger brain": 1, "tilt to the right": 3}
NUM_EFFECTS = 64  # latents whose images show the effects of a direction
EFFECTS = {name: i for i, name in enumerate(ATTRIBUTES) if name != "shift to the right"}
SWEEP = (-3, -2, -1, 0, 1, 2, 3)  # deviations


@dataclass(frozen=True)
class Options(models.RealOptions):
    """Options of `explore.py directions`."""

    seeds: tuple[Seed, ...] = (0,)
    """Seed of the image that is drawn: one, 0 or more."""
    axes: Annotated[int, Range(1)] = 3
    """Number of principal axes, and of factors of the style weights; 1 or more."""
    samples: Annotated[int, Range(100)] = NUM_SAMPLES
    """Samples that the supervised directions are fitted to, 100 or more."""
    truncation_psi: Share = 0.7
    """Truncation of the images that are drawn, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.seeds) > 1:
            raise UserError(f"seeds = {self.seeds}: the directions of one image are drawn")


class Direction(NamedTuple):
    """A direction in w [w_dim], as long as one standard deviation of w along it."""

    name: str
    vector: Tensor


class Latents(NamedTuple):
    """w [n, w_dim] of random latents, their seeds and classes; w without the mean of the class."""

    w: Tensor
    inner: Tensor
    seeds: list[int]
    labels: np.ndarray


@torch.no_grad()
def random_latents(model: Model, count: int) -> Latents:
    """w of seeds 0 to count - 1; the classes take turns."""
    labels, seeds = np.arange(count) % len(model.classes), list(range(count))
    w = model.G.mapping.map(model.z(seeds), model.c(labels, seeds))
    inner = w.clone()
    for label in range(len(model.classes)):
        inner[labels == label] -= w[labels == label].mean(0)
    return Latents(w, inner, seeds, labels)


def scaled(name: str, vector: Tensor, inner: Tensor) -> Direction:
    """A direction as long as one deviation of w within the classes."""
    unit = vector / vector.norm()
    return Direction(name, unit * (inner @ unit).std())


def principal_axes(inner: Tensor, count: int) -> list[Direction]:
    """The axes of w [n, w_dim] with the largest variance."""
    axes = torch.linalg.svd(inner, full_matrices=False).Vh[:count]
    return [scaled(f"axis {i + 1}", signed(axis), inner) for i, axis in enumerate(axes)]


def style_factors(G: Generator, inner: Tensor, count: int) -> list[Direction]:
    """The unit changes of w that change the styles of the first layers most ([1])."""
    layers = [
        layer for block in G.synthesis.blocks for layer in (block.conv0, block.conv1) if layer
    ]
    A = torch.cat([layer.affine.weight for layer in layers[:NUM_STYLES]])  # [sum of I, w_dim]
    factors = torch.linalg.svd(A, full_matrices=False).Vh[:count]
    return [scaled(f"style factor {i + 1}", signed(v), inner) for i, v in enumerate(factors)]


def signed(vector: Tensor) -> Tensor:
    """The direction whose largest entry is positive: a sign that does not depend on the machine."""
    return vector * vector[vector.abs().argmax()].sign()


def along(name: str, w: Tensor, values: np.ndarray, inner: Tensor) -> Direction:
    """The mean change of w [n, w_dim] with a value [n]: their covariance.

    The weights of a regression point elsewhere: to where w hardly varies, with little effect.
    """
    y = torch.from_numpy(values - values.mean()).to(w)
    return scaled(name, (w - w.mean(0)).T @ y / len(y), inner)


def measured(model: Model, found: Latents, count: int) -> np.ndarray:
    """ATTRIBUTES of the images of the first latents. -> [count, A]."""
    parts = []
    for start in tqdm(range(0, count, CHUNK), "samples", unit="batch", leave=False):
        ws = found.w[start : min(start + CHUNK, count), None].expand(-1, model.G.mapping.num_ws, -1)
        parts.append(attributes(images_of(model.G, ws)))
    return np.concatenate(parts)


def find_directions(
    model: Model, axes: int = 3, factors: int = 3, samples: int = NUM_SAMPLES
) -> list[Direction]:
    """Supervised directions, principal axes and style factors, each of one deviation."""
    found = random_latents(model, max(NUM_LATENTS, samples))
    values = measured(model, found, samples)
    wanted = [(name, found.inner, values[:, column]) for name, column in SUPERVISED.items()]
    own = [model.position_of(seed) if model.G.by_position else 0.0 for seed in found.seeds]
    wanted.append(("position", found.w, np.array(own[:samples])))
    is_first = (found.labels[:samples] == 0).astype(float)
    wanted.append((f"class {model.classes[0]}", found.w, is_first))
    directions = [
        along(name, w[:samples], x, found.inner) for name, w, x in wanted if x.std() > 1e-6
    ]
    directions += principal_axes(found.inner, axes)
    return directions + style_factors(model.G, found.inner, factors)


def effects(
    model: Model, direction: Direction, classifier: features.Encoder | None
) -> dict[str, float]:
    """Mean change of the ATTRIBUTES, and of the score of the first class, for one deviation."""
    found = random_latents(model, NUM_EFFECTS)
    ws = [
        (found.w + sign * direction.vector)[:, None].expand(-1, model.G.mapping.num_ws, -1)
        for sign in (-1, 1)
    ]
    low, high = (images_of(model.G, w) for w in ws)
    change = (attributes(high) - attributes(low)).mean(0) / 2
    changes = {name: float(change[column]) for name, column in EFFECTS.items()}
    if classifier is not None:
        scores = [models.class_score(classifier, images, 0) for images in (low, high)]
        changes[f"score of {model.classes[0]}"] = float(np.mean(scores[1] - scores[0]) / 2)
    return changes


def sharing(directions: list[Direction]) -> np.ndarray:
    """Cosine between each two directions. -> [D, D]."""
    units = F.normalize(torch.stack([d.vector for d in directions]))
    return (units @ units.T).cpu().numpy()


def draw_directions(
    model: Model, directions: list[Direction], options: Options, path: Path
) -> None:
    """A strip of each direction, from -3 to 3 deviations, for the first seed."""
    seed = options.seeds[0]
    c = model.c(0, [seed])
    ws = model.G.mapping(model.z([seed]), c, options.truncation_psi)
    strips = [
        images_of(model.G, torch.cat([ws + steps * d.vector for steps in SWEEP]))
        for d in directions
    ]
    picture = utils.tile(np.concatenate(strips), len(SWEEP))
    names = [d.name for d in directions]
    columns = [f"{steps:+d}" if steps else "0" for steps in SWEEP]
    title = f"seed {seed} of {model.classes[0]}, deviations along each direction"
    utils.save_grid(picture, names, columns, title, path)


def draw_sharing(directions: list[Direction], path: Path) -> None:
    """Cosines between directions, as numbers in coloured cells."""
    values = sharing(directions).round(2) + 0.0  # no -0
    names = [utils.label(d.name, 24, 1) for d in directions]
    figure = utils.new_figure(figsize=(0.7 * len(names) + 2.5, 0.6 * len(names) + 1.8))
    ax = figure.subplots()
    ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 else "black"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_title("cosine between directions: what they share", fontsize=9)
    utils.save_figure(figure, path)


def explore_directions(options: Options) -> Path:
    """Write strips, effects, shares and the vectors. -> their folder. Raises UserError."""
    model = models.open_model(options)
    real = models.open_real(model, options, "no scores of the class")
    classifier = models.classifier_of(real) if real and len(model.classes) > 1 else None
    directions = find_directions(model, options.axes, options.axes, options.samples)
    draw_directions(model, directions, options, model.out / "directions.png")
    draw_sharing(directions, model.out / "directions_shared.png")
    rows: list[dict[str, Any]] = []
    for direction in tqdm(directions, "effects", unit="direction", leave=False):
        rows.append({"direction": direction.name} | effects(model, direction, classifier))
    names = ", ".join(f"{name} in {ATTRIBUTES[name]}" for name in EFFECTS)
    scored = " The score is that of a classifier of real slices." if classifier else ""
    tables = {
        "mean change for one deviation": rows,
        "note": f"Over {NUM_EFFECTS} latents; {names}.{scored} Supervised directions were "
        f"fitted to {options.samples} samples. What two directions share is in "
        "directions_shared.png; vectors of one deviation are in directions.safetensors.",
    }
    vectors = {d.name: d.vector for d in directions}
    utils.write_safetensors(model.out / "directions.safetensors", vectors, 0)
    write_report("Directions in w", tables, model.out, "directions")
    return model.out
