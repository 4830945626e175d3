"""A synthetic data set: class folders, manifest.csv and a data card; or the generator as ONNX."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import utils
from config import Range, Share, UserError
from evaluation import features, metrics
from evaluation.samples import images_of
from exploration import model as models
from exploration.model import CHUNK, Model
from participants.tables import MANIFEST
from training import runs

JOURNAL = "journal.csv"  # what has been drawn so far; a killed export goes on after its last line
COLUMNS = ("seed", "class", "position", "gap", "kept")
SETTINGS = "export.json"
THRESHOLD = 1  # percentile of the gaps of test slices, below which a sample counts as a copy


@dataclass(frozen=True)
class Options(models.Options):
    """Options of `explore.py export`."""

    count: Annotated[int, Range(1)] = 1000
    """Number of images in all; the classes take turns. 1 or more."""
    truncation_psi: Share = 1.0
    """1: full variety; closer to 0: more like the mean image of the class. 0 to 1."""
    reject_copies: bool = False
    """Leave out samples nearer to a training slice than 99 % of the real test slices are."""
    onnx: Path | None = None
    """Write the generator as this ONNX file in place of images."""


class Copies:
    """Finds samples that lie too near to a training slice, in any pose."""

    def __init__(self, model: Model, options: Options) -> None:
        places = options.data_root, options.table
        real = runs.real_slices(model.config, model.classes, *places, "no copies can be found")
        if real is None:
            raise UserError("reject_copies: the training slices are not here; set --data-root")
        train, test = (metrics.normalise_pose(real[0][k].images) for k in ("train", "test"))
        known = np.concatenate([train, train[:, :, ::-1]])  # mirrored too
        self.known = features.compute_features(known, features.PIXELS, None)
        test_features = features.compute_features(test, features.PIXELS, None)
        gaps, _ = metrics.nearest_neighbour(test_features, self.known)
        self.threshold = float(np.percentile(gaps, THRESHOLD))

    def gaps(self, images: np.ndarray) -> np.ndarray:
        """Distance of images [n, R, R] to the nearest training slice. -> [n]."""
        points = features.compute_features(metrics.normalise_pose(images), features.PIXELS, None)
        return metrics.nearest_neighbour(points, self.known)[0]


def settings_of(model: Model, options: Options, copies: Copies | None) -> dict[str, Any]:
    """What decides the images; an export goes on only with the same."""
    is_folder = model.source.is_dir()
    weights = model.source / "generator.safetensors" if is_folder else model.source
    return {
        "generator_sha256": utils.sha256_of(weights),
        "classes": model.classes,
        "psi": options.truncation_psi,
        "position": options.position,
        "threshold": copies and copies.threshold,
    }


def open_export(out: Path, settings: dict[str, Any]) -> list[dict[str, str]]:
    """The whole lines of the journal of an export that was stopped. Raises UserError."""
    path, journal = out / SETTINGS, out / JOURNAL
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise UserError(f"{out} holds an export of another generator or other options")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty")
    utils.delete_partials(out)
    if not journal.exists():
        return []
    text = journal.read_text()
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    if whole != text:
        utils.write_atomically(journal, lambda partial: partial.write_text(whole))
    rows = list(csv.DictReader(whole.splitlines()))
    if rows and tuple(rows[0]) != COLUMNS:
        raise UserError(f"{journal} cannot be read: delete {out} to start again")
    return rows


def batches(start: int, missing: int) -> Iterator[list[int]]:
    """Seeds from `start` on, a batch at a time, without an end."""
    size = min(CHUNK, max(missing, 1))
    while True:
        yield list(range(start, start + size))
        start += size


def draw(model: Model, seeds: list[int], options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Images and classes of some seeds; the classes take turns. -> uint8 [n, R, R], [n]."""
    labels = np.array(seeds) % len(model.classes)
    rows = zip(labels.tolist(), seeds, strict=True)
    c = torch.cat([model.c(label, [seed]) for label, seed in rows])
    with torch.no_grad():
        pairs = zip(model.z(seeds).split(1), c.split(1), strict=True)
        ws = torch.cat([model.G.mapping(*pair, options.truncation_psi) for pair in pairs])
    return images_of(model.G, ws), labels


