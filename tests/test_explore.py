"""explore.py without its page: counterfactuals, projection, directions, movies, export, ONNX."""

import contextlib
import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image
from test_page import SMALL, make
from torch.nn import functional as F
from tqdm import tqdm

import explore
import prepare
import utils
from assets.demo_brains import write_twins
from config import Config, UserError
from dataset import Slices, load_slices, resized_scan
from evaluation import features, metrics
from evaluation.samples import images_of, latents, sample
from exploration import counterfactual as cf
from exploration import directions as dirs
from exploration import export as ex
from exploration import figures, movies
from exploration import model as models
from exploration import projection as pj
from exploration.model import Model
from participants.tables import read_manifest
from predict import Options as PredictOptions
from predict import sample_class
from training import runs

NAMES = ["AD", "MCI", "NC"]


def names_of(num_classes: int) -> list[str]:
    return {1: ["all"], 2: ["AD", "NC"], 3: NAMES}.get(num_classes, [f"c{i}" for i in range(10)])


def model_of(folder: Path, num_classes: int = 2, by: str = "label", **settings) -> Model:
    config = replace(SMALL, cache=folder / "cache", **settings)
    return Model(make(config, num_classes), config, names_of(num_classes), folder, folder, None, by)


def saved(folder: Path, num_classes: int = 2, names=None, data_root=None, **settings) -> Path:
    """A run folder with a generator of `make`; its data are not on this machine."""
    root = data_root or folder / "missing"
    config = replace(SMALL, data_root=root, out=folder, cache=folder / "cache", **settings)
    G = make(config, num_classes)
    data = load_slices(config)[1] if data_root else "data"
    runs.write_run_config(folder, config, names or names_of(num_classes), data)
    runs.save_generator(folder, G, 0)
    state = {"G_ema": G.state_dict(), "settings": runs.plain_settings(config), "cur_nimg": 1}
    (folder / "checkpoints").mkdir(exist_ok=True)
    runs.save_checkpoint(folder / "checkpoints" / "0000000001.pt", state)
    return folder


@pytest.fixture(autouse=True)
def less_work(monkeypatch, short_encoder):
    """Fewer latents, draws and steps than the product takes."""
    for room, name, value in (
        (dirs, "NUM_LATENTS", 300), (dirs, "NUM_EFFECTS", 4), (metrics, "NUM_DRAWS", 100),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, value)
    monkeypatch.setattr(models, "CLASSIFIER_STEPS", 5)


@pytest.fixture
def columns(monkeypatch) -> dict[str, dict[str, np.ndarray]]:
    """What figures of `draw_columns` would show, by the name of their file."""
    found = {}

    def keep(columns, rows, title, path):
        found[path.name] = columns | {"rows": rows, "title": title}

    monkeypatch.setattr(cf, "draw_columns", keep)
    monkeypatch.setattr(pj, "draw_columns", keep)
    return found


@pytest.fixture
def frames(monkeypatch) -> list[np.ndarray]:
    """The frames of movies that would be written."""
    found = []
    monkeypatch.setattr(movies, "write_movie", lambda images, *_: found.append(images) or 1.0)
    return found


def stem(path: Path) -> str:
    return path.stem


def pngs(folder: Path) -> dict[str, np.ndarray]:
    return {p.stem: np.asarray(Image.open(p)) for p in sorted(folder.glob("*/seed*.png"), key=stem)}


