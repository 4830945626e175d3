"""Sample a trained generator and draw its figures.

    python predict.py                                         # every figure of the newest run
    python predict.py --checkpoint runs/adni --classes AD --seeds 0 1 2 --truncation-psi 0.7
    python predict.py --figures grid truncation               # some figures only
    python predict.py --compare runs/a runs/b runs/c          # grids, losses and FID of runs

Writes grid_CLASS.png, images/CLASS/seed0000.png, truncation.png, mixing.png, embedding_images.png
and embedding_w.png into RUN/predict or --out; positions.png too with condition_position. Another
truncation or position is in the names of grids, images and mixing, such as images_psi0.7. With
--format pdf the figures, but not the single images, are also written as PDF with vector letters. On
one machine the same seed always gives the same image: a seed has one z for all classes, noise is
constant, and images are computed one by one.

References:
    [1] Karras et al. 2019, A Style-Based Generator Architecture for GANs, arXiv:1812.04948
    [2] van der Maaten and Hinton 2008, Visualizing Data using t-SNE, JMLR 9
    [3] McInnes et al. 2018, UMAP, arXiv:1802.03426
"""

import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from torch import Tensor

import utils
from config import Config, ImageSeed, Range, Share, UserError, check_fields
from dataset import Slices
from evaluation.features import averaged
from evaluation.metrics import mean_by_participant
from evaluation.samples import images_of, labels_of, latents, mapped, sample
from evaluation.verdict import MIN_PARTICIPANTS
from modules import Generator
from training import diagnosis, logs, process, recorder, runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Drawing = Literal["grid", "images", "truncation", "mixing", "positions", "embedding"]
PSI_SWEEP = (0.0, 0.25, 0.5, 0.7, 1.0)
POSITIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SWEEP_SEEDS = 4
STYLES = ("coarse", "middle", "fine")  # thirds of the layers
NUM_COMPONENTS = 50  # principal components of a slice in the embedding of images
MAX_FITTED = 4000  # slices that the components are fitted to
MIN_POINTS = 4  # points in an embedding
MAX_POINTS = 600  # real slices in an embedding, and as many samples


@dataclass(frozen=True)
class Options:
    """What to draw. Raises UserError naming the option, its value and what is allowed."""

    checkpoint: Path | None = None
    """Run folder, generator.safetensors, or a *.pt; None: the newest run, or the demo."""
    classes: tuple[str, ...] | None = None
    """Classes to draw, by folder name; None: all."""
    count: Annotated[int, Range(1)] = 32
    """Images per class, from seeds 0, 1, ...; 1 or more."""
    seeds: tuple[ImageSeed, ...] | None = None
    """Seeds to draw in place of 0, 1, ..., each 0 to 2^32 - 1."""
    position: Share | None = None
    """Position in the scan, 0 lowest to 1, if the run has condition_position; None: by seed."""
    truncation_psi: Share = 1.0
    """1: full variety; closer to 0: more like the mean image of the class. 0 to 1."""
    truncation_cutoff: Annotated[int, Range(0)] | None = None
    """Number of first layers that are truncated, 0 or more; None: all layers."""
    out: Path | None = None
    """Folder for the figures; None: RUN/predict."""
    data_root: Path | None = None
    """Folder of real slices for the embedding; None: the folder that the run was trained on."""
    table: Path | None = None
    """CSV or TSV that names the participant of each real scan; None: the one of the run."""
    cache: Path | None = None
    """Folder of decoded images; None: the cache of the run."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""
    figures: tuple[Drawing, ...] | None = None
    """Figures to draw; None: all. Positions need condition_position. Embeddings take longest, and
    always show all classes, without truncation."""
    format: Literal["png", "pdf"] = "png"
    """pdf: figures are also written as PDF, with letters as vectors."""
    compare: tuple[Path, ...] | None = None
    """Runs whose last grids and losses are drawn side by side; nothing else is drawn."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("classes", "seeds", "figures", "compare"):
            if getattr(self, name) == ():
                what = f", of {get_args(Drawing)}" if name == "figures" else ""
                raise UserError(f"{name} = (): at least one is needed{what}")

    def variant(self) -> list[str]:
        """What differs from untruncated samples of a position for each seed."""
        cut = self.truncation_psi < 1
        values = {
            "psi": self.truncation_psi if cut else None,
            "cutoff": self.truncation_cutoff if cut else None,
            "position": self.position,
        }
        return [f"{name} {value:g}" for name, value in values.items() if value is not None]

    def paths(self, folder: Path, name: str) -> list[Path]:
        """The files of a figure: PNG, and PDF if that is asked for."""
        return [folder / f"{name}.{end}" for end in dict.fromkeys(("png", self.format))]


