"""What a run says of itself: the rules, what it measures, when, and what it keeps of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fixed_generator, make_slices, run_train
from PIL import Image

import metrics
import monitor
import train as training
from config import Config
from metrics import Fakes
from modules import Discriminator
from monitor import (
    PANELS,
    RULES,
    STATS,
    TrainingFigures,
    append_losses,
    cut_logs,
    grid_interval,
    plot_curves,
    read_history,
    read_log,
    read_losses,
)
from train import train
from utils import checkpoints, load_checkpoint, load_generator

# Rules, each on a made-up log of the illness it is named for


def diagnose(run: Path) -> dict[str, str]:
    """What the rules say of the logs in a folder."""
    return monitor.diagnose(read_history(run))


HEALTHY = {
    "g_loss": 1.2, "d_loss": 1.0, "d_loss_spread": 0.2, "real_logit": 0.9, "fake_logit": -0.8,
    "real_sign": 0.5, "fake_sign": -0.5, "r1": 0.1, "path_length": 0.5, "pl_mean": 0.5,
    "g_main_grad": 0.5, "d_main_grad": 0.4, "ada_p": 0.2, "fid": 0.4, "fid_floor": 0.1,
    "overfitting": 0.1, "vary_z": 0.9, "vary_noise": 0.1, "vary_class": 0.3, "agreement": 0.7,
    "agreement_real": 0.7, "agreement_chance": 0.5, "leak_rotation": 1.1, "leak_flip": 0.1,
    "leak_border": 0.2, "data_wait": 0.01, "img_per_s": 100.0,
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
    "z ignored": {"vary_z": 0.02, "vary_noise": 0.3},
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


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    for value in (np.nan, np.inf):
        assert list(diagnose(write_run(tmp_path, losses=value))) == ["not finite"]
    assert set(ILL) | {"not finite"} == set(RULES)  # every rule has its test


def test_a_lit_background_is_a_leak_unless_it_is_still_going_down(tmp_path):
    assert list(diagnose(write_run(tmp_path, leak_border=9.0))) == ["augmentation leaks"]
    assert list(diagnose(write_run(tmp_path, leak_flip=-1.0))) == ["augmentation leaks"]
    assert diagnose(write_run(tmp_path, leak_border=[90.0, 50.0, 30.0, 15.0, 9.0, 6.0])) == {}


def test_a_low_fid_of_noise_is_not_the_best(tmp_path):
    early = {"fid": [0.3, 0.2, 3.0, 2.5, 2.0, 1.5], "vary_noise": [2.0, 2.0, 0.1, 0.1, 0.1, 0.1]}
    assert diagnose(write_run(tmp_path, **early)) == {}


def test_few_measurements_are_no_verdict(tmp_path):
    young = {"leak_rotation": 13.0, "vary_z": 0.01, "agreement": 0.5, "d_loss": 1.386}
    assert diagnose(write_run(tmp_path, epochs=2, real_sign=0.0, **young)) == {}


def test_a_run_without_figures_is_judged_by_its_losses_alone(tmp_path):
    unmeasured = {name: None for name in HEALTHY if name not in ("d_loss", "g_loss")}
    assert diagnose(write_run(tmp_path, **unmeasured)) == {}
    assert diagnose(write_run(tmp_path, epochs=0)) == {}


def test_curves_show_every_panel_and_need_none(tmp_path):
    plot_curves(write_run(tmp_path, **ILL["D overfits"]), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[1] > 900
    names = {name for _, columns, _, _ in PANELS for name in columns}
    assert names <= set(HEALTHY)
    plot_curves(write_run(tmp_path, epochs=0), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_losses_of_an_earlier_version_can_be_read_and_continued(tmp_path):
    (tmp_path / "losses.csv").write_text("nimg,g_loss,d_loss\n100,1.5,0.5\n200,,0.25\n300,1,1\n")
    cut_logs(tmp_path, 200)
    rows = read_losses(tmp_path)
    assert rows[:, 0].tolist() == [100, 200]
    history = read_history(tmp_path)
    assert history.steps["d_loss"].tolist() == [0.5, 0.25]
    assert np.isnan(history.steps["g_loss"][1]) and np.isnan(history.steps["ada_p"]).all()


def test_the_readme_lists_every_rule():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for name in RULES if f"\n| {name} | " not in text] == []


# What a run measures of itself


@pytest.fixture
def figures(config: Config, monkeypatch) -> TrainingFigures:
    """Of 80 training and 80 test slices, whose classes differ in the middle."""
    fit = metrics.fit_encoder
    monkeypatch.setattr(metrics, "fit_encoder", lambda *args, **kw: fit(*args, **kw, steps=250))
    splits = {"train": make_slices(), "test": make_slices(seed=1)}
    config = replace(config, fid_images=100)
    return TrainingFigures(splits, "made up", config, torch.device("cpu"))


class Memory(torch.nn.Module):
    """D of an image: a high logit for those it has seen."""

    embed = torch.zeros(2, 1)

    def __init__(self, seen: np.ndarray) -> None:
        super().__init__()
        self.seen = torch.nn.Parameter(torch.from_numpy(seen.astype(np.float32)) / 127.5 - 1)

    def forward(self, img, c):
        near = (img - self.seen[None]).square().mean((2, 3)).min(1).values < 1e-3
        return near.float() * 4 - 2


def test_overfitting_is_how_far_test_slices_pass_for_fakes(figures, config: Config):
    train, test = (figures.samples[name].images for name in ("train", "test"))
    G = fixed_generator(config)
    assert figures.measure(G, Memory(train))["overfitting"] == pytest.approx(1)
    both = Memory(np.concatenate([train, test]))
    assert figures.measure(G, both)["overfitting"] == pytest.approx(0, abs=0.01)


def test_agreement_is_high_for_right_labels_and_low_for_swapped_ones(figures):
    real = make_slices(seed=2)
    assert figures.seen_real > 0.9
    assert figures.agreement(Fakes(real.images, real.labels)) > 0.9
    assert figures.agreement(Fakes(real.images, 1 - real.labels)) < 0.1


def test_figures_do_not_change_from_call_to_call_nor_move_the_networks(figures, config: Config):
    G, D = fixed_generator(config, noise=0.1), Discriminator(config, 2)
    before = [p.clone() for p in (*G.parameters(), *D.parameters())]
    assert figures.measure(G, D) == figures.measure(G, D)
    after = (*G.parameters(), *D.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_run_measures_itself_and_keeps_its_best_checkpoint(config: Config, monkeypatch):
    measured = ((1.0, 0.5), (3.0, 0.1), (2.0, 0.1), (5.0, 0.1))  # the first is of noise
    figures = iter([{"fid": fid, "vary_z": 0.4, "vary_noise": noise} for fid, noise in measured])
    monkeypatch.setattr(TrainingFigures, "measure", lambda *_: next(figures))
    train(replace(config, epochs=4, fid_kimg=0.001, fid_images=100))
    assert [line["fid"] for line in read_log(config.out)] == [1, 3, 2, 5]
    assert load_checkpoint(config.out / "best.pt")["cur_nimg"] == 48
    assert load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"] == 64
    assert load_generator(config.out / "best.pt")[2] == ["AD", "NC"]


def test_figures_are_measured_at_their_interval_and_drawn(config: Config):
    train(replace(config, fid_kimg=0.032, fid_images=100, augment="ada"))
    first, second = read_log(config.out)
    assert "fid" not in first
    names = {"fid", "kid", "fid_floor", "leak_rotation", "leak_flip", "leak_border", "vary_z",
             "vary_noise", "vary_class", "overfitting", "agreement", "agreement_real"}  # fmt: skip
    assert all(math.isfinite(second[name]) for name in names)
    assert Image.open(config.out / "curves.png").size[0] > 1000


def test_images_decide_what_is_done_at_the_end_of_an_epoch(config: Config, monkeypatch):
    """16 images an epoch: 40 and 80 are passed in the third and fifth, the sixth is the last."""
    measured, saved = [], []
    monkeypatch.setattr(TrainingFigures, "measure", lambda *_: measured.append(1) or {"kid": 0.0})
    monkeypatch.setattr(training, "save_run", lambda state: saved.append(state.cur_nimg))
    train(replace(config, epochs=6, fid_kimg=0.04, fid_images=100, checkpoint_kimg=0.04))
    log = read_log(config.out)
    assert [line["epoch"] for line in log if "kid" in line] == [3, 5, 6] and len(measured) == 3
    assert saved == [48, 80, 96, 96]  # the last one, not written here, is asked for at the end
    assert all(0 < line["upkeep"] < 1 for line in log[1:])
    assert len(list((config.out / "grids").iterdir())) == 6


def test_grids_of_a_long_run_become_fewer(config: Config):
    drawn = [e for e in range(1, 10001) if e % grid_interval(config, e) == 0]
    assert drawn[:100] == list(range(1, 101)) and drawn[100:102] == [110, 120]
    assert len(drawn) == 99 + 90 + 90 + 1


def test_a_diagnosis_is_printed(config: Config, tmp_path):
    train(replace(config, epochs=1))
    done = run_train("--diagnose", config.out)
    assert done.returncode == 0 and done.stdout.strip() == f"{config.out}: nothing looks wrong"
    failed = run_train("--diagnose", tmp_path)
    assert failed.returncode == 2 and "is no run: it has no config.json" in failed.stderr
    failed = run_train("--diagnose", config.out, "--epochs", "3")
    assert failed.returncode == 2 and "--diagnose takes one run folder" in failed.stderr


def test_both_kinds_of_runs_measure_themselves_in_one_cache(config: Config):
    """The encoder of a run without classes has other outputs."""
    config = replace(config, epochs=1, fid_kimg=0.001, fid_images=100)
    train(config)
    train(replace(config, conditional=False, out=config.out.with_name("plain")))
    assert "agreement" not in read_log(config.out.with_name("plain"))[0]
