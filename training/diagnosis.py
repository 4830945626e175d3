"""Rules that find problems of a run in its logs, and plots of its curves."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import Config
from evaluation.verdict import MIN_PARTICIPANTS, nearness
from modules import AdaptiveAugment
from training.logs import LEAD, History
from utils import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_RANGE = ("vary_noise", "vary_class")  # the range of their panel is that of z
MAX_DRAWN = 5000  # about so many steps in a plot, at most twice as many


class Rule(NamedTuple):
    """A problem that the logs of a run can show, and what to try against it."""

    holds: Callable[[History], bool]
    problem: str
    advice: tuple[str | tuple[Callable[[Config], bool], str], ...]  # some only for some settings
    passes: bool = False  # more training may cure it: a run speaks of it only at its end

    def advice_for(self, config: Config) -> str:
        """The advice that fits these settings."""
        parts = [(lambda _: True, part) if isinstance(part, str) else part for part in self.advice]
        return "; ".join(text for fits, text in parts if fits(config))


NOISE_LIMIT = 0.2  # largest effect of noise alone, as a share of the variety of real slices
SPECTRUM_LIMIT = 3  # largest ratio of the finest details in samples and real slices, either way
LEAK_LIMITS = {"leak_rotation": 1.5, "leak_flip": 0.5, "leak_border": 4.0}
LEAST_SIGNAL = 0.05  # agreement above chance that real slices must reach to show their class
MIN_MEASUREMENTS = 5  # values that a column must have before a rule on D or the samples may hold


def past_its_best(h: History) -> bool:
    """The last three FIDs are more than a fifth above the lowest one before them."""
    fid = h.fids()
    return len(fid) > 3 and fid[:-3].min() * 1.2 < fid[-3:].min()


def stays_above(values: np.ndarray, limit: float) -> bool:
    """The last six values are further from 0 than a limit, and no longer approach it."""
    off = np.abs(values[-6:])
    return len(off) == 6 and off.min() > limit and off[3:].mean() > 0.9 * off[:3].mean()


def few_people(h: History) -> bool:
    """The test set has too few people for a verdict."""
    return bool(h.recent("test_participants") < MIN_PARTICIPANTS)


def label_effect(h: History) -> float:
    """Agreement above chance over that of real test slices; NaN if real slices have too little."""
    chance = h.recent("agreement_chance")
    real = h.recent("agreement_real") - chance
    if real <= LEAST_SIGNAL:
        return math.nan
    return (h.recent("agreement", MIN_MEASUREMENTS) - chance) / real


def augments(*ways: str) -> Callable[[Config], bool]:
    """A test of settings: `augment` is one of these."""
    return lambda config: config.augment in ways


def without_ramp(config: Config) -> bool:
    return config.label_ramp_kimg == 0


RULES = {
    "not finite": Rule(
        lambda h: not np.isfinite(h.steps["g_loss"] + h.steps["d_loss"]).all(),
        "a loss is infinite or not a number",
        ("start a new run with a lower learning_rate; init_from can give it this run's weights",),
    ),
    "numbers grow": Rule(
        lambda h: max(abs(h.recent("real_logit")), abs(h.recent("fake_logit"))) > 30,
        "the logits of D are larger than 30, and may soon be infinite",
        ("raise r1_gamma or lower learning_rate",),
    ),
    "learning rate too high": Rule(
        lambda h: h.recent("d_loss_spread") > 0.5,
        "the loss of D jumps: its standard deviation within an epoch is above 0.5",
        ("lower learning_rate to a half or less",),
    ),
    "D too weak": Rule(
        lambda h: (
            abs(h.recent("d_loss", MIN_MEASUREMENTS) - 2 * math.log(2)) < 0.05
            and h.recent("real_sign") < 0.15
            and not h.recent("fid") < 2 * h.recent("fid_real")  # G may be as good
        ),
        "D cannot tell real slices from generated ones: its loss stays at 2 ln 2, that of a guess",
        ("lower r1_gamma", (lambda c: c.augment == "ada" and c.ada_p is None, "lower ada_target")),
    ),
    "D overfits": Rule(
        lambda h: h.recent("overfitting", MIN_MEASUREMENTS) > 0.5,
        "D takes real slices that it was not trained on for generated ones",
        ((augments("dataset", "none"), "set augment = ada"), "raise r1_gamma or add training data"),
    ),
    "past its best": Rule(
        past_its_best,
        "FID is getting worse: the last three values are more than 20 % above the lowest one",
        ("use best.pt", (augments("dataset", "none"), "set augment = ada in the next run")),
        passes=True,  # in the cooldown
    ),
    "p at its cap": Rule(
        lambda h: h.recent("ada_p") > AdaptiveAugment.P_MAX - 1e-6,
        f"the probability p of adaptive augmentation stays at {AdaptiveAugment.P_MAX} or above",
        (
            (lambda c: c.ada_p is None, "the data are few: raise r1_gamma or lower channel_max"),
            (lambda c: c.ada_p is not None, "lower ada_p"),
            "look whether samples are rotated or mirrored",
        ),
    ),
    "augmentation leaks": Rule(
        lambda h: any(stays_above(h.measured(name), limit) for name, limit in LEAK_LIMITS.items()),
        "unlike the real slices, samples are rotated, mirrored, or have a bright background",
        (
            (augments("dataset"), "set augment = ada, or lower flip_prob, rotation or brightness"),
            (augments("ada"), "lower ada_flip, ada_rotation, ada_brightness or ada_noise"),
            (augments("none"), "train longer: nothing was augmented, so G itself is the cause"),
        ),
    ),
    "z ignored": Rule(
        lambda h: h.recent("vary_z", MIN_MEASUREMENTS) < max(0.3, h.recent("vary_noise") / 2),
        "samples hardly change with z: those of a class look alike, apart from their noise",
        (
            "look at the grid; raise r1_gamma or lower learning_rate",
            (lambda c: c.conditional and without_ramp(c), "set label_ramp_kimg to half of the run"),
            (lambda c: c.style_mixing_prob > 0.5, "set style_mixing_prob = 0.5"),
        ),
    ),
    "texture comes from noise": Rule(
        lambda h: stays_above(h.measured("vary_noise"), NOISE_LIMIT),
        f"noise alone makes more than {NOISE_LIMIT:.0%} of the variety of real slices, and its "
        "share no longer falls",
        ("train longer", (lambda c: c.noise, "set noise = False")),
        passes=True,
    ),
    "odd spectrum": Rule(
        lambda h: stays_above(
            np.log(np.maximum(h.measured("spectrum"), 1e-6)), math.log(SPECTRUM_LIMIT)
        ),
        f"the finest details of samples are over {SPECTRUM_LIMIT} times as strong as those of real "
        f"slices (a lattice), or less than 1/{SPECTRUM_LIMIT} as strong (a blur)",
        ((lambda c: c.noise, "against a lattice set noise = False"), "against a blur train longer"),
    ),
    "few samples look real": Rule(
        lambda h: h.recent("precision", MIN_MEASUREMENTS) < 0.1,
        "fewer than one sample in ten lies among the real slices (precision)",
        (
            "train longer",
            "start from weights that draw heads, such as the demo generator's (init_from)",
        ),
        passes=True,
    ),
    "too little variety": Rule(
        lambda h: h.recent("spread", MIN_MEASUREMENTS) < 0.5,
        "samples vary less than half as much as real slices, in the ways in which those vary most",
        ("train longer, with a lower learning_rate at the end", "raise r1_gamma"),
        passes=True,
    ),
    "only blurred": Rule(
        lambda h: (
            h.recent("recall", MIN_MEASUREMENTS) < 0.1 * h.recent("recall_real")
            and h.recent("recall_blurred") > 0.25 * h.recent("recall_blurred_real")
        ),
        "samples have the shapes of real slices, but not their fine detail: after a blur of all "
        "images recall is high",
        ("train longer, with a lower learning_rate at the end", "lower r1_gamma"),
        passes=True,
    ),
    "few shapes": Rule(
        lambda h: any(h.recent(f"shapes_{r}", MIN_MEASUREMENTS) < 0.4 for r in ("1_1", "2_6")),
        "along the main components of real pixels, samples have less than 0.4 of the real spread",
        ("train longer", "start from weights that have learned many heads (init_from)"),
        passes=True,
    ),
    "labels without signal": Rule(
        lambda h: (
            h.recent("agreement_real") - h.recent("agreement_chance") < LEAST_SIGNAL
            and not few_people(h)
        ),
        "a classifier trained on the training slices cannot tell the classes of test slices",
        ("check the class folders; if their slices are right, slices do not show the class",),
    ),
    "class ignored": Rule(
        lambda h: label_effect(h) < 0.2 and not few_people(h),
        "samples do not show the class that was asked for",
        ("train longer", (lambda c: not without_ramp(c), "set label_ramp_kimg = 0")),
        passes=True,
    ),
    "caricature": Rule(
        lambda h: label_effect(h) > 2 and not few_people(h),
        "the classes of samples differ more than those of real slices",
        ("train longer", (without_ramp, "set label_ramp_kimg to half of the run")),
        passes=True,
    ),
    "loader too slow": Rule(
        lambda h: h.recent("data_wait") > 0.2,
        "training waits for the loader during more than 20 % of its time",
        ("raise num_workers", "put the cache on a local disk"),
    ),
}


def diagnose(history: History, config: Config) -> dict[str, str]:
    """What is wrong according to a run's logs, and what to try, by the name of the rule."""
    return {
        name: f"{name}: {rule.problem}. Try: {rule.advice_for(config)}"
        for name, rule in RULES.items()
        if rule.holds(history)
    }