def sample_class(
    G: Generator, label: int, seeds: list[int], options: Options, bar: str | None = None
) -> np.ndarray:
    """Images of one class. -> uint8 [N, H, W]."""
    c = labels_of(G, np.full(len(seeds), label), seeds, options.position)
    how = options.truncation_psi, options.truncation_cutoff, bar
    return sample(G, latents(seeds, G.z_dim), c, *how)


def write_images(images: np.ndarray, seeds: list[int], folder: Path) -> None:
    """Write one PNG for each seed."""
    for image, seed in zip(images, seeds, strict=True):
        utils.save_grey(image, folder / f"seed{seed:04d}.png")


def names_of_rows(seeds: list[int], columns: int) -> list[str]:
    """The seeds in each row of a grid, in words."""
    rows = [seeds[i : i + columns] for i in range(0, len(seeds), columns)]
    return [
        f"seeds {row[0]} to {row[-1]}"
        if len(row) > 2 and row == list(range(row[0], row[-1] + 1))
        else f"seed{'s' * (len(row) > 1)} {', '.join(map(str, row))}"
        for row in rows
    ]


def write_grid(images: np.ndarray, title: str, seeds: list[int], paths: list[Path]) -> None:
    """Write a grid of all images of a class, with the seeds beside its rows."""
    columns = min(len(images), math.ceil(math.sqrt(2 * len(images))))
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    picture = utils.tile(np.concatenate([images, blank]), columns)
    labels = names_of_rows(seeds, columns), [str(i + 1) for i in range(columns)]
    utils.save_grid(picture, *labels, title, paths[0])
    if paths[1:]:
        figure = utils.new_figure(figsize=np.array(picture.shape[::-1]) / 96)
        ax = figure.subplots()
        utils.show_tiles(ax, picture, [utils.label(row, 20) for row in labels[0]], labels[1])
        ax.set_title(utils.label(title, 3 * columns))
        utils.save_figure(figure, *paths[1:])


def draw_sweep(
    G: Generator, classes: dict[int, str], seeds: list[int], sweep: dict[str, Options], axis: str,
    paths: list[Path],
) -> None:  # fmt: skip
    """A block of images for each class, with a row for each seed and a column for each options."""
    figure = utils.new_figure(
        figsize=(1.5 * len(sweep) * len(classes), 1.5 * len(seeds) + 1), layout="constrained"
    )
    axes = figure.subplots(1, len(classes), squeeze=False)[0]
    for ax, (label, name) in zip(axes, classes.items(), strict=True):
        columns = [sample_class(G, label, seeds, options) for options in sweep.values()]
        picture = utils.tile(np.stack(columns, 1).reshape(-1, *columns[0].shape[1:]), len(sweep))
        utils.show_tiles(ax, picture, list(map(str, seeds)), list(sweep))
        ax.set(xlabel=axis, ylabel="seed", title=utils.label(name, 12 * len(sweep)))
    utils.save_figure(figure, *paths)


