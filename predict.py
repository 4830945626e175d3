"""Sample a trained generator and draw its figures.

    python predict.py                                         # every figure of the newest run
    python predict.py --checkpoint runs/adni --classes AD --seeds 0 1 2 --truncation-psi 0.7
    python predict.py --compare runs/a runs/b runs/c          # grids, losses, FID of runs

Writes, into RUN/predict or --out: grid_CLASS.png, images/CLASS/seed0000.png, truncation.png,
embedding_images.png and embedding_w.png. A seed is always the same image: one z for all classes,
constant noise, images made one by one.

References:
    [1] Karras et al. 2019, A Style-Based Generator Architecture for GANs, arXiv:1812.04948
    [2] van der Maaten and Hinton 2008, Visualizing Data using t-SNE, JMLR 9
    [3] McInnes et al. 2018, UMAP, arXiv:1802.03426
"""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from config import Config, Range, Seed, Share, UserError, check_fields
from dataset import Slices, load_slices
from evaluation.features import averaged
from evaluation.metrics import mean_by_id
from modules import Generator
from training import runs
from training.diagnosis import draw_loss
from training.logs import read_log
from training.process import resolve_device
from training.recorder import read_square
from utils import (
    compiled_folder,
    conditions,
    ensure_writable,
    evenly_spaced,
    print_once,
    printable,
    run_command,
    save_figure,
    save_grey,
    tile,
    to_uint8,
)

PSI_SWEEP = (0.0, 0.25, 0.5, 0.7, 1.0)
POSITION_SWEEP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SWEEP_SEEDS = 4
NUM_COMPONENTS = 50  # principal components that stand for a slice
MAX_FITTED = 4000  # slices that fit the components
LEAST_POINTS = 4  # of an embedding
MAX_POINTS = 600  # real slices in an embedding, and as many generated ones


@dataclass(frozen=True)
class Options:
    """What to draw. Raises UserError naming the option, its value and what is allowed."""

    checkpoint: Path | None = None
    """Run folder, generator.safetensors or checkpoints/*.pt; None: the newest run, or the demo."""
    classes: tuple[str, ...] | None = None
    """Classes to draw, by folder name; None: all."""
    count: Annotated[int, Range(1)] = 32
    """Images per class, from seeds 0, 1, ...; 1 or more."""
    seeds: tuple[Seed, ...] | None = None
    """The very seeds to draw instead, each 0 or more."""
    position: Share | None = None
    """Position of the slice, 0 lowest to 1, if the run has condition_position; None: by seed."""
    truncation_psi: Share = 1.0
    """1: the full variety; towards 0: closer to the class's mean image. 0 to 1."""
    truncation_cutoff: Annotated[int, Range(0)] | None = None
    """Truncate only the first this many layers; None: all."""
    out: Path | None = None
    """Folder for the figures; None: RUN/predict."""
    data_root: Path | None = None
    """Real slices for the embedding; None: where the run was trained."""
    cache: Path | None = None
    """Folder of decoded images; None: the one of the run."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""
    compare: tuple[Path, ...] = ()
    """Runs whose loss curves and last grids are drawn side by side, and nothing else."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seeds == ():
            raise UserError("seeds = (): at least one is needed")


# Sampling


