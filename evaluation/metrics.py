"""Arithmetic on features, images and scores: distances, neighbours, resampling, areas, leaks.

Nothing here knows a network or a run. Features are [n, F], one row per slice; participants and
labels are [n]. The unit is the participant: halves, bootstraps and neighbours never mix slices of
one participant. Distance matrices are computed in blocks of rows, so that 20,000 slices with 2,048
features need about 2 GB.

References:
    [1] Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500
    [2] Binkowski et al. 2018, Demystifying MMD GANs, arXiv:1801.01401
    [3] Kynkaanniemi et al. 2019, Improved Precision and Recall Metric, arXiv:1904.06991
    [4] Naeem et al. 2020, Reliable Fidelity and Diversity Metrics, arXiv:2002.09797
    [5] Wang et al. 2003, Multi-scale Structural Similarity, Asilomar Conference
    [6] Chen et al. 2020, GAN-Leaks, arXiv:1909.03935
    [7] Watson et al. 2022, Difficulty Calibration in Membership Inference, arXiv:2111.08440
    [8] Chong and Forsyth 2020, Effectively Unbiased FID, arXiv:1911.07023
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from scans.heads import moments, otsu_threshold, rotate_and_centre
from utils import map_in_chunks, random_rows

ROWS = 500  # rows of a distance matrix that are computed at a time
NUM_DRAWS = 200  # draws of a bootstrap
NUM_HALVES = 200  # random halves of the participants
MAX_PEOPLE = 2000  # whose distances to samples are compared: memory grows with their square
NUM_SHAPES = 20  # principal components along which samples are compared, in three groups
SHAPES = {"shapes_1_1": slice(1), "shapes_2_6": slice(1, 6), "shapes_7_20": slice(6, NUM_SHAPES)}
MAX_KERNEL = 2000  # slices of a set that the kernel distance compares
NUM_PAIRS = 500  # pairs of slices whose similarity is measured
Measure = Callable[[np.ndarray, np.ndarray], float]  # of values and labels of slices
Gaussian = tuple[Tensor, Tensor]  # mean and factor of the covariance, see `gaussian`


class Features(NamedTuple):
    """Features [n, F] of slices with their participants and class indices [n]."""

    values: np.ndarray
    participants: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Features":
        return Features(*(part[rows] for part in self))

    def of_class(self, label: int | None) -> "Features":
        return self if label is None else self.take(self.labels == label)


# Distances of two sets


def participation_ratio(x: np.ndarray) -> float:
    """How many directions features [n, F] fill: (sum of variances)^2 / sum of squared variances."""
    variances = torch.linalg.svdvals(gaussian(x)[1]).square()
    return float(variances.sum() ** 2 / variances.square().sum())


def gaussian(x: np.ndarray) -> Gaussian:
    """Mean [F] of features [n, F], and A [min(n, F), F] such that A^T A is their covariance."""
    A = torch.from_numpy(np.array(x, np.float64))
    mean = A.mean(0)
    A.sub_(mean).div_(math.sqrt(max(0, len(A) - 1)))
    return mean, torch.linalg.qr(A, mode="r").R if len(A) > A.shape[1] else A


def gaussian_distance(p: Gaussian, q: Gaussian) -> float:
    """Squared Fréchet distance; NaN if a Gaussian was fitted to a single row.

    Tr sqrt(Sp Sq) is the sum of the singular values of A B^T, which needs no matrix square root.
    """
    (mean_p, A), (mean_q, B) = p, q
    if A.isnan().any() or B.isnan().any():
        return math.nan
    cross = torch.linalg.svdvals(A @ B.T).sum()
    return float((mean_p - mean_q).square().sum() + A.square().sum() + B.square().sum() - 2 * cross)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to features [n, F] and [m, F] ([1])."""
    return gaussian_distance(gaussian(x), gaussian(y))