def mixed(G: Generator, ws: Tensor, layers: slice) -> np.ndarray:
    """Images of ws [n, num_ws, w_dim]; i, j has ws[i], in some layers ws[j]. -> [n, n, H, W]."""
    n = len(ws)
    both = ws.repeat_interleave(n, 0)
    both[:, layers] = ws.repeat(n, 1, 1)[:, layers]
    images = images_of(G, both)
    return images.reshape(n, n, *images.shape[1:])


def draw_mixing(
    G: Generator, classes: dict[int, str], seeds: list[int], options: Options, paths: list[Path]
) -> None:
    """Style mixing ([1], section 3.1), of the first class: a block for each third of the layers.

    In a block the images have w of the seed at the left, but w of the seed above in that third.
    """
    label, name = next(iter(classes.items()))
    seeds, num_ws = seeds[:SWEEP_SEEDS], G.mapping.num_ws
    c = labels_of(G, np.full(len(seeds), label), seeds, options.position)
    ws = mapped(G, latents(seeds, G.z_dim), c, options.truncation_psi, options.truncation_cutoff)
    own, n = images_of(G, ws), len(seeds)
    figure = utils.new_figure(figsize=(4.6 * len(STYLES), 5.2), layout="constrained")
    for i, (ax, style) in enumerate(zip(figure.subplots(1, len(STYLES)), STYLES, strict=True)):
        layers = slice(num_ws * i // len(STYLES), num_ws * (i + 1) // len(STYLES))
        rows = np.concatenate([own[:, None], mixed(G, ws, layers)], 1)  # [n, 1 + n, H, W]
        top = np.concatenate([np.full_like(own[:1], 255), own])[None]
        picture = utils.tile(np.concatenate([top, rows]).reshape(-1, *own.shape[1:]), n + 1)
        numbers = ["", *map(str, seeds)]
        utils.show_tiles(ax, picture, numbers, numbers)
        ax.xaxis.tick_top()
        title = f"{style}: layers {layers.start + 1} to {layers.stop} of the seed above"
        ax.set(title=title, ylabel="seed of the other layers")
    figure.suptitle(utils.label(name, 60), fontsize=10)
    utils.save_figure(figure, *paths)


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W] -> float32 [N, P], averaged down to 64 x 64 pixels at most."""
    return averaged(images).flatten(1).numpy()


def probe_by_participant(train: tuple[np.ndarray, Slices], test: tuple[np.ndarray, Slices]) -> str:
    """How well a linear classifier separates the classes of unseen participants, in words.

    It is fitted to the training slices; the score of a participant is the mean over the slices.
    Too few test participants get no score.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, known), (y, unseen) = train, test
    if len(known.classes) < 2:
        return "one class, no probe"
    people = len(set(unseen.participants))
    if people < MIN_PARTICIPANTS:
        return f"no probe: {people} test participants are too few"
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    scores = probe.fit(x, known.labels).predict_proba(y)
    means, truth = mean_by_participant(scores, unseen.participants, unseen.labels)
    text = f"accuracy {np.mean(means.argmax(1) == truth):.2f}"
    if len(known.classes) == 2:
        text += f", AUC {roc_auc_score(truth, means[:, 1]):.2f}"
    return f"linear probe on {len(truth)} unseen participants: {text}"


def embed(features: np.ndarray) -> dict[str, np.ndarray]:
    """t-SNE [2] and UMAP [3] of features [N, F], each [N, 2]."""
    from sklearn.manifold import TSNE
    from umap import UMAP  # compiles for seconds on import

    n = len(features)
    init = "pca" if features.shape[1] > 1 else "random"
    tsne = TSNE(perplexity=min(30, (n - 1) / 3), init=init, random_state=0)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a seed slows UMAP down
        umap = UMAP(n_neighbors=min(15, n - 1), random_state=0).fit_transform(features)
    return {"t-SNE": tsne.fit_transform(features), "UMAP": umap}


