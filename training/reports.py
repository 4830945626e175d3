"""What a run says of itself: its diagnosis, its end, and a model card for those who get it."""

from dataclasses import asdict
from pathlib import Path

from config import Config
from dataset import Slices
from training.diagnosis import MIN_MEASUREMENTS, diagnose, out_of_range, plot_curves, verdict
from training.logs import read_history
from training.runs import PATHS, read_run_config, run_folder, training_data
from utils import print_once, write_atomically

OWN = "<!-- train.py replaces this file as long as this line is here -->"
FIGURES = {  # columns of log.jsonl that the card shows
    "fid": "FID to the training slices", "fid_real": "FID of the test slices",
    "precision": "precision", "recall": "recall", "coverage": "coverage",
    "agreement": "samples whose class a classifier sees", "agreement_real": "the same, test slices",
}  # fmt: skip
EXTRACTORS = {
    "encoder": "an encoder trained on the same slices", "inception": "Inception-v3",
    "dinov2": "DINOv2 tuned on brain MRI",
}  # fmt: skip


def write_card(config: Config, slices: Slices) -> None:
    """Write README.md into the run folder, unless the user has taken its first line away."""
    path, history = config.out / "README.md", read_history(config.out)
    if path.exists() and not path.read_text("utf-8", "replace").startswith(OWN):
        return
    source = "" if config.data_root is None else " FILL IN: their source."
    default = asdict(Config())
    changed = {k: v for k, v in asdict(config).items() if v != default[k] and k not in PATHS}
    settings = ", ".join(f"{k} = {v}" for k, v in changed.items()) or "the defaults for a GPU"
    rows = [
        f"| {words} | {history.recent(name):.3g} |"
        for name, words in FIGURES.items()
        if len(history.measured(name))
    ]
    extractor = EXTRACTORS[config.fid_extractor]
    size = f"{config.img_resolution} x {config.img_resolution}"
    people = len(set(slices.participants))
    nimg = int(history.epochs["nimg"][-1]) if len(history.epochs.get("nimg", ())) else 0
    position = "np.array([0.5])" if config.condition_position else "None"
    text = f"""{OWN}
# StyleGAN2 for brain MRI slices: {", ".join(slices.classes)}

A generator of grey slices of {size} pixels, trained on {len(slices.labels):,} slices of {people}
participants for {nimg:,} images. Data: {training_data(config)}.{source}
Licence of the data and of this model: FILL IN.

## Use

`generator.safetensors` and `config.json` are all that is needed. In a clone of the package:

```python
import numpy as np, torch
from pathlib import Path
from training.runs import load_generator
from utils import conditions
G, config, classes = load_generator(Path("FOLDER OF THIS FILE"))
c = conditions(np.array([0]), {position}, G.c_dim)  # the first of the classes
image = G(torch.randn(1, G.z_dim), c)  # [1, 1, height, width], from -1 to 1
```

or `python predict.py --checkpoint FOLDER`.

## Figures of the run itself

{verdict(history)} Features: {extractor}. `evaluate.py` measures more, by participant.

| measure | mean of the last three |
|---|---|
{chr(10).join(rows) or "| not measured | |"}

## Limits

Samples are not patients, and no diagnosis may rest on them. They have the bias of the training
slices. Copies of training slices are possible: read the report of `evaluate.py` before you share
samples.

Settings that differ from the defaults for a GPU: {settings}.
"""
    write_atomically(path, lambda partial: partial.write_text(text, "utf-8", "backslashreplace"))


def end_run(config: Config, slices: Slices) -> None:
    """Write the card, and print how good the samples are and what one can do next."""
    write_card(config, slices)
    run = config.out
    print_once(verdict(read_history(run)))
    print_once(f"problems and curves: python train.py --diagnose {run}")
    print_once(f"figures: python predict.py --checkpoint {run}")
    print_once(f"report: python evaluate.py {run}")


def print_diagnosis(run: Path) -> None:
    """Print what looks wrong in a run, and draw its curves. Raises UserError if it is no run."""
    run = run_folder(run)
    config, _, _ = read_run_config(run)
    history = read_history(run)
    found = list(diagnose(history, config).values()) or ["No rule finds a problem."]
    if (count := len(history.measured("fid"))) < MIN_MEASUREMENTS:
        found.append(f"Most rules need {MIN_MEASUREMENTS} measurements, and there are {count}.")
    print_once("\n".join([verdict(history), *found, *out_of_range(history)]))
    plot_curves(history, run / "curves.png", config)