def kernel_distance(x: Features, y: Features, seed: int = 0) -> tuple[float, float]:
    """KID ([2]): unbiased MMD^2, kernel (x.y/F + 1)^3. -> KID, error; NaN if participants are few.

    Slices of one participant are alike, so their pairs are left out. The error is the deviation
    over random halves of the participants, up to twice too large where KID is near 0. Of a set,
    MAX_KERNEL slices are used at most.
    """
    sets = [part.take(random_rows(len(part.values), MAX_KERNEL)) for part in (x, y)]
    values = [torch.from_numpy(part.values).double() for part in sets]
    whose = [torch.from_numpy(codes_of(part.participants)) for part in sets]
    counts = [codes.bincount().double() for codes in whose]

    def sums(i: int, j: int) -> Tensor:
        """The kernel, summed over the slices of each participant of both sets."""
        kernel = (values[i] @ values[j].T / values[i].shape[1] + 1) ** 3
        rows = kernel.new_zeros(len(counts[i]), len(whose[j])).index_add_(0, whose[i], kernel)
        return rows.new_zeros(len(counts[j]), len(rows)).index_add_(0, whose[j], rows.T.clone()).T

    def distance(*chosen: Tensor) -> float:
        """KID of the participants with a 1 in two vectors."""
        (a, b), (n, m) = chosen, counts
        total = -2 * (a @ cross @ b) / ((a @ n) * (b @ m))
        for c, n, kernel in zip(chosen, counts, within, strict=True):
            total += (c @ kernel @ c - c @ kernel.diag()) / ((c @ n) ** 2 - c @ n**2)
        return float(total)

    within, cross = (sums(0, 0), sums(1, 1)), sums(0, 1)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(50):
        halves = (rng.permutation(len(n)) < len(n) // 2 for n in counts)
        draws.append(distance(*(torch.from_numpy(half).double() for half in halves)))
    return distance(*map(torch.ones_like, counts)), float(np.std(draws))


def main_axes(reference: Gaussian, count: int) -> np.ndarray:
    """The first principal axes of a Gaussian, scaled so that it has deviation 1 along each.

    -> float64 [F, count], fewer columns if it fills fewer directions. The deviations of other
    features @ axes are a profile: 1 everywhere if they vary as the reference does.
    """
    _, deviations, axes = torch.linalg.svd(reference[1], full_matrices=False)
    filled = deviations > 1e-6 * deviations[0].clamp(min=1e-6)
    return (axes[filled] / deviations[filled, None])[:count].T.numpy()


def median_deviation(values: np.ndarray) -> float:
    """Median over columns of their standard deviation; NaN without columns. [n, k] -> number."""
    return float(np.median(values.std(0))) if values.size else math.nan


def shape_spread(along: np.ndarray) -> dict[str, float]:
    """Median deviation of the first, of the next five and of further components. [n, k] -> SHAPES.

    `along` holds features along `main_axes`: 1 for samples that vary as the reference does.
    """
    return {name: median_deviation(along[:, part]) for name, part in SHAPES.items()}


# Neighbours


def distance_rows(
    x: np.ndarray, y: np.ndarray, participants: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Euclidean distances of x [n, F] to y [m, F], some rows at a time: float64 [rows, m].

    If x and y are the same slices and `participants` [n] is given, the distance between two slices
    of one participant is infinite.
    """
    b = torch.from_numpy(y).double()
    squares = b.square().sum(1)
    codes = None if participants is None else codes_of(participants)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        a = torch.from_numpy(x[rows]).double()
        squared = (a @ b.T).mul_(-2).add_(squares).add_(a.square().sum(1)[:, None])
        found = squared.clamp_(min=0).sqrt_().numpy()
        if codes is not None:
            found[codes[rows][:, None] == codes] = np.inf
        yield rows, found


def neighbour_radii(part: Features) -> np.ndarray:
    """Distances [n, 2] to the 3rd and 5th nearest slice of other participants; inf if too few."""
    x = part.values
    if len(x) < 5:
        return np.full((len(x), 2), np.inf)
    blocks = (found for _, found in distance_rows(x, x, part.participants))
    return np.concatenate([np.partition(found, (2, 4))[:, [2, 4]] for found in blocks])


def manifold_metrics(real: Features, fake: Features) -> dict[str, float]:
    """Precision and recall (k = 3, [3]), density and coverage (k = 5, [4]).

    Slices of one participant are not counted as neighbours. Of the larger set as many slices are
    taken as the smaller one has, since coverage rises with the number of samples. NaN where a slice
    has fewer than five neighbours.
    """
    names = ("precision", "recall", "density", "coverage")
    n = min(len(part.values) for part in (real, fake))
    real, fake = (s.take(random_rows(len(s.values), n)) for s in (real, fake))
    radii, fake_radii = neighbour_radii(real), neighbour_radii(fake)
    if np.isinf(radii).any() or np.isinf(fake_radii).any():
        return dict.fromkeys(names, math.nan)
    recalled, covered = np.zeros((2, len(real.values)), bool)
    precise = near = 0
    for rows, found in distance_rows(fake.values, real.values):
        precise += (found < radii[:, 0]).any(1).sum()
        inside = found < radii[:, 1]
        near += inside.sum()
        covered |= inside.any(0)
        recalled |= (found < fake_radii[rows, :1]).any(0)
    values = precise / n, recalled.mean(), near / (5 * n), covered.mean()
    return dict(zip(names, map(float, values), strict=True))


def nearest_neighbour(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each row of x to the nearest row of y, and the index of that row."""
    parts = [(found.min(1), found.argmin(1)) for _, found in distance_rows(x, y)]
    gaps, partners = (np.concatenate(part) for part in zip(*parts, strict=True))
    return gaps, partners


def copy_audit(
    train: np.ndarray, test: np.ndarray, fake: np.ndarray, participants: np.ndarray, seed: int
) -> dict[str, Any]:
    """Share of samples that lie nearer to a training slice than 99 % of the real test slices do.

    `participants` are those of the test slices, which set the threshold. `share_by_chance` is the
    share of test slices below the threshold that the other test participants set. The interval
    comes from drawing samples, and whole test participants, with replacement. `excess_interval` is
    that of the share minus that of the test participants who were not drawn.
    """
    test_gaps, _ = nearest_neighbour(test, train)
    gaps, partners = nearest_neighbour(fake, train)
    rng, codes, draws, excess = np.random.default_rng(seed), codes_of(participants), [], []
    for _ in range(NUM_DRAWS):
        rows = resampled_participants(np.arange(len(test)), codes, rng)
        limit = np.percentile(test_gaps[rows], 1)
        draws.append((rng.choice(gaps, len(gaps)) < limit).mean())
        if len(others := test_gaps[~np.isin(codes, codes[rows])]):
            excess.append(draws[-1] - (others < limit).mean())
    threshold = float(np.percentile(test_gaps, 1))
    found = {"threshold": threshold, "test_gaps": test_gaps, "gaps": gaps, "partners": partners}
    found["share_too_near"] = float((gaps < threshold).mean())
    parts = [(test_gaps[codes == i], test_gaps[codes != i]) for i in range(codes.max() + 1)]
    near = sum((own < np.percentile(others, 1)).sum() for own, others in parts if len(others))
    found["share_by_chance"] = float(near / len(test)) if len(parts) > 1 else math.nan
    if excess:
        found["excess_interval"] = interval(excess)
    return found | {"interval_over_participants": interval(draws)}


def membership(train: Features, test: Features, fake: np.ndarray, seed: int) -> dict[str, Any]:
    """Are training participants nearer to the samples than test participants? AUCs.

    The distance of a participant is the mean over the slices of the distance to the nearest sample
    ([6]). Medians and intervals over random halves of the participants of:

    - `auc`: 0.5 if training and test participants are equally near.
    - `auc_cohorts`: the same with slices of the other half of the training participants in the
      place of samples. These slices memorise nobody: a value other than 0.5 shows that the two
      cohorts differ.
    - `auc_calibrated`: the distance to the samples divided by the distance to these slices ([7]).

    Of more than MAX_PEOPLE participants in train or test, so many are drawn.
    """
    rng = np.random.default_rng(seed)
    train, test = parts = [some_people(part, MAX_PEOPLE, rng) for part in (train, test)]
    to_fakes = [nearest_neighbour(part.values, fake)[0] for part in parts]
    codes = codes_of(train.participants)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(codes.max() + 1))
    to_participants = []  # distance of each slice to the nearest slice of each training participant
    for part in parts:
        blocks = (found[:, order] for _, found in distance_rows(part.values, train.values))
        to_participants.append(np.concatenate([np.minimum.reduceat(b, starts, 1) for b in blocks]))
    draws: dict[str, list[float]] = {"auc": [], "auc_cohorts": [], "auc_calibrated": []}
    for _ in range(NUM_HALVES):
        members, withheld = halves_by_participant(train.participants, train.labels, rng)
        others, _ = halves_by_participant(test.participants, test.labels, rng)
        if not len(members) or not len(others):
            return dict.fromkeys(draws, math.nan)
        held, scores = np.unique(codes[withheld]), []
        for i, rows in enumerate((members, others)):
            near, real = to_fakes[i][rows], to_participants[i][rows][:, held].min(1)
            values = np.stack([near, real, near / np.maximum(real, 1e-9)], 1)
            whose, labels = parts[i].participants[rows], parts[i].labels[rows]
            scores.append(mean_by_participant(values, whose, labels)[0])
        member = np.repeat([0, 1], [len(s) for s in scores])  # members have smaller distances
        for column, values in zip(draws.values(), np.concatenate(scores).T, strict=True):
            column.append(auc(member, values))
    found: dict[str, Any] = {}
    for name, values in draws.items():
        found |= {name: float(np.median(values)), f"{name}_interval": interval(values)}
    return found


# Resampling by participant


def some_people(part: Features, most: int, rng: np.random.Generator) -> Features:
    """The slices of at most so many random participants."""
    names = np.unique(part.participants)
    if len(names) <= most:
        return part
    return part.take(np.flatnonzero(np.isin(part.participants, rng.permutation(names)[:most])))


def codes_of(participants: np.ndarray) -> np.ndarray:
    """The participant of each slice as a number, from 0 in sorted order."""
    return np.unique(participants, return_inverse=True)[1]


def mean_by_participant(
    values: np.ndarray, participants: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the slices of each participant and class. -> means [P, ...], labels [P]."""
    whose = codes_of(participants) * (labels.max() + 1) + labels
    keys, counts = np.unique(whose, return_counts=True)
    together, first = values[np.argsort(whose, kind="stable")], counts.cumsum() - counts
    sums = np.add.reduceat(together, first, 0, dtype=float)
    return (sums.T / counts).T, keys % (labels.max() + 1)


def halves_by_participant(
    participants: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two random halves of the participants; each class is split evenly."""
    first = []
    for label in np.unique(labels):
        names = rng.permutation(np.unique(participants[labels == label]))
        first.extend(names[: len(names) // 2])
    chosen = np.isin(participants, first)
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def resampled_participants(
    rows: np.ndarray, participants: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A bootstrap sample of the rows: whole participants, drawn with replacement."""
    _, codes, counts = np.unique(participants[rows], return_inverse=True, return_counts=True)
    groups = np.split(rows[np.argsort(codes, kind="stable")], counts.cumsum()[:-1])
    return np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])


def interval(values: list[float] | np.ndarray) -> list[float]:
    """The limits of the central 95 % of the values."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5], method="nearest")]


def bootstrap_interval(
    measure: Measure, values: np.ndarray, participants: np.ndarray, labels: np.ndarray, seed: int
) -> list[float]:
    """Interval of a measure of slices; whole participants of each class are drawn again."""
    rng, codes = np.random.default_rng(seed), codes_of(participants)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    draws = []
    for _ in range(NUM_DRAWS):
        rows = np.concatenate([resampled_participants(group, codes, rng) for group in groups])
        draws.append(measure(values[rows], labels[rows]))
    return interval(draws)


def distances_by_halves(
    real: Features, sets: dict[str, Features], seed: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """FD of each set to a real set: of all participants, and of NUM_HALVES random halves of them.

    The sets are cut to equally many slices. A draw takes half of the participants of every set, and
    compares all halves with the same half of the real set. The distances of halves vary as much as
    those of bootstrap samples, but no slice is repeated, which would add to a distance.
    """
    rng, n = np.random.default_rng(seed), min(len(part.values) for part in sets.values())
    sets = {name: part.take(random_rows(len(part.values), n)) for name, part in sets.items()}
    target = gaussian(real.values)
    whole = {name: gaussian_distance(gaussian(p.values), target) for name, p in sets.items()}
    parts = [(p, codes_of(p.participants)) for p in (real, *sets.values())]
    draws = []
    for _ in tqdm(range(NUM_HALVES), "halves of participants", leave=False):
        rows = [halves_by_participant(codes, part.labels, rng)[0] for part, codes in parts]
        target, *halves = (gaussian(p.values[i]) for (p, _), i in zip(parts, rows, strict=True))
        draws.append([gaussian_distance(half, target) for half in halves])
    return whole, dict(zip(sets, np.array(draws).T, strict=True))


def ratio_of_distances(
    name: str, other: str, whole: dict[str, float], halves: dict[str, np.ndarray]
) -> tuple[float, np.ndarray]:
    """Ratio of two of the `distances_by_halves`, and draws around it.

    Fewer participants add to both distances, which brings the ratios of halves nearer to 1. So
    each draw adds the deviations of both distances of halves from their means to the whole ones.
    """
    a, b = ((whole[k] + halves[k] - halves[k].mean()).clip(0) for k in (name, other))
    unlimited = np.where(np.isnan(a + b), math.nan, math.inf)
    ratios = np.divide(a, b, out=unlimited, where=b > 0)
    return float(whole[name] / (whole[other] or math.nan)), ratios


def without_participants(part: Features, share: float, target: Gaussian, seed: int) -> float:
    """FD to a Gaussian after a share of the participants is left out, the mean of 20 draws."""
    rng, names, found = np.random.default_rng(seed), np.unique(part.participants), []
    for _ in range(20):
        left = rng.permutation(names)[: max(1, round((1 - share) * len(names)))]
        rows = np.isin(part.participants, left)
        found.append(gaussian_distance(gaussian(part.values[rows]), target))
    return float(np.mean(found))


def share_in_half(part: Features) -> float:
    """The share of participants in the first half: below 0.5 if their number in a class is odd."""
    people = [len(set(part.participants[part.labels == i])) for i in np.unique(part.labels)]
    return sum(number // 2 for number in people) / sum(people)


def infinite_distance(whole: float, halves: np.ndarray, share: float = 0.5) -> float:
    """FD for infinitely many participants ([8]): its bias is proportional to 1 / participants.

    `share` of the participants are in a half.
    """
    return float((whole - share * halves.mean()) / (1 - share))


# Similarity, classes and anatomy


def similarity(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MS-SSIM ([5]) of pairs [n, 2] of uint8 images [m, H, W], n 1 or more. -> [n].

    The number of scales is the largest that the image size allows, 5 at most.
    """
    from torchmetrics.functional import image  # imports for seconds

    ms_ssim = image.multiscale_structural_similarity_index_measure
    side = min(images.shape[1:])
    scales = max(1, min(5, int(math.log2(side / 11)) + 1))
    if side // max(1, scales - 1) ** 2 < 11:  # torchmetrics asks for more than the scales need
        scales -= 1
    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    betas = tuple(b / sum(betas) for b in betas)
    parts = []
    for some in np.array_split(pairs, math.ceil(len(pairs) / 50)):
        x, y = (torch.from_numpy(images[rows])[:, None].float() / 255 for rows in some.T)
        parts.append(ms_ssim(x, y, data_range=1.0, betas=betas, reduction="none"))
    return torch.cat(parts).numpy()


def head_box(images: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns in which at least a tenth of the slices [n, R, R] are lighter than 20.

    The background around this box is the same in all slices: it would make any two look alike.
    """
    often = map_in_chunks(lambda part: (part > 20).astype(np.uint8), images).mean(0) > 0.1
    lit = [np.flatnonzero(often.any(axis)) for axis in (1, 0)]
    rows, columns = (slice(k[0], k[-1] + 1) if len(k) > 10 else slice(None) for k in lit)
    return rows, columns


def random_pairs(participants: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Random pairs of slices of one class and two participants. -> [NUM_PAIRS, 2], or [0, 2]."""
    rng, codes = np.random.default_rng(seed), codes_of(participants)
    first = rng.permutation(len(codes))[:NUM_PAIRS]
    partners = {i: np.flatnonzero((labels == labels[i]) & (codes != codes[i])) for i in first}
    able = [i for i in partners if len(partners[i])]
    if not able:
        return np.zeros((0, 2), int)
    return np.array([(i, rng.choice(partners[i])) for i in np.resize(able, NUM_PAIRS)])


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """ROC AUC of scores [n, C], the mean over pairs of classes; NaN if a class has no slice.

    For two classes the scores of class 1 alone, [n], will do.
    """
    from sklearn.metrics import roc_auc_score  # imports for more than a second

    scores = scores[:, 1] if scores.shape[1:] == (2,) else scores
    if len(np.unique(labels)) < (2 if scores.ndim == 1 else scores.shape[1]):
        return math.nan
    return float(roc_auc_score(labels, scores, multi_class="ovo"))


def effect_size(values: np.ndarray, labels: np.ndarray) -> float:
    """Cohen's d of class 0 against class 1; NaN if one has under two values or neither varies."""
    a, b = values[labels == 0], values[labels == 1]
    if min(len(a), len(b)) < 2:
        return math.nan
    deviation = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return float(a.mean() - b.mean()) / deviation if deviation else math.nan


def segment(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks of brain and ventricles of a slice [R, R], uint8.

    Brain: the largest connected part brighter than Otsu's threshold, with its holes filled.
    Ventricles: pixels darker than 0.4 of the brain's median and deeper inside the brain than 0.45
    of its greatest depth. On the demo brains the mean ventricle area of a subject follows the drawn
    ventricle volume with a rank correlation of 0.94.
    """
    parts, count = ndimage.label(image > otsu_threshold(image))
    if count == 0:
        return np.zeros_like(image, bool), np.zeros_like(image, bool)
    sizes = np.bincount(parts.ravel())[1:]
    brain = ndimage.binary_fill_holes(parts == 1 + sizes.argmax())
    depth = ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1]
    return brain, (depth > 0.45 * depth.max()) & (image < 0.4 * np.median(image[brain]))


def histogram(sets: dict[str, np.ndarray], bins: int = 40) -> dict[str, list[float]]:
    """Density of each set over common bins up to the greatest 99.5th percentile, and the edges."""
    low = min(values.min() for values in sets.values())
    top = max(low + 1e-6, *(np.percentile(values, 99.5) for values in sets.values()))
    edges = np.linspace(low, top, bins + 1)
    found = {k: np.histogram(v, edges)[0] / len(v) / np.diff(edges) for k, v in sets.items()}
    return {k: v.tolist() for k, v in (found | {"edges": edges}).items()}


def pose(images: np.ndarray) -> np.ndarray:
    """Tilt and side by `moments`, and mean grey level of the border. [n, R, R] -> [n, 3]."""

    def work(part: np.ndarray) -> np.ndarray:
        _, _, tilt, side = moments(part)
        part[:, 1:-1, 1:-1] = 0
        return np.stack([tilt, side, part.sum((1, 2)) / (4 * part.shape[-1] - 4)], 1)

    return map_in_chunks(work, images)


def normalise_pose(images: np.ndarray) -> np.ndarray:
    """Heads upright, centred and of equal brightness, so that moved copies are found too.

    uint8 [n, R, R] -> the same: turned and moved by their `moments`, the 5th percentile black and
    the mean a grey level of 50.
    """

    def work(part: np.ndarray) -> np.ndarray:
        black = np.percentile(part, 5, (1, 2), keepdims=True)
        grey = (part - black).clip(0).astype(np.float32)
        grey *= 50 / np.maximum(grey.mean((1, 2), keepdims=True), 1)
        return rotate_and_centre(grey, *moments(grey)[:3])

    return map_in_chunks(work, images)


def leaks(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """How far poses [n, 3] of samples depart from real poses, which shows leaking augmentation.

    Rotation: spread of the tilt over that of real heads, 1 without a leak. Flip: difference of the
    mean sides in standard deviations of the real side, and border: difference of the mean borders
    in grey levels, both 0 without a leak. NaN where all real poses are equal.
    """
    spread, real_spread = (np.ptp(np.percentile(p[:, 0], [16, 84])) for p in (fake, real))
    shift = fake.mean(0) - real.mean(0)
    return {
        "leak_rotation": float(spread / (real_spread or math.nan)),
        "leak_flip": float(shift[1] / (real[:, 1].std() or math.nan)),
        "leak_border": float(shift[2]),
    }


def grain(images: np.ndarray) -> float:
    """Mean power of images [n, R, R] in the highest quarter of the frequencies of both axes."""
    f = np.fft.fftfreq(images.shape[-1])
    fine = f[np.abs(f) >= 3 / 8]  # a lattice of single pixels raises their power, a blur lowers it
    waves = np.exp(-2j * np.pi * np.outer(fine, np.arange(len(f))))
    power = map_in_chunks(lambda part: np.abs(waves @ part @ waves.T) ** 2, images)
    return float(power.mean())