def latents(seeds: list[int], z_dim: int) -> Tensor:
    """The latent of each seed. -> [N, z_dim]."""
    return torch.cat(
        [torch.randn(1, z_dim, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


@torch.no_grad()
def sample(
    G: Generator, z: Tensor, c: Tensor, psi: float = 1, cutoff: int | None = None
) -> np.ndarray:
    """Images of latents [N, z_dim] and labels [N, c_dim], one by one. -> uint8 [N, H, W].

    A batch of one makes each image independent of the others to the last bit.
    """
    device = next(G.parameters()).device
    pairs = zip(z.to(device).split(1), c.to(device).split(1), strict=True)
    return np.concatenate([to_uint8(G(z, c, psi, cutoff, noise_mode="const")) for z, c in pairs])


def labels_of(
    G: Generator, labels: np.ndarray, seeds: list[int], position: float | None = None
) -> Tensor:
    """c of class indices [N], at a level or, where G takes one and it is None, at each seed's."""
    own = [np.random.default_rng(seed).random() for seed in seeds]
    positions = np.array(own if position is None else [position] * len(seeds))
    return conditions(labels, positions if G.by_position else None, G.c_dim)


def sample_class(G: Generator, label: int, seeds: list[int], options: Options) -> np.ndarray:
    """Images of one class. -> uint8 [N, H, W]."""
    c = labels_of(G, np.full(len(seeds), label), seeds, options.position)
    z = latents(seeds, G.z_dim)
    return sample(G, z, c, options.truncation_psi, options.truncation_cutoff)


def write_images(images: np.ndarray, name: str, seeds: list[int], out: Path) -> None:
    """One PNG for each seed, and a grid of them all."""
    for image, seed in zip(images, seeds, strict=True):
        save_grey(image, out / "images" / name / f"seed{seed:04d}.png")
    columns = math.ceil(math.sqrt(2 * len(images)))
    blank = np.zeros((-len(images) % columns, *images.shape[1:]), np.uint8)
    save_grey(tile(np.concatenate([images, blank]), columns), out / f"grid_{name}.png")


def draw_truncation(G: Generator, classes: dict[int, str], seeds: list[int], out: Path) -> None:
    """The same seeds under growing psi ([1], appendix B): a block per class, a row per seed."""
    z = latents(seeds, G.z_dim)
    blocks = {}
    for label, name in classes.items():
        c = labels_of(G, np.full(len(seeds), label), seeds)
        blocks[name] = [sample(G, z, c, psi) for psi in PSI_SWEEP]
    draw_sweep(blocks, [f"psi {psi}" for psi in PSI_SWEEP], seeds, out / "truncation.png")


def draw_positions(G: Generator, classes: dict[int, str], seeds: list[int], out: Path) -> None:
    """The same heads from their lowest to their highest slice: a block per class, a row a seed."""
    z = latents(seeds, G.z_dim)
    blocks = {}
    for label, name in classes.items():
        labels = np.full(len(seeds), label)
        blocks[name] = [
            sample(G, z, labels_of(G, labels, seeds, position)) for position in POSITION_SWEEP
        ]
    draw_sweep(
        blocks, [f"{position:.2f}" for position in POSITION_SWEEP], seeds, out / "positions.png"
    )


def draw_sweep(
    blocks: dict[str, list[np.ndarray]], columns: list[str], seeds: list[int], path: Path
) -> None:
    """Side by side a block of pictures for each name: a row per seed, by column [seeds, H, W]."""
    figure = Figure(figsize=(1.5 * len(columns) * len(blocks), 1.5 * len(seeds) + 0.6))
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    for ax, (name, by_column) in zip(axes, blocks.items(), strict=True):
        images = np.stack(by_column, 1).reshape(-1, *by_column[0].shape[1:])
        picture = tile(images, len(columns))
        H = len(picture) / len(seeds)
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        ax.set_xticks([H * (i + 0.5) for i in range(len(columns))], columns)
        ax.set_yticks([H * (i + 0.5) for i in range(len(seeds))], [f"seed {s}" for s in seeds])
        ax.set_title(printable(name))
    save_figure(figure, path)


# Embedding


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W] -> float32 [N, P], averaged down to 64 x 64 pixels at most."""
    return averaged(images).flatten(1).numpy()


def probe_by_id(train: tuple[np.ndarray, Slices], test: tuple[np.ndarray, Slices]) -> str:
    """How well a linear classifier tells the classes of unseen ids apart, in words.

    Fitted on the training slices; an id's score is the mean over its slices.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, known), (y, unseen) = train, test
    if len(known.classes) < 2:
        return "one class, no probe"
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(
        x, known.labels
    )
    per_id, truth = mean_by_id(probe.predict_proba(y), unseen.participants, unseen.labels)
    text = f"accuracy {np.mean(per_id.argmax(1) == truth):.2f}"
    if len(known.classes) == 2:
        text += f", AUC {roc_auc_score(truth, per_id[:, 1]):.2f}"
    return f"linear probe on {len(truth)} unseen ids: {text}"


def embed(features: np.ndarray) -> dict[str, np.ndarray]:
    """t-SNE [2] and UMAP [3] of features [N, F], each [N, 2]."""
    from sklearn.manifold import TSNE
    from umap import UMAP  # compiles for seconds on import

    n = len(features)
    init = "pca" if features.shape[1] > 1 else "random"
    tsne = TSNE(perplexity=min(30, (n - 1) / 3), init=init, random_state=0)
    with warnings.catch_warnings():  # that a seed rules out parallelism is what we want
        warnings.simplefilter("ignore", UserWarning)
        umap = UMAP(n_neighbors=min(15, n - 1), random_state=0).fit_transform(features)
    return {"t-SNE": tsne.fit_transform(features), "UMAP": umap}


def draw_embedding(
    features: np.ndarray,
    labels: np.ndarray,
    fake: np.ndarray,
    names: list[str],
    caption: str,
    path: Path,
) -> None:
    """Two panels coloured by class: real slices are dots, `fake` [N] (bool) ones crosses."""
    if len(features) < LEAST_POINTS or not features.std(0).any():
        print_once(f"no {path.name}: fewer than {LEAST_POINTS} images, or all of them alike")
        return
    figure = Figure(figsize=(11, 5.4))
    for ax, (title, points) in zip(figure.subplots(1, 2), embed(features).items(), strict=True):
        for label, name in enumerate(names):
            for chosen, marker, kind in (
                (~fake, "o", "real, true class"),
                (fake, "x", "generated"),
            ):
                x, y = points[(labels == label) & chosen].T
                if len(x):
                    style = {"s": 14, "alpha": 0.6, "color": f"C{label}", "linewidths": 0.8}
                    ax.scatter(x, y, marker=marker, label=printable(f"{name} ({kind})"), **style)
        ax.set(title=title, xticks=[], yticks=[])
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 0.03))
    figure.text(0.5, 0.02, caption, ha="center", va="top", fontsize=9)
    save_figure(figure, path)