def everything(folder: Path) -> dict[str, bytes]:
    """Bytes of all files of an export but for its lock."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


# The same seed, the same image


KINDS = {  # settings, number of classes, what --checkpoint names
    "two classes": ({}, 2, "."),
    "three classes": ({}, 3, "generator.safetensors"),
    "one class": ({"conditional": False}, 1, "checkpoints/0000000001.pt"),
    "positions": ({"condition_position": True}, 3, "checkpoints/0000000001.pt"),
    "positions alone": ({"condition_position": True}, 1, "."),
    "no noise": ({"noise": False, "img_resolution": 32}, 2, "."),
    "one layer": ({"mapping_layers": 1}, 2, "generator.safetensors"),
    "eight layers": ({"mapping_layers": 8, "w_dim": 5}, 2, "."),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_the_image_of_predict(kind, tmp_path, columns, frames):
    settings, num, source = KINDS[kind]
    checkpoint = saved(tmp_path / "run", num, **settings) / source
    G, _, classes = runs.load_generator(checkpoint)
    position = 0.3 if G.by_position else None
    for place in {None, position}:
        options = PredictOptions(position=place)
        expected = [sample_class(G, label, [0, 7, 3], options) for label in range(num)]
        assert len({image.tobytes() for images in expected for image in images}) == 3 * num
        common = {"checkpoint": checkpoint, "seeds": (0, 7, 3), "position": place}

        movies.interpolate(movies.Options(**common, frames=3, label=classes[-1]))
        assert (frames[-1][::3] == expected[-1]).all() and len(frames[-1]) == 9
        movies.interpolate(movies.Options(**common, frames=2, space="w"))
        assert (frames[-1][::2] == expected[0]).all()

        out = tmp_path / f"data{place}"
        ex.export(ex.Options(**common, out=out, count=8))
        for seed, (name, image) in enumerate(pngs(out).items()):
            assert name == f"seed{seed:07d}"
            assert (image == sample_class(G, seed % num, [seed], options)[0]).all()
        if num > 1:
            cf.counterfactual(cf.Options(**common, count=2, reversals=0, by="label"))
            shown = columns["counterfactual.png"]
            assert (shown[classes[-1]] == expected[-1]).all()
            assert (shown[classes[0]] == expected[0]).all()
            assert list(shown)[3] == f"{classes[0]} - {classes[-1]}"
            difference = expected[0].astype(float) - expected[-1]
            assert (shown[list(shown)[3]] == difference).all()
            movies.interpolate(movies.Options(**common, between="classes", frames=2))
            assert (frames[-1][::2] == [images[0] for images in expected]).all()


def test_the_demo_generator_too(columns, frames, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "real_slices", lambda *_: None)
    G, _, classes = runs.load_generator(runs.DEMO_GENERATOR)
    expected = [sample_class(G, label, [5, 2], PredictOptions()) for label in (0, 1)]
    cf.counterfactual(cf.Options(seeds=(5, 2), count=2, reversals=0, by="label"))
    assert (columns["counterfactual.png"]["AD"] == expected[0]).all()
    movies.interpolate(movies.Options(seeds=(5, 2), frames=2))
    assert (frames[-1][::2] == expected[0]).all()
    assert Path("runs/demo_generator/explore/counterfactual.json").exists()


def test_the_class_moves_w_or_the_label_and_nothing_else(tmp_path):
    for num, by_position in ((2, False), (3, True), (1, False)):
        for by in ("label", "w"):
            m = model_of(tmp_path, num, by, condition_position=by_position)
            seeds = [0, 1, 5]
            a, b, z = m.c(0, seeds), m.c(num - 1, seeds), m.z(seeds)
            assert torch.equal(m.change(z, a, a), m.ws(seeds, a))
            assert torch.equal(m.ws(seeds, a)[1:2], m.ws(seeds[1:2], a[1:2]))
            moved = m.change(z, a, b)
            if num == 1:
                assert torch.equal(moved, m.ws(seeds, a))
            elif by == "label":
                assert torch.equal(moved, m.ws(seeds, b))
            else:
                step = (moved - m.ws(seeds, a)) - (b @ m.G.mapping.w_avg - a @ m.G.mapping.w_avg)[
                    :, None
                ]
                assert step.abs().max() < 1e-5 < (moved - m.ws(seeds, a)).abs().max()


# Counterfactuals


@pytest.mark.parametrize("count, chunk", [(7, 3), (2, 50), (6, 3), (4, 3)])
def test_means_and_intervals_are_those_of_all_latents_at_once(tmp_path, monkeypatch, count, chunk):
    monkeypatch.setattr(cf, "CHUNK", chunk)
    m, seeds = model_of(tmp_path, 3), list(range(count))
    found = cf.measure_changes(m, 2, 1, count, None)
    x, y = (sample_class(m.G, i, seeds, PredictOptions()).astype(float) for i in (2, 1))
    np.testing.assert_allclose(found.mean, (y - x).mean(0))
    half = 1.96 * (y - x).std(0, ddof=1) / np.sqrt(count)
    np.testing.assert_allclose(found.half_width, half, atol=1e-5)
    np.testing.assert_allclose(found.moved, np.abs(y - x).mean())
    assert found.attributes.shape == (5, count, 6) and np.isnan(found.scores).all()
    ends = [models.attributes(images.astype(np.uint8)) for images in (x, y)]
    np.testing.assert_allclose(found.attributes[[0, -1]], ends)
    row = cf.table_of(found, None)[2]
    change = (ends[1] - ends[0])[:, 2]
    np.testing.assert_allclose(row["change"], change.mean())
    margin = 1.96 * change.std(ddof=1) / np.sqrt(count)
    np.testing.assert_allclose(row["interval"], [change.mean() - margin, change.mean() + margin])
    others = np.abs(np.diff(x, axis=0)).mean()
    assert 0.5 * others < found.moved_by_z < 2 * others


def test_what_moves_with_the_latent_is_of_one_position(tmp_path):
    m = model_of(tmp_path, condition_position=True)
    found = cf.measure_changes(m, 1, 0, 6, None)
    c = m.c(1, [0]).expand(6, -1)
    same = images_of(m.G, m.change(m.z(list(range(6))), c, c)).astype(float)
    assert found.moved_by_z == pytest.approx(np.abs(np.diff(same, axis=0)).mean())


def test_a_scored_change_is_that_of_the_second_class(tmp_path):
    m = model_of(tmp_path)
    classifier = features.Encoder(2, 16).eval()
    found = cf.measure_changes(m, 1, 0, 3, classifier)
    for i, label in enumerate((1, 0)):
        images = sample_class(m.G, label, [0, 1, 2], PredictOptions())
        x = torch.from_numpy(images)[:, None].float() / 127.5 - 1
        np.testing.assert_allclose(found.scores[i], classifier(x).softmax(1)[:, 0].detach(), 1e-4)


def real_of(seed: int = 0, num: int = 3) -> models.Real:
    """Noise images of people with 1 to 3 slices each, whose brightness depends on the class."""
    rng, parts = np.random.default_rng(seed), []
    for people in (6, 4):
        names = np.repeat(
            [f"{people}-{i}" for i in range(people * num)], rng.integers(1, 4, people * num)
        )
        labels = np.array([int(n.split("-")[1]) % num for n in names])
        images = rng.integers(0, 100, (len(names), 16, 16)) + 40 * labels[:, None, None]
        parts.append(Slices(images.astype(np.uint8), labels, names, names_of(num), None, names))
    return models.Real(*parts, None, False)


def test_a_position_is_compared_with_real_slices_near_it():
    real = real_of()
    real = real._replace(**{
        name: replace(part, positions=np.resize([0.0, 0.45, 1.0, 0.6], len(part.labels)))
        for name, part in (("train", real.train), ("test", real.test))
    })  # fmt: skip
    assert cf.near_position(real, None) is real
    some = cf.near_position(real, 0.5)
    for part, whole in ((some.train, real.train), (some.test, real.test)):
        assert 0.375 <= part.positions.min() <= part.positions.max() <= 0.625
        assert len(part.labels) == (np.abs(whole.positions - 0.5) <= 0.125).sum()
    one = real._replace(test=real.test.take(np.arange(2)))
    with pytest.raises(UserError, match="position = 1.0: a class has no real slices there"):
        cf.near_position(one, 1.0)


@pytest.mark.parametrize("first, second", [(2, 0), (0, 1)])
def test_the_reference_of_real_slices_is_the_difference_of_people(first, second):
    real, means, maps = real_of(), [], []
    classifier = features.Encoder(3, 16).eval()
    found = cf.real_change(real, first, second, classifier)
    for label in (first, second):
        people = {}
        for s in (real.train, real.test):
            for image, own, name in zip(s.images, s.labels, s.participants, strict=True):
                if own == label:
                    people.setdefault(name, []).append(image)
        means.append([models.attributes(np.stack(v)).mean(0) for v in people.values()])
        maps.append(np.mean([np.mean(images, 0) for images in people.values()], 0))
    np.testing.assert_allclose(found.mean, maps[1] - maps[0])
    np.testing.assert_allclose(found.change, np.mean(means[1], 0) - np.mean(means[0], 0))
    np.testing.assert_allclose(found.attributes, [np.mean(m, 0) for m in means])
    assert (found.low <= found.change).all() and (found.change <= found.high).all()
    spread = np.sqrt(sum(np.var(m, 0) / len(m) for m in means))
    np.testing.assert_allclose(found.high - found.low, 3.92 * spread, rtol=0.2)
    test = [real.test.images[real.test.labels == label] for label in (first, second)]
    n = min(map(len, test))
    x = torch.from_numpy(np.concatenate([t[:n] for t in test]))[:, None].float() / 127.5 - 1
    scores = classifier(x).softmax(1)[:, second].detach().numpy().reshape(2, n)
    np.testing.assert_allclose(found.scores, scores, 1e-4)


def test_demo_subjects_are_drawn_as_both_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(cf, "NUM_TWINS", 4)
    m = model_of(tmp_path, img_resolution=32)
    write_twins(tmp_path / "twins", 4)
    images = {
        k: np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / "twins" / k).iterdir())])
        for k in ("AD", "NC")
    }
    classifier = features.Encoder(2, 32).eval()
    there, back = (cf.true_change(m, first, classifier) for first in (1, 0))
    full = images["AD"].astype(float).mean() - images["NC"].mean()
    assert abs(there.mean.mean() - full) < 0.3 and full != 0
    np.testing.assert_allclose(there.mean, -back.mean)
    np.testing.assert_allclose(there.change, -back.change)
    assert there.attributes[1, 0] > there.attributes[0, 0]  # ventricles of AD
    assert (there.low <= there.change).all() and (there.change <= there.high).all()


FOREIGN = [
    ("AD", "CN"),
    ("<b>x", "naïve-Kontrolle-日本" * 6),
    pytest.param(("a$b$", "a|b"), marks=pytest.mark.drawn),
]


@pytest.mark.parametrize("names", FOREIGN)
def test_foreign_classes_without_data(names, tmp_path, monkeypatch, capsys):
    fast = pj.Options(steps=10, starts=1)
    monkeypatch.setattr(pj, "Options", lambda: fast)
    run = saved(tmp_path / "run", 2, list(names))
    out = cf.counterfactual(cf.Options(run, count=3, reversals=1, by="w"))
    said = capsys.readouterr().out
    assert "no comparison with real slices" in said and "in the reference" not in said
    text = (out / "counterfactual.md").read_text("utf-8")
    assert text.startswith(f"# From {names[1]} to {names[0]}\n") and "no atrophy" in text
    assert len(re.findall("atrophy", text)) == len(re.findall("no atrophy", text))
    report = json.loads((out / "counterfactual.json").read_text(), parse_constant=pytest.fail)
    table = report["minimality: what changes"]
    assert [row["what"].split(",")[0] for row in table] == list(models.ATTRIBUTES)
    assert all(row["interval"][0] <= row["change"] <= row["interval"][1] for row in table)
    errors = {r["error of"]: r["grey levels"] for r in report["reversibility: there and back"]}
    assert len(errors) == 3 and errors["changed (for comparison)"] > 0
    assert {p.name for p in out.glob("*.png")} == {"counterfactual.png", "counterfactual_mean.png"}


def test_with_real_slices_there_is_a_reference(tmp_path):
    root = write_folder(tmp_path / "data", {"train": 3, "test": 2})
    run = saved(tmp_path / "run", data_root=root)
    out = cf.counterfactual(cf.Options(run, count=3, reversals=0, classes=("AD", "NC")))
    report = json.loads((out / "counterfactual.json").read_text(), parse_constant=pytest.fail)
    assert "participants, training and test" in report["summary"]
    splits, _ = load_slices(runs.load_generator(run)[1])
    images, labels = (
        np.concatenate([getattr(s, k) for s in splits.values()]) for k in ("images", "labels")
    )
    values = models.attributes(images)
    expected = values[labels == 1].mean(0) - values[labels == 0].mean(0)  # two slices each
    table = report["minimality: what changes"]
    np.testing.assert_allclose([row["reference"] for row in table], expected)
    assert all(row["its interval"][0] <= row["its interval"][1] for row in table)
    name = "effectiveness: does a classifier of real slices see the class?"
    assert [0 <= row["auc"] <= 1 for row in report[name]] == [True, True]


def test_black_images_have_no_wild_numbers(tmp_path, recwarn):
    run = saved(tmp_path / "run")
    G = runs.load_generator(run)[0]
    for name, p in G.named_parameters():
        if "torgb" in name:
            p.data.fill_(-5 if name.endswith("bias") else 0)
    runs.save_generator(run, G, 0)
    out = cf.counterfactual(cf.Options(run, count=3, reversals=0))
    text = (out / "counterfactual.json").read_text()
    numbers = [abs(float(n)) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)]
    assert max(numbers) < 1e3
    directions = dirs.explore_directions(dirs.Options(run, samples=100))
    assert (directions / "directions.json").exists()
    movies.interpolate(movies.Options(run, frames=2))
    pj.project_command(pj.Options(run, images=(save_image(tmp_path / "AD" / "x.png"),), steps=10))
    assert not [w for w in recwarn if "divide" in str(w.message)]


def test_ventricles_that_appear_are_not_a_billion_percent_larger():
    values = np.zeros((5, 4, 6))
    values[-1, :, 0] = 2.5
    values[-1, :, 2] = 9.0
    found = cf.Changes(values, np.zeros((16, 16)), np.zeros((16, 16)), 1.0, 2.0, np.zeros((2, 4)))
    text = cf.sentences(("NC", "AD"), found, None)
    assert "larger by 2.5 % of the image than as NC" in text and "0000" not in text
    assert "nan" not in text and np.isnan(cf.table_of(found, None)[0]["in deviations"])


# Projection


def save_image(path: Path, array: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:20, :20]
    picture = np.uint8(200 * (np.hypot(x - 10, y - 9) < 7)) if array is None else array
    Image.fromarray(picture).save(path, **options)
    return path


def test_noise_correlation_by_hand():
    torch.manual_seed(0)
    white = torch.randn(1, 1, 64, 64)
    smooth = F.avg_pool2d(F.pad(white, (2, 2, 2, 2), mode="circular"), 5, 1)
    smooth = (smooth - smooth.mean()) / smooth.std()
    by_hand = 0.0
    x = smooth[0, 0].numpy()
    while len(x) >= 8:
        for axis in (0, 1):
            by_hand += (x * np.roll(x, 1, axis)).mean() ** 2
        x = (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 2
    assert float(pj.noise_correlation(white)) < 0.1
    np.testing.assert_allclose(float(pj.noise_correlation(smooth)), by_hand, 1e-4)
    assert by_hand > 1
    both = torch.cat([white, smooth])
    total = float(pj.noise_correlation(white) + pj.noise_correlation(smooth))
    np.testing.assert_allclose(float(pj.noise_correlation(both)), total, 1e-5)
    assert float(pj.noise_correlation(torch.ones(1, 1, 4, 4))) == 0


@pytest.mark.parametrize("kind", ["two classes", "one class", "positions", "no noise"])
def test_a_place_with_the_generators_own_noise_is_its_own_image(kind, tmp_path):
    settings, num, _ = KINDS[kind]
    m = model_of(tmp_path, num, "w", **settings)
    seeds = [4, 9]
    c, z = m.c(num - 1, seeds), m.z(seeds)
    noise = {k: v.expand(2, 1, -1, -1) for k, v in m.G.synthesis.named_buffers()}
    at = pj.Projected(z, torch.zeros(2, m.G.mapping.num_ws, m.config.w_dim), noise)
    ws = m.G.mapping(z, c)
    assert torch.equal(pj.render(m.G, at, ws), m.G(z, c, noise_mode="const"))
    assert (pj.pictures(m, at, c) == images_of(m.G, m.ws(seeds, c))).all()
    changed = pj.pictures(m, at, c, m.c(0, seeds))
    assert (changed == images_of(m.G, m.change(z, c, m.c(0, seeds)))).all()
    moved = at._replace(offset=at.offset + 0.5)
    assert (pj.pictures(m, moved, c) == images_of(m.G, m.ws(seeds, c) + 0.5)).all()


def test_a_generated_image_projects_better_than_noise(tmp_path, monkeypatch):
    m, losses = model_of(tmp_path), []
    run = pj.Search.run

    def spy(self, at, steps, bar):
        found = run(self, at, steps, bar)
        losses.append(
            (
                float(self.losses(at._replace(offset=at.offset / self.spread)).mean()),
                float(found[1].mean()),
            )
        )
        return found

    monkeypatch.setattr(pj.Search, "run", spy)
    own = images_of(m.G, m.ws([100, 101], m.c(0, [100, 101])))
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16)).astype(np.uint8)
    images, c = np.concatenate([own, noise]), m.c(0, [0] * 4)
    options = pj.Options(steps=60, starts=2)
    at = pj.project(m, images, c, options, None)
    assert at.z.shape == (4, 8) and at.offset.shape == (4, m.G.mapping.num_ws, 8)
    errors = pj.error(pj.pictures(m, at, c), images)
    assert errors[:2].max() < 0.5 * errors[2:].min()
    assert len(losses) == 2 and all(after < 0.85 * before for before, after in losses)
    alone = pj.project(m, images[1:2], c[1:2], options, None)  # the same in any company
    assert abs(pj.error(pj.pictures(m, alone, c[:1]), images[1:2])[0] - errors[1]) < 0.5
    assert (alone.z - at.z[1]).abs().max() < 0.2 and (at.z[0] - at.z[1]).abs().max() > 0.5
    for noise in at.noise.values():
        assert (
            noise.mean((2, 3)).abs().max() < 1e-4
            and (noise.square().mean((2, 3)) - 1).abs().max() < 1e-3
        )


def test_a_search_starts_near_its_image_in_any_company(tmp_path, monkeypatch):
    """The start is the same in a group of any size, order and classes; the best start goes on."""
    m, calls = model_of(tmp_path, 3), []

    def run(self, at, *_):
        calls.append((self, at))
        return at, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])[: len(at.z)]

    monkeypatch.setattr(pj.Search, "run", run)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16)).astype(np.uint8)
    c, options = torch.eye(3)[[2, 0, 1]], pj.Options(steps=10, starts=2)
    pj.project(m, images, c, options, None)
    (_, first), (many, kept) = calls
    assert torch.equal(kept.z, first.z[[1, 2, 5]])
    assert torch.equal(many.wanted, torch.from_numpy(images)[:, None] / 127.5 - 1)
    for reverse in (False, True):
        rows = [2, 1] if reverse else [1]
        calls.clear()
        pj.project(m, images[rows], c[rows], options, None)
        (_, own), (one, _) = calls
        assert torch.equal(own.z[-2:], first.z[2:4])
        assert torch.allclose(many.spread[1], one.spread[-1])
        assert all(torch.equal(own.noise[k][-2:], first.noise[k][2:4]) for k in own.noise)
    assert not torch.allclose(many.spread[0], many.spread[1])


def test_starts_are_the_nearest_candidates(tmp_path):
    m = model_of(tmp_path, 3)
    wanted, c = torch.rand(2, 1, 16, 16) * 2 - 1, torch.eye(3)[[2, 0]]
    found = pj.nearest_latents(m.G, wanted, c, 3, torch.Generator().manual_seed(5))
    z = torch.randn(pj.CANDIDATES, 8, generator=torch.Generator().manual_seed(5))
    for i, (image, row) in enumerate(zip(wanted, c, strict=True)):
        images = m.G(z, row.expand(len(z), -1), noise_mode="none")
        gaps = (images - image).square().sum((1, 2, 3))
        assert torch.equal(found[3 * i : 3 * i + 3], z[gaps.argsort()[:3]])


def test_many_images_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(pj, "GROUP", 2)
    m = model_of(tmp_path)
    images = images_of(m.G, m.ws([0, 1, 2, 3, 4], m.c(1, [0] * 5)))
    c = m.c(1, [0] * 5)
    at = pj.project(m, images, c, pj.Options(steps=10, starts=1), None)
    found = pj.pictures(m, at, c)
    nearest = [int(pj.error(images, np.repeat(f[None], 5, 0)).argmin()) for f in found]
    assert nearest == [0, 1, 2, 3, 4]


def test_what_is_minimised(tmp_path):
    """Pixels at three scales, features, and the offset in deviations of w, which are not 1."""
    torch.manual_seed(0)
    m = model_of(tmp_path)
    encoder = features.Encoder(3, 16).eval()
    extractor = features.encoder_extractor(encoder, "x", "y")
    wanted = torch.rand(2, 1, 16, 16) * 2 - 1
    c, spread = m.c(0, [0, 1]), torch.rand(2, 1, 8) * 3
    noise = {k: v.expand(2, 1, -1, -1) for k, v in m.G.synthesis.named_buffers()}
    at = pj.Projected(m.z([0, 1]), torch.full((2, m.G.mapping.num_ws, 8), 0.5), noise)
    plain, full = (
        pj.Search(m.G, wanted, c, spread, w, e).losses(at) for w, e in ((0, None), (2, extractor))
    )
    moved = at._replace(offset=at.offset * spread)
    x = pj.render(m.G, moved, m.ws([0, 1], c))
    values = [encoder.features(i) for i in (x.clamp(-1, 1), wanted)]
    expected = plain + 0.1 * (values[0] - values[1]).square().mean(1) + 2 * 0.25
    assert torch.allclose(full, expected, atol=1e-4)
    np.testing.assert_allclose(plain, np.mean([
        (F.avg_pool2d(x, s) - F.avg_pool2d(wanted, s)).square().mean((1, 2, 3)) for s in (1, 2, 4)
    ], 0), 1e-5)  # fmt: skip
    search = pj.Search(m.G, wanted, c, spread, 0.02, None)
    place, losses = search.run(moved, 20, tqdm(disable=True))  # offsets of w, in and out
    assert torch.allclose(search.losses(place._replace(offset=place.offset / spread)), losses, 0.1)
    assert (losses < 0.9 * plain).all()
    place, losses = search.run(moved, 1, tqdm(disable=True))
    assert torch.allclose(losses, plain + 0.02 * 0.25, atol=1e-5)


def test_features_are_computed_where_the_images_are(monkeypatch):
    made, plain = [], torch.fft.fftfreq

    def frequencies(n, **options):
        made.append(options.get("device"))
        return plain(n)

    monkeypatch.setattr(torch.fft, "fftfreq", frequencies)
    features.band_amplitudes(torch.zeros(1, 1, 16, 16))
    assert made == [torch.device("cpu")]  # named, so that a GPU would be


FILES = {
    "a.png": {},
    "b.jpg": {},
    "c.png": {"array": np.uint16(np.arange(400).reshape(20, 20) * 60)},
    "d.png": {"array": np.full((20, 12, 3), 90, np.uint8)},
    "e.tif": {"array": np.float32(np.arange(240).reshape(10, 24))},
}


def test_files_of_any_kind(tmp_path):
    m = model_of(tmp_path)
    paths = [save_image(tmp_path / "NC" / name, **how) for name, how in FILES.items()]
    paths.append(save_image(tmp_path / "AD" / "a.png", np.full((8, 8), 77, np.uint8)))
    images, labels, names = pj.read_images(pj.Options(images=tuple(paths)), m)
    assert images.shape == (6, 16, 16) and labels == [1] * 5 + [0]
    assert names == [*FILES, "a.png"]
    assert images[2].max() > 240 and images[2].min() < 15 and (np.diff(images[2, 8]) >= 0).all()
    assert (images[3][:, [0, -1]] == 0).all() and images[3][8, 8] == 90  # padded, not stretched
    assert (images[5] == 77).all()
    _, labels, _ = pj.read_images(pj.Options(images=tuple(paths), label="AD"), m)
    assert labels == [0] * 6
    only = model_of(tmp_path, 1, conditional=False)
    assert pj.read_images(pj.Options(images=tuple(paths)), only)[1] == [0] * 6


def test_slices_of_many_levels_are_as_bright_as_in_training(tmp_path):
    for i, white in enumerate((200, 4000, 1000)):
        array = np.linspace(0, white, 256).reshape(16, 16).astype(np.uint16)
        path = save_image(tmp_path / "AD" / f"scan[1]_{i}.png", array)
    save_image(tmp_path / "AD" / "scan[1]b_3.png", array * 9)  # of another scan
    expected = resized_scan(sorted((tmp_path / "AD").glob("*_[012].png")), 16)[0]
    read = pj.read_images(pj.Options(images=(path,)), model_of(tmp_path))[0]
    assert (read[0] == expected[2].numpy()).all() and read.max() < 80
    (tmp_path / "AD" / "scan[1]_0.png").write_text("no image")
    alone = pj.read_images(pj.Options(images=(path,)), model_of(tmp_path))[0]
    assert alone.max() == 255


@pytest.mark.parametrize("bad", ["text", "empty", "missing", "folder", "two frames", "no class"])
def test_a_file_that_is_no_slice_is_named_before_anything_is_written(bad, tmp_path, monkeypatch):
    run, path = saved(tmp_path / "run"), tmp_path / "AD" / "bad.png"
    good = save_image(tmp_path / "AD" / "good.png")
    if bad == "text":
        path.write_text("no image")
    elif bad == "empty":
        path.touch()
    elif bad == "folder":
        path.mkdir()
    elif bad == "two frames":
        path = path.with_suffix(".tif")
        Image.new("L", (8, 8)).save(path, save_all=True, append_images=[Image.new("L", (8, 8))])
    elif bad == "no class":
        path = save_image(tmp_path / "OTHER" / "x.png")
    monkeypatch.setattr(models, "open_real", lambda *_: pytest.fail("real slices are read first"))
    before = everything(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        pj.project_command(pj.Options(run, images=(good, path)))
    assert "\n" not in str(error.value) and "object at" not in str(error.value)
    assert everything(tmp_path) == before


def test_projected_files_and_their_other_class(tmp_path, columns, monkeypatch):
    run = saved(tmp_path / "run", 3)
    files = [save_image(tmp_path / k / "same.png") for k in ("NC", "AD")]
    asked, plain = [], pj.pictures
    monkeypatch.setattr(pj, "pictures", lambda *what: asked.append(what[2:]) or plain(*what))
    for to, others in ((None, [0, 1]), ("NC", [2, 2])):
        options = pj.Options(run, images=tuple(files), steps=10, starts=1, target=to)
        asked.clear()
        out = pj.project_command(options)
        assert asked[1][0].argmax(1).tolist() == [2, 0]
        assert asked[1][1].argmax(1).tolist() == others
        shown = columns["project_images.png"]
        rows = [f"same.png, {k} to {NAMES[i]}" for k, i in zip(("NC", "AD"), others, strict=True)]
        assert [row.rpartition(",")[0] for row in shown["rows"]] == rows
        difference = shown["projected"].astype(float) - shown["slice"]
        assert (shown["projected - slice"] == difference).all()
        report = json.loads((out / "project.json").read_text())
        errors = np.sqrt(np.square(difference).mean((1, 2)))
        np.testing.assert_allclose(report["errors"][0]["median_error"], np.median(errors))
        assert [row["n"] for row in report["errors"]] == [2, 2]
    with pytest.raises(UserError, match="class = x: this generator knows AD, MCI, NC"):
        pj.project_command(replace(options, target="x"))


@pytest.mark.parametrize("kind", ["one class", "positions"])
def test_people_of_the_run_are_projected(kind, tmp_path, columns):
    settings, num, _ = KINDS[kind]
    num = 2 if num == 3 else num
    root = write_folder(tmp_path / "data", {"train": 3, "test": 2}, 3)
    run = saved(tmp_path / "run", num, data_root=root, **settings)
    out = pj.project_command(pj.Options(run, people=3, steps=10, starts=1))
    splits, _ = load_slices(runs.load_generator(run)[1])
    for name, file in (("train", "training"), ("test", "test")):
        shown = columns[f"project_{file}_people.png"]
        known = {image.tobytes() for image in splits[name].images}
        people = [row.split(",")[0] for row in shown["rows"]]
        assert {image.tobytes() for image in shown["slice"]} <= known
        assert len(set(people)) == 3 and set(people) <= set(splits[name].participants)
    text = (out / "project.md").read_text()
    assert "not judged on 3 training and 3 test people" in text
    assert len(columns["project_unseen_generated_images.png"]["slice"]) == 3
    with pytest.raises(UserError, match="images: none are named"):
        pj.project_command(pj.Options(saved(tmp_path / "other", num, **settings)))


def test_memory_is_named_only_where_it_is():
    rng = np.random.default_rng(0)
    train, test = rng.normal(10, 1, 20), rng.normal(10, 1, 15)
    said = {
        "alike": pj.memory({"training people": train, "test people": test}),
        "memorised": pj.memory({"training people": train - 5, "test people": test}),
        "the reverse": pj.memory({"training people": train, "test people": test - 5}),
        "a little": pj.memory({"training people": train - 1.5, "test people": test}),
        "few": pj.memory({"training people": train[:9] - 5, "test people": test}),
    }
    assert "a sign of memorisation" in said["memorised"] and "AUC 1.00" in said["memorised"]
    assert "do not project far better" in said["alike"] and "AUC 0.0" in said["the reverse"]
    assert "do not project far better" in said["the reverse"]
    assert "do not project far better" in said["a little"]
    assert said["few"].startswith("Memorisation: not judged on 9 training and 15 test people")


def test_a_hundred_rows_fit_into_a_figure(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(utils, "save_figure", lambda figure, path: shown.append(figure))
    images = np.zeros((100, 16, 16), np.uint8)
    parts = {"a": images, "b": images.astype(float)}
    figures.draw_columns(parts, [str(i) for i in range(100)], "title", tmp_path / "x.png")
    assert shown[0].get_size_inches()[1] * 110 < 2**13
    assert shown[0].axes[1].images[0].get_array().shape == (32 * 16, 16)
    assert "the first 32 of 100" in shown[0].get_suptitle()


def test_names_are_no_formulas_and_keep_what_is_subtracted(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(utils, "save_figure", lambda figure, path: shown.append(figure))
    long = dirs.Direction("class " + "x" * 50, torch.eye(3)[0])
    dirs.draw_sharing([dirs.Direction("class $a$", torch.ones(3)), long], tmp_path / "x.png")
    names = [text.get_text() for text in shown[0].axes[0].get_xticklabels()]
    assert names[0] == r"class \$a\$" and len(names[1]) == 24
    assert cf.minus(("NC", "AD")) == "AD - NC"
    assert cf.minus(("x" * 20, "y" * 20)) == "second - first class"
    changes = cf.Changes(np.zeros((5, 4, 6)), *np.zeros((2, 16, 16)), 1.0, 2.0, np.zeros((2, 4)))
    cf.draw_summary(("$a$", "b"), changes, None, tmp_path / "y.png")
    labels = [ax.get_ylabel() for ax in shown[1].findobj(lambda a: hasattr(a, "get_ylabel"))]
    assert r"b - \$a\$, grey levels" in labels
    assert "no atrophy" in shown[1].subfigs[0].get_suptitle()


# Directions


def test_directions_have_one_deviation_and_their_meaning(tmp_path):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(3000, 6, generator=rng) * torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.1]) + 2
    inner = w - w.mean(0)
    axes = dirs.principal_axes(inner, 9)
    assert [d.name for d in axes] == [f"axis {i + 1}" for i in range(6)]
    lengths = [float(d.vector.norm()) for d in axes]
    assert lengths == sorted(lengths, reverse=True)
    np.testing.assert_allclose(lengths, [3, 2, 1.5, 1, 0.5, 0.1], rtol=0.05)
    np.testing.assert_allclose(dirs.sharing(axes), np.eye(6), atol=1e-4)
    values = (4 * w[:, 1] - w[:, 0]).numpy().astype(float)
    found = dirs.along("value", w, values, inner)
    for d in [found, *axes]:
        unit = d.vector / d.vector.norm()
        assert abs(float((inner @ unit).std() - d.vector.norm())) < 1e-4
    for vector in torch.randn(50, 6, generator=rng):
        other = dirs.scaled("random", vector, inner).vector
        ours, theirs = (float(4 * v[1] - v[0]) for v in (found.vector, other))
        assert ours > abs(theirs) - 0.1
    towards = torch.tensor([-9.0, 16, 0, 0, 0, 0])  # covariance; a regression has -1, 4
    assert F.cosine_similarity(found.vector, towards, 0) > 0.999
    opposite = dirs.along("value", w, -values, inner)
    assert torch.allclose(opposite.vector, -found.vector, atol=1e-5)


def test_signs_do_not_depend_on_the_machine():
    inner = torch.randn(500, 5, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        dirs.principal_axes(inner, 5), dirs.principal_axes(-inner.flip(0), 5), strict=True
    ):
        assert torch.allclose(a.vector, b.vector, atol=1e-4)
        assert a.vector[a.vector.abs().argmax()] > 0


def test_style_factors_are_those_of_the_first_styles(tmp_path):
    m = model_of(tmp_path, w_dim=6)
    found = dirs.random_latents(m, 200)
    state = m.G.state_dict()
    names = [
        f"synthesis.blocks.{n}.affine.weight" for n in ("0.conv1", "1.conv0", "1.conv1", "2.conv0")
    ]
    A = torch.cat([state[n] for n in names]).numpy()
    right = np.linalg.svd(A)[2]
    factors = dirs.style_factors(m.G, found.inner, 4)
    assert len(factors) == 4
    for vector, factor in zip(right, factors, strict=False):
        unit = (factor.vector / factor.vector.norm()).numpy()
        np.testing.assert_allclose(abs(unit @ vector), 1, atol=1e-4)


@pytest.mark.parametrize("kind", ["two classes", "one class", "positions"])
def test_all_kinds_of_generators_have_directions(kind, tmp_path):
    settings, num, _ = KINDS[kind]
    run = saved(tmp_path / "run", num, **settings | {"w_dim": 4})
    out = dirs.explore_directions(dirs.Options(run, axes=20, samples=100))
    report = json.loads((out / "directions.json").read_text(), parse_constant=pytest.fail)
    rows = {r["direction"]: r for r in report["mean change for one deviation"]}
    assert sum(name.startswith("axis") for name in rows) == 4
    assert sum(name.startswith("style factor") for name in rows) == 4
    assert (f"class {names_of(num)[0]}" in rows) == (num > 1)
    assert ("position" in rows) == ("condition_position" in settings)
    assert not any("score" in key for row in rows.values() for key in row)
    vectors = utils.read_safetensors(out / "directions.safetensors")
    assert vectors.keys() == rows.keys() and all(v.isfinite().all() for v in vectors.values())
    if "position" in rows:  # one position for all: nothing to learn it from
        m = models.open_model(dirs.Options(run, position=0.5))
        found = dirs.find_directions(m, 1, 0, 100)
        assert "position" not in [d.name for d in found]
        assert all(d.vector.isfinite().all() for d in found)


@pytest.mark.slow
def test_supervised_directions_move_their_attribute(tmp_path):
    """In the demo generator: its ventricles, more than along random directions."""
    G, config, classes = runs.load_generator(runs.DEMO_GENERATOR)
    m = Model(G, config, classes, tmp_path, tmp_path)
    found = dirs.find_directions(m, 1, 1, 150)
    assert [d.name for d in found] == [*dirs.SUPERVISED, "class AD", "axis 1", "style factor 1"]
    changes = {d.name: shown(m, d) for d in found}
    inner = dirs.random_latents(m, 1000).inner
    rng = torch.Generator().manual_seed(3)
    others = [dirs.scaled("", v, inner) for v in torch.randn(4, config.w_dim, generator=rng)]
    for name, what in (("larger ventricles", "ventricles"), ("tilt to the right", "tilt")):
        assert changes[name][what] > 2 * max(abs(shown(m, other)[what]) for other in others)
    assert changes["class AD"]["ventricles"] > 0


def shown(m: Model, direction: dirs.Direction) -> dict[str, float]:
    """`effects` of 16 latents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dirs, "NUM_EFFECTS", 16)
        return dirs.effects(m, direction, None)


