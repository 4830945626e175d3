"""Run folders: settings, checkpoints, generators to share, weights to start from."""

import errno
import json
import math
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from config import Config, UserError
from modules import Generator
from utils import (
    DamagedFile,
    delete_partials,
    ensure_writable,
    first_line,
    is_file_name,
    lock_folder,
    print_once,
    read_safetensors,
    width_of_c,
    write_atomically,
    write_safetensors,
)

RUNS = Path("runs")
MAX_CONFIG = 1_000_000  # bytes of config.json
DEMO_GENERATOR = Path(__file__).parents[1] / "assets" / "demo_generator"
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
    print_once(
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
            print_once(f"warning: {error}; looking for the one before it")
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
) -> FileLock:
    """Take the folder for this process and write config.json. -> the held lock.

    Raises:
        UserError: the run was trained on other data, or another process trains there, or did since
            the checkpoint `saved` was read.
    """
    if (config.out / "config.json").exists():
        if read_run_config(config.out)[1:] != (classes, data):
            raise UserError(f"{config.out} was trained on other data; use another --out")
    lock = lock_folder(config.out)
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
    delete_partials(config.out)
    write_run_config(config.out, config, classes, data)
    return lock


def save_generator(run: Path, G_ema: Generator, cur_nimg: int) -> None:
    """Write generator.safetensors, which together with config.json is what is shared."""
    write_safetensors(run / "generator.safetensors", G_ema.state_dict(), cur_nimg)


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
        G = Generator(config, width_of_c(len(classes), config.condition_position))
    try:
        state = {name: value.float() for name, value in state.items()}
        G.load_state_dict(state, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        size = f"img_resolution = {config.img_resolution}, channel_base = {config.channel_base}"
        raise UserError(f"{weights} does not fit {run}/config.json ({size})") from error
    return G.eval().requires_grad_(False), config, classes


NETWORK = (  # settings that decide which weights there are
    "img_resolution", "z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max", "noise",
)  # fmt: skip


# Checkpoints


def source_of_weights(config: Config, c_dim: int) -> dict[str, dict[str, Tensor]]:
    """Weights of G, D and G_ema in the newest checkpoint of `init_from`. Raises UserError.

    Where there is none, those of its generator.safetensors and discriminator.safetensors. They may
    be of other classes, or of none where this run has some.
    """
    source, D = config.init_from, config.init_from / "discriminator.safetensors"
    if found := checkpoints(source):
        state = load_checkpoint(found[-1])
        settings = state["settings"]
    elif D.exists():
        settings, G = vars(read_run_config(source)[0]), read_safetensors(D.with_stem("generator"))
        state = {"G": G, "D": read_safetensors(D), "G_ema": G}
    else:
        raise UserError(f"init_from = {source}: holds no checkpoint, and no {D.name}")
    for name in NETWORK:
        theirs = settings.get(name, getattr(Config, name))  # earlier versions had fewer settings
        if theirs != (ours := getattr(config, name)) and name != "noise":  # left out, or begins
            raise UserError(f"init_from = {source}: has {name} = {theirs}, now {ours}")
    if not c_dim and "mapping.embed.weight" in state["G"]:
        raise UserError(f"init_from = {source}: has classes, this run has none")
    return {name: state[name] for name in ("G", "D", "G_ema")}


@torch.no_grad()
def load_fitting_weights(net: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Start from weights trained with other classes, or none: the same function for a label of 0.

    What is new keeps its random start: the part of the label, which learns as slowly as all of the
    mapping, would hardly leave zero. `label_ramp_kimg` brings it in smoothly.
    """
    own, first = net.state_dict(), "mapping.layers.0.weight"
    fitting = {
        k: v for k, v in weights.items()
        if k in own and own[k].shape == v.shape and not k.startswith("augment.")  # p starts anew
    }  # fmt: skip
    net.load_state_dict(fitting, strict=False)
    if first in own and first not in fitting:  # [w_dim, z_dim] into [w_dim, 2 z_dim]
        z_dim = weights[first].shape[1]
        own[first][:, :z_dim] = weights[first] * math.sqrt(own[first].shape[1] / z_dim)
