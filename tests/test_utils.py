"""Logs, and the rules that read them: each on a made-up log of the illness it is named for."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils
from utils import (
    PANELS,
    RULES,
    STATS,
    append_losses,
    cut_logs,
    plot_curves,
    read_history,
    read_losses,
)


def diagnose(run: Path) -> dict[str, str]:
    """What the rules say of the logs in a folder."""
    return utils.diagnose(read_history(run))


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
