"""Losses against closed forms; a run that learns, resumes bit for bit, and fails in plain words."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    as_flags,
    assert_same_run,
    phase_gradients,
    run_train,
    step_inputs,
    write_folder,
)
from PIL import Image
from torch import nn

import dataset
import train as training
from assets.make_demo_generator import share
from config import CPU, GPU, Config, UserError
from dataset import TrainingSlices
from evaluation import features
from evaluation.metrics import pose
from modules import Discriminator, Generator
from train import (
    Phases,
    TrainingState,
    d_main,
    d_r1,
    ema_step,
    g_main,
    g_path,
    mixed_ws,
    path_lengths,
    r1_penalty,
    train,
    train_step,
)
from training import process, recorder, runs
from training.logs import STATS, read_log, read_losses
from training.runs import (
    DEMO_GENERATOR,
    checkpoints,
    load_checkpoint,
    load_generator,
    read_run_config,
    save_checkpoint,
)
from utils import read_picture, to_uint8

pytestmark = pytest.mark.usefixtures("short_encoder")


class LinearCritic(nn.Module):
    """D(x) = <w, x>: its gradient is w everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(1, 4, 4))

    def forward(self, img, c):
        return (img * self.w).sum((1, 2, 3))


def test_r1_of_a_linear_critic_is_the_square_of_its_weight():
    D = LinearCritic()
    penalty = r1_penalty(D, torch.randn(3, 1, 4, 4), torch.eye(3))
    torch.testing.assert_close(penalty, D.w.square().sum().expand(3))
    penalty.sum().backward()
    torch.testing.assert_close(D.w.grad, 6 * D.w.detach())


def test_r1_and_its_gradient_equal_double_backward(config: Config):
    torch.manual_seed(0)
    D, real, c = Discriminator(config, 2), torch.randn(4, 1, 16, 16), torch.eye(2)[[0, 1, 1, 0]]
    r1_penalty(D, real, c).mean().backward()
    ours = [p.grad.clone() for p in D.parameters() if p.grad is not None]
    D.zero_grad()
    real.requires_grad_(True)
    (gradient,) = torch.autograd.grad(D(real, c).sum(), real, create_graph=True)
    gradient.square().sum((1, 2, 3)).mean().backward()
    theirs = [p.grad for p in D.parameters() if p.grad is not None]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_path_length_of_a_linear_generator_is_the_length_of_its_projection():
    """img = A w: J^T y = A^T y, with y drawn anew; the mean over layers divides by num_ws."""
    A = torch.randn(16, 5)

    def synthesis(ws):
        return (ws.mean(1) @ A.T).view(-1, 1, 4, 4)

    torch.manual_seed(0)
    lengths = path_lengths(synthesis, torch.randn(3, 2, 5))
    torch.manual_seed(0)
    torch.randn(3, 2, 5)
    y = torch.randn(3, 16) / 4
    torch.testing.assert_close(lengths, (y @ A / 2).norm(dim=1))


def test_style_mixing_swaps_the_later_layers(config: Config):
    G, z, c = Generator(config, 2), torch.randn(64, 8), torch.eye(2)[torch.arange(64) % 2]
    ws = G.mapping(z, c)
    torch.testing.assert_close(mixed_ws(G, z, c, 0.0), ws)
    same = (mixed_ws(G, z, c, 1.0) == ws).all(2)  # [N, num_ws]
    assert same[:, 0].all() and not same[:, -1].any()
    assert (same.int().diff(dim=1) <= 0).all()  # once swapped, swapped to the end
    assert len(set(same.sum(1).tolist())) > 2  # at various layers


def test_the_logistic_losses_start_at_their_known_values(config: Config):
    state, real, c = step_inputs(config)
    with torch.no_grad():
        for p in state.D.parameters():
            p.zero_()  # D says 0: its loss is 2 ln 2, that of G is ln 2
    assert g_main(state.G, state.D, real, c, config)[0].item() == pytest.approx(math.log(2))
    loss, _ = d_main(state.G, state.D, real, c, c, config)
    assert loss.item() == pytest.approx(2 * math.log(2))


class Mirror(nn.Module):
    """In the place of augmentation: images are mirrored."""

    def forward(self, img):
        return img.flip(3)