def draw_image_embedding(G: Generator, splits: dict[str, Slices], out: Path) -> None:
    """Real test slices by true class with as many generated ones, in features of the images."""
    from sklearn.decomposition import PCA

    train, test = splits["train"], splits["test"]
    fitted = pixels(train.images[evenly_spaced(len(train.images), MAX_FITTED)])
    components = max(1, min(NUM_COMPONENTS, len(fitted) - 1))
    pca = PCA(components, svd_solver="randomized", random_state=0).fit(fitted)
    features = {k: pca.transform(pixels(s.images)) for k, s in splits.items()}
    probe = probe_by_id((features["train"], train), (features["test"], test))

    chosen = evenly_spaced(len(test.labels), MAX_POINTS)
    labels = test.labels[chosen]
    z = latents(list(range(len(labels))), G.z_dim)
    positions = None if test.positions is None else test.positions[chosen]
    fake = pca.transform(pixels(sample(G, z, conditions(labels, positions, G.c_dim))))
    caption = (
        f"{len(labels)} real test slices and as many generated ones (psi = 1), first {components} "
        f"principal components of the training slices.\nReal: {probe}."
    )
    both = np.concatenate([features["test"][chosen], fake])
    is_fake = np.arange(len(both)) >= len(labels)
    path = out / "embedding_images.png"
    draw_embedding(both, np.tile(labels, 2), is_fake, test.classes, caption, path)


@torch.no_grad()
def draw_w_embedding(G: Generator, names: list[str], out: Path) -> None:
    """The intermediate latents w by the class asked for."""
    labels = np.arange(len(names)).repeat(math.ceil(MAX_POINTS / len(names)))
    seeds = list(range(len(labels)))
    z, c, device = latents(seeds, G.z_dim), labels_of(G, labels, seeds), next(G.parameters()).device
    w = G.mapping.map(z.to(device), c.to(device)).cpu().numpy()
    caption = (
        "w of the mapping network. The label is one of its inputs: it may separate by that alone."
    )
    draw_embedding(w, labels, np.ones(len(w), bool), names, caption, out / "embedding_w.png")


# Comparison


def differences(configs: Sequence[Config]) -> list[str]:
    """For each run, the settings in which it differs from the others and that change its step."""
    settings = [runs.plain_settings(config) for config in configs]
    names = [n for n in settings[0] if len({str(s[n]) for s in settings}) > 1]
    printable = [n for n in names if n not in runs.FREE_TO_CHANGE and n[:4] not in ("ada_", "fid_")]
    return [", ".join(f"{n} {s[n]}" for n in printable) for s in settings]


def plot_comparison(folders: Sequence[Path], path: Path) -> None:
    """A column for each run: its last images, its losses on common axes; FID of all in one plot.

    Titles name what differs between the runs, but for the control of `ada` and of measuring.
    """
    configs = [runs.read_run_config(run)[0] for run in folders]
    figure = Figure(figsize=(max(8, 3 * len(folders)), 9))
    axes = figure.subplots(3, len(folders), squeeze=False, height_ratios=(2, 3, 5))
    titles = differences(configs)
    for (top, middle, _), run, title in zip(axes.T, folders, titles, strict=True):
        for grid in sorted((run / "grids").glob("epoch*.png"))[-1:]:
            top.imshow(read_square(grid), cmap="gray", vmin=0, vmax=255)
        top.axis("off")
        top.set_title(f"{run.name}: {title}" if title else run.name, fontsize=10)
        middle.sharey(axes[1, 0])
        draw_loss(middle, run, "d_loss", "C0")
        draw_loss(middle, run, "g_loss", "C1")
        middle.legend(fontsize=8)
    for ax in axes[2]:
        ax.remove()
    draw_fid(figure.add_subplot(axes[2, 0].get_gridspec()[2, :]), folders)
    figure.tight_layout()
    save_figure(figure, path)


