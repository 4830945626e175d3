"""Devices, seeds, ranks, requests to stop, run folders and pictures: what the other modules share.

A run is a folder: config.json, log.jsonl, losses.csv, grids/, plots, checkpoints/ and
generator.safetensors.
"""

import ctypes
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tqdm import tqdm

from config import Config, UserError
from modules import Generator, channels

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
SEAL = b"CRC:"  # at the end of a cached array, before its checksum
MAX_CONFIG = 1_000_000  # bytes of config.json
LEVELS = 5  # of which a slice's place is a mixture
DEMO_GENERATOR = Path(__file__).parent / "assets" / "demo_generator"
PATHS = ("data_root", "out", "cache", "init_from")  # settings that are paths
# Settings that say where, how long and how often, not what a run learns
FREE_TO_CHANGE = (
    "epochs", "out", "cache", "data_root", "device", "num_workers", "precision", "compile",
    "snapshot_epochs", "checkpoint_kimg", "fid_kimg", "any_classes",
)  # fmt: skip


def shown(text: object) -> str:
    """Text for a terminal or a picture: what is no UTF-8, and escape codes, as backslash codes."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in plain)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; bad input ends it with one line on stderr and exit code 2."""
    leave_a_core()
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


# Run folders and checkpoints


def newest_run() -> Path:
    """The run under runs/ whose generator was written last; if there is none, the demo one."""
    generators = sorted(RUNS.glob("*/generator.safetensors"), key=lambda path: path.stat().st_mtime)
    if generators:
        return generators[-1].parent
    say(
        f"No run under {RUNS}/ yet: this is the generator in assets/{DEMO_GENERATOR.name}, trained "
        "on the built-in demo brains (synthetic, template-derived)"
    )
    return DEMO_GENERATOR


def cache_of(config: Config) -> Path:
    """The cache of a run, if it holds its images: else, as a shared run may lead anywhere, ours."""
    known = any(config.cache.glob(f"*-{config.img_resolution}.npy"))
    return config.cache if known else Config.cache


def run_folder(path: Path) -> Path:
    """The run that a folder, a generator.safetensors or a checkpoints/*.pt belongs to."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder


def output_folder(path: Path, name: str) -> Path:
    """Where what is made of a run lies: in the run, but of the demo generator under runs/."""
    run = run_folder(path)
    return (RUNS / run.name if run.resolve() == DEMO_GENERATOR.resolve() else run) / name


def machine() -> str:
    """Where a process number means this process: containers of one host name count anew."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()}-{space.stat().st_ino if space.exists() else 0}"


def partial_path(path: Path) -> Path:
    """A name of its own under which this process writes a file or folder until it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}@{machine()}.{secrets.token_hex(4)}.partial")


def sweep(folder: Path) -> None:
    """Delete what processes that were killed left half written, here or in a subfolder.

    Of this machine that is known of the process; of another, what is older than a day is left over.
    """
    for path in folder.rglob("*.partial"):
        if not (writer := re.search(r"\.(\d+)@(.*?)(\.[0-9a-f]{8})?\.partial$", path.name)):
            continue  # not of this project
        try:
            dead = writer[2] == machine() and not is_running(int(writer[1]))
            if dead or path.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # gone meanwhile, or not ours to delete


def is_running(pid: int) -> bool:
    """Whether there is such a process on this machine; on Windows asking would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is someone else's
    return True


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, sync it, rename it: readers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def seal(path: Path) -> None:
    """Append a checksum to a file, of which readers of arrays know nothing."""
    checksum = crc_of(path, path.stat().st_size)
    with open(path, "ab") as file:
        file.write(SEAL + checksum.to_bytes(4, "little"))


def is_sealed(path: Path) -> bool:
    """Whether a file is there, with the checksum of what it holds: no byte of it has changed."""
    try:
        size = path.stat().st_size - len(SEAL) - 4
        with open(path, "rb") as file:
            file.seek(max(size, 0))
            return file.read() == SEAL + crc_of(path, size).to_bytes(4, "little")
    except (FileNotFoundError, NotADirectoryError):
        return False