def relativistic_terms(
    state: TrainingState, real, c, monkeypatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Given images in the place of generated ones, and the logits of D on them and on `real`."""
    fake = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    monkeypatch.setattr(training, "generate", lambda *_: fake)
    return fake, torch.stack([state.D(real, c), state.D(fake, c)])


def test_the_relativistic_losses_compare_the_images_of_a_pair(config: Config, monkeypatch):
    config = replace(config, relativistic=True, augment="none")
    state, real, c = step_inputs(config)
    _, (D_real, D_fake) = relativistic_terms(state, real, c, monkeypatch)
    loss, _ = g_main(state.G, state.D, real, c, config)
    torch.testing.assert_close(loss, (1 + (D_real - D_fake).exp()).log().mean())
    loss, stats = d_main(state.G, state.D, real, c, c, config)
    pairs = 2 * (1 + (D_fake - D_real).exp()).log().mean()
    torch.testing.assert_close(loss, pairs + 0.01 * ((D_real + D_fake) / 2).square().mean())
    torch.testing.assert_close(stats["real_sign"], D_real.sign().mean())


def test_the_relativistic_loss_keeps_the_level_of_d_near_0(config: Config):
    state, real, c = step_inputs(replace(config, relativistic=True))
    state.D.out.bias.data.fill_(1.0)
    args = (state.G, state.D, real, c, c, state.config)
    levels = []
    for _ in range(300):
        stats = state.phases(d_main, state.d_opt, 0, *args)
        levels.append((stats["real_logit"] + stats["fake_logit"]).item() / 2)
    assert levels[0] > 0.8 and abs(levels[-1]) < 0.2, (levels[0], levels[-1])


def test_relativistic_r2_is_r1_at_generated_images(config: Config, monkeypatch):
    config = replace(config, relativistic=True, r1_interval=3)
    state, real, c = step_inputs(config)
    state.D.augment = Mirror()
    fake, _ = relativistic_terms(state, real, c, monkeypatch)
    loss, stats = d_r1(state.G, state.D, real, c, torch.tensor(0.5), config)
    r1, r2 = (r1_penalty(state.D, img.flip(3), c).mean() for img in (real, fake))
    torch.testing.assert_close(loss, 2 * (0.5 / 2) * 3 * (r1 + r2))  # twice, as the loss of D
    torch.testing.assert_close((stats["r1"], stats["r2"]), (r1, r2))


def test_the_images_of_a_relativistic_pair_have_one_class(config: Config, monkeypatch):
    state, real, c = step_inputs(replace(config, relativistic=True))
    labels = []
    generate = training.generate
    monkeypatch.setattr(
        training, "generate", lambda G, c, config: labels.append(c) or generate(G, c, config)
    )
    train_step(state, real, c, torch.eye(2))
    assert len(labels) == 3 and all(torch.equal(label, c) for label in labels)  # of G, D and R2


@pytest.mark.parametrize("relativistic", [False, True])
def test_each_phase_moves_its_own_network_only(config: Config, relativistic: bool):
    config = replace(config, relativistic=relativistic)
    state, real, c = step_inputs(config)
    G, D = state.G, state.D

    def snapshot(net):
        return [p.detach().clone() for p in net.parameters()]

    def moved(net, before):
        return any(not torch.equal(x, y) for x, y in zip(before, snapshot(net), strict=True))

    for phase, optimizer, args in (
        (g_path, state.g_opt, (G, c, state.pl_mean)),
        (d_main, state.d_opt, (G, D, real, c, c)),
        (d_r1, state.d_opt, (G, D, real, c, torch.tensor(1.0))),
    ):
        before_G, before_D = snapshot(G), snapshot(D)
        state.phases(phase, optimizer, 0, *args, config)
        assert moved(G, before_G) == (optimizer is state.g_opt), phase
        assert moved(D, before_D) == (optimizer is state.d_opt), phase
        assert all(p.grad is None for net in (G, D) for p in net.parameters())


def recorded_phases(monkeypatch, state) -> dict[str, dict[int, torch.Tensor]]:
    """Replaces each update by a record, under the name of its phase, of the gradients it had."""
    record: dict[str, dict[int, torch.Tensor]] = {}

    def run(phase, optimizer, seed, *args):
        stats = state_phases.backward(phase, seed, *args)
        parameters = optimizer.param_groups[0]["params"]
        record[phase.__name__] = {id(p): p.grad for p in parameters if p.grad is not None}
        optimizer.zero_grad()
        return stats

    state_phases, state.phases = state.phases, run
    return record


def assert_gradients_equal(loss: torch.Tensor, net: nn.Module, recorded) -> None:
    """The gradient of `loss`, by autograd, is what was recorded."""
    parameters = [p for p in net.parameters() if id(p) in recorded]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        expected = torch.zeros_like(p) if gradient is None else gradient
        torch.testing.assert_close(recorded[id(p)], expected, rtol=1e-4, atol=1e-6)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_the_weight_of_r1_moves_to_its_end_in_the_cooldown(config: Config):
    cooled = replace(config, r1_gamma=10.0, cooldown=0.5)
    for end, expected in ((None, [10, 10, 10, 10]), (0.1, [10, 10, 1, 0.1])):
        found = [
            training.schedule(replace(cooled, r1_gamma_end=end), done)[1]
            for done in (0, 0.5, 0.75, 1)
        ]
        assert found == pytest.approx(expected)
    assert training.schedule(replace(config, r1_gamma=0.0, cooldown=0.5), 0.75)[1] == 0


def test_r1_has_the_weight_of_its_moment(config: Config, monkeypatch):
    state, real, c = step_inputs(replace(config, r1_gamma=10.0, r1_gamma_end=0.1, cooldown=0.5))
    state.total, state.cur_nimg = 1024, 768
    weights = []
    phase = state.phases.backward
    monkeypatch.setattr(
        state.phases,
        "backward",
        lambda f, *args: weights.append(args[-2]) or phase(f, *args),
    )
    train_step(state, real, c, torch.eye(2))
    assert weights[-1].item() == pytest.approx(1)


@pytest.mark.parametrize(("r1_gamma", "weight"), [(10.0, 80.0), (None, 0.0128 / 2 * 16)])
def test_r1_is_a_step_of_its_own_with_gamma_half_times_its_interval(
    config, monkeypatch, r1_gamma, weight
):
    config = replace(config, relativistic=False, r1_gamma=r1_gamma)  # None: 0.0002 * 16^2 / 4
    state, real, c = step_inputs(config)
    record = recorded_phases(monkeypatch, state)
    train_step(state, real, c, torch.eye(2))
    assert list(record) == ["g_main", "g_path", "d_main", "d_r1"]
    real.requires_grad_(True)
    (g,) = torch.autograd.grad(state.D(real, c).sum(), real, create_graph=True)
    penalty = g.square().sum((1, 2, 3)).mean()
    assert_gradients_equal(weight * penalty, state.D, record["d_r1"])


def test_path_length_is_a_step_of_its_own_with_its_weight_times_its_interval(config, monkeypatch):
    state, real, c = step_inputs(replace(config, pl_weight=3.0, pl_interval=5))
    record = recorded_phases(monkeypatch, state)
    z = torch.randn(4, 8)
    y = torch.randn(2, 1, 16, 16)  # half the batch
    labels = []

    def fixed_ws(G, _z, c, _prob):
        labels.append(c)
        return G.mapping(z[: len(c)], c)

    monkeypatch.setattr(training, "mixed_ws", fixed_ws)
    monkeypatch.setattr(
        torch, "randn_like", lambda img, **_: y if img.shape == y.shape else img * 0
    )
    train_step(state, real, c, torch.eye(2))
    half = state.G.mapping(z[:2], labels[1])
    img = state.G.synthesis(half)
    (J,) = torch.autograd.grad((img * y).sum() / 16, half, create_graph=True)
    lengths = J.square().sum(2).mean(1).sqrt()
    mean = 0.01 * lengths.mean().detach()
    penalty = 15 * (lengths - mean).square().mean()
    assert_gradients_equal(penalty, state.G, record["g_path"])


@pytest.mark.parametrize("relativistic", [False, True])
def test_penalties_come_at_their_intervals(config: Config, relativistic: bool):
    train(replace(config, r1_interval=3, pl_interval=2, relativistic=relativistic))
    due = dict(zip(STATS, np.isfinite(read_losses(config.out)).T[1:], strict=True))
    assert due["r1"].tolist() == [True, False, False] * 2 + [True, False]
    assert due["r2"].tolist() == [relativistic and r1 for r1 in due["r1"]]
    assert due["path_length"].tolist() == [True, False] * 4


def test_path_length_mean_follows_the_lengths(config: Config):
    state, real, c = step_inputs(config)
    stats = dict(zip(STATS, train_step(state, real, c, torch.eye(2)), strict=True))
    torch.testing.assert_close(state.pl_mean, config.pl_decay * stats["path_length"])


# Augmentation and labels


def test_r1_is_taken_where_d_looks(config: Config):
    ada = {"augment": "ada", "ada_p": 1.0}
    state, real, c = step_inputs(replace(config, relativistic=False, **ada))
    torch.manual_seed(1)
    loss, stats = d_r1(state.G, state.D, real, c, torch.tensor(1.0), state.config)
    torch.manual_seed(1)
    seen = state.D.augment(real)
    assert not torch.equal(seen, real)
    torch.testing.assert_close(stats["r1"], r1_penalty(state.D, seen, c).mean())


class Blank(nn.Module):
    """In the place of augmentation: D sees the same picture everywhere."""

    def forward(self, img):
        return img * 0


def test_whatever_d_sees_has_passed_the_augmentation(config: Config):
    state, real, c = step_inputs(config)
    state.D.augment = Blank()
    gradients = phase_gradients(state, real, c, Phases("off").backward)
    assert gradients["g_main"].abs().max() == 0 and gradients["d_main"].abs().max() > 0
    _, stats = d_main(state.G, state.D, real, c, c, config)
    torch.testing.assert_close(stats["real_logit"], stats["fake_logit"])


def test_skipping_the_augmentation_at_p_0_leaves_no_trace(config: Config):
    found = []
    for p in (0.0, 1e-12):  # the second takes the long way
        state, real, c = step_inputs(replace(config, augment="ada", ada_p=p))
        train_step(state, real, c, torch.eye(2))
        found.append(list(state.G.parameters()) + list(state.D.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def heads(n: int) -> torch.Tensor:
    """Upright ellipses with a bright spot at their right. -> [n, 1, 16, 16]."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:16, :16] - 7.5
    wide, high = rng.uniform(3.0, 3.8, (n, 1, 1)), rng.uniform(5.6, 6.4, (n, 1, 1))
    body = 1 / (1 + np.exp(12 * (np.hypot(x / wide, y / high) - 1)))
    spot = np.exp(-((x - 2) ** 2 + (y + 2) ** 2) / 2)
    return torch.from_numpy(body * (0.72 + 0.96 * spot) - 1).float()[:, None].clamp(-1, 1)


@pytest.mark.slow
def test_adaptive_augmentation_does_not_leak(config: Config):
    """Half of all images are mirrored or turned before D sees them: none of the samples may be."""
    strengths = dict.fromkeys(("ada_translation", "ada_scale", "ada_anisotropy", "ada_cutout"), 0.0)
    strengths |= dict.fromkeys(("ada_brightness", "ada_contrast", "ada_noise"), 0.0)
    config = replace(
        config, augment="ada", ada_p=0.5, **strengths, z_dim=16, w_dim=16, channel_base=256,
        channel_max=32, batch_size=16, learning_rate=0.004, pl_weight=0, ema_kimg=0.5,
    )  # fmt: skip
    state, real, c = TrainingState(config, 0, torch.device("cpu")), heads(512), torch.zeros(16, 0)
    for i in range(300):
        train_step(state, real[torch.arange(16 * i, 16 * i + 16) % 512], c, torch.zeros(1, 0))
    z = torch.randn(256, 16, generator=torch.Generator().manual_seed(5))
    side = pose(to_uint8(state.G_ema(z, torch.zeros(256, 0))))[:, 1]
    assert (side > 0).mean() > 0.9


def test_the_label_gains_its_weight_over_the_ramp(config: Config):
    ramp = replace(config, label_ramp_kimg=0.4)
    assert [training.label_weight(ramp, n) for n in (0, 100, 400, 10000)] == [0, 0.25, 1, 1]
    assert training.label_weight(config, 0) == 1
    state, real, c = step_inputs(ramp)
    before = [p.clone() for p in (state.D.embed, state.G.mapping.embed.weight)]
    train_step(state, real, c, torch.eye(2))  # without a label nothing reads what stands for it
    after = [state.D.embed, state.G.mapping.embed.weight]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_unconditional_run_goes_on_with_labels(config: Config):
    plain = replace(config, conditional=False, epochs=1)
    train(plain)
    assert read_run_config(plain.out)[1] == ["all"]
    labelled = replace(config, init_from=plain.out, out=config.out.with_name("labelled"))
    old = TrainingState(plain, 0, torch.device("cpu"))
    old.load_state_dict(load_checkpoint(checkpoints(plain.out)[-1]))
    new = TrainingState(labelled, 2, torch.device("cpu"))
    for name, weights in runs.source_of_weights(labelled, 2).items():
        runs.load_fitting_weights(getattr(new, name), weights)
    z, c, none = torch.randn(4, 8), torch.eye(2)[[0, 1, 1, 0]], torch.zeros(4, 0)
    for name in ("G", "G_ema"):
        a, b = getattr(old, name), getattr(new, name)
        images = a(z, none, noise_mode="const")
        torch.testing.assert_close(b(z, c * 0, noise_mode="const"), images, rtol=1e-4, atol=1e-5)
        assert (b(z, c, noise_mode="const") - images).abs().max() > 1e-3
    torch.testing.assert_close(new.D(images, c * 0), old.D(images, none))
    train(labelled)
    assert load_generator(labelled.out)[0].c_dim == 2


def test_weights_that_do_not_fit_are_named_before_anything_is_written(
    trained, tmp_path, monkeypatch
):
    config = trained
    other = replace(config, init_from=config.out, out=config.out.with_name("other"))
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_slices", lambda _: pytest.fail("images were decoded"))
        with pytest.raises(UserError, match="init_from = .*: has w_dim = 8, now 4"):
            train(replace(other, w_dim=4))
        for nothing in (tmp_path, config.out / "nothing"):
            with pytest.raises(UserError, match=f"init_from = {nothing}: holds no checkpoint"):
                train(replace(other, init_from=nothing))
    with pytest.raises(UserError, match="init_from = .*: has classes, this run has none"):
        train(replace(other, conditional=False))
    assert not other.out.exists()


def test_a_run_starts_from_a_generator_and_a_discriminator_that_are_shared(trained, tmp_path):
    config, source = trained, tmp_path / "shared"
    share(config.out, source)
    settings = read_run_config(source)[0]
    assert (settings.out, settings.init_from) == (Config.out, None)  # whose machine it was
    other = replace(config, init_from=source, out=config.out.with_name("other"))
    old = load_generator(source)[0]
    weights = runs.source_of_weights(other, 2)
    new = TrainingState(other, 2, torch.device("cpu"))
    for name in ("G", "D", "G_ema"):
        runs.load_fitting_weights(getattr(new, name), weights[name])
    z, c = torch.randn(4, 8), torch.eye(2)[[0, 1, 1, 0]]
    for name in ("G", "G_ema"):
        images = getattr(new, name)(z, c, noise_mode="const")
        expected = old(z, c, noise_mode="const")
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    before = TrainingState(other, 2, torch.device("cpu"))
    before.load_state_dict(load_checkpoint(checkpoints(config.out)[-1]))
    torch.testing.assert_close(new.D(images, c), before.D(images, c), rtol=0.01, atol=0.01)
    train(other)
    (source / "discriminator.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="discriminator.safetensors is truncated"):
        train(replace(other, out=config.out.with_name("third")))


def test_noise_inputs_may_be_left_out_or_begin_in_a_run_that_starts_from_another(trained):
    config = trained
    z, c = torch.randn(4, 8), torch.eye(2)[[0, 1, 1, 0]]
    without = replace(config, noise=False, out=config.out.with_name("without"))
    train(without)
    for noise, source in ((True, config), (False, without)):
        other = replace(config, noise=not noise, init_from=source.out)
        G = Generator(other, 2)
        runs.load_fitting_weights(G, runs.source_of_weights(other, 2)["G_ema"])
        expected = load_generator(source.out)[0](z, c, noise_mode="none")
        torch.testing.assert_close(G(z, c), expected)  # what begins has no strength yet


def test_a_run_can_start_from_the_demo_generator():
    files = sum(path.stat().st_size for path in DEMO_GENERATOR.iterdir())
    assert files < 5e6
    config = training.parse_settings(["--device", "cpu", "--init-from", str(DEMO_GENERATOR)])
    state = TrainingState(config, 2, torch.device("cpu"))
    for name, weights in runs.source_of_weights(config, 2).items():
        getattr(state, name).load_state_dict(weights)  # all of them, of these shapes


def test_the_sizes_of_the_networks_come_from_the_run_to_start_from(config, tmp_path, command):
    wide = replace(
        config, epochs=1, z_dim=12, w_dim=10, mapping_layers=3, channel_max=5, noise=False
    )
    train(wide)
    for flag in ("--init-from", "--init_from"):
        found = training.parse_settings(["--device", "cpu", flag, str(wide.out)])
        assert [getattr(found, name) for name in runs.NETWORK] == [16, 12, 10, 3, 64, 5, False]
        assert (found.init_from, found.epochs) == (wide.out, CPU["epochs"])
    assert training.parse_settings(["--init-from", "None"]).init_from is None
    assert command("--init-from", tmp_path / "nothing") == 2


def test_a_run_is_resumed_wherever_the_run_that_it_started_from_is(config: Config, tmp_path):
    source = replace(config, epochs=1, z_dim=12, out=tmp_path / "source")
    train(source)
    run = replace(source, init_from=source.out, out=config.out)
    train(run)
    source.out.rename(tmp_path / "moved")
    flags = ["--device", "cpu", "--out", str(run.out), "--init-from", str(source.out)]
    assert training.parse_settings(flags).z_dim == 12
    train(replace(run, epochs=2))
    train(replace(run, epochs=3, init_from=tmp_path / "moved"))
    assert read_log(run.out)[-1]["epoch"] == 3
    with pytest.raises(UserError, match="was trained with init_from = .*, now None"):
        train(replace(run, epochs=3, init_from=None))


@pytest.mark.parametrize("init_from", [None, Path("run")])
def test_the_average_of_a_run_that_is_gone_on_from_is_kept(config: Config, init_from):
    state = TrainingState(replace(config, init_from=init_from), 2, torch.device("cpu"))
    state.cur_nimg = config.batch_size
    torch.nn.init.zeros_(state.G.synthesis.const)
    training.ema_step(state)
    left = (state.G_ema.synthesis.const.abs().mean() / torch.randn(10**5).abs().mean()).item()
    half_life = config.batch_size * 10 / 32 * 1000
    assert left == pytest.approx(0 if init_from is None else 0.5 ** (8 / half_life), abs=0.2)


def test_p_does_not_come_with_the_weights(config: Config):
    train(replace(config, epochs=1, augment="ada", ada_p=0.5))
    other = replace(config, init_from=config.out, augment="ada", ada_p=0.2)
    other = replace(other, epochs=1, out=config.out.with_name("other"))
    train(other)
    assert read_losses(other.out)[-1, 1 + STATS.index("ada_p")] == pytest.approx(0.2)


def test_a_label_that_never_gets_its_full_weight_is_refused(config: Config):
    """Sampling gives the label its full weight, so training must have reached it."""
    with pytest.raises(UserError, match="label_ramp_kimg = 0.1: training ends before, at image"):
        train(replace(config, label_ramp_kimg=0.1))
    assert not config.out.exists()
    alone = replace(config, conditional=False, label_ramp_kimg=0.1, fid_kimg=0.001)
    train(alone)  # it has no label
    assert "fid" in json.loads((alone.out / "log.jsonl").read_text().splitlines()[-1])


def test_a_run_starts_from_a_checkpoint_that_is_no_longer_the_newest(config: Config, tmp_path):
    train(config)
    best = config.out / "best.pt"
    shutil.copy(next((config.out / "checkpoints").glob("*.pt")), best)
    shutil.rmtree(config.out / "checkpoints")
    other = replace(config, out=tmp_path / "other", init_from=best, epochs=1)
    train(other)
    assert runs.read_run_config(best) == runs.read_run_config(config.out)
    for source in (best, other.out / "checkpoints"):
        flags = ["--init-from", str(source), "--out", str(tmp_path / "third")]
        assert training.parse_settings(flags).img_resolution == config.img_resolution
    other.out.rename(named := tmp_path / "checkpoints")  # a run's own folder, not one within a run
    assert runs.run_folder(named) == named and runs.run_folder(named / "checkpoints") == named
    other = replace(other, out=named)
    folder = runs.source_of_weights(replace(other, init_from=other.out / "checkpoints"), 2)
    assert folder["G"].keys() == load_generator(other.out / "checkpoints")[0].state_dict().keys()


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_a_missing_network_is_said_before_anything_is_written(config, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=f"weights of {name}: no such file"):
        train(replace(config, fid_kimg=1, fid_extractor=name))
    assert not config.out.exists() and not config.cache.exists()


def test_adam_is_corrected_for_laziness(config: Config):
    state, _, _ = step_inputs(config)
    for optimizer, interval in ((state.g_opt, 4), (state.d_opt, 16)):
        group, ratio = optimizer.param_groups[0], interval / (interval + 1)
        assert group["lr"] == pytest.approx(config.learning_rate * ratio)
        assert group["betas"] == (0.0, pytest.approx(0.99**ratio))


def test_the_step_size_falls_to_zero_in_the_cooldown(config: Config):
    assert training.schedule(config, 0.99)[0] == config.learning_rate
    cooled = replace(config, cooldown=0.5)
    sizes = [training.schedule(cooled, done)[0] for done in (0, 0.5, 0.75, 1)]
    assert sizes == pytest.approx([0.002, 0.002, 0.001, 0], abs=1e-12)
    state, real, c = step_inputs(cooled)
    state.total, state.cur_nimg = 1024, 768
    train_step(state, real, c, torch.eye(2))
    for optimizer, interval in ((state.g_opt, 4), (state.d_opt, 16)):
        ratio = interval / (interval + 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001 * ratio)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_cooldown_ends_with_the_last_epoch(config: Config, epochs, monkeypatch):
    sizes, step = [], training.train_step

    def recorded(state: TrainingState, *args: torch.Tensor) -> torch.Tensor:
        stats = step(state, *args)
        sizes.append(state.g_opt.param_groups[0]["lr"] * 1.25)
        return stats

    monkeypatch.setattr(training, "train_step", recorded)
    train(replace(config, epochs=epochs, cooldown=1))
    assert len(sizes) == epochs * 4
    expected = [0.001 * (1 + math.cos(math.pi * i / len(sizes))) for i in range(len(sizes))]
    assert sizes == pytest.approx(expected)


def test_the_average_has_the_half_life_asked_for(config: Config):
    state, _, _ = step_inputs(replace(config, ema_kimg=0.04, ema_rampup=1e9))
    state.cur_nimg = 1
    for p, q in zip(state.G.parameters(), state.G_ema.parameters(), strict=True):
        p.data.fill_(1)
        q.data.zero_()
    for _ in range(10):  # 10 steps of 4 images are the half-life of 40
        ema_step(state)
    assert all(torch.allclose(q, torch.tensor(0.5)) for q in state.G_ema.parameters())


def test_the_average_follows_at_once_in_the_beginning(config: Config):
    state, _, _ = step_inputs(replace(config, ema_rampup=0.05))
    for p in state.G.parameters():
        p.data.fill_(1)
    state.cur_nimg = 4
    ema_step(state)
    assert all(torch.allclose(q, torch.ones([]), atol=1e-3) for q in state.G_ema.parameters())


# Runs


def test_a_larger_epochs_continues_the_run_as_if_asked_at_first(trained, trained_once):
    train(replace(trained, epochs=2))
    assert_same_run(trained_once(epochs=2), trained)
    assert [line["epoch"] for line in read_log(trained.out)] == [1, 2]


@pytest.mark.drawn
def test_a_run_leaves_everything_it_promises(config: Config, capsys):
    config = replace(config, augment="ada")  # every statistic has a value in the first step
    train(config)
    names = {str(p.relative_to(config.out)) for p in config.out.rglob("*") if p.is_file()}
    assert {
        "config.json", "log.jsonl", "losses.csv", "losses.png", "curves.png", "progress.png",
        "generator.safetensors", "grids/epoch0001.png", "grids/epoch0002.png",
        "checkpoints/0000000016.pt", "checkpoints/0000000032.pt",
    } <= names  # fmt: skip
    assert any(name.startswith("tensorboard/events") for name in names)
    assert not any(name.endswith(".partial") for name in names)
    grid = Image.open(config.out / "grids" / "epoch0002.png")
    assert grid.mode == "L"
    shape = read_picture(config.out / "grids" / "epoch0002.png").shape
    assert shape == (2 * 96, 8 * 96)  # a row per class, enlarged
    rows, log = read_losses(config.out), read_log(config.out)
    assert rows[:, 0].tolist() == list(range(4, 33, 4))
    assert np.isfinite(rows[0]).all()
    d_loss = rows[4:, 1 + STATS.index("d_loss")]
    assert log[1]["d_loss"] == pytest.approx(d_loss.mean(), rel=1e-6)
    capsys.readouterr()
    train(config)
    assert "a larger --epochs continues it" in capsys.readouterr().out


def test_only_the_newest_checkpoints_are_kept(trained_once):
    assert [p.stem for p in checkpoints(trained_once(epochs=4).out)] == ["0000000048", "0000000064"]


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 0.1), ("img_resolution", 32), ("seed", 7)]
)
def test_a_changed_setting_is_named_before_anything_is_decoded(trained: Config, field, value):
    before = (trained.out / "config.json").read_text()
    decoded = sorted(trained.cache.iterdir())
    with pytest.raises(UserError, match=f"{field} = .*, now {value}"):
        train(replace(trained, **{field: value}))
    assert (trained.out / "config.json").read_text() == before
    assert sorted(trained.cache.iterdir()) == decoded


