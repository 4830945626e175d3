"""Run folders: settings, checkpoints, generators to share, weights to start from."""

import errno
import json
import math
import os
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy
from torch import Tensor

import utils
from config import Config, UserError
from dataset import Slices, load_slices, require_no_class
from modules import Generator
from participants.names import normalized
from participants.tables import UnrelatedTable

OTHER_DATA = "not the slices of this run, or another split: this tells nothing of memorisation"
RUNS = Path("runs")
MAX_CONFIG = 1_000_000  # bytes of config.json
DEMO_GENERATOR = Path(__file__).parents[1] / "assets" / "demo_generator"
PATHS = ("data_root", "table", "out", "cache", "init_from")  # settings that are paths
# A resumed run may change these settings: they do not decide what it learns
FREE_TO_CHANGE = (
    "epochs", "out", "cache", "data_root", "table", "device", "num_workers", "precision", "compile",
    "snapshot_epochs", "checkpoint_kimg", "fid_kimg", "any_classes",
)  # fmt: skip
NETWORK = (  # settings that decide the names and shapes of the weights
    "img_resolution", "z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max", "noise",
)  # fmt: skip


def newest_run() -> Path:
    """The run under runs/ with the newest generator; without one, the demo generator."""
    generators = sorted(RUNS.glob("*/generator.safetensors"), key=lambda path: path.stat().st_mtime)
    if generators:
        return generators[-1].parent
    demo = f"assets/{DEMO_GENERATOR.name} (synthetic brains)"
    utils.print_once(f"No run under {RUNS}/ yet: using {demo}")
    return DEMO_GENERATOR


def cache_of(config: Config) -> Path:
    """The run's cache if it holds the images, else the default: a shared run names any folder."""
    known = any(config.cache.glob(f"*-{config.img_resolution}.npy"))
    return config.cache if known else Config.cache


def run_folder(path: Path) -> Path:
    """The run that a folder, a generator.safetensors or a checkpoints/*.pt belongs to."""
    is_file = path.is_file() or path.suffix in (".pt", ".safetensors")
    folder = path.parent if is_file else path
    inside = folder.absolute().name == "checkpoints" and not (folder / "config.json").exists()
    return folder.absolute().parent if inside else folder


def output_folder(path: Path, name: str, images: Path | None = None) -> Path:
    """Where output about a run goes: into the run; for the demo generator, under runs/.

    Output about older weights, or about `images` in place of samples, has a folder of its own.
    """
    run, weights = run_folder(path), weights_of(path)
    older = "" if weights == weights_of(weights.parent) else weights.stem
    if other := images.resolve().name if images else older:
        name = f"{name}_{other}"
    return (RUNS / run.name if run.resolve() == DEMO_GENERATOR.resolve() else run) / name


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU: tensors and plain values only.

    Raises DamagedFile if the file is truncated or changed, or is no checkpoint; UserError if it
    cannot be read, or memory is too small for it.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()  # torch.load ignores the checksums
        state = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"G_ema": dict, "settings": dict, "cur_nimg": int}
        complete = all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    except Exception as error:  # torch raises a different type for each kind of damage
        # EINVAL: damage made it look at an impossible place in the file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: too little memory to read it") from error
        reason = utils.first_line(error)
        raise utils.DamagedFile(f"{path} is truncated or no checkpoint ({reason})") from error
    if damaged:
        raise utils.DamagedFile(f"{path} is damaged: {damaged!r} has changed since it was written")
    if not complete:
        raise utils.DamagedFile(f"{path} is no checkpoint of this project")
    return state


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values. Raises OSError if the disk is full."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch hides the error of the system
                raise error.__context__ or error from None

    utils.write_atomically(path, write)


