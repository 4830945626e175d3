"""Movies between seeds, classes or positions, that end where they begin."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import utils
from config import Range, UserError
from evaluation import features
from evaluation.samples import images_of
from exploration import model as models
from exploration.model import Model
from modules import Generator

MAX_STRIP = 12  # frames in the strip


@dataclass(frozen=True)
class Options(models.Options):
    """Options of `explore.py interpolate`."""

    between: Literal["seeds", "classes", "positions"] = "seeds"
    """What changes: the seed, or for the first seed the class or the position in the scan."""
    label: Annotated[str | None, models.CLASS] = None
    """Class of the images; None: the first."""
    space: Literal["z", "w"] = "z"
    """z: on the sphere of latents; w: along straight lines in w."""
    frames: Annotated[int, Range(2, 1000)] = 24
    """Frames from one stop to the next, 2 to 1000."""
    seconds: Annotated[float, Range(0, 600, above=True)] = 1.5
    """Seconds from one stop to the next, above 0 to 600; a frame lasts 0.02 or more."""
    format: Literal["gif", "webp"] = "gif"
    """Format of the movie; WebP is smaller, GIF keeps all grey levels."""
    size: Annotated[int, Range(16, 2048)] = 256
    """Side of a frame in pixels, 16 to 2048."""


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """A point on the great circle between the directions of a and b [1, z_dim], at a share t.

    Its length lies between theirs: what lies between two normal vectors is as long as they are. A
    straight line stands in where no circle is the shortest: between equal or opposite directions.
    """
    x, y = a / a.norm(), b / b.norm()
    angle = (x * y).sum().clamp(-1, 1).acos()
    if t in (0, 1) or angle.sin() < 1e-3:  # the ends are a and b to the bit
        return a.lerp(b, t)
    point = (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / angle.sin()
    return point * a.norm().lerp(b.norm(), torch.tensor(t).to(a))


class Stop(NamedTuple):
    """An image that a movie passes through."""

    z: Tensor  # [1, z_dim]
    label: int
    position: float | None


def condition(G: Generator, a: Stop, b: Stop, t: float) -> Tensor:
    """c at a share t of the way between two stops: positions between theirs, not both at once."""
    positions = None if a.position is None else np.array([(1 - t) * a.position + t * b.position])
    ends = [utils.conditions(np.array([stop.label]), positions, G.c_dim) for stop in (a, b)]
    return ends[0].lerp(ends[1], t).to(a.z.device)


def stops(model: Model, options: Options) -> list[Stop]:
    """The images that the movie passes through. Raises UserError."""
    for name, value in (("class", options.label), ("position", options.position)):
        if value is not None and options.between in (f"{name}es", f"{name}s"):
            raise UserError(f"{name} = {value}: a movie between {options.between} shows them all")
    label = model.index(options.label) if options.label else 0
    seeds = list(options.seeds)
    z = dict(zip(seeds, model.z(seeds).split(1), strict=True))
    place = {s: model.position_of(s) if model.G.by_position else None for s in seeds}
    first = seeds[0]
    if options.between == "classes":
        if len(model.classes) < 2:
            raise UserError("between = classes: this generator has one class")
        return [Stop(z[first], i, place[first]) for i in range(len(model.classes))]
    if options.between == "positions":
        if not model.G.by_position:
            raise UserError("between = positions: a generator without condition_position has none")
        up = np.linspace(0, 1, utils.NUM_POSITIONS)
        return [Stop(z[first], label, float(x)) for x in (*up, *up[-2:0:-1])]  # and down again
    if len(seeds) < 2:
        raise UserError(f"seeds = {options.seeds}: a movie between seeds needs two or more")
    return [Stop(z[seed], label, place[seed]) for seed in seeds]


@torch.no_grad()
def path_of(model: Model, options: Options) -> Tensor:
    """ws of all frames, from stop to stop and back to the first. -> [frames, num_ws, w_dim]."""
    points, found, G = stops(model, options), [], model.G
    for a, b in zip(points, points[1:] + points[:1], strict=True):
        w0, w1 = G.mapping(a.z, condition(G, a, b, 0)), G.mapping(b.z, condition(G, a, b, 1))
        for t in (i / options.frames for i in range(options.frames)):
            if options.space == "z":
                found.append(G.mapping(slerp(a.z, b.z, t), condition(G, a, b, t)))
            else:
                found.append(w0.lerp(w1, t))
    return torch.cat(found)


def smoothness(images: np.ndarray, extractor: features.Extractor) -> tuple[float, float]:
    """Mean and largest distance of successive frames [n, R, R] in features, around the loop."""
    values = features.compute_features(images, extractor, None)
    steps = np.linalg.norm(np.roll(values, -1, 0) - values, axis=1)
    return float(steps.mean()), float(steps.max())


def write_movie(images: np.ndarray, options: Options, path: Path) -> float:
    """Write frames uint8 [n, R, R] as an animation that repeats for ever. -> its seconds."""
    size = (options.size, options.size)
    frames = [Image.fromarray(i).resize(size, Image.Resampling.LANCZOS) for i in images]
    duration = max(20, 10 * round(100 * options.seconds / options.frames))  # GIF counts in 10 ms
    how = {"save_all": True, "append_images": frames[1:], "duration": duration, "loop": 0}
    kind = {"format": "webp", "quality": 85} if options.format == "webp" else {"format": "gif"}
    utils.write_atomically(path, lambda target: frames[0].save(target, **kind, **how))
    return len(frames) * duration / 1000


def interpolate(options: Options) -> Path:
    """Write a movie and a strip, print how smooth it is. -> the folder. Raises UserError."""
    model = models.open_model(options)
    ws = path_of(model, options)
    images = images_of(model.G, ws, "frames")
    name = f"interpolate_{options.between}"
    seconds = write_movie(images, options, model.out / f"{name}.{options.format}")
    rows = utils.evenly_spaced(len(images) + 1, min(MAX_STRIP, len(images)))
    shown = images[rows % len(images)]
    columns = [f"{row / options.frames:.2g}" for row in rows]
    names = {
        "seeds": [f"seed {seed}" for seed in options.seeds],
        "classes": model.classes,
        "positions": ["lowest", "highest"],
    }[options.between]
    title = f"{', '.join(names)}, and back; columns: stops passed"
    utils.save_grid(utils.tile(shown, len(rows)), [""], columns, title, model.out / f"{name}.png")
    mean, largest = smoothness(images, features.PIXELS)
    text = f"{len(images)} frames, {seconds:.1f} s. Distance of successive frames, pixels averaged "
    text += f"to 32 x 32, grey levels: mean {mean / 32:.2f}, largest {largest / 32:.2f} "
    utils.print_once(text + f"({largest / max(mean, 1e-9):.1f} times the mean)")
    return model.out
