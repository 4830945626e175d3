"""Tiny settings and a tiny data set of bright ellipses, some with a dark centre, for all tests."""

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

# Before NumPy and PyTorch: tiny sums are slower with more threads, by far on a shared machine
os.environ["OMP_NUM_THREADS"] = "1"
# What UMAP compiles is kept from one run of the tests to the next
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "umap-of-the-tests")

import numpy as np
import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key
from matplotlib.figure import Figure
from PIL import Image

import utils
from config import CPU, Config
from dataset import Slices
from evaluation import features
from modules import Discriminator, Generator
from train import PHASES, TrainingState, d_main, d_r1, g_main, g_path, main, train
from training import recorder
from training.logs import read_log
from training.runs import checkpoints, load_checkpoint
from utils import SIGNALS, run_command, save_grey

ROOT = Path(__file__).parents[1]
for number in SIGNALS:  # under nohup or & some are ignored, in what tests start too
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def draw_slice(rng: np.random.Generator, size: tuple[int, int], dark: bool) -> np.ndarray:
    """A grey ellipse on black, uint8 [H, W], with a dark centre if asked."""
    H, W = size
    y, x = np.mgrid[:H, :W]
    radius = np.hypot((y - H / 2) / (0.42 * H), (x - W / 2) / (0.36 * W)) * rng.uniform(0.95, 1.05)
    image = np.where(radius < 1, 150 + 40 * rng.random(), 0)
    image = np.where((radius < 0.4) & dark, 40, image) + rng.normal(0, 4, (H, W)) * (radius < 1)
    return image.clip(0, 255).astype(np.uint8)


