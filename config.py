"""Every setting of the project: edit a default here, or override it on the command line.

With a GPU the defaults of `Config` apply. Without a GPU the smaller values in `CPU`, at the end of
this file, replace them: edit `epochs`, `batch_size` and the sizes there. Each field is also a flag:
`learning_rate` is `--learning-rate`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Bad input that the user can correct. It is printed as one line, without a traceback."""


class Range(NamedTuple):
    """The finite numbers that a setting may have: from `low`, or above it, up to `high`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.above else value >= self.low
        return above and value <= self.high and value < math.inf

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"{self.low}"
        if self.high == math.inf:
            return low if self.above else f"{low} or more"
        return f"{low} to {self.high}"


Share = Annotated[float, Range(0, 1)]
Angle = Annotated[float, Range(0, 180)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Interval = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
ImageSeed = Annotated[int, Range(0, 2**32 - 1)]  # PyTorch's generator uses no more bits
Width = Annotated[int, Range(1, 2**16)]


@dataclass(frozen=True)
class Config:
    """Settings of a run. Raises UserError naming the field, the value and what is allowed."""

    # Paths
    data_root: Path | None = None
    """Folder with train/ and test/, or with class folders; None: the built-in demo brains."""
    table: Path | None = None
    """CSV or TSV that names the participant of each scan; None: manifest.csv or participants.tsv in
    data_root, else the participants that the names of the scans show."""
    out: Path = Path("runs/default")
    """Folder of this run. If it holds a run already, the same command resumes it."""
    cache: Path = Path("cache")
    """Folder of decoded images and demo brains. You may delete it."""

    # Training length and optimizer
    epochs: Annotated[int, Range(1, 10**9)] = 100
    """Passes over the training slices, 1 or more."""
    learning_rate: Positive = 0.0025
    """Step size of Adam for both networks, above 0."""
    cooldown: Share = 0.0
    """Last share of training, in which learning_rate falls to 0, r1_gamma to r1_gamma_end."""
    batch_size: Annotated[int, Range(2, 2**16)] = 32
    """Images per step, all devices together, 2 or more."""
    seed: Seed = 0
    """Seed of weights, latents, sample order and augmentation, 0 to 2^63 - 1."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to compute on; auto: CUDA if there is one, else MPS, else the CPU."""
    num_workers: Annotated[int, Range(0, 1024)] = 8
    """Loader processes per device; 0: the main process loads."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of features of 16 x 16 pixels and more; auto: bfloat16 where it is native and faster."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile; graphs: with CUDA graphs too; auto: beside training with CUDA, else off."""

    # Networks
    img_resolution: Literal[16, 32, 64, 128, 256, 512] = 256
    """Height and width in pixels, a power of two from 16 to 512."""
    z_dim: Width = 512
    """Width of the latent z, 1 or more."""
    w_dim: Width = 512
    """Width of the intermediate latent w, 1 or more."""
    mapping_layers: Annotated[int, Range(1, 64)] = 8
    """Layers of the mapping network, from z to w, 1 or more."""
    channel_base: Annotated[int, Range(16, 2**20)] = 16384
    """At most channel_base / resolution feature maps at a resolution, 16 or more."""
    channel_max: Width = 512
    """At most this many feature maps at any resolution, 1 or more."""
    noise: bool = True
    """Add random noise before each activation of G; G learns the strength of the noise."""

    # Labels
    conditional: bool = True
    """Train with the class as a condition; False: all slices form one class."""
    condition_position: bool = False
    """Train with the position of a slice in its scan, lowest to highest, as a condition too."""
    any_classes: bool = False
    """Accept more than 20 classes, or classes with one participant each."""
    label_ramp_kimg: NotNegative = 0.0
    """Thousands of images over which the weight of the label grows from 0 to 1; 0: at once."""
    init_from: Path | None = None
    """Run whose newest weights a new run starts with, or a checkpoint, such as its best.pt."""

    # Augmentation
    augment: Literal["ada", "dataset", "none"] = "ada"
    """ada: changes all that D sees, adaptively; dataset: changes the real slices; or none."""
    # dataset: G learns to reproduce these changes
    flip_prob: Share = 0.5
    """dataset: probability of a left-right flip, 0 to 1."""
    rotation: Angle = 5.0
    """dataset: largest rotation in degrees, to either side, 0 to 180."""
    brightness: Share = 0.1
    """dataset: largest relative change of brightness, 0 to 1."""
    contrast: Share = 0.1
    """dataset: largest relative change of contrast, 0 to 1."""
    # ada: each kind of change has the probability p; with strength 0 it has no effect
    ada_p: Share | None = None
    """ada: fixed probability, 0 to 1; None: p follows ada_target, from 0 up to 0.8 at most."""
    ada_target: Annotated[float, Range(-1, 1)] = 0.6
    """ada: p rises while the mean sign of D(real) is above this value, -1 to 1."""
    ada_interval: Interval = 4
    """ada: number of steps between changes of p, 1 or more."""
    ada_kimg: Positive = 500.0
    """ada: thousands of images that p needs to go from 0 to 1, above 0."""
    ada_flip: Share = 0.5
    """ada: share of the chosen images that are flipped left-right, 0 to 1."""
    ada_translation: Share = 0.1
    """ada: largest shift by whole pixels, and deviation of other shifts, as share of the side."""
    ada_scale: Share = 0.2
    """ada: standard deviation of log2 of the size, 0 to 1."""
    ada_anisotropy: Share = 0.1
    """ada: standard deviation of log2 of the ratio of width to height, 0 to 1."""
    ada_rotation: Angle = 15.0
    """ada: largest rotation in degrees, to either side, 0 to 180."""
    ada_brightness: Share = 0.2
    """ada: deviation of the number added to all pixels (which span -1 to 1), 0 to 1."""
    ada_contrast: Share = 0.5
    """ada: standard deviation of log2 of the contrast, 0 to 1."""
    ada_noise: Share = 0.1
    """ada: spread over images of the strength of the noise (pixels span -1 to 1), 0 to 1."""
    ada_cutout: Share = 0.5
    """ada: side of the blackened square as a share of the side of the image, 0 to 1."""

    # Loss and regularization
    relativistic: bool = False
    """Losses compare a real and a generated image, and R2 joins R1; False: those of StyleGAN2."""
    r1_gamma: NotNegative | None = None
    """Weight of R1 (and R2), 0 or more; None: 0.0002 * img_resolution^2 / batch_size."""
    r1_gamma_end: Positive | None = None
    """Weight of R1 (and R2) at the end of the cooldown, above 0, up to r1_gamma; None: r1_gamma."""
    r1_interval: Interval = 16
    """Number of steps between R1 penalties, 1 or more."""
    pl_weight: NotNegative = 2.0
    """Weight of path length regularization, 0 or more; 0: off, with Adam's steps as with it."""
    pl_interval: Interval = 4
    """Number of steps between path length penalties, 1 or more."""
    pl_decay: Annotated[float, Range(0, 1, above=True)] = 0.01
    """Weight of the newest batch in the running mean of path lengths, above 0, up to 1."""
    style_mixing_prob: Share = 0.9
    """Probability that the later layers of an image get a second latent, 0 to 1."""
    ema_kimg: NotNegative | None = None
    """Half-life of the averaged generator in thousands of images; None: batch_size * 10 / 32."""
    ema_rampup: NotNegative = 0.05
    """Without init_from: limit of that half-life as a share of images seen; 0: no averaging."""

    # Snapshots
    snapshot_epochs: Interval = 1
    """Epochs between image grids, 1 or more; from epoch 100 on 10 times as many, and so on."""
    checkpoint_kimg: Positive = 100.0
    """Thousands of images between checkpoints, written at the end of an epoch; two are kept."""

    # What a run measures of itself
    fid_kimg: NotNegative = 50.0
    """Thousands of images between measurements (FID, KID, leaks, labels); 0: never."""
    fid_images: Annotated[int, Range(100)] = 2500
    """Number of samples in each measurement, 100 or more."""
    fid_extractor: Literal["encoder", "inception", "dinov2"] = "encoder"
    """Features: a small network trained on the training slices, Inception, or DINOv2."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def gamma(self) -> float:
        """Weight of R1 before the cooldown; the default is that of arXiv:2006.06676."""
        default = 0.0002 * self.img_resolution**2 / self.batch_size
        return default if self.r1_gamma is None else self.r1_gamma


def check_fields(options: Any) -> None:
    """Compare the fields of a dataclass with their types and Ranges; ~ in a path becomes the home.

    Raises UserError.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if not fits(value := getattr(options, name), hint):
            raise UserError(f"{name} = {value}: must be {in_words(hint)}")
        if isinstance(value, Path | tuple):
            object.__setattr__(options, name, at_home(value))  # frozen


