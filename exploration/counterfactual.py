"""The same latents as each class: what the generator changes with the class, and what it keeps.

A sound counterfactual is effective (the other class is seen), reversible (there and back changes
nothing) and minimal (nothing else changes) ([1]); each is measured beside what real slices or a
perfect case get. The difference is one of the model, never atrophy: no person was seen twice.

References:
    [1] Monteiro et al. 2023, Measuring axiomatic soundness of counterfactual image models,
        arXiv:2303.01274
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from tqdm import tqdm

import dataset
import utils
from assets.demo_brains import write_twins
from config import Range, UserError
from evaluation import features, metrics
from evaluation.samples import images_of
from exploration import model as models
from exploration import projection
from exploration.figures import draw_columns, draw_difference, scale_of, write_report
from exploration.model import ATTRIBUTES, CHUNK, Classes, Model, Real, attributes

STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from one label to the other
NUM_TWINS = 200  # demo subjects that are drawn as both classes
MODEL_ONLY = "difference of the model, no atrophy"


@dataclass(frozen=True)
class Options(models.ChangeOptions):
    """Options of `explore.py counterfactual`."""

    classes: Classes = None
    """Class to start from and class to change to; None: from the last to the first (NC to AD)."""
    count: Annotated[int, Range(2)] = 500
    """Number of latents that are averaged, 2 or more."""
    reversals: Annotated[int, Range(0)] = 4
    """Images that are changed, found again by projection and changed back; 0: none (faster)."""


class Changes(NamedTuple):
    """What happens to many latents on the way from one class to the other."""

    attributes: np.ndarray  # [steps, n, A]
    mean: np.ndarray  # [R, R] mean difference, grey levels
    half_width: np.ndarray  # [R, R] of its 95 % interval over latents
    moved: float  # mean absolute difference of a pixel, grey levels
    moved_by_z: float  # the same between two latents of the first class
    scores: np.ndarray  # [2, n] of the second class, at both ends; NaN without a classifier


def measure_changes(
    model: Model, first: int, second: int, count: int, classifier: features.Encoder | None
) -> Changes:
    """Changes of `count` seeds; memory for CHUNK images at a time."""
    R = model.config.img_resolution
    total, squares = np.zeros((R, R)), np.zeros((R, R))
    parts, scores, moved, by_z = [], [], [], []
    for start in tqdm(range(0, count, CHUNK), "latents", unit="batch", leave=False):
        seeds = list(range(start, min(start + CHUNK, count)))
        a, b, z = model.c(first, seeds), model.c(second, seeds), model.z(seeds)
        steps = [images_of(model.G, model.change(z, a, a.lerp(b, t))) for t in STEPS]
        difference = steps[-1].astype(float) - steps[0]
        total, squares = total + difference.sum(0), squares + np.square(difference).sum(0)
        moved.append(np.abs(difference).mean((1, 2)))
        if len(seeds) > 1:
            drawn = steps[0]
            if model.G.by_position:  # then all in one
                same = a[:1].expand_as(a)
                drawn = images_of(model.G, model.change(z, same, same))
            by_z.append(np.abs(np.diff(drawn.astype(float), axis=0)).mean((1, 2)))
        parts.append(np.stack([attributes(images) for images in steps]))
        scores.append([models.class_score(classifier, steps[i], second) for i in (0, -1)])
    variance = (squares - total**2 / count) / max(1, count - 1)
    return Changes(
        np.concatenate(parts, 1), total / count, 1.96 * np.sqrt(variance.clip(0) / count),
        float(np.concatenate(moved).mean()), float(np.concatenate(by_z).mean()),
        np.concatenate(scores, 1),
    )  # fmt: skip


def auc_of(scores: np.ndarray) -> float:
    """AUC of scores [2, n]: of images of the first class against those of the second."""
    labels = np.repeat([0, 1], scores.shape[1])
    return metrics.auc(labels, scores.ravel())


def twins(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The same demo subjects as NC and as AD. -> uint8 [n, R, R] each."""
    cache, R = model.config.cache, model.config.img_resolution
    name = f"twins-{dataset.CACHE_VERSION}-{NUM_TWINS}"
    root = dataset.folder_once(cache / name, lambda folder: write_twins(folder, NUM_TWINS))
    _, files = dataset.find_class_folders(root)
    images, labels = dataset.decoded(files, root, R, cache), np.array([f.label for f in files])
    return np.array(images[labels == 1]), np.array(images[labels == 0])


class Reference(NamedTuple):
    """What the change of class is in real slices, or in demo subjects drawn as both classes."""

    name: str
    mean: np.ndarray  # [R, R] mean difference, grey levels
    attributes: np.ndarray  # [2, A] means of both classes
    change: np.ndarray  # [A] the second minus the first
    low: np.ndarray  # [A] limits of its 95 % interval
    high: np.ndarray
    scores: np.ndarray  # [2, n] of a classifier