# Movies


def test_the_great_circle():
    torch.manual_seed(0)
    for size in (1, 2, 64):
        a, b = torch.randn(1, size), 3 * torch.randn(1, size)
        assert torch.equal(movies.slerp(a, b, 0.0), a) and torch.equal(movies.slerp(a, b, 1.0), b)
        if size > 1:
            for t in (0.25, 0.5, 0.9):
                point = movies.slerp(a, b, t)
                np.testing.assert_allclose(point.norm(), (1 - t) * a.norm() + t * b.norm(), 1e-4)
                whole, part = (F.cosine_similarity(a, x).acos() for x in (b, point))
                np.testing.assert_allclose(part, t * whole, 1e-2)
        for other in (a, -a):
            points = [movies.slerp(a, other, t) for t in (0.1, 0.5, 0.7)]
            assert all(p.isfinite().all() and p.norm() <= 1.01 * a.norm() for p in points)
        assert torch.equal(movies.slerp(a, a, 0.3), a)


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_a_movie_opens_repeats_and_lasts(form, tmp_path, capsys):
    run = saved(tmp_path / "run")
    options = movies.Options(run, frames=5, seconds=0.5, format=form, size=40, seeds=(3, 1, 2))
    out = movies.interpolate(options)
    with Image.open(out / f"interpolate_seeds.{form}") as movie:
        assert movie.n_frames == 15 and movie.size == (40, 40)
        assert movie.info["loop"] == 0
        times = []
        for i in range(15):
            movie.seek(i)
            movie.load()
            times.append(movie.info["duration"])
        assert times == [100] * 15
    assert "15 frames, 1.5 s." in capsys.readouterr().out
    assert (out / "interpolate_seeds.png").exists()