def draw_embedding(
    x: np.ndarray, labels: np.ndarray, fake: np.ndarray, names: list[str], caption: str,
    paths: list[Path],
) -> None:  # fmt: skip
    """Two panels of x [N, F] by class: dots are real slices, crosses samples (`fake` [N], bool)."""
    if len(x) < MIN_POINTS or not x.std(0).any():
        reason = f"there are fewer than {MIN_POINTS} images, or all are equal"
        return utils.print_once(f"no {paths[0].name}: {reason}")
    figure = utils.new_figure(figsize=(11, 6), layout="constrained")
    for ax, (title, points) in zip(figure.subplots(1, 2), embed(x).items(), strict=True):
        for label, name in enumerate(names):
            style = {"s": 14, "alpha": 0.6, "color": f"C{label}", "linewidths": 0.8}
            for is_fake, marker, kind in (False, "o", "real, true class"), (True, "x", "generated"):
                chosen, text = (labels == label) & (fake == is_fake), f"{name} ({kind})"
                if chosen.any():
                    style |= {"marker": marker, "label": utils.label(text, 28)}
                    ax.scatter(*points[chosen].T, **style)
        ax.set(xticks=[], yticks=[], xlabel=f"{title}, first axis", ylabel="second axis")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(caption, fontsize=9)
    utils.save_figure(figure, *paths)


def draw_image_embedding(G: Generator, splits: dict[str, Slices], paths: list[Path]) -> None:
    """Real test slices by true class and as many samples, by principal components of images."""
    from sklearn.decomposition import PCA

    train, test = splits["train"], splits["test"]
    fitted = pixels(train.images[utils.random_rows(len(train.images), MAX_FITTED)])
    components = max(1, min(NUM_COMPONENTS, len(fitted) - 1))
    pca = PCA(components, svd_solver="randomized", random_state=0).fit(fitted)
    features = {k: pca.transform(pixels(s.images)) for k, s in splits.items()}
    probe = probe_by_participant((features["train"], train), (features["test"], test))

    chosen = utils.random_rows(len(test.labels), MAX_POINTS)
    real = test.take(chosen)
    z = latents(list(range(len(chosen))), G.z_dim)
    fake = pca.transform(pixels(sample(G, z, real.conditions())))
    caption = (
        f"{len(chosen)} real test slices and as many samples (psi = 1), in the first {components} "
        f"principal components of the training slices.\nReal: {probe}."
    )
    both = np.concatenate([features["test"][chosen], fake])
    labels, is_fake = np.tile(real.labels, 2), np.repeat([False, True], len(fake))
    draw_embedding(both, labels, is_fake, test.classes, caption, paths)


@torch.no_grad()
def draw_w_embedding(G: Generator, names: list[str], paths: list[Path]) -> None:
    """The intermediate latents w, coloured by the class given to G."""
    labels = np.arange(len(names)).repeat(math.ceil(MAX_POINTS / len(names)))
    seeds, device = list(range(len(labels))), next(G.parameters()).device
    z, c = latents(seeds, G.z_dim), labels_of(G, labels, seeds, None)
    w = G.mapping.map(z.to(device), c.to(device)).cpu().numpy()
    caption = "w of the mapping network. Classes may separate just because the label is an input."
    draw_embedding(w, labels, np.ones(len(w), bool), names, caption, paths)


def differences(configs: Sequence[Config]) -> dict[str, list[str]]:
    """Settings that differ between runs and change training, and their values in each run."""
    settings = [runs.plain_settings(config) for config in configs]
    unused = {*runs.FREE_TO_CHANGE, "fid_images", "fid_extractor"}
    if any(config.cooldown for config in configs):
        unused.discard("epochs")
    if all(config.augment != "ada" for config in configs):
        unused |= {name for name in settings[0] if name.startswith("ada_")}
    names = [n for n in settings[0] if n not in unused and len({str(s[n]) for s in settings}) > 1]
    return {name: [str(s[name]) for s in settings] for name in names}


