"""Sampling and figures of a trained run."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict as prediction
from config import Config, UserError
from dataset import Slices
from evaluation.samples import images_of, latents, sample, sample_fakes, with_mixed_styles
from predict import (
    Options,
    mixed,
    pixels,
    predict,
    probe_by_participant,
    sample_class,
)
from train import train
from training import runs
from training.runs import load_generator, newest_run, run_folder
from utils import evenly_spaced, one_hot, random_rows, read_picture

ABSENT = "cuda" if not torch.cuda.is_available() else "mps"


@pytest.fixture
def run(trained: Config) -> Path:
    """A run of one epoch on tiny slices."""
    return trained.out


@pytest.fixture(autouse=True)
def few_points(monkeypatch) -> None:
    """Embeddings of 60 points instead of 600."""
    monkeypatch.setattr(prediction, "MAX_POINTS", 60)


def test_a_seed_is_the_same_image_alone_or_among_others(run: Path):
    G, _, _ = load_generator(run)
    many = sample_class(G, 1, [3, 1, 7, 5], Options())
    assert (sample_class(G, 1, [7], Options())[0] == many[2]).all()
    assert not (many[0] == many[1]).all()


def test_styles_of_a_seed_mix_from_a_layer_of_its_own_on():
    ws, others, seeds = torch.zeros(400, 6, 3), torch.ones(400, 6, 3), list(range(400))
    mixed = with_mixed_styles(ws, others, seeds, 0.75)
    taken = mixed[:, :, 0].sum(1)  # layers of the second latent
    assert (mixed == mixed[:, :, :1]).all() and (mixed.diff(dim=1) >= 0).all()
    assert 0.2 < (taken == 0).float().mean() < 0.3 and taken.max() == 5
    assert set(taken.tolist()) == {0, 1, 2, 3, 4, 5}
    alone = with_mixed_styles(ws[7:9], others[7:9], [7, 8], 0.75)
    assert (alone == mixed[7:9]).all()


def test_fresh_samples_have_styles_of_two_latents(run: Path):
    G, _, classes = load_generator(run)
    labels = np.zeros(60, int)
    plain, mixed, again = (
        sample_fakes(G, labels, classes, 0, silent=True, style_mixing_prob=share).images
        for share in (0, 1, 1)
    )
    assert (mixed != plain).any((1, 2)).all() and (mixed == again).all()


@pytest.mark.slow
def test_a_generator_of_positions_draws_any_of_them(config: Config, tmp_path):
    positions = replace(config, condition_position=True, epochs=1, fid_kimg=0.01, fid_images=100)
    train(positions)
    predict(Options(checkpoint=config.out, count=4, out=tmp_path / "seeds"))
    assert {p.name for p in (tmp_path / "seeds").glob("*.png")} > {
        "positions.png",
        "truncation.png",
    }
    G = load_generator(config.out)[0]
    low, high, again = (sample_class(G, 1, [0, 1], Options(position=x)) for x in (0.0, 0.7, 0.7))
    assert (again == high).all() and not (low == high).all()
    a, b = (sample_class(G, 1, [0, s], Options()) for s in (1, 2))
    assert (a[0] == b[0]).all()  # each seed has its own position


def test_sampling_equals_the_generator(run: Path):
    G, _, _ = load_generator(run)
    z, c = latents([0, 1], 8), one_hot(np.array([0, 1]), 2)
    expected = ((G(z, c, 0.5, noise_mode="const") + 1) * 127.5).round().clamp(0, 255)[:, 0]
    assert np.abs(sample(G, z, c, 0.5).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.drawn
def test_every_figure_is_drawn_from_the_newest_run(run: Path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", run.parent)
    assert newest_run() == run
    out = predict(Options(count=3, device="cpu"))
    names = {str(p.relative_to(out)) for p in out.rglob("*.png")}
    images = {f"images/{c}/seed{i:04d}.png" for c in ("AD", "NC") for i in range(3)}
    assert names == images | {
        "grid_AD.png", "grid_NC.png", "truncation.png", "mixing.png",
        "embedding_images.png", "embedding_w.png",
    }  # fmt: skip
    for name in images:
        image = Image.open(out / name)
        assert (image.mode, image.size) == ("L", (16, 16))
    grid = read_picture(out / "grid_AD.png")
    assert grid.shape == (96, 3 * 96)
    image = Image.open(out / "images/AD/seed0000.png")
    assert (grid[:, :96] == np.asarray(image.resize((96, 96), Image.Resampling.LANCZOS))).all()


def test_seeds_classes_checkpoint_and_folder_can_be_chosen(run: Path, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "real_slices", lambda *_: None)
    checkpoint = next((run / "checkpoints").iterdir())
    assert run_folder(checkpoint) == run_folder(run / "generator.safetensors") == run
    options = Options(
        checkpoint=checkpoint, classes=("NC",), seeds=(4, 9), truncation_psi=0.5,
        out=tmp_path / "out", device="cpu",
    )  # fmt: skip
    assert predict(options) == tmp_path / "out"
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    images = {f"images_psi0.5/NC/seed{seed:04d}.png" for seed in (4, 9)}
    assert names >= images | {"grid_NC_psi0.5.png"} and "grid_AD_psi0.5.png" not in names
    everything = Options(truncation_psi=0.5, truncation_cutoff=3, position=1.0)
    assert everything.variant() == ["psi 0.5", "cutoff 3", "position 1"]
    assert Options(truncation_cutoff=3).variant() == []  # which changes nothing


def test_mixing_takes_some_layers_from_the_other_seed(run: Path):
    G, _, _ = load_generator(run)
    ws = G.mapping(latents([0, 1, 2], G.z_dim), one_hot(np.array([0, 0, 0]), 2)).clone()
    own = images_of(G, ws)
    assert (mixed(G, ws, slice(0, 0)) == own[:, None]).all()
    assert (mixed(G, ws, slice(None)) == own[None]).all()
    other = ws[1:2].clone()
    other[:, 2:4] = ws[2, 2:4]
    assert (mixed(G, ws, slice(2, 4))[1, 2] == images_of(G, other)[0]).all()


def test_a_shared_generator_needs_its_config_only(run: Path, tmp_path, config: Config):
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in ("generator.safetensors", "config.json"):
        shutil.copy(run / name, shared / name)
    text = (shared / "config.json").read_text()
    assert str(tmp_path) not in text and str(config.data_root.parent) not in text
    shutil.rmtree(config.data_root)
    out = predict(Options(checkpoint=shared / "generator.safetensors", count=2, device="cpu"))
    assert out == shared / "predict" and (out / "grid_AD.png").exists()
    assert not (out / "embedding_images.png").exists()


def test_a_folder_that_only_has_the_name_of_the_data_is_not_theirs(run: Path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    (run / "paths.json").unlink()  # as it is shared
    root = Path(load_generator(run)[1].data_root)
    root = root if root.exists() else Path(root.name)
    assert not root.is_absolute()
    shutil.rmtree(root, ignore_errors=True)
    (root / "holiday").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "holiday" / "a_1.png")
    options = Options(checkpoint=run, count=1, device="cpu", figures=("grid", "embedding"))
    out = predict(options)
    said = capsys.readouterr().out
    assert "no embedding of real slices; --data-root sets another" in said
    assert (out / "grid_AD.png").exists()
    with pytest.raises(UserError):
        predict(replace(options, data_root=root))


def test_without_a_run_the_demo_generator_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runs, "real_slices", lambda *_: None)
    before = sorted(runs.DEMO_GENERATOR.rglob("*"))
    out = predict(Options(count=8, device="cpu"))
    assert out == tmp_path / "runs" / "demo_generator" / "predict"
    assert capsys.readouterr().out.startswith("No run under ")
    assert sorted(runs.DEMO_GENERATOR.rglob("*")) == before
    images = np.stack([np.asarray(Image.open(p)) for p in (out / "images" / "AD").iterdir()])
    assert images.shape == (8, 64, 64)
    centre, edge = images[:, 16:48, 16:48], images[:, :4]
    assert centre.mean() > 60 and edge.mean() < 8  # heads on black
    assert images.std(0).mean() > 5  # of different shapes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ("CN",)}, "no class 'CN'; this generator knows AD, NC"),
        ({"classes": ()}, "classes = .*at least one"),
        ({"compare": ()}, "compare = .*at least one"),
        ({"data_root": Path("nowhere")}, "data_root = nowhere"),
        ({"device": ABSENT}, f"device = {ABSENT}"),
        ({"position": 0.3}, "position = 0.3: a generator without condition_position"),
        ({"figures": ("positions",)}, "figures: positions: a generator without condition_position"),
    ],
)
def test_bad_requests_are_named_before_anything_is_drawn(run: Path, options, words):
    with pytest.raises(UserError, match=words):
        predict(Options(checkpoint=run, **options))
    assert not list((run / "predict").glob("*.png"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count = 0"),
        ({"seeds": (1, -1)}, "seeds = "),
        ({"seeds": ()}, "seeds = "),
        ({"truncation_psi": 1.5}, "truncation_psi = 1.5"),
        ({"truncation_cutoff": -1}, "truncation_cutoff = -1"),
        ({"position": 1.01}, "position = 1.01"),
        ({"figures": ()}, "figures = "),
        ({"figures": ("grids",)}, "figures = "),
        ({"format": "svg"}, "format = "),
    ],
)
def test_invalid_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        Options(**options)


def test_damaged_or_foreign_weights_are_named(run: Path, config: Config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        load_generator(tmp_path / "nothing.safetensors")
    weights = run / "generator.safetensors"
    other = replace(config, img_resolution=32, out=run.with_name("other"))
    runs.write_run_config(other.out, other, ["AD", "NC"], "data")
    shutil.copy(weights, other.out / "generator.safetensors")
    with pytest.raises(UserError, match="does not fit .*img_resolution = 32"):
        load_generator(other.out)
    foreign = run / "checkpoints" / "foreign.pt"
    torch.save({"weights": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match="foreign.pt is no checkpoint of this project"):
        load_generator(foreign)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated"):
        load_generator(run)
    (run / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_generator(run)


def test_data_of_other_classes_is_refused(run: Path, config: Config):
    for split in ("train", "test"):
        (config.data_root / split / "NC").rename(config.data_root / split / "CN")
    with pytest.raises(UserError, match="AD.*CN.*AD.*NC"):
        predict(Options(checkpoint=run))


def fake_split(rng, shift: float, people: int) -> tuple[np.ndarray, Slices]:
    """Gaussian features of 5 slices per participant, the classes `shift` apart."""
    labels = np.repeat(np.arange(people) % 2, 5)
    features = rng.normal(size=(len(labels), 4)) + shift * labels[:, None]
    participants = np.repeat([f"s{i}" for i in range(people)], 5)
    return features, Slices(np.zeros((len(labels), 1, 1)), labels, participants, ["AD", "NC"])


@pytest.mark.parametrize("umap", ["quick", pytest.param("real", marks=pytest.mark.slow)])
def test_far_groups_lie_apart_in_an_embedding(umap):
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(2, 30, 6)) + np.array([0, 30])[:, None, None]
    for name, points in prediction.embed(np.concatenate(groups).astype(np.float32)).items():
        assert points.shape == (60, 2)
        centres, spread = points.reshape(2, 30, 2).mean(1), points.reshape(2, 30, 2).std(1).max()
        assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread, name


def test_the_probe_reads_a_signal_by_participant_and_none_from_noise():
    rng = np.random.default_rng(0)
    strong = probe_by_participant(fake_split(rng, 2.0, 40), fake_split(rng, 2.0, 40))
    assert strong == "linear probe on 40 unseen participants: accuracy 1.00, AUC 1.00"
    none = probe_by_participant(fake_split(rng, 0.0, 200), fake_split(rng, 0.0, 200))
    assert 0.35 < float(none.split()[-1]) < 0.65


@pytest.mark.parametrize("people", [4, 19, 20])
def test_the_probe_says_nothing_of_fewer_than_twenty_participants(people):
    rng = np.random.default_rng(1)
    found = probe_by_participant(fake_split(rng, 2.0, 40), fake_split(rng, 2.0, people))
    if people < 20:
        assert found == f"no probe: {people} test participants are too few"
    else:
        assert found.startswith("linear probe on 20 unseen participants: accuracy")


def test_random_rows_mix_the_positions_of_scans():
    rows = random_rows(10000, 500)  # 20 slices a scan
    assert (np.diff(rows) > 0).all() and len(rows) == 500 == len(random_rows(500, 900))
    for half in (rows[:250], rows[250:]):
        assert (half % 20).mean() == pytest.approx(9.5, abs=1.5)


def test_pixels_are_averaged_and_spread_is_even():
    images = np.zeros((2, 128, 128), np.uint8)
    images[0, :2, :2] = 40
    assert pixels(images).shape == (2, 64 * 64)
    assert pixels(images)[0, 0] == 40
    assert evenly_spaced(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(100, 3).tolist() == [0, 50, 99] or evenly_spaced(100, 3).tolist() == [
        0,
        49,
        99,
    ]
