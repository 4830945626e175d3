"""Train StyleGAN2 on brain slices, conditional on the class.

    python train.py                                  # demo brains; small settings without a GPU
    python train.py --data-root AD_NC --out runs/adni
    python train.py --epochs 200                     # goes on where the run ended

The same command resumes a run that was stopped. Settings and their defaults: config.py or --help.
On two cores of a shared AMD EPYC server the default run shows 22,400 demo slices to D in
6 min 42 s. On a GPU it is not yet measured, and no quality metric is reported yet.

References:
    [1] Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN, arXiv:1912.04958
    [2] Goodfellow et al. 2014, Generative Adversarial Nets, arXiv:1406.2661
    [3] Mescheder et al. 2018, Which Training Methods for GANs do actually Converge?,
        arXiv:1801.04406
    [4] Karras et al. 2018, Progressive Growing of GANs, arXiv:1710.10196
"""

import argparse
import copy
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import CPU, GPU, Config, UserError
from dataset import Slices, load_slices, make_loader
from modules import Discriminator, Generator, SynthesisNetwork
from utils import (
    STATS,
    append_losses,
    cut_logs,
    ensure_writable,
    load_checkpoint,
    one_hot,
    plain_settings,
    plot_losses,
    plot_progress,
    read_log,
    read_losses,
    read_run_config,
    resolve_device,
    run_command,
    save_generator,
    save_grey,
    stream_seed,
    tile,
    to_uint8,
    write_atomically,
    write_run_config,
)

# Settings that say where and how long a run goes, not what it learns
FREE_TO_CHANGE = ("epochs", "out", "cache", "data_root", "device", "num_workers")
FLUSH_STEPS = 50  # steps from one look at the losses, which waits for the device, to the next
KEPT_CHECKPOINTS = 2
GRID_COLUMNS = 8


# Losses


def r1_penalty(D: Discriminator, real: Tensor, c: Tensor) -> Tensor:
    """Squared gradient norm of D at each real image ([3], section 4.1). [N, C, H, W] -> [N]."""
    gradient = torch.func.grad(lambda img: D(img, c).sum())(real)
    return gradient.square().sum((1, 2, 3))


def path_lengths(synthesis: SynthesisNetwork, ws: Tensor) -> Tensor:
    """How far an image moves when its w does ([1], section 3.2): |J^T y|, y random. -> [N].

    The mean over layers makes it independent of their number.
    """

    def projection(ws: Tensor) -> Tensor:
        img = synthesis(ws)
        return (img * torch.randn_like(img)).sum() / math.sqrt(img.shape[2] * img.shape[3])

    gradient = torch.func.grad(projection)(ws)  # [N, num_ws, w_dim]
    return gradient.square().sum(2).mean(1).sqrt()


def mixed_ws(G: Generator, z: Tensor, c: Tensor, style_mixing_prob: float) -> Tensor:
    """ws [N, num_ws, w_dim]; a share of the images swaps to a second latent at some layer."""
    ws = G.mapping(z, c)
    N, num_ws, _ = ws.shape
    cutoff = torch.randint(1, num_ws, [N, 1], device=z.device)
    keep = torch.rand([N, 1], device=z.device) >= style_mixing_prob
    first = (torch.arange(num_ws, device=z.device) < cutoff) | keep  # [N, num_ws]
    return torch.where(first[:, :, None], ws, G.mapping(torch.randn_like(z), c))


# State


