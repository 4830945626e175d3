"""Every setting of the project: edit a default here, or override it on the command line.

With a GPU the defaults below hold. Without one, those named in `CPU` at the end are replaced by the
small values there: edit `epochs`, `batch_size` and the sizes in that place. Each field is also a
flag: `learning_rate` is `--learning-rate`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Bad input that the user can mend; shown as one clear line instead of a traceback."""


class Range(NamedTuple):
    """The finite numbers that a setting may have: from `low`, or above it, up to `high`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.above else value >= self.low
        return above and value <= self.high and math.isfinite(value)

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
Width = Annotated[int, Range(1, 2**16)]


@dataclass(frozen=True)
class Config:
    """Settings of a run. Raises UserError naming the field, the value and what is allowed."""

    # Paths
    data_root: Path | None = None
    """Folder that holds train/ and test/, or the class folders; None: built-in demo brains."""
    out: Path = Path("runs/default")
    """Folder of this run; the same command resumes the run it holds."""
    cache: Path = Path("cache")
    """Folder of decoded images and demo brains; safe to delete."""

    # Training length and optimizer
    epochs: Annotated[int, Range(1, 10**9)] = 100
    """Passes over the training slices, 1 or more."""
    learning_rate: Positive = 0.0025
    """Adam's step size for both networks, above 0."""
    batch_size: Annotated[int, Range(2, 2**16)] = 32
    """Images per step over all devices, 2 or more."""
    seed: Seed = 0
    """Seed of weights, latents, sample order and augmentation, 0 to 2^63 - 1."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    num_workers: Annotated[int, Range(0, 1024)] = 8
    """Loader processes of each device; 0 loads in the main process."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Features from 16 x 16 pixels upwards; auto: bfloat16 where that is native and faster."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile, with graphs as CUDA graphs too; auto: on with CUDA, off without."""

    # Networks
    img_resolution: Literal[16, 32, 64, 128, 256, 512] = 256
    """Height and width in pixels, a power of two from 16 to 512."""
    z_dim: Width = 512
    """Width of the latent z, 1 or more."""
    w_dim: Width = 512
    """Width of the intermediate latent w, 1 or more."""
    mapping_layers: Annotated[int, Range(1, 64)] = 8
    """Layers from z to w, 1 or more."""
    channel_base: Annotated[int, Range(16, 2**20)] = 16384
    """Feature maps times resolution, 16 or more: at most channel_base / res maps."""
    channel_max: Width = 512
    """Most feature maps at any resolution, 1 or more."""
    noise: bool = True
    """Noise inputs: random numbers before each activation of G, of a strength it learns."""

    # Labels
    conditional: bool = True
    """Condition on the class; False takes all slices for one class."""
    condition_position: bool = False
    """Condition on the place of a slice in its id too, from lowest to highest."""
    any_classes: bool = False
    """Train on more than 20 classes too, or on classes of a single id: they may be patients."""
    label_ramp_kimg: NotNegative = 0.0
    """Thousands of images over which the label gains its full weight from none; 0: at once."""
    init_from: Path | None = None
    """Run whose newest weights a new run starts from, such as an unconditional one."""

    # Augmentation
    augment: Literal["ada", "dataset", "none"] = "ada"
    """ada: of all that D sees, adaptively; dataset: of the real slices, by the loader; or none."""
    # dataset: what it does to the data, G learns to reproduce
    flip_prob: Share = 0.5
    """dataset: probability of a left-right flip, 0 to 1."""
    rotation: Angle = 5.0
    """dataset: largest rotation in degrees, either way, 0 to 180."""
    brightness: Share = 0.1
    """dataset: largest relative change of brightness, 0 to 1."""
    contrast: Share = 0.1
    """dataset: largest relative change of contrast, 0 to 1."""
    # ada: each kind of change has the probability p and, if its strength is 0, no effect
    ada_p: Share | None = None
    """ada: a fixed probability, 0 to 1; None: it follows ada_target, from 0 up to 0.8 at most."""
    ada_target: Annotated[float, Range(-1, 1)] = 0.6
    """ada: mean sign of D(real) above which p rises, -1 to 1."""
    ada_interval: Interval = 4
    """ada: steps from one change of p to the next, 1 or more."""
    ada_kimg: Positive = 500.0
    """ada: thousands of images in which p could go from 0 to 1, above 0."""
    ada_flip: Share = 0.5
    """ada: share of left-right flips, 0 to 1."""
    ada_translation: Share = 0.1
    """ada: largest shift by whole pixels, deviation of a finer one, in sides, 0 to 1."""
    ada_scale: Share = 0.2
    """ada: deviation of log2 of the size, 0 to 1."""
    ada_anisotropy: Share = 0.1
    """ada: deviation of log2 of the ratio of width to height, 0 to 1."""
    ada_rotation: Angle = 15.0
    """ada: largest rotation in degrees, either way, 0 to 180."""
    ada_brightness: Share = 0.2
    """ada: deviation of what is added to all pixels of an image, which is in [-1, 1], 0 to 1."""
    ada_contrast: Share = 0.5
    """ada: deviation of log2 of the contrast, 0 to 1."""
    ada_noise: Share = 0.1
    """ada: deviation of the deviation of added noise, in an image in [-1, 1], 0 to 1."""
    ada_cutout: Share = 0.5
    """ada: side of a square that is blackened, of the image's side, 0 to 1."""

    # Regularization
    r1_gamma: NotNegative | None = None
    """Weight of the R1 penalty, 0 or more; None: 0.0002 * img_resolution^2 / batch_size."""
    r1_interval: Interval = 16
    """Steps from one R1 penalty to the next, 1 or more."""
    pl_weight: NotNegative = 2.0
    """Weight of path length regularization; 0 turns it off."""
    pl_interval: Interval = 4
    """Steps from one path length penalty to the next, 1 or more."""
    pl_decay: Annotated[float, Range(0, 1, above=True)] = 0.01
    """Weight of the newest batch in the running mean of path lengths, above 0, up to 1."""
    style_mixing_prob: Share = 0.9
    """Probability that an image takes its later layers from a second latent, 0 to 1."""
    ema_kimg: NotNegative | None = None
    """Half-life of the averaged generator, thousands of images; None: batch_size * 10 / 32."""
    ema_rampup: NotNegative = 0.05
    """Limit of that half-life, as a share of the images seen so far; 0 turns averaging off."""

    # Snapshots
    snapshot_epochs: Interval = 1
    """Epochs from one image grid to the next, 1 or more; 10 times as many from epoch 100 on, ..."""
    checkpoint_kimg: Positive = 100.0
    """Thousands of images from one checkpoint to the next, at ends of epochs; two are kept."""

    # What a run measures of itself
    fid_kimg: NotNegative = 50.0
    """Thousands of images from one measurement (FID, KID, leaks, labels) to the next; 0: never."""
    fid_images: Annotated[int, Range(100)] = 2500
    """Samples in each, 100 or more."""
    fid_extractor: Literal["encoder", "inception"] = "encoder"
    """Features of FID: of a small network trained on the training slices, or FID's own."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(options: Any) -> None:
    """Compare the fields of a dataclass with their types and Ranges. Raises UserError."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if not fits(value := getattr(options, name), hint):
            raise UserError(f"{name} = {value}: must be {in_words(hint)}")


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
    return ", or ".join(map(in_words, parts)) or hint.__name__.replace("NoneType", "None")


# The two named settings: what differs from the defaults above
GPU: dict[str, Any] = {}
CPU: dict[str, Any] = {  # eight epochs of demo brains end within ten minutes on two cores
    "epochs": 8,
    "batch_size": 8,
    "num_workers": 0,
    "img_resolution": 32,
    "z_dim": 64,
    "w_dim": 64,
    "channel_base": 512,
    "channel_max": 64,
    "noise": False,  # in so short a run it makes texture that hides how alike the images are
    "r1_gamma": 1.0,  # far above the formula: shapes vary after fewer images
    "ema_rampup": 0.1,
    "checkpoint_kimg": 3.0,
    "fid_kimg": 3.0,
    "fid_images": 500,
}
