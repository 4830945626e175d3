"""Would training on a folder of slices be honest? A page in words, a contact sheet, an exit code.

    python prepare.py check AD_NC --table subjects.csv

What it cannot see: slices of one person under two ids that no table joins, unless they show the
same picture; pictures upside down; whatever the scans went through before.
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
from matplotlib.figure import Figure
from PIL import Image
from scipy import fft, ndimage
from torch.nn import functional as F

from config import UserError
from dataset import (
    FORMATS,
    SPLITS,
    Entry,
    SliceFile,
    decode_scan,
    describe,
    doubtful_classes,
    pad_to_square,
    read_manifest,
    read_splits,
    rows_by_scan,
    set_participants,
    shared_ids,
)
from scans.tables import RENAMED, EntryFinder
from utils import (
    CHUNK,
    ensure_writable,
    evenly_spaced,
    map_in_chunks,
    map_on_cores,
    moments,
    otsu_threshold,
    print_once,
    printable,
    rotate_and_centre,
    save_figure,
)

SIDE = 96  # pixels of a slice in which its detail is compared
HASH_SIDE = 24  # and its whole
HEAD_DEVIATION = (
    0.28  # deviation of a head's pixels from its middle, in sides of a picture, when upright
)
NEIGHBOURS = 3  # of the same whole, whose detail is compared
SAME_EDGES = 0.7  # correlation from which two slices show one picture
SUSPICIOUS_AUC = 0.65  # AUC from which a single number is said to tell the class
COLUMNS, EXTREMES = 12, 2  # of the contact sheet
MAX_LISTED = 5  # of what is found many times


class CheckedSlice(NamedTuple):
    """What is known of a slice that could be read."""

    file: SliceFile
    split: str
    size: str
    mode: str  # as Pillow calls it
    file_hash: bytes
    pixel_hash: bytes
    picture: np.ndarray  # uint8 [SIDE, SIDE]
    blank: bool


class CheckedFolder(NamedTuple):
    """All that was read of a folder, and what is wrong with it."""

    root: Path
    classes: list[str]
    slices: list[CheckedSlice]
    pictures: np.ndarray  # uint8 [n, SIDE, SIDE]
    entries: dict[str, Entry]  # by scan, where a table or a manifest has it
    problems: list[str]


# Reading


def read_scan(
    files: list[SliceFile], split: str
) -> tuple[list[CheckedSlice], list[float], list[str]]:
    """The slices of one scan, and what is wrong with them.

    In between, where their values are not 8-bit, their least and largest, the share below 0, and
    which become black and white.
    """
    images, (low, high), problems = decode_scan([f.path for f in files])
    if problems:
        return [], [], problems
    found = []
    deep = images[0].is_floating_point()
    for file, image in zip(files, images, strict=True):
        grey = (image.float() - low) * (255 / max(high - low, 1e-8)) if deep else image.float()
        square = pad_to_square(grey.clamp(0, 255))[None]
        if square.shape[-1] >= 2 * SIDE:  # cheaper than an antialiased resize, and as good here
            square = F.avg_pool2d(square, square.shape[-1] // SIDE)
        small = F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True)
        pixels, content = image.numpy().tobytes(), file.path.read_bytes()
        with Image.open(BytesIO(content), formats=FORMATS) as header:
            mode = header.mode
        found.append(
            CheckedSlice(
                file,
                split,
                f"{image.shape[2]}x{image.shape[1]}",
                mode,
                hashlib.sha256(content).digest(),
                hashlib.sha256(pixels + repr(image.shape).encode()).digest(),
                small[0, 0].round().byte().numpy(),
                bool(image.min() == image.max()),
            )
        )
    if not deep:
        return found, [], []
    values = torch.cat([image.flatten() for image in images])
    below = (values < 0).float().mean()
    return found, [float(v) for v in (values.min(), values.max(), below, low, high)], []


def read_folder(root: Path, table: Path | None, columns: dict[str, str]) -> CheckedFolder:
    """Every slice, in small. Says what is there. Raises UserError where nothing can be read."""
    finder = EntryFinder(table, columns) if table else None
    classes, splits = read_splits(root, any_classes=True)
    entries, other = dict(read_manifest(root)), defaultdict(set)
    for files in splits.values():
        for file in files:
            if finder and file.scan not in entries and (entry := entry_of_id(finder, file.scan)):
                entries[file.scan] = entry
            if entry := entries.get(file.scan):
                says, lies = (RENAMED.get(n, n) for n in (entry.label, classes[file.label]))
                if says and says != lies:
                    other[f"{says}, lies in {lies}"].add(file.scan)
        set_participants(files, entries)
    describe(root, classes, splits)
    problems = shared_ids(splits)
    if table:
        ids = {file.scan for files in splits.values() for file in files}
        known = len(ids & entries.keys())
        print_once(f"{table} names {known} of {len(ids)} ids")
        if not known:
            problems.append(f"{table} names none of the ids: whose they are is not known")
    for what, scans in other.items():
        problems.append(
            f"of class {what}: {', '.join(sorted(scans)[:MAX_LISTED])} ({len(scans)} ids)"
        )
    of_scans = [
        (split, [files[row] for row in rows])
        for split, files in splits.items()
        for rows in rows_by_scan(files)
    ]
    found = map_on_cores(lambda item: read_scan(item[1], item[0]), of_scans, printable(root), "id")
    slices = [seen for part, _, _ in found for seen in part]
    problems += [line for _, _, bad in found for line in bad]
    if doubt := doubtful_classes(classes, splits["train"]):
        print_once(f"note: {doubt}: training asks for --any-classes")
    print_kinds(slices, [ranges for _, ranges, _ in found if ranges])
    pictures = np.array([s.picture for s in slices]).reshape(-1, SIDE, SIDE)
    return CheckedFolder(root, classes, slices, pictures, entries, problems)


def entry_of_id(finder: EntryFinder, scan: str) -> Entry | None:
    """The entry of an id: of a mere number also that of ADNI's image, which has an I before it."""
    try:
        entry = finder.named_in(scan)
        return finder.named_in(f"I{scan}") if entry is None and scan.isdigit() else entry
    except ValueError:
        return None


