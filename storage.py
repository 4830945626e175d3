"""Files that outlive kills, full disks and strangers: caches, run folders, checkpoints, pictures.

A file is written under another name, synced and renamed; what is read again has a checksum; nothing
here unpickles code. A run is a folder: config.json, log.jsonl, losses.csv, grids/, plots,
checkpoints/ and generator.safetensors.
"""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from config import Config, UserError
from modules import Generator
from utils import ensure_writable, first_line, say, width_of_c

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
SEAL = b"CRC:"  # at the end of a cached array, before its checksum
MAX_CONFIG = 1_000_000  # bytes of config.json
DEMO_GENERATOR = Path(__file__).parent / "assets" / "demo_generator"
PATHS = ("data_root", "out", "cache", "init_from")  # settings that are paths
# Settings that say where, how long and how often, not what a run learns
FREE_TO_CHANGE = (
    "epochs", "out", "cache", "data_root", "device", "num_workers", "precision", "compile",
    "snapshot_epochs", "checkpoint_kimg", "fid_kimg", "any_classes",
)  # fmt: skip


# Run folders


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
    except OSError as error:
        error.filename = error.filename or str(path)  # of a full disk none is told
        raise
    finally:
        partial.unlink(missing_ok=True)


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
    if whole(path):
        mark_used(path)
    else:
        ensure_writable(path.parent)
        with alone(path):
            if not whole(path):  # else another process was faster
                sweep(path.parent)
                if path.exists():
                    say(f"note: {path} is damaged, and made anew")
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


def lock(folder: Path, doing: str = "training") -> TextIO:
    """Keep other processes out of a folder, on shared storage too, while the file is open.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:  # of the process: it ends with it, and no worker of the loader inherits it
        if fcntl and not try_lock(file):
            raise UserError(f"out = {folder}: another process is {doing} there")
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
                raise DamagedFile(f"{path} is damaged: {part!r} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"G_ema": dict, "settings": dict, "cur_nimg": int}
        if all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            return state
    except UserError:
        raise
    except Exception as error:  # torch raises a different type for each kind of damage
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place that cannot be
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: too little memory to read it") from error
        raise DamagedFile(f"{path} is truncated or no checkpoint ({first_line(error)})") from error
    raise DamagedFile(f"{path} is no checkpoint of this project")


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