def crc_of(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes of a file."""
    crc, left = 0, size
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 24))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


def make_once(
    path: Path, write: Callable[[Path], Any], whole: Callable[[Path], bool] = Path.exists
) -> Path:
    """The path of a file of a cache, which one process writes where it is not there, or not whole.

    Raises:
        UserError: it cannot be written.
    """
    if not whole(path):
        ensure_writable(path.parent)
        with alone(path):
            if not whole(path):  # else another process was faster
                if path.exists():
                    say(f"note: {path} is damaged, and made anew")
                write_atomically(path, write)
    return path


def make_array_once(path: Path, write: Callable[[Path], Any]) -> np.ndarray:
    """An array of a cache, as a read-only map of its file, made by one process. Raises UserError.

    A byte that changed since, which would go unseen, is found.
    """

    def write_sealed(partial: Path) -> None:
        write(partial)
        seal(partial)

    make_once(path, write_sealed, is_sealed)
    try:
        return np.load(path, mmap_mode="r")
    except ValueError as error:
        raise UserError(f"{path} is no array: delete it ({first_line(error)})") from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is making this file, on file systems that know locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f"{path.name}.lock")
    with open(name, "a") as file:
        try:
            if fcntl and not try_lock(file):
                say(f"waiting for another process, which makes {path}")
                fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks here: both make it, and the last one stays
        try:
            yield
        finally:
            name.unlink(missing_ok=True)  # whoever waits for it finds the file made


def try_lock(file: TextIO) -> bool:
    """Whether this process has the lock of a file now. Raises OSError where there are no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False


def lock(folder: Path) -> TextIO:
    """Keep other processes out of a folder, on shared storage too, while the file is open.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:  # of the process: it ends with it, and no worker of the loader inherits it
        if fcntl and not try_lock(file):
            raise UserError(f"out = {folder}: another process is training there")
    except OSError as error:  # a file system without locks
        say(f"note: {folder} cannot be locked ({error.strerror}): let nothing else train there")
    return file


class DamagedFile(UserError):
    """A checkpoint that was written whole, and is no longer."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, plain tensors and values only.

    Raises:
        DamagedFile: it is truncated, a bit has changed, or it is none.
        UserError: it cannot be read, or memory is too small for it.
    """
    try:
        with zipfile.ZipFile(path) as parts:  # torch does not look at the checksums
            if part := parts.testzip():
                raise DamagedFile(f"{path} is damaged: {part} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"G_ema": dict, "settings": dict, "cur_nimg": int}
        if all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            return state
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises a different type for each kind of damage
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: too little memory to read it") from error
        raise DamagedFile(f"{path} is truncated or no checkpoint ({first_line(error)})") from error
    raise DamagedFile(f"{path} is no checkpoint of this project")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"{path.stat().st_size:,} bytes are no settings")
        saved = json.loads(path.read_text())
        known = {field.name for field in fields(Config)}
        settings = {k: v for k, v in saved["settings"].items() if k in known}
        paths = {k: Path(settings[k]) for k in PATHS if settings.get(k)}
        classes, data = saved["classes"], saved["data"]
        if not classes or not all(isinstance(v, str) for v in [*classes, data]):
            raise ValueError("classes and data must be names")
        if not all(is_file_name(name) for name in classes):  # they become folders
            raise ValueError("a class is named like a path")
        return Config(**settings | paths), classes, data
    except FileNotFoundError as error:
        raise UserError(f"{run} is no run: it has no config.json") from error
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def is_file_name(name: str) -> bool:
    """Whether a name stays in the folder that it is joined to."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first: what is called otherwise is none."""
    return sorted((run / "checkpoints").glob("[0-9]" * 10 + ".pt"))


def require_same(saved: dict[str, Any], config: Config, source: Path) -> None:
    """Raises UserError that names every setting that differs, but for those free to change."""
    wanted = plain_settings(config)
    names = [n for n in wanted if n not in FREE_TO_CHANGE and saved.get(n, wanted[n]) != wanted[n]]
    if names:
        changed = "; ".join(f"{n} = {saved[n]}, now {wanted[n]}" for n in names)
        raise UserError(f"{source} was trained with {changed}; use another --out")


def open_run(config: Config) -> dict[str, Any] | None:
    """The last whole checkpoint of a run, if there is one of the same settings. Writes nothing.

    Raises:
        UserError: other settings; none can be read; there are none left of a run that had some.
    """
    ensure_writable(config.out)
    if (config.out / "config.json").exists():
        require_same(plain_settings(read_run_config(config.out)[0]), config, config.out)
    found = checkpoints(config.out)
    for path in found[::-1]:
        try:
            state = load_checkpoint(path)
        except DamagedFile as error:
            say(f"warning: {error}; looking for the one before it")
            continue
        require_same(state["settings"], config, path)
        return state
    if found:
        raise UserError(f"{found[0].parent}: no checkpoint is whole; delete it to start at image 0")
    if (generator := config.out / "generator.safetensors").exists():
        raise UserError(
            f"{generator} is there, but no checkpoint to go on from; use another --out, or delete "
            f"{config.out} to start at image 0"
        )
    return None


def start_run(
    config: Config, classes: list[str], data: str, saved: dict[str, Any] | None
) -> TextIO:
    """Take the folder for this process and write config.json. -> the lock, open while it trains.

    Raises:
        UserError: the run was trained on other data, or another process trains there, or did since
            the checkpoint `saved` was read.
    """
    if (config.out / "config.json").exists():
        if read_run_config(config.out)[1:] != (classes, data):
            raise UserError(f"{config.out} was trained on other data; use another --out")
    file = lock(config.out)
    nimg = saved["cur_nimg"] if saved else 0
    for path in checkpoints(config.out):
        if path.stem > f"{nimg:010d}":
            try:
                load_checkpoint(path)
            except DamagedFile:
                path.rename(path.with_suffix(".damaged"))
            else:
                text = "another process trained there; the same command goes on"
                raise UserError(f"{config.out}: {text}")
    sweep(config.out)
    write_run_config(config.out, config, classes, data)
    return file


def packed(state: dict[str, Tensor], **metadata: str) -> bytes:
    """Tensors as a safetensors file, with a checksum of their values."""
    state = {k: v.contiguous().cpu() for k, v in state.items()}
    content = save(state, metadata | {"crc32": crc_of_tensors(state)})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])  # the library leaves the order to chance
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    return content[:8] + text + content[8 + length :]