def print_kinds(slices: list[CheckedSlice], ranges: list[list[float]]) -> None:
    """Say of which sizes and values the slices are, and how many an id has."""
    for title, counts in (
        ("pixels", Counter(s.size for s in slices)),
        ("modes", Counter(s.mode for s in slices)),
    ):
        text = "; ".join(f"{name} ({count})" for name, count in counts.most_common(MAX_LISTED))
        print_once(
            f"{title}: {text}"
            + f"; and {len(counts) - MAX_LISTED} more" * (len(counts) > MAX_LISTED)
        )
    if ranges:
        low, high, below, black, white = np.array(ranges).T
        text = f"{low.min():g} to {high.max():g}, {below.mean():.1%} below 0"
        text += f"; an id's black is {black.min():g} to {black.max():g}"
        print_once(
            f"values of {len(ranges)} ids: {text}, its white {white.min():g} to {white.max():g}"
        )
    of_id = Counter((s.split, s.file.path.parent, s.file.scan) for s in slices).values()
    print_once(f"slices of an id: {min(of_id, default=0)} to {max(of_id, default=0)}")
    if blank := sum(s.blank for s in slices):
        print_once(f"note: {blank} slices are of a single value")


# Duplicates


def exact_duplicates(folder: CheckedFolder) -> None:
    """The same file, or the same pixels, more than once: across splits or classes a problem."""
    found: dict[tuple, list[list[CheckedSlice]]] = defaultdict(list)
    for kind, name in (("file_hash", "the same file"), ("pixel_hash", "the same pixels")):
        groups = defaultdict(list)
        for seen in folder.slices:
            if not seen.blank:
                groups[getattr(seen, kind)].append(seen)
        for group in groups.values():
            said = kind == "pixel_hash" and len({s.file_hash for s in group}) == 1
            if len(group) > 1 and not said:
                where = "train and test" if len({s.split for s in group}) > 1 else ""
                if not where and len({s.file.label for s in group}) > 1:
                    where = "two classes"
                ids = tuple(sorted({s.file.scan for s in group}))
                found[name, where, ids].append(group)
    for (name, where, ids), groups in found.items():
        paths = ", ".join(str(s.file.path.relative_to(folder.root)) for s in groups[0][:MAX_LISTED])
        if where:
            folder.problems.append(f"{name} in {where}, {len(groups)} times, such as: {paths}")
        else:
            print_once(
                f"note: {name} in one split, {len(groups)} times, of {', '.join(ids[:MAX_LISTED])}"
            )