def test_a_stop_that_comes_at_the_end_of_an_epoch_is_saved(config: Config, monkeypatch):
    end_epoch = training.end_epoch

    def interrupted(*args):
        end_epoch(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "end_epoch", interrupted)
    train(replace(config, epochs=5, checkpoint_kimg=100))
    assert [p.stem for p in checkpoints(config.out)] == ["0000000016"]


def test_a_checkpoint_of_another_resolution_is_refused(trained: Config):
    other = replace(trained, img_resolution=32, out=trained.out.with_name("other"))
    shutil.copytree(trained.out / "checkpoints", other.out / "checkpoints")
    with pytest.raises(UserError, match="img_resolution = 16, now 32"):
        train(other)


def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint(config: Config, monkeypatch):
    step = training.train_step

    def poisoned_step(state, *args):
        if state.cur_nimg == 20:
            state.D.out.bias.data.fill_(math.nan)
        return step(state, *args)

    monkeypatch.setattr(training, "train_step", poisoned_step)
    with pytest.raises(UserError, match=r"g_loss, at image 24.*0000000016.pt"):
        train(config)
    assert [p.stem for p in checkpoints(config.out)] == ["0000000016"]
    state = load_checkpoint(checkpoints(config.out)[-1])
    assert all(v.isfinite().all() for v in state["D"].values())


