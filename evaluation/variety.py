"""Whether samples vary as real slices do: a profile of their shapes, and recall without detail.

Recall is low for samples that are blurred as well as for samples that are alike. Two measures tell
these apart: deviations along the main components of real pixels, which a blur hardly changes, and
recall after all images have been blurred alike.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset import Slices
from evaluation import features, metrics
from evaluation.metrics import Features
from evaluation.verdict import Rows
from utils import random_rows

MAX_BLURRED = 500  # slices of each set whose recall is measured with and without blur
BLUR = 1.0  # pixels


def shape_profile(train: Slices, sets: dict[str, Slices], cache: Path) -> Rows:
    """Deviations along the principal components of the training slices' pixels, over theirs.

    A row for each set: 1 for a perfect generator, below 1 where shapes are missing. "deviations"
    has one value for each of the first 20 components.
    """

    def points(name: str, slices: Slices) -> np.ndarray:
        return features.features_of(slices.images, features.PIXELS, cache, name)

    axes = metrics.main_axes(metrics.gaussian(points("train", train)), metrics.NUM_SHAPES)
    rows = []
    for name, slices in sets.items():
        along = points(name, slices) @ axes
        row = {"set": name} | metrics.shape_spread(along)
        rows.append(row | {"deviations": {"values": along.std(0).tolist()}})
    return rows


def some_features(
    slices: Slices,
    n: int,
    extractor: features.Extractor,
    blur: float = 0,
    cache: Path | None = None,
) -> Features:
    """Features of `n` of the slices, blurred before; without a cache they are computed anew."""
    some = slices.take(random_rows(len(slices.labels), n))
    if blur:
        some = replace(some, images=features.blurred(some.images, blur))
    if cache is None:
        values = features.compute_features(some.images, extractor, None)
    else:
        name = f"{n} slices, blurred" if blur else f"{n} slices"
        values = features.features_of(some.images, extractor, cache, name)
    return Features(values, some.participants, some.labels)


def recall_without_detail(
    train: Slices, sets: dict[str, Slices], extractor: features.Extractor, cache: Path
) -> Rows:
    """Recall of training slices by each set, plain and with all images blurred by a pixel.

    All sets have equally many slices, as recall changes with their number.
    """
    n = min(MAX_BLURRED, *(len(s.labels) for s in (train, *sets.values())))
    rows: Rows = [{"set": name, "slices": n} for name in sets]
    for column, blur in (("recall", 0.0), ("recall_blurred", BLUR)):
        parts = (train, *sets.values())
        real, *others = (some_features(part, n, extractor, blur, cache) for part in parts)
        for row, part in zip(rows, others, strict=True):
            row[column] = metrics.manifold_metrics(real, part)["recall"]
    return rows