def verdict(history: History) -> str:
    """How far samples are from unseen slices by their newest FID, in one sentence."""
    people = history.recent("test_participants")
    if few_people(history):
        return f"The test set has {people:.0f} people; a verdict needs {MIN_PARTICIPANTS}."
    fid, reference = (history.recent(name, last=1) for name in ("fid_test", "fid_memory"))
    if not math.isfinite(fid + reference) or reference <= 0:
        if math.isfinite(history.recent("fid", last=1)):
            return "An earlier version measured this run: a verdict follows the next measurement."
        return "The distance to real slices is not measured yet."
    if history.recent("vary_z", last=1) <= LEAD * history.recent("vary_noise", last=1):
        return f"Too early for a verdict: z must move pixels {LEAD} times as far as noise does."
    ratio = fid / reference
    more = ": look for copies of training slices with evaluate.py" if ratio < 1.2 else ""
    of = "" if math.isnan(people) else f" of {people:.0f} people"
    text = f"their FID to unseen slices{of} is {ratio:.1f} times that of training slices"
    return f"Samples are {nearness(ratio)} real slices: {text}{more}."


def out_of_range(history: History) -> list[str]:
    """The newest values that lie outside of the healthy range of their panel of curves.png."""
    found = []
    for title, names, healthy, _ in PANELS:
        for name, label in names.items() if healthy else ():
            value = math.nan if name in NO_RANGE else history.recent(name, last=1)
            if math.isfinite(value) and not healthy[0] <= value <= healthy[1]:
                low, high = (f"{limit:.2g}" for limit in healthy)
                found.append(f"{title}, {label}: {value:.3g} (healthy: {low} to {high})")
    return found


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Exponential moving average with a half-life in steps, corrected for its start from 0."""
    from scipy.signal import lfilter  # slow to import

    decay = 0.5 ** (1 / half_life)
    weights = 1 - decay ** np.arange(1, len(values) + 1)
    return lfilter([1 - decay], [1, -decay], values) / weights


def steps_drawn(count: int) -> slice:
    """The steps that a plot shows, out of `count`: all of them, or every n-th."""
    return slice(None, None, max(1, count // MAX_DRAWN))


def draw_loss(ax: "Axes", history: History, name: str, color: str = "C0") -> None:
    """Draw one loss of a run: each step, a smoothed curve, and the mean of each epoch."""
    epochs, steps = history
    kimg, values, thin = steps["nimg"] / 1000, steps[name], steps_drawn(len(steps[name]))
    ax.plot(kimg[thin], values[thin], lw=0.5, alpha=0.3, color=color)
    ax.plot(kimg[thin], smooth(values, 50)[thin], color=color, label=f"{name}, smoothed")
    if name in epochs:
        ax.plot(epochs["nimg"] / 1000, epochs[name], "o", ms=3, color=color)
    ax.set(xlabel="thousands of real images seen", ylabel="loss")
    ax.grid(alpha=0.3)


def plot_losses(history: History, path: Path) -> None:
    """Loss curves of D and G of one run."""
    figure = new_figure(figsize=(11, 3.6))
    titles = {"d_loss": "Discriminator", "g_loss": "Generator"}
    for ax, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        draw_loss(ax, history, name)
        ax.set_title(f"{title} loss")
    caption = "thin: each step; thick: smoothed; dots: mean of an epoch"
    figure.text(0.5, -0.07, caption, ha="center", fontsize=9)
    save_figure(figure, path)


# Panels of curves.png: title, columns and their names, healthy range, caption
PANELS = (
    ("Losses", {"d_loss": "D", "g_loss": "G"}, (0.5, 2.0), "healthy: steady, and neither near 0"),
    ("Logits of D", {"real_logit": "real", "fake_logit": "generated"}, (-5, 5),
     "healthy: real above generated, neither grows"),
    ("Sign of the logits", {"real_sign": "real", "fake_sign": "generated"}, (-0.8, 0.8),
     "ada keeps the real one near its target"),
    ("R1 and R2", {"r1": "|gradient of D|², real", "r2": "|gradient of D|², generated"}, None,
     "healthy: do not grow"),
    ("Path length", {"path_length": "of a batch", "pl_mean": "running mean"}, None,
     "healthy: becomes steady"),
    ("Gradient norms", {"g_main_grad": "G", "d_main_grad": "D"}, None,
     "healthy: does not grow tenfold"),
    ("p of augmentation", {"ada_p": "p"}, (0, AdaptiveAugment.P_MAX),
     "healthy: below the limit; only with ada"),
    ("FID", {"fid": "samples", "fid_real": "test slices"}, None,
     "healthy: samples fall towards test slices"),
    ("KID", {"kid": "samples"}, None, "healthy: falls towards 0, may lie below"),
    ("Precision", {"precision": "precision"}, None, "samples among real slices"),
    ("Recall", {"recall": "samples", "recall_real": "test slices",
                "recall_blurred": "samples, all blurred",
                "recall_blurred_real": "test slices, all blurred"}, None,
     "healthy: rises; only the plain one low: a blur"),
    ("Coverage", {"coverage": "samples", "coverage_real": "test slices"}, None,
     "real slices with a sample near by; healthy: rises"),
    ("Variety", {"spread": "spread of samples, ratio"}, (0.6, 1.4),
     "1: as far apart as real slices"),
    ("Variety of pixels", {"shapes_1_1": "component 1", "shapes_2_6": "2 to 6, median",
                           "shapes_7_20": "7 to 20, median"}, (0.6, 1.4),
     "deviation over that of real slices; below: few shapes"),
    ("Overfitting of D", {"overfitting": "(train - test) / (train - generated)"}, (-0.1, 0.5),
     "1: D takes all test slices for generated ones"),
    ("What moves a pixel", {"vary_z": "z", "vary_noise": "noise", "vary_class": "class"},
     (0.3, 1.2), "share of the variety of real slices; z should lead"),
    ("Class seen by an encoder", {"agreement": "samples", "agreement_real": "real test slices"},
     None, "healthy: samples near or above real slices"),
    ("Leak of rotation", {"leak_rotation": "spread of tilt, ratio"},
     (1 / LEAK_LIMITS["leak_rotation"], LEAK_LIMITS["leak_rotation"]), "1 without a leak"),
    ("Leak of flips", {"leak_flip": "sides, deviations"},
     (-LEAK_LIMITS["leak_flip"], LEAK_LIMITS["leak_flip"]), "0 without a leak"),
    ("Leak at the border", {"leak_border": "border, grey levels"},
     (-LEAK_LIMITS["leak_border"], LEAK_LIMITS["leak_border"]), "0 without a leak"),
    ("Spectrum", {"spectrum": "finest details, ratio"}, (1 / SPECTRUM_LIMIT, SPECTRUM_LIMIT),
     "above: a lattice; below: a blur"),
    ("Speed", {"img_per_s": "images per second"}, None, "healthy: steady"),
)  # fmt: skip


def plot_curves(history: History, path: Path, config: Config) -> None:
    """Draw the PANELS whose columns have values, with healthy ranges shaded green."""
    panels = [p for p in PANELS if any(len(history.measured(name)) for name in p[1])]
    if not panels:
        return
    columns, rows = 4, math.ceil(len(panels) / 4)
    figure = new_figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    for ax, (title, names, healthy, caption) in zip(axes, panels, strict=False):
        for i, (name, label) in enumerate(names.items()):
            if len(history.measured(name)):
                draw_column(ax, history, name, label, f"C{i}")
        if healthy is not None:
            ax.axhspan(*healthy, color="C2", alpha=0.08, lw=0)
        ax.set_title(caption, fontsize=8)
        ax.set_ylabel(title, fontsize=10)
        ax.set_xlabel("thousands of real images seen", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7, frameon=False)
        ax.grid(alpha=0.3)
    found = "\n".join([verdict(history), *diagnose(history, config).values()])
    text = "Green: healthy range. Thin: steps, smoothed."
    figure.suptitle(f"{text}\n{found}", fontsize=9)
    save_figure(figure, path)


def draw_column(ax: "Axes", history: History, name: str, label: str, color: str) -> None:
    """Draw a column: epochs as dots joined by a line, steps as a thin smoothed curve."""
    for columns in history:
        if name in columns:
            finite = np.isfinite(columns[name])
            kimg, values = columns["nimg"][finite] / 1000, columns[name][finite]
            if columns is history.steps:
                thin = steps_drawn(len(values))
                ax.plot(kimg[thin], smooth(values, 20)[thin], lw=0.5, alpha=0.5, color=color)
            else:
                ax.plot(kimg, values, ".-", ms=4, color=color, label=label)
