"""The process that trains: requests to stop, ranks, precision, lost workers."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config, UserError
from modules import channels
from utils import SIGNALS, compiled_folder, first_line, mark_used, num_ranks, rank, work_alone

# Variables that start ranks, with torchrun or by hand; LOCAL_RANK only matters for GPUs
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
SAID_AFTER = 5  # seconds of waiting for other ranks
MOST_WAITED = timedelta(hours=3)  # for rank 0, which decodes and measures alone
ALARM = getattr(signal, "SIGALRM", None)  # Windows has no alarm


class Stopped(KeyboardInterrupt):
    """Raised by a request to stop, unless the request is deferred."""


class StopRequest:
    """Context in which Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the work in good order.

    A request raises Stopped, or is only noted within `deferred`. Python loses an exception that is
    raised in a finalizer, so an alarm repeats the request. A second signal, after a second or more,
    kills a process that trains alone: when a terminal closes, shell and system send one each. With
    several ranks it does not, as torchrun and Slurm may each send one to every rank. Signals that
    the parent process had ignored, as nohup does, stay ignored.
    """

    SECONDS = 3  # between two alarms
    PATIENCE = 1  # seconds after which another signal is a second request
    name, since = "", 0.0  # of the signal that came
    defers = False
    replaced: Mapping[int, Any] = {}  # handlers from before the context, by signal number

    def __enter__(self) -> "StopRequest":
        self.name, self.defers = "", False
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        heard = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        self.replaced = {number: signal.signal(number, self.ask) for number in heard}
        if ALARM:
            self.replaced[ALARM] = signal.signal(ALARM, self.stop)
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGHUP":  # the terminal is gone: writing to it would be an error
            for stream in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if self.name:
            if num_ranks() == 1 and time.monotonic() - self.since > self.PATIENCE:
                raise KeyboardInterrupt
            return
        self.name, self.since = name, time.monotonic()
        if ALARM:
            signal.setitimer(signal.ITIMER_REAL, self.SECONDS, self.SECONDS)
        self.stop(number, frame)

    def stop(self, number: int, frame: FrameType | None) -> None:
        if not self.defers:
            raise Stopped

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A request within is only noted, in `name`."""
        before, self.defers = self.defers, True
        try:
            yield
        finally:
            self.defers = before

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """A request within raises Stopped at once, and so does one that was noted before."""
        with self.deferred():
            self.defers = False
            if self.name:
                raise Stopped
            yield

    @contextmanager
    def default_handlers(self) -> Iterator[None]:
        """A signal within ends the process: for a wait in which Python can run no handler."""
        before = {number: signal.signal(number, signal.SIG_DFL) for number in self.replaced}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self.defers = True
        if ALARM:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.replaced.items():
            signal.signal(number, handler)
        self.replaced = {}


STOP = StopRequest()  # the only one, as a process has one handler for each signal


def leave() -> None:
    """End the process after training; without delay if it was asked to stop."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if STOP.name:
        sys.stdout.flush()
        os._exit(0)  # a normal exit would wait for the threads of the compiler


def unusable_gpu() -> str:
    """Why PyTorch cannot use the NVIDIA GPU of this machine; "" if it can, or if there is none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
        return ""
    try:
        command = ["nvidia-smi", "--version"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    lines = (line.partition(":") for line in told.split("\n"))
    found = {key.strip().lower(): value.strip() for key, _, value in lines}
    driver, cuda = found.get("driver version", "unknown"), found.get("cuda version", "unknown")
    needs = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"this machine has an NVIDIA GPU (driver {driver}, for CUDA up to {cuda}), but torch "
        f"{torch.__version__} is built {needs} and cannot use it: install a torch for that CUDA "
        "(pytorch.org/get-started), or a newer driver"
    )