class TrainingState:
    """Everything that changes while training: what a checkpoint holds."""

    PARTS = ("G", "D", "G_ema", "g_opt", "d_opt")

    def __init__(self, config: Config, c_dim: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        like_conv = {"device": device, "memory_format": torch.channels_last}
        self.config, self.device = config, device
        self.G = Generator(config, c_dim).to(**like_conv)
        self.D = Discriminator(config, c_dim).to(**like_conv)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.g_opt = lazy_adam(self.G, config.learning_rate, config.pl_interval)
        self.d_opt = lazy_adam(self.D, config.learning_rate, config.r1_interval)
        self.pl_mean = torch.zeros([], device=device)
        self.cur_nimg = 0

    def state_dict(self) -> dict[str, Any]:
        """All state, of plain tensors and values."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        settings = plain_settings(self.config)
        return parts | {"pl_mean": self.pl_mean, "cur_nimg": self.cur_nimg, "settings": settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over all state."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.pl_mean.copy_(state["pl_mean"])
        self.cur_nimg = state["cur_nimg"]


def lazy_adam(net: torch.nn.Module, learning_rate: float, interval: int) -> torch.optim.Adam:
    """Adam, corrected for its extra step every `interval` steps, for a penalty ([1], app. B)."""
    ratio = interval / (interval + 1)
    return torch.optim.Adam(net.parameters(), learning_rate * ratio, (0.0, 0.99**ratio), eps=1e-8)


# Steps


def d_step(
    state: TrainingState, real: Tensor, c: Tensor, c_fake: Tensor, lazy: bool
) -> dict[str, Tensor]:
    """Update D for the logistic loss ([2]), and with `lazy` once more for the R1 penalty."""
    config, D = state.config, state.D
    with torch.no_grad():
        z = torch.randn(len(real), config.z_dim, device=real.device)
        fake = state.G.synthesis(mixed_ws(state.G, z, c_fake, config.style_mixing_prob))
    real_logits, fake_logits = D(real, c), D(fake, c_fake)
    loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    loss.backward()
    update(state.d_opt)
    stats = {"d_loss": loss, "real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}
    if lazy:
        gamma = config.r1_gamma
        if gamma is None:
            gamma = 0.0002 * config.img_resolution**2 / config.batch_size
        stats["r1"] = r1_penalty(D, real, c).mean()
        (stats["r1"] * (gamma / 2 * config.r1_interval)).backward()
        update(state.d_opt)
    return {name: value.detach() for name, value in stats.items()}


def g_step(state: TrainingState, c_fake: Tensor, lazy: bool) -> dict[str, Tensor]:
    """Update G for the non-saturating loss ([2]), and with `lazy` for the path lengths."""
    config, G = state.config, state.G
    state.D.requires_grad_(False)
    z = torch.randn(len(c_fake), config.z_dim, device=state.device)
    fake = G.synthesis(mixed_ws(G, z, c_fake, config.style_mixing_prob))
    loss = F.softplus(-state.D(fake, c_fake)).mean()
    loss.backward()
    update(state.g_opt)
    state.D.requires_grad_(True)
    stats = {"g_loss": loss}
    if lazy:
        half = max(1, len(z) // 2)
        ws = mixed_ws(G, torch.randn_like(z[:half]), c_fake[:half], config.style_mixing_prob)
        lengths = path_lengths(G.synthesis, ws)
        state.pl_mean.lerp_(lengths.detach().mean(), config.pl_decay)
        penalty = (lengths - state.pl_mean).square().mean()
        (penalty * (config.pl_weight * config.pl_interval)).backward()
        update(state.g_opt)
        stats["path_length"] = lengths.mean()
    return {name: value.detach() for name, value in stats.items()}


def update(optimizer: torch.optim.Optimizer) -> None:
    """Step and forget the gradients."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def ema_step(state: TrainingState) -> None:
    """Draw G_ema towards G ([4], appendix A); the half-life grows with the images seen early on."""
    config = state.config
    ema_kimg = config.batch_size * 10 / 32 if config.ema_kimg is None else config.ema_kimg
    half_life = min(ema_kimg * 1000, state.cur_nimg * config.ema_rampup)
    weight = 1 - 0.5 ** (config.batch_size / max(half_life, 1e-8))
    torch._foreach_lerp_(list(state.G_ema.parameters()), list(state.G.parameters()), weight)


def train_step(state: TrainingState, real: Tensor, c: Tensor, label_pool: Tensor) -> Tensor:
    """One step of both networks, on its own random stream. -> [len(STATS)], NaN if not due."""
    config, step = state.config, state.cur_nimg // state.config.batch_size
    torch.manual_seed(stream_seed("step", config.seed, state.cur_nimg))
    drawn = torch.randint(len(label_pool), [2, len(real)])
    c_d, c_g = label_pool[drawn].to(real.device)  # each [N, c_dim]
    stats = g_step(state, c_g, config.pl_weight > 0 and step % config.pl_interval == 0)
    stats |= d_step(state, real, c, c_d, step % config.r1_interval == 0)
    state.cur_nimg += len(real)
    ema_step(state)
    missing = torch.tensor(math.nan, device=real.device)
    return torch.stack([stats.get(name, missing) for name in STATS])


# Run folder


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("*.pt"))


def require_same(saved: dict[str, Any], config: Config, source: Path) -> None:
    """Raises UserError that names every setting that differs, but for those free to change."""
    wanted = plain_settings(config)
    names = [n for n in wanted if n not in FREE_TO_CHANGE and saved.get(n, wanted[n]) != wanted[n]]
    if names:
        changed = "; ".join(f"{n} = {saved[n]}, now {wanted[n]}" for n in names)
        raise UserError(f"{source} was trained with {changed}; use another --out")


