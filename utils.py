"""Devices, seeds, run folders, checkpoints, logs and pictures: what training and prediction share.

A run is a folder: config.json, log.jsonl, losses.csv, grids/, plots, checkpoints/ and
generator.safetensors.
"""

import ctypes
import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tqdm import tqdm

from config import Config, UserError
from modules import AdaptiveAugment, Generator, channels

RUNS = Path("runs")
PATHS = ("data_root", "out", "cache", "init_from")  # settings that are paths
# Settings that say where, how long and how often, not what a run learns
FREE_TO_CHANGE = (
    "epochs", "out", "cache", "data_root", "device", "num_workers", "precision", "compile",
    "snapshot_epochs", "checkpoint_kimg", "fid_kimg",
)  # fmt: skip
# Statistics of each step, in the order in which they arise
STATS = (
    "g_loss", "path_length", "d_loss", "real_logit", "fake_logit", "r1", "real_sign", "fake_sign",
    "g_main_grad", "d_main_grad", "ada_p",
)  # fmt: skip


def run_command(main: Callable[[], None]) -> None:
    """Run a command; bad input ends it with one line on stderr and exit code 2."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        if STOP.name:
            sys.stdout.flush()
            os._exit(0)  # the compiler's threads would be waited for, which may take long
    except UserError as error:
        print(f"rank {rank()}: " * (rank() > 0) + f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Stopped(KeyboardInterrupt):
    """Raised where a request to stop is answered at once."""


class StopRequest:
    """Context in which Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the work in good order.

    They raise Stopped at once, and again after some seconds if that was lost, as it is in a
    finalizer, but wait where `waiting` says so. A second one kills a single process; of many, each
    may get one from torchrun and one from Slurm. What the parent of this process had it ignore, as
    nohup does, stays ignored.
    """

    SECONDS = 3  # from one attempt to end the work to the next

    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
               if hasattr(signal, name)]  # fmt: skip

    def __init__(self) -> None:
        self.name, self.waits = "", False

    def __enter__(self) -> "StopRequest":
        self.name, self.waits = "", False
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        heard = [s for s in self.SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.ask) for number in heard}
        if hasattr(signal, "SIGALRM"):
            self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.stop)
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.name and num_ranks() == 1:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self.name == "SIGHUP":  # nobody reads any more, and writing would be an error
            for stream in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, self.SECONDS, self.SECONDS)
        self.stop(number, frame)

    def stop(self, number: int, frame: FrameType | None) -> None:
        if not self.waits:
            raise Stopped

    @contextmanager
    def waiting(self, waits: bool) -> Iterator[None]:
        """Whether a request within waits for whoever looks at `name`, or is answered at once."""
        before, self.waits = self.waits, waits
        try:
            if self.name and not waits:
                raise Stopped
            yield
        finally:
            self.waits = before

    def __exit__(self, *_: object) -> None:
        self.waits = True
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)


STOP = StopRequest()  # one a process, as its signals are


def resolve_device(name: str) -> torch.device:
    """The device to compute on; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: a device that is not there, or more ranks on a machine than it has GPUs.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device, there in available.items() if there), "cpu")
    elif not available.get(name, True):
        raise UserError(f"device = {name}: torch {torch.__version__} finds none on this machine")
    if name == "cuda" and num_ranks() > 1:
        if "LOCAL_RANK" not in os.environ:
            raise UserError("WORLD_SIZE is set but LOCAL_RANK is not: start with torchrun")
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"--nproc-per-node: more than the {gpus} GPU(s) of this machine")
        torch.cuda.set_device(local)
    return torch.device(name)


def feature_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type of the features in high-resolution blocks.

    auto is bfloat16 where it is native and, on a CPU, the last layer has 16 maps or more: with
    fewer it was measured no faster.
    """
    if config.precision != "auto":
        return getattr(torch, config.precision)
    maps = channels(config.img_resolution, config.channel_base, config.channel_max)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and maps >= 16 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory(device: torch.device) -> None:
    """On Linux CPUs: reuse freed memory rather than ask the system for zeroed pages again.

    In wide networks a step was measured to take 1.2 to 1.5 times as long without (bfloat16).
    """
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc: M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1
            libc.mallopt(-4, 0)
            libc.mallopt(-1, -1)


def tune(device: torch.device, cache: Path) -> None:
    """PyTorch's own settings: convolutions tried out, TF32, compiled code kept under `cache`."""
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # not the user's
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.absolute() / "compiled")


