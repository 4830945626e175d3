"""Check a folder of slices before training: duplicates, leaks between splits, confounds, bad files.

    python prepare.py check AD_NC --table subjects.csv

The check cannot see that one person has two scan ids, unless a table or manifest says so or both
show the same picture. It also misses pictures that are turned by more than some 60 degrees, and
earlier processing.
"""

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from scipy import fft, ndimage
from torch.nn import functional as F

import dataset
import utils
from config import Config, UserError
from participants.names import participant_in
from participants.tables import Entry, usual_class
from scans.heads import moments, otsu_threshold, rotate_and_centre

SIDE = 96  # pixels of the small pictures whose edges are compared
HASH_SIDE = 24  # pixels of the still smaller pictures whose grey values are compared
HEAD_DEVIATION = 0.28  # standard deviation of a head's pixel positions in a normalised picture
NEIGHBOURS = 3  # training slices with the most similar grey, whose edges are compared
SAME_EDGES = 0.7  # from this correlation on, two slices show the same picture
SUSPICIOUS_AUC = 0.65  # from this AUC on, a single number tells the classes apart
COLUMNS, EXTREMES = 12, 2  # of the contact sheet
MAX_PAIRS = 10  # pairs of scans with one picture that are printed
MAX_LISTED = 5  # items of a long list that are printed


class CheckedSlice(NamedTuple):
    """One readable slice."""

    file: dataset.SliceFile
    split: str
    size: str
    mode: str  # Pillow's name
    file_hash: bytes
    pixel_hash: bytes
    picture: np.ndarray  # uint8 [SIDE, SIDE]
    blank: bool


class CheckedFolder(NamedTuple):
    """All readable slices of a folder, and a list of its problems."""

    root: Path
    classes: list[str]
    slices: list[CheckedSlice]
    pictures: np.ndarray  # uint8 [n, SIDE, SIDE]
    entries: dict[str, Entry]  # by scan, if a table or manifest has the scan
    problems: list[str]


# Reading


def read_scan(
    files: list[dataset.SliceFile], split: str
) -> tuple[list[CheckedSlice], list[float], list[str]]:
    """The slices of one scan, the range of their values, and a list of problems.

    The range is empty for 8-bit files; else it holds the lowest value, the highest, the share of
    values below 0, and the values that become black and white.
    """
    images, (low, high), problems = dataset.decode_scan([f.path for f in files])
    if problems:
        return [], [], problems
    found = []
    deep = images[0].is_floating_point()
    for file, image in zip(files, images, strict=True):
        grey = dataset.to_grey_levels(image, low, high).clamp(0, 255)
        square = dataset.pad_to_square(grey)[None]
        if square.shape[-1] >= 2 * SIDE:  # faster than an antialiased resize, and as good here
            square = F.avg_pool2d(square, square.shape[-1] // SIDE)
        small = F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True)
        picture = small[0, 0].round().byte().numpy()
        pixels, content = image.numpy().tobytes(), file.path.read_bytes()
        with Image.open(BytesIO(content), formats=dataset.FORMATS) as header:
            mode = header.mode
        size, blank = f"{image.shape[2]}x{image.shape[1]}", bool(image.min() == image.max())
        hashed = content, pixels + repr(image.shape).encode()
        hashes = [hashlib.sha256(part).digest() for part in hashed]
        found.append(CheckedSlice(file, split, size, mode, *hashes, picture, blank))
    if not deep:
        return found, [], []
    values = torch.cat([image.flatten() for image in images])
    below = (values < 0).float().mean()
    return found, [float(v) for v in (values.min(), values.max(), below, low, high)], []