def test_nan_is_blamed_on_the_penalty_it_arose_in(config: Config, monkeypatch):
    lengths = training.path_lengths
    monkeypatch.setattr(training, "path_lengths", lambda *args: lengths(*args) * math.nan)
    with pytest.raises(UserError, match="path_length, at image 4[.]"):
        train(config)


def test_weights_that_are_not_finite_are_never_saved(config: Config, monkeypatch):
    step = training.train_step

    def poisoned_step(state, *args):
        stats = step(state, *args)
        if state.cur_nimg == 32:
            state.G.synthesis.const.data[0] = math.inf
        return stats

    monkeypatch.setattr(training, "train_step", poisoned_step)
    with pytest.raises(UserError, match="weights of G, at image 32"):
        train(config)
    assert [p.stem for p in checkpoints(config.out)] == ["0000000016"]


def test_output_that_cannot_be_written_is_one_line(config: Config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file is not a folder"):
        train(replace(config, out=tmp_path / "file" / "run"))


def test_a_cache_that_cannot_be_written_is_said_before_the_work(trained, tmp_path, capsys):
    config = replace(trained, epochs=2)  # what is decoded can be read
    decoded = next(config.cache.glob("*.npy"))
    config.cache.rename(tmp_path / "full")
    config.cache.touch()
    with pytest.raises(UserError, match="cannot write to .*cache is not a folder"):
        train(config)
    config.cache.unlink()
    (tmp_path / "full").rename(config.cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, _mode: Path(path) != config.cache)
        train(config)  # needs nothing new of it
        with pytest.raises(UserError, match="cannot write to .*: no permission in .*cache"):
            train(replace(config, out=config.out.with_name("b"), fid_kimg=0.01, fid_images=100))
    assert "training the encoder" not in capsys.readouterr().out and decoded.exists()


def test_an_error_leaves_nothing_behind(config: Config, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        train(replace(config, data_root=tmp_path / "nowhere"))
    assert not config.out.parent.exists() and not config.cache.exists()


def test_a_run_goes_on_after_its_data_moved(trained: Config):
    config, moved = trained, trained.data_root.with_name("moved")
    config.data_root.rename(moved)
    train(replace(config, data_root=moved, epochs=2))
    assert [line["epoch"] for line in read_log(config.out)] == [1, 2]
    assert read_run_config(config.out)[0].data_root == moved


def test_one_class_trains_without_a_condition(config: Config, data_root):
    for split in ("train", "test"):
        for path in (data_root / split / "NC").iterdir():
            path.unlink()
        (data_root / split / "NC").rmdir()
    train(replace(config, epochs=1))
    G, _, classes = load_generator(config.out)
    assert (G.c_dim, classes) == (0, ["AD"])


def test_the_batch_may_be_larger_than_the_data(config: Config):
    train(replace(config, epochs=2, batch_size=24, snapshot_epochs=2))
    assert [(line["epoch"], line["nimg"]) for line in read_log(config.out)] == [(1, 24), (2, 48)]
    assert (config.out / "grids" / "epoch0002.png").exists()


def test_training_learns_the_class_and_the_shape(tmp_path):
    """After 100 steps slices are bright on black, and darker in the centre for the dark class."""
    config = replace(
        Config(**CPU), data_root=write_folder(tmp_path / "data", {"train": 20, "test": 2}),
        out=tmp_path / "run", cache=tmp_path / "cache", device="cpu", img_resolution=16, z_dim=16,
        w_dim=16, channel_base=128, channel_max=16, batch_size=8, epochs=10, augment="none",
        learning_rate=0.01, pl_weight=0, snapshot_epochs=20, checkpoint_kimg=100, fid_kimg=0,
    )  # fmt: skip
    train(config)
    G, _, _ = load_generator(config.out)
    z = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    dark, light = (G(z, torch.eye(2)[[i] * 32], noise_mode="const")[:, 0] for i in range(2))
    assert light[:, 7:9, 7:9].mean() - dark[:, 7:9, 7:9].mean() > 0.3
    assert torch.cat([dark, light])[:, :2, :2].mean() < -0.5 < -0.3 < light[:, 7:9, 7:9].mean()


# The loader


def test_batches_need_no_shared_memory(config: Config, monkeypatch):
    """Containers have 64 MB of it, which eight workers fill at once."""

    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(dataset, "WAIT_SECONDS", 5)
    train(replace(config, num_workers=2, epochs=1))
    assert read_log(config.out)[-1]["nimg"] == 16


SMI = """NVIDIA-SMI version  : 535.104.05
NVML version        : 535.104
DRIVER version      : 535.104.05
CUDA Version        : 12.2
"""


@pytest.mark.parametrize("told", [SMI, ""])
def test_a_gpu_that_this_torch_cannot_use_is_named_with_both_versions(monkeypatch, capsys, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda p, s: [p / "nvidia0"] if "nvidia" in s else glob(p, s))
    done = subprocess.CompletedProcess([], 0, told)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    text = "(driver 535.104.05, for CUDA up to 12.2)" if told else "(driver unknown, for CUDA up to"
    assert training.parse_settings([]).img_resolution == CPU["img_resolution"]
    warned = capsys.readouterr().out
    assert warned.startswith("warning: this machine has an NVIDIA GPU") and text in warned
    assert "is built for CUDA 13.0 and cannot use it" in warned and "small settings" in warned
    with pytest.raises(UserError, match="device = cuda: this machine has an NVIDIA GPU"):
        process.resolve_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    training.parse_settings([])
    assert capsys.readouterr().out == "settings: CPU of config.py\n"
    with pytest.raises(UserError, match="device = cuda: torch .* finds none on this machine"):
        process.resolve_device("cuda")


def test_r1_does_not_rise_in_the_cooldown(config: Config, capsys):
    higher = replace(config, r1_gamma=0.01, r1_gamma_end=0.05)
    with pytest.raises(UserError, match=r"r1_gamma_end = 0.05: above r1_gamma = 0.01: give both"):
        training.prepare(replace(higher, cooldown=0.4))
    capsys.readouterr()
    training.prepare(replace(higher, cooldown=0.0))
    assert "note: r1_gamma_end = 0.05 does nothing without a cooldown" in capsys.readouterr().out


def test_a_batch_without_groups_is_refused(config: Config):
    for size, fits in ((4, True), (5, False), (6, True), (25, False), (9, True), (3, True)):
        given = replace(config, batch_size=size)
        with nullcontext() if fits else pytest.raises(UserError, match="no groups of 2 to 4"):
            training.prepare(given)


def test_other_threads_are_said(config: Config, capsys):
    train(replace(config, epochs=1))
    path = checkpoints(config.out)[-1]
    save_checkpoint(path, load_checkpoint(path) | {"num_threads": 99})
    train(config)
    assert "note: 99 threads before" in capsys.readouterr().out


def test_defaults_edited_in_config_choose_the_settings_too(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Config, "device", "cpu")  # as an edit of config.py does
    monkeypatch.setattr(Config, "init_from", DEMO_GENERATOR)
    assert training.parse_settings([]).img_resolution == 64
    assert "settings: CPU of config.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal: Killed"),
        pytest.param(lambda: time.sleep(60), "timed out after 1 seconds", marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_ends_the_run_with_a_reason_and_what_was_done_is_saved(
    config: Config, monkeypatch, fault, words
):
    get = TrainingSlices.__getitem__

    def item(self, positions):
        if positions[0] == 20:
            fault()
        return get(self, positions)

    monkeypatch.setattr(dataset, "WAIT_SECONDS", 1)
    monkeypatch.setattr(TrainingSlices, "__getitem__", item)
    with pytest.raises(UserError, match=f"(?s)lost a worker: .*{words}.*num_workers = 1: 0 loads"):
        train(replace(config, num_workers=1))
    assert multiprocessing.active_children() == []  # or the process would wait for them at its end
    if "Killed" not in words:  # which may interrupt a step: what it left is not saved
        newest = load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"]
        assert newest == read_losses(config.out)[-1, 0] == 20
    monkeypatch.undo()
    train(config)
    assert [line["nimg"] for line in read_log(config.out)] == [16, 32]


# Files, folders and logs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_second_process_on_the_same_folder_is_refused(config: Config):
    first = replace(config, epochs=10000)
    other = multiprocessing.get_context("fork").Process(target=train, args=(first,))
    other.start()
    while not (config.out / "log.jsonl").exists() or not read_log(config.out):
        assert other.is_alive()
        time.sleep(0.02)
    with pytest.raises(UserError, match="out = .*: another process is training there"):
        train(config)  # of two epochs: it would soon end
    other.kill()
    other.join()
    train(replace(config, epochs=read_log(config.out)[-1]["epoch"] + 1))  # the lock died with it
    nimg = [line["nimg"] for line in read_log(config.out)]
    assert nimg == sorted(set(nimg))
    rows = read_losses(config.out)[:, 0]
    assert rows.tolist() == list(range(4, nimg[-1] + 1, 4))


def test_a_run_that_another_process_moved_on_is_not_overwritten(trained: Config):
    data, words = read_run_config(trained.out)[2], "start the same command again"
    with pytest.raises(UserError, match=f"another process trained there; {words}"):
        runs.start_run(trained, ["AD", "NC"], data, {"cur_nimg": 12})


def test_what_is_shared_can_be_read_by_others(config: Config):
    before = os.umask(0o022)
    try:
        train(replace(config, epochs=1))
    finally:
        os.umask(before)
    for name in ("generator.safetensors", "config.json", "checkpoints/0000000016.pt"):
        assert (config.out / name).stat().st_mode & 0o777 == 0o644, name


def test_an_error_of_reading_says_what_the_system_said(trained: Config, monkeypatch):
    config = trained

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    newest = checkpoints(config.out)[-1]
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="generator.safetensors cannot be read: Permission denied"):
        load_generator(config.out)
    with pytest.raises(UserError, match=f"{newest.name} cannot be read: Permission denied"):
        load_checkpoint(newest)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match="config.json cannot be read: .*Permission denied"):
        read_run_config(config.out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": None}, "config.json cannot be read: "),
        ({"classes": []}, "config.json cannot be read: classes and data must be names"),
        ({"classes": [1, 2]}, "config.json cannot be read: classes and data must be names"),
        ({"settings": {"z_dim": True}}, "config.json cannot be read: z_dim = True: must be int"),
        ({"settings": {"batch_size": "4"}}, "batch_size = 4: must be int"),
        ({"settings": None}, "config.json cannot be read: "),
    ],
)
def test_a_damaged_config_is_named(config: Config, change, words):
    runs.write_run_config(config.out, config, ["AD", "NC"], "data")
    path = config.out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read_run_config(config.out)


