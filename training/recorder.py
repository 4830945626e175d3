"""The part of training that measures the generator, writes the logs and draws the plots.

It neither writes checkpoints nor ends a run: the training loop asks a `Recorder` what is due and
what is wrong, and then acts.

References:
    [1] Karras et al. 2020, Training GANs with Limited Data, arXiv:2006.06676
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import utils
from config import Config
from dataset import Slices
from evaluation import features, metrics, samples, variety
from modules import Discriminator, Generator
from training import logs
from training.diagnosis import PANELS, RULES, diagnose, plot_curves, plot_losses
from training.process import STOP, Stopped, most_of_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLUSH_STEPS = 50  # steps between two writes of the losses, each of which waits for the device
GRID_COLUMNS = 8
GROUPS = {name: title for title, names, _, _ in PANELS for name in names}  # of TensorBoard
MAIN_AXES = 10  # principal components of real slices along which the spread is measured
NEARNESS = ("precision", "recall", "recall_blurred", "coverage")
MIDDLE = 0.1  # positions so near to 0.5, or else the nearest, count as the middle of the head
MAX_DEVIATION = 1000  # at most so many slices of a class give the deviation of a pixel


class Measurements:
    """What a run measures, at an interval, on fresh samples of the averaged generator.

    - `fid`, `kid`: distance to the training slices; `fid_real`: the FID of test slices, which are
      of other participants. `fid_test`: FID to the test slices; `fid_memory`: that of as many
      training slices.
    - `leak_rotation`, `leak_flip`, `leak_border`: see `leaks`.
    - `precision`, `recall`, `coverage`: see `manifold_metrics`, of as many samples as test slices;
      `recall_real`, `coverage_real`: those of test slices. `recall_blurred`, `recall_blurred_real`:
      recall after all images were blurred by a pixel; it stays low if shapes are missing, but not
      for want of detail.
    - `spread`: deviation of samples along the ten main axes of the real slices' features, divided
      by that of the real slices; the median of the axes.
    - `shapes_1_1`, `shapes_2_6`, `shapes_7_20`: deviation of samples along the principal components
      of the real pixels, divided by that of the real slices; the median of some components.
    - `spectrum`: power of samples at the highest frequencies, divided by that of real slices.
    - `vary_z`, `vary_noise`, `vary_class`: how far a pixel moves if only z, only the noise or only
      the class changes, as a share of the deviation among real slices; z counts in the class that
      it moves least.
    - `agreement`: share of samples in which an encoder, trained on real slices, sees the class that
      was asked for, averaged over classes; `agreement_real`: the same of real test slices.
    - `agreement_chance`: the same of a guess; `test_participants`: people in the test set.
    - `overfitting`: 0 if D rates test slices like training slices, 1 if it rates them like samples
      ([1], equation 1); None if D hardly tells training slices from samples either.

    A measurement is None if it needs more slices, or slices that differ more; a note says so. The
    encoder is kept in the run folder.
    """

    def __init__(
        self, splits: dict[str, Slices], data: str, config: Config, device: torch.device
    ) -> None:
        train, test = splits["train"], splits["test"]
        self.config, self.classes, self.num_classes = config, train.classes, len(train.classes)
        own = config.out / "encoder.safetensors"
        self.encoder, digest = features.trained_encoder(train, data, config.cache, own)
        if config.fid_extractor in features.PRETRAINED:
            self.extractor = features.PRETRAINED[config.fid_extractor][1](None, device)
        else:
            self.extractor = features.encoder_extractor(self.encoder, digest, data)
        self.unmeasured: set[str] = set()
        cache, count = config.cache, config.fid_images
        self.real = features.features_of(train.images, self.extractor, cache, "training slices")
        self.gaussian = metrics.gaussian(self.real)
        rows = utils.random_rows(len(self.real), count)
        self.some_real = metrics.Features(self.real, train.participants, train.labels).take(rows)
        unseen = variety.some_features(test, count, self.extractor, cache=cache)
        self.unseen, self.num_unseen = metrics.gaussian(unseen.values), len(unseen.values)
        self.fid_real = metrics.gaussian_distance(self.unseen, self.gaussian)
        some = metrics.gaussian(self.some_real.values)
        self.fid_memory = metrics.gaussian_distance(some, self.unseen)
        self.some_blurred = self.blurred(train, cache)
        self.near_real = self.nearness(unseen, self.blurred(test, cache))
        self.axes = metrics.main_axes(self.gaussian, MAIN_AXES)
        pixels = features.compute_features(train.images[rows], features.PIXELS, None)
        self.shapes = metrics.main_axes(metrics.gaussian(pixels), metrics.NUM_SHAPES)
        self.labels = samples.labels_in_proportion(train.labels, config.fid_images)
        self.positions = samples.positions_like(train, self.labels, 0)
        rng = np.random.default_rng(0)  # D gets slices in random order, as in training
        self.subsets = {
            name: part.take(rng.permutation(len(part.labels))[: config.fid_images])
            for name, part in splits.items()
        }
        rows = [np.flatnonzero(train.labels == i) for i in range(self.num_classes)]
        if train.positions is not None:  # samples whose pixels move are of one position
            far = np.abs(train.positions - 0.5)
            rows = [r[far[r] <= max(MIDDLE, far[r].min())] for r in rows]
        rows = [r[utils.random_rows(len(r), MAX_DEVIATION)] for r in rows]
        self.deviation = float(np.mean([train.images[r].std(0).mean() for r in rows])) or math.nan
        self.pose = metrics.pose(self.subsets["train"].images)
        self.grain = metrics.grain(self.subsets["train"].images) or math.nan
        self.agreement_real = self.agreement(test)

    @torch.no_grad()
    def agreement(self, slices: Slices) -> float:
        """Share of slices in which the encoder sees their class, averaged over the classes."""
        scores = features.class_scores(self.encoder, features.averaged(slices.images))
        right = scores[:, : self.num_classes].argmax(1) == slices.labels
        return float(np.mean([right[slices.labels == i].mean() for i in np.unique(slices.labels)]))

    def blurred(self, slices: Slices, cache: Path | None = None) -> metrics.Features:
        """Features of at most `fid_images` of the slices, blurred by a pixel."""
        n = min(self.config.fid_images, len(slices.labels))
        return variety.some_features(slices, n, self.extractor, variety.BLUR, cache)

    def nearness(self, some: metrics.Features, blurred: metrics.Features) -> dict[str, float]:
        """Precision, recall and coverage of training slices, and recall after a blur."""
        found = metrics.manifold_metrics(self.some_real, some)
        found["recall_blurred"] = metrics.manifold_metrics(self.some_blurred, blurred)["recall"]
        return {name: found[name] for name in NEARNESS}

    @torch.no_grad()
    def mean_logit(self, D: Discriminator, slices: Slices) -> float:
        """Mean logit of D, over whole batches if there is one."""
        device, size = next(D.parameters()).device, self.config.batch_size
        c, logits = slices.conditions(), []
        for i in range(0, max(1, len(c) - size + 1), size):
            x = features.to_tensor(slices.images[i : i + size]).to(device).float() / 127.5 - 1
            logits.append(D(x, c[i : i + size].to(device)))
        return float(torch.cat(logits).mean())

    def measure(self, G: Generator, D: Discriminator) -> dict[str, float | None]:
        """All measurements of the averaged generator and of the discriminator."""
        seed = utils.stream_seed("measurements", self.config.seed)  # other latents than evaluate.py
        given = self.labels, self.classes, seed, self.positions
        fakes = samples.sample_fakes(G, *given, silent=True)
        values = features.compute_features(fakes.images, self.extractor, None)
        order = np.random.default_rng(0).permutation(len(fakes.labels))
        subsets = (self.subsets["train"], self.subsets["test"], fakes.take(order))
        real, test, fake = (self.mean_logit(D, slices) for slices in subsets)
        some = metrics.Features(values, fakes.participants, fakes.labels)
        few = utils.random_rows(len(values), self.num_unseen)  # as many as test slices
        as_many = values[utils.random_rows(len(values), len(self.some_real.values))]
        pixels = features.compute_features(fakes.images, features.PIXELS, None)
        moved = samples.conditional_variation(G, self.config.seed)
        found = {
            "fid": metrics.gaussian_distance(metrics.gaussian(values), self.gaussian),
            "fid_real": self.fid_real,
            "fid_test": metrics.gaussian_distance(metrics.gaussian(as_many), self.unseen),
            "fid_memory": self.fid_memory,
            "test_participants": len(set(self.subsets["test"].participants)),
            **self.nearness(some.take(few), self.blurred(fakes.take(few))),
            **{f"{name}_real": self.near_real[name] for name in NEARNESS[1:]},
            "spread": metrics.median_deviation(values @ self.axes),
            **metrics.shape_spread(pixels @ self.shapes),
            "kid": metrics.kernel_distance(some, self.some_real)[0],
            **metrics.leaks(self.pose, metrics.pose(fakes.images)),
            "spectrum": metrics.grain(fakes.images) / self.grain,
            **{f"vary_{name}": value / self.deviation for name, value in moved.items()},
            "overfitting": (real - test) / (real - fake) if real - fake > 0.1 else None,
        }
        if self.num_classes > 1:
            found |= {"agreement": self.agreement(fakes), "agreement_real": self.agreement_real}
            found["agreement_chance"] = 1 / self.num_classes
        missing = {k for k, v in found.items() if v is not None and not math.isfinite(v)}
        if new := ", ".join(sorted(missing - self.unmeasured)):
            utils.print_once(f"note: too few slices, or too similar ones, to measure {new}")
        self.unmeasured |= missing
        return found | dict.fromkeys(missing)


def grid_interval(config: Config, epoch: int) -> int:
    """Epochs between grids: `snapshot_epochs`, ten times as many from epoch 100 on, and so on."""
    return config.snapshot_epochs * 10 ** max(0, len(str(epoch)) - 2)


class Recorder:
    """Writes the logs, TensorBoard files, grids and plots of a run, on rank 0."""

    def __init__(self, config: Config, slices: Slices, cur_nimg: int, device: torch.device) -> None:
        """Cuts the logs to their first `cur_nimg` images."""
        self.config, self.run, self.cur_nimg = config, config.out, cur_nimg
        self.epoch_size = len(slices.images)
        self.measurements: Measurements | None = None
        self.pending: list[tuple[int, Tensor]] = []  # (cur_nimg, [len(STATS)]) to be written
        self.not_finite: tuple[str, int] | None = None  # the first such statistic, and cur_nimg
        rng = torch.Generator().manual_seed(utils.stream_seed("grid", config.seed))
        z = torch.randn(1, GRID_COLUMNS, config.z_dim, generator=rng)
        num_rows = len(slices.classes)  # the rows have the same latents and rising positions
        self.z = z.expand(num_rows, -1, -1).flatten(0, 1).to(device)
        self.names, self.numbers = slices.classes, column_names(slices.positions is not None)
        labels = np.arange(num_rows).repeat(GRID_COLUMNS)
        rising = np.tile(np.linspace(0, 1, GRID_COLUMNS), num_rows)
        positions = None if slices.positions is None else rising
        self.c = utils.conditions(labels, positions, slices.c_dim).to(device)
        if utils.rank() == 0:
            self.lines, rows = logs.truncate_logs(self.run, cur_nimg)
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(self.run / "tensorboard", purge_step=cur_nimg + 1)
            self.logged = self.lines[-1]["nimg"] if self.lines else 0
            rows[:, 1:] = rows[:, 1:].astype(np.float32)  # the file has enough digits for this
            self.epoch_rows = list(rows[rows[:, 0] > self.logged])  # of the unfinished epoch
            self.warned: set[str] = set()
        self.start_clock()

    def prepare_measurements(
        self, splits: dict[str, Slices], data: str, device: torch.device
    ) -> None:
        """Measure the real slices, unless a request to stop comes before or meanwhile."""
        if self.config.fid_kimg and utils.rank() == 0:
            with suppress(Stopped), STOP.immediate():
                self.measurements = Measurements(splits, data, self.config, device)

    def start_clock(self) -> None:
        """Start to time training; `waited` sums up the seconds spent waiting for the loader."""
        self.started, self.started_nimg, self.waited = time.perf_counter(), self.cur_nimg, 0.0

    def write_losses(self) -> dict[str, float]:
        """Append pending steps to losses.csv; waits for the device. -> the newest statistics."""
        nimg, stats = zip(*self.pending, strict=True)
        values = torch.stack(stats).cpu().double().numpy()
        self.pending = []
        rows = np.column_stack([nimg, values])
        self.epoch_rows.extend(rows)
        logs.append_losses(self.run, rows)
        for n, row in zip(nimg, values, strict=True):
            due = logs.due_statistics(self.config, n - self.config.batch_size)
            for name, value in zip(logs.STATS, row, strict=True):
                if math.isinf(value) or (math.isnan(value) and due.get(name, True)):
                    self.not_finite = self.not_finite or (name, n)
        return dict(zip(logs.STATS, values[-1], strict=True))

    def rows_of_epoch(self) -> np.ndarray:
        """Rows (nimg, *STATS) of the unfinished epoch; none if its losses.csv is gone."""
        return np.array(self.epoch_rows).reshape(-1, 1 + len(logs.STATS))

    def unlogged_epoch(self) -> int:
        """The epoch that ended with the last step, if log.jsonl lacks it, else 0; on all ranks."""
        missed = utils.rank() == 0 and self.logged < self.cur_nimg
        return most_of_ranks(self.ended_epoch() if missed else 0)

    def ended_epoch(self) -> int:
        """The epoch that ended with the last step, or the last of several, else 0."""
        before = (self.cur_nimg - self.config.batch_size) // self.epoch_size
        now = self.cur_nimg // self.epoch_size
        return min(now, self.config.epochs) if now > before else 0

    def comes_due(self, kimg: float) -> bool:
        """Whether a multiple of `kimg` thousand images was passed since the last logged epoch."""
        return self.logged // (kimg * 1000) < self.cur_nimg // (kimg * 1000)

    def grid_due(self, epoch: int) -> bool:
        """Whether a multiple of the grid interval was passed since the last logged epoch."""
        interval = grid_interval(self.config, epoch)
        return epoch // interval > self.logged // self.epoch_size // interval

    def summary(self, epoch: int, pl_mean: float) -> dict[str, float | None]:
        """A line of log.jsonl: speed, and the mean of each statistic; None if it has no value."""
        nimg, seconds = self.cur_nimg, time.perf_counter() - self.started
        line: dict[str, float | None] = {"epoch": epoch, "nimg": nimg, "seconds": round(seconds, 2)}
        if nimg > self.started_nimg:
            line["img_per_s"] = round((nimg - self.started_nimg) / seconds, 2)
            line["data_wait"] = round(self.waited / seconds, 4)
        rows = self.rows_of_epoch()
        columns = dict(zip(logs.STATS, rows.T[1:], strict=True))
        for name, column in columns.items():
            line[name] = float(np.nanmean(column)) if np.isfinite(column).any() else None
        spread = float(columns["d_loss"].std()) if len(rows) else None
        return line | {"pl_mean": pl_mean, "d_loss_spread": spread}

    def write_line(self, line: dict[str, float | None]) -> None:
        """Write a line to log.jsonl and TensorBoard; warn, once per rule, of what looks wrong."""
        with open(self.run / "log.jsonl", "a", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if value is not None:
                self.board.add_scalar(f"{GROUPS.get(name, 'Run')}/{name}", value, self.cur_nimg)
        self.lines.append(line)
        rows, ended = self.rows_of_epoch(), line["epoch"] == self.config.epochs
        self.epoch_rows = []
        if not ended and "fid" not in line and len(self.lines) % (1 + len(self.lines) // 1000):
            return  # a long log takes long to judge
        history = logs.history_of(self.lines, rows)
        for name, text in diagnose(history, self.config).items():
            if name not in self.warned and (ended or not RULES[name].passes):
                self.warned.add(name)
                utils.print_once(f"warning: {text}")

    @torch.no_grad()
    def save_grid(self, G_ema: Generator, epoch: int, label_weight: float) -> None:
        """Draw samples of the same latents at every epoch, a row for each class."""
        z_rows, c_rows = (x.split(GRID_COLUMNS) for x in (self.z, self.c * label_weight))
        pairs = zip(z_rows, c_rows, strict=True)
        fake = torch.cat([G_ema(z, c, noise_mode="const") for z, c in pairs])
        picture = utils.tile(utils.to_uint8(fake), GRID_COLUMNS)
        path = self.run / "grids" / f"epoch{epoch:04d}.png"
        utils.save_grid(picture, self.names, self.numbers, f"epoch {epoch}", path)
        self.board.add_image("grid", picture, self.cur_nimg, dataformats="HW")

    def close(self) -> None:
        """Draw the plots of the run so far."""
        if utils.rank() == 0:
            self.board.close()
            history = logs.read_history(self.run)
            plot_losses(history, self.run / "losses.png")
            plot_curves(history, self.run / "curves.png", self.config)
            by_position = self.config.condition_position
            plot_progress(self.run, self.run / "progress.png", self.names, by_position)


def column_names(by_position: bool) -> list[str]:
    """The names of a grid's columns: the number of the latent, or the position in the head."""
    if by_position:
        return [f"position {x:.2f}" for x in np.linspace(0, 1, GRID_COLUMNS)]
    return [str(i + 1) for i in range(GRID_COLUMNS)]


