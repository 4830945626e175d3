"""Train StyleGAN2 on brain slices, conditional on the class.

    python train.py                                  # demo brains; small settings without a GPU
    python train.py --data-root AD_NC --out runs/adni
    python train.py --epochs 200                     # continues the run to epoch 200
    python train.py --diagnose runs/adni             # what looks wrong in a run, and what to try
    torchrun --nproc-per-node=4 train.py --data-root AD_NC --out runs/adni    # four GPUs

The same command resumes a run that was stopped. Settings and their defaults: config.py or --help.

References, numbered as in README.md up to [10]:
    [1] Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN, arXiv:1912.04958
    [3] Mescheder et al. 2018, Which Training Methods for GANs do actually Converge?,
        arXiv:1801.04406
    [4] Karras et al. 2018, Progressive Growing of GANs, arXiv:1710.10196
    [9] Shahbazi et al. 2022, Collapse by Conditioning, arXiv:2201.06578
    [10] Huang et al. 2024, The GAN is dead; long live the GAN! A Modern Baseline GAN,
        arXiv:2501.05441
    [12] Goodfellow et al. 2014, Generative Adversarial Nets, arXiv:1406.2661
"""

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import CPU, GPU, Config, UserError
from dataset import Slices, load_slices, make_loader, normalize
from evaluation.features import PRETRAINED, find_weights
from modules import MEMORY_FORMAT, Discriminator, Generator, SynthesisNetwork, mixed_ws
from training import convolution, logs, process, reports, runs
from training.compiler import Phases, Stats
from training.memory import warn_of_too_little
from training.recorder import FLUSH_STEPS, Recorder
from utils import first_line, num_ranks, print_once, rank, run_command, stream_seed, work_alone

# Losses

convolution.install()  # R1 and path lengths derive convolutions twice
DRIFT = 0.01  # weight of the squared mean of the two logits of a pair


def r1_penalty(D: Discriminator, real: Tensor, c: Tensor) -> Tensor:
    """Squared gradient norm of D at each real image ([3], section 4.1). [N, C, H, W] -> [N]."""
    gradient = torch.func.grad(lambda img: D(img, c).sum())(real)
    return gradient.square().sum((1, 2, 3))


def path_lengths(synthesis: SynthesisNetwork, ws: Tensor) -> Tensor:
    """How far an image moves when its w moves ([1], section 3.2): |J^T y|, y random. -> [N].

    Divided by the roots of the numbers of pixels and layers: so a weight of 2 is that of the paper,
    ln 2 / (r^2 (ln r - ln 2)), at any resolution r.
    """

    def projection(ws: Tensor) -> Tensor:
        img = synthesis(ws)
        return (img * torch.randn_like(img)).sum() / math.sqrt(img.shape[2] * img.shape[3])

    gradient = torch.func.grad(projection)(ws)  # [N, num_ws, w_dim]
    return gradient.square().sum(2).mean(1).sqrt()


# Phases: each returns one weighted loss, and statistics to record

Loss = tuple[Tensor, Stats]


def generate(G: Generator, c: Tensor, config: Config) -> Tensor:
    """Images of new latents, with style mixing. c [N, c_dim] -> [N, C, H, W]."""
    z = torch.randn(len(c), config.z_dim, device=c.device)
    return G.synthesis(mixed_ws(G, z, c, config.style_mixing_prob))


def g_main(G: Generator, D: Discriminator, real: Tensor, c: Tensor, config: Config) -> Loss:
    """Loss of G: non-saturating ([12]), or relativistic ([10]), with real images of classes c."""
    logits = D(D.augment(generate(G, c, config)), c)
    if config.relativistic:
        with torch.no_grad():
            real_logits = D(D.augment(real), c)
        logits = logits - real_logits
    loss = F.softplus(-logits).mean()
    return loss, {"g_loss": loss}


