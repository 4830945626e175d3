"""Arithmetic against other people's, closed forms, and sets whose rank is known."""

import csv
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ids, make_slices
from scipy import ndimage
from scipy.stats import spearmanr

from assets import demo_brains
from config import Config
from dataset import load_slices
from evaluation import features, metrics
from evaluation.features import Extractor
from evaluation.metrics import (
    Features,
    auc,
    bootstrap_interval,
    distance_rows,
    distances_by_halves,
    effect_size,
    frechet_distance,
    gaussian,
    gaussian_distance,
    halves_by_participant,
    head_box,
    histogram,
    infinite_distance,
    interval,
    kernel_distance,
    manifold_metrics,
    mean_by_participant,
    membership,
    normalise_pose,
    participation_ratio,
    pose,
    random_pairs,
    resampled_participants,
    segment,
    similarity,
    without_participants,
)
from evaluation.variety import recall_without_detail
from scans.heads import otsu_threshold


def gaussians(n: int, width: int, seed: int, shift: float = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / math.sqrt(width)
    return (rng.normal(shift, 1, (n, width)) @ mixing).astype(np.float32)


def alone(x: np.ndarray) -> Features:
    """Features of one class, each slice a participant of its own."""
    return Features(x, ids(len(x), 1), np.zeros(len(x), int))


# Features and distances


@pytest.mark.parametrize(("n", "m"), [(300, 200), (40, 30)])  # more and fewer than features
def test_frechet_distance_equals_the_formula_with_a_matrix_square_root(n, m):
    from scipy.linalg import sqrtm

    x, y = gaussians(n, 50, 0), gaussians(m, 50, 1, 0.3)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(np.trace(sqrtm(a @ b + (1e-12 if n < 50 else 0) * np.eye(50))))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_of_known_gaussians():
    """N(0, s^2 I) to N(d, t^2 I) in F dimensions: |d|^2 + F (s - t)^2."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (60000, 4)), rng.normal(0.5, 2, (60000, 4))
    assert frechet_distance(x, y) == pytest.approx(4 * 0.25 + 4, rel=0.03)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)


def test_distances_equal_those_of_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = gaussians(400, 64, 0), gaussians(300, 64, 1, 0.2)
    stats = [{"mu": v.mean(0), "sigma": np.cov(v, rowvar=False)} for v in (x, y)]
    theirs = fid.fid_statistics_to_metric(*stats, verbose=False)
    assert frechet_distance(x, y) == pytest.approx(next(iter(theirs.values())), rel=1e-4)
    kernel = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    kernel |= {"kid_kernel": "poly", "kid_kernel_poly_coef0": 1}
    one = kid.kernel_mmd(x[:300].astype(float), y.astype(float), **kernel)
    assert kernel_distance(alone(x[:300]), alone(y))[0] == pytest.approx(one, rel=1e-4)


class Passing(torch.nn.Module):
    """Features in, features out, in the place of a network."""

    num_features = 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).float()


def test_distances_equal_those_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = gaussians(300, 32, 0), gaussians(200, 32, 1, 0.2)
    size = {"input_img_size": (32, 1, 1)}
    theirs = fid.FrechetInceptionDistance(Passing(), **size).set_dtype(torch.float64)
    kernel = kid.KernelInceptionDistance(Passing(), subsets=1, subset_size=200)
    for values, real in ((x, True), (y, False)):
        images = torch.from_numpy(values)[:, :, None, None]
        theirs.update(images, real=real)
        kernel.update(images[:200], real=real)
    assert frechet_distance(x, y) == pytest.approx(float(theirs.compute()), rel=1e-4)
    ours = kernel_distance(alone(x[:200]), alone(y))[0]
    assert ours == pytest.approx(float(kernel.compute()[0]), rel=1e-3)


@pytest.mark.parametrize("per_person", [1, 10])
def test_kernel_distance_is_unbiased_and_knows_its_error(per_person):
    """Slices of a person are alike: counted as independent they would add to the distance."""
    found = []
    for seed in range(80):
        own, others = gaussians(30, 8, seed), gaussians(200, 8, 500 + seed)
        slices = (own.repeat(per_person, 0) + gaussians(30 * per_person, 8, 900 + seed)) / 2**0.5
        names = np.arange(30).repeat(per_person).astype(str)
        people = Features(slices.astype(np.float32), names, np.zeros(len(names), int))
        found.append(kernel_distance(people, alone(others), seed))
    values, errors = np.array(found).T
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(80)
    assert 1 < errors.mean() / values.std() < 2.5


def test_kernel_distance_needs_two_participants():
    one = Features(gaussians(20, 4, 0), np.full(20, "a"), np.zeros(20, int))
    assert math.isnan(kernel_distance(one, alone(gaussians(20, 4, 1)))[0])


def test_manifold_metrics_equal_those_of_prdc():
    prdc = pytest.importorskip("prdc")
    x, y = gaussians(300, 16, 0), gaussians(300, 16, 1, 0.3)
    ours = manifold_metrics(alone(x), alone(y))
    theirs = {k: prdc.compute_prdc(x, y, k) for k in (3, 5)}
    for name, k in (("precision", 3), ("recall", 3), ("density", 5), ("coverage", 5)):
        assert ours[name] == pytest.approx(theirs[k][name], abs=1e-6)


def test_rows_of_distances_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    x, y = gaussians(70, 8, 0), gaussians(70, 8, 1, 0.5)
    expected = np.linalg.norm(x[:, None].astype(float) - y[None], axis=2)
    sets = alone(x)._replace(participants=ids(70)), alone(y)
    expected_metrics = manifold_metrics(*sets)
    monkeypatch.setattr(metrics, "ROWS", 9)
    rows = np.concatenate([found for _, found in distance_rows(x, y)])
    np.testing.assert_allclose(rows, expected, atol=1e-9)
    assert manifold_metrics(*sets) == expected_metrics
    within = np.concatenate([found for _, found in distance_rows(x, x, ids(70))])
    assert (np.isinf(within) == (ids(70)[:, None] == ids(70))).all()


def test_slices_of_one_participant_are_no_neighbours():
    """Two tight clusters, each one participant: neighbours lie in the other one, far away."""
    x = np.concatenate([np.zeros((10, 2)), np.ones((10, 2))]) + gaussians(20, 2, 0) * 1e-3
    fake = x + 0.1
    assert manifold_metrics(alone(x), alone(fake))["precision"] == 0
    real = alone(x)._replace(participants=ids(20, 10))
    assert manifold_metrics(real, alone(fake))["precision"] == 1


def test_halves_and_bootstraps_keep_participants_whole():
    slices, rng = make_slices(), np.random.default_rng(0)
    a, b = halves_by_participant(slices.participants, slices.labels, rng)
    assert not set(slices.participants[a]) & set(slices.participants[b])
    assert sorted([*a, *b]) == list(range(80))
    assert slices.labels[a].mean() == 0.5
    rows = resampled_participants(a, slices.participants, rng)
    names, counts = np.unique(slices.participants[rows], return_counts=True)
    assert set(names) < set(slices.participants[a]) and (counts % 4 == 0).all() and counts.max() > 4


def people(number: int, per_person: int, seed: int) -> Features:
    """Features of participants who differ more than the slices of one do, in two classes."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(number, 1, 8)) + 0.3 * rng.normal(size=(number, per_person, 8))
    names = np.array([f"{seed}-{i:04}" for i in range(number)]).repeat(per_person)
    return Features(values.reshape(-1, 8), names, np.arange(number).repeat(per_person) % 2)


def test_a_perfect_generator_is_told_from_a_memory_and_a_dropped_mode():
    test, train = people(40, 10, 0), people(40, 10, 1)
    few = train.take(
        halves_by_participant(train.participants, train.labels, np.random.default_rng(0))[0]
    )
    sets = {"perfect": people(400, 1, 2), "reference": people(400, 1, 3)}
    sets |= {"copies": train, "dropped": few.take(np.arange(400) % len(few.values))}
    sets["shifted"] = sets["perfect"]._replace(values=sets["perfect"].values + 1)
    whole, halves = distances_by_halves(test, sets, 0)
    assert sorted(whole, key=whole.get)[2:] == ["copies", "dropped", "shifted"]
    ratios = {name: interval(halves[name] / halves["reference"]) for name in sets}
    low, high = ratios["perfect"]
    assert low < 1 < high < ratios["dropped"][0] and ratios["copies"][0] > 1
    left = {name: infinite_distance(whole[name], halves[name]) for name in sets}
    assert abs(left["perfect"]) < 0.25 * whole["perfect"] and 7 < left["shifted"] < 9
    repeated = {"copies": train._replace(participants=np.arange(400).astype(str))}
    assert infinite_distance(*(d["copies"] for d in distances_by_halves(test, repeated, 0))) > 0.1


def test_distances_of_ever_fewer_participants_grow():
    part, target = people(60, 5, 0), gaussian(people(500, 2, 1).values)
    found = [without_participants(part, share, target, 0) for share in (0, 0.5, 0.9)]
    assert found[0] == pytest.approx(gaussian_distance(gaussian(part.values), target))
    assert found[0] < 0.7 * found[1] < 0.3 * found[2]


def test_the_participation_ratio_counts_directions():
    rng = np.random.default_rng(0)
    assert participation_ratio(rng.normal(size=(4000, 12))) == pytest.approx(12, rel=0.02)
    assert participation_ratio(rng.normal(size=(400, 12)) * np.eye(12)[0]) == pytest.approx(1)


def test_membership_of_many_is_that_of_some(monkeypatch):
    train, test = people(40, 10, 0), people(30, 10, 1)
    monkeypatch.setattr(metrics, "MAX_PEOPLE", 20)
    some = metrics.some_people(train, 20, np.random.default_rng(0))
    assert len(set(some.participants)) == 20 and len(some.values) == 200
    copies, seen = train.values + 0.01, []
    distances = metrics.nearest_neighbour
    spy = lambda x, y: seen.append(len(x)) or distances(x, y)  # noqa: E731
    monkeypatch.setattr(metrics, "nearest_neighbour", spy)
    assert membership(train, test, copies, 0)["auc"] > 0.9 and seen == [200, 200]


def test_an_odd_number_of_people_does_not_shift_the_limit_of_infinitely_many():
    assert metrics.share_in_half(people(12, 2, 0)) == 0.5
    whole, share = 1.0 + 3 / 10, 0.3  # a bias of 3 / n, n = 10
    assert infinite_distance(whole, np.full(4, 1.0 + 3 / 3), share) == pytest.approx(1)
    odd = people(6, 2, 0)._replace(labels=np.zeros(12, int))
    odd = odd.take(np.arange(10))  # five people
    assert metrics.share_in_half(odd) == 0.4


def test_slices_that_are_as_near_as_those_of_unseen_people_are_no_excess():
    train, test, fake = people(40, 10, 0), people(40, 10, 1), people(400, 1, 2)
    audit = metrics.copy_audit(train.values, test.values, fake.values, test.participants, 0)
    assert audit["excess_interval"][0] <= 0 <= audit["excess_interval"][1]
    copies = fake.values.copy()
    copies[:100] = train.values[:100] + 0.001
    audit = metrics.copy_audit(train.values, test.values, copies, test.participants, 0)
    assert 0.15 < audit["excess_interval"][0] < audit["excess_interval"][1] < 0.35


def test_membership_of_too_few_participants_is_not_measured():
    found = membership(people(2, 4, 0), people(2, 4, 1), people(20, 1, 2).values, 0)
    assert all(math.isnan(v) for v in found.values())


# Similarity, classes and anatomy


def test_similarity_of_equal_slices_is_one_and_falls_with_noise():
    images = make_slices(size=64).images
    pairs = np.stack([np.arange(20), np.arange(20)], 1)
    np.testing.assert_allclose(similarity(images, pairs), 1, atol=1e-5)
    for side in (11, 21, 22, 44, 88, 98, 99, 175, 176):  # a change of the number of scales
        assert np.isfinite(
            similarity(np.zeros((2, side, side), np.uint8), np.array([[0, 1]]))
        ).all()
    noisy = images + np.random.default_rng(0).normal(0, 40, images.shape)
    both = np.concatenate([images, noisy.clip(0, 255).astype(np.uint8)])
    assert similarity(both, pairs + [[0, 80]]).mean() < 0.9


def test_pairs_are_of_one_class_and_two_participants():
    slices = make_slices()
    i, j = random_pairs(slices.participants, slices.labels, 0).T
    assert (slices.labels[i] == slices.labels[j]).all()
    assert (slices.participants[i] != slices.participants[j]).all()


def test_auc_and_means_by_participant():
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.5, 0.9])
    assert auc(labels, np.stack([1 - scores, scores], 1)) == auc(labels, scores) == 0.75
    with warnings.catch_warnings(action="error"):
        assert math.isnan(auc(labels * 0, scores))
    means, classes = mean_by_participant(
        np.array([1.0, 3, 5, 5]), np.array(["a", "a", "b", "b"]), labels
    )
    assert means.tolist() == [2, 5] and classes.tolist() == [0, 1]