def write_images(model: Model, options: Options, copies: Copies | None) -> list[dict[str, str]]:
    """Write images and the journal, a batch at a time. -> all rows of the journal."""
    out = model.out
    settings = settings_of(model, options, copies)
    rows = open_export(out, settings)
    with utils.lock_folder(out, "exporting"):
        text = json.dumps(settings, indent=2) + "\n"
        utils.write_atomically(out / SETTINGS, lambda partial: partial.write_text(text))
        kept = sum(row["kept"] == "yes" for row in rows)
        with tqdm(total=options.count, initial=kept, desc="exporting", unit="image") as bar:
            for seeds in batches(len(rows), options.count - kept):
                if kept >= options.count:
                    break
                images, labels = draw(model, seeds, options)
                gaps = copies.gaps(images) if copies else np.full(len(seeds), np.nan)
                keep = gaps >= copies.threshold if copies else np.ones(len(seeds), bool)
                keep &= np.cumsum(keep) <= options.count - kept
                new = []
                for i, seed in enumerate(seeds):
                    name = model.classes[labels[i]]
                    if keep[i]:
                        utils.save_grey(images[i], out / name / f"{name_of(seed)}.png")
                    where = f"{model.position_of(seed):.4f}" if model.G.by_position else ""
                    gap = f"{gaps[i]:.4f}" if copies else ""
                    near = copies is not None and gaps[i] < copies.threshold
                    if keep[i] or near:
                        kind = "yes" if keep[i] else "no"
                        new.append(
                            dict(zip(COLUMNS, (str(seed), name, where, gap, kind), strict=True))
                        )
                append_journal(out / JOURNAL, new)
                rows += new
                kept += int(keep.sum())
                bar.update(int(keep.sum()))
    return rows


def name_of(seed: int) -> str:
    """The id of the image of a seed, which is a virtual participant."""
    return f"seed{seed:07d}"


def append_journal(path: Path, rows: list[dict[str, str]]) -> None:
    """Append rows, after their images have been written."""
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def write_manifest(model: Model, options: Options, rows: list[dict[str, str]], digest: str) -> None:
    """Write manifest.csv: an image is a participant of its own."""
    columns = ("id", "participant", "class", "seed", "position", "psi", "generator_sha256")

    def write(partial: Path) -> None:
        with open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in rows:
                if row["kept"] == "yes":
                    name = name_of(int(row["seed"]))
                    rest = row["class"], row["seed"], row["position"], options.truncation_psi
                    writer.writerow([name, name, *rest, digest])

    utils.write_atomically(model.out / MANIFEST, write)


def data_card(model: Model, options: Options, rows: list[dict[str, str]], digest: str) -> str:
    """README.md of the data set: what it is, what trained it, figures, limits."""
    kept = [row for row in rows if row["kept"] == "yes"]
    counts = {name: sum(row["class"] == name for row in kept) for name in model.classes}
    of_classes = ", ".join(f"{number} {name}" for name, number in counts.items())
    run = runs.run_folder(model.source)
    config, R = model.config, model.config.img_resolution
    trained_on = "the demo brains, which are synthetic" if config.data_root is None else (
        f"the folder {config.data_root.name}"
    )  # fmt: skip
    left_out = len(rows) - len(kept)
    copies = f"{left_out} samples nearer to a training slice than 99 % of the real test slices " \
        "were left out." if options.reject_copies else "Copies of training slices were not " \
        "looked for (--reject-copies)."  # fmt: skip
    text = f"""# Synthetic brain slices

{len(kept)} images of {R} x {R} pixels, 8-bit grey: {of_classes}.
Every image was drawn by a generator; none is of a person. Classes are the labels that the generator
was given, not diagnoses.

- Trained on: {trained_on}; truncation psi {options.truncation_psi}.
- Generator: sha256 of its file {digest}.
- {copies}
- `manifest.csv`: seed, class, position and generator of each image, a participant of its own.

## Evaluation of the generator

{evaluation_of(run)}

## Limits

- The variety is that of the generator, which is smaller than that of people. Rare findings are
  missing, and anatomy may be wrong.
- Samples of different seeds can look alike; `python prepare.py check` on this folder names them.
- Samples can resemble people of the training set. Whether this set may be handed on follows from
  the licence and the consent of the training data.
- Not for diagnosis, and no stand-in for real slices in a test set.

## Licence

To be filled in: that of the training data, if it allows derived data to be handed on.
"""
    return text