def write_safetensors(path: Path, state: dict[str, Tensor], cur_nimg: int) -> None:
    """Write tensors, with the number of images seen."""
    content = packed(state, cur_nimg=str(cur_nimg))
    # the library's own way to a file would leave it readable to its owner only
    write_atomically(path, lambda partial: partial.write_bytes(content))


def save_generator(run: Path, G_ema: Generator, cur_nimg: int) -> None:
    """Write generator.safetensors, which together with config.json is what is shared."""
    write_safetensors(run / "generator.safetensors", G_ema.state_dict(), cur_nimg)


def crc_of_tensors(state: dict[str, Tensor]) -> str:
    """CRC-32 of all values, in the order of their names."""
    crc = 0
    for name in sorted(state):
        crc = zlib.crc32(state[name].flatten().view(torch.uint8).numpy(), crc)
    return str(crc)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Its tensors. Raises DamagedFile or, where it cannot be read, UserError."""
    try:
        content = path.read_bytes()
        state = load(content)
        length = int.from_bytes(content[:8], "little")
        expected = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("crc32")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # safetensors has its own exception, not a ValueError
        raise DamagedFile(f"{path} is truncated or no safetensors file") from error
    if expected not in (None, crc_of_tensors(state)):  # earlier versions kept none
        raise DamagedFile(f"{path} is damaged: its values are not what was written")
    return state


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there, of which no value has changed."""
    try:
        return path.exists() and bool(read_safetensors(path))
    except DamagedFile:
        return False


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
        state = read_safetensors(weights)
    with torch.device("meta"):  # sizes are compared before memory is taken
        G = Generator(config, width_of_c(len(classes), config.condition_level))
    try:
        state = {name: value.float() for name, value in state.items()}
        G.load_state_dict(state, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        size = f"img_resolution = {config.img_resolution}, channel_base = {config.channel_base}"
        raise UserError(f"{weights} does not fit {run}/config.json ({size})") from error
    return G.eval().requires_grad_(False), config, classes


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
