"""Every setting of the project: edit a default here, or override it on the command line.

With a GPU the defaults below hold. Without one, those named in `CPU` at the end are replaced by the
small values there: edit `epochs`, `batch_size` and the sizes in that place. Each field is also a
flag: `learning_rate` is `--learning-rate`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints


class UserError(ValueError):
    """Bad input that the user can mend; shown as one clear line instead of a traceback."""


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
    epochs: int = 100
    """Passes over the training slices, 1 or more."""
    learning_rate: float = 0.0025
    """Adam's step size for both networks, above 0."""
    batch_size: int = 32
    """Images per step over all devices, 2 or more."""
    seed: int = 0
    """Seed of weights, latents, sample order and augmentation, 0 to 2^63 - 1."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    num_workers: int = 8
    """Loader processes of each device; 0 loads in the main process."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Features from 16 x 16 pixels upwards; auto: bfloat16 where that is native and faster."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile, with graphs as CUDA graphs too; auto: on with CUDA, off without."""

    # Networks
    img_resolution: int = 256
    """Height and width in pixels, a power of two from 16 to 512."""
    z_dim: int = 512
    """Width of the latent z, 1 or more."""
    w_dim: int = 512
    """Width of the intermediate latent w, 1 or more."""
    mapping_layers: int = 8
    """Layers from z to w, 1 or more."""
    channel_base: int = 16384
    """Feature maps times resolution, 16 or more: at most channel_base / res maps."""
    channel_max: int = 512
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
    label_ramp_kimg: float = 0.0
    """Thousands of images over which the label gains its full weight from none; 0: at once."""
    init_from: Path | None = None
    """Run whose newest weights a new run starts from, such as an unconditional one."""

    # Augmentation
    augment: Literal["ada", "dataset", "none"] = "ada"
    """ada: of all that D sees, adaptively; dataset: of the real slices, by the loader; or none."""
    # dataset: what it does to the data, G learns to reproduce
    flip_prob: float = 0.5
    """dataset: probability of a left-right flip, 0 to 1."""
    rotation: float = 5.0
    """dataset: largest rotation in degrees, either way, 0 to 180."""
    brightness: float = 0.1
    """dataset: largest relative change of brightness, 0 to 1."""
    contrast: float = 0.1
    """dataset: largest relative change of contrast, 0 to 1."""
    # ada: each kind of change has the probability p and, if its strength is 0, no effect
    ada_p: float | None = None
    """ada: a fixed probability, 0 to 1; None: it follows ada_target, from 0 up to 0.8 at most."""
    ada_target: float = 0.6
    """ada: mean sign of D(real) above which p rises, -1 to 1."""
    ada_interval: int = 4
    """ada: steps from one change of p to the next, 1 or more."""
    ada_kimg: float = 500.0
    """ada: thousands of images in which p could go from 0 to 1, above 0."""
    ada_flip: float = 0.5
    """ada: share of left-right flips, 0 to 1."""
    ada_translation: float = 0.1
    """ada: largest shift by whole pixels, deviation of a finer one, in sides, 0 to 1."""
    ada_scale: float = 0.2
    """ada: deviation of log2 of the size, 0 to 1."""
    ada_anisotropy: float = 0.1
    """ada: deviation of log2 of the ratio of width to height, 0 to 1."""
    ada_rotation: float = 15.0
    """ada: largest rotation in degrees, either way, 0 to 180."""
    ada_brightness: float = 0.2
    """ada: deviation of what is added to all pixels of an image, which is in [-1, 1], 0 to 1."""
    ada_contrast: float = 0.5
    """ada: deviation of log2 of the contrast, 0 to 1."""
    ada_noise: float = 0.1
    """ada: deviation of the deviation of added noise, in an image in [-1, 1], 0 to 1."""
    ada_cutout: float = 0.5
    """ada: side of a square that is blackened, of the image's side, 0 to 1."""

    # Regularization
    r1_gamma: float | None = None
    """Weight of the R1 penalty, 0 or more; None: 0.0002 * img_resolution^2 / batch_size."""
    r1_interval: int = 16
    """Steps from one R1 penalty to the next, 1 or more."""
    pl_weight: float = 2.0
    """Weight of path length regularization; 0 turns it off."""
    pl_interval: int = 4
    """Steps from one path length penalty to the next, 1 or more."""
    pl_decay: float = 0.01
    """Weight of the newest batch in the running mean of path lengths, above 0, up to 1."""
    style_mixing_prob: float = 0.9
    """Probability that an image takes its later layers from a second latent, 0 to 1."""
    ema_kimg: float | None = None
    """Half-life of the averaged generator, thousands of images; None: batch_size * 10 / 32."""
    ema_rampup: float = 0.05
    """Limit of that half-life, as a share of the images seen so far; 0 turns averaging off."""

    # Snapshots
    snapshot_epochs: int = 1
    """Epochs from one image grid to the next, 1 or more; 10 times as many from epoch 100 on, ..."""
    checkpoint_kimg: float = 100.0
    """Thousands of images from one checkpoint to the next, at ends of epochs; two are kept."""

    # What a run measures of itself
    fid_kimg: float = 50.0
    """Thousands of images from one measurement (FID, KID, leaks, labels) to the next; 0: never."""
    fid_images: int = 2500
    """Samples in each, 100 or more."""
    fid_extractor: Literal["encoder", "inception"] = "encoder"
    """Features of FID: of a small network trained on the training slices, or FID's own."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Config).items():
            allowed = list(get_args(hint) or [hint])  # types, or the very values
            names = " or ".join(getattr(kind, "__name__", kind) for kind in allowed)
            names = names.replace("NoneType", "None")
            self._require(name, fits(getattr(self, name), allowed), names)
        sizes = (16, 32, 64, 128, 256, 512)
        at_least = {
            "epochs": 1, "batch_size": 2, "num_workers": 0, "z_dim": 1, "w_dim": 1,
            "mapping_layers": 1, "channel_base": 16, "channel_max": 1, "r1_interval": 1,
            "pl_weight": 0, "pl_interval": 1, "ema_rampup": 0, "snapshot_epochs": 1,
            "label_ramp_kimg": 0, "ada_interval": 1, "fid_kimg": 0, "fid_images": 100,
        }  # fmt: skip
        self._require("img_resolution", self.img_resolution in sizes, f"one of {sizes}")
        for name, low in at_least.items():
            self._require(name, low <= getattr(self, name) < float("inf"), f"{low} or more")
        at_most = {  # beyond it a number is a slip, or meant to take all memory
            "epochs": 10**9, "batch_size": 2**16, "num_workers": 1024, "z_dim": 2**16,
            "w_dim": 2**16, "mapping_layers": 64, "channel_base": 2**20, "channel_max": 2**16,
        }  # fmt: skip
        for name, high in at_most.items():
            self._require(name, getattr(self, name) <= high, f"{high} or less")
        self._require("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        for name in (
            "flip_prob", "style_mixing_prob", "brightness", "contrast", "ada_flip",
            "ada_translation", "ada_scale", "ada_anisotropy", "ada_brightness", "ada_contrast",
            "ada_noise", "ada_cutout",
        ):  # fmt: skip
            self._require(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("rotation", "ada_rotation"):
            self._require(name, 0 <= getattr(self, name) <= 180, "0 to 180 degrees")
        for name in ("learning_rate", "ada_kimg", "checkpoint_kimg"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "above 0")
        self._require("ada_target", -1 <= self.ada_target <= 1, "-1 to 1")
        self._require("ada_p", self.ada_p is None or 0 <= self.ada_p <= 1, "0 to 1, or None")
        self._require("pl_decay", 0 < self.pl_decay <= 1, "above 0, up to 1")
        for name in ("r1_gamma", "ema_kimg"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < float("inf"), "0 or more, or None")

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise UserError(f"{name} = {getattr(self, name)}: must be {allowed}")


def fits(value: Any, allowed: list[Any]) -> bool:
    """Whether a value is one of the allowed ones, or of an allowed type; True is no number."""
    types = [kind for kind in allowed if isinstance(kind, type)]
    if float in types:
        types.append(int)
    if isinstance(value, bool):
        return bool in types
    return value in allowed or isinstance(value, tuple(types))


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