def grids_of(run: Path) -> list[Path]:
    """The image grids of a run, by epoch."""
    found = (run / "grids").glob("epoch*.png")
    return sorted((path for path in found if path.stem[5:].isdecimal()), key=epoch_of)


def epoch_of(grid: Path) -> int:
    return int(grid.stem[5:])


def read_square(grid: Path) -> np.ndarray:
    """The left part of a grid, twice as wide as high; a narrow one is filled up with white."""
    picture = utils.read_picture(grid)
    wide = np.full((len(picture), 2 * len(picture)), 255, np.uint8)
    part = picture[:, : wide.shape[1]]
    wide[:, : part.shape[1]] = part
    return wide


def show_grid(ax: "Axes", grid: Path, names: Sequence[str], by_position: bool) -> None:
    """Show the left part of a grid, with its classes, and its latents or positions, at the edge."""
    columns = [name.removeprefix("position ") for name in column_names(by_position)]
    columns += [""] * (2 * len(names) - len(columns))
    rows = [utils.label(name, 12, 2) for name in names]
    utils.show_tiles(ax, read_square(grid), rows, columns[: 2 * len(names)])
    ax.tick_params(labelsize=6)
    ax.set_xlabel("position, 0 lowest" if by_position else "number of the latent", fontsize=7)
    ax.set_ylabel("class", fontsize=7)


def plot_progress(
    run: Path, path: Path, names: Sequence[str], by_position: bool, num_columns: int = 6
) -> None:
    """Draw the left parts of a few image grids, evenly spaced over the epochs, side by side."""
    if not (grids := grids_of(run)):
        return
    chosen = [grids[i] for i in utils.evenly_spaced(len(grids), num_columns)]
    figure = utils.new_figure(figsize=(3.2 * len(chosen), 2.2), layout="constrained")
    for ax, grid in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
        show_grid(ax, grid, names, by_position)
        ax.set_title(f"epoch {epoch_of(grid)}", fontsize=9)
    for ax in figure.axes[1:]:
        ax.set(yticklabels=[], ylabel="")  # the classes stand beside the first grid
    utils.save_figure(figure, path)
