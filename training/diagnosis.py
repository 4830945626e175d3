"""What can be wrong with a run: rules that read its logs, and plots of its curves."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from config import Config
from modules import AdaptiveAugment
from training.logs import History, read_history
from utils import save_figure

MAX_DRAWN = 5000  # steps in a plot


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
MIN_MEASUREMENTS = (
    5  # epochs or measurements before which nothing is expected of D or of the samples
)


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
    return (
        (h.last("agreement", MIN_MEASUREMENTS) - chance) / real if real > LEAST_SIGNAL else math.nan
    )


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
            abs(h.last("d_loss", MIN_MEASUREMENTS) - 2 * math.log(2)) < 0.05
            and h.last("real_sign") < 0.15
            and not h.last("fid") < 2 * h.last("fid_real")  # G may be as good
        ),
        "D cannot tell real from generated slices: its loss stays at 2 ln 2",
        ("lower r1_gamma", (lambda c: with_ada(c) and c.ada_p is None, "lower ada_target")),
    ),
    "D overfits": Rule(
        lambda h: h.last("overfitting", MIN_MEASUREMENTS) > 0.5,
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
        lambda h: h.last("vary_z", MIN_MEASUREMENTS) < max(0.3, h.last("vary_noise") / 2),
        "samples hardly change with z: one picture per class, varied by noise alone at most",
        (
            "look at the grid; raise r1_gamma or lower learning_rate",
            (lambda c: c.conditional and not ramps(c), "label_ramp_kimg"),
            (lambda c: c.style_mixing_prob > 0.5, "style_mixing_prob = 0.5"),
        ),
    ),
    "texture comes from noise": Rule(
        lambda h: h.last("vary_noise", MIN_MEASUREMENTS) > NOISE_LIMIT,
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


# Plots


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Exponential moving average with a half-life in steps, without the bias of its start."""
    from scipy.signal import lfilter  # slow to import

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
    printable = [p for p in PANELS if any(len(history.measured(name)) for name in p[1])]
    if not printable:
        return
    columns = 4
    figure = Figure(figsize=(4.2 * columns, 3.1 * math.ceil(len(printable) / columns)))
    axes = list(figure.subplots(math.ceil(len(printable) / columns), columns, squeeze=False).flat)
    for ax in axes[len(printable) :]:
        ax.axis("off")
    for ax, (title, names, healthy, caption) in zip(axes, printable, strict=False):
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