def test_a_gif_keeps_all_grey_levels_and_frames_last_a_fiftieth(tmp_path):
    images = np.arange(256).reshape(16, 16).astype(np.uint8)
    images = np.stack([images, images[::-1]])
    for frames, seconds, lasts in ((200, 1.5, 20), (24, 1.5, 60), (2, 600.0, 300_000)):
        options = movies.Options(frames=frames, seconds=seconds, size=16)
        length = movies.write_movie(images, options, tmp_path / "x.gif")
        assert length == 2 * lasts / 1000
        with Image.open(tmp_path / "x.gif") as movie:
            assert movie.info["duration"] == lasts
            for i in (0, 1):
                movie.seek(i)
                assert (np.asarray(movie.convert("L")) == images[i]).all()


@pytest.mark.parametrize("space", ["z", "w"])
@pytest.mark.parametrize("between", ["seeds", "classes", "positions"])
def test_a_loop_ends_where_it_begins(space, between, tmp_path):
    m = model_of(tmp_path, 3, condition_position=True)
    options = movies.Options(between=between, space=space, frames=12, seeds=(3, 1, 4))
    ws = movies.path_of(m, options)
    stops = {"seeds": 3, "classes": 3, "positions": 8}[between]
    assert ws.shape == (12 * stops, m.G.mapping.num_ws, 8)
    steps = (ws.roll(-1, 0) - ws).norm(dim=(1, 2))
    assert steps[-1] <= steps[:-1].max() and steps.max() < 6 * steps.mean()
    assert steps.min() > 0
    if between == "seeds":
        a, b, _ = movies.stops(m, options)
        middle = (m.position_of(3) + m.position_of(1)) / 2
        c = utils.conditions(np.array([0]), np.array([middle]), m.G.c_dim)
        on_circle = m.G.mapping(movies.slerp(a.z, b.z, 0.5), c)
        half = on_circle if space == "z" else ws[[0, 12]].mean(0, keepdim=True)
        assert torch.allclose(ws[6], half[0], atol=1e-5)
    if between == "positions":
        c = utils.conditions(np.zeros(3, int), np.array([0, 0.5, 1]), 15)
        expected = [m.G.mapping(m.z([3]), row[None]) for row in c]
        assert all(torch.equal(ws[i], e[0]) for i, e in zip((0, 24, 48), expected, strict=True))
        assert torch.allclose(ws[1:48], ws[49:].flip(0), atol=1e-4)  # and down again