def stream_seed(purpose: str, *parts: int) -> int:
    """An independent 63-bit seed for each purpose and tuple, such as (seed, position)."""
    digest = hashlib.sha256(repr((purpose, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def one_hot(labels: np.ndarray, c_dim: int) -> Tensor:
    """Class indices [N] -> one-hot float32 [N, c_dim]; c_dim 0 (unconditional) gives [N, 0]."""
    return torch.eye(max(1, c_dim))[torch.as_tensor(labels)][:, :c_dim]


def spread(n: int, most: int) -> np.ndarray:
    """Up to `most` indices out of n, at even distances."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def mean_by_id(
    values: np.ndarray, subjects: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the slices of each id. -> values [ids, ...], labels [ids]."""
    keys, rows = np.unique(np.stack([subjects, labels.astype(str)]), axis=1, return_inverse=True)
    means = [values[rows == i].mean(0) for i in range(keys.shape[1])]
    return np.stack(means), keys[1].astype(int)


# Ranks: the processes that torchrun starts, one for each GPU


def num_ranks() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process among them; 0 writes all files and does all the talking."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def rank_0_first(device: torch.device) -> Iterator[None]:
    """The other ranks enter when rank 0 has left: they find the files it wrote, or end with it."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if rank() > 0:
        dist.init_process_group(backend)
    yield
    if rank() == 0 and num_ranks() > 1:
        dist.init_process_group(backend)


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each float32 tensor by its mean over the ranks, in one flat all-reduce."""
    if num_ranks() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / num_ranks()).split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])


@torch.no_grad()
def broadcast_from_rank_0(tensors: list[Tensor]) -> None:
    """Give every rank the values of rank 0: random numbers may differ between kinds of CPU."""
    for tensor in tensors if num_ranks() > 1 else ():
        dist.broadcast(tensor, 0)


