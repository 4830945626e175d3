"""Arithmetic of the evaluation, on arrays alone: distances of sets, resampling by id, areas.

Features are [n, F], one row a slice; ids are [n]. Distance matrices are made some rows at a time:
20,000 slices with 2,048 features stay under 2 GB.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
    [2] Binkowski et al. 2018, Demystifying MMD GANs, arXiv:1801.01401
    [3] Kynkaanniemi et al. 2019, Improved Precision and Recall Metric, arXiv:1904.06991
    [4] Naeem et al. 2020, Reliable Fidelity and Diversity Metrics, arXiv:2002.09797
    [5] Wang et al. 2003, Multi-scale Structural Similarity, Asilomar Conference
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from tqdm import tqdm

from utils import spread

ROWS = 500  # of a distance matrix at a time
NUM_DRAWS = 200  # of a bootstrap
NUM_BOOTSTRAPS = 20  # of relative distances, which take longer
NUM_PAIRS = 500  # of slices whose similarity is measured


class Features(NamedTuple):
    """Features [n, F] of slices with their ids and classes [n]."""

    values: np.ndarray
    subjects: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Features":
        return Features(*(part[rows] for part in self))

    def of_class(self, label: int | None) -> "Features":
        return self if label is None else self.take(self.labels == label)


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

    The interval is over random halves whose ids are drawn with replacement.
    """
    rng, ratios, floors = np.random.default_rng(seed), [], []
    for _ in tqdm(range(NUM_BOOTSTRAPS), "bootstrap over ids", leave=False):
        halves = halves_by_id(real.subjects, real.labels, rng)
        a, b = (resampled_ids(half, real.subjects, rng) for half in halves)
        n = min(len(a), len(b), len(fake.values))
        fakes = fake.values[rng.choice(len(fake.values), n, replace=False)]
        a, b = (gaussian(real.values[rows[spread(len(rows), n)]]) for rows in (a, b))
        floors.append(gaussian_distance(b, a))
        ratios.append(gaussian_distance(gaussian(fakes), a) / floors[-1])
    found = {"relative_fd": float(np.median(ratios)), "relative_fd_interval": interval(ratios)}
    return found | {"floor_fd": float(np.median(floors)), "floor_n": n}


# Similarity, classes and anatomy


def similarity(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MS-SSIM ([5]) of pairs [n, 2] of uint8 images, over as many scales as their size allows."""
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
