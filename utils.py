"""What all modules share: messages, cores, labels, files that survive kills, pictures.

A file is written under another name, synced and renamed, so that readers see a whole file or none.
Files that are read again carry a checksum. Nothing here unpickles code.
"""

import errno
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
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_POSITIONS = 5  # entries of c for each class, if c holds the position of a slice
CHUNK = 100  # images that `map_in_chunks` works on at a time
MIN_SHOWN = 96  # pixels: smaller images are enlarged in a picture that shows several
CHECKSUM_MARK = b"CRC:"  # stands between a file's content and its checksum
# Signals that ask a process to end
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


# Messages, commands and cores


def printable(text: object) -> str:
    """Text in which escape codes and bytes that are no UTF-8 are written as backslash codes."""
    plain = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in plain)


def print_once(text: str) -> None:
    """Print above a progress bar; only rank 0 prints."""
    if rank() == 0:
        tqdm.write(printable(text))
        sys.stdout.flush()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class LastingStream:
    """A stream whose reader may vanish: from then on it writes nowhere, and the work goes on.

    Its reader may be a program such as tee, a terminal, or a file on a full disk, which is said.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.lasting():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.lasting():
            self.stream.flush()

    @contextmanager
    def lasting(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass  # only this text is lost
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if error.errno not in (errno.EPIPE, errno.EIO) and self is sys.stdout:
                print(f"warning: the output is not written: {error.strerror}", file=sys.stderr)


def run_command(main: Callable[[], None]) -> None:
    """Run a command. Bad input and errors of the system end it with one line and exit code 2.

    Signs that the terminal or file has no code for are written as backslash codes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    leave_a_core()
    threading.excepthook = print_error_of_thread
    try:
        main()
    except (UserError, OSError) as error:  # OSError: no permission, no space, a lost disk
        print(printable(f"rank {rank()}: " * (rank() > 0) + f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def print_error_of_thread(end: threading.ExceptHookArgs) -> None:
    """Print an OSError of a library's thread as one line, any other error in full."""
    if issubclass(end.exc_type, OSError):
        print_once(f"warning: {end.exc_value}")
    else:
        threading.__excepthook__(end)


def work_alone() -> None:
    """Forget that other processes train with this one, as torchrun's variables may say."""
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def num_ranks() -> int:
    """Number of processes that train together; torchrun starts one for each GPU."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process among those that train together; rank 0 writes files and prints."""
    return int(os.environ.get("RANK", 0))


def num_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def leave_a_core() -> None:
    """Let PyTorch use all cores but one, unless OMP_NUM_THREADS is set.

    PyTorch's threads wait for the slowest of them. On two cores, training with two threads took
    0.75 to 0.9 of the time of one thread; beside a busy process it took two to four times as long.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cores() - 1)))


def map_on_cores(function: Callable, items: Sequence, bar: str | None, unit: str) -> list[Any]:
    """Call a function for each item, on all cores, under a progress bar called `bar`.

    Each core has one thread, in which PyTorch computes alone. So no thread waits for another, and
    the results, which are in the order of the items, do not depend on the number of cores.
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


def map_in_chunks(function: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Call a function for some images at a time, on all cores, and join the results."""
    starts = range(0, max(1, len(images)), CHUNK)
    chunks = [images[start : start + CHUNK] for start in starts]
    return np.concatenate(map_on_cores(lambda x: function(np.array(x)), chunks, None, "chunk"))


# Seeds and labels


def stream_seed(purpose: str, *parts: int) -> int:
    """An independent 63-bit seed for each purpose and each tuple, such as (seed, nimg)."""
    digest = hashlib.sha256(repr((purpose, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def evenly_spaced(n: int, most: int) -> np.ndarray:
    """Up to `most` of the indices 0 to n - 1, at even distances."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def random_rows(n: int, most: int) -> np.ndarray:
    """Up to `most` of the indices 0 to n - 1 in rising order; the same n and most give the same.

    Indices at even distances may all be of one position, where each scan has as many slices.
    """
    return np.sort(np.random.default_rng(0).permutation(n)[:most])


def one_hot(labels: np.ndarray, c_dim: int) -> Tensor:
    """Class indices [N] -> one-hot float32 [N, c_dim]; c_dim 0 (unconditional) gives [N, 0]."""
    return torch.eye(max(1, c_dim))[torch.as_tensor(labels)][:, :c_dim]


def width_of_c(num_classes: int, by_position: bool) -> int:
    """Number of entries of c; 0 if there is one class and no position to condition on."""
    if by_position:
        return num_classes * NUM_POSITIONS
    return num_classes if num_classes > 1 else 0


def conditions(labels: np.ndarray, positions: np.ndarray | None, c_dim: int) -> Tensor:
    """Class indices [N] and positions [N] in [0, 1], or None, -> c float32 [N, c_dim], of sum 1.

    With positions, each class has five entries, for positions 0, 0.25, ... 1. A slice between two
    of them has a share in both entries, so networks made for one-hot labels interpolate.
    """
    if positions is None:
        return one_hot(labels, c_dim)
    place = torch.as_tensor(positions).float()[:, None] * (NUM_POSITIONS - 1)
    shares = (1 - (place - torch.arange(NUM_POSITIONS)).abs()).clamp(min=0)  # [N, NUM_POSITIONS]
    return (one_hot(labels, c_dim // NUM_POSITIONS)[:, :, None] * shares[:, None]).flatten(1)


# Files, folders and locks


def ensure_writable(folder: Path) -> None:
    """Raises UserError if a folder cannot be written or created. Writes nothing."""
    existing = next(filter(Path.exists, (path := folder.absolute(), *path.parents)), folder)
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: no permission in {existing}")


def compiled_folder(cache: Path) -> str:
    """Folder for code that libraries compile. The home folder, their default, may be missing."""
    try:
        ensure_writable(cache)
    except UserError:
        cache = Path(tempfile.gettempdir())
    return str(cache.absolute() / "compiled")


def is_file_name(name: str) -> bool:
    """Whether a name stays inside the folder that it is joined to."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its ending, or else by its first bytes; a DICOMDIR is none."""
    ending = path.suffix.lower()
    if ending in (".dcm", ".ima"):
        return True
    if ending not in ("", ".dicom", ".dic", ".mr") and not ending[1:].isdigit():
        return False
    if not path.is_file():  # reading from a pipe could wait forever
        return False
    try:
        with open(path, "rb") as file:
            content = file.read(132)
    except OSError:
        return False
    if path.name.upper() == "DICOMDIR" or len(content) < 132:
        return False
    # without a preamble a file starts with an element of group 2 or 8, of a known type or short
    group, element = (int.from_bytes(content[i : i + 2], "little") for i in (0, 2))
    length, kind = int.from_bytes(content[4:8], "little"), content[4:6]
    bare = group in (2, 8) and element <= 0x80
    return content[128:] == b"DICM" or bare and (kind.isalpha() and kind.isupper() or length <= 256)


def size_of(path: Path) -> int:
    """Size in bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def machine() -> str:
    """Name of the machine or container; process numbers are unique within it."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()}-{space.stat().st_ino if space.exists() else 0}"


def partial_path(path: Path) -> Path:
    """A name that no other process uses, for a file or folder that is not yet whole."""
    return path.with_name(f"{path.name}.{os.getpid()}@{machine()}.{secrets.token_hex(4)}.partial")


def delete_partials(folder: Path) -> None:
    """Delete unfinished files of killed processes, in a folder and in its subfolders.

    A file of this machine is deleted if its process no longer runs. A file of another machine is
    deleted once it is a day old.
    """
    for path in folder.rglob("*.partial"):
        if not (writer := re.search(r"\.(\d+)@(.*?)(\.[0-9a-f]{8})?\.partial$", path.name)):
            continue  # another program wrote it
        try:
            dead = writer[2] == machine() and not is_running(int(writer[1]))
            if dead or path.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # another process deleted it, or this one may not


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number. Windows cannot be asked: always True."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # a process of another user
    return True


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, sync it and rename it: readers see a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


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


def lock_folder(folder: Path, doing: str = "training") -> AcquireReturnProxy:
    """Lock a folder for a `with`, or until the process ends. Raises UserError if it is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"out = {folder}: another process is {doing} there") from error


# Files of a cache


def append_checksum(path: Path) -> None:
    """Append a checksum to a file; readers of arrays do not notice it."""
    checksum = crc_of(path, path.stat().st_size)
    with open(path, "ab") as file:
        file.write(CHECKSUM_MARK + checksum.to_bytes(4, "little"))


def has_checksum(path: Path) -> bool:
    """Whether a file exists and ends with the checksum of its content: no byte has changed."""
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
    path: Path, write: Callable[[Path], Any], is_whole: Callable[[Path], bool] = Path.exists
) -> Path:
    """Write a cache file, in one process, unless it is whole. Raises UserError if this fails."""
    if is_whole(path):
        mark_used(path)
    else:
        ensure_writable(path.parent)
        with wait_for_lock(path):
            if not is_whole(path):  # else another process wrote it meanwhile
                delete_partials(path.parent)
                if path.exists():
                    print_once(f"note: {path} is damaged, and is made again")
                write_atomically(path, write)
    return path


def mark_used(path: Path) -> None:
    """Set a file's time to now, which `prepare.py clean` reads; a foreign file keeps its time."""
    with suppress(OSError):
        os.utime(path)


def make_array_once(path: Path, write: Callable[[Path], Any]) -> np.ndarray:
    """Map an array of a cache; write it first if needed. Raises UserError if this fails."""

    def write_with_checksum(partial: Path) -> None:
        write(partial)
        append_checksum(partial)

    make_once(path, write_with_checksum, has_checksum)
    try:
        return np.load(path, mmap_mode="r")
    except ValueError as error:
        raise UserError(f"{path} is no array: delete it ({first_line(error)})") from error


# Tensors


class DamagedFile(UserError):
    """A file whose content is not what was written."""


def safetensors_bytes(state: dict[str, Tensor], **metadata: str) -> bytes:
    """Tensors as the content of a safetensors file, with a checksum of all values."""
    state = {k: v.contiguous().cpu() for k, v in state.items()}
    content = save(state, metadata | {"crc32": crc_of_tensors(state)})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])  # the library leaves the order to chance
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    return content[:8] + text + content[8 + length :]


def write_safetensors(path: Path, state: dict[str, Tensor], cur_nimg: int) -> None:
    """Write tensors and the number of images seen in training, readable to all users."""
    content = safetensors_bytes(state, cur_nimg=str(cur_nimg))
    write_atomically(path, lambda partial: partial.write_bytes(content))


def images_seen(path: Path) -> int | None:
    """The number of images that a safetensors file was written with; None if it tells none."""
    try:
        with safe_open(path, "numpy") as file:
            return int(file.metadata()["cur_nimg"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        return None


def crc_of_tensors(state: dict[str, Tensor]) -> str:
    """CRC-32 of all values, in the order of their names."""
    crc = 0
    for name in sorted(state):
        crc = zlib.crc32(state[name].flatten().view(torch.uint8).numpy(), crc)
    return str(crc)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises UserError if it cannot be read, DamagedFile if it changed."""
    try:
        content = path.read_bytes()
        state = load(content)
        length = int.from_bytes(content[:8], "little")
        expected = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("crc32")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # safetensors has an exception of its own, which is no ValueError
        raise DamagedFile(f"{path} is truncated or no safetensors file") from error
    if expected not in (None, crc_of_tensors(state)):  # None: another program wrote it
        raise DamagedFile(f"{path} is damaged: its values are not what was written")
    return state


def is_whole(path: Path) -> bool:
    """Whether a safetensors file exists, and no value has changed."""
    try:
        return path.exists() and bool(read_safetensors(path))
    except DamagedFile:
        return False


# Pictures


def to_uint8(img: Tensor) -> np.ndarray:
    """Images [N, 1, H, W] in [-1, 1] -> uint8 [N, H, W], rounded and clipped."""
    return ((img[:, 0].float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 [N, H, W], N a multiple of columns -> one picture [rows * kH, columns * kW].

    k is 1, or enlarges images below 96 pixels by a whole factor, with a sharp filter (Lanczos).
    """
    N, H, W = images.shape
    k = math.ceil(MIN_SHOWN / max(H, W))
    if k > 1:
        size, filter = (k * W, k * H), Image.Resampling.LANCZOS
        images = np.stack([Image.fromarray(image).resize(size, filter) for image in images])
    rows = images.reshape(N // columns, columns, k * H, k * W)
    return rows.transpose(0, 2, 1, 3).reshape(-1, columns * k * W)


def save_grey(picture: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W] as an 8-bit grey PNG, uint16 as a 16-bit one."""
    write_atomically(path, lambda partial: Image.fromarray(picture).save(partial, format="png"))


def read_picture(path: Path) -> np.ndarray:
    """The picture in a file of `save_grid`, without its labels. -> uint8 [H, W]."""
    with Image.open(path) as image:
        box = map(int, image.info["picture"].split()) if "picture" in image.info else None
        return np.asarray(image.crop(tuple(box) if box else None))


def save_grid(
    picture: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, path: Path
) -> None:
    """Write a picture uint8 [H, W] as grey PNG, with names of its rows, its columns and itself.

    The pixels stay as they are; `read_picture` reads them back.
    """
    H, W = picture.shape
    size = max(14, H // len(rows) // 10)  # pixels, of a letter
    font, line = ImageFont.truetype(font_file(), size), round(1.25 * size)
    head = label(title, max(8, int(W / size / 0.65))).replace("\\$", "$")
    beside = [label(name, 20, 4).replace("\\$", "$") for name in rows]
    widths = [font.getlength(part) for name in beside for part in name.split("\n")]
    left, top = round(max(widths)) + size, line * (head.count("\n") + 2) + size // 2
    canvas = Image.new("L", (left + W, top + H), 255)
    canvas.paste(Image.fromarray(picture), (left, top))
    words = [((left + W / 2, size // 4), head, "ma")]  # place, text, anchor
    for i, name in enumerate(columns):
        words.append(((left + W * (i + 0.5) / len(columns), top - size // 3), name, "md"))
    for i, name in enumerate(beside):
        words.append(((left - size // 2, top + H * (i + 0.5) / len(rows)), name, "rm"))
    draw = ImageDraw.Draw(canvas)
    for place, text, anchor in words:
        draw.multiline_text(place, text, 0, font, anchor, align="center")
    info = PngInfo()
    info.add_text("picture", f"{left} {top} {left + W} {top + H}")
    write_atomically(path, lambda target: canvas.save(target, format="png", pnginfo=info))


# Figures


def ready_matplotlib() -> None:
    """Let matplotlib be imported under any MPLBACKEND, such as that of a notebook.

    Figures that are only written to files need no backend of that kind.
    """
    os.environ["MPLBACKEND"] = "agg"


def new_figure(**options: Any) -> "Figure":
    """An empty matplotlib figure."""
    ready_matplotlib()
    from matplotlib.figure import Figure  # slow to import

    return Figure(**options)


@cache
def font_file() -> str:
    """The font of figures: DejaVu Sans, unless a matplotlibrc names another."""
    ready_matplotlib()
    from matplotlib.font_manager import FontProperties, findfont  # slow to import

    return findfont(FontProperties())


def label(text: object, width: int = 24, lines: int = 3) -> str:
    """A name for a figure, in lines of at most `width` signs; too long a name loses its middle.

    Signs that the font lacks are written as backslash codes.
    """
    from matplotlib.font_manager import get_font

    known, room = get_font(font_file()).get_char_index, width * lines
    signs = [c if known(ord(c)) else c.encode("unicode_escape").decode() for c in printable(text)]
    while len("".join(signs)) > room:
        middle = len(signs) // 2
        signs[middle - 1 : middle + 2] = ["…"]
    lines = textwrap.wrap("".join(signs), width, break_on_hyphens=False)
    return "\n".join(lines).replace("$", r"\$")


def show_tiles(
    ax: "Axes", picture: np.ndarray, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Show a picture uint8 [H, W] in a figure, with names of its rows and columns."""
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
    for names, size, set_ticks in (
        (columns, picture.shape[1], ax.set_xticks),
        (rows, picture.shape[0], ax.set_yticks),
    ):
        set_ticks([size / len(names) * (i + 0.5) for i in range(len(names))], names)
    ax.tick_params(length=0)


def save_figure(figure: "Figure", *paths: Path) -> None:
    """Write a matplotlib figure as PNG or PDF, by the ending of each path."""
    for path in paths:
        options = {"format": path.suffix[1:], "dpi": 110, "bbox_inches": "tight"}
        write_atomically(path, lambda target, options=options: figure.savefig(target, **options))