def most_of_ranks(value: int) -> int:
    """The largest value on any rank; waits for all of them, but not for their GPUs."""
    if num_ranks() == 1:
        return value
    most = torch.tensor(value)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def say(text: str) -> None:
    """Print, on rank 0 only, above a progress bar."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


# Run folders and checkpoints


def newest_run() -> Path:
    """The run under runs/ whose generator was written last. Raises UserError if there is none."""
    generators = sorted(RUNS.glob("*/generator.safetensors"), key=lambda path: path.stat().st_mtime)
    if not generators:
        raise UserError(f"no trained run under {RUNS}/: start one with python train.py")
    return generators[-1].parent


def run_folder(path: Path) -> Path:
    """The run that a folder, a generator.safetensors or a checkpoints/*.pt belongs to."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, sync it, rename it: readers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def ensure_writable(folder: Path) -> None:
    """Raises UserError where the folder could not be written or created; writes nothing itself."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission in {existing}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, plain tensors and values only. Raises UserError if damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if {"G_ema", "settings", "cur_nimg"} <= state.keys():
            return state
    except Exception as error:  # torch raises a different type for each kind of damage
        raise UserError(
            f"{path} is truncated or no checkpoint; move it away to go on from the one before it"
        ) from error
    raise UserError(f"{path} is no checkpoint of this project")


def plain_settings(config: Config) -> dict[str, str | int | float | None]:
    """The settings as values that JSON and a checkpoint can hold."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def write_run_config(run: Path, config: Config, classes: list[str], data: str) -> None:
    """Write config.json: the settings, the class names, the identity of the data."""
    content = {"classes": classes, "data": data, "settings": plain_settings(config)}
    text = json.dumps(content, indent=2)
    write_atomically(run / "config.json", lambda path: path.write_text(text + "\n"))


def read_run_config(run: Path) -> tuple[Config, list[str], str]:
    """Settings, class names and data identity of a run. Raises UserError naming the file."""
    path = run / "config.json"
    try:
        saved = json.loads(path.read_text())
        known = {field.name for field in fields(Config)}
        settings = {k: v for k, v in saved["settings"].items() if k in known}
        paths = {k: Path(settings[k]) for k in PATHS if settings.get(k)}
        return Config(**settings | paths), saved["classes"], saved["data"]
    except FileNotFoundError as error:
        raise UserError(f"{run} is no run: it has no config.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def save_generator(run: Path, G_ema: Generator) -> None:
    """Write generator.safetensors, which together with config.json is what is shared."""
    state = {name: value.contiguous() for name, value in G_ema.state_dict().items()}
    write_atomically(run / "generator.safetensors", lambda path: save_file(state, path))


def load_generator(path: Path) -> tuple[Generator, Config, list[str]]:
    """The averaged generator, its settings and class names.

    Args:
        path: a run folder, its generator.safetensors, or one of its checkpoints/*.pt.

    Raises:
        UserError: a missing or damaged file, or weights of other sizes than config.json says.
    """
    weights = path / "generator.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise UserError(f"{weights} does not exist")
    run = run_folder(path)
    config, classes, _ = read_run_config(run)
    if weights.suffix == ".pt":
        state = load_checkpoint(weights)["G_ema"]
    else:
        try:
            state = load_file(weights)
        except Exception as error:  # safetensors has its own exception, not a ValueError
            raise UserError(f"{weights} is truncated or no safetensors file") from error
    G = Generator(config, len(classes) if len(classes) > 1 else 0)
    try:
        G.load_state_dict(state)
    except RuntimeError as error:
        size = f"img_resolution = {config.img_resolution}, channel_base = {config.channel_base}"
        raise UserError(f"{weights} does not fit {run}/config.json ({size})") from error
    return G.eval().requires_grad_(False), config, classes


# Logs


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file, without a last one that was cut off; none without the file."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def read_losses(run: Path, up_to: float = math.inf) -> np.ndarray:
    """Rows (nimg, *STATS) of losses.csv up to an image count; NaN where one was not due."""
    header, *lines = whole_lines(run / "losses.csv") or ["nimg"]
    names = header.split(",")  # those of earlier versions had fewer
    rows = np.full((len(lines), 1 + len(STATS)), np.nan)
    values = [[float(value or "nan") for value in line.split(",")] for line in lines]
    for name, column in zip(names, np.array(values).reshape(-1, len(names)).T, strict=True):
        rows[:, ("nimg", *STATS).index(name)] = column
    return rows[rows[:, 0] <= up_to]


def losses_text(rows: np.ndarray) -> str:
    """Rows (nimg, *STATS) as lines of losses.csv."""
    return "".join(",".join("" if np.isnan(v) else f"{v:.9g}" for v in r) + "\n" for r in rows)


def append_losses(run: Path, rows: np.ndarray) -> None:
    """Append rows (nimg, *STATS) to losses.csv."""
    with open(run / "losses.csv", "a") as file:
        file.write(losses_text(rows))


def read_log(run: Path, up_to: float = math.inf) -> list[dict[str, Any]]:
    """Lines of log.jsonl up to an image count."""
    lines = [json.loads(line) for line in whole_lines(run / "log.jsonl")]
    return [line for line in lines if line["nimg"] <= up_to]


def cut_logs(run: Path, up_to: int) -> None:
    """Start both logs, or cut them back to what the last checkpoint has seen."""
    losses = ",".join(("nimg", *STATS)) + "\n" + losses_text(read_losses(run, up_to))
    log = "".join(json.dumps(line) + "\n" for line in read_log(run, up_to))
    for name, text in (("losses.csv", losses), ("log.jsonl", log)):
        write_atomically(run / name, lambda path, text=text: path.write_text(text))


# Diagnosis


class History(NamedTuple):
    """Columns by name: of each epoch (log.jsonl) and of each step (losses.csv); NaN: no value."""

    epochs: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]

    def last(self, name: str, least: int = 1) -> float:
        """Mean of the last three values of a column; NaN, for which no rule holds, if too few."""
        values = self.measured(name)
        return float(values[-3:].mean()) if len(values) >= least else math.nan

    def measured(self, name: str) -> np.ndarray:
        """The values that an epoch column has."""
        values = self.epochs.get(name, np.zeros(0))
        return values[np.isfinite(values)]

    def fids(self) -> np.ndarray:
        """FID where z moves a pixel further than noise does: before, samples are no slices yet,
        and an encoder that has seen nothing but slices was found to hold them for good ones."""
        if "fid" not in self.epochs:
            return np.zeros(0)
        counts = self.epochs["vary_z"] > self.epochs["vary_noise"]
        return self.epochs["fid"][counts & np.isfinite(self.epochs["fid"])]

    def newest_is_best(self) -> bool:
        """Whether the last epoch has the lowest FID that counts."""
        fids = self.fids()
        return len(fids) > 0 and bool(self.epochs["fid"][-1] == fids.min())


def read_history(run: Path) -> History:
    """The logs of a run."""
    log, rows = read_log(run), read_losses(run)
    names = sorted({name for line in log for name in line})
    epochs = {n: np.array([line.get(n) for line in log], dtype=float) for n in names}
    return History(epochs, dict(zip(("nimg", *STATS), rows.T, strict=True)))


class Rule(NamedTuple):
    """Something that can be wrong with a run."""

    holds: Callable[[History], bool]
    looks: str
    advice: str


LEAK_LIMITS = {"leak_rotation": 1.5, "leak_flip": 0.5, "leak_border": 4.0}
LEAST_SIGNAL = 0.05  # agreement above chance below which classes are taken for noise
SETTLED = 5  # epochs or measurements before which nothing is expected of D or of the samples


def past_its_best(h: History) -> bool:
    """FID is a fifth above its lowest value, which lies three measurements or more back."""
    fid = h.fids()
    return len(fid) > 3 and fid[:-3].min() * 1.2 < fid[-3:].min()


def stays_above(h: History, name: str, limit: float) -> bool:
    """The last six values are further from 0 than a limit, and no longer on their way to it."""
    values = np.abs(h.measured(name)[-6:])
    return len(values) == 6 and values.min() > limit and values[3:].mean() > 0.9 * values[:3].mean()


def label_effect(h: History) -> float:
    """Agreement above chance, as a share of that of real test slices; NaN where that is low."""
    chance = h.last("agreement_chance")
    real = h.last("agreement_real") - chance
    return (h.last("agreement", SETTLED) - chance) / real if real > LEAST_SIGNAL else math.nan


RULES = {
    "not finite": Rule(
        lambda h: not np.isfinite(h.steps["g_loss"] + h.steps["d_loss"]).all(),
        "a loss is not a finite number",
        "start again, or from an earlier checkpoint, with a lower learning_rate",
    ),
    "numbers grow": Rule(
        lambda h: max(abs(h.last("real_logit")), abs(h.last("fake_logit"))) > 30,
        "the logits of D are above 30: numbers that are not finite may be near",
        "raise r1_gamma or lower learning_rate",
    ),
    "learning rate too high": Rule(
        lambda h: h.last("d_loss_spread") > 0.5,
        "the loss of D jumps: its deviation within an epoch is above 0.5",
        "lower learning_rate, to a half or less",
    ),
    "D too weak": Rule(
        lambda h: (
            abs(h.last("d_loss", SETTLED) - 2 * math.log(2)) < 0.05 and h.last("real_sign") < 0.15
        ),
        "D cannot tell real from generated slices: its loss stays at 2 ln 2",
        "lower r1_gamma; if augment is ada, lower ada_target",
    ),
    "D overfits": Rule(
        lambda h: h.last("overfitting", SETTLED) > 0.5,
        "D holds real slices that it was not trained on for generated ones",
        'augment = "ada", a higher r1_gamma, or more data',
    ),
    "past its best": Rule(
        past_its_best,
        "FID has been rising for at least three measurements",
        "use best.pt, and augment = ada in the next run",
    ),
    "p at its cap": Rule(
        lambda h: abs(h.last("ada_p") - AdaptiveAugment.P_MAX) < 1e-6,
        "p of adaptive augmentation stays at its cap of 0.8",
        "the data are few: raise r1_gamma or lower channel_max; look for leaks",
    ),
    "augmentation leaks": Rule(
        lambda h: any(stays_above(h, name, limit) for name, limit in LEAK_LIMITS.items()),
        "samples are turned, mirrored, or lit in their background as the real slices are not",
        "augment = ada in the place of dataset; lower flip, rotation, brightness or ada_noise",
    ),
    "z ignored": Rule(
        lambda h: h.last("vary_z", SETTLED) < max(0.3, h.last("vary_noise") / 2),
        "samples hardly change with z: one picture per class, varied by noise alone at most",
        "look at the grid; lower learning_rate, try label_ramp_kimg or style_mixing_prob = 0.5",
    ),
    "labels without signal": Rule(
        lambda h: h.last("agreement_real") - h.last("agreement_chance") < LEAST_SIGNAL,
        "a classifier trained on the training slices cannot tell the classes of test slices",
        "look whether slices lie in the right class folders; if so, they do not show the class",
    ),
    "class ignored": Rule(
        lambda h: label_effect(h) < 0.2,
        "samples do not show the class asked for",
        "train longer, with label_ramp_kimg = 0",
    ),
    "caricature": Rule(
        lambda h: label_effect(h) > 2,
        "the classes of samples are further apart than those of real slices",
        "label_ramp_kimg at about half of the run; train longer",
    ),
    "loader too slow": Rule(
        lambda h: h.last("data_wait") > 0.2,
        "more than a fifth of the time goes in waiting for the loader",
        "raise num_workers",
    ),
}


def diagnose(history: History) -> dict[str, str]:
    """What looks wrong in a run's logs, and what to try, by the name of the rule."""
    return {
        name: f"{name}: {rule.looks}. Try: {rule.advice}"
        for name, rule in RULES.items()
        if rule.holds(history)
    }


# Pictures


def to_uint8(img: Tensor) -> np.ndarray:
    """Images [N, 1, H, W] in [-1, 1] -> uint8 [N, H, W], rounded and clipped."""
    return ((img[:, 0].float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [N, H, W], N a multiple of columns -> one picture [rows * H, columns * W]."""
    N, H, W = images.shape
    rows = images.reshape(N // columns, columns, H, W)
    return rows.transpose(0, 2, 1, 3).reshape(-1, columns * W)


def save_grey(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W] as an 8-bit grey PNG."""
    write_atomically(path, lambda partial: Image.fromarray(picture).save(partial, format="png"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=110, bbox_inches="tight"))


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Exponential moving average with a half-life in steps, without the bias of its start."""
    decay, mean, weight, out = 0.5 ** (1 / half_life), 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        out.append(mean / weight)
    return np.array(out)


def draw_loss(ax: Axes, run: Path, name: str, color: str = "C0") -> None:
    """One loss of a run on an axis: each step, smoothed, and the mean of each epoch."""
    rows, epochs = read_losses(run), read_log(run)
    kimg, values = rows[:, 0] / 1000, rows[:, 1 + STATS.index(name)]
    ax.plot(kimg, values, lw=0.5, alpha=0.3, color=color)
    ax.plot(kimg, smooth(values, 50), color=color, label=f"{name}, smoothed")
    ax.plot([e["nimg"] / 1000 for e in epochs], [e[name] for e in epochs], "o", ms=3, color=color)
    ax.set(xlabel="thousands of real images seen", ylabel="loss")
    ax.grid(alpha=0.3)


def plot_losses(run: Path, path: Path) -> None:
    """Loss curves of D and G of one run."""
    figure = Figure(figsize=(11, 3.6))
    titles = {"d_loss": "Discriminator", "g_loss": "Generator"}
    for ax, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        draw_loss(ax, run, name)
        ax.set_title(f"{title} loss")
    caption = "thin: each step; thick: smoothed; dots: mean of an epoch"
    figure.text(0.5, -0.07, caption, ha="center", fontsize=9)
    save_figure(figure, path)


# Panels of curves.png: title, columns with their names, the healthy range, what to see
PANELS = (
    ("Losses", {"d_loss": "D", "g_loss": "G"}, (0.5, 2.0),
     "level, neither towards 0"),
    ("Logits of D", {"real_logit": "real", "fake_logit": "generated"}, (-5, 5),
     "real above generated, both bounded"),
    ("Sign of the logits", {"real_sign": "real", "fake_sign": "generated"}, (-0.8, 0.8),
     "ada keeps real near its target"),
    ("R1", {"r1": "|gradient of D|²"}, None,
     "bounded"),
    ("Path length", {"path_length": "of a batch", "pl_mean": "running mean"}, None,
     "comes to rest"),
    ("Gradient norms", {"g_main_grad": "G", "d_main_grad": "D"}, None,
     "no growth by powers of ten"),
    ("p of augmentation", {"ada_p": "p"}, (0, AdaptiveAugment.P_MAX),
     "below its cap; only with ada"),
    ("FID", {"fid": "samples", "fid_floor": "real halves"}, None,
     "falls towards the floor"),
    ("Overfitting of D", {"overfitting": "(train - test) / (train - generated)"}, (-0.1, 0.5),
     "0: none, 1: unseen slices pass for generated"),
    ("What moves a pixel", {"vary_z": "z", "vary_noise": "noise", "vary_class": "class"},
     (0.3, 1.2), "share of the variety of real slices; z well above noise"),
    ("Class seen by an encoder", {"agreement": "samples", "agreement_real": "real test slices"},
     None, "samples near or above real slices"),
    ("Leaks", {"leak_rotation": "spread of tilt, ratio", "leak_flip": "sides, deviations",
               "leak_border": "border, grey levels"}, (-1, 2), "1, 0 and 0 without a leak"),
    ("Speed", {"img_per_s": "images per second"}, None, "level"),
)  # fmt: skip


def plot_curves(run: Path, path: Path) -> None:
    """Everything a run measures of itself, healthy ranges shaded, each with a caption in words."""
    history = read_history(run)
    shown = [p for p in PANELS if any(len(history.measured(name)) for name in p[1])]
    if not shown:
        return
    columns = 4
    figure = Figure(figsize=(4.2 * columns, 3.1 * math.ceil(len(shown) / columns)))
    axes = list(figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flat)
    for ax in axes[len(shown) :]:
        ax.axis("off")
    for ax, (title, names, healthy, caption) in zip(axes, shown, strict=False):
        for i, (name, label) in enumerate(names.items()):
            if len(history.measured(name)):
                draw_column(ax, history, name, label, f"C{i}")
        if healthy is not None:
            ax.axhspan(*healthy, color="C2", alpha=0.08, lw=0)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(caption, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7, frameon=False)
        ax.grid(alpha=0.3)
    found = diagnose(history).values()
    text = "Against thousands of real images seen. Green: healthy range. Thin: steps, smoothed.\n"
    figure.suptitle(text + ("\n".join(found) or "No rule finds anything wrong."), fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def draw_column(ax: Axes, history: History, name: str, label: str, color: str) -> None:
    """One column: its epochs as dots joined by a line, its steps, smoothed, behind them."""
    for columns in history:
        if name in columns:
            there = np.isfinite(columns[name])
            kimg, values = columns["nimg"][there] / 1000, columns[name][there]
            if columns is history.steps:
                ax.plot(kimg, smooth(values, 20), lw=0.5, alpha=0.5, color=color)
            else:
                ax.plot(kimg, values, ".-", ms=4, color=color, label=label)


def read_square(grid: Path) -> np.ndarray:
    """The left part of a grid, twice as wide as high at most."""
    picture = np.asarray(Image.open(grid))
    return picture[:, : 2 * picture.shape[0]]


def plot_progress(run: Path, path: Path, num_columns: int = 6) -> None:
    """A strip of the image grids over the epochs: the first images of each, at even distances."""
    grids = sorted((run / "grids").glob("epoch*.png"))
    if not grids:
        return
    chosen = [
        grids[i] for i in np.unique(np.linspace(0, len(grids) - 1, num_columns).round().astype(int))
    ]
    figure = Figure(figsize=(3.2 * len(chosen), 2))
    for ax, grid in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
        ax.imshow(read_square(grid), cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"epoch {int(grid.stem[5:])}", fontsize=9)
        ax.axis("off")
    save_figure(figure, path)
