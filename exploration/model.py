"""The generator that is explored, the real slices it was trained on, and what images measure."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro
from torch import Tensor
from torch.nn import functional as F

import utils
from config import Config, ImageSeed, Share, UserError, check_fields
from dataset import Slices
from evaluation import features, metrics
from evaluation.samples import labels_of, latents, mapped
from modules import Generator
from participants.names import normalized
from scans.heads import moments
from training import process, runs

CLASSIFIER_STEPS = 600
CHUNK = 50  # images that are held in memory at a time
ATTRIBUTES = {  # what is measured in an image, and its unit
    "ventricles": "% of the image",
    "brain": "% of the image",
    "brightness": "grey levels of the brain",
    "tilt": "degrees",
    "shift to the right": "% of the side",
    "shift down": "% of the side",
}


@dataclass(frozen=True)
class Options:
    """Options of all commands. Raises UserError naming the option, its value and what fits."""

    checkpoint: Path | None = None
    """Run folder, generator.safetensors or checkpoints/*.pt; None: the newest run, or the demo."""
    out: Path | None = None
    """Folder for what is written; None: RUN/explore."""
    seeds: tuple[ImageSeed, ...] = (0, 1, 2, 3)
    """Seeds of the images that are drawn, each 0 to 2^32 - 1."""
    position: Share | None = None
    """Position in the scan, 0 lowest to 1, if the run has condition_position; None: by seed, or the
    middle for a slice that is projected."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.seeds:
            raise UserError("seeds = (): at least one is needed")


@dataclass(frozen=True)
class RealOptions(Options):
    """Options of commands that compare with real slices."""

    data_root: Path | None = None
    """Folder of real slices to compare with; None: the folder that the run was trained on."""
    table: Path | None = None
    """CSV or TSV that names the participant of each real scan; None: the one of the run."""
    cache: Path | None = None
    """Folder of decoded images; None: the cache of the run."""


@dataclass(frozen=True)
class ChangeOptions(RealOptions):
    """Options of commands that change the class."""

    by: Literal["w", "label"] = "w"
    """How a class is changed. w: all w move by the difference of the classes' mean w, which keeps
    more of the person; label: another label into the mapping network."""


CLASS = tyro.conf.arg(name="class")
Classes = Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="FROM TO")]


@dataclass(frozen=True)
class Model:
    """A generator, its settings and class names, and the folder for what is written about it."""

    G: Generator
    config: Config
    classes: list[str]
    source: Path
    out: Path
    position: float | None = None
    by: Literal["w", "label"] = "label"

    def change(self, z: Tensor, c: Tensor, to: Tensor) -> Tensor:
        """ws of latents z [N, z_dim], changed from conditions c to others [N, c_dim].

        By "label", z is mapped with the other condition. By "w", all w move by the difference of
        the mean w of both conditions. -> [N, num_ws, w_dim].
        """
        ws = mapped(self.G, z, to if self.by == "label" else c, 1)
        if self.by == "label" or not self.G.c_dim:
            return ws
        return ws + ((to - c) @ self.G.mapping.w_avg)[:, None]

    def c(self, label: int | np.ndarray, seeds: list[int]) -> Tensor:
        """Condition of seeds, in one class or each in its own. -> [N, c_dim], on G's device."""
        c = labels_of(self.G, np.full(len(seeds), label), seeds, self.position)
        return c.to(next(self.G.parameters()).device)

    def position_of(self, seed: int) -> float:
        """Position in the scan of a seed's image, if the generator has positions."""
        own = np.random.default_rng(seed).random() if self.position is None else self.position
        return float(own)

    def z(self, seeds: list[int]) -> Tensor:
        """The latents of some seeds. -> [N, z_dim], on the generator's device."""
        return latents(seeds, self.G.z_dim).to(next(self.G.parameters()).device)

    def ws(self, seeds: list[int], c: Tensor) -> Tensor:
        """ws of some seeds and conditions [N, c_dim]. -> [N, num_ws, w_dim]."""
        return self.change(self.z(seeds), c, c)

    def pair(self, names: tuple[str, str] | None) -> tuple[int, int]:
        """Two classes, by default from the last to the first (NC to AD). Raises UserError."""
        if len(self.classes) < 2:
            raise UserError(f"{self.source} has one class, {self.classes[0]}: nothing to compare")
        names = names or (self.classes[-1], self.classes[0])
        if names[0] == names[1]:
            raise UserError(f"classes = {names}: two different ones are needed")
        first, second = (self.index(name) for name in names)
        return first, second

    def index(self, name: str) -> int:
        """The number of a class. Raises UserError that lists the known names."""
        known = [normalized(own) for own in self.classes]
        if normalized(name) not in known:
            raise UserError(f"class = {name}: this generator knows {', '.join(self.classes)}")
        return known.index(normalized(name))


class Real(NamedTuple):
    """Real slices, and the features of an encoder trained on those in train/."""

    train: Slices
    test: Slices
    extractor: features.Extractor
    is_demo: bool
    trained_on: bool = True  # whether they are those of the run, split in the same way


def open_model(options: Options, writes: bool = True) -> Model:
    """Load the generator. Raises UserError if its folder, when `writes`, cannot be written."""
    source = options.checkpoint or runs.newest_run()
    G, config, classes = runs.load_generator(source)
    if options.position is not None and not G.by_position:
        text = f"position = {options.position}"
        raise UserError(f"{text}: a generator without condition_position has none")
    G.to(process.resolve_device(options.device))
    out = options.out or runs.output_folder(source, "explore")
    if writes:
        utils.ensure_writable(out)
    cache = getattr(options, "cache", None) or runs.cache_of(config)
    by = getattr(options, "by", "label")
    return Model(G, replace(config, cache=cache), classes, source, out, options.position, by)


def open_real(model: Model, options: Options, without: str) -> Real | None:
    """The real slices of the run, or None, which is said with the words of `without`."""
    places = options.data_root, options.table
    found = runs.real_slices(model.source, model.config, model.classes, *places, without)
    if found is None:
        return None
    splits, data = found
    own = runs.own_encoder(model.source, data)
    encoder, digest = features.trained_encoder(splits["train"], data, model.config.cache, own)
    is_demo = (options.data_root or model.config.data_root) is None
    encoder.to(next(model.G.parameters()).device).requires_grad_(False)  # of images only
    extractor = features.encoder_extractor(encoder, digest, data)
    return Real(
        splits["train"], splits["test"], extractor, is_demo, runs.trained_on(model.source, data)
    )


def class_score(classifier: features.Encoder | None, images: np.ndarray, label: int) -> np.ndarray:
    """Probability of a class for images [n, R, R]; NaN without a classifier. -> [n]."""
    if classifier is None:
        return np.full(len(images), np.nan)
    return features.class_scores(classifier, features.averaged(images))[:, label]


def classifier_of(real: Real) -> features.Encoder:
    """A classifier of the real training slices, which knows nothing of the generator."""
    targets = utils.one_hot(real.train.labels, len(real.train.classes))
    x = features.averaged(real.train.images)
    return features.fit_encoder(x, targets, F.cross_entropy, 0, steps=CLASSIFIER_STEPS)


def attributes(images: np.ndarray) -> np.ndarray:
    """The ATTRIBUTES of images uint8 [n, R, R]. -> [n, 6].

    Ventricles and brain by `metrics.segment`; tilt and place of the head by `moments`.
    """

    def areas(image: np.ndarray) -> tuple[float, float, float]:
        brain, ventricles = metrics.segment(image)
        grey = float(np.median(image[brain])) if brain.any() else 0.0
        return 100 * float(ventricles.mean()), 100 * float(brain.mean()), grey

    x, y, tilt, _ = moments(images)
    found = np.array(utils.map_on_cores(areas, images, None, "image")).reshape(-1, 3)
    share = 100 / images.shape[-1]
    return np.column_stack([found, tilt, x * share, y * share])


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over rows [n, ...] and half the width of its 95 % interval, for independent rows."""
    error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan * values[0]
    return values.mean(0), 1.96 * error