def read_folder(root: Path, table: Path | None, columns: dict[str, str]) -> CheckedFolder:
    """Read every slice and print a summary. Raises UserError if there is nothing to read."""
    classes, splits, entries = dataset.read_splits(root, True, table, columns)
    dataset.describe(root, classes, splits, table)
    problems = dataset.shared_participants(splits) + wrong_classes(classes, splits, entries)
    of_scans: list[tuple] = []
    for split, files in splits.items():
        of_scans += [([files[i] for i in rows], split) for rows in dataset.rows_by_scan(files)]
    read = utils.map_on_cores(lambda job: read_scan(*job), of_scans, utils.printable(root), "scan")
    slices = [seen for part, _, _ in read for seen in part]
    problems += [line for _, _, bad in read for line in bad]
    seen = defaultdict(set)
    for file in itertools.chain(*splits.values()):
        seen[file.participant].add(file.label)
    if several := sorted(name for name, labels in seen.items() if len(labels) > 1):
        text = f"{len(several)} participants have slices of several classes, such as {several[0]}"
        advice = "right if their class changed between visits; if they are two people, rename one"
        utils.print_once(f"note: {text}: {advice}")
    if doubt := dataset.doubtful_classes(classes, splits["train"]):
        utils.print_once(f"note: {doubt}: training will need --any-classes")
    print_kinds(slices, [ranges for _, ranges, _ in read if ranges])
    pictures = np.array([s.picture for s in slices]).reshape(-1, SIDE, SIDE)
    return CheckedFolder(root, classes, slices, pictures, entries, problems)


def wrong_classes(
    classes: list[str], splits: dataset.Splits, entries: dict[str, Entry]
) -> list[str]:
    """A message for each class and each other class folder that holds scans of that class."""
    wrong = defaultdict(set)
    for file in itertools.chain(*splits.values()):
        label = entries[file.scan].label if file.scan in entries else ""
        own, folder = map(usual_class, (label, classes[file.label]))
        if own and own != folder:
            wrong[own, folder].add(file.scan)
    return [
        f"class {own} in the table, folder {folder}: {len(scans)} scans, "
        + ", ".join(sorted(scans)[:MAX_LISTED])
        + " (--columns class '' leaves the table's class out)"
        for (own, folder), scans in wrong.items()
    ]


def print_kinds(slices: list[CheckedSlice], ranges: list[list[float]]) -> None:
    """Print sizes, modes and value ranges of the slices, and how many a scan has."""
    for title, kinds in (("pixels", [s.size for s in slices]), ("modes", [s.mode for s in slices])):
        counts = Counter(kinds)
        text = "; ".join(f"{name} ({count})" for name, count in counts.most_common(MAX_LISTED))
        more = f"; and {len(counts) - MAX_LISTED} more" if len(counts) > MAX_LISTED else ""
        utils.print_once(f"{title}: {text}{more}")
    if ranges:
        low, high, below, black, white = np.array(ranges).T
        text = f"{low.min():g} to {high.max():g}, {below.mean():.1%} below 0; black of a scan: "
        text += f"{black.min():g} to {black.max():g}, white: {white.min():g} to {white.max():g}"
        utils.print_once(f"values of {len(ranges)} scans: {text}")
    per_scan = Counter((s.split, s.file.path.parent, s.file.scan) for s in slices).values()
    utils.print_once(f"slices per scan: {min(per_scan, default=0)} to {max(per_scan, default=0)}")
    if blank := sum(s.blank for s in slices):
        utils.print_once(f"note: {blank} slices have a single grey value")


# Duplicates


def exact_duplicates(folder: CheckedFolder) -> None:
    """Report equal files and equal pixels: a problem across splits or classes, else a note."""
    found: dict[tuple, list[list[CheckedSlice]]] = defaultdict(list)
    for kind, name in (("file_hash", "the same file"), ("pixel_hash", "the same pixels")):
        groups = defaultdict(list)
        for seen in folder.slices:
            if not seen.blank:
                groups[getattr(seen, kind)].append(seen)
        for group in groups.values():
            reported = kind == "pixel_hash" and len({s.file_hash for s in group}) == 1
            if len(group) > 1 and not reported:
                where = "train and test" if len({s.split for s in group}) > 1 else ""
                if not where and len({s.file.label for s in group}) > 1:
                    where = "two classes"
                found[name, where, tuple(sorted({s.file.scan for s in group}))].append(group)
    for (name, where, scans), groups in found.items():
        text = f"{name} in {where or 'one split'}, {len(groups)} times"
        if where:
            paths = (str(s.file.path.relative_to(folder.root)) for s in groups[0][:MAX_LISTED])
            folder.problems.append(f"{text}, such as: {', '.join(paths)}")
        else:
            utils.print_once(f"note: {text}, in scans {', '.join(scans[:MAX_LISTED])}")


