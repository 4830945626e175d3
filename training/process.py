"""The process that trains: requests to stop, ranks, precision, lost workers."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from config import Config, UserError
from modules import channels
from utils import SIGNALS, compiled_folder, first_line, num_ranks, rank


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

    def __init__(self) -> None:
        self.name, self.waits = "", False
        self.before: dict[int, Any] = {}  # the handlers that it stands in for

    def __enter__(self) -> "StopRequest":
        self.name, self.waits = "", False
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        heard = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
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
    def default_handlers(self) -> Iterator[None]:
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


def leave() -> None:
    """End the process once training is over; at once if it was asked to stop."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if STOP.name:
        sys.stdout.flush()
        os._exit(0)  # the compiler's threads would be waited for, which may take long


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
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # not the user's
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled_folder(cache)


@contextmanager
def rank_0_first(device: torch.device) -> Iterator[None]:
    """The other ranks enter when rank 0 has left: they find the files it wrote, or end with it."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if rank() > 0:
        with STOP.default_handlers():
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


def kill_workers() -> None:
    """End the loader's processes, which ignore SIGTERM: else this one would wait for them."""
    told = getattr(signal, "SIGCHLD", None)  # by which PyTorch would raise again
    before = told and signal.signal(told, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join(5)
    if told:
        signal.signal(told, before)


@contextmanager
def lost_workers_named(config: Config) -> Iterator[None]:
    """Raises UserError where a worker of the loader died, or sent nothing for long.

    PyTorch raises the first from a signal, wherever the main process is.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        kill_workers()
        advice = f"num_workers = {config.num_workers}: 0 loads without other processes"
        raise UserError(f"the loader lost a worker: {first_line(error)}. {advice}") from error