def test_the_strip_passes_all_stops(tmp_path, monkeypatch):
    strips = []
    monkeypatch.setattr(utils, "save_grid", lambda *what: strips.append(what))
    run = saved(tmp_path / "run")
    for frames, columns in ((11, 12), (2, 4)):
        movies.interpolate(movies.Options(run, frames=frames, seeds=(0, 1)))
        picture, rows, names, title, _ = strips[-1]
        assert len(names) == columns and names[0] == "0" and names[-1] == "2"
        tiles = np.split(picture, columns, 1)
        assert (tiles[0] == tiles[-1]).all() and (tiles[0] != tiles[1]).any()


# Export


def test_an_export_is_a_data_set(tmp_path, capsys):
    run = saved(tmp_path / "run", 3, condition_position=True)
    out = ex.export(ex.Options(run, tmp_path / "out", count=11, truncation_psi=0.7))
    assert "images; copies were not looked for" in capsys.readouterr().out
    counts = [len(list((out / name).iterdir())) for name in NAMES]
    assert counts == [4, 4, 3]
    entries = read_manifest(out)
    assert (
        entries.keys() == pngs(out).keys() and len({e.participant for e in entries.values()}) == 11
    )
    rows = list(csv.DictReader((out / "manifest.csv").open()))
    G = runs.load_generator(run)[0]
    for row in rows:
        seed, label = int(row["seed"]), NAMES.index(row["class"])
        assert (out / row["class"] / f"{row['id']}.png").exists()
        assert float(row["position"]) == pytest.approx(
            np.random.default_rng(seed).random(), abs=1e-4
        )
        assert row["generator_sha256"] == utils.sha256_of(run / "generator.safetensors")
        expected = sample_class(G, label, [seed], PredictOptions(truncation_psi=0.7))[0]
        assert (pngs(out)[row["id"]] == expected).all()
    splits, _ = load_slices(
        replace(Config(), data_root=out, cache=tmp_path / "c", img_resolution=16)
    )
    assert splits["train"].classes == NAMES
    assert len(splits["train"].labels) + len(splits["test"].labels) == 11
    card = (out / "README.md").read_text("utf-8")
    assert "11 images of 16 x 16 pixels, 8-bit grey: 4 AD, 4 MCI, 3 NC." in card
    assert "Not measured" in card and "not looked" in card
    (run / "evaluation").mkdir()
    digest = json.loads((out / "export.json").read_text())["generator_sha256"]
    row = {"extractor": "encoder", "set": "all", "fid_test": 12.5, "recall": None}
    real = row | {"set": "real: test against train", "fid_test": 5.5}
    tables = {"distribution": [row, row | {"set": "AD", "fid_test": 99}, real]}
    near = {"space": "pixels", "share_too_near": 0.4, "interval_over_participants": [0.3, 0.5]}
    tables["memorisation"] = [near]
    for sha256, quoted in (("of other weights", False), (digest, True)):
        what = {"sha256": sha256, "psi": 1.0, "style_mixing_prob": 0.9}
        text = json.dumps({"what": what} | tables)
        (run / "evaluation" / "evaluation.json").write_text(text)
        ex.export(ex.Options(run, out, count=11, truncation_psi=0.7))
        card = (out / "README.md").read_text("utf-8")
        assert ("| encoder | all | 12.5 |" in card) is quoted and "99 |" not in card
        assert ("| encoder | real: test against train | 5.5 |" in card) is quoted
        assert ("40.0% of the generated slices are nearer" in card) is quoted
        assert ("Not measured" in card) is not quoted
        assert ("Samples with psi 1.0, style mixing 0.9:\n\n| extractor" in card) is quoted
    what, tables["distribution"] = what | {"psi": 0.7}, []
    tables["labels"] = [
        {"measurement": k, "unit": "participants", "auc": None} for k in ("TSTR", "TRTR")
    ]
    (run / "evaluation" / "evaluation.json").write_text(json.dumps({"what": what} | tables))
    ex.export(ex.Options(run, out, count=11, truncation_psi=0.7))  # nothing but memorisation
    assert "Samples with psi" not in (out / "README.md").read_text("utf-8")
    del near["interval_over_participants"]  # as an earlier version
    old = json.dumps({"what": what} | tables)
    for text, words in (("{", "cannot be read"), (old, "lacks 'interval_over_participants'")):
        (run / "evaluation" / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match=f"evaluation.json {words}"):
            ex.export(ex.Options(run, tmp_path / "new", count=3))
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("root, start, words", [
    (None, None, "the built-in demo brains, synthetic slices from the ICBM 152 template"),
    ("/data/AD_NC", None, "the slices in the folder “AD_NC”"),
    (".", None, f"the slices in the folder “{Path.cwd().name}”"),
    ("a", "x/adni", "the slices in the folder “a”, starting from weights of adni, whose training "
        "slices count too"),
    ("a", "/x/adni/checkpoints/0000000004.pt", "the slices in the folder “a”, starting from "
        "weights of adni, whose training slices count too"),
    ("a", "/y/demo_generator/generator.safetensors", "the slices in the folder “a”, starting from "
        "weights of demo_generator"),
    ("a", "assets/demo_generator", "the slices in the folder “a”, starting from weights of "
        "demo_generator"),
])  # fmt: skip
def test_all_training_data_are_named(root, start, words, tmp_path):
    config = Config(
        data_root=None if root is None else Path(root),
        init_from=None if start is None else Path(start),
    )
    assert runs.training_data(config) == words
    runs.write_run_config(tmp_path, config, ["AD", "NC"], "data")
    (tmp_path / "paths.json").unlink()  # as it is shared
    shared = runs.read_run_config(tmp_path)[0]
    assert runs.training_data(shared) == words