def test_a_run_measures_with_its_own_encoder_wherever_it_goes_on(measured: Config, monkeypatch):
    config = replace(measured, epochs=2)
    own = (config.out / "encoder.safetensors").read_bytes()
    real = read_log(config.out)[0]["fid_real"]
    fit = features.fit_encoder
    monkeypatch.setattr(features, "fit_encoder", lambda *args: fit(*args[:3], seed=99))
    train(replace(config, cache=config.cache.with_name("elsewhere")))
    assert (config.out / "encoder.safetensors").read_bytes() == own
    assert [line["fid_real"] for line in read_log(config.out)] == [real, real]


def test_a_lost_log_does_not_cost_the_best_checkpoint(config: Config, monkeypatch):
    values = iter([{"fid": fid, "vary_z": 0.9, "vary_noise": 0.1} for fid in (1, 3, 2, 0.5)])
    monkeypatch.setattr(recorder.Measurements, "measure", lambda *_: next(values))
    config = replace(config, fid_kimg=0.001, fid_images=100)
    train(replace(config, epochs=1))
    (config.out / "log.jsonl").unlink()
    train(replace(config, epochs=2))  # its first line is made again, and measured, as 3
    assert load_checkpoint(config.out / "best.pt")["cur_nimg"] == 16
    train(replace(config, epochs=3))
    assert load_checkpoint(config.out / "best.pt")["cur_nimg"] == 48