def edges(pictures: np.ndarray) -> np.ndarray:
    """Edges of pictures [n, S, S], with zero mean and unit norm. -> float32 [n, S, S]."""
    grey = pictures.astype(np.float32)
    near, far = (ndimage.gaussian_filter(grey, (0, width, width)) for width in (0.7, 1.5))
    fine = near - far
    fine -= fine.mean((1, 2), keepdims=True)
    return fine / np.maximum(np.linalg.norm(fine, axis=(1, 2), keepdims=True), 1e-3)


def best_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The highest correlation of the edges of pairs of pictures [n, S, S] over all shifts. -> [n].

    It is near 1 for duplicates, also if one is shifted, darker or encoded anew.
    """
    product = fft.rfft2(edges(a)) * fft.rfft2(edges(b)).conj()
    return fft.irfft2(product, a.shape[1:]).max((1, 2))


def normalise_pose(pictures: np.ndarray) -> np.ndarray:
    """Turn heads upright, centre them and scale them to one size. uint8 [n, SIDE, SIDE] -> same.

    The pose is that of the mask of pixels above 15 % of the 99th percentile; so it does not
    depend on the lighting.
    """

    def work(part: np.ndarray) -> np.ndarray:
        black = np.percentile(part, 5, (1, 2), keepdims=True)
        grey = (part - black).clip(0).astype(np.float32)
        mask = grey > 0.15 * np.percentile(grey, 99, (1, 2), keepdims=True)
        x, y, tilt, _ = moments(mask)
        at, count = np.arange(SIDE) - (SIDE - 1) / 2, np.maximum(mask.sum((1, 2)), 1)
        columns, rows = (mask.sum(axis) / count[:, None] for axis in (1, 2))
        variance = columns @ at**2 - x**2 + rows @ at**2 - y**2
        scale = np.sqrt(np.maximum(variance, 1)) / (HEAD_DEVIATION * SIDE)
        return rotate_and_centre(grey, x, y, tilt, scale)

    return utils.map_in_chunks(work, pictures)


def perceptual_hashes(pictures: np.ndarray) -> np.ndarray:
    """Normalised pictures, small and with a mean grey of 50. -> float32 [n, HASH_SIDE^2]."""
    size = SIDE // HASH_SIDE
    blocks = pictures.reshape(-1, HASH_SIDE, size, HASH_SIDE, size)
    small = blocks.mean((2, 4), dtype=np.float32).reshape(len(pictures), -1)
    return small * (50 / np.maximum(small.mean(1, keepdims=True), 1))


class Pair(NamedTuple):
    """A test and a training slice, and the correlation of their edges."""

    score: float
    test: CheckedSlice
    train: CheckedSlice
    mirrored: bool


def near_duplicates(folder: CheckedFolder) -> tuple[list[Pair], float]:
    """Test slices that show the picture of a training slice, but not with the very same pixels.

    Each test slice is compared with the training slices of the most similar hashes. Also returns
    the highest correlation of the other pairs.
    """
    from sklearn.neighbors import NearestNeighbors

    split = np.array([s.split if not s.blank else "" for s in folder.slices])
    rows = {name: np.flatnonzero(split == name) for name in dataset.SPLITS}
    if not min(map(len, rows.values())):
        return [], 0.0
    train = folder.pictures[rows["train"]]
    train_normal = normalise_pose(train)
    finder, best = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train))), {}
    finder.fit(perceptual_hashes(train_normal))
    for mirrored in (False, True):
        test = folder.pictures[rows["test"]][:, :, :: -1 if mirrored else 1]
        test_normal = normalise_pose(test)
        hashes = perceptual_hashes(test_normal)
        alike = finder.kneighbors(hashes, return_distance=False)  # [tests, NEIGHBOURS]
        for part in np.array_split(np.arange(len(test)), math.ceil(len(test) / utils.CHUNK)):
            for column in alike[part].T:
                raw = best_correlation(test[part], train[column])
                normal = best_correlation(test_normal[part], train_normal[column])
                scores = np.maximum(raw, normal)
                for i, score, j in zip(rows["test"][part], scores, column, strict=True):
                    best[i] = max(best.get(i, (-1.0, 0, False)), (float(score), int(j), mirrored))
    pairs = [
        Pair(score, folder.slices[i], folder.slices[rows["train"][j]], mirrored)
        for i, (score, j, mirrored) in best.items()
    ]
    same = [p for p in pairs if p.score >= SAME_EDGES and p.test.pixel_hash != p.train.pixel_hash]
    return same, max((p.score for p in pairs if p.score < SAME_EDGES), default=0.0)


def report_duplicates(folder: CheckedFolder) -> None:
    """Report exact duplicates, and pictures that are in both training and test set."""
    exact_duplicates(folder)
    same, most = near_duplicates(folder)
    if most > 0:
        text = f"most similar other slices of test and training set: correlation {most:.2f}"
        utils.print_once(f"{text} (the same image from {SAME_EDGES} on)")
    of_scans = defaultdict(list)
    for pair in sorted(same, key=lambda pair: -pair.score):
        of_scans[pair.test.file.scan, pair.train.file.scan].append(pair)
    for pairs in list(of_scans.values())[:MAX_PAIRS]:
        score, *both, mirrored = pairs[0]
        how = f"{len(pairs)} slices{', mirrored' * mirrored}, correlation up to {score:.2f}"
        paths = " and ".join(str(s.file.path.relative_to(folder.root)) for s in both)
        folder.problems.append(f"the same image in test and train ({how}): {paths}")
    if len(of_scans) > MAX_PAIRS:
        more = len(of_scans) - MAX_PAIRS
        folder.problems.append(f"the same image in test and train: {more} more pairs of scans")


# Confounds


def report_confounds(folder: CheckedFolder) -> None:
    """Print age, sex and mean grey of each class, and how well each tells the classes apart."""
    people: dict[str, list[int]] = defaultdict(list)
    for row, seen in enumerate(folder.slices):
        people[seen.file.participant].append(row)
    first = [folder.slices[rows[0]].file for rows in people.values()]
    entries = [folder.entries.get(file.scan) for file in first]
    numbers = {
        "age": [e.age if e else math.nan for e in entries],
        "sex (women)": [float(e.sex == "F") if e and e.sex else math.nan for e in entries],
        "mean grey": [float(folder.pictures[rows].mean()) for rows in people.values()],
    }
    labels = np.array([file.label for file in first])
    for name, column in numbers.items():
        known = np.isfinite(column)
        if not known.any():
            continue
        values, label = np.array(column)[known], labels[known]
        means = [f"{folder.classes[i]} {values[label == i].mean():.2f}" for i in np.unique(label)]
        text = f"{name} of {known.sum()} participants: {', '.join(means)}"
        auc, chance = most_telling_auc(values, label)
        if math.isfinite(auc):
            text += f"; it tells the classes apart with an AUC of {auc:.2f}"
            if auc >= max(SUSPICIOUS_AUC, chance):
                text += f": a network may learn the {name} in place of the class"
        utils.print_once(text)


def most_telling_auc(values: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The highest AUC between two classes, and the highest likely by chance; NaN for one class."""
    from sklearn.metrics import roc_auc_score

    found = []
    for a, b in itertools.combinations(np.unique(labels), 2):
        chosen = (labels == a) | (labels == b)
        value = roc_auc_score(labels[chosen] == b, values[chosen])
        n, m = (labels == a).sum(), (labels == b).sum()
        deviation = math.sqrt((n + m + 1) / (12 * n * m))  # of the AUC of a number without meaning
        found.append((max(value, 1 - value), 0.5 + 2 * deviation))
    return max(found, default=(math.nan, math.nan))