def open_run(config: Config) -> dict[str, Any] | None:
    """The last checkpoint of a run, if there is one of the same settings. Writes nothing."""
    ensure_writable(config.out)
    if (config.out / "config.json").exists():
        require_same(plain_settings(read_run_config(config.out)[0]), config, config.out)
    if not (found := checkpoints(config.out)):
        return None
    state = load_checkpoint(found[-1])
    require_same(state["settings"], config, found[-1])
    return state


def start_run(config: Config, classes: list[str], data: str) -> None:
    """Write config.json. Raises UserError if the run was trained on other data."""
    if (config.out / "config.json").exists():
        if read_run_config(config.out)[1:] != (classes, data):
            raise UserError(f"{config.out} was trained on other data; use another --out")
    write_run_config(config.out, config, classes, data)


def save_run(state: TrainingState) -> None:
    """Write a checkpoint and the generator; keep the newest few checkpoints.

    Raises:
        UserError: weights that are not finite; the last good checkpoint stays.
    """
    run = state.config.out
    for name in ("G", "D", "G_ema"):
        if not all(p.isfinite().all() for p in getattr(state, name).parameters()):
            raise diverged(state, f"the weights of {name}", state.cur_nimg)
    state.G_ema.mapping.estimate_w_avg()
    path = run / "checkpoints" / f"{state.cur_nimg:010d}.pt"
    write_atomically(path, lambda partial: torch.save(state.state_dict(), partial))
    save_generator(run, state.G_ema)
    for old in checkpoints(run)[:-KEPT_CHECKPOINTS]:
        old.unlink()


def diverged(state: TrainingState, where: str, nimg: float) -> UserError:
    """The error that ends a run whose numbers are no longer finite."""
    last = checkpoints(state.config.out)
    advice = "lower --learning-rate or raise --r1-gamma, in another --out"
    return UserError(
        f"not a finite number: {where}, at image {nimg:,.0f}. "
        f"Last good checkpoint: {last[-1] if last else 'none yet'}. What helps: {advice}"
    )


def penalties_due(config: Config, nimg: int) -> list[bool]:
    """Which of STATS the step that ended at `nimg` must have."""
    step = nimg // config.batch_size - 1
    lazy = {
        "r1": step % config.r1_interval == 0,
        "path_length": config.pl_weight > 0 and step % config.pl_interval == 0,
    }
    return [lazy.get(name, True) for name in STATS]