def edges(pictures: np.ndarray) -> np.ndarray:
    """Edges of pictures [n, S, S], with zero mean and unit norm. -> float32 [n, S, S]."""
    grey = pictures.astype(np.float32)
    near, far = (ndimage.gaussian_filter(grey, (0, width, width)) for width in (0.7, 1.5))
    fine = near - far
    fine -= fine.mean((1, 2), keepdims=True)
    return fine / np.maximum(np.linalg.norm(fine, axis=(1, 2), keepdims=True), 1e-3)


def best_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The highest correlation of the edges of pairs of pictures [n, S, S] over all shifts. -> [n].

    Of a duplicate it is near 1 however it was shifted, lit or encoded.
    """
    product = fft.rfft2(edges(a)) * fft.rfft2(edges(b)).conj()
    return fft.irfft2(product, a.shape[1:]).max((1, 2))


def upright(pictures: np.ndarray) -> np.ndarray:
    """Heads turned upright, moved to the middle and scaled to one size. uint8 [n, SIDE, SIDE].

    By the moments of what is brighter than a seventh of the bright: not by how it is lit.
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

    return map_in_chunks(work, pictures)


def perceptual_hashes(pictures: np.ndarray) -> np.ndarray:
    """A perceptual hash of upright pictures: small, lit alike. -> float32 [n, HASH_SIDE^2]."""
    size = SIDE // HASH_SIDE

    def work(part: np.ndarray) -> np.ndarray:
        small = part.reshape(-1, HASH_SIDE, size, HASH_SIDE, size).mean((2, 4), dtype=np.float32)
        small = small.reshape(len(part), -1)
        return small * (50 / np.maximum(small.mean(1, keepdims=True), 1))

    return map_in_chunks(work, pictures)


class Pair(NamedTuple):
    """A test and a training slice, and how far their edges correlate."""

    score: float
    test: CheckedSlice
    train: CheckedSlice
    mirrored: bool


def near_duplicates(folder: CheckedFolder) -> tuple[list[Pair], float]:
    """Test slices whose picture, not of the very same pixels, is in training too.

    Also the highest correlation of the other pairs. The candidates are those of the most alike
    wholes.
    """
    from sklearn.neighbors import NearestNeighbors

    split = np.array([s.split if not s.blank else "" for s in folder.slices])
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    if not min(map(len, rows.values())):
        return [], 0.0
    train = folder.pictures[rows["train"]]
    train_up = upright(train)
    finder, best = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train))), {}
    finder.fit(perceptual_hashes(train_up))
    for mirrored in (False, True):
        test = folder.pictures[rows["test"]][:, :, :: -1 if mirrored else 1]
        test_up = upright(test)
        alike = finder.kneighbors(
            perceptual_hashes(test_up), return_distance=False
        )  # [tests, NEIGHBOURS]
        for part in np.array_split(np.arange(len(test)), math.ceil(len(test) / CHUNK)):
            for column in alike[part].T:
                scores = np.maximum(
                    best_correlation(test[part], train[column]),
                    best_correlation(test_up[part], train_up[column]),
                )
                for i, score, j in zip(rows["test"][part], scores, column, strict=True):
                    best[i] = max(best.get(i, (-1.0, 0, False)), (float(score), int(j), mirrored))
    pairs = [
        Pair(score, folder.slices[i], folder.slices[rows["train"][j]], mirrored)
        for i, (score, j, mirrored) in best.items()
    ]
    same = [p for p in pairs if p.score >= SAME_EDGES and p.test.pixel_hash != p.train.pixel_hash]
    return same, max((p.score for p in pairs if p.score < SAME_EDGES), default=0.0)


def report_duplicates(folder: CheckedFolder) -> None:
    """Say what is there twice; across splits or classes it is a problem."""
    exact_duplicates(folder)
    same, most = near_duplicates(folder)
    if folder.pictures.size:
        print_once(f"edges of other test and training slices correlate by {most:.2f} at most")
    of_ids = defaultdict(list)
    for pair in sorted(same, key=lambda pair: -pair.score):
        of_ids[pair.test.file.scan, pair.train.file.scan].append(pair)
    for pairs in of_ids.values():
        score, *both, mirrored = pairs[0]
        paths = " and ".join(str(s.file.path.relative_to(folder.root)) for s in both)
        how = f"{len(pairs)} slices{', mirrored' * mirrored}, correlation up to {score:.2f}"
        folder.problems.append(f"one picture in test and train ({how}): {paths}")


# Confounds