def true_change(model: Model, first: int, classifier: features.Encoder) -> Reference:
    """The drawn effect of the class on demo subjects."""
    pair = twins(model)[:: 1 if model.classes[first] == "NC" else -1]
    values = np.stack([attributes(images) for images in pair])
    change, half = models.mean_and_interval(values[1] - values[0])
    mean = pair[1].astype(float).mean(0) - pair[0].astype(float).mean(0)
    scores = np.stack([models.class_score(classifier, x, 1 - first) for x in pair])
    name = f"the same {len(pair[0])} demo subjects drawn as both classes"
    return Reference(name, mean, values.mean(1), change, change - half, change + half, scores)


def near_position(real: Real, position: float | None) -> Real:
    """The slices that lie half a step of positions or less from one; all of them for None."""
    if position is None:
        return real
    reach, parts = 0.5 / (utils.NUM_POSITIONS - 1), []
    for part in (real.train, real.test):
        parts.append(part.take(np.flatnonzero(np.abs(part.positions - position) <= reach)))
        if len(set(parts[-1].labels)) < len(part.classes):
            raise UserError(f"position = {position}: a class has no real slices there")
    return real._replace(train=parts[0], test=parts[1])


def real_change(
    real: Real, first: int, second: int, classifier: features.Encoder, seed: int = 0
) -> Reference:
    """The difference of other people of each class; test slices alone for the classifier."""
    groups, means = [], []
    for label in (first, second):
        rows = [np.flatnonzero(s.labels == label) for s in (real.train, real.test)]
        images = np.concatenate([real.train.images[rows[0]], real.test.images[rows[1]]])
        people = np.concatenate([real.train.participants[rows[0]], real.test.participants[rows[1]]])
        values, none = attributes(images), np.zeros(len(people), int)
        means.append(metrics.mean_by_participant(images, people, none)[0].mean(0))
        groups.append(metrics.mean_by_participant(values, people, none)[0])
    rng, draws = np.random.default_rng(seed), []
    for _ in range(metrics.NUM_DRAWS):
        a, b = (g[rng.integers(0, len(g), len(g))].mean(0) for g in groups)
        draws.append(b - a)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    ends = np.stack([g.mean(0) for g in groups])
    test = [real.test.images[real.test.labels == label] for label in (first, second)]
    n = min(map(len, test))
    some = [x[utils.random_rows(len(x), n)] for x in test]
    scores = np.stack([models.class_score(classifier, x, second) for x in some])
    counts = [
        f"{len(g)} {real.train.classes[k]}" for g, k in zip(groups, (first, second), strict=True)
    ]
    name = f"{' and '.join(counts)} participants, training and test"
    return Reference(name, means[1] - means[0], ends, ends[1] - ends[0], low, high, scores)


def reversals(
    model: Model, first: int, second: int, count: int, real: Real | None
) -> list[dict[str, Any]]:
    """Change images, find the changed ones by projection, change them back. -> a table."""
    seeds = list(range(count))
    a, b, z = model.c(first, seeds), model.c(second, seeds), model.z(seeds)
    image, changed = (images_of(model.G, model.change(z, a, c)) for c in (a, b))
    options, extractor = projection.Options(), real.extractor if real else None
    found = projection.project(model, image, a, options, extractor)
    back = projection.project(model, changed, b, options, extractor)
    errors = {
        "found by projection": projection.error(projection.pictures(model, found, a), image),
        "changed, found, changed back": projection.error(
            projection.pictures(model, back, b, a), image
        ),
        "changed (for comparison)": projection.error(changed, image),
    }
    return [
        {"error of": name, "grey levels": float(np.mean(e)), "perfect": "-" if "(" in name else 0.0}
        for name, e in errors.items()
    ]


def table_of(changes: Changes, reference: Reference | None) -> list[dict[str, Any]]:
    """The change of each attribute, also in deviations over latents, and the reference's."""
    values, rows = changes.attributes, []
    change, half = models.mean_and_interval(values[-1] - values[0])
    deviations = in_deviations(change, values[0])
    for i, (name, unit) in enumerate(ATTRIBUTES.items()):
        row: dict[str, Any] = {"what": f"{name}, {unit}", "from": float(values[0, :, i].mean())}
        row["change"] = float(change[i])
        row["interval"] = [float(change[i] - half[i]), float(change[i] + half[i])]
        row["in deviations"] = float(deviations[i])
        if reference is not None:
            row["reference"] = float(reference.change[i])
            row["its interval"] = [float(reference.low[i]), float(reference.high[i])]
        rows.append(row)
    return rows