def at_home(value: Any) -> Any:
    """A path, or the paths of a tuple, with the home in the place of ~. Raises UserError."""
    if isinstance(value, tuple):
        return tuple(map(at_home, value))
    try:
        return value.expanduser() if isinstance(value, Path) else value
    except RuntimeError as error:
        raise UserError(f"{value}: there is no such home") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type, and lies in its Range if there is one; True is no number."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [part for part in parts[1:] if isinstance(part, Range)]
        return fits(value, parts[0]) and all(value in allowed for allowed in ranges)
    if origin is Literal:
        return value in parts and type(value) is type(parts[0])
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = parts if parts[-1] is not ... else parts[:1] * len(value)
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if parts and origin is not dict:  # a union
        return any(fits(value, part) for part in parts)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else origin or hint)


def in_words(hint: Any) -> str:
    """A type for a message, such as "float, 0 to 1, or None"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{in_words(parts[0])}, {parts[1]}"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        return f"one or more of: {in_words(parts[0])}"
    if hint is Path:
        return 'Path("...")'
    return ", or ".join(map(in_words, parts)) or hint.__name__.replace("NoneType", "None")


# The two named settings: differences from the defaults above
GPU: dict[str, Any] = {}
CPU: dict[str, Any] = {  # twelve epochs of demo brains take about ten minutes on two cores
    "epochs": 12,
    "cooldown": 0.4,
    "batch_size": 8,
    "num_workers": 0,
    "img_resolution": 32,
    "z_dim": 64,
    "w_dim": 64,
    "channel_base": 512,
    "channel_max": 64,
    "relativistic": True,
    "r1_gamma": 1.0,  # far above the default formula: shapes vary after fewer images
    "r1_gamma_end": 0.05,
    "checkpoint_kimg": 3.0,
    "fid_kimg": 3.0,
    "fid_images": 500,
}