def plot_comparison(folders: Sequence[Path], paths: list[Path]) -> None:
    """A column for each run with its last grid and its losses; below, FIDs and other settings."""
    folders = [runs.run_folder(run) for run in folders]
    settings = [runs.read_run_config(run)[:2] for run in folders]  # and the names of the classes
    differing = differences([config for config, _ in settings])
    names = [run.name for run in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    titles = [utils.label(name, 26) for name in names]
    height = 0.25 * (len(differing) + 1)  # inches, of the table
    figure = utils.new_figure(
        figsize=(max(8, 3.2 * len(folders)), 9 + height), layout="constrained"
    )
    ratios = (1.8, 2.8, 4.4, height)
    axes = figure.subplots(4, len(folders), squeeze=False, height_ratios=ratios)
    columns = zip(axes.T, folders, titles, settings, strict=True)
    for (top, middle, *_), run, title, (config, classes) in columns:
        if grids := recorder.grids_of(run):
            recorder.show_grid(top, grids[-1], classes, config.condition_position)
        else:
            top.axis("off")
        top.set_title(title, fontsize=10)
        middle.sharey(axes[1, 0])
        history = logs.read_history(run)
        diagnosis.draw_loss(middle, history, "d_loss", "C0")
        diagnosis.draw_loss(middle, history, "g_loss", "C1")
        middle.legend(fontsize=8)
    for ax in axes[2:].flat:
        ax.remove()
    fid, table = (figure.add_subplot(axes[0, 0].get_gridspec()[row, :]) for row in (2, 3))
    draw_fid(fid, folders, titles)
    table.axis("off")
    if differing:
        cells = [[utils.label(value, 26, 1) for value in values] for values in differing.values()]
        heads = [utils.label(name, 26, 1) for name in names]
        table.table(cells, None, "center", rowLabels=[*differing], colLabels=heads, loc="center")
    utils.save_figure(figure, *paths)


def fid_kind(run: Path) -> dict[str, Any]:
    """What must be equal in two runs, or their FIDs cannot be compared."""
    config, _, data = runs.read_run_config(run)
    encoder = run / "encoder.safetensors"  # another machine trains another one
    own = config.fid_extractor == "encoder" and encoder.exists()
    return {
        "extractor": config.fid_extractor,
        "data set": data,
        "resolution": config.img_resolution,
        "number of samples": config.fid_images,
        "encoder": utils.sha256_of(encoder) if own else None,
    }


def draw_fid(ax: "Axes", folders: Sequence[Path], names: Sequence[str]) -> None:
    """FID of each run over the images it was shown; dotted, FID of the real test slices.

    Runs with other data, pixels or extractor than the first run are not comparable: they are left
    out, and named. The lowest FID is that of `logs.meaningful_fid`, as in training.
    """
    kinds = [fid_kind(run) for run in folders]
    for i, (run, kind) in enumerate(zip(folders, kinds, strict=True)):
        log = [e for e in logs.read_log(run) if e.get("fid") is not None]
        line = [(e["nimg"] / 1000, e["fid"], e.get("fid_real")) for e in log]
        reasons = [f"it has another {k} than {folders[0]}" for k in kind if kind[k] != kinds[0][k]]
        if reasons := reasons or ["it has measured none"] * (not line):
            utils.print_once(f"{run}: no FID in the figure: {'; '.join(reasons)}")
            continue
        kimg, fid, real = zip(*line, strict=True)
        lowest = min(map(logs.meaningful_fid, log))
        text = f", lowest {lowest:.2f}" if lowest < math.inf else ""
        ax.plot(kimg, fid, ".-", color=f"C{i}", label=f"{names[i]}{text}")
        if real[0] is not None:  # None if there are too few test slices
            ax.axhline(real[0], color="grey", ls=":", lw=0.8)
    ax.set(xlabel="thousands of real images seen", yscale="log")
    ax.set_ylabel(f"FID to the training slices ({kinds[0]['extractor']})")
    ax.set_title("dotted: FID of real test slices", fontsize=9)
    if ax.lines:
        ax.legend(fontsize=8)
    ax.grid(alpha=0.3, which="both")


def chosen_classes(wanted: tuple[str, ...] | None, known: list[str]) -> dict[int, str]:
    """Index and name of the wanted classes. Raises UserError that lists the known names."""
    for name in wanted or ():
        if name not in known:
            raise UserError(f"classes: no class {name!r}; this generator knows {', '.join(known)}")
    return {i: name for i, name in enumerate(known) if wanted is None or name in wanted}


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Print the name of what was drawn, and the seconds that it took."""
    started = time.perf_counter()
    yield
    utils.print_once(f"{name}: {time.perf_counter() - started:.1f} s")


def predict(options: Options) -> Path:
    """Draw the figures. -> their folder. Raises UserError for bad input."""
    source = options.checkpoint or runs.newest_run()
    G, config, known = runs.load_generator(source)
    if not G.by_position and (
        options.position is not None or "positions" in (options.figures or ())
    ):
        place = (
            "figures: positions" if options.position is None else f"position = {options.position}"
        )
        raise UserError(f"{place}: a generator without condition_position has none")
    G.to(process.resolve_device(options.device))
    classes = chosen_classes(options.classes, known)
    out = options.out or runs.output_folder(source, "predict")
    utils.ensure_writable(out)
    config = replace(config, cache=options.cache or runs.cache_of(config))
    wanted = options.figures or get_args(Drawing)
    real = None
    if "embedding" in wanted:
        places = options.data_root, options.table
        real = runs.real_slices(source, config, known, *places, "no embedding of real slices")
    seeds = list(options.seeds or range(options.count))
    samples = [name for name in ("images", "grid") if name in wanted]
    end = "".join(f"_{text.replace(' ', '')}" for text in options.variant())
    for label, name in classes.items() if samples else ():
        with timed(f"{' and '.join(samples)} of {name}"):
            images = sample_class(G, label, seeds, options, f"sampling {utils.printable(name)}")
            if "images" in wanted:
                write_images(images, seeds, out / f"images{end}" / name)
            if "grid" in wanted:
                title = ", ".join([name, *options.variant()])
                write_grid(images, title, seeds, options.paths(out, f"grid_{name}{end}"))
    sweeps = {
        "truncation": ("psi", {f"{x}": replace(options, truncation_psi=x) for x in PSI_SWEEP}),
        "positions": ("position", {f"{x:.2f}": replace(options, position=x) for x in POSITIONS}),
    }
    for figure, (axis, sweep) in sweeps.items():
        if figure in wanted and (figure == "truncation" or G.by_position):
            with timed(figure):
                paths = options.paths(out, figure)
                draw_sweep(G, classes, seeds[:SWEEP_SEEDS], sweep, axis, paths)
    if "mixing" in wanted:
        with timed("mixing"):
            draw_mixing(G, classes, seeds, options, options.paths(out, f"mixing{end}"))
    if "embedding" in wanted:
        utils.print_once("embeddings take a while: UMAP is compiled first")
        os.environ.setdefault("NUMBA_CACHE_DIR", utils.compiled_folder(config.cache))  # for UMAP
        with timed("embedding_w"):
            draw_w_embedding(G, known, options.paths(out, "embedding_w"))
    if real is not None:
        with timed("embedding_images"):
            draw_image_embedding(G, real[0], options.paths(out, "embedding_images"))
    return out


def main() -> None:
    """The command line."""
    utils.work_alone()
    options = tyro.cli(Options, description=__doc__)
    if options.compare:
        paths = options.paths(options.out or Path("runs"), "comparison")
        utils.ensure_writable(paths[0].parent)
        plot_comparison(options.compare, paths)
        utils.print_once(" ".join(map(str, paths)))
    else:
        utils.print_once(f"figures in {predict(options)}")


if __name__ == "__main__":
    utils.run_command(main)