def test_areas_of_a_drawn_brain():
    y, x = np.mgrid[:64, :64] - 31.5
    brain, ventricle = np.hypot(y / 26, x / 22) < 1, np.hypot(y / 8, x / 5) < 1
    image = np.where(brain, 160, 0) - np.where(ventricle, 120, 0)
    share, dark = (mask.mean() for mask in segment(image.astype(np.uint8)))
    assert share == pytest.approx(brain.mean(), rel=0.02)
    assert dark == pytest.approx(ventricle.mean(), rel=0.1)
    assert not np.any(segment(np.zeros((64, 64), np.uint8)))


@pytest.mark.parametrize(
    ("people", "slices"), [(12, 2), pytest.param(24, 20, marks=pytest.mark.slow)]
)
def test_ventricle_areas_follow_the_drawn_volumes_of_demo_brains(
    config: Config, tmp_path, monkeypatch, people, slices
):
    monkeypatch.setattr(demo_brains, "SLICES", slices)
    demo_brains.write_demo(tmp_path / "demo", num_train=people, num_test=2)
    config = replace(config, data_root=tmp_path / "demo", img_resolution=64)
    slices = load_slices(config)[0]["train"]
    with open(tmp_path / "demo" / "manifest.csv", newline="") as file:
        volume = {row["participant"]: float(row["ventricle_ml"]) for row in csv.DictReader(file)}
    measured = np.array([segment(image)[1].mean() for image in slices.images])
    pairs = np.array([
        (measured[slices.participants == name].mean(), volume[name])
        for name in set(slices.participants)
    ])  # fmt: skip
    assert len(pairs) == people
    assert spearmanr(pairs[:, 0], pairs[:, 1])[0] > 0.85


