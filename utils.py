"""Devices, seeds, labels, ranks, signals and folders: what the other modules share."""

import ctypes
import hashlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tqdm import tqdm

from config import Config, UserError
from modules import channels

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEVELS = 5  # of which a slice's place is a mixture


def shown(text: object) -> str:
    """Text for a terminal or a picture: what is no UTF-8, and escape codes, as backslash codes."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in plain)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; bad input ends it with one line on stderr and exit code 2."""
    leave_a_core()
    threading.excepthook = end_of_thread
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        if STOP.name:
            sys.stdout.flush()
            os._exit(0)  # the compiler's threads would be waited for, which may take long
    except (UserError, OSError) as error:  # of the system: no permission, no space, a lost disk
        print(shown(f"rank {rank()}: " * (rank() > 0) + f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def end_of_thread(end: threading.ExceptHookArgs) -> None:
    """What is said where a thread of a library ends by an error: of the system in one line."""
    if issubclass(end.exc_type, OSError):
        say(f"warning: {end.exc_value}")
    else:
        threading.__excepthook__(end)


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
        self.before: dict[int, Any] = {}  # the handlers that it stands in for

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

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """A request within ends the process: it waits where Python cannot answer."""
        before = {number: signal.signal(number, signal.SIG_DFL) for number in self.before}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self.waits = True
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


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

    auto is bfloat16 where it is native and, on a CPU, the last layer has 32 maps or more: with
    fewer it was measured no faster.
    """
    if config.precision != "auto":
        return getattr(torch, config.precision)
    maps = channels(config.img_resolution, config.channel_base, config.channel_max)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and maps >= 32 and torch.cpu._is_avx512_bf16_supported()
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
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled_folder(cache)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def leave_a_core() -> None:
    """One thread less than there are cores, unless OMP_NUM_THREADS says how many.

    Threads wait for the slowest among them. On two cores two took 0.75 to 0.9 times as long as one
    to train, but beside a busy process two to four times as long.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cores() - 1)))


def map_on_cores(function: Callable, items: Sequence, bar: str | None, unit: str) -> list[Any]:
    """`function` of each item, in their order, under a progress bar of that name.

    A thread for each core, and each computes alone: none waits for another, and what comes out does
    not depend on how many there are.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            found = pool.map(function, items)
            return list(tqdm(found, bar, len(items), unit=unit, disable=bar is None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)


def compiled_folder(cache: Path) -> str:
    """Where libraries keep what they compile: a home folder may not be there."""
    cache = cache if is_writable(cache) else Path(tempfile.gettempdir())
    return str(cache.absolute() / "compiled")


def stream_seed(purpose: str, *parts: int) -> int:
    """An independent 63-bit seed for each purpose and tuple, such as (seed, position)."""
    digest = hashlib.sha256(repr((purpose, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def one_hot(labels: np.ndarray, c_dim: int) -> Tensor:
    """Class indices [N] -> one-hot float32 [N, c_dim]; c_dim 0 (unconditional) gives [N, 0]."""
    return torch.eye(max(1, c_dim))[torch.as_tensor(labels)][:, :c_dim]


def width_of_c(num_classes: int, by_level: bool) -> int:
    """Entries of c; 0 with a single class and no level: nothing to condition on."""
    if by_level:
        return num_classes * LEVELS
    return num_classes if num_classes > 1 else 0


def conditions(labels: np.ndarray, levels: np.ndarray | None, c_dim: int) -> Tensor:
    """Class indices [N] and levels [N] in [0, 1], or None, -> c float32 [N, c_dim], of sum 1.

    Each class has an entry for each of LEVELS levels, and a slice between two of them a share of
    both: networks that were made for one-hot labels interpolate, in every weight of a label.
    """
    if levels is None:
        return one_hot(labels, c_dim)
    place = torch.as_tensor(levels).float()[:, None] * (LEVELS - 1)
    shares = (1 - (place - torch.arange(LEVELS)).abs()).clamp(min=0)  # [N, LEVELS]
    return (one_hot(labels, c_dim // LEVELS)[:, :, None] * shares[:, None]).flatten(1)


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
        with STOP.deaf():
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
        tqdm.write(shown(text))
        sys.stdout.flush()


# Folders


def existing_part(folder: Path) -> Path:
    """The folder, or that above it in which it would have to be created."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or created."""
    existing = existing_part(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def ensure_writable(folder: Path) -> None:
    """Raises UserError where the folder could not be written or created; writes nothing itself."""
    existing = existing_part(folder)
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is not a folder")
    if not is_writable(folder):
        raise UserError(f"cannot write to {folder}: no permission in {existing}")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