def g_path(G: Generator, c: Tensor, pl_mean: Tensor, config: Config) -> Loss:
    """Path length penalty ([1], section 3.2): it pulls lengths to their running mean.

    Training gives it the labels of half a batch, which saves time and memory.
    """
    z = torch.randn(len(c), config.z_dim, device=c.device)
    lengths = path_lengths(G.synthesis, mixed_ws(G, z, c, config.style_mixing_prob))
    pl_mean = pl_mean.lerp(lengths.detach().mean(), config.pl_decay)
    penalty = (lengths - pl_mean).square().mean()
    stats = {"path_length": lengths.mean(), "pl_mean": pl_mean}
    return penalty * (config.pl_weight * config.pl_interval), stats


def d_main(
    G: Generator, D: Discriminator, real: Tensor, c: Tensor, c_fake: Tensor, config: Config
) -> Loss:
    """Logistic loss of D ([12]), or relativistic: twice that of [10], so that a guess is 2 ln 2.

    The latter compares the two images of a pair, and leaves their level free; `DRIFT` pulls it to 0
    (as [4], appendix A.1), where the sign of a logit tells D's guess.
    """
    with torch.no_grad():
        fake = generate(G, c_fake, config)
    both = D.augment(torch.cat([real, fake]))
    real_logits, fake_logits = D(both, torch.cat([c, c_fake]), batches=2).chunk(2)
    if config.relativistic:
        level = (real_logits + fake_logits) / 2
        loss = 2 * F.softplus(fake_logits - real_logits).mean() + DRIFT * level.square().mean()
    else:
        loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    stats = {"d_loss": loss}
    for name, logits in (("real", real_logits), ("fake", fake_logits)):
        stats |= {f"{name}_logit": logits.mean(), f"{name}_sign": logits.sign().mean()}
    return loss, stats


def d_r1(
    G: Generator, D: Discriminator, real: Tensor, c: Tensor, gamma: Tensor, config: Config
) -> Loss:
    """R1 penalty ([3]) of weight `gamma` at the augmented images, the ones that D sees.

    The relativistic loss adds R2, the same at generated images ([10]); as that loss is doubled, the
    weight of both is.
    """
    seen = {"r1": real}
    if config.relativistic:
        with torch.no_grad():
            seen["r2"] = generate(G, c, config)
    stats = {name: r1_penalty(D, D.augment(img), c).mean() for name, img in seen.items()}
    weight = gamma / 2 * config.r1_interval * (2 if config.relativistic else 1)
    return sum(stats.values()) * weight, stats


PHASES = (g_main, g_path, d_main, d_r1)


def compile_phase(name: str, config: Config, c_dim: int) -> None:
    """Compile a phase into the cache of compiled code, in a process of its own, by a step."""
    device = process.resolve_device(config.device)
    process.tune(device, config.cache)
    state = TrainingState(config, c_dim, device)
    state.phases = Phases("off")
    state.phases.compile({phase.__name__: phase for phase in PHASES}[name])
    images = torch.zeros(config.batch_size, *[config.img_resolution] * 2, dtype=torch.uint8)
    labels = torch.eye(max(1, c_dim), c_dim, device=device)
    c = labels[torch.zeros(config.batch_size, dtype=torch.long, device=device)]
    train_step(state, normalize(images.to(device)), c, labels)
    if not state.phases.compiled:
        raise RuntimeError(f"{name} could not be compiled")


# State