def in_deviations(change: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Changes [A] in deviations of values [n, A] over latents; NaN where these do not vary."""
    deviation = values.std(0)
    return change / np.where(deviation > 1e-6, deviation, np.nan)


def in_percent(change: float, start: float) -> str:
    """How much larger or smaller ventricles [% of the image] are than they were, in words."""
    words = "larger" if change > 0 else "smaller"
    if start > 0:
        return f"{abs(100 * change / start):.0f} % {words}"
    return f"{words} by {abs(change):.2g} % of the image"


def sentences(names: tuple[str, str], changes: Changes, reference: Reference | None) -> str:
    """What changed, in words."""
    change, half = models.mean_and_interval(changes.attributes[-1] - changes.attributes[0])
    found = in_percent(change[0], changes.attributes[0, :, 0].mean())
    sure = "" if abs(change[0]) > half[0] else " (not distinguishable from 0)"
    text = f"As {names[1]} the ventricles of the same latents are {found} than as {names[0]}{sure}"
    if reference is not None:
        real = in_percent(reference.change[0], reference.attributes[0, 0])
        text += f"; in the reference ({reference.name}) {real}"
    text += f". A pixel changes by {changes.moved:.1f} grey levels on average with the class, by "
    text += f"{changes.moved_by_z:.1f} with the latent: the closer these, the less of the person "
    text += "is kept. "
    rest = np.nan_to_num(np.abs(in_deviations(change, changes.attributes[0])))[1:]
    most = list(ATTRIBUTES)[1 + int(rest.argmax())]
    text += f"Of the rest, {most} changes most, by {rest.max():.2f} deviations. "
    return text + f"It is a {MODEL_ONLY}."


def minus(names: tuple[str, str]) -> str:
    """What is subtracted from what; long names would be cut where it matters."""
    text = f"{names[1]} - {names[0]}"
    return text if len(text) <= 30 else "second - first class"


def draw_summary(
    names: tuple[str, str], changes: Changes, reference: Reference | None, path: Path
) -> None:
    """Mean differences of the model and of the reference; areas on the way between the classes."""
    maps = {f"model: mean of {changes.attributes.shape[1]} latents": changes.mean}
    certain = np.abs(changes.mean) > changes.half_width
    maps["model: where the interval excludes 0"] = np.where(certain, changes.mean, 0)
    if reference is not None:
        maps[f"reference: {reference.name}"] = reference.mean
    limit = scale_of(*maps.values())
    figure = utils.new_figure(figsize=(3.3 * len(maps) + 1, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = top.subplots(1, len(maps), squeeze=False)[0]
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        colours = draw_difference(ax, values, limit)
        ax.set_title(utils.label(name, 40), fontsize=9)
    top.colorbar(colours, ax=axes, label=f"{utils.label(minus(names), 40)}, grey levels")
    top.suptitle(MODEL_ONLY, fontsize=9)
    for column, ax in enumerate(bottom.subplots(1, 2)):
        mean, half = models.mean_and_interval(changes.attributes[:, :, column].T)
        ax.plot(STEPS, mean, "o-", color="C0", label="model; band: 95 % interval over latents")
        ax.fill_between(STEPS, mean - half, mean + half, alpha=0.25, color="C0", lw=0)
        if reference is not None:
            ends = reference.attributes[:, column]
            ax.plot((0, 1), ends, "s", color="C3", label="reference, means of both classes")
        name, unit = list(ATTRIBUTES.items())[column]
        labels = [utils.label(name, 14) for name in names]
        ax.set_xticks((0, 0.5, 1), [labels[0], "half way", labels[1]])
        ax.set(ylabel=f"{name}, {unit}", xlabel="from class to class")
        ax.legend(fontsize=8)
    utils.save_figure(figure, path)


def counterfactual(options: Options) -> Path:
    """Write the figures and the report. -> their folder. Raises UserError for bad input."""
    model = models.open_model(options)
    first, second = model.pair(options.classes)
    names = (model.classes[first], model.classes[second])
    real = models.open_real(model, options, "no comparison with real slices")
    demo = real and real.is_demo and set(names) == {"AD", "NC"} and model.position is None
    near = near_position(real, model.position) if real and not demo else None
    seeds = list(options.seeds)
    z, a, b = model.z(seeds), model.c(first, seeds), model.c(second, seeds)
    drawn = [images_of(model.G, model.change(z, a, c)) for c in (a, a.lerp(b, 0.5), b)]
    columns = dict(zip((names[0], "half way", names[1]), drawn, strict=True))
    columns[minus(names)] = drawn[-1].astype(float) - drawn[0]
    rows = [f"seed {seed}" for seed in seeds]
    draw_columns(columns, rows, MODEL_ONLY, model.out / "counterfactual.png")

    classifier = models.classifier_of(real) if real else None
    changes = measure_changes(model, first, second, options.count, classifier)
    reference = None
    if demo:
        reference = true_change(model, first, classifier)
    elif near:
        reference = real_change(near, first, second, classifier)
    draw_summary(names, changes, reference, model.out / "counterfactual_mean.png")
    tables: dict[str, Any] = {"summary": sentences(names, changes, reference)}
    tables["minimality: what changes"] = table_of(changes, reference)
    if reference is not None:
        rose = float((changes.scores[1] > changes.scores[0]).mean())
        auc = {"latents as both classes": changes.scores, reference.name: reference.scores}
        tables["effectiveness: does a classifier of real slices see the class?"] = [
            {"of": name, "auc": auc_of(scores), "score rose": rose if i == 0 else "-"}
            for i, (name, scores) in enumerate(auc.items())
        ]
    if options.reversals:
        name = "reversibility: there and back"
        tables[name] = reversals(model, first, second, options.reversals, real)
    write_report(f"From {names[0]} to {names[1]}", tables, model.out, "counterfactual")
    return model.out
