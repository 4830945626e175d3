"""What all modules share: files that outlive kills, seeds, labels, cores, pictures."""

import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from config import UserError

MIN_SHOWN = 96  # pixels of an image in a picture that shows several
CHUNK = 500  # images that are worked on at a time
SIGNALS = [  # that ask a process to end
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
NUM_POSITIONS = 5  # of which a slice's place is a mixture


def printable(text: object) -> str:
    """Text for a terminal or a picture: what is no UTF-8, and escape codes, as backslash codes."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in plain)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; bad input ends it with one line on stderr and exit code 2."""
    leave_a_core()
    threading.excepthook = end_of_thread
    try:
        main()
    except (UserError, OSError) as error:  # of the system: no permission, no space, a lost disk
        print(printable(f"rank {rank()}: " * (rank() > 0) + f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def end_of_thread(end: threading.ExceptHookArgs) -> None:
    """What is said where a thread of a library ends by an error: of the system in one line."""
    if issubclass(end.exc_type, OSError):
        print_once(f"warning: {end.exc_value}")
    else:
        threading.__excepthook__(end)


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


def width_of_c(num_classes: int, by_position: bool) -> int:
    """Entries of c; 0 with a single class and no level: nothing to condition on."""
    if by_position:
        return num_classes * NUM_POSITIONS
    return num_classes if num_classes > 1 else 0


def conditions(labels: np.ndarray, positions: np.ndarray | None, c_dim: int) -> Tensor:
    """Class indices [N] and levels [N] in [0, 1], or None, -> c float32 [N, c_dim], of sum 1.

    Each class has an entry for each of LEVELS levels, and a slice between two of them a share of
    both: networks that were made for one-hot labels interpolate, in every weight of a label.
    """
    if positions is None:
        return one_hot(labels, c_dim)
    place = torch.as_tensor(positions).float()[:, None] * (NUM_POSITIONS - 1)
    shares = (1 - (place - torch.arange(NUM_POSITIONS)).abs()).clamp(min=0)  # [N, LEVELS]
    return (one_hot(labels, c_dim // NUM_POSITIONS)[:, :, None] * shares[:, None]).flatten(1)


# Ranks: the processes that torchrun starts, one for each GPU


def num_ranks() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process among them; 0 writes all files and does all the talking."""
    return int(os.environ.get("RANK", 0))


def print_once(text: str) -> None:
    """Print, on rank 0 only, above a progress bar."""
    if rank() == 0:
        tqdm.write(printable(text))
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


def machine() -> str:
    """Where a process number means this process: containers of one host name count anew."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()}-{space.stat().st_ino if space.exists() else 0}"


def partial_path(path: Path) -> Path:
    """A name of its own under which this process writes a file or folder until it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}@{machine()}.{secrets.token_hex(4)}.partial")


def delete_partials(folder: Path) -> None:
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
    except OSError as error:
        error.filename = error.filename or str(path)  # of a full disk none is told
        raise
    finally:
        partial.unlink(missing_ok=True)


CHECKSUM_MARK = b"CRC:"  # at the end of a cached array, before its checksum


def append_checksum(path: Path) -> None:
    """Append a checksum to a file, of which readers of arrays know nothing."""
    checksum = crc_of(path, path.stat().st_size)
    with open(path, "ab") as file:
        file.write(CHECKSUM_MARK + checksum.to_bytes(4, "little"))


def has_checksum(path: Path) -> bool:
    """Whether a file is there, with the checksum of what it holds: no byte of it has changed."""
    try:
        size = path.stat().st_size - len(CHECKSUM_MARK) - 4
        with open(path, "rb") as file:
            file.seek(max(size, 0))
            return file.read() == CHECKSUM_MARK + crc_of(path, size).to_bytes(4, "little")
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
    if whole(path):
        mark_used(path)
    else:
        ensure_writable(path.parent)
        with wait_for_lock(path):
            if not whole(path):  # else another process was faster
                delete_partials(path.parent)
                if path.exists():
                    print_once(f"note: {path} is damaged, and made anew")
                write_atomically(path, write)
    return path


def mark_used(path: Path) -> None:
    """Note the time, for `clean`; in a cache of someone else it stays as it is."""
    with suppress(OSError):
        os.utime(path)


def sha256_of(path: Path) -> str:
    """Of a file, or of the files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def make_array_once(path: Path, write: Callable[[Path], Any]) -> np.ndarray:
    """An array of a cache, as a read-only map of its file, made by one process. Raises UserError.

    A byte that changed since, which would go unseen, is found.
    """

    def write_sealed(partial: Path) -> None:
        write(partial)
        append_checksum(partial)

    make_once(path, write_sealed, has_checksum)
    try:
        return np.load(path, mmap_mode="r")
    except ValueError as error:
        raise UserError(f"{path} is no array: delete it ({first_line(error)})") from error


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock that belongs to a file; wait while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_once(f"waiting for another process that writes {path}")
        lock.acquire()
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # whoever waits finds the file written
        lock.release()


def lock_folder(folder: Path, doing: str = "training") -> FileLock:
    """Keep other processes out of a folder until the lock is released. -> the held lock.

    The lock ends with the process, also when the process is killed.

    Raises:
        UserError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"out = {folder}: another process is {doing} there") from error
    return lock


class DamagedFile(UserError):
    """A checkpoint that was written whole, and is no longer."""


def is_file_name(name: str) -> bool:
    """Whether a name stays in the folder that it is joined to."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def safetensors_bytes(state: dict[str, Tensor], **metadata: str) -> bytes:
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
    content = safetensors_bytes(state, cur_nimg=str(cur_nimg))
    # the library's own way to a file would leave it readable to its owner only
    write_atomically(path, lambda partial: partial.write_bytes(content))


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


# Pictures


def to_uint8(img: Tensor) -> np.ndarray:
    """Images [N, 1, H, W] in [-1, 1] -> uint8 [N, H, W], rounded and clipped."""
    return ((img[:, 0].float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 [N, H, W], N a multiple of columns, as one picture in rows.

    Images below 96 pixels are enlarged by a whole factor k, with a sharp filter (Lanczos).

    Returns:
        uint8 [rows * k * H, columns * k * W].
    """
    N, H, W = images.shape
    k = math.ceil(MIN_SHOWN / max(H, W))
    if k > 1:
        size = (k * W, k * H)
        resized = [
            Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image in images
        ]
        images = np.stack([np.asarray(image) for image in resized])
    rows = images.reshape(N // columns, columns, k * H, k * W)
    return rows.transpose(0, 2, 1, 3).reshape(-1, columns * k * W)


def save_grey(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W] as an 8-bit grey PNG."""
    write_atomically(path, lambda partial: Image.fromarray(picture).save(partial, format="png"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=110, bbox_inches="tight"))


def evenly_spaced(n: int, most: int) -> np.ndarray:
    """Up to `most` indices out of n, at even distances."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold that parts grey values best: most variance between the two sides."""
    counts = np.bincount(values.astype(np.uint8).ravel(), minlength=256).astype(float)
    below, mass = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(np.nan_to_num(between).argmax())


# Pose and leaks


def moments(grey: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of pictures [n, R, R]: centre x and y from the middle in pixels, tilt in degrees, side [n].

    Tilt is that of the long axis to the right; side the grey of the right half minus the left, as a
    share of all.
    """
    at = np.arange(grey.shape[-1]) - (grey.shape[-1] - 1) / 2
    grey = grey.astype(np.float32) + 1e-3
    grey /= grey.sum((1, 2), keepdims=True)
    columns, rows = grey.sum(1), grey.sum(2)  # each [n, R]
    x, y = columns @ at, rows @ at
    xx, yy = columns @ at**2 - x**2, rows @ at**2 - y**2
    xy = np.einsum("nyx,y,x->n", grey, at, at) - x * y
    return x, y, np.degrees(0.5 * np.arctan2(-2 * xy, yy - xx)), columns @ np.sign(at)


def rotate_and_centre(
    grey: np.ndarray, x: np.ndarray, y: np.ndarray, tilt: np.ndarray, scale: np.ndarray | float = 1
) -> np.ndarray:
    """Pictures [n, R, R] with what lies at x and y in the middle, its tilt taken back. -> uint8.

    One pixel shows `scale` pixels of before.
    """
    cos, sin = scale * np.cos(np.radians(tilt)), scale * np.sin(np.radians(tilt))
    sides = grey.shape[-1] / 2
    rows = np.array([[cos, -sin, x / sides], [sin, cos, y / sides]], np.float32)
    shape = [len(grey), 1, *grey.shape[1:]]
    grid = F.affine_grid(torch.from_numpy(rows).movedim(2, 0), shape, align_corners=False)
    found = F.grid_sample(torch.from_numpy(grey)[:, None], grid, align_corners=False)
    return found[:, 0].round().clamp(0, 255).byte().numpy()


def map_in_chunks(function: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """What a function makes of images, which need much memory in float, some at a time."""
    parts = range(0, max(1, len(images)), CHUNK)
    return np.concatenate([function(np.array(images[i : i + CHUNK])) for i in parts])