def report_confounds(folder: CheckedFolder) -> None:
    """Say what participants are like in each class, and how well one number tells the class."""
    people: dict[str, list[int]] = defaultdict(list)
    for row, seen in enumerate(folder.slices):
        people[seen.file.participant].append(row)
    first = {name: folder.slices[rows[0]].file for name, rows in people.items()}
    entries = [folder.entries.get(file.scan) for file in first.values()]
    numbers = {
        "age": [e.age if e else math.nan for e in entries],
        "sex (women)": [float(e.sex == "F") if e and e.sex else math.nan for e in entries],
        "mean grey": [float(folder.pictures[rows].mean()) for rows in people.values()],
    }
    labels = np.array([file.label for file in first.values()])
    for name, column in numbers.items():
        values = np.array(column)
        known = np.isfinite(values)
        if not known.any():
            continue
        means = [
            f"{title} {values[known & (labels == i)].mean():.2f}"
            for i, title in enumerate(folder.classes)
            if (known & (labels == i)).any()
        ]
        best, chance = most_telling(values[known], labels[known])
        text = f"{name} of {known.sum()} ids: {', '.join(means)}"
        if math.isfinite(best):
            text += f"; tells the class with an AUC of {best:.2f}"
            if best >= max(SUSPICIOUS_AUC, chance):
                text += f": what is learned of the class may be its {name}"
        print_once(text)


def most_telling(values: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The largest AUC by which a number tells two of the classes, and what chance may reach there.

    NaN if there are no two.
    """
    from sklearn.metrics import roc_auc_score

    found = [(math.nan, math.nan)]
    for a, b in itertools.combinations(np.unique(labels), 2):
        chosen = (labels == a) | (labels == b)
        value = roc_auc_score(labels[chosen] == b, values[chosen])
        n, m = (labels == a).sum(), (labels == b).sum()
        deviation = math.sqrt((n + m + 1) / (12 * n * m))  # of the AUC of a number without meaning
        found.append((max(value, 1 - value), 0.5 + 2 * deviation))
    return max(found[1:], default=found[0])


# Contact sheet


def draw_sheet(folder: CheckedFolder, path: Path) -> None:
    """A row of slices for each class; at its end the darkest, brightest, smallest and largest."""
    labels = np.array([seen.file.label for seen in folder.slices])
    rows = [np.flatnonzero(labels == i) for i in range(len(folder.classes))]
    rows = [row for row in rows if len(row)]
    figure = Figure(figsize=(COLUMNS + 4 * EXTREMES, 1.15 * len(rows) + 0.5))
    axes = figure.subplots(len(rows), COLUMNS + 4 * EXTREMES, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        pictures = folder.pictures[row]
        grey = pictures.mean((1, 2))
        size = np.array([(p > otsu_threshold(p) / 2).mean() for p in pictures])
        at = {"": evenly_spaced(len(row), COLUMNS)}
        for name, values in (("dark", grey), ("bright", -grey), ("small", size), ("large", -size)):
            at[name] = np.argsort(values, kind="stable")[:EXTREMES]
        titles = [name for name, chosen in at.items() for _ in chosen]
        for ax, name, i in zip(line, titles, np.concatenate(list(at.values())), strict=False):
            ax.imshow(pictures[i], cmap="gray", vmin=0, vmax=255)
            ax.set_title(name, fontsize=8)
        for ax in line:
            ax.set_xticks([])
            ax.set_yticks([])
        line[0].set_ylabel(printable(folder.classes[folder.slices[row[0]].file.label]))
    save_figure(figure, path)


# Command line


def check(
    root: tyro.conf.Positional[Path],
    table: Path | None = None,
    columns: dict[str, str] = {},  # noqa: B006
    out: Path = Path("check.png"),
) -> None:
    """Say what is in a folder, and whether training on it would be honest: else exit code 2.

    Args:
        root: folder that holds train/ and test/, or the class folders.
        table: CSV or TSV that tells whose scans these are, and age and sex.
        columns: columns that are called otherwise, such as: participant RID age AGE.
        out: PNG of the contact sheet.
    """
    ensure_writable(out.parent)
    folder = read_folder(root, table, columns)
    if folder.slices:
        report_duplicates(folder)
        report_confounds(folder)
        draw_sheet(folder, out)
        print_once(f"contact sheet: {out}")
    if folder.problems:
        lines = "\n  ".join(folder.problems)
        raise UserError(f"{root}: training would not be honest, or fail:\n  {lines}")
    print_once("no id is on both sides, no picture either; every file can be read")
