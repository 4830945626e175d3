"""The protocol: tables of known sets, the report, and impostors whose rank is known before."""

import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ids, make_slices, write_folder
from impostors import compare, impostors, largest_mix
from PIL import Image
from scipy import ndimage

import evaluate as evaluation
import predict as prediction
import utils
from assets.demo_brains import write_demo
from config import Config, UserError
from dataset import Slices, load_slices
from evaluate import (
    Options,
    References,
    evaluate,
    fakes_of,
    measure_anatomy,
    measure_labels,
    measure_memorisation,
)
from evaluation import classifiers, features, metrics, report
from evaluation.features import planted_copies
from evaluation.metrics import copy_audit, pose
from evaluation.report import as_markdown, as_narrow_tables, as_table, cell
from evaluation.verdict import verdict
from predict import predict
from train import train
from training import runs
from training.logs import read_log
from training.runs import load_generator

# Labels


@pytest.fixture
def short_classifiers(monkeypatch):
    monkeypatch.setattr(evaluation, "NUM_SEEDS", 1)
    monkeypatch.setattr(classifiers, "STEPS", 60)
    monkeypatch.setattr(metrics, "NUM_DRAWS", 30)


def label_rows(train: Slices, fakes: Slices, path: Path) -> dict[str, dict]:
    references = References({"train": train, "test": make_slices(seed=1)}, [], path, 0)
    return {
        f"{r['measurement']} {r['unit']}": r for r in measure_labels(fakes, references)["labels"]
    }


@pytest.mark.slow
def test_swapped_labels_reverse_the_auc(short_classifiers, tmp_path):
    other = make_slices(seed=2)
    right = label_rows(make_slices(), other, tmp_path)
    wrong = label_rows(make_slices(), replace(other, labels=1 - other.labels), tmp_path)
    for name in ("TSTR slices", "TSTR participants", "TRTS slices"):
        assert right[name]["auc"] > 0.95 and wrong[name]["auc"] < 0.05, name
    assert right["TRTR participants"]["auc"] > 0.95 and wrong["TRTR participants"]["auc"] > 0.95
    low, high = wrong["TSTR - TRTR participants"]["interval_over_participants"]
    assert low <= wrong["TSTR - TRTR participants"]["auc"] <= high < -0.9


@pytest.mark.slow
def test_synthetic_data_that_helps_is_seen_to_help(short_classifiers, tmp_path):
    """Real labels without meaning, synthetic ones with: the gain's interval excludes 0."""
    train = make_slices()
    useless = replace(train, labels=np.random.default_rng(1).permutation(train.labels))
    gain = label_rows(useless, make_slices(n=400, seed=2), tmp_path)["TR+STR - TRTR participants"]
    assert gain["interval_over_participants"][0] > 0 and gain["auc"] > 0.2


# Anatomy


def test_generated_slices_have_an_effect_with_an_interval(tmp_path):
    y, x = np.mgrid[:32, :32] - 15.5
    rng, labels = np.random.default_rng(0), np.arange(120) // 4 % 2
    radii = rng.normal(4, 0.5, 120) - labels
    radius = np.hypot(y, x)
    images = np.where(radius < 13, 150, 0) * (radius >= radii.reshape(-1, 1, 1))
    fakes = Slices(images.astype(np.uint8), labels, ids(120, 1), ["AD", "NC"])
    splits = {"train": fakes, "test": fakes}
    mixed = replace(fakes, labels=np.random.default_rng(0).permutation(fakes.labels))
    found = [
        {
            row["area"]: row
            for row in measure_anatomy(f, References(splits, [], tmp_path, 0))["anatomy"]
        }
        for f in (fakes, mixed)
    ]
    low, high = found[0]["ventricles"]["fake_effect_interval"]
    assert 1 < low < found[0]["ventricles"]["fake_effect"] < high
    low, high = found[1]["ventricles"]["fake_effect_interval"]
    assert low < 0 < high


def test_tables_have_every_column_and_no_histogram():
    rows = [{"a": 0.123456, "pairs": {"x": [1]}}, {"b_c": [1.0, 2.5]}]
    assert as_table(rows) == "| a | b c |\n| --- | --- |\n| 0.1235 |  |\n|  | 1 to 2.5 |\n"


# Memorisation


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["exact", "noisy"])
def test_the_audit_finds_the_planted_share(share, kind):
    train, test, fresh = (make_slices(n=400, per_id=2, seed=s) for s in range(3))
    rows = np.arange(round(share * 400))
    images = fresh.images.copy()
    images[rows] = planted_copies(train.images, 0)[kind][rows]
    flat = [v.reshape(400, -1).astype(float) for v in (train.images, test.images, images)]
    found = copy_audit(*flat, test.participants, 0)
    assert found["share_too_near"] == pytest.approx(share, abs=0.03)
    low, high = found["interval_over_participants"]
    assert low <= found["share_too_near"] <= high and high - low < 0.2
    assert (found["gaps"][rows] < found["threshold"]).all()
    assert (found["partners"][rows] == rows).all()


def test_few_test_participants_set_a_threshold_that_others_pass():
    """Each person's slices lie together; nothing is copied. With few people 1 % means more."""
    shares = {}
    for people in (5, 200):
        train, test, fake = (
            (rng.normal(size=(n, 1, 6)) + 0.1 * rng.normal(size=(n, 10, 6))).reshape(-1, 6)
            for rng, n in zip(map(np.random.default_rng, range(3)), (200, people, 200), strict=True)
        )
        found = copy_audit(train, test, fake, np.arange(people).repeat(10).astype(str), 0)
        shares[people] = found["share_by_chance"]
    assert shares[5] > 0.03 > 0.015 > shares[200] > 0.005
    alone = copy_audit(train, test[:10], fake, np.full(10, "a"), 0)
    assert math.isnan(alone["share_by_chance"])