def draw_sheet(folder: CheckedFolder, path: Path) -> None:
    """Draw a row of slices for each class; odd ones (dark, small, ...) end it, with their names."""
    labels = np.array([seen.file.label for seen in folder.slices])
    present = np.unique(labels)
    figure = utils.new_figure(figsize=(COLUMNS + 4 * EXTREMES, 1.45 * len(present) + 0.2))
    axes = figure.subplots(len(present), COLUMNS + 4 * EXTREMES, squeeze=False)
    for line, label in zip(axes, present, strict=True):
        pictures = folder.pictures[labels == label]
        files = [seen.file.path.name for seen in folder.slices if seen.file.label == label]
        grey = pictures.mean((1, 2))
        size = np.array([(p > otsu_threshold(p) / 2).mean() for p in pictures])
        at = {"": utils.evenly_spaced(len(pictures), COLUMNS)}
        for name, values in (("dark", grey), ("bright", -grey), ("small", size), ("large", -size)):
            at[name] = np.argsort(values, kind="stable")[:EXTREMES]
        titles = [name for name, chosen in at.items() for _ in chosen]
        for ax, name, i in zip(line, titles, np.concatenate(list(at.values())), strict=False):
            ax.imshow(pictures[i], cmap="gray", vmin=0, vmax=255)
            ax.set_title(name, fontsize=8)
            if name:
                ax.set_xlabel(utils.label(files[i], 18), fontsize=6)
        for ax in line:
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(utils.label(folder.classes[label], 16, 4), fontsize=8)
    utils.save_figure(figure, path)