def test_a_start_from_the_same_slices_is_no_other_start(tmp_path):
    names = ("first", "second", "third")
    for i, name in enumerate(names):
        config = Config(init_from=tmp_path / names[i - 1] if i else Path("x/adni"))
        runs.write_run_config(tmp_path / name, config, ["AD", "NC"], "data")
    assert runs.other_start(config, "data") == "adni" and runs.other_start(config) == "second"
    runs.write_run_config(tmp_path / "first", Config(), ["AD", "NC"], "data")
    assert runs.other_start(config, "data") == "" and runs.other_start(config, "other") == "second"


def test_an_export_mixes_the_styles_of_a_share_of_the_seeds(tmp_path):
    run = saved(tmp_path / "run")
    plain, half, mixed, again = (
        pngs(ex.export(ex.Options(run, tmp_path / name, count=40, style_mixing_prob=share)))
        for name, share in (("plain", 0.0), ("half", 0.5), ("mixed", 1.0), ("again", 1.0))
    )
    unlike = {id for id in plain if (plain[id] != mixed[id]).any()}
    assert len(unlike) > 30
    changed = {id for id in plain if (plain[id] != half[id]).any()}
    assert 10 < len(changed) < 30 and all((half[id] == mixed[id]).all() for id in changed)
    assert all((mixed[id] == again[id]).all() for id in mixed)
    assert "40 images have styles of two latents" in (tmp_path / "mixed" / "README.md").read_text()
    rows = csv.DictReader((tmp_path / "half" / "manifest.csv").open())
    two = {row["id"] for row in rows if row["latents"] == "2"}
    assert changed <= two and len(two - changed) < 5  # one that begins at the last layer
    with pytest.raises(UserError, match="style_mixing_prob = 0.5, now 0.0"):
        ex.export(ex.Options(run, tmp_path / "half", count=41))