def resolve_device(name: str) -> torch.device:
    """The device to compute on; `auto` takes CUDA, then MPS, then the CPU.

    Raises UserError if the machine lacks this device, or has fewer GPUs than ranks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((device for device, found in available.items() if found), "cpu")
    elif not available.get(name, True):
        reason = name == "cuda" and unusable_gpu()
        reason = reason or f"torch {torch.__version__} finds none on this machine"
        raise UserError(f"device = {name}: {reason}")
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

    `auto` takes bfloat16 if the device computes with it natively. A CPU also needs 32 feature maps
    or more in the last layer: with fewer, bfloat16 was measured to be no faster.
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
    """On Linux CPUs, keep freed memory for reuse: new pages from the system cost time to zero.

    Without it a step of wide networks (bfloat16) was measured to take 1.2 to 1.5 times as long.
    """
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc: M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1
            libc.mallopt(-4, 0)
            libc.mallopt(-1, -1)


def tune(device: torch.device, cache: Path) -> None:
    """Let PyTorch pick its fastest convolutions, use TF32, and keep compiled code in `cache`."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled_folder(cache)
    mark_used(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))


def check_ranks() -> None:
    """Raises UserError if variables that start ranks are incomplete or no numbers."""
    found = {name: os.environ[name] for name in LAUNCH if name in os.environ}
    number = {name: int(value) if value.isdecimal() else -1 for name, value in found.items()}
    ranks, missing = number.get("WORLD_SIZE", 1), [name for name in LAUNCH[:4] if name not in found]
    right = 0 <= number.get("RANK", 0) < ranks
    if ranks > 1:
        right &= not missing and number["MASTER_PORT"] > 0 and number.get("LOCAL_RANK", 0) >= 0
    if not right:
        work_alone()  # so that this process prints the error
        text = ", ".join(f"{name} = {value}" for name, value in found.items())
        text += f", but no {', '.join(missing)}" * bool(missing)
        raise UserError(f"{text}: start with torchrun, or unset these variables")


def join_ranks(backend: str) -> None:
    """Wait for all ranks, and say so if it takes long. Raises UserError if they cannot be met."""
    place = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
    text = f"rank {rank()} of {num_ranks()} waits for the others at {place}"
    advice = "if you did not start them, unset RANK and WORLD_SIZE"
    how = {"file": sys.stderr, "flush": True}
    said = threading.Timer(SAID_AFTER, print, [f"{text}; {advice}"], how)
    said.start()
    try:
        with STOP.default_handlers():
            dist.init_process_group(backend, timeout=MOST_WAITED)
    except (ValueError, dist.DistError) as error:
        raise UserError(f"{text}: {first_line(error)}; {advice}") from error
    finally:
        said.cancel()


@contextmanager
def rank_0_first(device: torch.device) -> Iterator[None]:
    """The other ranks wait until rank 0 is done and its files are there; they end if it fails."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if rank() > 0:
        join_ranks(backend)
    yield
    if rank() == 0 and num_ranks() > 1:
        join_ranks(backend)


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
    """Give every rank the values of rank 0, as different CPUs may draw different random numbers."""
    for tensor in tensors if num_ranks() > 1 else ():
        dist.broadcast(tensor, 0)


def most_of_ranks(value: int) -> int:
    """The largest value of all ranks. Waits for all processes, but not for their GPUs."""
    if num_ranks() == 1:
        return value
    most = torch.tensor(value)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def kill_workers() -> None:
    """Kill the loader's processes. They ignore SIGTERM, so this process would wait for them."""
    child_ended = getattr(signal, "SIGCHLD", None)  # PyTorch's handler would raise again
    before = child_ended and signal.signal(child_ended, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join(5)
    if child_ended:
        signal.signal(child_ended, before)


class LostWorker(UserError):
    """A loader's worker died or timed out while the loop waited for it, between two steps."""


@contextmanager
def lost_workers_named(config: Config, kind: type[UserError] = UserError) -> Iterator[None]:
    """Raises a UserError if a loader's worker died or timed out, which may interrupt any line."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        kill_workers()
        advice = f"num_workers = {config.num_workers}: 0 loads in the main process"
        raise kind(f"the loader lost a worker: {first_line(error)}. {advice}") from error