def write_folder(root: Path, splits: dict[str, int], slices: int = 2) -> Path:
    """ROOT/split/{AD,NC}/ID_SLICE.png with so many ids per class and split; "" means no split."""
    rng = np.random.default_rng(0)
    number = 0
    for split, ids in splits.items():
        for name in ("AD", "NC"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for _ in range(ids):
                number += 1
                for i in range(slices):
                    image = draw_slice(rng, (24, 20), dark=name == "AD")
                    Image.fromarray(image).save(folder / f"{number}_{i}.png")
    return root


TINY_SPLITS = {"train": 4, "test": 2}


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """8 training and 4 test ids of 2 slices, half of them AD."""
    return write_folder(tmp_path / "data", TINY_SPLITS)


@pytest.fixture
def config(tmp_path: Path, data_root: Path) -> Config:
    """Settings of a run on that data, see `tiny`."""
    return tiny(tmp_path)


def tiny(folder: Path) -> Config:
    """Settings small enough for a step in some 30 ms; everything lies in one folder."""
    return replace(
        Config(**CPU),
        data_root=folder / "data",
        out=folder / "runs" / "test",
        cache=folder / "cache",
        device="cpu",
        precision="float32",  # on every machine
        img_resolution=16,
        z_dim=8,
        w_dim=8,
        channel_base=64,
        channel_max=8,
        noise=True,
        cooldown=0.0,
        r1_gamma=None,
        r1_gamma_end=None,
        ema_rampup=0.1,
        batch_size=4,
        epochs=2,
        learning_rate=0.002,
        augment="dataset",
        fid_kimg=0,
        checkpoint_kimg=0.001,  # at each epoch
    )


def copied(run: Config, folder: Path, name: str = "test") -> Config:
    """A copy of a trained run, under this name, with its data and its cache, as in `tiny`."""
    source = run.data_root.parent
    shutil.copytree(source, folder, dirs_exist_ok=True)
    out = (folder / "runs" / "test").rename(folder / "runs" / name)
    text = (out / "paths.json").read_text()
    (out / "paths.json").write_text(text.replace(str(source), str(folder)))
    return replace(run, data_root=folder / "data", out=out, cache=folder / "cache")


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Trains a tiny run with some settings the first time that it is asked for.

    Nobody may change what lies there: tests work on a copy, see `copied`.
    """
    runs: dict[tuple, Config] = {}

    def run_with(**settings: object) -> Config:
        key = tuple(sorted(settings.items()))
        if key not in runs:
            folder = tmp_path_factory.mktemp("run")
            write_folder(folder / "data", TINY_SPLITS)
            config = replace(tiny(folder), **settings)
            with pytest.MonkeyPatch.context() as patch:
                draw_nothing(patch)
                fit_shortly(patch)
                train(config)
            runs[key] = config
        return runs[key]

    return run_with


@pytest.fixture
def trained(trained_once: Callable[..., Config], config: Config) -> Config:
    """`config`, trained for an epoch in this test's own copy of a run."""
    return copied(trained_once(epochs=1), config.data_root.parent)


@pytest.fixture
def measured(trained_once: Callable[..., Config], config: Config) -> Config:
    """As `trained`, with an encoder and the measurements of its epoch."""
    run = trained_once(epochs=1, fid_kimg=0.01, fid_images=100)
    return copied(run, config.data_root.parent)


CUDA_SECONDS = 90  # a phase at 16 pixels takes 31 s to compile, and then its kernels


@pytest.fixture
def limited_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that takes longer ends its process, and the stacks of all threads are printed."""
    stderr = request.config.stash[fault_handler_stderr_fd_key]
    faulthandler.dump_traceback_later(CUDA_SECONDS, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


def needs_cuda(test: Callable) -> Callable:
    """Skipped without CUDA, and never hangs with it."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    return skip(pytest.mark.usefixtures("limited_time")(test))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first: no worker waits for another one's at the end."""
    items.sort(key=lambda item: item.path.name != "test_speed.py")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """UMAP's compiler, once at work, gives PyTorch more."""
    yield
    torch.set_num_threads(1)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Figures, which take up to a second each, are empty files."""

    def save(_figure: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"no plot")

    patch.setattr(Figure, "savefig", save)
    patch.setattr(Figure, "tight_layout", lambda _figure: None)
    patch.setattr(utils, "save_grid", lambda picture, *names: save_grey(picture, names[-1]))
    for name in ("plot_losses", "plot_curves", "plot_progress"):  # of a run; axes take long too
        patch.setattr(recorder, name, lambda _run, path, *_: path.write_bytes(b"no plot"))


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty but in tests that are marked `drawn`."""
    if "drawn" not in request.keywords:
        draw_nothing(monkeypatch)


class QuickUMAP:
    """Two columns of the features, in the place of UMAP, which compiles for many seconds."""

    def __init__(self, n_neighbors: int, random_state: int) -> None:
        self.n_neighbors = n_neighbors

    def fit_transform(self, features: np.ndarray) -> np.ndarray:
        assert 1 < self.n_neighbors < len(features)
        return np.pad(features, ((0, 0), (0, 1)))[:, :2]


@pytest.fixture(autouse=True)
def quick_umap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """UMAP itself is at work in slow tests only."""
    if "slow" not in request.keywords:
        monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=QuickUMAP))


def fit_shortly(patch: pytest.MonkeyPatch) -> None:
    """The encoder of FID, where a run measures it, is trained for a moment only."""
    fit = features.fit_encoder
    patch.setattr(features, "fit_encoder", lambda *args, **kw: fit(*args, **{"steps": 5} | kw))