def evaluation_of(run: Path) -> str:
    """The headline of the run's evaluation, as a table, or what measures it."""
    path = run / "evaluation" / "evaluation.json"
    if not path.exists():
        return "Not measured: `python evaluate.py RUN` measures it."
    from evaluation.report import as_table

    rows = [row for row in runs.read_json(path).get("distribution", []) if row.get("set") == "all"]
    names = ("extractor", "fid_test", "precision", "recall", "coverage")
    return as_table([{name: row.get(name) for name in names} for row in rows]).rstrip()


class FromLatents(nn.Module):
    """The generator as a function of z and c, with constant noise."""

    def __init__(self, model: Model, psi: float) -> None:
        super().__init__()
        self.G, self.psi = model.G, psi

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z [1, z_dim], c [1, c_dim] -> images [1, 1, R, R] in about [-1, 1]."""
        return self.G(z, c, self.psi, None, "const")


def write_onnx(model: Model, options: Options) -> float:
    """Write the generator as ONNX. -> the largest difference to torch, in grey levels.

    Raises UserError if onnx, onnxscript or onnxruntime is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        how = "pip install onnx onnxscript onnxruntime"
        raise UserError(f"onnx = {options.onnx}: {error.name} is missing: {how}") from error
    G = FromLatents(model, options.truncation_psi).cpu().eval()
    z, c = model.z([0]).cpu(), model.c(0, [0]).cpu()

    def write(partial: Path) -> None:
        program = torch.onnx.export(G, (z, c), input_names=["z", "c"], output_names=["image"],
                                    dynamo=True, verbose=False)  # fmt: skip
        program.save(str(partial), external_data=False)

    utils.write_atomically(options.onnx, write)
    session = onnxruntime.InferenceSession(str(options.onnx), providers=["CPUExecutionProvider"])
    largest = 0.0
    inputs = {item.name for item in session.get_inputs()}
    for seed in options.seeds:
        for label in range(len(model.classes)):
            z, c = model.z([seed]).cpu(), model.c(label, [seed]).cpu()
            fed = {k: v.numpy() for k, v in {"z": z, "c": c}.items() if k in inputs}
            (theirs,) = session.run(None, fed)
            with torch.no_grad():
                ours = G(z, c).numpy()
            largest = max(largest, float(np.abs(theirs - ours).max()) * 127.5)
    return largest


def export(options: Options) -> Path:
    """Write the data set or the ONNX file. -> its path. Raises UserError for bad input."""
    model = models.open_model(options)
    if options.onnx is not None:
        utils.ensure_writable(options.onnx.parent)
        largest = write_onnx(model, options)
        text = f"largest difference to torch: {largest:.5f} grey levels, over {len(options.seeds)}"
        utils.print_once(f"{text} seeds of each class")
        return options.onnx
    if options.out is None:
        raise UserError("out: name the folder of the data set, such as --out synthetic")
    copies = Copies(model, options) if options.reject_copies else None
    rows = write_images(model, options, copies)
    digest = json.loads((model.out / SETTINGS).read_text())["generator_sha256"]
    write_manifest(model, options, rows, digest)
    text = data_card(model, options, rows, digest)
    utils.write_atomically(model.out / "README.md", lambda partial: partial.write_text(text))
    left_out = sum(row["kept"] == "no" for row in rows)
    utils.print_once(f"{len(rows) - left_out} images; {left_out} left out as copies")
    return model.out
