"""Train StyleGAN2 on brain slices, conditional on the class.

    python train.py                                  # demo brains; small settings without a GPU
    python train.py --data-root AD_NC --out runs/adni
    python train.py --epochs 200                     # goes on where the run ended
    python train.py --diagnose runs/adni             # what looks wrong in a run, and what to try
    torchrun --nproc-per-node=4 train.py --data-root AD_NC --out runs/adni    # four GPUs

The same command resumes a run that was stopped. Settings and their defaults: config.py or --help.
On two cores of an AMD EPYC server the default run shows 25,600 demo slices to D in 8 min 32 s, or 9
min 48 s with one of them busy, demo brains and figures included. On a GPU it is not yet measured.

References:
    [1] Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN, arXiv:1912.04958
    [2] Goodfellow et al. 2014, Generative Adversarial Nets, arXiv:1406.2661
    [3] Mescheder et al. 2018, Which Training Methods for GANs do actually Converge?,
        arXiv:1801.04406
    [4] Karras et al. 2018, Progressive Growing of GANs, arXiv:1710.10196
    [5] Shahbazi et al. 2022, Collapse by Conditioning, arXiv:2201.06578
"""

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import CPU, GPU, Config, UserError
from dataset import Slices, load_slices, make_loader, normalize
from evaluation.features import INCEPTION, find_weights
from modules import MEMORY_FORMAT, Discriminator, Generator, SynthesisNetwork
from training import logs, process, runs
from training.diagnosis import diagnose, plot_curves
from training.recorder import FLUSH_STEPS, Measurements, Recorder
from utils import (
    first_line,
    num_ranks,
    print_once,
    rank,
    run_command,
    stream_seed,
    write_atomically,
)

KEPT_CHECKPOINTS = 2


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
    both = G.mapping(torch.cat([z, torch.randn_like(z)]), torch.cat([c, c]))
    first, second = both.chunk(2)  # each [N, num_ws, w_dim]
    N, num_ws, _ = first.shape
    cutoff = torch.randint(1, num_ws, [N, 1], device=z.device)
    keep = torch.rand([N, 1], device=z.device) >= style_mixing_prob
    from_first = (torch.arange(num_ws, device=z.device) < cutoff) | keep  # [N, num_ws]
    return torch.where(from_first[:, :, None], first, second)


# Phases: each is one loss, with its weight, and what to record of it

Loss = tuple[Tensor, dict[str, Tensor]]


def g_main(G: Generator, D: Discriminator, c: Tensor, config: Config) -> Loss:
    """Non-saturating loss of G ([2])."""
    z = torch.randn(len(c), config.z_dim, device=c.device)
    fake = G.synthesis(mixed_ws(G, z, c, config.style_mixing_prob))
    loss = F.softplus(-D(D.augment(fake), c)).mean()
    return loss, {"g_loss": loss}


def g_path(G: Generator, c: Tensor, pl_mean: Tensor, config: Config) -> Loss:
    """Path length penalty ([1], section 3.2), and the running mean it draws lengths to."""
    z = torch.randn(len(c), config.z_dim, device=c.device)
    lengths = path_lengths(G.synthesis, mixed_ws(G, z, c, config.style_mixing_prob))
    pl_mean = pl_mean.lerp(lengths.detach().mean(), config.pl_decay)
    penalty = (lengths - pl_mean).square().mean()
    stats = {"path_length": lengths.mean(), "pl_mean": pl_mean}
    return penalty * (config.pl_weight * config.pl_interval), stats


def d_main(
    G: Generator, D: Discriminator, real: Tensor, c: Tensor, c_fake: Tensor, config: Config
) -> Loss:
    """Logistic loss of D ([2])."""
    with torch.no_grad():
        z = torch.randn(len(real), config.z_dim, device=real.device)
        fake = G.synthesis(mixed_ws(G, z, c_fake, config.style_mixing_prob))
    both = D.augment(torch.cat([real, fake]))
    real_logits, fake_logits = D(both, torch.cat([c, c_fake]), batches=2).chunk(2)
    loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    stats = {"d_loss": loss}
    for name, logits in (("real", real_logits), ("fake", fake_logits)):
        stats |= {f"{name}_logit": logits.mean(), f"{name}_sign": logits.sign().mean()}
    return loss, stats