@pytest.fixture
def short_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `fit_shortly`."""
    fit_shortly(monkeypatch)


@pytest.fixture
def fresh_compiler() -> None:
    """No code compiled by an earlier test is used again."""
    torch.compiler.reset()


def step_inputs(config: Config) -> tuple[TrainingState, torch.Tensor, torch.Tensor]:
    """A fresh state, four images and their labels."""
    state = TrainingState(config, 2, torch.device("cpu"))
    return state, torch.rand(4, 1, 16, 16) * 2 - 1, torch.eye(2)[[0, 1, 1, 0]]


def phase_calls(G: Generator, D: Discriminator, real, c, config: Config) -> dict:
    """Each phase with the network that it trains and its arguments."""
    return {
        g_main: (G, (G, D, real, c, config)),
        g_path: (G, (G, c, torch.full([], 0.3, device=c.device), config)),
        d_main: (D, (G, D, real, c, c, config)),
        d_r1: (D, (G, D, real, c, torch.full([], 2.0, device=c.device), config)),
    }


def phase_gradients(
    state: TrainingState, real, c, run, phases: tuple[Callable, ...] = PHASES
) -> dict[str, torch.Tensor]:
    """The gradients of each phase, all parameters in one vector; none where they are zero."""
    found, calls = {}, phase_calls(state.G, state.D, real, c, state.config)
    for phase in phases:
        net, args = calls[phase]
        state.D.requires_grad_(phase is not g_main)
        run(phase, 1, *args)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        found[phase.__name__] = torch.cat([g.flatten() for g in grads])  # a copy
        state.G.zero_grad()
        state.D.zero_grad()
    return found


def same_tensors(a, b, path="") -> list[str]:
    """The places where two nested states differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for k in a for d in same_tensors(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple):
        pairs = zip(a, b, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in same_tensors(x, y, f"{path}.{i}")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [path]


TIMES = ("seconds", "img_per_s", "data_wait")  # of a line of the log: differ from run to run


def assert_same_run(a: Config, b: Config) -> None:
    """Every tensor, every row, every line but for times, and every grid."""
    first, second = (load_checkpoint(checkpoints(c.out)[-1]) for c in (a, b))
    for name in ("out", "cache", "data_root", "compile"):
        first["settings"][name] = second["settings"][name] = ""
    assert same_tensors(first, second) == []
    lines = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(c.out)]
        for c in (a, b)
    ]
    assert lines[0] == lines[1]
    grids = [sorted(p.name for p in (c.out / "grids").iterdir()) for c in (a, b)]
    assert grids[0] == grids[1] and len(grids[0]) == len(lines[0])
    names = ["losses.csv", "generator.safetensors", *(f"grids/{name}" for name in grids[0])]
    for name in names:
        assert (a.out / name).read_bytes() == (b.out / name).read_bytes(), name


def as_flags(config: Config) -> list[str]:
    names = ["data_root", "out", "cache", "device", "img_resolution", "z_dim", "w_dim", "epochs"]
    names += ["channel_base", "channel_max", "batch_size", "learning_rate", "fid_kimg", "seed"]
    names += ["augment", "ada_kimg", "ada_target", "ada_interval", "checkpoint_kimg", "num_workers"]
    names += ["r1_gamma", "r1_gamma_end", "cooldown", "ema_rampup"]
    pairs = [(f"--{n.replace('_', '-')}", str(getattr(config, n))) for n in names]
    noise = "--noise" if config.noise else "--no-noise"
    return [noise, *(part for pair in pairs for part in pair)]


def wait_for_epoch(config: Config, process: subprocess.Popen) -> None:
    """Until the log of a run that was started has a line."""
    deadline = time.time() + 120
    while not (config.out / "log.jsonl").exists() or not read_log(config.out):
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)


def ids(n: int, per_id: int = 4) -> np.ndarray:
    return np.array([f"s{i // per_id:03}" for i in range(n)])


def make_slices(n: int = 80, per_id: int = 4, size: int = 16, seed: int = 0) -> Slices:
    """Noise on a disc, darker in its middle for the first class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // per_id % 2
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = np.hypot(y, x) / size
    base = np.where(radius < 0.4, 150.0, 0)
    images = base + rng.normal(0, 10, (n, size, size)) * (radius < 0.4)
    images -= 60 * (labels == 0)[:, None, None] * (radius < 0.15)
    participants = np.array([f"{seed}-{name}" for name in ids(n, per_id)])
    images = images.clip(0, 255).astype(np.uint8)
    return Slices(images, labels, participants, ["AD", "NC"], scans=participants)


def fixed_generator(config: Config, **parts) -> Generator:
    """A generator, of which a change may be asked for."""
    torch.manual_seed(0)
    G = Generator(config, 2)
    for name, p in G.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(parts.get("noise", 0.0))
    if parts.get("no_z"):
        G.mapping.layers[0].weight.data[:, : config.z_dim] = 0
    if parts.get("no_class"):
        G.mapping.layers[0].weight.data[:, config.z_dim :] = 0
    return G.eval()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """python train.py with some arguments, in this process. -> its exit code."""

    def run(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        try:
            run_command(main)
        except SystemExit as end:
            return end.code
        return 0

    return run


def run_train(*args: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)