def plain_settings(config: Config) -> dict[str, str | int | float | None]:
    """The settings as values that JSON and a checkpoint can hold."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def shared_settings(config: Config) -> dict[str, str | int | float | None]:
    """The plain settings, with the name of a folder in place of its absolute path."""
    paths = {name: path for name in PATHS if (path := getattr(config, name)) is not None}
    bare = {name for name, path in paths.items() if path.is_absolute() or path.name in ("", "..")}
    names = {name: name_of(paths[name]) for name in bare}
    if config.init_from is not None:
        names["init_from"] = name_of(run_folder(config.init_from))
    return plain_settings(config) | names


def name_of(path: Path) -> str:
    """The last part of a path, of "." too."""
    return os.path.basename(os.path.abspath(path))


def write_run_config(run: Path, config: Config, classes: list[str], data: str) -> None:
    """Write config.json, which may be shared: settings, class names, identity of the data.

    The paths of this machine go to paths.json, which need not be shared.
    """
    content = {"classes": classes, "data": data, "settings": shared_settings(config)}
    paths = {k: v for k, v in plain_settings(config).items() if k in PATHS}
    for name, values in (("paths.json", paths), ("config.json", content)):
        text = json.dumps(values, indent=2) + "\n"
        utils.write_atomically(run / name, lambda path, text=text: path.write_text(text))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, or UserError if it is unreadable."""
    try:
        if (size := path.stat().st_size) > MAX_CONFIG:
            raise ValueError(f"{size:,} bytes are too long for settings")
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {utils.first_line(error)}") from error