class Recorder:
    """Writes what a run says of itself: losses.csv, log.jsonl, TensorBoard, grids and plots."""

    def __init__(self, state: TrainingState, slices: Slices) -> None:
        self.state, self.run = state, state.config.out
        self.pending: list[tuple[int, Tensor]] = []  # (cur_nimg, statistics) not yet written
        rng = torch.Generator().manual_seed(stream_seed("grid", state.config.seed))
        z = torch.randn(1, GRID_COLUMNS, state.config.z_dim, generator=rng)
        num_rows = len(slices.classes)  # every class shows the same latents
        self.z = z.expand(num_rows, -1, -1).flatten(0, 1).to(state.device)
        self.c = one_hot(np.arange(num_rows).repeat(GRID_COLUMNS), slices.c_dim).to(state.device)
        cut_logs(self.run, state.cur_nimg)
        self.board = SummaryWriter(self.run / "tensorboard", purge_step=state.cur_nimg + 1)
        self.started, self.started_nimg = time.perf_counter(), state.cur_nimg

    def flush(self) -> dict[str, float]:
        """Write the waiting rows of losses.csv. Raises UserError at a number that is not finite."""
        if not self.pending:
            return {}
        nimg, stats = zip(*self.pending, strict=True)
        values = torch.stack(stats).cpu().double().numpy()
        self.pending = []
        append_losses(self.run, np.column_stack([nimg, values]))
        due = np.stack([penalties_due(self.state.config, n) for n in nimg])
        for row, column in np.argwhere(np.isinf(values) | (np.isnan(values) & due)):
            raise diverged(self.state, STATS[column], nimg[row])
        return dict(zip(STATS, values[-1], strict=True))

    def end_epoch(self, epoch: int) -> None:
        """One line in log.jsonl, the same as TensorBoard scalars, and the grid when due."""
        self.flush()
        rows, nimg = read_losses(self.run), self.state.cur_nimg
        rows = rows[rows[:, 0] > max((line["nimg"] for line in read_log(self.run)), default=0)]
        seconds = time.perf_counter() - self.started
        speed = (nimg - self.started_nimg) / seconds
        line = {
            "epoch": epoch,
            "nimg": nimg,
            "seconds": round(seconds, 2),
            "img_per_s": round(speed, 2),
        }
        for name, column in zip(STATS, rows.T[1:], strict=True):
            line[name] = float(np.nanmean(column)) if np.isfinite(column).any() else None
        line["pl_mean"] = self.state.pl_mean.item()
        with open(self.run / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if value is not None:
                self.board.add_scalar(name, value, nimg)
        self.started, self.started_nimg = time.perf_counter(), nimg
        config = self.state.config
        if epoch % config.snapshot_epochs == 0 or epoch == config.epochs:
            self.save_grid(epoch)

    @torch.no_grad()
    def save_grid(self, epoch: int) -> None:
        """The same latents at every epoch, a row per class."""
        fake = [
            self.state.G_ema(z, c, noise_mode="const")
            for z, c in zip(self.z.split(GRID_COLUMNS), self.c.split(GRID_COLUMNS), strict=True)
        ]
        picture = tile(to_uint8(torch.cat(fake)), GRID_COLUMNS)
        save_grey(picture, self.run / "grids" / f"epoch{epoch:04d}.png")
        self.board.add_image("grid", picture, self.state.cur_nimg, dataformats="HW")

    def close(self) -> None:
        """Draw the plots of the run so far."""
        self.board.close()
        plot_losses(self.run, self.run / "losses.png")
        plot_progress(self.run, self.run / "progress.png")


class StopRequest:
    """Context in which Ctrl-C or SIGTERM asks the loop to end after its step; a second kills."""

    def __enter__(self) -> "StopRequest":
        self.name = ""
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# Loop


def train(config: Config) -> None:
    """Train to `config.epochs`, or until asked to stop. Raises UserError for bad input or NaN."""
    device = resolve_device(config.device)
    saved = open_run(config)
    splits, data = load_slices(config)
    slices = splits["train"]
    start_run(config, slices.classes, data)

    state = TrainingState(config, slices.c_dim, device)
    if saved is not None:
        state.load_state_dict(saved)
        print(f"resuming {config.out} at {state.cur_nimg:,} images")
    if not slices.c_dim:
        print(f"one class, {slices.classes[0]}: training without a condition")
    n, batch = len(slices.images), config.batch_size
    total = math.ceil(config.epochs * n / batch) * batch
    recorder = Recorder(state, slices)
    if state.cur_nimg >= total:
        recorder.close()
        print(f"{config.out} has its {config.epochs} epochs; a larger --epochs continues it")
        return

    label_pool = one_hot(slices.labels, slices.c_dim)
    cuda = device.type == "cuda"
    loader = make_loader(slices, config, state.cur_nimg, total, cuda)
    pace = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file needs no thousands of lines
    bar = tqdm(total=total, initial=state.cur_nimg, unit="img", mininterval=pace, smoothing=0.05)
    with StopRequest() as stop, bar:
        try:
            for real, c in loader:
                epoch = state.cur_nimg // n + 1
                bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
                real, c = real.to(device, non_blocking=cuda), c.to(device, non_blocking=cuda)
                stats = train_step(state, real, c, label_pool)
                recorder.pending.append((state.cur_nimg, stats))
                bar.update(batch)

                if len(recorder.pending) == FLUSH_STEPS:
                    last = recorder.flush()
                    bar.set_postfix({k: f"{last[k]:.2f}" for k in ("d_loss", "g_loss")})
                ended = state.cur_nimg >= epoch * n
                if ended:
                    recorder.end_epoch(epoch)
                stopping = bool(stop.name)  # read once: a signal may come at any time
                if (
                    stopping
                    or state.cur_nimg == total
                    or (ended and epoch % config.checkpoint_epochs == 0)
                ):
                    recorder.flush()
                    save_run(state)
                if stopping:
                    break
        finally:
            recorder.close()
    end = f"stopped by {stop.name}; the same command resumes" if stop.name else "done"
    print(f"{end}: {state.cur_nimg:,} images, {config.out}")


def parse_settings(args: list[str] | None = None) -> Config:
    """Settings from the command line over the named ones for the device: GPU for CUDA, else CPU."""
    device = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    device.add_argument("--device", default="auto")
    name = device.parse_known_args(args)[0].device
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return tyro.cli(
        Config, default=Config(**(GPU if cuda else CPU)), args=args, description=__doc__
    )


def main() -> None:
    """Command line of this module."""
    config = parse_settings()
    if config.data_root is None:
        print("No data_root: training on the built-in demo brains (synthetic, template-derived)")
    print(" ".join(f"{name}={value}" for name, value in asdict(config).items()))
    train(config)


if __name__ == "__main__":
    run_command(main)