def test_otsu_parts_two_groups():
    values = np.concatenate([np.full(100, 20), np.full(50, 200)]).astype(np.uint8)
    assert 20 <= otsu_threshold(values) < 200


def test_effect_size_of_known_groups():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(1, 2, 20000), rng.normal(0, 2, 20000)])
    assert effect_size(values, np.repeat([0, 1], 20000)) == pytest.approx(0.5, abs=0.03)


def test_bootstrap_intervals_take_participants_whole():
    """64 participants, 5 slices of one value each: drawing single slices gives narrow intervals."""
    rng = np.random.default_rng(0)
    own, labels = rng.normal(size=64) + np.repeat([1, 0], 32), np.repeat([0, 1], 160)
    values, participants = own.repeat(5), ids(320, 5)

    def width(names: np.ndarray) -> float:
        low, high = bootstrap_interval(effect_size, values, names, labels, 0)
        assert low < effect_size(values, labels) < high
        return high - low

    assert width(participants) > 1.7 * width(np.arange(320))


def test_histograms_share_their_bins_and_are_densities():
    found = histogram({"a": np.arange(100.0), "b": np.zeros(5)}, bins=10)
    assert len(found["edges"]) == 11
    assert (np.diff(found["edges"]) * found["b"]).sum() == pytest.approx(1)
    assert found["a"][0] == pytest.approx(0.01, rel=0.1)