def d_r1(D: Discriminator, real: Tensor, c: Tensor, config: Config) -> Loss:
    """R1 penalty ([3]), at what D sees."""
    gamma = config.r1_gamma
    if gamma is None:
        gamma = 0.0002 * config.img_resolution**2 / config.batch_size
    penalty = r1_penalty(D, D.augment(real), c).mean()
    return penalty * (gamma / 2 * config.r1_interval), {"r1": penalty}


PHASES = (g_main, g_path, d_main, d_r1)


class Phases:
    """Runs a phase, compiled into one graph forward and one backward, or as it is.

    `mode` is that of config.compile. Each phase is compiled at its first call, which says so. Where
    something cannot be compiled, a warning says why, once, and all phases run as they are.
    """

    def __init__(self, mode: str) -> None:
        self.graphs = mode == "graphs"
        options = {"fullgraph": True, "mode": "reduce-overhead" if self.graphs else None}
        chosen = () if mode == "off" else PHASES
        self.proven: set[Callable] = set()  # those that ran once
        self.compiled = {phase: torch.compile(phase, dynamic=False, **options) for phase in chosen}

    def __call__(
        self, phase: Callable, optimizer: torch.optim.Adam, seed: int, *args: Any
    ) -> dict[str, Tensor]:
        """One update by a phase, on its own random stream. -> its statistics over all ranks."""
        if phase in self.compiled and phase not in self.proven:
            stats = self.first_call(phase, optimizer, seed, *args)
        else:
            stats = self.backward(phase, seed, *args)
        parameters = optimizer.param_groups[0]["params"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        process.average_over_ranks(gradients + list(stats.values()))
        stats[f"{phase.__name__}_grad"] = torch.nn.utils.get_total_norm(gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return stats

    def first_call(
        self, phase: Callable, optimizer: torch.optim.Adam, seed: int, *args: Any
    ) -> dict[str, Tensor]:
        """`backward` of a phase that it compiles, which may take minutes. Raises Stopped."""
        print_once(f"compiling {phase.__name__} ...")
        started = time.perf_counter()
        try:
            with process.STOP.waiting(False):
                stats = self.backward(phase, seed, *args)
            print_once(f"compiled {phase.__name__} in {time.perf_counter() - started:.0f} s")
        except Exception as error:  # the compiler's are of many types
            print_once(
                f"warning: {phase.__name__} cannot be compiled, without: {first_line(error)}"
            )
            self.compiled = {}
            optimizer.zero_grad(set_to_none=True)
            stats = self.backward(phase, seed, *args)
        self.proven.add(phase)
        return stats

    def backward(self, phase: Callable, seed: int, *args: Any) -> dict[str, Tensor]:
        """Leave the gradients of a phase in the parameters. -> its statistics."""
        torch.manual_seed(seed)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what earlier graphs returned is used up
        loss, stats = self.compiled.get(phase, phase)(*args)
        loss.backward()
        return {name: value.detach().clone() for name, value in stats.items()}


# State


class TrainingState:
    """Everything that changes while training: what a checkpoint holds."""

    PARTS = ("G", "D", "G_ema", "g_opt", "d_opt")

    def __init__(self, config: Config, c_dim: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        like_conv = {"device": device, "memory_format": MEMORY_FORMAT}
        dtype = process.feature_dtype(config, device)
        self.config, self.device = config, device
        self.G = Generator(config, c_dim, dtype=dtype).to(**like_conv)
        self.D = Discriminator(config, c_dim, dtype=dtype).to(**like_conv)
        self.G_ema = Generator(config, c_dim).to(**like_conv).eval().requires_grad_(False)
        self.G_ema.load_state_dict(self.G.state_dict())
        self.g_opt = lazy_adam(self.G, config.learning_rate, config.pl_interval)
        self.d_opt = lazy_adam(self.D, config.learning_rate, config.r1_interval)
        self.pl_mean = torch.zeros([], device=device)
        self.cur_nimg, self.best_fid = 0, math.inf
        auto = "on" if device.type == "cuda" else "off"
        mode = auto if config.compile == "auto" else config.compile
        self.phases = Phases(mode)
        print_once(f"computing on {device} in {str(dtype).removeprefix('torch.')}, compile {mode}")

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return state | {
            "pl_mean": self.pl_mean,
            "cur_nimg": self.cur_nimg,
            "best_fid": self.best_fid,
            "num_ranks": num_ranks(),
            "settings": runs.plain_settings(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        try:
            for name in ("g_opt", "d_opt"):  # those of earlier versions were not fused
                state[name]["param_groups"][0]["fused"] = True
            for name in self.PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.pl_mean.copy_(state["pl_mean"])
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            run = self.config.out
            raise UserError(f"{run}: its checkpoint does not fit: {first_line(error)}") from error
        self.cur_nimg = state["cur_nimg"]
        self.best_fid = state.get("best_fid", math.inf)  # earlier versions did not keep it


def lazy_adam(net: torch.nn.Module, learning_rate: float, interval: int) -> torch.optim.Adam:
    """Adam, corrected for its extra step every `interval` steps, for a penalty ([1], app. B)."""
    ratio = interval / (interval + 1)
    betas = (0.0, 0.99**ratio)
    return torch.optim.Adam(net.parameters(), learning_rate * ratio, betas, eps=1e-8, fused=True)


# Step


@torch.no_grad()
def ema_step(state: TrainingState) -> None:
    """Draw G_ema towards G ([4], appendix A); the half-life grows with the images seen early on."""
    config = state.config
    ema_kimg = config.batch_size * 10 / 32 if config.ema_kimg is None else config.ema_kimg
    half_life = min(ema_kimg * 1000, state.cur_nimg * config.ema_rampup)
    weight = 1 - 0.5 ** (config.batch_size / max(half_life, 1e-8))
    torch._foreach_lerp_(list(state.G_ema.parameters()), list(state.G.parameters()), weight)


def label_weight(config: Config, nimg: int) -> float:
    """How much labels count at image `nimg`: from 0 up to 1 over `label_ramp_kimg` ([5])."""
    return min(1, nimg / (config.label_ramp_kimg * 1000)) if config.label_ramp_kimg else 1


def train_step(state: TrainingState, real: Tensor, c: Tensor, label_pool: Tensor) -> Tensor:
    """One step of both networks on this rank's share of a batch, waiting for no device.

    Args:
        state: moved on by one step, whose random numbers depend on (seed, rank, cur_nimg) only.
        real: [N, C, H, W] in [-1, 1].
        c: [N, c_dim].
        label_pool: [n, c_dim], the training labels: those of fakes are drawn from it.

    Returns:
        [len(STATS)], NaN where a penalty was not due.
    """
    config, G, D = state.config, state.G, state.D
    N, due = len(real), logs.due_statistics(config, state.cur_nimg)

    def run(phase: Callable, optimizer: torch.optim.Adam, *args: Any) -> dict[str, Tensor]:
        seed = stream_seed(phase.__name__, config.seed, rank(), state.cur_nimg)
        return state.phases(phase, optimizer, seed, *args, config)

    torch.manual_seed(stream_seed("labels", config.seed, rank(), state.cur_nimg))
    drawn = torch.randint(len(label_pool), [3, N], device=real.device)
    labels = torch.cat([label_pool[drawn], c[None]]) * label_weight(config, state.cur_nimg)
    c_g, c_path, c_d, c = labels  # each [N, c_dim]
    D.requires_grad_(False)
    stats = run(g_main, state.g_opt, G, D, c_g)
    D.requires_grad_(True)
    if due["path_length"]:
        stats |= run(g_path, state.g_opt, G, c_path[: max(1, N // 2)], state.pl_mean)
        state.pl_mean = stats.pop("pl_mean")
    stats |= run(d_main, state.d_opt, G, D, real, c, c_d)
    if due["r1"]:
        stats |= run(d_r1, state.d_opt, D, real, c)
    state.cur_nimg += config.batch_size
    ema_step(state)
    if config.augment == "ada":
        D.augment.adapt(stats["real_sign"], state.cur_nimg)
        stats["ada_p"] = D.augment.p.clone()
    missing = torch.full([], math.nan, device=real.device)
    return torch.stack([stats.get(name, missing) for name in logs.STATS])


def write_checkpoint(state: TrainingState, path: Path) -> None:
    """Raises UserError for weights that are not finite; the last good checkpoint stays."""
    for name in ("G", "D", "G_ema"):
        if not all(p.isfinite().all() for p in getattr(state, name).parameters()):
            raise diverged(state, f"the weights of {name}", state.cur_nimg)
    state.G_ema.mapping.estimate_w_avg()
    write_atomically(path, lambda partial: torch.save(state.state_dict(), partial))


def save_run(state: TrainingState) -> None:
    """Write a checkpoint and the generator; keep the newest few checkpoints."""
    run = state.config.out
    write_checkpoint(state, run / "checkpoints" / f"{state.cur_nimg:010d}.pt")
    runs.save_generator(run, state.G_ema, state.cur_nimg)
    for old in runs.checkpoints(run)[:-KEPT_CHECKPOINTS]:
        old.unlink()


def diverged(state: TrainingState, where: str, nimg: float) -> UserError:
    """The error that ends a run whose numbers are no longer finite."""
    last = runs.checkpoints(state.config.out)
    advice = "lower --learning-rate or raise --r1-gamma, in another --out"
    return UserError(
        f"not a finite number: {where}, at image {nimg:,.0f}. "
        f"Last good checkpoint: {last[-1] if last else 'none yet'}. What helps: {advice}"
    )


# Loop


def batches(
    loader: DataLoader, recorder: Recorder, label_pool: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader on the device, clocking how long this rank waits for them.

    A GPU is at most two steps behind, so that what is waited for is what it lacks.

    Args:
        label_pool: those of all training slices [n, c_dim], on the device.

    Yields:
        images [N, 1, R, R] in [-1, 1] and labels [N, c_dim].
    """
    device = label_pool.device
    iterator = iter(loader)
    steps: deque[torch.cuda.Event] = deque()
    recorder.start_clock()
    while True:
        if len(steps) == 2:
            steps.popleft().synchronize()
        asked = time.perf_counter()
        try:
            with process.STOP.waiting(num_ranks() > 1):  # many ranks end after the same step
                batch = next(iterator, None)
        except process.Stopped:
            return
        recorder.waited += time.perf_counter() - asked
        if batch is None:
            return
        images, rows = (torch.from_numpy(part) for part in batch)
        if device.type == "cuda":
            images, rows = images.pin_memory(), rows.pin_memory()
        images, rows = (part.to(device, non_blocking=True) for part in (images, rows))
        yield normalize(images), label_pool[rows]
        if device.type == "cuda":
            steps.append(torch.cuda.Event())
            steps[-1].record()


def write_losses(state: TrainingState, recorder: Recorder) -> dict[str, float]:
    """Write the losses that wait. Raises UserError at a number that is not finite."""
    newest = recorder.write_losses()
    if recorder.not_finite:
        raise diverged(state, *recorder.not_finite)
    return newest


def end_step(state: TrainingState, recorder: Recorder, stats: Tensor) -> dict[str, float]:
    """What is due after a step. -> its statistics, where they were looked at."""
    recorder.add(state.cur_nimg, stats)
    epoch = recorder.ended_epoch()
    newest = write_losses(state, recorder) if epoch or len(recorder.pending) == FLUSH_STEPS else {}
    if epoch:
        end_epoch(state, recorder, epoch)
    return newest


def end_epoch(state: TrainingState, recorder: Recorder, epoch: int) -> None:
    """One line in the logs; measurements, a grid and a checkpoint where they are due.

    If it is asked to stop while it measures, the resumed run does all of it.
    """
    config, last = state.config, epoch == state.config.epochs
    weight = label_weight(config, state.cur_nimg)
    line = recorder.summary(epoch, state.pl_mean.item())
    try:
        with process.STOP.waiting(False):
            if recorder.measurements is not None and (last or recorder.comes_due(config.fid_kimg)):
                if weight == 1:  # else labels are half trained
                    line |= recorder.measurements.measure(state.G_ema, state.D)
    except process.Stopped:
        return
    recorder.write_line(line)
    if improved := (fid := logs.meaningful_fid(line)) < state.best_fid:
        state.best_fid = fid
        write_checkpoint(state, config.out / "best.pt")
    if last or recorder.grid_due(epoch):
        recorder.save_grid(state.G_ema, epoch, weight)
    if last or improved or recorder.comes_due(config.checkpoint_kimg):
        save_if_new(state, recorder, anew=improved)
    recorder.end_epoch()


def save_if_new(state: TrainingState, recorder: Recorder, anew: bool = False) -> None:
    """Write a checkpoint of this moment, unless there is one; `anew` where it says less."""
    if recorder.pending:
        write_losses(state, recorder)
    newest = runs.checkpoints(state.config.out)[-1:]
    if anew or not newest or newest[0].stem != f"{state.cur_nimg:010d}":
        save_run(state)


def prepare(config: Config) -> tuple[dict[str, Any] | None, dict[str, Slices], str]:
    """The last checkpoint, if any, the slices, and their identity; writes to the cache only.

    Raises:
        UserError: whatever is wrong with the settings, the run folder or the data.
    """
    share, left_over = divmod(config.batch_size, num_ranks())
    if left_over or share < 2:
        raise UserError(
            f"batch_size = {config.batch_size}: must split evenly over the {num_ranks()} "
            "processes, 2 images or more for each"
        )
    saved = runs.open_run(config)
    if config.fid_kimg and config.fid_extractor == "inception":
        find_weights(None, INCEPTION)
    splits, data = load_slices(config)
    if saved is None and config.init_from is not None:
        runs.source_of_weights(config, splits["train"].c_dim)
    return saved, splits, data


def start_state(config: Config, slices: Slices, device: torch.device, saved: Any) -> TrainingState:
    """Fresh or resumed. Raises UserError if the ranks do not see the same checkpoint and data."""
    state = TrainingState(config, slices.c_dim, device)
    if saved is not None:
        state.load_state_dict(saved)
        before = saved.get("num_ranks", 1)
        other = f", number of processes {before}, now {num_ranks()}: bits will differ"
        print_once(
            f"resuming {config.out} at {state.cur_nimg:,} images{other * (before != num_ranks())}"
        )
    elif config.init_from is not None:
        for name, weights in runs.source_of_weights(config, slices.c_dim).items():
            runs.load_fitting_weights(getattr(state, name), weights)
        print_once(f"starting from the weights of {config.init_from}")
    for value in (state.cur_nimg, len(slices.images)):
        most, least = process.most_of_ranks(value), -process.most_of_ranks(-value)
        if most != least:
            raise UserError(f"{config.out} or the data differ between nodes: use shared storage")
    for net in (state.G, state.D, state.G_ema):
        process.broadcast_from_rank_0(list(net.parameters()) + list(net.buffers()))
    return state


def train(config: Config) -> None:
    """Train to `config.epochs`, or until asked to stop. Raises UserError for bad input or NaN."""
    with process.STOP:
        try:
            prepare_and_train(config)
        except process.Stopped:
            process.STOP.waits = True
            saved = runs.checkpoints(config.out)[-1:]
            print_once(
                stopped_line(f"the newest checkpoint is {saved[0]}" if saved else "nothing yet")
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of GPU memory: lower batch_size (now {config.batch_size}), channel_base "
                f"({config.channel_base}) or img_resolution ({config.img_resolution}), in another "
                f"--out. {first_line(error)}"
            ) from error


def stopped_line(saved: str) -> str:
    """What is said at a request to stop."""
    asked = process.STOP.name or "another rank"
    return f"stopped by {asked}; saved: {saved}; the same command goes on"


def prepare_and_train(config: Config) -> None:
    """All of training. Raises Stopped where nothing is left to be saved."""
    device = process.resolve_device(config.device)
    process.tune(device, config.cache)
    process.keep_freed_memory(device)
    with process.rank_0_first(device):
        saved, splits, data = prepare(config)
        classes = splits["train"].classes
        lock = runs.start_run(config, classes, data, saved) if rank() == 0 else nullcontext()
    with lock:
        train_and_save(config, splits, data, saved, device)


def train_and_save(
    config: Config, splits: dict[str, Slices], data: str, saved: Any, device: torch.device
) -> None:
    """What is left of training after preparing it, in a run folder of its own."""
    slices = splits["train"]
    state = start_state(config, slices, device, saved)
    if not slices.c_dim:
        print_once(f"one class, {slices.classes[0]}: training without a condition")
    total = math.ceil(config.epochs * len(slices.images) / config.batch_size) * config.batch_size
    recorder = Recorder(config, slices, state.cur_nimg, device)
    missed = recorder.unlogged_epoch()
    if state.cur_nimg >= total and not missed:
        recorder.close()
        print_once(f"{config.out} has its {config.epochs} epochs; a larger --epochs continues it")
        return

    if config.fid_kimg and rank() == 0:
        recorder.measurements = Measurements(splits, data, config, device)
    with process.STOP.waiting(True):
        try:
            if missed and rank() == 0:
                end_epoch(state, recorder, missed)
            if not process.most_of_ranks(bool(process.STOP.name)):
                with process.lost_workers_named(config):
                    loop(state, slices, recorder, total)
            if rank() == 0:
                save_if_new(state, recorder)
        finally:
            recorder.close()
    images = f"{state.cur_nimg:,} images, {config.out}"
    done = state.cur_nimg >= total and not process.STOP.name
    print_once(f"done: {images}" if done else stopped_line(images))


def loop(state: TrainingState, slices: Slices, recorder: Recorder, total: int) -> None:
    """Steps up to `total` images, or until any rank is asked to stop."""
    config, n = state.config, len(slices.images)
    label_pool = slices.conditions().to(state.device)
    loader = make_loader(slices, config, state.cur_nimg, total)
    pace = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file needs no thousands of lines
    with tqdm(
        total=total, initial=state.cur_nimg, unit="img", mininterval=pace, smoothing=0.05,
        disable=rank() > 0,
    ) as bar:  # fmt: skip
        for real, c in batches(loader, recorder, label_pool):
            epoch = state.cur_nimg // n + 1
            bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
            stats = train_step(state, real, c, label_pool)
            bar.update(config.batch_size)
            if rank() == 0 and (newest := end_step(state, recorder, stats)):
                bar.set_postfix({k: f"{newest[k]:.2f}" for k in ("d_loss", "g_loss")})
            if process.most_of_ranks(bool(process.STOP.name)):
                return


def parse_settings(args: list[str] | None = None) -> Config:
    """Settings from the command line over the named ones for the device: GPU for CUDA, else CPU.

    With `--init-from` the sizes of the networks are those of that run.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--device", default="auto")
    early.add_argument("--init-from", "--init_from", default="None")
    given = early.parse_known_args(args)[0]
    cuda = given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    default = Config(**(GPU if cuda else CPU))
    if given.init_from != "None":
        source = runs.read_run_config(Path(given.init_from))[0]
        default = replace(default, **{name: getattr(source, name) for name in runs.NETWORK})
    return tyro.cli(
        Config,
        default=default,
        args=args,
        description=__doc__,
        console_outputs=rank() == 0,
    )


def print_diagnosis(run: Path) -> None:
    """What looks wrong in a run. Raises UserError if it is none."""
    config, _, _ = runs.read_run_config(run)
    found = diagnose(logs.read_history(run), config)
    print_once("\n".join(found.values()) or f"{run}: nothing looks wrong")
    plot_curves(run, run / "curves.png", config)


def main() -> None:
    """Command line of this module."""
    if sys.argv[1:2] == ["--diagnose"]:
        if len(sys.argv) != 3:
            raise UserError("--diagnose takes one run folder and nothing else")
        return print_diagnosis(Path(sys.argv[2]))
    config = parse_settings()
    if config.data_root is None:
        print_once(
            "No data_root: training on the built-in demo brains (synthetic, template-derived)"
        )
    print_once(" ".join(f"{name}={value}" for name, value in asdict(config).items()))
    train(config)


if __name__ == "__main__":
    run_command(main)
    process.leave()