class TrainingState:
    """Everything that changes while training; a checkpoint holds it."""

    PARTS = ("G", "D", "G_ema", "g_opt", "d_opt")
    VALUES = ("pl_mean", "cur_nimg", "best_fid")

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
        self.total: float = math.inf  # value of cur_nimg at the end of training
        mode = config.compile
        if mode == "auto":  # several ranks compile at the same step, as they wait for each other
            mode = "off" if device.type != "cuda" else "on" if num_ranks() > 1 else "auto"
        phases = [p for p in PHASES if p is not g_path or config.pl_weight]
        self.phases = Phases(mode, phases, compile_phase)
        print_once(f"computing on {device} in {str(dtype).removeprefix('torch.')}, compile {mode}")

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: tensors and plain values only."""
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state |= {name: getattr(self, name) for name in self.VALUES}
        state |= {"num_ranks": num_ranks(), "num_threads": torch.get_num_threads()}
        return state | {"settings": runs.shared_settings(self.config)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises UserError if it has other parts or sizes."""
        try:
            for name in self.PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.pl_mean.copy_(state["pl_mean"])
            self.cur_nimg, self.best_fid = state["cur_nimg"], state["best_fid"]
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            run = self.config.out
            text = f"its checkpoint does not fit this version: {first_line(error)}"
            raise UserError(f"{run}: {text}; use another --out") from error


def lazy_adam(net: torch.nn.Module, learning_rate: float, interval: int) -> Adam:
    """Adam with learning rate * r and betas ** r, where r = interval / (interval + 1).

    So one extra step, of a penalty, every `interval` steps does not speed it up ([1], appendix B).
    """
    ratio = interval / (interval + 1)
    return Adam(net.parameters(), learning_rate * ratio, (0.0, 0.99**ratio), eps=1e-8, fused=True)


# Step


@torch.no_grad()
def ema_step(state: TrainingState) -> None:
    """Move G_ema towards G ([4], appendix A); from scratch, the half-life grows at first."""
    config = state.config
    ema_kimg = config.batch_size * 10 / 32 if config.ema_kimg is None else config.ema_kimg
    ramp = state.cur_nimg * config.ema_rampup if config.init_from is None else math.inf
    half_life = min(ema_kimg * 1000, ramp)
    weight = 1 - 0.5 ** (config.batch_size / max(half_life, 1e-8))
    torch._foreach_lerp_(list(state.G_ema.parameters()), list(state.G.parameters()), weight)


def label_weight(config: Config, nimg: int) -> float:
    """Factor of all labels at image `nimg`: it rises from 0 to 1 over `label_ramp_kimg` ([9])."""
    return min(1, nimg / (config.label_ramp_kimg * 1000)) if config.label_ramp_kimg else 1


def schedule(config: Config, done: float) -> tuple[float, float]:
    """Learning rate and weight of R1 after a share `done` of training.

    In the cooldown the rate falls to 0 as half a cosine; at the same pace the logarithm of the
    weight moves from that of r1_gamma to that of r1_gamma_end.
    """
    left = (1 - done) / config.cooldown if config.cooldown else 1
    rate = (1 - math.cos(math.pi * min(1, left))) / 2
    end = config.r1_gamma_end or config.gamma
    return config.learning_rate * rate, config.gamma**rate * end ** (1 - rate)