def check(
    root: tyro.conf.Positional[Path],
    table: Path | None = None,
    columns: dict[str, str] = {},  # noqa: B006
    out: Path | None = None,
    cache: Path = Config.cache,
) -> None:
    """List the contents of a folder and look for leaks and bad files; exit code 2 if there are any.

    Args:
        root: folder that holds train/ and test/, or the class folders.
        table: CSV or TSV with the participant of each scan, and age and sex.
        columns: other names of columns, such as: participant RID age AGE.
        out: PNG of the contact sheet; None: check-....png in the cache.
        cache: folder that keeps the result, which training then prints.
    """
    if out and (out.suffix.lower() != ".png" or out.is_dir()):
        raise UserError(f"out = {out}: must be a file that ends with .png")
    dataset.require_no_class("cache", cache, root)
    utils.ensure_writable(out.parent if out else cache)
    folder = read_folder(root, table, columns)
    files = [seen.file for seen in folder.slices]
    kept = dataset.check_result(dataset.names_and_sizes(files, root), files, cache)
    if folder.slices:
        report_duplicates(folder)
        report_confounds(folder)
        draw_sheet(folder, sheet := out or kept.with_suffix(".png"))
        utils.print_once(f"contact sheet: {sheet}")
    result = "".join(f"{utils.printable(line)}\n" for line in folder.problems)
    utils.write_atomically(kept, lambda path: path.write_text(result, "utf-8"))
    if folder.problems:
        lines = "\n  ".join(folder.problems)
        raise UserError(f"{root}: training would fail or its evaluation would mislead:\n  {lines}")
    text = "no participant and no picture is in both train and test; every file can be read"
    whose = {f.scan for f in files if f.participant == f.scan} - folder.entries.keys()
    if unknown := [scan for scan in whose if not participant_in(scan)]:
        text += f"; whose {len(unknown)} scans are is not known: give --table to compare people"
    utils.print_once(text)