# Command line


def test_the_command_line_prints_its_settings_and_one_line_for_an_error(
    config: Config, tmp_path, monkeypatch, capsys, command
):
    done = run_train(*as_flags(replace(config, epochs=1)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epochs=1" in done.stdout and "learning_rate=0.002" in done.stdout
    assert "Traceback" not in done.stderr
    monkeypatch.chdir(tmp_path)
    assert command("--epochs", "0") == 2
    assert "epochs = 0: must be int, 1 to" in capsys.readouterr().err
    assert command("--data-root", "nowhere") == 2
    assert capsys.readouterr().err.strip() == "error: data_root = nowhere: no such folder"
    assert not (tmp_path / "runs" / "default").exists()


def test_settings_follow_the_device():
    assert training.parse_settings([]) == Config(**(GPU if torch.cuda.is_available() else CPU))
    assert training.parse_settings(["--device", "cpu"]) == Config(**CPU, device="cpu")
    assert training.parse_settings(["--device", "cuda"]) == Config(**GPU, device="cuda")


def test_every_setting_is_saved_as_a_plain_value(config: Config):
    state = TrainingState(config, 2, torch.device("cpu")).state_dict()
    assert state["settings"].keys() == asdict(config).keys()
    assert all(isinstance(v, str | int | float | None) for v in state["settings"].values())


def test_a_run_ends_with_a_card_that_the_user_may_keep_as_their_own(
    config: Config, data_root: Path, capsys, monkeypatch
):
    config = replace(config, epochs=1, data_root=data_root, fid_kimg=0)
    train(config)
    out, card = capsys.readouterr().out, config.out / "README.md"
    assert "The distance to real slices is not measured yet." in out
    assert f"figures: python predict.py --checkpoint {config.out}" in out
    text = card.read_text()
    assert "16 x 16 pixels, trained on 16 slices of 8\nparticipants for 16 images" in text
    assert str(data_root) not in text and "epochs = 1" in text and "| not measured | |" in text
    monkeypatch.chdir(ROOT)
    code = (
        text.split("```python\n")[1]
        .split("```")[0]
        .replace("FOLDER OF THIS FILE", str(card.parent))
    )
    names: dict = {}
    exec(code, names)
    assert names["image"].shape == (1, 1, 16, 16) and names["classes"] == ["AD", "NC"]
    train(replace(config, epochs=2))
    assert "for 32 images" in card.read_text()
    card.write_text(card.read_text().partition("\n")[2] + "Licence: ours\n")
    train(replace(config, epochs=3))
    assert "for 32 images" in card.read_text() and "Licence: ours" in card.read_text()


def test_fewer_epochs_than_are_trained_are_refused_and_change_nothing(trained: Config):
    train(replace(trained, epochs=2))
    before = {p: p.read_bytes() for p in trained.out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="epochs = 1: .* has trained 2.0 epochs already"):
        train(replace(trained, epochs=1))
    assert {p: p.read_bytes() for p in trained.out.rglob("*") if p.is_file()} == before


def test_other_data_is_named_before_the_epochs(trained: Config, tmp_path: Path):
    train(replace(trained, epochs=4))
    fewer = write_folder(tmp_path / "fewer", {"train": 2, "test": 2})
    with pytest.raises(UserError, match="was trained on other data"):
        train(replace(trained, epochs=4, data_root=fewer))


def test_a_finished_run_goes_on_without_its_logs(measured: Config):
    for name in ("losses.csv", "log.jsonl"):
        (measured.out / name).unlink()
    train(replace(measured, epochs=2))
    first, second = read_log(measured.out)
    assert "img_per_s" not in first and first["d_loss"] is None and second["img_per_s"] > 0
    assert json.loads((measured.out / "log.jsonl").read_text().splitlines()[0]) == first


def test_a_misspelt_setting_in_config_py_is_one_line(monkeypatch):
    monkeypatch.setitem(training.CPU, "batch_sise", 8)
    with pytest.raises(UserError, match="config.py: CPU or GPU names no setting 'batch_sise'"):
        training.parse_settings(["--device", "cpu"])