def train_step(state: TrainingState, real: Tensor, c: Tensor, label_pool: Tensor) -> Tensor:
    """One step of both networks on this rank's share of a batch; it never waits for a GPU.

    It updates `state`; its random numbers depend on (seed, rank, cur_nimg) only. The labels of
    fakes are those of the real images of a pair, or drawn from `label_pool` [n, c_dim]. Images
    `real` [N, C, H, W] in [-1, 1], labels `c` [N, c_dim] -> [len(STATS)], NaN for a penalty that
    was not due.
    """
    config, G, D = state.config, state.G, state.D
    N, due = len(real), logs.due_statistics(config, state.cur_nimg)

    def run(phase: Callable, optimizer: Adam, *args: Any) -> Stats:
        seed = stream_seed(phase.__name__, config.seed, rank(), state.cur_nimg)
        return state.phases(phase, optimizer, seed, *args, config)

    rate, gamma = schedule(config, state.cur_nimg / state.total)
    for optimizer in (state.g_opt, state.d_opt):  # defaults: as `lazy_adam` made them
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate / config.learning_rate
    torch.manual_seed(stream_seed("labels", config.seed, rank(), state.cur_nimg))
    drawn = torch.randint(len(label_pool), [3, N], device=real.device)
    labels = torch.cat([label_pool[drawn], c[None]]) * label_weight(config, state.cur_nimg)
    c_g, c_path, c_d, c = labels  # each [N, c_dim]
    if config.relativistic:  # the two images of a pair have the same class
        c_g = c_d = c
    D.requires_grad_(False)
    stats = run(g_main, state.g_opt, G, D, real, c_g)
    D.requires_grad_(True)
    if due["path_length"]:
        stats |= run(g_path, state.g_opt, G, c_path[: max(1, N // 2)], state.pl_mean)
        state.pl_mean = stats.pop("pl_mean")
    stats |= run(d_main, state.d_opt, G, D, real, c, c_d)
    if due["r1"]:
        stats |= run(d_r1, state.d_opt, G, D, real, c, torch.full([], gamma, device=real.device))
    state.cur_nimg += config.batch_size
    ema_step(state)
    if config.augment == "ada":
        D.augment.adapt(stats["real_sign"], state.cur_nimg)
        stats["ada_p"] = D.augment.p.clone()
    missing = torch.full([], math.nan, device=real.device)
    return torch.stack([stats.get(name, missing) for name in logs.STATS])


def write_checkpoint(state: TrainingState, path: Path) -> None:
    """Raises UserError, and writes nothing, if a weight is not finite."""
    for name in ("G", "D", "G_ema"):
        if not all(p.isfinite().all() for p in getattr(state, name).parameters()):
            raise diverged(state, f"the weights of {name}", state.cur_nimg)
    state.G_ema.mapping.estimate_w_avg()
    runs.save_checkpoint(path, state.state_dict())


def save_run(state: TrainingState) -> None:
    """Write a checkpoint and the generator; delete all but the newest two checkpoints."""
    run = state.config.out
    write_checkpoint(state, run / "checkpoints" / f"{state.cur_nimg:010d}.pt")
    runs.save_generator(run, state.G_ema, state.cur_nimg)
    for old in runs.checkpoints(run)[:-2]:
        old.unlink()


def diverged(state: TrainingState, where: str, nimg: float) -> UserError:
    """The error that ends a run because a number is NaN or infinite."""
    found = runs.checkpoints(state.config.out)
    return UserError(
        f"not a finite number: {where}, at image {nimg:,.0f}. "
        f"Last good checkpoint: {found[-1] if found else 'none yet'}. "
        "Try a lower --learning-rate or a higher --r1-gamma, in another --out"
    )


# Loop


def batches(
    loader: DataLoader, recorder: Recorder, label_pool: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, on the device; the recorder sums up the time spent waiting for them.

    The CPU runs at most two steps ahead of a GPU, so when it waits long, the GPU waits too. With
    the labels of all training slices, `label_pool` [n, c_dim] on the device, it yields images
    [N, 1, R, R] in [-1, 1] and labels [N, c_dim].
    """
    device = label_pool.device
    iterator = iter(loader)
    steps: deque[torch.cuda.Event] = deque()
    # one rank may stop while it waits; several ranks must end after the same step
    waiting = process.STOP.deferred if num_ranks() > 1 else process.STOP.immediate
    recorder.start_clock()
    while True:
        if len(steps) == 2:
            steps.popleft().synchronize()
        asked = time.perf_counter()
        try:
            with waiting(), process.lost_workers_named(recorder.config, process.LostWorker):
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
            steps.append(torch.cuda.current_stream().record_event())


def write_losses(state: TrainingState, recorder: Recorder) -> dict[str, float]:
    """Write pending losses. -> the newest. Raises UserError if one is not finite."""
    newest = recorder.write_losses()
    if recorder.not_finite:
        raise diverged(state, *recorder.not_finite)
    return newest


def end_step(state: TrainingState, recorder: Recorder, stats: Tensor) -> dict[str, float]:
    """Record a step, and end its epoch if it is the last. -> its statistics, if just written."""
    recorder.cur_nimg = state.cur_nimg
    recorder.pending.append((state.cur_nimg, stats))
    epoch = recorder.ended_epoch()
    newest = write_losses(state, recorder) if epoch or len(recorder.pending) == FLUSH_STEPS else {}
    if epoch:
        end_epoch(state, recorder, epoch)
    return newest


def end_epoch(state: TrainingState, recorder: Recorder, epoch: int) -> None:
    """Log an epoch; measure, draw a grid and write a checkpoint if they are due.

    A request to stop ends the measurements at once. The resumed run then repeats all of this.
    """
    config, last = state.config, epoch == state.config.epochs
    weight = label_weight(config, state.cur_nimg) if state.G.mapping.c_dim else 1
    line = recorder.summary(epoch, state.pl_mean.item()) | state.phases.compiled_at
    try:
        with process.STOP.immediate():
            due = recorder.measurements and (last or recorder.comes_due(config.fid_kimg))
            if due and weight == 1:  # before, labels do not have their full effect
                line |= recorder.measurements.measure(state.G_ema, state.D)
    except process.Stopped:
        return
    recorder.write_line(line)
    fid = logs.meaningful_fid(line)
    if improved := fid < state.best_fid:
        state.best_fid = fid
        write_checkpoint(state, config.out / "best.pt")
    if last or recorder.grid_due(epoch):
        recorder.save_grid(state.G_ema, epoch, weight)
    if last or improved or recorder.comes_due(config.checkpoint_kimg):
        save_if_new(state, recorder, anew=improved)
    recorder.logged = state.cur_nimg
    recorder.start_clock()


def save_if_new(state: TrainingState, recorder: Recorder, anew: bool = False) -> None:
    """Write checkpoint and generator unless both are of now; `anew` overwrites them."""
    if recorder.pending:
        write_losses(state, recorder)
    if anew or not runs.is_saved(state.config.out, state.cur_nimg):
        save_run(state)


def prepare(config: Config) -> tuple[dict[str, Any] | None, dict[str, Slices], str]:
    """The last checkpoint or None, the slices, and their identity. Writes to the cache only.

    Raises UserError if something is wrong with the settings, the run folder or the data.
    """
    share, left_over = divmod(config.batch_size, num_ranks())
    if left_over or share < 2:
        text = f"must split evenly over the {num_ranks()} processes, 2 images or more for each"
        raise UserError(f"batch_size = {config.batch_size}: {text}")
    if share > 4 and all(share % size for size in (2, 3)):
        text = f"{share} images for each process make no groups of 2 to 4, which D compares"
        raise UserError(f"batch_size = {config.batch_size}: {text}")
    if config.r1_gamma_end is not None and not config.cooldown:
        print_once(f"note: r1_gamma_end = {config.r1_gamma_end} does nothing without a cooldown")
    elif config.r1_gamma_end is not None and config.r1_gamma_end > config.gamma:
        text = f"above r1_gamma = {config.gamma}: give both"
        raise UserError(f"r1_gamma_end = {config.r1_gamma_end}: {text}")
    saved = runs.open_run(config)
    if config.fid_kimg and config.fid_extractor in PRETRAINED:
        find_weights(None, PRETRAINED[config.fid_extractor][0])
    splits, data = load_slices(config)
    runs.require_same_data(config.out, splits["train"].classes, data)
    if saved is None and config.init_from is not None:
        runs.source_of_weights(config, splits["train"].c_dim)
    total, ramp = total_images(config, splits["train"]), config.label_ramp_kimg
    if saved is None and splits["train"].c_dim and ramp * 1000 > total:
        raise UserError(f"label_ramp_kimg = {ramp}: training ends before, at image {total:,}")
    if saved and saved["cur_nimg"] > total:
        done = f"has trained {saved['cur_nimg'] / total * config.epochs:.1f} epochs already"
        text = f"{config.out} {done}; ask for more, or use another --out"
        raise UserError(f"epochs = {config.epochs}: {text}")
    return saved, splits, data


def total_images(config: Config, slices: Slices) -> int:
    """Number of images after the last epoch, rounded up to whole steps."""
    return math.ceil(config.epochs * len(slices.images) / config.batch_size) * config.batch_size


def start_state(config: Config, slices: Slices, device: torch.device, saved: Any) -> TrainingState:
    """A new or resumed state. Raises UserError if ranks found different checkpoints or data."""
    state = TrainingState(config, slices.c_dim, device)
    state.total = total_images(config, slices)
    if saved is not None:
        state.load_state_dict(saved)
        print_once(f"resuming {config.out} at {state.cur_nimg:,} images")
        if (before := saved.get("num_ranks", 1)) != num_ranks():
            print_once(f"note: {before} processes before, {num_ranks()} now: random numbers differ")
        threads = saved.get("num_threads", torch.get_num_threads())
        if device.type == "cpu" and threads != torch.get_num_threads():
            text = f"{threads} threads before, {torch.get_num_threads()} now"
            print_once(f"note: {text}: rounding differs; OMP_NUM_THREADS sets them")
    elif config.init_from is not None:
        for name, weights in runs.source_of_weights(config, slices.c_dim).items():
            runs.load_fitting_weights(getattr(state, name), weights)
        print_once(f"starting from the weights of {config.init_from}")
    for value in (state.cur_nimg, len(slices.images)):
        if process.most_of_ranks(value) != -process.most_of_ranks(-value):
            raise UserError(f"{config.out} or the data differ between nodes: use shared storage")
    for net in (state.G, state.D, state.G_ema):
        process.broadcast_from_rank_0(list(net.parameters()) + list(net.buffers()))
    return state


def train(config: Config) -> None:
    """Train to `config.epochs`, or until asked to stop. Raises UserError for bad input or NaN."""
    with process.STOP:
        try:
            device = process.resolve_device(config.device)
            process.tune(device, config.cache)
            process.keep_freed_memory(device)
            with process.rank_0_first(device):
                saved, splits, data = prepare(config)
                lock = nullcontext()
                if rank() == 0:
                    lock = runs.start_run(config, splits["train"].classes, data, saved)
            with lock:
                train_and_save(config, splits, data, saved, device)
        except process.Stopped:
            process.STOP.defers = True
            asked, found = process.STOP.name or "another rank", runs.checkpoints(config.out)
            newest = found[-1] if found else "nothing yet"
            print_once(f"stopped by {asked}; saved: {newest}; the same command resumes the run")
        except torch.OutOfMemoryError as error:
            names = ("batch_size", "channel_base", "img_resolution")
            sizes = " or ".join(f"{name} (now {getattr(config, name)})" for name in names)
            text = f"out of GPU memory: lower {sizes}, in another --out. {first_line(error)}"
            raise UserError(text) from error


def train_and_save(
    config: Config, splits: dict[str, Slices], data: str, saved: Any, device: torch.device
) -> None:
    """Train in a prepared run folder, save, draw the plots. Raises Stopped after a request."""
    slices = splits["train"]
    state, is_new = start_state(config, slices, device, saved), saved is None
    if saved:
        saved.clear()  # its tensors would take memory to the end
    if not slices.c_dim:
        print_once(f"one class, {slices.classes[0]}: training without a condition")
    if is_new and device.type == "cpu" and config.data_root and not config.init_from:
        text = "needs far fewer images without a GPU (64 pixels; set no other sizes)"
        print_once(f"hint: --init-from assets/demo_generator {text}")
    if device.type == "cuda":
        free, dtype = torch.cuda.mem_get_info(device)[0], process.feature_dtype(config, device)
        warn_of_too_little(g_main, config, slices.c_dim, dtype, free)
    recorder = Recorder(config, slices, state.cur_nimg, device)
    missed = recorder.unlogged_epoch()
    if finished := state.cur_nimg >= state.total and not missed:
        print_once(f"{config.out} has its {config.epochs} epochs; a larger --epochs continues it")
    with process.STOP.deferred():
        try:
            if not finished:
                recorder.prepare_measurements(splits, data, device)
            if missed and rank() == 0 and not process.STOP.name:
                end_epoch(state, recorder, missed)
            if not finished and not process.most_of_ranks(bool(process.STOP.name)):
                with process.lost_workers_named(config):
                    loop(state, slices, recorder)
            if rank() == 0:
                save_if_new(state, recorder)
        except process.LostWorker:
            if rank() == 0:
                save_if_new(state, recorder)
            raise
        finally:
            recorder.close()
    if state.cur_nimg < state.total or process.STOP.name:
        raise process.Stopped
    print_once(f"done: {state.cur_nimg:,} images, {config.out}")
    if rank() == 0:
        reports.end_run(config, slices)


def loop(state: TrainingState, slices: Slices, recorder: Recorder) -> None:
    """Train up to `state.total` images, or until any rank is asked to stop."""
    config = state.config
    label_pool = slices.conditions().to(state.device)
    loader = make_loader(slices, config, state.cur_nimg, state.total)
    pace = 0.1 if sys.stderr.isatty() else 30  # seconds between lines; fewer in a log file
    style = {"unit": "img", "mininterval": pace, "smoothing": 0.05, "disable": rank() > 0}
    with tqdm(total=state.total, initial=state.cur_nimg, **style) as bar, closing(state.phases):
        for real, c in batches(loader, recorder, label_pool):
            epoch = state.cur_nimg // len(slices.images) + 1
            bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
            stats = train_step(state, real, c, label_pool)
            state.phases.compile_beside(state)
            bar.update(config.batch_size)
            if rank() == 0 and (newest := end_step(state, recorder, stats)):
                bar.set_postfix({k: f"{newest[k]:.2f}" for k in ("d_loss", "g_loss")})
            if process.most_of_ranks(bool(process.STOP.name)):
                return


def parse_settings(args: list[str] | None = None) -> Config:
    """Settings of the command line; defaults are `GPU` of config.py with CUDA, `CPU` without.

    With `--init-from` sizes of the networks default to those of that run, or of the resumed one.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--device", default=Config.device)
    early.add_argument("--init-from", "--init_from", default=str(Config.init_from))
    early.add_argument("--out", type=Path, default=Config.out)
    given = early.parse_known_args(args)[0]
    cuda = given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    named = GPU if cuda else CPU
    if given.device == "auto" and (reason := process.unusable_gpu()):
        print_once(f"warning: {reason}. Until then the small settings of a CPU apply")
    if unknown := sorted(named.keys() - vars(Config())):
        raise UserError(f"config.py: CPU or GPU names no setting {unknown[0]!r}")
    default = usual = Config(**named)
    if given.init_from != "None":
        resumed = (given.out / "config.json").exists()
        source = runs.read_run_config(given.out if resumed else Path(given.init_from))[0]
        default = replace(default, **{name: getattr(source, name) for name in runs.NETWORK})
    how = {"description": __doc__, "console_outputs": rank() == 0}
    config = tyro.cli(Config, default=default, args=args, **how)
    changed = "".join(f", {k}={v}" for k, v in vars(config).items() if v != vars(usual)[k])
    print_once(f"settings: {'GPU' if cuda else 'CPU'} of config.py{changed}")
    return config


def main() -> None:
    """Command line of this module."""
    if sys.argv[1:2] == ["--diagnose"]:
        if len(sys.argv) != 3:
            raise UserError("--diagnose takes one run folder and nothing else")
        work_alone()
        return reports.print_diagnosis(Path(sys.argv[2]))
    process.check_ranks()
    config = parse_settings()
    if config.data_root is None:
        print_once("no data_root: training on built-in demo brains (synthetic, from a template)")
    train(config)


if __name__ == "__main__":
    run_command(main)
    process.leave()
