"""What a run says of itself: its logs, what it measures, the rules that read both, and the plots.

losses.csv has a line for each step, log.jsonl one for each epoch. Nothing here knows a checkpoint
or ends a run: the training loop asks a `Recorder` what is due and what is wrong, and acts.

References:
    [1] Karras et al. 2020, Training GANs with Limited Data, arXiv:2006.06676
"""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.signal import lfilter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config import Config
from dataset import Slices
from features import (
    Fakes,
    averaged,
    class_scores,
    compute_features,
    conditional_variation,
    encoder_extractor,
    features_of,
    load_inception,
    part_of,
    sample_fakes,
    spread_labels,
    to_tensor,
    trained_encoder,
)
from metrics import (
    frechet_distance,
    gaussian,
    gaussian_distance,
    grain,
    kernel_distance,
    leaks,
    pose,
)
from modules import AdaptiveAugment, Discriminator, Generator
from training.process import most_of_ranks
from utils import (
    conditions,
    rank,
    save_figure,
    save_grey,
    say,
    spread,
    stream_seed,
    tile,
    to_uint8,
    write_atomically,
)

# Statistics of each step, in the order in which they arise
STATS = (
    "g_loss", "path_length", "d_loss", "real_logit", "fake_logit", "r1", "real_sign", "fake_sign",
    "g_main_grad", "d_main_grad", "ada_p",
)  # fmt: skip
FLUSH_STEPS = 50  # steps from one look at the losses, which waits for the device, to the next
GRID_COLUMNS = 8
MAX_DRAWN = 5000  # steps in a plot
MAX_DEVIATION = 1000  # slices of a class for the deviation of a pixel


# Logs


def due_statistics(config: Config, nimg: int) -> dict[str, bool]:
    """Which statistics belong to the step that starts at image `nimg`, of those that may not."""
    step = nimg // config.batch_size
    return {
        "r1": step % config.r1_interval == 0,
        "path_length": config.pl_weight > 0 and step % config.pl_interval == 0,
        "ada_p": config.augment == "ada",
    }


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file, without a last one that was cut off; none without the file."""
    content = path.read_bytes() if path.exists() else b""
    return content.decode(errors="replace").split("\n")[:-1]


def number(value: Any) -> float:
    """A finite number, as it is; NaN for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < 1e300 else math.nan


def read_losses(run: Path) -> np.ndarray:
    """Rows (nimg, *STATS) of losses.csv; NaN where one was not due.

    Only lines that are whole count: as many numbers as there are names, at a later image each.
    """
    header, *lines = whole_lines(run / "losses.csv") or [""]
    names, rows = header.split(","), []  # those of earlier versions had fewer
    if names == ["nimg", *STATS] and (found := all_numbers(lines, len(names))) is not None:
        return found
    for line in lines if names[0] == "nimg" else ():
        try:
            values = [float(value or "nan") for value in line.split(",")]
            row = dict(zip(names, values, strict=True))
        except ValueError:
            continue
        if (rows[-1][0] if rows else -1) < row["nimg"] < math.inf:
            rows.append([row.get(name, math.nan) for name in ("nimg", *STATS)])
    return np.array(rows).reshape(-1, 1 + len(STATS))


def all_numbers(lines: list[str], width: int) -> np.ndarray | None:
    """Lines of numbers, at a later image each, as rows; None where one is damaged. Fast."""
    text = ",\n".join(lines) + ","
    for _ in range(2):
        text = text.replace(",,", ",nan,")
    if re.search(r"[^-+0-9.e,na\n]", text) or any(x.count(",") != width - 1 for x in lines):
        return None
    try:
        values = np.fromstring(text, sep=",")
    except ValueError:
        return None
    if not lines or values.size != len(lines) * width:
        return None
    rows = values.reshape(-1, width)
    later = np.diff(rows[:, 0], prepend=-1) > 0
    return rows if later.all() and np.isfinite(rows[:, 0]).all() else None


def losses_text(rows: np.ndarray) -> str:
    """Rows (nimg, *STATS) as lines of losses.csv."""
    return "".join(",".join("" if np.isnan(v) else f"{v:.9g}" for v in r) + "\n" for r in rows)


