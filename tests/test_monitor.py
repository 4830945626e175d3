"""The rules that judge a run, its measurements, and its logs and plots."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fixed_generator, make_slices, tiny
from PIL import Image

import train as training
from config import Config
from dataset import load_slices
from evaluation import features, metrics, samples, variety
from modules import Discriminator
from train import train
from training import diagnosis, recorder
from training.diagnosis import PANELS, RULES, out_of_range, plot_curves, verdict
from training.logs import STATS, append_losses, read_history, read_log, read_losses, truncate_logs
from training.recorder import Measurements, grid_interval, grids_of
from training.runs import checkpoints, load_checkpoint, load_generator
from utils import random_rows

pytestmark = pytest.mark.usefixtures("short_encoder")

# Rules: each must find its own problem in a made-up log


def diagnose(run: Path, **settings) -> dict[str, str]:
    """The problems that the rules find in the logs in a folder, for a run with these settings."""
    return diagnosis.diagnose(read_history(run), Config(**settings))


HEALTHY = {
    "g_loss": 1.2, "d_loss": 1.0, "d_loss_spread": 0.2, "real_logit": 0.9, "fake_logit": -0.8,
    "real_sign": 0.5, "fake_sign": -0.5, "r1": 0.1, "r2": 0.1, "path_length": 0.5, "pl_mean": 0.5,
    "g_main_grad": 0.5, "d_main_grad": 0.4, "ada_p": 0.2, "fid": 0.4, "fid_real": 0.1, "kid": 0.1,
    "fid_test": 0.5, "fid_memory": 0.1,
    "overfitting": 0.1, "vary_z": 0.9, "vary_noise": 0.1, "vary_class": 0.3, "agreement": 0.7,
    "agreement_real": 0.7, "agreement_chance": 0.5, "leak_rotation": 1.1, "leak_flip": 0.1,
    "leak_border": 0.2, "spectrum": 0.8, "precision": 0.6, "spread": 0.9,
    "recall": 0.2, "recall_real": 0.8, "recall_blurred": 0.3, "recall_blurred_real": 0.8,
    "coverage": 0.6, "coverage_real": 0.9,
    "shapes_1_1": 0.9, "shapes_2_6": 0.9, "shapes_7_20": 0.8,
    "data_wait": 0.01, "img_per_s": 100.0,
}  # fmt: skip


def write_run(run: Path, epochs: int = 6, losses: float = 1.0, **changes) -> Path:
    """Logs of a healthy run but for the changes; a list gives each epoch its value."""
    run.mkdir(exist_ok=True)
    (run / "losses.csv").write_text(",".join(("nimg", *STATS)) + "\n")
    rows = np.full((epochs * 10, 1 + len(STATS)), losses)
    rows[:, 0] = np.arange(1, len(rows) + 1) * 100
    append_losses(run, rows)
    lines = []
    for i in range(epochs):
        line = {k: v[i] if isinstance(v, list) else v for k, v in (HEALTHY | changes).items()}
        lines.append(json.dumps(line | {"epoch": i + 1, "nimg": (i + 1) * 1000}) + "\n")
    (run / "log.jsonl").write_text("".join(lines))
    return run


ILL = {
    "numbers grow": {"real_logit": [1, 3, 9, 27, 81, 243]},
    "learning rate too high": {"d_loss_spread": 40.0},
    "D too weak": {"d_loss": 1.386, "real_sign": 0.02, "fake_sign": 0.01},
    "D overfits": {"overfitting": [0.1, 0.2, 0.4, 0.6, 0.7, 0.8]},
    "past its best": {"fid": [3.0, 1.0, 1.2, 1.5, 1.8, 2.1]},
    "p at its cap": {"ada_p": [0.2, 0.5, 0.7, 0.8, 0.8, 0.8]},
    "augmentation leaks": {"leak_rotation": 2.0},
    "z ignored": {"vary_z": 0.02},
    "texture comes from noise": {"vary_noise": 0.4},
    "odd spectrum": {"spectrum": 11.0},
    "few samples look real": {"precision": 0.05},
    "too little variety": {"spread": 0.3},
    "only blurred": {"recall": 0.01, "recall_blurred": 0.5},
    "few shapes": {"shapes_2_6": 0.2},
    "labels without signal": {"agreement": 0.52, "agreement_real": 0.52},
    "class ignored": {"agreement": 0.51},
    "caricature": {"agreement": 0.99, "agreement_real": 0.65},
    "loader too slow": {"data_wait": 0.4},
}


def test_nothing_is_wrong_with_a_healthy_run(tmp_path):
    assert diagnose(write_run(tmp_path)) == {}


@pytest.mark.parametrize("name", ILL)
def test_each_illness_is_named_with_what_to_try_and_no_other(tmp_path, name):
    found = diagnose(write_run(tmp_path, **ILL[name]))
    assert list(found) == [name]
    assert found[name].startswith(f"{name}: ") and "Try: " in found[name]


ADVICE = {  # for each rule: settings, and words that must be absent from its advice for them
    "D too weak": [({"augment": "none"}, "ada_target"), ({"ada_p": 0.3}, "ada_target")],
    "D overfits": [({"augment": "ada"}, "augment")],
    "past its best": [({"augment": "ada"}, "augment")],
    "p at its cap": [({"ada_p": 0.8}, "the data are few")],
    "augmentation leaks": [
        ({"augment": "none"}, "ada"), ({"augment": "none"}, "lower"),
        ({"augment": "ada"}, "dataset"), ({"augment": "dataset"}, "ada_noise"),
    ],
    "z ignored": [
        ({"conditional": False}, "label_ramp"), ({"label_ramp_kimg": 9.0}, "label_ramp"),
        ({"style_mixing_prob": 0.4}, "style_mixing"),
    ],
    "class ignored": [({"label_ramp_kimg": 0.0}, "label_ramp")],
    "caricature": [({"label_ramp_kimg": 9.0}, "label_ramp")],
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_advice_fits_the_settings_of_the_run(tmp_path, name):
    run = write_run(tmp_path, **ILL[name])
    for settings, absent in ADVICE[name]:
        advice = diagnose(run, **settings)[name].split("Try: ")[1]
        assert advice and absent not in advice, settings
    for rule in RULES.values():  # nothing is advised that is no setting
        for part in rule.advice:
            text = part if isinstance(part, str) else part[1]
            assert {w for w in re.findall(r"[a-z0-9]+_[a-z0-9_]+", text)} <= vars(Config()).keys()


def mutated(text: str, rng: np.random.Generator) -> bytes:
    """A log with one thing wrong: a line, a value, some bytes."""
    lines = text.encode().split(b"\n")
    i = rng.integers(len(lines))
    odd = [b"", b"[]", b"3", b"null", b'"text"', b"{}", b"\xff\xfe", b"nan", b"1e999", b"true",
           b'{"nimg": 5}', b'{"nimg": [], "epoch": 1}', b'{"nimg": 9e999, "epoch": 1}', b",,,",
           b'{"epoch": "1", "nimg": "100"}', b"9" * 400, b"[" * 5000]  # fmt: skip
    kind, word = rng.integers(5), odd[rng.integers(len(odd))]
    if kind == 0:
        lines[i] = word
    elif kind == 1:
        lines.insert(i, word)
    elif kind == 2:
        lines[i] = lines[i][: rng.integers(len(lines[i]) + 1)]
    elif kind == 3:  # another value in the place of a number
        numbers = list(re.finditer(rb"[0-9.]+", lines[i]))
        if numbers:
            found = numbers[rng.integers(len(numbers))]
            lines[i] = lines[i][: found.start()] + word + lines[i][found.end() :]
    else:
        at = rng.integers(len(lines[i]) + 1)
        lines[i] = lines[i][:at] + rng.bytes(3) + lines[i][at:]
    return b"\n".join(lines)


@pytest.mark.parametrize("name", ["log.jsonl", "losses.csv"])
def test_no_damage_to_a_log_ends_a_run_or_a_diagnosis(tmp_path, capsys, name):
    text = (write_run(tmp_path) / name).read_text()
    rng = np.random.default_rng(0)
    for _ in range(100):
        (tmp_path / name).write_bytes(mutated(text, rng))
        diagnose(tmp_path)
        truncate_logs(tmp_path, 4000)
        log, rows = read_log(tmp_path), read_losses(tmp_path)
        assert all(line["nimg"] <= 4000 for line in log) and (rows[:, 0] <= 4000).all()
        assert (np.diff(rows[:, 0]) > 0).all()
        assert (tmp_path / name).read_text().count("\n") == (
            len(log) if name == "log.jsonl" else 1 + len(rows)
        )
        write_run(tmp_path)
    assert f"{name}: 1 lines that cannot be read are left out" in capsys.readouterr().out


def test_what_is_whole_of_a_log_stays(tmp_path, capsys):
    lines = (write_run(tmp_path) / "log.jsonl").read_text().splitlines()
    odd = ["", "[]", "3", "null", lines[2], '{"epoch": 4}']  # one of them twice
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:3] + odd + lines[3:]) + "\n")
    losses = (tmp_path / "losses.csv").read_text()
    head, *rest = losses.splitlines()
    odd = [f"{value}," + ",".join("1" * len(STATS)) for value in ("nan", "inf", "", "-inf")]
    doubled = [head, *odd, *rest, *rest[-9:]]
    (tmp_path / "losses.csv").write_text("\n".join(doubled) + "\n")
    truncate_logs(tmp_path, 10**6)
    assert (tmp_path / "losses.csv").read_text() == losses
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines
    assert "log.jsonl: 6 lines that cannot be read are left out" in capsys.readouterr().out


@pytest.mark.drawn
def test_plots_need_no_column(tmp_path):
    write_run(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "nimg": 100}\n{"epoch": 2, "nimg": 200}\n')
    (tmp_path / "losses.csv").write_text("nimg\n")
    assert diagnose(tmp_path) == {}
    diagnosis.plot_losses(read_history(tmp_path), tmp_path / "losses.png")
    plot_curves(read_history(tmp_path), tmp_path / "curves.png", Config())
    assert (tmp_path / "losses.png").exists()


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    for value in (np.nan, np.inf):
        assert list(diagnose(write_run(tmp_path, losses=value))) == ["not finite"]
    assert set(ILL) | {"not finite"} == set(RULES)  # every rule has its test


def test_a_lit_background_is_a_leak_unless_it_is_still_going_down(tmp_path):
    assert list(diagnose(write_run(tmp_path, leak_border=9.0))) == ["augmentation leaks"]
    assert list(diagnose(write_run(tmp_path, leak_flip=-1.0))) == ["augmentation leaks"]
    assert diagnose(write_run(tmp_path, leak_border=[90.0, 50.0, 30.0, 15.0, 9.0, 6.0])) == {}


def test_no_d_can_tell_a_perfect_generator(tmp_path):
    found = diagnose(write_run(tmp_path, **ILL["D too weak"], fid=0.05, fid_real=0.04))
    assert found == {}


def test_a_lattice_and_a_blur_are_odd_unless_they_are_on_their_way_out(tmp_path):
    for value in (0.1, 11.0, 0.0):
        assert list(diagnose(write_run(tmp_path, spectrum=value))) == ["odd spectrum"]
    assert diagnose(write_run(tmp_path, spectrum=[90.0, 50.0, 30.0, 16.0, 9.0, 5.0])) == {}
    assert diagnose(write_run(tmp_path, spectrum=[0.0, 0.0, 0.1, 0.1, 0.2, 0.25])) == {}
    assert diagnose(write_run(tmp_path, epochs=4, spectrum=11.0)) == {}


def test_a_low_fid_of_noise_is_not_the_best(tmp_path):
    early = {"fid": [0.3, 0.2, 3.0, 2.5, 2.0, 1.5], "vary_noise": [2.0, 0.4, 0.1, 0.1, 0.1, 0.1]}
    assert diagnose(write_run(tmp_path, **early)) == {}


def test_noise_that_fades_needs_no_advice(tmp_path):
    fading = [0.92, 0.67, 0.6, 0.6, 0.53, 0.46]  # a default run
    assert "texture comes from noise" not in diagnose(write_run(tmp_path, vary_noise=fading))
    assert list(diagnose(write_run(tmp_path, vary_noise=fading[2:4] * 3))) == [
        "texture comes from noise"
    ]


def test_few_measurements_are_no_verdict(tmp_path):
    young = {"leak_rotation": 13.0, "vary_z": 0.01, "agreement": 0.5, "d_loss": 1.386}
    assert diagnose(write_run(tmp_path, epochs=2, real_sign=0.0, **young)) == {}


def test_a_run_without_measurements_is_judged_by_its_losses_alone(tmp_path):
    unmeasured = {name: None for name in HEALTHY if name not in ("d_loss", "g_loss")}
    assert diagnose(write_run(tmp_path, **unmeasured)) == {}
    assert diagnose(write_run(tmp_path, epochs=0)) == {}


@pytest.mark.parametrize(
    ("fid", "words"),
    [
        (0.11, "very close to real slices: their FID to unseen slices is 1.1 times that of"),
        (0.119, "times that of training slices: look for copies"),
        (0.25, "close to real slices: their FID to unseen slices is 2.5 times that of training"),
        (0.4, "some way from"), (1.5, "far from real slices: their FID to unseen slices is 15.0"),
        (2.6, "very far from real slices: their FID to unseen slices is 26.0 times"),
        (None, "not measured yet"),
    ],
)  # fmt: skip
def test_the_verdict_is_the_distance_to_real_slices(tmp_path, fid, words):
    assert words in verdict(read_history(write_run(tmp_path, fid_test=fid, fid=None)))


def test_a_run_of_an_earlier_version_is_told(tmp_path):
    history = read_history(write_run(tmp_path, fid_test=None, fid_memory=None))
    assert verdict(history).startswith("An earlier version measured this run")


def test_a_long_log_is_not_judged_at_every_epoch(config: Config, monkeypatch):
    judged = []
    monkeypatch.setattr(recorder, "diagnose", lambda h, _: judged.append(h) or {})
    config.out.mkdir(parents=True)
    run = recorder.Recorder(replace(config, epochs=5000), make_slices(), 0, torch.device("cpu"))
    for epoch, more in ((2001, {}), (2002, {}), (2003, {"fid": 1.0}), (5000, {})):
        run.lines = [{"epoch": i, "nimg": i} for i in range(1, epoch)]
        run.write_line({"epoch": epoch, "nimg": epoch} | more)
    assert len(judged) == 3


def test_the_verdict_is_of_the_newest_measurement(tmp_path):
    run = write_run(tmp_path, fid_test=[9.0, 8.0, 7.0, 3.0, 1.5, 0.4], test_participants=40)
    assert "unseen slices of 40 people is 4.0 times that of training slices." in verdict(
        read_history(run)
    )


def test_an_fid_that_does_not_count_is_no_verdict(tmp_path):
    noisy = write_run(tmp_path, vary_z=0.9, vary_noise=[0.1] * 5 + [0.2])
    assert "Too early for a verdict: z must move pixels 5 times" in verdict(read_history(noisy))
    clear = write_run(tmp_path, vary_z=0.9, vary_noise=[0.2] * 5 + [0.1])
    assert "times that of training slices" in verdict(read_history(clear))


def test_a_probability_above_the_cap_is_named_too(tmp_path):
    for p, named in ((0.7, False), (0.8, True), (0.9, True), (1.0, True)):
        found = diagnose(write_run(tmp_path, ada_p=p), augment="ada", ada_p=p)
        assert ("p at its cap" in found) == named


def test_few_test_participants_give_no_verdict(tmp_path):
    for name in ("labels without signal", "class ignored", "caricature"):
        few = {"test_participants": 19} | ILL[name]
        assert diagnose(write_run(tmp_path / name, **few)) == {}
    history = read_history(write_run(tmp_path, **few))
    assert verdict(history) == "The test set has 19 people; a verdict needs 20."


def test_what_lies_outside_of_its_green_range_is_named(tmp_path):
    assert out_of_range(read_history(write_run(tmp_path))) == []
    run = write_run(tmp_path, leak_border=[0, 0, 0, 6.0, 6.0, 7.5], vary_z=0.1, vary_noise=0.5)
    assert out_of_range(read_history(run)) == [
        "What moves a pixel, z: 0.1 (healthy: 0.3 to 1.2)",
        "Leak at the border, border, grey levels: 7.5 (healthy: -4 to 4)",
    ]


@pytest.mark.drawn
def test_curves_show_every_panel_and_need_none(tmp_path):
    plot_curves(
        read_history(write_run(tmp_path, **ILL["D overfits"])), tmp_path / "curves.png", Config()
    )
    assert Image.open(tmp_path / "curves.png").size[1] > 900
    names = {name for _, columns, _, _ in PANELS for name in columns}
    assert names <= set(HEALTHY)
    plot_curves(read_history(write_run(tmp_path, epochs=0)), tmp_path / "none.png", Config())
    assert not (tmp_path / "none.png").exists()


def test_losses_of_an_earlier_version_can_be_read_and_continued(tmp_path):
    (tmp_path / "losses.csv").write_text("nimg,g_loss,d_loss\n100,1.5,0.5\n200,,0.25\n300,1,1\n")
    truncate_logs(tmp_path, 200)
    rows = read_losses(tmp_path)
    assert rows[:, 0].tolist() == [100, 200]
    history = read_history(tmp_path)
    assert history.steps["d_loss"].tolist() == [0.5, 0.25]
    assert np.isnan(history.steps["g_loss"][1]) and np.isnan(history.steps["ada_p"]).all()
    (tmp_path / "losses.csv").write_text("nimg,g_loss,d_loss\n100,1.5,0.5\n")
    truncate_logs(tmp_path, 100)  # nothing is cut
    append_losses(tmp_path, np.full((1, 1 + len(STATS)), 200.0))
    assert read_losses(tmp_path)[:, 0].tolist() == [100, 200]


def test_a_measurement_that_is_no_longer_made_is_not_judged(tmp_path):
    for last, found in ((0.8, {"D overfits"}), (None, set())):
        run = write_run(tmp_path / "run", 7, overfitting=[0.6, 0.6, 0.6, 0.7, 0.7, 0.8, last])
        assert diagnose(run).keys() == found


# Measurements


@pytest.fixture(scope="module")
def measurements(tmp_path_factory) -> Measurements:
    """Measurements on 80 training and 80 test slices, whose classes differ in the middle."""
    splits = {"train": make_slices(), "test": make_slices(seed=1)}
    config = replace(tiny(tmp_path_factory.mktemp("measurements")), fid_images=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "fit_encoder", partial(features.fit_encoder, steps=250))
        return Measurements(splits, "made up", config, torch.device("cpu"))


@pytest.mark.parametrize("fewer", [80, 40])
def test_test_slices_are_measured_against_as_many_training_slices(config: Config, fewer):
    splits = {"train": make_slices(), "test": make_slices(seed=1).take(slice(fewer))}
    config.out.mkdir(parents=True)
    found = Measurements(splits, "made up", replace(config, fid_images=100), torch.device("cpu"))
    train = splits["train"].take(random_rows(80, fewer))
    pair = (variety.some_features(part, fewer, found.extractor) for part in (train, splits["test"]))
    near = metrics.manifold_metrics(*pair)
    [row] = variety.recall_without_detail(
        train, {"test": splits["test"]}, found.extractor, config.cache
    )
    expected = {name: near[name] for name in ("precision", "recall", "coverage")}
    assert found.near_real == pytest.approx(expected | {"recall_blurred": row["recall_blurred"]})
    assert row["recall"] == near["recall"] and 0 < near["coverage"] <= 1


def test_the_fid_of_test_slices_is_of_as_many_as_samples(config: Config):
    splits = {"train": make_slices(), "test": make_slices(n=160, seed=1)}
    config.out.mkdir(parents=True)
    found = Measurements(splits, "made up", replace(config, fid_images=100), torch.device("cpu"))
    some = splits["test"].take(random_rows(160, 100))
    values = features.compute_features(some.images, found.extractor, None)
    assert found.fid_real == pytest.approx(metrics.frechet_distance(values, found.real), rel=1e-3)


def test_what_samples_are_compared_with_has_as_many_slices(config: Config, monkeypatch):
    splits = {"train": make_slices(), "test": make_slices(n=40, seed=1)}
    config.out.mkdir(parents=True)
    found = Measurements(splits, "made up", replace(config, fid_images=100), torch.device("cpu"))
    monkeypatch.setattr(samples, "sample_fakes", lambda *_, **__: make_slices(n=100, seed=2))
    row = found.measure(fixed_generator(config), Discriminator(config, 2))
    fake, test, train = (
        features.compute_features(x.images, found.extractor, None)
        for x in (make_slices(n=100, seed=2), splits["test"], splits["train"])
    )
    of_80 = metrics.frechet_distance(fake[random_rows(100, 80)], test)
    assert row["fid_test"] == pytest.approx(of_80, rel=1e-3)
    assert row["fid_memory"] == pytest.approx(metrics.frechet_distance(train, test), rel=1e-3)
    whose = make_slices(n=100, seed=2)
    few = metrics.Features(fake, whose.participants, whose.labels).take(random_rows(100, 40))
    near = metrics.manifold_metrics(found.some_real, few)
    assert row["recall"] == near["recall"] and row["coverage"] == near["coverage"]


def test_samples_have_positions_of_slices_of_their_class(config: Config):
    positions = np.where(np.arange(80) % 2, 0.5, 0.25)
    slices = replace(make_slices(), labels=np.arange(80) % 2, positions=positions)
    labels = np.array([0] * 9 + [1] * 5)
    found = samples.positions_like(slices, labels, 0)
    assert found.tolist() == [0.25] * 9 + [0.5] * 5
    assert samples.positions_like(make_slices(), labels, 0) is None


@pytest.mark.parametrize("positions", [[0, 1], [0, 1 / 3, 2 / 3, 1], [0, 0.45, 0.6, 1]])
def test_what_moves_a_pixel_is_compared_with_slices_of_the_middle(config: Config, positions):
    near = np.abs(np.array(positions) - 0.5)
    middle = near <= max(0.1, near.min())
    train, count = make_slices(), 80 // len(positions)
    images = np.where(np.tile(middle, count)[:, None, None], train.images, 0)
    train = replace(train, images=images, positions=np.tile(positions, count))
    config = replace(config, fid_images=100, condition_position=True)
    config.out.mkdir(parents=True)
    found = Measurements({"train": train, "test": train}, "x", config, torch.device("cpu"))
    rows = [np.tile(middle, count) & (train.labels == i) for i in (0, 1)]
    assert found.deviation == pytest.approx(np.mean([images[r].std(0).mean() for r in rows]))


class Memory(torch.nn.Module):
    """A discriminator that gives a high logit to the images it has seen."""

    embed = torch.zeros(2, 1)

    def __init__(self, seen: np.ndarray) -> None:
        super().__init__()
        self.seen = torch.nn.Parameter(torch.from_numpy(seen.astype(np.float32)) / 127.5 - 1)

    def forward(self, img, c):
        near = (img - self.seen[None]).square().mean((2, 3)).min(1).values < 1e-3
        return near.float() * 4 - 2


def test_overfitting_is_how_far_test_slices_pass_for_fakes(measurements, config: Config):
    train, test = (measurements.subsets[name].images for name in ("train", "test"))
    G = fixed_generator(config)
    assert measurements.measure(G, Memory(train))["overfitting"] == pytest.approx(1)
    both = Memory(np.concatenate([train, test]))
    assert measurements.measure(G, both)["overfitting"] == pytest.approx(0, abs=0.01)


def test_agreement_is_high_for_right_labels_and_low_for_swapped_ones(measurements):
    real = make_slices(seed=2)
    assert measurements.agreement_real > 0.9
    assert measurements.agreement(real) > 0.9
    assert measurements.agreement(replace(real, labels=1 - real.labels)) < 0.1


def test_measuring_again_gives_the_same_and_moves_no_network(measurements, config: Config):
    G, D = fixed_generator(config, noise=0.1), Discriminator(config, 2)
    before = [p.clone() for p in (*G.parameters(), *D.parameters())]
    assert measurements.measure(G, D) == measurements.measure(G, D)
    after = (*G.parameters(), *D.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_run_measures_itself_and_keeps_its_best_checkpoint(config: Config, monkeypatch):
    measured = ((1.0, 0.25), (3.0, 0.1), (2.0, 0.1), (5.0, 0.1))  # the first is of noise
    values = iter([{"fid": fid, "vary_z": 0.9, "vary_noise": noise} for fid, noise in measured])
    monkeypatch.setattr(Measurements, "measure", lambda *_: next(values))
    train(replace(config, epochs=4, fid_kimg=0.001, fid_images=100))
    assert [line["fid"] for line in read_log(config.out)] == [1, 3, 2, 5]
    assert load_checkpoint(config.out / "best.pt")["cur_nimg"] == 48
    assert load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"] == 64
    assert load_generator(config.out / "best.pt")[2] == ["AD", "NC"]


@pytest.mark.drawn
def test_a_run_is_measured_at_its_interval_and_drawn(config: Config):
    train(replace(config, fid_kimg=0.032, fid_images=100, augment="ada"))
    first, second = read_log(config.out)
    assert "fid" not in first
    names = {"fid", "kid", "fid_real", "leak_rotation", "leak_flip", "leak_border", "spectrum",
             "vary_z", "vary_noise", "vary_class", "overfitting", "agreement",
             "agreement_real"}  # fmt: skip
    assert all(math.isfinite(second[name]) for name in names)
    near = {"recall", "recall_blurred", "coverage"}
    assert {"precision"} | near | {f"{name}_real" for name in near} < set(second)
    assert Image.open(config.out / "curves.png").size[0] > 1000


def test_a_run_measures_itself_by_the_network_that_is_asked_for(config: Config, monkeypatch):
    pixels = features.PIXELS._replace(name="dinov2")
    source, _ = features.PRETRAINED["dinov2"]
    monkeypatch.setitem(features.PRETRAINED, "dinov2", (source, lambda *_: pixels))
    monkeypatch.setattr(training, "find_weights", lambda *_: None)
    train(replace(config, epochs=1, fid_kimg=0.001, fid_images=100, fid_extractor="dinov2"))
    splits, _ = load_slices(config)
    values = (features.compute_features(splits[k].images, pixels, None) for k in ("test", "train"))
    real = metrics.frechet_distance(*values)
    assert read_log(config.out)[0]["fid_real"] == pytest.approx(real, rel=1e-3)
    assert "DINOv2" in (config.out / "README.md").read_text()


def test_images_decide_what_is_done_at_the_end_of_an_epoch(config: Config, monkeypatch):
    """16 images an epoch: 40 and 80 are passed in the third and fifth, the sixth is the last."""
    measured, saved = [], []
    monkeypatch.setattr(Measurements, "measure", lambda *_: measured.append(1) or {"kid": 0.0})
    monkeypatch.setattr(training, "save_run", lambda state: saved.append(state.cur_nimg))
    train(replace(config, epochs=6, fid_kimg=0.04, fid_images=100, checkpoint_kimg=0.04))
    log = read_log(config.out)
    assert [line["epoch"] for line in log if "kid" in line] == [3, 5, 6] and len(measured) == 3
    assert saved == [48, 80, 96, 96]  # the last one, not written here, is asked for at the end
    assert len(list((config.out / "grids").iterdir())) == 6


def test_what_more_training_may_cure_is_said_at_the_end_only(config: Config, monkeypatch, capsys):
    for name, rule in RULES.items():
        bad = name in ("few shapes", "loader too slow")
        monkeypatch.setitem(RULES, name, rule._replace(holds=lambda _, bad=bad: bad))
    train(replace(config, epochs=2))
    first, last = capsys.readouterr().out.split("\nwarning: loader too slow: ")
    assert "warning: few" not in first and last.count("warning: few shapes: ") == 1
    assert read_log(config.out)[0]["epoch"] == 1


def test_grids_of_a_long_run_become_fewer(config: Config):
    drawn = [e for e in range(1, 10001) if e % grid_interval(config, e) == 0]
    assert drawn[:100] == list(range(1, 101)) and drawn[100:102] == [110, 120]
    assert len(drawn) == 99 + 90 + 90 + 1


def test_grids_come_in_the_order_of_their_epochs(tmp_path: Path):
    (tmp_path / "grids").mkdir()
    names = [f"epoch{epoch:04d}.png" for epoch in (10000, 9000, 2)]
    for name in (*names, "epoch0003 copy.png"):
        (tmp_path / "grids" / name).touch()
    assert [path.name for path in grids_of(tmp_path)] == names[::-1]


def test_a_diagnosis_is_printed(config: Config, tmp_path, monkeypatch, capsys, command):
    train(replace(config, epochs=1))
    capsys.readouterr()
    assert command("--diagnose", config.out) == 0
    said = capsys.readouterr().out
    assert "No rule finds a problem." in said and "need 5 measurements, and there are" in said
    write_run(config.out)
    assert command("--diagnose", config.out) == 0
    said = capsys.readouterr().out
    assert "measurements, and there are" not in said
    assert command("--diagnose", config.out / "checkpoints") == 0  # which means its run
    assert capsys.readouterr().out == said
    assert command("--diagnose", tmp_path) == 2
    assert "is no run: it has no config.json" in capsys.readouterr().err
    assert command("--diagnose", config.out, "--epochs", "3") == 2
    assert "--diagnose takes one run folder" in capsys.readouterr().err


def test_both_kinds_of_runs_measure_themselves_in_one_cache(config: Config):
    """The encoder of a run without classes has other outputs."""
    config = replace(config, epochs=1, fid_kimg=0.001, fid_images=100)
    train(config)
    train(replace(config, conditional=False, out=config.out.with_name("plain")))
    assert "agreement" not in read_log(config.out.with_name("plain"))[0]