def draw_fid(ax: Axes, folders: Sequence[Path]) -> None:
    """FID of each run against the images it was shown, and of test slices; of one kind of features.

    Runs whose features or data are not those of the first are left out: they do not compare.
    """
    kinds = [
        (runs.read_run_config(r)[0].fid_extractor, runs.read_run_config(r)[2]) for r in folders
    ]
    for i, (run, kind) in enumerate(zip(folders, kinds, strict=True)):
        log = [e for e in read_log(run) if e.get("fid") is not None]
        line = [(e["nimg"] / 1000, e["fid"], e.get("fid_real")) for e in log]
        if line and kind == kinds[0]:
            kimg, fid, real = zip(*line, strict=True)
            ax.plot(kimg, fid, ".-", color=f"C{i}", label=f"{run.name}, lowest {min(fid):.2f}")
            if real[0] is not None:  # of too few slices there is none
                ax.axhline(real[0], color="grey", ls=":", lw=0.8)
    ax.set(xlabel="thousands of real images seen", yscale="log")
    ax.set_ylabel(f"FID to the training slices ({kinds[0][0]})")
    ax.set_title("dotted: the same of real test slices", fontsize=9)
    if ax.lines:
        ax.legend(fontsize=8)
    ax.grid(alpha=0.3, which="both")


# Command line


def chosen_classes(wanted: tuple[str, ...] | None, known: list[str]) -> dict[int, str]:
    """Index and name of the classes asked for. Raises UserError that lists the right names."""
    for name in wanted or ():
        if name not in known:
            raise UserError(f"classes: no class {name!r}; this generator knows {', '.join(known)}")
    return {i: name for i, name in enumerate(known) if wanted is None or name in wanted}


def real_slices(config: Config, options: Options, known: list[str]) -> dict[str, Slices] | None:
    """The run's data, or --data-root; None if the run's own folder is not on this machine."""
    root = options.data_root or config.data_root
    if options.data_root is None and root is not None and not root.exists():
        print_once(
            f"{root} is not here: no embedding of real slices (--data-root names another place)"
        )
        return None
    cache = options.cache or runs.cache_of(config)
    splits, _ = load_slices(replace(config, data_root=root, cache=cache))
    if splits["train"].classes != known:
        raise UserError(f"{root} has classes {splits['train'].classes}, the generator {known}")
    return splits


def predict(options: Options) -> Path:
    """Draw every figure. Returns the folder that holds them. Raises UserError for bad input."""
    source = options.checkpoint or runs.newest_run()
    G, config, known = runs.load_generator(source)
    if options.position is not None and not G.by_position:
        raise UserError(
            f"position = {options.position}: a generator without condition_position has none"
        )
    G.to(resolve_device(options.device))
    classes = chosen_classes(options.classes, known)
    out = options.out or runs.output_folder(source, "predict")
    ensure_writable(out)
    cache = options.cache or runs.cache_of(config)
    os.environ.setdefault("NUMBA_CACHE_DIR", compiled_folder(cache))  # of UMAP
    splits = real_slices(config, options, known)
    seeds = list(options.seeds or range(options.count))
    for label, name in tqdm(classes.items(), "sampling", unit="class"):
        write_images(sample_class(G, label, seeds, options), name, seeds, out)
    draw_truncation(G, classes, seeds[:SWEEP_SEEDS], out)
    if G.by_position:
        draw_positions(G, classes, seeds[:SWEEP_SEEDS], out)
    draw_w_embedding(G, known, out)
    if splits is not None:
        draw_image_embedding(G, splits, out)
    return out


def main() -> None:
    """Command line of this module."""
    options = tyro.cli(Options, description=__doc__)
    if options.compare:
        path = (options.out or Path("runs")) / "comparison.png"
        ensure_writable(path.parent)
        plot_comparison(options.compare, path)
        print_once(str(path))
    else:
        print_once(f"figures in {predict(options)}")


if __name__ == "__main__":
    run_command(main)