def append_losses(run: Path, rows: np.ndarray) -> None:
    """Append rows (nimg, *STATS) to losses.csv."""
    with open(run / "losses.csv", "a") as file:
        file.write(losses_text(rows))


def read_log(run: Path) -> list[dict[str, Any]]:
    """Lines of log.jsonl that are whole: numbers by name, an epoch at a later image each."""
    found: list[dict[str, Any]] = []
    for text in whole_lines(run / "log.jsonl"):
        try:
            line = json.loads(text)
            nimg, epoch = number(line["nimg"]), number(line["epoch"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        last = found[-1]["nimg"] if found else -1
        if last < nimg and not math.isnan(epoch):
            found.append({k: v for k, v in line.items() if v is None or not math.isnan(number(v))})
    return found


def cut_logs(run: Path, up_to: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Start both logs, or cut them back to what the last checkpoint has seen and what is whole.

    Returns:
        What is left: lines of log.jsonl, rows (nimg, *STATS) of losses.csv.
    """
    log, rows = read_log(run), read_losses(run)
    whole = {"log.jsonl": len(log), "losses.csv": 1 + len(rows)}  # lines, with the header
    left = [line for line in log if line["nimg"] <= up_to], rows[rows[:, 0] <= up_to]
    texts = {
        "log.jsonl": lambda: "".join(json.dumps(line) + "\n" for line in left[0]),
        "losses.csv": lambda: ",".join(("nimg", *STATS)) + "\n" + losses_text(left[1]),
    }
    for name, count in whole.items():
        path = run / name
        if lost := max(0, len(whole_lines(path)) - count):
            say(f"note: {path}: {lost} lines that cannot be read are left out")
        kept = (len(left[0]), 1 + len(left[1]))[name == "losses.csv"]
        if lost or kept < count or not ends_whole(path):
            write_atomically(path, lambda partial, name=name: partial.write_text(texts[name]()))
    return left


def ends_whole(path: Path) -> bool:
    """Whether a text file is there and its last line is not cut off."""
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


# Diagnosis


class History(NamedTuple):
    """Columns by name: of each epoch (log.jsonl) and of each step (losses.csv); NaN: no value."""

    epochs: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]

    def last(self, name: str, least: int = 1) -> float:
        """Mean of the last three values of a column; NaN, for which no rule holds, if too few."""
        values = self.measured(name)
        return float(values[-3:].mean()) if len(values) >= least else math.nan

    def measured(self, name: str) -> np.ndarray:
        """The values that an epoch column has."""
        values = self.epochs.get(name, np.zeros(0))
        return values[np.isfinite(values)]

    def fids(self) -> np.ndarray:
        """FID of the epochs whose FID counts."""
        none = np.full(len(self.epochs.get("nimg", ())), math.nan)
        fid, z, noise = (self.epochs.get(name, none) for name in ("fid", "vary_z", "vary_noise"))
        return fid[(z > noise) & np.isfinite(fid)]


def history_of(log: list[dict[str, Any]], rows: np.ndarray) -> History:
    """Lines of log.jsonl and rows of losses.csv by column."""
    names = sorted({name for line in log for name in line})
    epochs = {n: np.array([line.get(n) for line in log], dtype=float) for n in names}
    return History(epochs, dict(zip(("nimg", *STATS), rows.T, strict=True)))


def read_history(run: Path) -> History:
    """The logs of a run."""
    return history_of(read_log(run), read_losses(run))


def counted_fid(line: dict[str, Any]) -> float:
    """FID of an epoch where it counts: z moves a pixel further than noise does. Else infinite.

    Before, samples are no slices yet, and an encoder that has seen nothing but slices was found to
    hold them for good ones.
    """
    fids = history_of([line], np.zeros((0, 1 + len(STATS)))).fids()
    return float(fids[0]) if len(fids) else math.inf


class Rule(NamedTuple):
    """Something that can be wrong with a run, and what its settings allow to try."""

    holds: Callable[[History], bool]
    looks: str
    advice: tuple[str | tuple[Callable[[Config], bool], str], ...]

    def advice_for(self, config: Config) -> str:
        """What may be tried with these settings."""
        parts = [(lambda _: True, part) if isinstance(part, str) else part for part in self.advice]
        return "; ".join(text for fits, text in parts if fits(config))


NOISE_LIMIT = 0.2  # of the variety of real slices that noise alone may make
SPECTRUM_LIMIT = 3  # power of the finest grain over that of real slices, or the other way round
LEAK_LIMITS = {"leak_rotation": 1.5, "leak_flip": 0.5, "leak_border": 4.0}
LEAST_SIGNAL = 0.05  # agreement above chance below which classes are taken for noise
SETTLED = 5  # epochs or measurements before which nothing is expected of D or of the samples


def past_its_best(h: History) -> bool:
    """FID is a fifth above its lowest value, which lies three measurements or more back."""
    fid = h.fids()
    return len(fid) > 3 and fid[:-3].min() * 1.2 < fid[-3:].min()


def stays_above(values: np.ndarray, limit: float) -> bool:
    """The last six values are further from 0 than a limit, and no longer on their way to it."""
    off = np.abs(values[-6:])
    return len(off) == 6 and off.min() > limit and off[3:].mean() > 0.9 * off[:3].mean()


def label_effect(h: History) -> float:
    """Agreement above chance, as a share of that of real test slices; NaN where that is low."""
    chance = h.last("agreement_chance")
    real = h.last("agreement_real") - chance
    return (h.last("agreement", SETTLED) - chance) / real if real > LEAST_SIGNAL else math.nan


def with_ada(config: Config) -> bool:
    return config.augment == "ada"


def without_ada(config: Config) -> bool:
    return config.augment != "ada"


def ramps(config: Config) -> bool:
    return config.label_ramp_kimg > 0


RULES = {
    "not finite": Rule(
        lambda h: not np.isfinite(h.steps["g_loss"] + h.steps["d_loss"]).all(),
        "a loss is not a finite number",
        ("start again, or from an earlier checkpoint, with a lower learning_rate",),
    ),
    "numbers grow": Rule(
        lambda h: max(abs(h.last("real_logit")), abs(h.last("fake_logit"))) > 30,
        "the logits of D are above 30: numbers that are not finite may be near",
        ("raise r1_gamma or lower learning_rate",),
    ),
    "learning rate too high": Rule(
        lambda h: h.last("d_loss_spread") > 0.5,
        "the loss of D jumps: its deviation within an epoch is above 0.5",
        ("lower learning_rate, to a half or less",),
    ),
    "D too weak": Rule(
        lambda h: (
            abs(h.last("d_loss", SETTLED) - 2 * math.log(2)) < 0.05
            and h.last("real_sign") < 0.15
            and not h.last("fid") < 2 * h.last("fid_real")  # G may be as good
        ),
        "D cannot tell real from generated slices: its loss stays at 2 ln 2",
        ("lower r1_gamma", (lambda c: with_ada(c) and c.ada_p is None, "lower ada_target")),
    ),
    "D overfits": Rule(
        lambda h: h.last("overfitting", SETTLED) > 0.5,
        "D holds real slices that it was not trained on for generated ones",
        ((without_ada, "augment = ada"), "a higher r1_gamma, or more data"),
    ),
    "past its best": Rule(
        past_its_best,
        "FID has been rising for at least three measurements",
        ("use best.pt", (without_ada, "augment = ada in the next run")),
    ),
    "p at its cap": Rule(
        lambda h: abs(h.last("ada_p") - AdaptiveAugment.P_MAX) < 1e-6,
        "p of adaptive augmentation stays at its cap of 0.8",
        (
            (lambda c: c.ada_p is None, "the data are few: raise r1_gamma or lower channel_max"),
            (lambda c: c.ada_p is not None, "a lower ada_p"),
            "look for leaks",
        ),
    ),
    "augmentation leaks": Rule(
        lambda h: any(stays_above(h.measured(name), limit) for name, limit in LEAK_LIMITS.items()),
        "samples are turned, mirrored, or lit in their background as the real slices are not",
        (
            (lambda c: c.augment == "dataset", "augment = ada in the place of dataset, or"),
            (lambda c: c.augment == "dataset", "lower flip_prob, rotation or brightness"),
            (with_ada, "lower ada_flip, ada_rotation, ada_brightness or ada_noise"),
            (lambda c: c.augment == "none", "nothing is augmented here, so G made it: train on"),
        ),
    ),
    "z ignored": Rule(
        lambda h: h.last("vary_z", SETTLED) < max(0.3, h.last("vary_noise") / 2),
        "samples hardly change with z: one picture per class, varied by noise alone at most",
        (
            "look at the grid; raise r1_gamma or lower learning_rate",
            (lambda c: c.conditional and not ramps(c), "label_ramp_kimg"),
            (lambda c: c.style_mixing_prob > 0.5, "style_mixing_prob = 0.5"),
        ),
    ),
    "texture comes from noise": Rule(
        lambda h: h.last("vary_noise", SETTLED) > NOISE_LIMIT,
        f"the noise inputs alone make more than {NOISE_LIMIT:.0%} of the variety of real slices",
        (
            "train longer",
            (lambda c: c.noise, "noise = False"),
        ),
    ),
    "odd spectrum": Rule(
        lambda h: stays_above(
            np.log(np.maximum(h.measured("spectrum"), 1e-6)), math.log(SPECTRUM_LIMIT)
        ),
        f"samples have more than {SPECTRUM_LIMIT} times the fine grain of real slices (a lattice),"
        f" or less than 1/{SPECTRUM_LIMIT} of it (a blur)",
        (
            (lambda c: c.noise, "for a lattice noise = False"),
            "for a blur train longer",
        ),
    ),
    "labels without signal": Rule(
        lambda h: h.last("agreement_real") - h.last("agreement_chance") < LEAST_SIGNAL,
        "a classifier trained on the training slices cannot tell the classes of test slices",
        ("look whether slices lie in the right class folders; if so, they do not show the class",),
    ),
    "class ignored": Rule(
        lambda h: label_effect(h) < 0.2,
        "samples do not show the class asked for",
        ("train longer", (ramps, "with label_ramp_kimg = 0")),
    ),
    "caricature": Rule(
        lambda h: label_effect(h) > 2,
        "the classes of samples are further apart than those of real slices",
        ("train longer", (lambda c: not ramps(c), "label_ramp_kimg at about half of the run")),
    ),
    "loader too slow": Rule(
        lambda h: h.last("data_wait") > 0.2,
        "more than a fifth of the time goes in waiting for the loader",
        ("raise num_workers", "a cache on a local disk"),
    ),
}


def diagnose(history: History, config: Config) -> dict[str, str]:
    """What looks wrong in a run's logs, and what to try, by the name of the rule."""
    return {
        name: f"{name}: {rule.looks}. Try: {rule.advice_for(config)}"
        for name, rule in RULES.items()
        if rule.holds(history)
    }


# Measuring while training


class TrainingFigures:
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
        self.num_classes = len(train.classes)
        own = config.out / "encoder.safetensors"
        self.encoder, digest = trained_encoder(train, data, config.cache, own)
        if config.fid_extractor == "inception":
            self.extractor = load_inception(None, device)
        else:
            self.extractor = encoder_extractor(self.encoder, digest, data)
        self.missing: set[str] = set()
        self.real = features_of(train.images, self.extractor, config.cache, "training slices")
        unseen = features_of(test.images, self.extractor, config.cache, "test slices")
        self.fid_real = frechet_distance(unseen, self.real)
        self.real = gaussian(self.real), self.real
        self.labels = spread_labels(train.labels, config.fid_images)
        self.samples = {}  # as many slices of each split, for D
        for name, part in splits.items():
            rows = rng.permutation(len(part.labels))  # mixed, as batches are in training
            rows = rows[: config.fid_images]
            self.samples[name] = part_of(part, rows)
        rows = [np.flatnonzero(train.labels == i) for i in range(len(train.classes))]
        rows = [r[spread(len(r), MAX_DEVIATION)] for r in rows]
        self.deviation = float(np.mean([train.images[r].std(0).mean() for r in rows])) or math.nan
        self.pose = pose(self.samples["train"].images)
        self.grain = grain(self.samples["train"].images) or math.nan
        self.seen_real = self.agreement(Fakes(test.images, test.labels))

    @torch.no_grad()
    def agreement(self, slices: Fakes) -> float:
        """Share of the slices of a class for which the encoder names it, the mean over classes."""
        named = class_scores(self.encoder, averaged(slices.images))[:, : self.num_classes].argmax(1)
        present = np.unique(slices.labels)
        return float(np.mean([(named == i)[slices.labels == i].mean() for i in present]))

    @torch.no_grad()
    def logits(self, D: Discriminator, slices: Fakes) -> float:
        """Mean logit of D."""
        device, c_dim = next(D.parameters()).device, 0 if D.embed is None else len(D.embed)
        c, logits = conditions(slices.labels, slices.levels, c_dim), []
        size = self.config.batch_size
        for i in range(0, max(1, len(c) - size + 1), size):
            x = to_tensor(slices.images[i : i + size]).to(device).float() / 127.5 - 1
            logits.append(D(x, c[i : i + size].to(device)))
        return float(torch.cat(logits).mean())

    def measure(self, G: Generator, D: Discriminator) -> dict[str, float | None]:
        """All figures of the averaged generator and the discriminator as they are."""
        fakes = sample_fakes(G, self.labels, self.config.seed, silent=True)
        features = compute_features(fakes.images, self.extractor, None)
        real, test = (self.logits(D, self.samples[name]) for name in ("train", "test"))
        order = np.random.default_rng(0).permutation(len(fakes.labels))
        fake = self.logits(D, part_of(fakes, order))
        moved = conditional_variation(G, self.config.seed)
        figures = {
            "fid": gaussian_distance(gaussian(features), self.real[0]),
            "fid_real": self.fid_real,
            "kid": kernel_distance(features, self.real[1], subsets=10)[0],
            **leaks(self.pose, pose(fakes.images)),
            "spectrum": grain(fakes.images) / self.grain,
            **{f"vary_{name}": value / self.deviation for name, value in moved.items()},
            "overfitting": (real - test) / (real - fake) if real - fake > 0.1 else None,
        }
        if self.num_classes > 1:
            figures |= {"agreement": self.agreement(fakes), "agreement_real": self.seen_real}
            figures["agreement_chance"] = 1 / self.num_classes
        found = {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}
        missing = {k for k, v in found.items() if v is None and figures[k] is not None}
        if new := sorted(missing - self.missing):
            say(f"note: too few slices, or too much alike, to measure {', '.join(new)}")
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
        self.figures: TrainingFigures | None = None
        self.pending: list[tuple[int, Tensor]] = []  # (cur_nimg, statistics) not yet written
        self.not_finite: tuple[str, int] | None = None
        rng = torch.Generator().manual_seed(stream_seed("grid", config.seed))
        z = torch.randn(1, GRID_COLUMNS, config.z_dim, generator=rng)
        num_rows = len(slices.classes)  # every class shows the same latents, from low to high
        self.z = z.expand(num_rows, -1, -1).flatten(0, 1).to(device)
        levels = np.tile(np.linspace(0, 1, GRID_COLUMNS), num_rows)
        labels = np.arange(num_rows).repeat(GRID_COLUMNS)
        levels = None if slices.levels is None else levels
        self.c = conditions(labels, levels, slices.c_dim).to(device)
        if rank() == 0:
            self.lines, rows = cut_logs(self.run, cur_nimg)
            self.board = SummaryWriter(self.run / "tensorboard", purge_step=cur_nimg + 1)
            self.logged = self.lines[-1]["nimg"] if self.lines else 0
            rows[:, 1:] = rows[:, 1:].astype(np.float32)  # the very values that were written
            self.epoch_rows = list(rows[rows[:, 0] > self.logged])  # of the epoch under way
            self.warned: set[str] = set()
        self.upkeep, self.began = 0.0, time.perf_counter()
        self.start_clock()

    def start_clock(self) -> None:
        """What follows is training, until `summary`; `waited` is what of it goes in waiting."""
        self.started, self.started_nimg, self.waited = time.perf_counter(), self.cur_nimg, 0.0

    def add(self, cur_nimg: int, stats: Tensor) -> None:
        """The statistics [len(STATS)] of one step, to be written some steps later."""
        self.cur_nimg = cur_nimg
        self.pending.append((cur_nimg, stats))

    def flush(self) -> dict[str, float]:
        """Write the waiting rows of losses.csv, which waits for the device. -> the newest."""
        nimg, stats = zip(*self.pending, strict=True)
        values = torch.stack(stats).cpu().double().numpy()
        self.pending = []
        rows = np.column_stack([nimg, values])
        self.epoch_rows.extend(rows)
        append_losses(self.run, rows)
        for n, row in zip(nimg, values, strict=True):
            due = due_statistics(self.config, n - self.config.batch_size)
            for name, value in zip(STATS, row, strict=True):
                if math.isinf(value) or (math.isnan(value) and due.get(name, True)):
                    self.not_finite = self.not_finite or (name, n)
        return dict(zip(STATS, values[-1], strict=True))

    def missed_epoch(self) -> int:
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
        columns = dict(zip(STATS, np.array(self.epoch_rows).T[1:], strict=True))
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
        history = history_of(self.lines, np.array(self.epoch_rows))
        self.epoch_rows = []
        for name, text in diagnose(history, self.config).items():
            if name not in self.warned:
                self.warned.add(name)
                say(f"warning: {text}")

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

    def end_upkeep(self, started: float) -> None:
        """All that was due at an epoch's end is done, since `started`."""
        self.logged = self.cur_nimg
        self.upkeep += time.perf_counter() - started
        self.start_clock()

    def upkeep_share(self, started: float) -> float:
        """Share of this process's time in the loop that went in measuring, saving and drawing."""
        now = time.perf_counter()
        return round((self.upkeep + now - started) / (now - self.began), 4)

    def close(self) -> None:
        """Draw the plots of the run so far."""
        if rank() == 0:
            self.board.close()
            plot_losses(self.run, self.run / "losses.png")
            plot_curves(self.run, self.run / "curves.png", self.config)
            plot_progress(self.run, self.run / "progress.png")


# Plots


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Exponential moving average with a half-life in steps, without the bias of its start."""
    decay = 0.5 ** (1 / half_life)
    weights = 1 - decay ** np.arange(1, len(values) + 1)
    return lfilter([1 - decay], [1, -decay], values) / weights


def steps_drawn(count: int) -> slice:
    """Those of so many steps that a plot shows: all, or some thousands."""
    return slice(None, None, max(1, count // MAX_DRAWN))


def draw_loss(ax: Axes, run: Path, name: str, color: str = "C0") -> None:
    """One loss of a run on an axis: each step, smoothed, and the mean of each epoch."""
    epochs, steps = read_history(run)
    kimg, values, thin = steps["nimg"] / 1000, steps[name], steps_drawn(len(steps[name]))
    ax.plot(kimg[thin], values[thin], lw=0.5, alpha=0.3, color=color)
    ax.plot(kimg[thin], smooth(values, 50)[thin], color=color, label=f"{name}, smoothed")
    if name in epochs:
        ax.plot(epochs["nimg"] / 1000, epochs[name], "o", ms=3, color=color)
    ax.set(xlabel="thousands of real images seen", ylabel="loss")
    ax.grid(alpha=0.3)


def plot_losses(run: Path, path: Path) -> None:
    """Loss curves of D and G of one run."""
    figure = Figure(figsize=(11, 3.6))
    titles = {"d_loss": "Discriminator", "g_loss": "Generator"}
    for ax, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        draw_loss(ax, run, name)
        ax.set_title(f"{title} loss")
    caption = "thin: each step; thick: smoothed; dots: mean of an epoch"
    figure.text(0.5, -0.07, caption, ha="center", fontsize=9)
    save_figure(figure, path)


# Panels of curves.png: title, columns with their names, the healthy range, what to see
PANELS = (
    ("Losses", {"d_loss": "D", "g_loss": "G"}, (0.5, 2.0),
     "level, neither towards 0"),
    ("Logits of D", {"real_logit": "real", "fake_logit": "generated"}, (-5, 5),
     "real above generated, both bounded"),
    ("Sign of the logits", {"real_sign": "real", "fake_sign": "generated"}, (-0.8, 0.8),
     "ada keeps real near its target"),
    ("R1", {"r1": "|gradient of D|²"}, None,
     "bounded"),
    ("Path length", {"path_length": "of a batch", "pl_mean": "running mean"}, None,
     "comes to rest"),
    ("Gradient norms", {"g_main_grad": "G", "d_main_grad": "D"}, None,
     "no growth by powers of ten"),
    ("p of augmentation", {"ada_p": "p"}, (0, AdaptiveAugment.P_MAX),
     "below its cap; only with ada"),
    ("FID", {"fid": "samples", "fid_real": "test slices"}, None,
     "falls towards that of unseen slices"),
    ("Overfitting of D", {"overfitting": "(train - test) / (train - generated)"}, (-0.1, 0.5),
     "0: none, 1: unseen slices pass for generated"),
    ("What moves a pixel", {"vary_z": "z", "vary_noise": "noise", "vary_class": "class"},
     (0.3, 1.2), "share of the variety of real slices; z well above noise"),
    ("Class seen by an encoder", {"agreement": "samples", "agreement_real": "real test slices"},
     None, "samples near or above real slices"),
    ("Leaks", {"leak_rotation": "spread of tilt, ratio", "leak_flip": "sides, deviations",
               "leak_border": "border, grey levels"}, (-1, 2), "1, 0 and 0 without a leak"),
    ("Spectrum", {"spectrum": "finest grain, ratio"}, (1 / SPECTRUM_LIMIT, SPECTRUM_LIMIT),
     "above: a lattice, below: a blur"),
    ("Speed", {"img_per_s": "images per second"}, None, "level"),
)  # fmt: skip


def plot_curves(run: Path, path: Path, config: Config) -> None:
    """Everything a run measures of itself, healthy ranges shaded, each with a caption in words."""
    history = read_history(run)
    shown = [p for p in PANELS if any(len(history.measured(name)) for name in p[1])]
    if not shown:
        return
    columns = 4
    figure = Figure(figsize=(4.2 * columns, 3.1 * math.ceil(len(shown) / columns)))
    axes = list(figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flat)
    for ax in axes[len(shown) :]:
        ax.axis("off")
    for ax, (title, names, healthy, caption) in zip(axes, shown, strict=False):
        for i, (name, label) in enumerate(names.items()):
            if len(history.measured(name)):
                draw_column(ax, history, name, label, f"C{i}")
        if healthy is not None:
            ax.axhspan(*healthy, color="C2", alpha=0.08, lw=0)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(caption, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7, frameon=False)
        ax.grid(alpha=0.3)
    found = diagnose(history, config).values()
    text = "Against thousands of real images seen. Green: healthy range. Thin: steps, smoothed.\n"
    figure.suptitle(text + ("\n".join(found) or "No rule finds anything wrong."), fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def draw_column(ax: Axes, history: History, name: str, label: str, color: str) -> None:
    """One column: its epochs as dots joined by a line, its steps, smoothed, behind them."""
    for columns in history:
        if name in columns:
            there = np.isfinite(columns[name])
            kimg, values = columns["nimg"][there] / 1000, columns[name][there]
            if columns is history.steps:
                thin = steps_drawn(len(values))
                ax.plot(kimg[thin], smooth(values, 20)[thin], lw=0.5, alpha=0.5, color=color)
            else:
                ax.plot(kimg, values, ".-", ms=4, color=color, label=label)


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
