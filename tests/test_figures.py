"""Words in figures: none covers another, long and foreign names fit, every axis has a label."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_slices
from matplotlib.figure import Figure
from matplotlib.table import Table
from matplotlib.text import Text
from PIL import Image

import predict as prediction
import utils
from config import Config, UserError
from dataset import load_slices
from evaluation import report
from predict import (
    Options,
    differences,
    draw_fid,
    names_of_rows,
    plot_comparison,
    predict,
    write_grid,
)
from scans import checks
from train import train
from training import recorder, runs
from training.runs import load_generator
from utils import label, read_picture, save_grid

LONG = "łagodne_zaburzenia_poznawcze_o_nieznanej_przyczynie_i_przebi"  # 60 letters


@pytest.fixture
def figures(monkeypatch) -> dict[str, Figure]:
    """The figures that are written, by the name of their first file."""
    found = {}
    for place in (utils, report):
        monkeypatch.setattr(
            place, "save_figure", lambda f, *paths: found.update({paths[0].name: f})
        )
    return found


def words(figure: Figure) -> list[str]:
    """All of its texts; cells of tables are no children of theirs."""
    cells = [cell.get_text() for t in figure.findobj(Table) for cell in t.get_celld().values()]
    return [text.get_text() for text in figure.findobj(Text) + cells if text.get_text()]


def assert_apart(figure: Figure) -> None:
    """No axes, title or legend of a figure covers another, and all lie within it."""
    figure.draw_without_rendering()
    places = [ax.get_window_extent() for ax in figure.axes if ax.axison]
    places += [legend.get_window_extent() for legend in figure.legends]
    places += [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    places += [ax.xaxis.label.get_window_extent() for ax in figure.axes if ax.get_xlabel()]
    names = [
        name for ax in figure.axes for name in ax.get_xticklabels() if len(name.get_text()) > 9
    ]
    places += [name.get_window_extent() for name in names]
    for i, a in enumerate(places):
        assert all(not a.padded(-1).overlaps(b.padded(-1)) for b in places[:i])
        assert a.x0 >= 0 and a.x1 <= figure.bbox.x1 + 1 and a.y0 >= 0


def assert_labelled(figure: Figure) -> None:
    for ax in figure.axes:
        assert not ax.axison or (ax.get_xlabel() and ax.get_ylabel()), words(figure)


# Names


@pytest.mark.parametrize(
    ("text", "width", "lines", "expected"),
    [
        ("AD", 24, 3, "AD"),
        ("mild cognitive impairment", 10, 3, "mild\ncognitive\nimpairment"),
        ("x" * 9, 4, 3, "xxxx\nxxxx\nx"),
        ("a" * 10 + "b" * 10, 8, 1, "aaaa…bbb"),
        ("$1 and $2", 24, 3, r"\$1 and \$2"),
        ("健康", 24, 3, "\\u5065\\u5eb7"),
        ("łagodna контрольная", 24, 3, "łagodna контрольная"),
        ("a\x1b[1mb", 24, 3, "a\\x1b[1mb"),
        ("", 24, 3, ""),
    ],
)
def test_names_are_wrapped_shortened_and_coded(text, width, lines, expected):
    assert label(text, width, lines) == expected


def test_names_of_one_beginning_stay_different():
    a, b = (label(LONG * 3 + end) for end in "ab")
    assert a != b and len(a.split("\n")) <= 4 and max(map(len, a.split("\n"))) <= 24


# Grids


@pytest.mark.drawn
@pytest.mark.parametrize("rows", [["AD", "NC"], [LONG, "健康", "$a$"], [""]])
def test_a_grid_has_its_names_outside_and_its_pixels_unchanged(tmp_path: Path, rows):
    rng, path = np.random.default_rng(0), tmp_path / "grids" / "a.png"
    picture = rng.integers(0, 255, (96 * len(rows), 2 * 96)).astype(np.uint8)
    save_grid(picture, rows, ["1", "2"], f"epoch {LONG}", path)
    assert (read_picture(path) == picture).all()
    with Image.open(path) as image:
        assert image.mode == "L"
        left, top, right, bottom = map(int, image.info["picture"].split())
        assert (right, bottom) == image.size and top > 28
        whole = np.asarray(image)
    for i, name in enumerate(rows):  # each row has dark letters beside it, if it has a name
        beside = whole[top + 96 * i : top + 96 * (i + 1), :left]
        assert (beside.min() < 100) == bool(name)
        assert (beside[0] == 255).all() and (beside[:, 0] == 255).all()  # none is cut off
    for i in range(2):
        above = whole[:top, left + 96 * i : left + 96 * (i + 1)]
        assert above.min() < 100 and (above[0] == 255).all() and (above[-1] == 255).all()


@pytest.mark.drawn
def test_large_pictures_have_large_letters(tmp_path: Path):
    widths = []
    for side in (96, 512):
        save_grid(np.zeros((side, side), np.uint8), ["AD"], ["1"], "", tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            widths.append(image.width - side)
    assert widths[1] > 2 * widths[0]


def test_a_grid_without_names_is_read_too(tmp_path: Path):
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8)
    utils.save_grey(picture, tmp_path / "old.png")
    assert (read_picture(tmp_path / "old.png") == picture).all()


def test_rows_of_a_grid_name_their_seeds():
    assert names_of_rows([0, 1, 2, 3, 4], 3) == ["seeds 0 to 2", "seeds 3, 4"]
    assert names_of_rows([7, 3, 5, 9], 3) == ["seeds 7, 3, 5", "seed 9"]


def test_a_comparison_names_what_changes_training():
    a = Config(augment="ada", ada_p=0.3, epochs=3, fid_images=300, num_workers=2)
    b = Config(augment="ada", ada_target=0.5, epochs=4)
    names = {"ada_p", "ada_target"}
    assert set(differences([a, b])) == names
    assert set(differences([a, replace(b, cooldown=0.4)])) == names | {"cooldown", "epochs"}
    assert set(differences([replace(a, augment="none"), replace(b, augment="none")])) == set()


@pytest.mark.drawn
def test_a_grid_is_as_wide_as_its_images(monkeypatch, tmp_path: Path):
    tiled = []
    monkeypatch.setattr(utils, "save_grid", lambda picture, *_: tiled.append(picture))
    for count, blank in ((1, 0), (5, 3)):  # small images are enlarged to 96 pixels
        images = np.full((count, 16, 16), 7, np.uint8)
        write_grid(images, "AD", list(range(count)), [tmp_path / "g.png"])
        assert (tiled[-1] == 255).sum() == blank * 96**2 and (tiled[-1] == 7).sum() == count * 96**2


@pytest.mark.parametrize("by_position", [False, True])
def test_the_grid_of_a_run_names_its_rows_and_columns(config: Config, monkeypatch, by_position):
    asked = []
    monkeypatch.setattr(utils, "save_grid", lambda *args: asked.append(args[1:]))
    train(replace(config, epochs=1, condition_position=by_position))
    [(rows, columns, title, path)] = asked
    assert (rows, title) == (["AD", "NC"], "epoch 1") and path.name == "epoch0001.png"
    assert columns[-1] == ("position 1.00" if by_position else "8") and len(columns) == 8


@pytest.mark.drawn
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("names", [["AD", "NC"], [LONG, "NC", "健康な対照群"], ["a"]])
def test_the_progress_of_a_run_names_classes_and_columns(figures, tmp_path, names, by_position):
    for epoch in (1, 2, 30):
        path = tmp_path / "grids" / f"epoch{epoch:04}.png"
        picture = np.full((96 * len(names), 8 * 96), 40, np.uint8)
        utils.save_grid(picture, names, [str(i) for i in range(8)], "", path)
    recorder.plot_progress(tmp_path, tmp_path / "p.png", names, by_position)
    figure = figures["p.png"]
    assert_apart(figure)
    first, *others = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["epoch 1", "epoch 2", "epoch 30"]
    assert [t.get_text() for t in first.get_yticklabels()] == [label(n, 12, 2) for n in names]
    shown = ["0.00", "0.14"] if by_position else ["1", "2"]
    for ax in figure.axes:
        assert [t.get_text() for t in ax.get_xticklabels()][:2] == shown
        assert ax.get_xlabel().startswith("position" if by_position else "number of the latent")
        assert len(ax.get_xticks()) == 2 * len(names)
    assert not any(t.get_text() for ax in others for t in ax.get_yticklabels())


# Figures of predict.py


@pytest.mark.drawn
def test_classes_with_long_names_do_not_cover_an_embedding(figures, tmp_path: Path):
    rng = np.random.default_rng(0)
    names, labels = [LONG, "健康な対照群", "NC", "$a$ b"], np.arange(40) % 4
    fake = np.repeat([False, True], 20)
    x = rng.normal(size=(40, 5)).astype(np.float32)
    prediction.draw_embedding(x, labels, fake, names, "one line\nand another", [tmp_path / "e.png"])
    figure = figures["e.png"]
    assert_apart(figure)
    assert_labelled(figure)
    assert "NC (generated)" in words(figure) and len(figure.legends[0].get_texts()) == 8


@pytest.mark.drawn
def test_a_sweep_names_seeds_and_settings(figures, trained: Config, tmp_path: Path):
    G, _, _ = load_generator(trained.out)
    sweep = {"0.5": Options(truncation_psi=0.5), "1.0": Options()}
    prediction.draw_sweep(G, {0: LONG, 1: "NC"}, [4, 9], sweep, "psi", [tmp_path / "s.png"])
    figure = figures["s.png"]
    assert_apart(figure)
    assert_labelled(figure)
    assert {"4", "9", "0.5", "1.0", "psi", "seed", "NC"} <= set(words(figure))


def copy_of(run: Path, name: str, data: str | None = None, **settings: object) -> Path:
    """A run with the logs and grids of another, but other settings or data."""
    copy = shutil.copytree(run, run.with_name(name))
    saved = json.loads((copy / "config.json").read_text())
    saved |= {"settings": saved["settings"] | settings, "data": data or saved["data"]}
    (copy / "config.json").write_text(json.dumps(saved))
    return copy


@pytest.fixture
def four_runs(measured: Config) -> list[Path]:
    """Runs of other settings, without FID and on other data."""
    run = measured.out
    small = {"learning_rate": 0.001, "batch_size": 8, "r1_gamma": 2.0}
    runs = [run, copy_of(run, "a_name_of_some_forty_letters_for_a_run", **small)]
    runs += [copy_of(run, "unmeasured"), copy_of(run, "elsewhere", data="other")]
    log = json.loads((run / "log.jsonl").read_text())
    (runs[2] / "log.jsonl").write_text(json.dumps({k: v for k, v in log.items() if k != "fid"}))
    return runs


@pytest.mark.drawn
def test_runs_that_differ_in_three_settings_have_a_table(
    four_runs, figures, tmp_path: Path, capsys
):
    plot_comparison(four_runs, [tmp_path / "c.png"])
    with pytest.raises(UserError, match="is no run"):
        plot_comparison([tmp_path / "nowhere"], [tmp_path / "x.png"])
    figure = figures["c.png"]
    assert_apart(figure)
    found = words(figure)
    for word in ("learning_rate", "0.001", "batch_size", "8", "r1_gamma", "2.0", "elsewhere"):
        assert word in found, found
    out = capsys.readouterr().out
    assert f"{four_runs[2]}: no FID in the figure: it has measured none" in out
    assert (
        f"{four_runs[3]}: no FID in the figure: it has another data set than {four_runs[0]}" in out
    )
    assert f"{four_runs[0]}: no" not in out and f"{four_runs[1]}: no" not in out
    sizes = {ax.images[0].get_array().shape for ax in figure.axes if ax.images}
    assert len(sizes) == 1 and len([ax for ax in figure.axes if ax.images]) == 4


def test_grids_of_any_shape_are_drawn_at_equal_size(tmp_path: Path):
    for rows, columns in ((1, 8), (2, 8), (5, 8), (20, 8)):
        picture = np.full((96 * rows, 96 * columns), 7, np.uint8)
        utils.save_grey(picture, tmp_path / "g.png")
        shown = prediction.recorder.read_square(tmp_path / "g.png")
        assert shown.shape == (96 * rows, 2 * 96 * rows)
        assert (shown == 7).sum() == 96 * rows * min(96 * columns, 2 * 96 * rows)


def test_another_extractor_is_a_reason(measured: Config, capsys):
    run = measured.out
    others = {
        "extractor": copy_of(run, "other", fid_extractor="inception"),
        "resolution": copy_of(run, "larger", img_resolution=64),
        "number of samples": copy_of(run, "many", fid_images=2000),
        "encoder": copy_of(run, "elsewhere"),
    }
    (others["encoder"] / "encoder.safetensors").write_bytes(b"trained on another machine")
    draw_fid(utils.new_figure().subplots(), [run, *others.values()], [*"abcde"])
    out = capsys.readouterr().out
    for reason, other in others.items():
        assert f"{other}: no FID in the figure: it has another {reason} than {run}" in out


def test_the_lowest_fid_of_a_figure_is_that_of_training(measured: Config):
    line = {"epoch": 1, "nimg": 10, "fid": 30.0, "vary_z": 0.5, "vary_noise": 0.4}
    later = line | {"epoch": 2, "nimg": 20, "fid": 50.0, "vary_noise": 0.01}
    run = copy_of(measured.out, "two")
    (run / "log.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(later) + "\n")
    ax = utils.new_figure().subplots()
    draw_fid(ax, [run], ["two"])
    assert [line.get_label() for line in ax.lines] == ["two, lowest 50.00"]


# Figures of the other commands


@pytest.mark.drawn
def test_the_nearest_training_slices_are_named(
    figures, tmp_path: Path, config: Config, monkeypatch
):
    tiled = []
    monkeypatch.setattr(
        report, "tile", lambda x, columns: tiled.append(x) or utils.tile(x, columns)
    )
    train_slices = load_slices(config)[0]["train"]
    fakes = make_slices()
    pairs = {"sample": [3, 1], "train": [0, 5], "mirrored": [0, 1], "gap": [0.25, 0.5]}
    row = {"pairs": pairs, "space": "pixels", "threshold": 0.1}
    report.draw_nearest(row, fakes, train_slices, tmp_path / "n.png")
    found = words(figures["n.png"])
    assert "0.25\ntrain/AD/1_0.png" in found and "0.5, mirrored\ntrain/AD/3_1.png" in found
    assert (tiled[0][1] == train_slices.images[0]).all()
    assert (tiled[1][1] == train_slices.images[5][:, ::-1]).all()  # as it is near
    one = {name: values[:1] for name, values in pairs.items()}
    report.draw_nearest(row | {"pairs": one}, fakes, train_slices, tmp_path / "n.png")
    report.draw_nearest(row, fakes, make_slices(seed=7), tmp_path / "n.png")  # of no files
    assert "0.25\n7-s000" in words(figures["n.png"])
    assert {"generated", "training"} <= set(words(figures["n.png"]))


@pytest.mark.drawn
def test_training_slices_with_long_names_do_not_cover_anything(figures, tmp_path: Path):
    files = np.array([f"train/{LONG}/subject-with-a-long-name-{i:03}.png" for i in range(80)])
    slices, n = replace(make_slices(), files=files), np.arange(20)
    row = {
        "pairs": {"sample": n, "train": n, "mirrored": 0 * n, "gap": n / 7},
        "space": "encoder",
        "threshold": 0.1,
    }
    report.draw_nearest(row, slices, slices, tmp_path / "n.png")
    assert_apart(figures["n.png"])
    assert any(name.endswith("-019.png") for name in words(figures["n.png"]))


@pytest.mark.drawn
def test_figures_of_a_report_explain_memory_and_name_what_is_generated(figures, tmp_path: Path):
    interval = {"over_memory_interval": [1.5, 3.0], "over_perfect_interval": [1.5, 3.0]}
    head = {"extractor": "encoder", "set": "samples", "over_memory": 2.0} | interval
    gaps = {"edges": [0.0, 1.0, 2.0], "fake": [0.5, 0.5], "test": [1.0, 0.0]}
    memory = {"space": "pixels", "share_too_near": 0.0, "gaps": gaps, "threshold": 0.5}
    report.draw_report({"headline": [head], "memorisation": [memory]}, tmp_path / "r.png")
    found = words(figures["r.png"])
    assert "fake" not in found and "generated" in found
    assert "memory: a G that repeats the training slices" in "".join(found)
    assert "perfect:" not in "".join(found)  # there is none
    assert_labelled(figures["r.png"])
    head["over_perfect"] = 2.5
    report.draw_report({"headline": [head]}, tmp_path / "r.png")
    assert "perfect: a G that" in "".join(words(figures["r.png"]))


@pytest.mark.drawn
def test_odd_slices_of_a_contact_sheet_carry_their_files(figures, data_root, tmp_path: Path):
    Image.new("L", (24, 20), 255).save(data_root / "train" / "NC" / "77_0.png")
    (data_root / "test" / "NC").rename(data_root / "test" / LONG)
    (data_root / "train" / "NC").rename(data_root / "train" / LONG)
    folder = checks.read_folder(data_root, None, {})
    checks.draw_sheet(folder, tmp_path / "sheet.png")
    axes = figures["sheet.png"].axes
    bright = [ax.get_xlabel() for ax in axes if ax.get_title() == "bright"]
    assert bright[2] == "77_0.png" and all(name.endswith(".png") for name in bright)
    assert all(not ax.get_xlabel() for ax in axes if not ax.get_title())
    assert label(LONG, 16, 4) in [ax.get_ylabel() for ax in axes]


# What predict.py draws


def test_a_sweep_changes_one_option_and_keeps_the_others(trained: Config, monkeypatch):
    seen = []
    monkeypatch.setattr(prediction, "draw_sweep", lambda *args: seen.append(args[3]))
    options = Options(trained.out, figures=("truncation",), truncation_cutoff=1)
    predict(options)
    assert seen == [{f"{x}": replace(options, truncation_psi=x) for x in prediction.PSI_SWEEP}]


def test_only_the_figures_that_are_asked_for_are_drawn(trained: Config, monkeypatch, capsys):
    monkeypatch.setattr(runs, "real_slices", pytest.fail)
    out = predict(Options(trained.out, count=2, figures=("truncation",)))
    assert [p.name for p in out.iterdir()] == ["truncation.png"]
    assert "truncation: 0." in capsys.readouterr().out
    out = predict(Options(trained.out, count=2, figures=("images",), out=out / "a"))
    assert [p.name for p in out.iterdir()] == ["images"]
    out = predict(Options(trained.out, count=2, figures=("grid",), out=out / "b"))
    assert sorted(p.name for p in out.iterdir()) == ["grid_AD.png", "grid_NC.png"]
    assert "grid of NC: 0." in capsys.readouterr().out


def test_embeddings_come_last_and_say_that_they_take_long(trained: Config, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "MAX_POINTS", 40)
    predict(Options(trained.out, count=2, figures=("embedding", "grid", "truncation")))
    out = capsys.readouterr().out
    places = [out.index(f"{name}") for name in (
        "grid of AD: ", "grid of NC: ", "truncation: ", "embeddings take a while",
        "embedding_w: ", "embedding_images: ")]  # fmt: skip
    assert places == sorted(places)


@pytest.mark.drawn
def test_figures_are_written_as_pdf_too(trained: Config):
    out = predict(Options(trained.out, count=2, figures=("grid", "images", "truncation"),
                          format="pdf", device="cpu"))  # fmt: skip
    names = {p.name for p in out.iterdir()}
    both = {
        f"{name}.{end}" for name in ("grid_AD", "grid_NC", "truncation") for end in ("png", "pdf")
    }
    assert names == both | {"images"}
    for path in out.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF-") and b"/Font" in path.read_bytes()
    assert not list((out / "images").rglob("*.pdf"))


LIGHT = """
import sys
import predict
from pathlib import Path
figures = ("grid", "images", "truncation")
predict.predict(predict.Options(Path(sys.argv[1]), count=3, figures=figures))
print([m for m in ("umap", "numba", "sklearn", "scipy.signal", "torchvision") if m in sys.modules])
print(sum(__import__("os").times()[:2]))
"""


@pytest.mark.slow
def test_nothing_heavy_is_imported_without_an_embedding(trained: Config):
    done = subprocess.run([sys.executable, "-c", LIGHT, str(trained.out)], cwd=ROOT, text=True,
                          capture_output=True, check=True)  # fmt: skip
    *_, loaded, seconds = done.stdout.splitlines()
    assert loaded == "[]" and float(seconds) < 10