def read_run_config(run: Path) -> tuple[Config, list[str], str]:
    """Settings, class names and data identity of a run, or of the run that a file belongs to.

    Raises UserError naming the file.
    """
    run = run_folder(run)
    path, local = run / "config.json", run / "paths.json"
    try:
        saved = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{run} is no run: it has no config.json") from error
    here = read_json(local) if local.exists() else {}
    try:
        known = {field.name for field in fields(Config)}
        settings = {k: v for k, v in saved["settings"].items() if k in known}
        settings |= {k: v for k, v in here.items() if k in PATHS}
        paths = {k: Path(settings[k]) for k in PATHS if settings.get(k)}
        classes, data = saved["classes"], saved["data"]
        if not classes or not all(isinstance(v, str) for v in [*classes, data]):
            raise ValueError("classes and data must be names")
        if not all(utils.is_file_name(name) for name in classes):  # classes become names of folders
            raise ValueError("a class is named like a path")
        return Config(**settings | paths), classes, data
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {utils.first_line(error)}") from error


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. Files with other names do not count."""
    return sorted((run / "checkpoints").glob("[0-9]" * 10 + ".pt"))


def is_saved(run: Path, cur_nimg: int) -> bool:
    """Whether both the newest checkpoint and the generator are of this number of images."""
    newest = [path.stem for path in checkpoints(run)[-1:]]
    written = utils.images_seen(run / "generator.safetensors")
    return newest == [f"{cur_nimg:010d}"] and written == cur_nimg


def require_same(saved: dict[str, Any], config: Config, source: Path) -> None:
    """Raises UserError with every setting that differs and is not in FREE_TO_CHANGE.

    Of `init_from` only whether it is set matters: its run may have moved or been deleted.
    """
    wanted = shared_settings(config)
    saved = shared_settings(Config()) | saved  # older runs lack newer settings
    names = [n for n in wanted if n not in FREE_TO_CHANGE and saved[n] != wanted[n]]
    if "init_from" in names and None not in (saved["init_from"], wanted["init_from"]):
        names.remove("init_from")
    if names:
        changed = "; ".join(f"{n} = {saved[n]}, now {wanted[n]}" for n in names)
        advice = "repeat its settings to resume it, or use another --out"
        raise UserError(f"{source} was trained with {changed}; {advice}")


def require_same_data(run: Path, classes: list[str], data: str) -> None:
    """Raises UserError if a run, where there is one, was trained on other data."""
    if (run / "config.json").exists() and read_run_config(run)[1:] != (classes, data):
        raise UserError(f"{run} was trained on other data; use another --out")


def open_run(config: Config) -> dict[str, Any] | None:
    """The newest undamaged checkpoint of a run, or None for a new run. Writes nothing.

    Raises UserError if settings changed, all checkpoints are damaged, or all were deleted, or a
    new run cannot start from `init_from`.
    """
    for name in ("out", "cache"):
        require_no_class(name, getattr(config, name), config.data_root)
    utils.ensure_writable(config.out)
    if (config.out / "config.json").exists():
        require_same(shared_settings(read_run_config(config.out)[0]), config, config.out)
    found = checkpoints(config.out)
    for path in found[::-1]:
        try:
            state = load_checkpoint(path)
        except utils.DamagedFile as error:
            utils.print_once(f"warning: {error}; trying the checkpoint before it")
            continue
        require_same(state["settings"], config, path)
        return state
    if found:
        folder = found[0].parent
        raise UserError(f"{folder}: all checkpoints are damaged; delete it to start at image 0")
    if (generator := config.out / "generator.safetensors").exists():
        advice = "use another --out, or delete the folder to start at image 0"
        raise UserError(f"{generator} exists, but no checkpoint to resume from; {advice}")
    if config.init_from is not None:
        labelled = config.conditional or config.condition_position  # if all is well with the data
        source_of_weights(config, int(labelled))  # wrong sizes show before the images are decoded
    return None


def start_run(
    config: Config, classes: list[str], data: str, saved: dict[str, Any] | None
) -> AcquireReturnProxy:
    """Lock the run folder for this process and write config.json. -> the held lock.

    Raises UserError if the run was trained on other data, or another process trains there now, or
    trained there after the checkpoint `saved` was read.
    """
    require_same_data(config.out, classes, data)
    lock = utils.lock_folder(config.out)
    try:
        nimg = saved["cur_nimg"] if saved else 0
        for path in [p for p in checkpoints(config.out) if p.stem > f"{nimg:010d}"]:
            try:
                load_checkpoint(path)
            except utils.DamagedFile:
                path.rename(path.with_suffix(".damaged"))
                continue
            advice = "start the same command again"
            raise UserError(f"{config.out}: another process trained there; {advice}")
        utils.delete_partials(config.out)
        write_run_config(config.out, config, classes, data)
    except BaseException:
        lock.lock.release()
        raise
    return lock


def save_generator(run: Path, G_ema: Generator, cur_nimg: int) -> None:
    """Write generator.safetensors: shared together with config.json, it is all one needs."""
    utils.write_safetensors(run / "generator.safetensors", G_ema.state_dict(), cur_nimg)


def weights_of(path: Path) -> Path:
    """The file of weights that a run folder, its folder checkpoints, or a path to a file means."""
    return run_folder(path) / "generator.safetensors" if path.is_dir() else path


def training_data(config: Config) -> str:
    """What slices a generator saw, in words: those of its run, and of the run it started from."""
    words = "the built-in demo brains, synthetic slices from the ICBM 152 template"
    if config.data_root is not None:
        words = f"the slices in the folder “{name_of(config.data_root)}”"
    if config.init_from is not None:
        words += f", starting from weights of {name_of(run_folder(config.init_from))}"
        words += ", whose training slices count too" * bool(other_start(config))
    return words


def other_start(config: Config, data: str = "") -> str:
    """The name of the run whose weights a run started from; "" for none or the demo generator.

    With the identity of the run's data, a start from the same slices does not count either.
    """
    source = config.init_from
    if source is None or (start := name_of(run_folder(source))) == DEMO_GENERATOR.name:
        return ""
    if data and (run_folder(source) / "config.json").exists():
        before, _, others = read_run_config(source)
        if others == data:
            return other_start(before, data)
    return start


def trained_on(path: Path, data: str) -> bool:
    """Whether a run, or the run of a file, was trained on these slices, split in the same way."""
    return data == read_run_config(path)[2]


def identity_of(source: Path) -> dict[str, Any]:
    """What is known of weights: file, sha256, thousands of images seen, the run they began with."""
    weights, (config, _, data) = weights_of(source), read_run_config(source)
    saved = load_checkpoint(weights) if weights.suffix == ".pt" else None
    nimg = saved["cur_nimg"] if saved else utils.images_seen(weights)
    found = {"weights": str(weights), "sha256": utils.sha256_of(weights)}
    found["kimg"] = "unknown" if nimg is None else nimg / 1000
    return found | ({"started_from": start} if (start := other_start(config, data)) else {})


def own_encoder(path: Path, data: str) -> Path | None:
    """The encoder that measured a run in training; None without one, or for other data."""
    own = run_folder(path) / "encoder.safetensors"
    return own if own.exists() and trained_on(path, data) else None


def load_generator(path: Path) -> tuple[Generator, Config, list[str]]:
    """The averaged generator of `path`, its settings and class names.

    `path` is a run folder, its generator.safetensors, or one of its checkpoints/*.pt. Raises
    UserError if a file is missing or damaged, or the weights have other sizes than config.json.
    """
    weights = weights_of(path)
    if not weights.is_file():
        raise UserError(f"{weights} does not exist")
    run = run_folder(path)
    config, classes, _ = read_run_config(run)
    is_checkpoint = weights.suffix == ".pt"
    state = load_checkpoint(weights)["G_ema"] if is_checkpoint else utils.read_safetensors(weights)
    with torch.device("meta"):  # takes no memory: config.json may ask for too much
        G = Generator(config, utils.width_of_c(len(classes), config.condition_position))
    try:
        state = {name: value.float() for name, value in state.items()}
        G.load_state_dict(state, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        size = f"img_resolution = {config.img_resolution}, channel_base = {config.channel_base}"
        raise UserError(f"{weights} does not fit {run}/config.json ({size})") from error
    return G.eval().requires_grad_(False), config, classes


def load_real(
    config: Config, classes: list[str], data_root: Path | None, table: Path | None
) -> tuple[dict[str, Slices], str]:
    """Real slices and their identity, of `data_root` or else of the folder that a run trained on.

    The run's table is used for `data_root` too, if it is there and names any of its scans. Raises
    UserError if the folder has other classes than the generator.
    """
    root = data_root or config.data_root
    here = replace(config, data_root=root, table=table or config.table)
    try:
        splits, data = load_slices(here)
    except UserError as error:
        if data_root is None or table is not None or config.table is None:
            raise
        if config.table.exists() and not isinstance(error, UnrelatedTable):
            raise
        splits, data = load_slices(replace(here, table=None))
        utils.print_once(f"note: the table of the run is not used: {error}")
    found = splits["train"].classes
    if [*map(normalized, found)] != [*map(normalized, classes)]:
        raise UserError(f"{root} has classes {found}, the generator {classes}")
    return splits, data


def real_slices(
    source: Path, config: Config, classes: list[str], data_root: Path | None, table: Path | None,
    without: str,
) -> tuple[dict[str, Slices], str] | None:  # fmt: skip
    """As `load_real`; None if the run's folder is not here: `without` says what is left out.

    Nor is it here if a folder of its name holds no such slices.
    """
    root, problem = config.data_root, ""
    if data_root is None and root is not None:
        problem = "" if root.exists() else f"{root} does not exist"
    try:
        found = None if problem else load_real(config, classes, data_root, table)
    except UserError as error:
        chosen = data_root is not None or table is not None or root is None
        if chosen or (run_folder(source) / "paths.json").exists():
            raise
        problem = str(error)
    if problem:
        utils.print_once(f"{problem}: {without}; --data-root sets another")
        return None
    if not trained_on(source, found[1]):
        utils.print_once(f"note: {OTHER_DATA}")
    return found


def source_of_weights(config: Config, c_dim: int) -> dict[str, dict[str, Tensor]]:
    """Weights of G, D and G_ema from the newest checkpoint of `init_from`. Raises UserError.

    `init_from` may also be a checkpoint, such as best.pt. Without a checkpoint they come from its
    generator.safetensors and discriminator.safetensors. They may have other classes than this run,
    or none, but this run must have classes if they do.
    """
    source, run = config.init_from, run_folder(config.init_from)
    D = run / "discriminator.safetensors"
    if found := [source] if source.is_file() else checkpoints(run):
        state = load_checkpoint(found[-1])
        settings = state["settings"]
    elif D.exists():
        settings = vars(read_run_config(run)[0])
        G = utils.read_safetensors(D.with_stem("generator"))
        state = {"G": G, "D": utils.read_safetensors(D), "G_ema": G}
    else:
        raise UserError(f"init_from = {source}: holds no checkpoint, and no {D.name}")
    for name in [n for n in NETWORK if n != "noise"]:  # noise inputs may be left out or added
        if (theirs := settings.get(name)) != (ours := getattr(config, name)):
            text = f"has {name} = {theirs}, now {ours}; leave {name} out to take over the former"
            raise UserError(f"init_from = {source}: {text}")
    if not c_dim and "mapping.embed.weight" in state["G"]:
        raise UserError(f"init_from = {source}: has classes, this run has none")
    return {name: state[name] for name in ("G", "D", "G_ema")}


@torch.no_grad()
def load_fitting_weights(net: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Start from weights trained with other classes, or none: for a label of 0, nothing changes.

    Weights of the label keep their random start: from zero they would hardly learn, because the
    mapping learns slowly. `label_ramp_kimg` brings the label in smoothly.
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