# Pose, leaks and samples


def tilted_heads(n: int, degrees: float = 4.0, side: float = 1.0, border: int = 0) -> np.ndarray:
    """Ellipses, tilted with that deviation, brighter on one side, on a background of that grey."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32] - 15.5
    a = np.radians(rng.normal(0, degrees, (n, 1, 1)))
    along, across = y * np.cos(a) - x * np.sin(a), x * np.cos(a) + y * np.sin(a)
    inside = np.hypot(along / 13, across / 9) < 1
    return (inside * (150 + side * 2 * x) + border).astype(np.uint8)


def test_the_pose_of_a_head_is_its_tilt_its_brighter_side_and_its_border():
    y, x = np.mgrid[:32, :32] - 15.5
    a = math.radians(10)  # its upper end to the right
    along, across = -y * math.cos(a) + x * math.sin(a), x * math.cos(a) + y * math.sin(a)
    head = (np.hypot(along / 13, across / 9) < 1) * 150.0
    assert metrics.pose(head[None].astype(np.uint8))[0, 0] == pytest.approx(10, abs=0.5)
    mirrored = metrics.pose(head[None, :, ::-1].astype(np.uint8))
    assert mirrored[0, 0] == pytest.approx(-10, abs=0.5)
    right = metrics.pose((head / 2 * (1 + (x > 0)))[None].astype(np.uint8))
    assert right[0, 1] == pytest.approx(1 / 3, abs=0.02)  # two parts of three
    assert metrics.pose(np.full((1, 32, 32), 7, np.uint8))[0, 2] == 7


def test_pose_and_brightness_of_heads_are_normalised():
    y, x = np.mgrid[:64, :64] - 31.5
    head = np.where(np.hypot(y / 26, x / 20) < 1, 120.0, 0)
    head[20:28, 26:34] = 200
    moved = ndimage.shift(ndimage.rotate(head, 9, reshape=False, order=1), (3, -2), order=1)
    both = normalise_pose(np.stack([head, 0.8 * moved]).astype(np.uint8)).astype(float)
    assert np.abs(both[0] - both[1]).mean() < 2 < 10 < np.abs(head - moved).mean()
    assert np.allclose(pose(both.astype(np.uint8))[:, 0], 0, atol=0.5)
    assert both[0].mean() == pytest.approx(50, abs=2)
    assert (normalise_pose(np.zeros((2, 16, 16), np.uint8)) == 0).all()


def test_the_box_of_the_heads_leaves_the_background_out():
    images = np.zeros((20, 64, 64), np.uint8)
    images[:, 10:50, 20:45] = 100
    images[0] = 255  # one in twenty
    assert head_box(images) == (slice(10, 50), slice(20, 45))
    assert head_box(images * 0) == (slice(None), slice(None))


def test_leaks_are_seen_and_real_against_real_has_none():
    real = metrics.pose(tilted_heads(400))
    none = metrics.leaks(real, metrics.pose(tilted_heads(300)))
    assert none["leak_rotation"] == pytest.approx(1, abs=0.1)
    assert none["leak_flip"] == pytest.approx(0, abs=0.2) and none["leak_border"] == 0
    assert metrics.leaks(real, metrics.pose(tilted_heads(400, 8.0)))["leak_rotation"] > 1.8
    mirrored = metrics.pose(tilted_heads(400)[:, :, ::-1])
    assert metrics.leaks(real, mirrored)["leak_flip"] < -3
    lit = metrics.pose(tilted_heads(400, border=9))
    assert metrics.leaks(real, lit)["leak_border"] == pytest.approx(9)


def test_the_grain_of_a_lattice_is_high_and_that_of_a_blur_is_low():
    rng = np.random.default_rng(0)
    noise = rng.integers(100, 156, [120, 32, 32]).astype(np.uint8)
    power = np.abs(np.fft.fft2(noise)) ** 2
    fine = np.abs(np.fft.fftfreq(32)) >= 0.375
    assert metrics.grain(noise) == pytest.approx(power[:, fine][:, :, fine].mean(), rel=1e-6)
    lattice = noise + 20 * (np.indices([32, 32]).sum(0) % 2).astype(np.uint8)
    blurred = ndimage.gaussian_filter(noise, (0, 1, 1))
    assert metrics.grain(lattice) > 5 * metrics.grain(noise) > 20 * metrics.grain(blurred)
    assert metrics.grain(np.full([2, 32, 32], 7, np.uint8)) == pytest.approx(0, abs=1e-6)


def test_a_profile_is_one_for_the_real_and_the_share_for_what_varies_less():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    deviations = np.geomspace(1000, 0.1, 30)  # far enough apart for the axes to be found
    real, other = (rng.normal(size=(4000, 30)) * deviations @ turn for _ in range(2))
    axes = metrics.main_axes(gaussian(real), 20)
    assert np.allclose((real @ axes).std(0), 1, atol=1e-3)
    assert np.allclose((other @ axes).std(0), 1, atol=0.05)
    less = other @ turn.T
    less[:, 1:6] *= 0.1  # components 2 to 6
    profile = (less @ turn @ axes).std(0)
    assert profile[1:6].max() < 0.3 and profile[8:].min() > 0.9
    flat = real @ turn.T
    flat[:, 3:] = 0  # three directions are filled
    assert metrics.main_axes(gaussian(flat), 20).shape == (30, 3)


def test_components_are_summed_up_in_three_groups():
    along = np.array([[-1.0], [1.0]]) * np.arange(1, 21)  # deviations 1 to 20
    found = metrics.shape_spread(along)
    assert found == {"shapes_1_1": 1.0, "shapes_2_6": 4.0, "shapes_7_20": 13.5}
    assert math.isnan(metrics.shape_spread(along[:, :3])["shapes_7_20"])


def test_recall_without_detail_blurs_all_sets_alike(tmp_path):
    train, test, seen = make_slices(40), make_slices(40, seed=1), []  # one batch each

    def network(images):
        seen.append(images[:, 0].numpy())
        return images.float().flatten(1)

    extractor = Extractor("toy", "1", network)
    (row,) = recall_without_detail(train, {"test slices": test}, extractor, tmp_path)
    assert row["slices"] == min(500, len(train.labels)) and {"recall", "recall_blurred"} < set(row)
    images, n = np.concatenate(seen), row["slices"]
    for i, slices in enumerate((train, test)):
        sharp, blurred = images[i * n : (i + 1) * n], images[(i + 2) * n : (i + 3) * n]
        assert (sharp == slices.images).all() and (blurred == features.blurred(sharp, 1)).all()
