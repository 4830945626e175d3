"""What a run measures, records and draws as it goes.

Nothing here knows a checkpoint or ends a run: the training loop asks a `Recorder` what is due and
what is wrong, and acts.

References:
    [1] Karras et al. 2020, Training GANs with Limited Data, arXiv:2006.06676
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from config import Config
from dataset import Slices
from evaluation import features, metrics
from modules import Discriminator, Generator
from training import logs
from training.diagnosis import diagnose, plot_curves, plot_losses
from training.process import most_of_ranks
from utils import (
    conditions,
    evenly_spaced,
    print_once,
    rank,
    save_figure,
    save_grey,
    stream_seed,
    tile,
    to_uint8,
)

FLUSH_STEPS = 50  # steps from one look at the losses, which waits for the device, to the next
GRID_COLUMNS = 8
MAX_DEVIATION = 1000  # slices of a class for the deviation of a pixel


# Measuring while training


class Measurements:
    """What a run measures of itself at an interval, on fresh samples of the averaged generator.

    - `fid`, `kid` to the training slices, and `fid_real`, that of the test slices: of other ids.
    - `leak_rotation`, `leak_flip`, `leak_border`: see `leaks`.
    - `spectrum`: power of the samples at the highest frequencies, over that of real slices.
    - `vary_z`, `vary_noise`, `vary_class`: how far a pixel moves when only z (in the class it moves
      least), only the noise or only the class changes, as a share of that among real slices.
    - `agreement`: share of samples in which an encoder, trained on real slices, sees the class
      asked for, the mean over classes; `agreement_real`: the same of real test slices.
    - `overfitting`: how far D holds test slices for fakes, 0 to 1 ([1], equation 1); None where D
      hardly tells training slices from fakes either.

    A figure that needs more slices, or slices less alike, than there are is None, and said to be.
    Its encoder belongs to the run.
    """

    def __init__(
        self, splits: dict[str, Slices], data: str, config: Config, device: torch.device
    ) -> None:
        train, test = splits["train"], splits["test"]
        self.config, rng = config, np.random.default_rng(0)
        self.classes, self.num_classes = train.classes, len(train.classes)
        own = config.out / "encoder.safetensors"
        self.encoder, digest = features.trained_encoder(train, data, config.cache, own)
        if config.fid_extractor == "inception":
            self.extractor = features.load_inception(None, device)
        else:
            self.extractor = features.encoder_extractor(self.encoder, digest, data)
        self.missing: set[str] = set()
        self.real = features.features_of(
            train.images, self.extractor, config.cache, "training slices"
        )
        unseen = features.features_of(test.images, self.extractor, config.cache, "test slices")
        self.fid_real = metrics.frechet_distance(unseen, self.real)
        self.real = metrics.gaussian(self.real), self.real
        self.labels = features.labels_in_proportion(train.labels, config.fid_images)
        self.samples = {}  # as many slices of each split, for D
        for name, part in splits.items():
            rows = rng.permutation(len(part.labels))  # mixed, as batches are in training
            rows = rows[: config.fid_images]
            self.samples[name] = part.take(rows)
        rows = [np.flatnonzero(train.labels == i) for i in range(len(train.classes))]
        rows = [r[evenly_spaced(len(r), MAX_DEVIATION)] for r in rows]
        self.deviation = float(np.mean([train.images[r].std(0).mean() for r in rows])) or math.nan
        self.pose = metrics.pose(self.samples["train"].images)
        self.grain = metrics.grain(self.samples["train"].images) or math.nan
        self.seen_real = self.agreement(test)

    @torch.no_grad()
    def agreement(self, slices: Slices) -> float:
        """Share of the slices of a class for which the encoder names it, the mean over classes."""
        named = features.class_scores(self.encoder, features.averaged(slices.images))[
            :, : self.num_classes
        ].argmax(1)
        present = np.unique(slices.labels)
        return float(np.mean([(named == i)[slices.labels == i].mean() for i in present]))

    @torch.no_grad()
    def logits(self, D: Discriminator, slices: Slices) -> float:
        """Mean logit of D."""
        device, c_dim = next(D.parameters()).device, 0 if D.embed is None else len(D.embed)
        c, logits = conditions(slices.labels, slices.positions, c_dim), []
        size = self.config.batch_size
        for i in range(0, max(1, len(c) - size + 1), size):
            x = features.to_tensor(slices.images[i : i + size]).to(device).float() / 127.5 - 1
            logits.append(D(x, c[i : i + size].to(device)))
        return float(torch.cat(logits).mean())

    def measure(self, G: Generator, D: Discriminator) -> dict[str, float | None]:
        """All figures of the averaged generator and the discriminator as they are."""
        fakes = features.sample_fakes(G, self.labels, self.classes, self.config.seed, silent=True)
        values = features.compute_features(fakes.images, self.extractor, None)
        real, test = (self.logits(D, self.samples[name]) for name in ("train", "test"))
        order = np.random.default_rng(0).permutation(len(fakes.labels))
        fake = self.logits(D, fakes.take(order))
        moved = features.conditional_variation(G, self.config.seed)
        figures = {
            "fid": metrics.gaussian_distance(metrics.gaussian(values), self.real[0]),
            "fid_real": self.fid_real,
            "kid": metrics.kernel_distance(values, self.real[1], subsets=10)[0],
            **metrics.leaks(self.pose, metrics.pose(fakes.images)),
            "spectrum": metrics.grain(fakes.images) / self.grain,
            **{f"vary_{name}": value / self.deviation for name, value in moved.items()},
            "overfitting": (real - test) / (real - fake) if real - fake > 0.1 else None,
        }
        if self.num_classes > 1:
            figures |= {"agreement": self.agreement(fakes), "agreement_real": self.seen_real}
            figures["agreement_chance"] = 1 / self.num_classes
        found = {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}
        missing = {k for k, v in found.items() if v is None and figures[k] is not None}
        if new := sorted(missing - self.missing):
            print_once(f"note: too few slices, or too much alike, to measure {', '.join(new)}")
        self.missing |= missing
        return found


# Recording


def grid_interval(config: Config, epoch: int) -> int:
    """Epochs from one grid to the next: below 100, ten times as many below 1,000, and so on."""
    return config.snapshot_epochs * 10 ** max(0, len(str(epoch)) - 2)


class Recorder:
    """Writes, on rank 0, what a run says of itself: logs, TensorBoard, grids, plots.

    `not_finite` is the first statistic that is no finite number, and the image at which it arose.
    """

    def __init__(self, config: Config, slices: Slices, cur_nimg: int, device: torch.device) -> None:
        """Cuts the logs back to `cur_nimg` images."""
        self.config, self.run, self.cur_nimg = config, config.out, cur_nimg
        self.epoch_size = len(slices.images)
        self.measurements: Measurements | None = None
        self.pending: list[tuple[int, Tensor]] = []  # (cur_nimg, statistics) not yet written
        self.not_finite: tuple[str, int] | None = None
        rng = torch.Generator().manual_seed(stream_seed("grid", config.seed))
        z = torch.randn(1, GRID_COLUMNS, config.z_dim, generator=rng)
        num_rows = len(slices.classes)  # every class shows the same latents, from low to high
        self.z = z.expand(num_rows, -1, -1).flatten(0, 1).to(device)
        positions = np.tile(np.linspace(0, 1, GRID_COLUMNS), num_rows)
        labels = np.arange(num_rows).repeat(GRID_COLUMNS)
        positions = None if slices.positions is None else positions
        self.c = conditions(labels, positions, slices.c_dim).to(device)
        if rank() == 0:
            self.lines, rows = logs.truncate_logs(self.run, cur_nimg)
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(self.run / "tensorboard", purge_step=cur_nimg + 1)
            self.logged = self.lines[-1]["nimg"] if self.lines else 0
            rows[:, 1:] = rows[:, 1:].astype(np.float32)  # the very values that were written
            self.epoch_rows = list(rows[rows[:, 0] > self.logged])  # of the epoch under way
            self.warned: set[str] = set()
        self.start_clock()

    def start_clock(self) -> None:
        """What follows is training, until `summary`; `waited` is what of it goes in waiting."""
        self.started, self.started_nimg, self.waited = time.perf_counter(), self.cur_nimg, 0.0

    def add(self, cur_nimg: int, stats: Tensor) -> None:
        """The statistics [len(STATS)] of one step, to be written some steps later."""
        self.cur_nimg = cur_nimg
        self.pending.append((cur_nimg, stats))

    def write_losses(self) -> dict[str, float]:
        """Write the waiting rows of losses.csv, which waits for the device. -> the newest."""
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

    def unlogged_epoch(self) -> int:
        """On all ranks: the epoch that ended with the last step, if its line is missing, or 0."""
        missed = rank() == 0 and self.logged < self.cur_nimg
        return most_of_ranks(self.ended_epoch() if missed else 0)

    def ended_epoch(self) -> int:
        """The epoch that ended with the last step, the last of them if several did, or 0."""
        before = (self.cur_nimg - self.config.batch_size) // self.epoch_size
        now = self.cur_nimg // self.epoch_size
        return min(now, self.config.epochs) if now > before else 0

    def comes_due(self, kimg: float) -> bool:
        """Whether a multiple of so many thousand images was passed since the last epoch's end."""
        passed = [int(nimg // (kimg * 1000)) for nimg in (self.logged, self.cur_nimg)]
        return passed[0] < passed[1]

    def grid_due(self, epoch: int) -> bool:
        """Whether a multiple of the interval lies in the epochs since the last one's end."""
        interval = grid_interval(self.config, epoch)
        return epoch // interval > self.logged // self.epoch_size // interval

    def summary(self, epoch: int, pl_mean: float) -> dict[str, float | None]:
        """Speed and the means of the epoch's steps; None where there were none."""
        nimg, seconds = self.cur_nimg, time.perf_counter() - self.started
        line: dict[str, float | None] = {
            "epoch": epoch,
            "nimg": nimg,
            "seconds": round(seconds, 2),
            "img_per_s": round((nimg - self.started_nimg) / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
        }
        columns = dict(zip(logs.STATS, np.array(self.epoch_rows).T[1:], strict=True))
        for name, column in columns.items():
            line[name] = float(np.nanmean(column)) if np.isfinite(column).any() else None
        return line | {"pl_mean": pl_mean, "d_loss_spread": float(columns["d_loss"].std())}

    def write_line(self, line: dict[str, float | None]) -> None:
        """An epoch's line in log.jsonl and on TensorBoard; says once what looks wrong."""
        with open(self.run / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if value is not None:
                self.board.add_scalar(name, value, self.cur_nimg)
        self.lines.append(line)
        history = logs.history_of(self.lines, np.array(self.epoch_rows))
        self.epoch_rows = []
        for name, text in diagnose(history, self.config).items():
            if name not in self.warned:
                self.warned.add(name)
                print_once(f"warning: {text}")

    @torch.no_grad()
    def save_grid(self, G_ema: Generator, epoch: int, label_weight: float) -> None:
        """The same latents at every epoch, a row per class."""
        c = self.c * label_weight
        fake = [
            G_ema(z, c, noise_mode="const")
            for z, c in zip(self.z.split(GRID_COLUMNS), c.split(GRID_COLUMNS), strict=True)
        ]
        picture = tile(to_uint8(torch.cat(fake)), GRID_COLUMNS)
        save_grey(picture, self.run / "grids" / f"epoch{epoch:04d}.png")
        self.board.add_image("grid", picture, self.cur_nimg, dataformats="HW")

    def end_epoch(self) -> None:
        """All that was due at the end of an epoch is done: the clock of the next one starts."""
        self.logged = self.cur_nimg
        self.start_clock()

    def close(self) -> None:
        """Draw the plots of the run so far."""
        if rank() == 0:
            self.board.close()
            plot_losses(self.run, self.run / "losses.png")
            plot_curves(self.run, self.run / "curves.png", self.config)
            plot_progress(self.run, self.run / "progress.png")


def read_square(grid: Path) -> np.ndarray:
    """The left part of a grid, twice as wide as high at most."""
    picture = np.asarray(Image.open(grid))
    return picture[:, : 2 * picture.shape[0]]


def plot_progress(run: Path, path: Path, num_columns: int = 6) -> None:
    """A strip of the image grids over the epochs: the first images of each, at even distances."""
    grids = sorted((run / "grids").glob("epoch*.png"))
    if not grids:
        return
    chosen = [
        grids[i] for i in np.unique(np.linspace(0, len(grids) - 1, num_columns).round().astype(int))
    ]
    figure = Figure(figsize=(3.2 * len(chosen), 2))
    for ax, grid in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
        ax.imshow(read_square(grid), cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"epoch {int(grid.stem[5:])}", fontsize=9)
        ax.axis("off")
    save_figure(figure, path)