@pytest.mark.parametrize(
    "num, names", [(1, ["all"]), (10, [f"c{i}" for i in range(10)]), (2, ["naïf 日", "<b>"])]
)
def test_prepare_check_reads_it(num, names, tmp_path, monkeypatch, capsys):
    settings = {"conditional": False} if num == 1 else {}
    run = saved(tmp_path / "run", num, names, **settings)
    out = ex.export(ex.Options(run, tmp_path / "out", count=30))
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(names)
    monkeypatch.chdir(tmp_path)  # for the contact sheet
    argv = ["prepare.py", "check", str(out), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", argv)
    with contextlib.suppress(UserError):  # samples of random weights are alike
        prepare.main()
    assert "pixels: 16x16 (30)" in capsys.readouterr().out


def stopped(out: Path, at: int, how: str) -> None:
    """Cut an export as a kill would: after so many rows of the journal, with images or without."""
    lines = (out / ".journal.csv").read_text().splitlines(keepends=True)
    kept = "".join(lines[:at])
    torn = {"whole": "", "torn": lines[at][:3] if at < len(lines) else "", "images gone": ""}[how]
    (out / ".journal.csv").write_text(kept + torn)
    for name in ("manifest.csv", "README.md"):
        (out / name).unlink()
    if how == "images gone":
        for line in lines[max(at, 1) :]:
            seed, name = line.split(",")[:2]
            (out / name / f"seed{int(seed):07d}.png").unlink()
    pid = "99999999"
    (out / f"README.md.{pid}@{utils.machine()}.00000000.partial").write_text("half")


@pytest.mark.parametrize("how", ["whole", "torn", "images gone"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_killed_export_goes_on_to_the_same_bytes(at, how, tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "CHUNK", 3)
    run = saved(tmp_path / "run")
    options = ex.Options(run, tmp_path / "out", count=7)
    whole = everything(ex.export(options))
    stopped(options.out, at, how)
    assert everything(ex.export(options)) == whole
    if how == "torn":
        larger = everything(ex.export(replace(options, count=10)))
        assert larger == everything(ex.export(replace(options, out=tmp_path / "new", count=10)))


def test_a_killed_export_of_more_images_leaves_none_behind(tmp_path):
    run = saved(tmp_path / "run")
    options = ex.Options(run, tmp_path / "out", count=9)
    stopped(ex.export(options), 4, "whole")  # three rows; nine images
    smaller = everything(ex.export(replace(options, count=5)))
    assert smaller == everything(ex.export(replace(options, out=tmp_path / "new", count=5)))


def test_a_kill_before_the_first_line(tmp_path):
    run = saved(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    (tmp_path / "out" / f"export.json.99999999@{utils.machine()}.00000000.partial").touch()
    out = ex.export(ex.Options(run, tmp_path / "out", count=3))
    assert everything(out) == everything(ex.export(ex.Options(run, tmp_path / "new", count=3)))


def test_an_export_is_not_mixed_with_anything_else(tmp_path):
    run, out = saved(tmp_path / "run"), tmp_path / "out"
    options = ex.Options(run, out, count=3)
    ex.export(options)
    before = everything(out)
    other = saved(tmp_path / "other", mapping_layers=1)
    for changed in ({"truncation_psi": 0.5}, {"checkpoint": other}):
        with pytest.raises(UserError, match="an export with (truncation_psi|generator_sha256) = "):
            ex.export(replace(options, **changed))
    (out / "AD" / "seed0000000.png").rename(tmp_path / "moved.png")
    with pytest.raises(UserError, match="lacks seed0000000: delete the folder to start again"):
        ex.export(replace(options, count=4))
    (tmp_path / "moved.png").rename(out / "AD" / "seed0000000.png")
    emptied = ex.export(replace(options, out=tmp_path / "emptied"))
    for path in emptied.glob("[!.]*"):  # as rm -r out/* does
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert everything(ex.export(replace(options, out=emptied))) == before
    (out / ".journal.csv").write_text("seed,what\n0,1\n")
    for text in (
        "seed,what\n0,1\n",
        "seed,class,position,gap,kept\n0,AD\n",
        "seed,class,position,gap,kept\n4,AD,,,yes\n",
    ):
        (out / ".journal.csv").write_text(text)
        with pytest.raises(UserError, match="journal.csv cannot be read"):
            ex.export(options)
    (out / ".journal.csv").write_bytes(before[".journal.csv"])
    (out / "export.json").write_text("{")
    with pytest.raises(UserError, match="export.json cannot be read"):
        ex.export(options)
    (out / "export.json").write_bytes(before["export.json"])
    assert everything(out) == before
    foreign = save_image(tmp_path / "foreign" / "mine.png").parent
    with pytest.raises(UserError, match=f"{foreign} is not empty"):
        ex.export(ex.Options(run, foreign))
    assert [p.name for p in foreign.iterdir()] == ["mine.png"]
    with pytest.raises(UserError, match="out: name the folder"):
        ex.export(ex.Options(run))
    with pytest.raises(UserError, match="training slices are not here; set --data-root"):
        ex.export(ex.Options(run, tmp_path / "no", reject_copies=True))
    others = write_folder(tmp_path / "others", {"train": 2, "test": 2})
    with pytest.raises(UserError, match="reject_copies: not the slices of this run"):
        ex.export(ex.Options(run, tmp_path / "no", reject_copies=True, data_root=others))
    assert not (tmp_path / "no").exists()


def test_two_exports_at_once(tmp_path, monkeypatch):
    """The second writes nothing: not even a line that the first is about to end."""
    run = saved(tmp_path / "run")
    options, tried, plain = ex.Options(run, tmp_path / "out", count=4), [], ex.draw

    def draw(*what):
        (tmp_path / "out" / ".journal.csv").write_text("seed,cl")
        before = everything(tmp_path / "out")
        monkeypatch.setattr(ex, "draw", plain)
        with pytest.raises(UserError, match="another process is exporting there"):
            ex.export(options)
        tried.append(everything(tmp_path / "out") == before)
        (tmp_path / "out" / ".journal.csv").unlink()
        return plain(*what)

    monkeypatch.setattr(ex, "draw", draw)
    ex.export(options)
    assert tried == [True] and len(pngs(options.out)) == 4


@pytest.fixture
def with_data(tmp_path) -> Path:
    root = write_folder(tmp_path / "data", {"train": 6, "test": 4})
    return saved(tmp_path / "run", data_root=root)


def plant(run: Path, is_copy: Callable[[int], bool], monkeypatch) -> Slices:
    """`draw` returns moved training slices for some seeds, and else what is like none."""
    train = load_slices(runs.load_generator(run)[1])[0]["train"]

    def draw(model, seeds, options):
        assert len(seeds) <= ex.CHUNK  # what memory is for
        other = [np.random.default_rng(s).integers(0, 256, (16, 16)) for s in seeds]
        rows = [train.images[s % len(train.images)] for s in seeds]
        copies = [
            np.roll(row, 1, 1) if s % 2 else row[:, ::-1]
            for s, row in zip(seeds, rows, strict=True)
        ]
        chosen = np.array([is_copy(seed) for seed in seeds])
        images = np.where(chosen[:, None, None], np.stack(copies), np.stack(other))
        return images.astype(np.uint8), np.array(seeds) % 2

    monkeypatch.setattr(ex, "draw", draw)
    return train


def test_planted_copies_are_left_out_and_counted(with_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ex, "CHUNK", 4)
    plant(with_data, lambda seed: seed % 3 == 1 or 12 <= seed < 20, monkeypatch)
    options = ex.Options(with_data, tmp_path / "out", count=10, reject_copies=True)
    out = ex.export(options)
    expected = [s for s in range(40) if not (s % 3 == 1 or 12 <= s < 20)][:10]
    assert list(pngs(out)) == [f"seed{s:07d}" for s in expected]
    left_out = expected[-1] + 1 - 10
    assert f"10 images; {left_out} left out as copies" in capsys.readouterr().out
    assert f"- {left_out} samples nearer to a training slice" in (out / "README.md").read_text()
    journal = list(csv.DictReader((out / ".journal.csv").open()))
    assert [int(row["seed"]) for row in journal] == list(range(expected[-1] + 1))
    assert read_manifest(out).keys() == pngs(out).keys()
    smaller = ex.export(replace(options, out=tmp_path / "small", count=7))
    assert everything(ex.export(replace(options, out=smaller))) == everything(out)
    with pytest.raises(UserError, match=r"reject_copies = [\d.]+, now None"):
        ex.export(replace(options, reject_copies=False))


def test_an_export_that_grows_has_no_card_until_it_is_whole(tmp_path, monkeypatch):
    options = ex.Options(saved(tmp_path / "run"), tmp_path / "out", count=3)
    out = ex.export(options)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ex, "draw", lambda *_: 1 / 0)
        ex.export(replace(options, count=5))
    assert not {"README.md", "manifest.csv"} & set(everything(out))
    ex.export(replace(options, count=5))
    assert "5 images of 16" in (out / "README.md").read_text() and len(read_manifest(out)) == 5


def test_the_threshold_decides(tmp_path):
    class Near:
        threshold, left = 1.0, [0.99, 1.0, 0.6, 7.0, 3.0, 3.0]

        def gaps(self, images):
            return np.array([self.left.pop(0) for _ in images])

    rows = ex.write_images(model_of(tmp_path), ex.Options(count=4), Near(), {})
    assert [row["kept"] for row in rows[:4]] == ["no", "yes", "no", "yes"]
    assert [row["gap"] for row in rows[:4]] == ["0.9900", "1.0000", "0.6000", "7.0000"]


def test_nothing_but_copies_ends(with_data, tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "MAX_COPIES", 60)
    plant(with_data, lambda seed: seed != 2, monkeypatch)
    options = ex.Options(with_data, tmp_path / "out", count=9, reject_copies=True)
    for _ in range(2):  # and again
        with pytest.raises(UserError, match="holds 1 images; --count 1 completes it"):
            ex.export(options)
    assert not (tmp_path / "out" / "README.md").exists()
    ex.export(replace(options, count=1))
    assert "1 images of 16" in (tmp_path / "out" / "README.md").read_text()
    rows = (tmp_path / "out" / ".journal.csv").read_text().splitlines()
    assert 61 <= len(rows) < 90


def test_gaps_are_distances_to_the_nearest_training_slice(with_data):
    m = models.open_model(models.Options(with_data))
    copies = ex.Copies(m, ex.Options(with_data))
    splits = load_slices(m.config)[0]
    gaps = copies.gaps(splits["train"].images)
    assert gaps.max() < 1e-3 < copies.threshold
    assert copies.gaps(splits["train"].images[:, :, ::-1]).max() < copies.threshold
    x, y = (
        metrics.normalise_pose(splits[k].images).repeat(2, 1).repeat(2, 2).reshape(-1, 1024)
        for k in ("test", "train")
    )
    turned = metrics.normalise_pose(splits["train"].images)[:, :, ::-1].repeat(2, 1).repeat(2, 2)
    known = np.concatenate([y, turned.reshape(-1, 1024)]).astype(float)
    nearest = [min(np.linalg.norm(known - row, axis=1)) for row in x.astype(float)]
    np.testing.assert_allclose(copies.gaps(splits["test"].images), nearest, rtol=1e-3, atol=0.5)
    np.testing.assert_allclose(copies.threshold, np.percentile(nearest, 1), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two classes", "one class", "positions", "no noise"])
def test_onnx_draws_what_torch_draws(kind, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    settings, num, source = KINDS[kind]
    run = saved(tmp_path / "run", num, **settings)
    file = tmp_path / "new" / "g.onnx"
    assert ex.export(ex.Options(run / source, onnx=file, seeds=(0, 5), truncation_psi=0.8)) == file
    assert "over 2 seeds of each class" in capsys.readouterr().out
    G = runs.load_generator(run)[0]
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = {item.name for item in session.get_inputs()}
    z, c = latents([9], G.z_dim), torch.zeros(1, G.c_dim)
    c[:, -1:] = 1
    fed = {k: v.numpy() for k, v in {"z": z, "c": c}.items() if k in names}
    (image,) = session.run(None, fed)
    assert (
        np.abs(utils.to_uint8(torch.from_numpy(image)).astype(int) - sample(G, z, c, 0.8)) <= 1
    ).all()


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run = saved(tmp_path / "run")
    with pytest.raises(UserError, match="is a folder, not a file"):
        ex.export(ex.Options(run, onnx=tmp_path))
    with pytest.raises(UserError, match=r"onnx.* is missing: pip install onnx"):
        ex.export(ex.Options(run, onnx=tmp_path / "g.onnx"))
    assert not (tmp_path / "g.onnx").exists()


# Options


def test_the_order_of_classes_and_one_line_for_each_mistake(tmp_path):
    two, three, one = (saved(tmp_path / f"run{n}", n, conditional=n > 1) for n in (2, 3, 1))
    at = saved(tmp_path / "at", 2, condition_position=True)
    m = models.open_model(models.Options(three))
    assert m.pair(None) == (2, 0) and m.pair(("AD", "MCI")) == (0, 1)
    (tmp_path / "file").touch()
    before = everything(tmp_path)
    bad = [
        (cf.counterfactual, lambda: cf.Options(three, classes=("AD", "x")), "class = x: "),
        (cf.counterfactual, lambda: cf.Options(two, classes=("AD", "AD")), "two different ones"),
        (cf.counterfactual, lambda: cf.Options(one), "has one class, all"),
        (cf.counterfactual, lambda: cf.Options(two, count=1), "count = 1: .* 2 or more"),
        (cf.counterfactual, lambda: cf.Options(two, position=0.3), "position = 0.3"),
        (cf.counterfactual, lambda: cf.Options(two, out=tmp_path / "file"), "is not a"),
        (cf.counterfactual, lambda: cf.Options(tmp_path / "no"), "not exist"),
        (movies.interpolate, lambda: movies.Options(two, seeds=(3,)), "needs two or more"),
        (movies.interpolate, lambda: movies.Options(two, seeds=()), "seeds = .*at least one"),
        (movies.interpolate, lambda: movies.Options(two, seeds=(-1,)), "seeds = "),
        (movies.interpolate, lambda: movies.Options(two, frames=1), "frames = 1: .*2 to 1000"),
        (movies.interpolate, lambda: movies.Options(two, seconds=0.0), "seconds = 0.0: .*above 0"),
        (movies.interpolate, lambda: movies.Options(two, seconds=1e9), "seconds = "),
        (movies.interpolate, lambda: movies.Options(two, label="x"), "class = x: "),
        (movies.interpolate, lambda: movies.Options(one, between="classes"), "has one class"),
        (movies.interpolate, lambda: movies.Options(two, between="positions"), "without"),
        (movies.interpolate, lambda: movies.Options(two, between="classes", label="AD"), "all"),
        (ex.export, lambda: ex.Options(two, tmp_path / "o", truncation_psi=1.5), "psi = 1.5"),
        (ex.export, lambda: ex.Options(two, tmp_path / "o", count=0), "count = 0"),
        (ex.export, lambda: ex.Options(two, reject_copies=True, onnx=Path("x")), "no images"),
        (dirs.explore_directions, lambda: dirs.Options(two, seeds=(1, 2)), "seeds = .1, 2.: the"),
        (pj.project_command, lambda: pj.Options(two, label="AD"), "class = AD: is that of images"),
        (pj.project_command, lambda: pj.Options(at, position=0.5), "position = 0.5: is that of im"),
        (cf.counterfactual, lambda: cf.Options(two, seeds=(2**32,)), "seeds = .* 0 to 4294967295"),
        (pj.project_command, lambda: pj.Options(one, target="all"), "to = all: is no other class"),
        (dirs.explore_directions, lambda: dirs.Options(two, axes=0), "axes = 0"),
        (dirs.explore_directions, lambda: dirs.Options(two, samples=99), "samples = 99"),
        (pj.project_command, lambda: pj.Options(two, steps=9), "steps = 9"),
        (pj.project_command, lambda: pj.Options(two, starts=33), "starts = 33: .*1 to 32"),
    ]  # fmt: skip
    for command, options, words in bad:
        with pytest.raises(UserError, match=words) as error:
            command(options())
        assert "\n" not in str(error.value)
    assert everything(tmp_path) == before


COMMANDS = {"counterfactual": "--classes", "project": "--offset-weight", "directions": "--axes",
            "interpolate": "--between", "export": "--reject-copies", "page": "--serve"}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["explore.py", command, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        explore.main()
    text = capsys.readouterr().out
    assert end.value.code == 0 and COMMANDS[command] in text and "--checkpoint" in text
    lines = [line.strip("│ ") for line in text.splitlines()]
    assert max(map(len, lines)) <= 100 and not [line for line in lines if line.endswith("label:")]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    run = saved(tmp_path / "run", 3)
    words = (
        f"interpolate --checkpoint {run} --seeds 4 1 --class MCI --frames 2 --out {tmp_path / 'o'}"
    )
    monkeypatch.setattr(sys, "argv", ["explore.py", *words.split()])
    explore.main()
    assert f"movie in {tmp_path / 'o'}" in capsys.readouterr().out
    assert (tmp_path / "o" / "interpolate_seeds.gif").exists()
    words = f"counterfactual --checkpoint {run} --classes MCI AD --count 2 --reversals 0 --seeds 3"
    monkeypatch.setattr(sys, "argv", ["explore.py", *words.split()])
    explore.main()
    assert "# From MCI to AD" in capsys.readouterr().out


def test_features_of_the_loss_can_be_dinov2_or_none(tmp_path, monkeypatch):
    run, seen = saved(tmp_path / "run"), []

    def network(images):
        seen.append(images.requires_grad)
        return images.mean((2, 3))

    toy = features.Extractor("dinov2", "toy", network)
    monkeypatch.setattr(pj.features, "load_dinov2", lambda *_: toy)
    monkeypatch.setattr(runs, "real_slices", lambda *_: None)
    options = pj.Options(run, images=(save_image(tmp_path / "AD" / "x.png"),), steps=10, starts=1)
    pj.project_command(replace(options, features="none"))
    assert not seen
    pj.project_command(replace(options, features="dinov2"))
    assert seen.count(True) == 20  # each step, of the slice and of a generated image
    monkeypatch.undo()
    missing = replace(
        options, features="dinov2", dinov2_weights=tmp_path / "no.pt", out=tmp_path / "o"
    )
    with pytest.raises(UserError, match="dinov2_weights = .*no.pt"):
        pj.project_command(missing)
    assert not missing.out.exists()


@pytest.mark.parametrize("wanted", ["encoder", "none"])
def test_the_encoder_of_the_run_is_used_unless_no_features_are_wanted(
    tmp_path, monkeypatch, wanted
):
    run, used, plain = saved(tmp_path / "run"), [], pj.project
    toy = models.Real(
        None, None, features.Extractor("encoder", "x", lambda x: x.mean((2, 3))), True
    )
    monkeypatch.setattr(models, "open_real", lambda *_: toy)
    monkeypatch.setattr(pj, "project", lambda *what: used.append(what[-1]) or plain(*what))
    image = save_image(tmp_path / "AD" / "x.png")
    pj.project_command(pj.Options(run, images=(image,), steps=10, starts=1, features=wanted))
    assert used == [toy.extractor if wanted == "encoder" else None] * 2