def heads(n: int, seed: int, per_id: int = 1) -> Slices:
    """Ellipses with ten blobs of their own, tilted and off the middle by chance; two classes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32] - 15.5
    images = []
    for _ in range(n // per_id):
        blobs = [
            (np.hypot(y - b, x - a) < r) * level
            for a, b, r, level in zip(
                *rng.uniform(-8, 8, (2, 10)), rng.uniform(1, 3, 10), rng.uniform(-90, 60, 10),
                strict=True,
            )
        ]  # fmt: skip
        head = np.where(np.hypot(y / 12, x / 10) < 1, 150 + sum(blobs), 0)
        for _ in range(per_id):
            moved = ndimage.rotate(head, rng.normal(0, 3), reshape=False, order=1)
            moved = ndimage.shift(moved, rng.normal(0, 1, 2), order=1)
            images.append(moved + rng.normal(0, 2, head.shape) * (moved > 20))
    labels = np.arange(n) // per_id % 2
    participants = np.array([f"{seed}-{name}" for name in ids(n, per_id)])
    return Slices(
        np.array(images).clip(0, 255).astype(np.uint8), labels, participants, ["AD", "NC"]
    )


def memorisation(train: Slices, test: Slices, fakes: Slices, path: Path) -> dict[str, list[dict]]:
    return measure_memorisation(fakes, References({"train": train, "test": test}, [], path, 0))


def test_planted_copies_are_as_said():
    images = heads(40, 0).images
    copies = planted_copies(images, 0)
    assert (copies["exact"] == images).all()
    assert (copies["shifted"][:, :, 1:] == images[:, :, :-1]).all()
    assert (copies["mirrored"][:, :, ::-1] == images).all()
    assert 1.5 < np.std(copies["noisy"][images > 20].astype(float) - images[images > 20]) < 2.5
    tilt = [pose(v)[:, 0] for v in (images, copies["turned"])]
    assert abs(np.mean(tilt[1] - tilt[0])) == pytest.approx(5, abs=0.7)
    assert copies["darkened"].mean() == pytest.approx(0.9 * images.mean(), rel=0.02)
    assert copies["blurred"].std() < images.std()


@pytest.fixture
def few_halves(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_HALVES", 30)
    monkeypatch.setattr(metrics, "NUM_DRAWS", 30)


def test_copies_are_found_in_any_pose_and_pairs_are_named(tmp_path, few_halves):
    train, test, fresh = (heads(120, seed) for seed in range(3))
    fakes = replace(fresh, images=fresh.images.copy())
    fakes.images[7] = np.roll(train.images[40][:, ::-1], 2, 0)
    (row,) = memorisation(train, test, fakes, tmp_path)["memorisation"]
    for kind in ("exact", "noisy", "shifted", "mirrored", "turned", "darkened", "augmented"):
        assert row[f"found_{kind}"] > 0.9, kind
    assert row["pairs"]["sample"][0] == 7 and row["pairs"]["train"][0] == 40
    assert (
        row["share_too_near"] < 0.1
        and row["interval_over_participants"][0] <= row["share_too_near"]
    )


def test_membership_tells_memory_from_a_difference_of_cohorts(tmp_path, few_halves):
    train, test, fresh = (heads(160, seed, per_id=4) for seed in range(3))
    found = memorisation(train, test, fresh, tmp_path)["membership"]
    honest, planted = found
    assert honest["auc_interval"][0] < 0.5 < honest["auc_interval"][1]
    assert planted["auc_interval"][0] > 0.5 < planted["auc_calibrated_interval"][0]
    assert planted["auc_cohorts"] == honest["auc_cohorts"]

    def fewer_blobs(slices: Slices) -> Slices:
        smooth = ndimage.gaussian_filter(slices.images, (0, 2, 2))
        return replace(slices, images=smooth)

    train, fresh = fewer_blobs(train), fewer_blobs(fresh)  # another cohort, which G has learned
    honest, _ = memorisation(train, test, fresh, tmp_path)["membership"]
    assert honest["auc_interval"][0] > 0.5 < honest["auc_cohorts_interval"][0]
    assert honest["auc"] == honest["auc_cohorts"] > honest["auc_calibrated"] + 0.1


# Small and odd sets


def test_without_two_participants_in_a_class_there_is_no_pair(tmp_path):
    slices = make_slices(n=8, per_id=4)
    (fake, real) = evaluation.measure_diversity(
        replace(slices, participants=ids(8, 1)),
        References({"train": slices, "test": slices}, [], tmp_path, 0),
    )["diversity"]
    assert math.isnan(real["ms_ssim"]) and 0 < fake["ms_ssim"] < 1
    assert as_table([real]).splitlines()[-1] == "| real | not measured | not measured |"
    assert cell(None) == cell(math.nan) == "not measured"


def test_the_error_of_similar_pairs_is_that_of_people(tmp_path, monkeypatch):
    slices = make_slices(n=80, per_id=4)  # 20 people
    person = metrics.codes_of(slices.participants)
    monkeypatch.setattr(metrics, "similarity", lambda _, pairs: person[pairs[:, 0]] * 1.0)
    references = References({"train": slices, "test": slices}, [], tmp_path, 0)
    _, real = evaluation.measure_diversity(slices, references)["diversity"]
    assert real["error"] == pytest.approx(np.arange(20).std() / math.sqrt(20))


SMALL = {  # people and slices of each in train and test, grey level or None for noise, settings
    "all black": ({"train": (4, 2), "test": (2, 2)}, 0, {}),
    "a slice of each class": ({"train": (1, 1), "test": (1, 1)}, None, {}),
    "a test split of two": ({"train": (4, 2), "test": (1, 1)}, None, {}),
    "a batch of four epochs": (
        {"train": (2, 2), "test": (1, 2)}, None,
        {"batch_size": 32, "snapshot_epochs": 3, "epochs": 7},
    ),
}  # fmt: skip


@pytest.mark.drawn
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in SMALL],
)
def test_small_and_constant_sets_train_draw_and_are_evaluated(
    config: Config, tmp_path, short_evaluation, capsys, name
):
    counts, grey, settings = SMALL[name]
    rng, number = np.random.default_rng(0), 0
    for split, (people, num_slices) in counts.items():
        for folder in (tmp_path / "small" / split / "AD", tmp_path / "small" / split / "NC"):
            folder.mkdir(parents=True)
            for _ in range(people):
                number += 1
                for i in range(num_slices):
                    values = (
                        rng.integers(0, 255, (16, 16)) if grey is None else np.full((16, 16), grey)
                    )
                    Image.fromarray(values.astype(np.uint8)).save(folder / f"{number}_{i}.png")
    config = replace(config, data_root=tmp_path / "small", fid_kimg=0.001, fid_images=100)
    config = replace(config, **settings)
    train(config)
    predict(prediction.Options(config.out, count=2))
    report = evaluate(Options((config.out,), num_fake=100, extractors=("encoder",)))
    assert (config.out / "grids" / f"epoch{config.epochs:04}.png").exists()
    assert (config.out / "predict" / "truncation.png").exists()
    json.loads(
        (config.out / "evaluation" / "evaluation.json").read_text(), parse_constant=pytest.fail
    )
    out = capsys.readouterr().out
    if name == "all black":
        assert "note: too few slices, or too similar ones, to measure" in out and "vary_z" in out
        assert "no embedding_images.png" not in out  # samples differ
        assert math.isnan(report["anatomy"][0]["distance_in_sd"])
    if name == "a slice of each class":
        assert "vary_class" in out
        assert all(math.isnan(row["recall"]) for row in report["distribution"] if "recall" in row)
    if name == "a batch of four epochs":
        log = read_log(config.out)
        assert [line["epoch"] for line in log] == [4, 7] and "fid" in log[-1]
        assert [p.stem for p in sorted((config.out / "grids").iterdir())] == [
            "epoch0004",
            "epoch0007",
        ]


def test_other_data_than_the_run_was_trained_on_is_said(
    trained: Config, tmp_path, short_evaluation, capsys
):
    other = write_folder(tmp_path / "other", {"train": 5, "test": 2})
    options = Options((trained.out,), num_fake=100, extractors=("encoder",), data_root=other)
    report = evaluate(replace(options, metrics=("memorisation",)))
    assert "not the slices of this run" in report["what"]["data"]
    assert "note: not the slices of this run" in capsys.readouterr().out
    report = evaluate(replace(options, metrics=("memorisation",), data_root=None))
    assert "not the slices" not in report["what"]["data"]


# The command


@pytest.fixture
def short_evaluation(short_encoder, monkeypatch) -> None:
    """Classifiers, halves, pairs and points so few that an evaluation takes a moment."""
    for place, name, value in (
        (evaluation, "NUM_SEEDS", 1), (classifiers, "STEPS", 3),
        (metrics, "NUM_HALVES", 2), (metrics, "NUM_DRAWS", 4), (metrics, "NUM_PAIRS", 8),
        (prediction, "MAX_POINTS", 40),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, value)


@pytest.mark.drawn
def test_a_report_holds_every_group_and_says_what_it_is_of(
    trained: Config, short_evaluation, capsys
):
    evaluate(Options((trained.out,), num_fake=100, extractors=("encoder",), device="cpu"))
    out = trained.out / "evaluation"
    report = json.loads((out / "evaluation.json").read_text())
    extra = {"what", "headline", "membership", "grey_levels_moved_by"}
    extra |= {"directions_that_features_fill", "variety", "recall_without_detail"}
    assert set(report) == extra | set(evaluation.MEASURES)
    what = report["what"]
    assert what["kimg"] == 0.016 and what["n_fake_AD"] == 50 and what["n_train"] == 16
    assert what["psi"] == 1 and what["seed"] == 0 and len(what["data"]) == len(what["sha256"]) == 64
    assert what["weights"].endswith("generator.safetensors") and "64 x 64" in what["encoder"]
    assert "bicubic" in what["resize"]
    rows = report["distribution"]
    assert [row["set"] for row in rows[:3]] == ["all", "AD", "NC"]
    assert all("below the 80 features" in row["note"] for row in rows)
    assert [row["set"] for row in report["headline"]] == ["samples", "training slices"]
    assert {"evaluation.png", "nearest_pixels.png"} < {path.name for path in out.iterdir()}
    text = (out / "evaluation.md").read_text()
    assert "no guarantee of privacy" in text and "| over memory |" in text
    assert "edges" not in text
    assert max(line.count("|") for line in text.splitlines() if line.startswith("|")) <= 8
    assert text.startswith("# Evaluation\n\n- It cannot be said how close")  # 4 test participants
    shown = capsys.readouterr().out
    assert re.search(r"about \d+ s on \d+ cores as busy as now: distribution \d+ s, div", shown)
    assert all(re.search(rf"^{name}: \d+ s$", shown, re.M) for name in evaluation.MEASURES)
    assert shown.rstrip().endswith(f"report: {out / 'evaluation.md'}")


def test_other_images_and_older_weights_have_reports_of_their_own(tmp_path):
    run = tmp_path / "run"
    places = [run, run / "generator.safetensors", run / "best.pt", run / "checkpoints" / "01.pt"]
    (run / "checkpoints").mkdir(parents=True)
    for place in places[1:]:
        place.touch()
    names = [
        runs.output_folder(place, "evaluation").relative_to(run).as_posix() for place in places
    ]
    assert names == ["evaluation", "evaluation", "evaluation_best", "evaluation_01"]
    for images in ("AD_NC", "synthetic_v1.5"):
        assert runs.output_folder(run, "evaluation", Path(images)) == run / f"evaluation_{images}"
    assert runs.output_folder(run, "evaluation", Path()).name == f"evaluation_{Path.cwd().name}"


def test_several_runs_have_an_interval_of_all_their_draws(
    trained: Config, tmp_path, short_evaluation, monkeypatch, capsys
):
    shutil.copytree(trained.out, tmp_path / "other")
    options = ["--num-fake", 100, "--extractors", "encoder", "--metrics", "distribution"]
    argv = ["evaluate.py", trained.out, tmp_path / "other", *options]
    monkeypatch.setattr("sys.argv", [str(part) for part in argv])
    evaluation.main()
    assert "# Over 2 runs" in capsys.readouterr().out
    assert (
        (trained.out.parent / "evaluation.md")
        .read_text()
        .startswith("# Over 2 runs\n\n| weights | kimg |")
    )
    assert not [*trained.out.glob("evaluation/parts"), *tmp_path.glob("*/evaluation/parts")]
    with monkeypatch.context() as patch:  # a stop after the first run
        left = iter([evaluate])
        patch.setattr(evaluation, "evaluate", lambda options: next(left)(options))
        with pytest.raises(StopIteration):
            evaluation.main()
    capsys.readouterr()
    evaluation.main()
    shown = capsys.readouterr().out
    assert shown.count("distribution: measured before") == 1 and "# Over 2 runs" in shown
    assert (tmp_path / "other" / "evaluation" / "evaluation.md").exists()
    heads = [
        {"set": "samples", "extractor": "encoder", "fd_test": fd, "fd_infinite": fd - 1.0,
         "over_memory": ratio, "over_memory_draws": {"values": [ratio, ratio + 1]}}
        for fd, ratio in ((3.0, 1.0), (5.0, 2.0))
    ]  # fmt: skip
    (row,) = report.over_runs([{"headline": [head]} for head in heads])
    assert row["fd_test"] == 4 and row["fd_test_range"] == [3, 5] and row["runs"] == 2
    assert row["over_memory_interval"] == [1, 3]
    del heads[0]["fd_infinite"]
    assert "fd_infinite" not in report.over_runs([{"headline": [head]} for head in heads])[0]
    apart = [{"what": {"data": d, "weights": d}, "headline": heads[:1]} for d in "ab"]
    assert report.text_of_runs(apart).endswith("measured with different real slices.\n")
    with monkeypatch.context() as patch:  # a wrong second run shows before the first takes its time
        patch.setattr("sys.argv", [*map(str, argv[:2]), str(tmp_path / "missing")])
        patch.setattr(evaluation, "evaluate", lambda _: pytest.fail("evaluated"))
        with pytest.raises(UserError, match="missing.* does not exist"):
            evaluation.main()
    with pytest.raises(UserError, match="style_mixing_prob = 0.9: is for samples"):
        Options(images=tmp_path, style_mixing_prob=0.9)
    with pytest.raises(UserError, match="out = x: each of 2 runs has its own folder"):
        Options((tmp_path, tmp_path), out=Path("x"))


@pytest.mark.slow
def test_impostors_come_out_in_the_order_known_before(config: Config, tmp_path, monkeypatch):
    """On demo brains: fresh subjects, copies of all training subjects, of half of them, a blur."""
    monkeypatch.setattr(metrics, "NUM_HALVES", 40)
    write = partial(write_demo, num_train=24, num_test=40)
    monkeypatch.setattr("dataset.write_demo", write)
    config = replace(config, data_root=None, img_resolution=32, epochs=1)
    train(config)
    options = Options((config.out,), num_fake=240, extractors=("encoder",))
    options = replace(options, metrics=("distribution", "memorisation"))
    rows = {row["set"]: row for row in compare(options)}
    distance = {name: row["fd_test, encoder"] for name, row in rows.items()}
    order = ["perfect", "copied", "dropped", "degraded", "samples"]
    assert sorted(distance, key=distance.get) == order
    low, high = rows["perfect"]["over_perfect_interval, encoder"]
    assert low < 1 < high and rows["perfect"]["over_memory, encoder"] < 1.2
    assert rows["dropped"]["over_perfect_interval, encoder"][0] > 1
    caught = {name: row["too_near, pixels"] for name, row in rows.items()}
    assert min(caught["copied"], caught["dropped"]) > 0.9 > 0.1 > caught["perfect"]
    table = (config.out / "evaluation" / "impostors.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in rows]
    assert len(json.loads((config.out / "evaluation" / "impostors.json").read_text())["sets"]) == 5


def test_impostors_share_no_test_participant_and_keep_the_class_mix(tmp_path):
    train_split, test, fakes = (make_slices(n=400, seed=s) for s in range(3))
    sets, references = impostors(
        fakes, References({"train": train_split, "test": test}, [], tmp_path, 0)
    )
    assert not set(sets["perfect"].participants) & set(references.splits["test"].participants)
    assert set(sets["copied"].participants) <= set(train_split.participants)
    assert len(set(sets["dropped"].participants)) <= 50
    assert (sets["degraded"].participants == sets["perfect"].participants).all()
    assert all(np.bincount(s.labels).tolist() == [100, 100] for s in sets.values())
    wanted = largest_mix(np.repeat([0, 1], [300, 100]), [np.array([0] * 30 + [1] * 5)], 100)
    assert wanted.sum() == 5 and wanted.mean() == pytest.approx(0.25, abs=0.02)


def test_samples_are_evaluated_with_the_styles_that_are_asked_for(trained: Config, tmp_path):
    G, _, _ = load_generator(trained.out)
    references = References(load_slices(trained)[0], [], tmp_path, 0)
    (plain, _), (mixed, origin) = (
        fakes_of(Options(num_fake=100, style_mixing_prob=share), G, references)
        for share in (0.0, 1.0)
    )
    assert (plain.images != mixed.images).any((1, 2)).all() and origin["style_mixing_prob"] == 1


def test_a_mirrored_copy_is_known_as_one(trained: Config, tmp_path):
    splits = load_slices(trained)[0]
    mirrored = np.arange(len(splits["train"].images)) % 2
    copies = splits["train"].images.copy()
    copies[mirrored == 1] = copies[mirrored == 1][:, :, ::-1]
    fakes = replace(splits["train"], images=copies)
    (row,) = evaluation.measure_memorisation(fakes, References(splits, [], tmp_path, 0))[
        "memorisation"
    ]
    pairs = {name: np.array(values) for name, values in row["pairs"].items()}
    assert (pairs["train"] == pairs["sample"]).all() and set(pairs["mirrored"]) == {0, 1}
    assert (pairs["mirrored"] == mirrored[pairs["sample"]]).all()
    low, high = row["excess_interval"]  # which the verdict reads
    assert 0 < low <= high <= 1


def test_a_ratio_is_that_of_the_distances_beside_it():
    sets = []
    for n, seed in ((40, 0), (400, 1), (60, 2)):
        rng = np.random.default_rng(seed)
        values = (rng.normal(size=(n, 1, 8)) + 0.3 * rng.normal(size=(n, 10, 8))).reshape(-1, 8)
        names = np.arange(n).repeat(10).astype(str)
        sets.append(metrics.Features(values, names, np.zeros(len(names), int)))
    sets[1] = sets[1]._replace(values=sets[1].values + 0.7)
    test, fake, train = sets
    row, memory = evaluation.compare_to_unseen(test, {"samples": fake, "training slices": train}, 0)
    low, high = row["over_memory_interval"]
    ratio = row["fd_test"] / memory["fd_test"]
    assert row["over_memory"] == pytest.approx(ratio) and low < ratio < high
    assert ratio > 1.2 * row["fd_test_of_halves"] / memory["fd_test_of_halves"]
    wide = [part._replace(values=np.tile(part.values, 40)) for part in sets]
    (row, _) = evaluation.compare_to_unseen(wide[0], {"samples": wide[1], "train": wide[2]}, 0)
    assert "fd_infinite" not in row  # halves have fewer slices than features


def test_a_ratio_to_nothing_has_no_upper_limit():
    whole = {"samples": 2.0, "training slices": 0.1}
    halves = {"samples": np.array([1.0, 5.0, 3.0, 7.0])}
    halves["training slices"] = np.array([1.0, 1.3, 0.7, 1.0])  # one ends below 0
    ratio, draws = metrics.ratio_of_distances("samples", "training slices", whole, halves)
    limits = metrics.interval(draws)
    assert ratio == pytest.approx(20) and limits == [0, math.inf] and not np.isnan(draws).any()
    assert cell(limits) == "0 or more"
    halves["samples"][:] = math.nan  # of too few people
    assert np.isnan(
        metrics.ratio_of_distances("samples", "training slices", whole, halves)[1]
    ).all()


@pytest.mark.parametrize("present", [[0, 2], [0]])
def test_grey_and_detail_score_classes_that_have_no_samples(present):
    x = torch.rand(20, 1, 16, 16)
    scores = classifiers.intensity_scores(x, np.resize(present, 20), x[:5], 3)
    assert scores.shape == (5, 3) and scores.sum(1) == pytest.approx(1)
    assert (scores[:, [i for i in range(3) if i not in present]] == 0).all()


def test_folders_of_images_take_the_place_of_samples(config: Config, tmp_path):
    splits, _ = load_slices(config)
    references, options = (
        References(splits, [], tmp_path, 0),
        Options(images=config.data_root / "test"),
    )
    fakes, origin = fakes_of(options, None, references)
    assert (fakes.images == splits["test"].images).all() and len(set(fakes.participants)) == 8
    assert (fakes.labels == splits["test"].labels).all() and origin["kimg"] == "unknown"
    file = next((config.data_root / "test").rglob("*.*"))
    Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    assert fakes_of(options, None, references)[1]["images_sha256"] != origin["images_sha256"]
    (config.data_root / "test" / "NC").rename(config.data_root / "test" / "CN")
    with pytest.raises(UserError, match="has classes .'AD', 'CN'., not .'AD', 'NC'."):
        fakes_of(options, None, references)


def test_a_checkpoint_is_reported_with_its_own_kimg(trained: Config):
    train(replace(trained, epochs=2))
    checkpoint = sorted((trained.out / "checkpoints").glob("*.pt"))[0]
    assert runs.identity_of(checkpoint)["kimg"] == 0.016
    assert runs.identity_of(trained.out)["kimg"] == 0.032


def test_a_missing_network_is_said_before_anything_is_computed(trained: Config, tmp_path):
    options = Options((trained.out,), num_fake=100, inception_weights=tmp_path / "none.pt")
    with pytest.raises(UserError, match="no such file"):
        evaluate(options)
    assert not (trained.out / "evaluation").exists()


def test_invalid_options_are_named():
    with pytest.raises(UserError, match="num_fake = 5: must be int, 100 or more"):
        Options(num_fake=5)
    with pytest.raises(UserError, match="seed = -1: must be int, 0 to"):
        Options(seed=-1)


def test_a_report_warns_where_few_samples_look_real():
    rows = {"labels": [{"measurement": "TRTR", "unit": "slices"}], "anatomy": [{"area": "brain"}]}
    rows |= {"diversity": [{"pairs": "real", "ms_ssim": 0.7}]}
    for precision, warnings in ((0.01, 2), (0.4, 0)):
        first = [{"set": "all", "precision": precision}, {"set": "AD", "precision": 0.0}]
        text = as_markdown({"distribution": first} | rows)
        assert text.count("**Precision is 0.01**") == warnings
    assert "**" not in as_markdown({"distribution": [{"set": "all", "fid_test": 3.0}]} | rows)


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_report(
    trained: Config, short_evaluation, monkeypatch, capsys
):
    options = Options((trained.out,), num_fake=100, extractors=("encoder",), device="cpu")
    out = trained.out / "evaluation"
    evaluate(options)
    whole = (out / "evaluation.json").read_text(), (out / "evaluation.md").read_text()
    shutil.rmtree(out / "parts")
    measure_anatomy, calls = evaluation.MEASURES["anatomy"], []

    def stop(*_args):
        raise KeyboardInterrupt

    monkeypatch.setitem(evaluation.MEASURES, "anatomy", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options)
    assert {path.stem for path in (out / "parts").iterdir()} == {
        "distribution",
        "diversity",
        "labels",
    }
    monkeypatch.setitem(evaluation.MEASURES, "anatomy", measure_anatomy)
    for name in ("distribution", "labels"):
        monkeypatch.setitem(evaluation.MEASURES, name, lambda *_: calls.append(1))
    capsys.readouterr()
    evaluate(options)
    assert "labels: measured before" in capsys.readouterr().out and calls == []
    assert ((out / "evaluation.json").read_text(), (out / "evaluation.md").read_text()) == whole
    with pytest.raises(TypeError):  # another seed is another evaluation: nothing is reused
        evaluate(replace(options, seed=1))
    assert calls == [1]


def test_a_report_of_other_settings_or_groups_is_kept(tmp_path, monkeypatch, capsys):
    out, what = tmp_path / "evaluation", {"kimg": 3.2, "seed": 0, "psi": float("nan")}
    what_is_read = {"what": what | {"psi": None}, "labels": []}
    out.mkdir()
    (out / "nearest_pixels.png").touch()
    (out / "parts").mkdir()
    report.keep_other_report(out, {"what": what})  # none is there
    for tables, folder in (
        ({"what": what, "labels": [1], "anatomy": []}, None),
        ({"what": what, "anatomy": []}, "evaluation_before"),
        ({"what": what | {"seed": 1}, "labels": []}, "evaluation_before1"),
    ):
        (out / "evaluation.json").write_text(json.dumps(what_is_read))
        report.keep_other_report(out, tables)
        said = capsys.readouterr().out
        assert (str(tmp_path / folder) in said) if folder else not said
        assert (out / "evaluation.json").exists() is (folder is None)
    assert [path.name for path in out.iterdir()] == ["parts"]
    kept = tmp_path / "evaluation_before"
    assert {path.name for path in kept.iterdir()} == {"evaluation.json", "nearest_pixels.png"}
    monkeypatch.chdir(out)
    (out / "evaluation.json").write_text("{}")
    report.keep_other_report(Path(), {"what": what})  # not a report: replaced
    (out / "evaluation.json").write_text("{")  # damaged: replaced
    report.keep_other_report(out, {"what": what})
    assert (out / "evaluation.json").exists() and not capsys.readouterr().out


# The verdict, the forecast and narrow tables

GOOD = {
    "what": {"participants_train": 160, "participants_test": 40, "data": "abc"},
    "headline": [
        {"set": "samples", "over_memory": 1.1, "over_memory_interval": [0.9, 1.3]},
        {"set": "training slices", "over_memory": math.nan},
    ],
    "distribution": [
        {"set": "all", "precision": 0.7, "recall": 0.02},  # among more slices than the next
        {"set": "real: test against train", "precision": 0.8, "recall": 0.9},
    ],
    "recall_without_detail": [
        {"set": "samples", "slices": 500, "recall": 0.72},
        {"set": "test slices", "slices": 500, "recall": 0.8},
    ],
    "labels": [
        {"measurement": "TSTR", "unit": "participants", "auc": 0.81},
        {"measurement": "TRTR", "unit": "participants", "auc": 0.83},
        {"measurement": "TSTR, intensity alone", "unit": "participants", "auc": 0.6},
        {"measurement": "TSTR - TRTR", "unit": "participants", "auc": -0.02,
         "interval_over_participants": [-0.1, 0.04]},
    ],
    "memorisation": [
        {"space": "pixels", "share_too_near": 0.012, "found_exact": 1.0, "found_noisy": 0.97,
         "interval_over_participants": [0.005, 0.02]},
        {"space": "encoder", "share_too_near": 0.008, "interval_over_participants": [0.0, 0.02]},
    ],
}  # fmt: skip


def sentences(**changes: object) -> list[str]:
    lines = verdict(GOOD | changes).splitlines()
    assert len(lines) == 5 and all(re.fullmatch(r"- [A-Z].*\.", line) for line in lines)
    assert not re.search(r"FID|FD|recall|precision|AUC|SSIM", "".join(lines))
    assert "diagnosis" in lines[4]
    return lines


def test_the_verdict_of_a_good_generator():
    close, varied, copies, classes, _ = sentences()
    assert "very close to real slices" in close and "1.1 times" in close and "0.9 to 1.3" in close
    assert "about that of real slices: 72%" in varied and "80% have one among as many" in varied
    assert copies.startswith("- No copies") and "1.2%" in copies and "97% or more" in copies
    assert "about as well as" in classes and "0.81 against 0.83" in classes
    assert "brightness" not in classes


def test_the_verdict_of_a_bad_generator():
    far = {"set": "samples", "over_memory": 9.0, "over_memory_interval": [7.0, 11.0]}
    few = [GOOD["recall_without_detail"][0] | {"recall": 0.01}, GOOD["recall_without_detail"][1]]
    close, varied, *_ = sentences(headline=[far], recall_without_detail=few)
    assert "far from real slices" in close and "far smaller than" in varied
    _, varied, *_ = sentences(distribution=[{"set": "all", "precision": 0.01}])
    assert "cannot be judged" in varied and "1% of them" in varied
    labels = [dict(row) for row in GOOD["labels"]]
    labels[0]["auc"], labels[3]["interval_over_participants"] = 0.55, [-0.4, -0.1]
    assert "worse than" in sentences(labels=labels)[3]
    assert "brightness and sharpness alone" in sentences(labels=labels)[3]
    labels[1]["auc"] = 0.52
    assert "even real slices hardly show" in sentences(labels=labels)[3]


@pytest.mark.parametrize(
    "share, limits, words",
    [
        (0.4, [0.35, 0.45], "Copies of training slices were found"),
        (0.06, [0.03, 0.09], "Look for copies among the nearest pairs"),
        (0.06, [0.005, 0.2], "No copies of training slices were found"),
    ],
)
def test_the_verdict_of_a_memory(share, limits, words):
    row = {"space": "encoder", "share_too_near": share, "interval_over_participants": limits}
    assert words in sentences(memorisation=[GOOD["memorisation"][0], row])[2]
    for limits, said in ([0.6, 0.8], "Copies of"), ([0.4, 0.7], "no nearer to the samples than"):
        near = {"space": "encoder", "near": "samples", "auc_calibrated": 0.6}
        near["auc_calibrated_interval"] = limits
        found = sentences(memorisation=[row], membership=[near])[2]
        assert said in found or "No copies" in words and words in found
    other = sentences(memorisation=[row], what={"data": "abc: not the slices of this run"})[2]
    assert "not the slices that the generator was trained on" in other
    by_chance = {"share_by_chance": 0.04, "share_too_near": 0.06}
    row |= by_chance | {"interval_over_participants": [0.03, 0.09]}
    assert "No copies" in (text := sentences(memorisation=[row])[2]) and "(4 % by chance" in text


@pytest.mark.parametrize("share, words", [(0.0, "cannot be ruled out"), (0.6, "No copies of")])
def test_an_audit_that_misses_planted_copies_proves_nothing(share, words):
    row = GOOD["memorisation"][0] | {"found_turned": share}
    assert words in sentences(memorisation=[row])[2]
    found = {name: 1.0 for name in GOOD["memorisation"][0] if name.startswith("found_")}
    row = GOOD["memorisation"][0] | found
    assert "of copies hidden as a test, all are found" in sentences(memorisation=[row])[2]


@pytest.mark.parametrize("people", [4, 19, 20])
def test_the_verdict_of_few_people(people):
    for split in ("train", "test"):
        lines = sentences(what={f"participants_{split}": people})
        assert [f"{people} people" in line for line in lines] == [people < 20] * 4 + [False]
    row = {"space": "pixels", "share_too_near": 0.9, "interval_over_participants": [0.8, 1.0]}
    lines = sentences(what={"participants_test": people}, memorisation=[row])
    assert "Copies of training slices were found" in lines[2]
    row |= {"share_too_near": 0.2, "interval_over_participants": [0.1, 0.3]}  # no membership
    found = sentences(what={"participants_test": people}, memorisation=[row])[2]
    assert ("It cannot be said whether they copy" in found) == (people < 20)


def test_no_verdict_says_more_than_was_measured():
    far = {"set": "samples", "over_memory": 1.0, "over_memory_interval": [math.nan, math.inf]}
    assert "cannot be told from fewer than 100" in sentences(headline=[far])[0]
    few = far | {"over_memory_interval": [0.9, 1.1], "slices": 99}
    assert "cannot be told from fewer than 100" in sentences(headline=[few])[0]
    assert "very close" in sentences(headline=[few | {"slices": 100}])[0]
    labels = [dict(row) for row in GOOD["labels"]]
    for limits, words in (
        ([-0.5, 0.02], "cannot be said whether their classes"), ([-0.1, 0.02], "about as well"),
        ([-0.5, -0.01], "worse than"), ([-0.5, 0.0], "too small to tell how far"),
    ):  # fmt: skip
        labels[3]["interval_over_participants"] = limits
        assert words in sentences(labels=labels)[3]
    for blurred, real, words in ((0.7, 0.8, "fine detail is not"), (0.6, 0.8, "far smaller"),
                                 (0.7, 0.0, "far smaller")):  # fmt: skip
        rows = [
            {"set": "test slices", "recall": 0.8, "recall_blurred": real, "slices": 500},
            {"set": "samples", "recall": 0.05, "recall_blurred": blurred, "slices": 500},
        ]
        assert words in sentences(recall_without_detail=rows)[1]
    scattered = [{"set": "all", "precision": 0.01}]
    rows[0]["recall_blurred"], rows[1]["recall_blurred"] = 0.8, 0.8
    assert "cannot be judged" in sentences(recall_without_detail=rows, distribution=scattered)[1]
    area = {"area": "ventricles", "fake_effect": 0.4, "fake_effect_interval": [0.3, 0.6]}
    for real, words in (([0.5, 0.9], "classes as in"), ([0.7, 0.9], "unlike in"),
                        ([-0.1, 0.5], "perhaps as in"), ([-0.1, 0.2], "unlike in")):  # fmt: skip
        anatomy = [area | {"real_effect_interval": real}]
        assert words in sentences(labels=[], anatomy=anatomy)[3]


def test_the_most_suspicious_space_is_told():
    pixels = {
        "space": "pixels",
        "share_too_near": 0.025,
        "interval_over_participants": [0.015, 0.04],
    }
    encoder = {"space": "encoder", "share_too_near": 0.03, "share_by_chance": 0.02,
               "interval_over_participants": [0.002, 0.08]}  # fmt: skip
    assert "Look for copies" in sentences(memorisation=[pixels, encoder])[2]
    assert "No copies" in sentences(memorisation=[pixels | {"excess_interval": [-0.01, 0.03]}])[2]
    near = {"near": "samples", "auc_calibrated": 0.9, "auc_calibrated_interval": [0.86, 0.96]}
    rows = [near | {"space": "encoder"}]
    traced = sentences(memorisation=[encoder], membership=rows)[2]
    assert "No copies" in traced and "a trace of memorisation" in traced
    many = encoder | {"share_too_near": 0.4, "interval_over_participants": [0.3, 0.5]}
    assert "were found" in sentences(memorisation=[many], membership=rows)[2]
    rows[0]["auc_cohorts_interval"] = [0.51, 0.7]  # of another hospital, say
    unlike = sentences(memorisation=[many], membership=rows)[2]
    assert "Look for copies" in unlike and "which alone can cause this" in unlike
    assert "trace" not in sentences(memorisation=[encoder], membership=rows)[2]
    what = GOOD["what"] | {"started_from": "adni"}
    close, _, copies, *_ = sentences(what=what)
    assert "though adni, where it began, may have" in close
    assert "the slices of adni, where it began, were not compared" in copies


def test_the_verdict_says_what_was_not_measured():
    names = ("headline", "recall_without_detail", "memorisation", "labels")
    for place, name in enumerate(names):
        lines = sentences(**{name: []})
        assert ["was not measured" in line for line in lines].index(True) == place
    nothing = sentences(**dict.fromkeys(names, []), what={"participants_test": 3})
    assert [line.endswith("was not measured.") for line in nothing] == [True] * 4 + [False]
    pairs = [{"pairs": k, "ms_ssim": v, "error": 0.001} for k, v in (("fake", 0.8), ("real", 0.7))]
    assert (
        "more alike than two real slices" in sentences(recall_without_detail=[], diversity=pairs)[1]
    )
    area = {"area": "ventricles", "real_effect": 0.7, "fake_effect": 0.1}
    area["real_effect_interval"] = [0.5, 0.9]
    assert "unlike in real slices" in sentences(labels=[], anatomy=[area])[3]
    other = sentences(what={"data": "abc: not the slices of this run"})[0]
    assert "very close to real slices of other data than the run's: their" in other
    for end in (math.inf, None):  # None: as JSON has it
        open_end = [GOOD["headline"][0] | {"over_memory_interval": [0.5, end]}]
        assert "(0.5 or more, by" in sentences(headline=open_end)[0]
    missing = [GOOD["headline"][0] | {"over_memory": math.nan}]
    assert "was not measured" in sentences(headline=missing)[0]


def test_a_wide_table_gets_a_column_for_each_row():
    rows = [{"set": f"s{i}"} | {f"m_{k}": float(k) for k in range(9)} for i in range(8)]
    text = as_narrow_tables(rows)
    tables = text.split("\n\n")
    assert [t.splitlines()[0] for t in tables] == [
        "| set | s0 | s1 | s2 | s3 |",
        "| set | s4 | s5 | s6 | s7 |",
    ]
    assert all("| m 8 | 8 | 8 | 8 | 8 |" in table for table in tables)
    assert as_narrow_tables(rows[:1]).count("\n") == 11  # nine measures, set, line
    narrow = [{"a": 1.0, "b": 2.0}] * 9
    assert as_narrow_tables(narrow) == as_table(narrow)


def test_the_forecast_counts_what_takes_long_and_what_is_in_the_cache(
    short_classifiers, tmp_path, monkeypatch
):
    timed = []
    monkeypatch.setattr(evaluation, "seconds_of", lambda work, *_: timed.append(work) or 1.0)
    splits = {"train": make_slices(), "test": make_slices(n=40, seed=1)}
    bright = features.Extractor("encoder", "mean", lambda x: x.float().mean((2, 3)))
    references = References(splits, [bright], tmp_path, 0)

    def times(fakes: Slices) -> dict[str, float]:
        return evaluation.forecast(fakes, references, ("distribution", "labels", "anatomy"))

    few, many = times(make_slices(seed=2)), times(make_slices(n=160, seed=3))
    assert few["labels"] == pytest.approx(60 / 5 * 4) and many["labels"] == pytest.approx(60)
    assert many["anatomy"] - few["anatomy"] == pytest.approx(80)
    assert many["distribution"] > few["distribution"]
    for name, part in splits.items():
        features.features_of(part.images, bright, tmp_path, name)
    saved = few["distribution"] - times(make_slices(seed=2))["distribution"]
    assert saved == pytest.approx((80 + 40) / (4 * utils.num_cores()))
    assert metrics.segment in timed and metrics.similarity not in timed  # diversity is not asked
