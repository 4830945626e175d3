"""Arithmetic of the evaluation, on arrays alone: distances of sets, resampling by id, areas.

Features are [n, F], one row a slice; ids are [n]. Distance matrices are made some rows at a time:
20,000 slices with 2,048 features stay under 2 GB.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
    [2] Binkowski et al. 2018, Demystifying MMD GANs, arXiv:1801.01401
    [3] Kynkaanniemi et al. 2019, Improved Precision and Recall Metric, arXiv:1904.06991
    [4] Naeem et al. 2020, Reliable Fidelity and Diversity Metrics, arXiv:2002.09797
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor

ROWS = 500  # of a distance matrix at a time
NUM_DRAWS = 200  # of a bootstrap


# Distances of two sets


def gaussian(x: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean [F] of features [n, F], and A [min(n, F), F] with A^T A their covariance."""
    values = torch.from_numpy(np.asarray(x, np.float64))
    mean = values.mean(0)
    A = (values - mean) / math.sqrt(len(values) - 1)
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


# Classes and anatomy


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
