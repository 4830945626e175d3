"""A synthetic data set: class folders, manifest.csv and a data card; or the generator as ONNX."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

import utils
from config import ImageSeed, Range, Share, UserError
from evaluation import features, metrics, report
from evaluation.samples import cutoffs_of, images_of, mapped, with_mixed_styles
from evaluation.verdict import REAL, SAME_SIZE, verdict
from exploration import model as models
from exploration.model import CHUNK, Model
from participants.tables import MANIFEST
from training import runs

JOURNAL = ".journal.csv"  # what has been drawn so far; a killed export goes on after its last line
COLUMNS = ("seed", "class", "position", "gap", "kept")
SETTINGS = "export.json"
ENCODING = "utf-8", "surrogateescape"  # keeps names of classes that are no UTF-8
MAX_COPIES = 1000  # in a row: then nothing else is to be expected
THRESHOLD = 1  # percentile of the gaps of test slices, below which a sample counts as a copy


@dataclass(frozen=True)
class Options(models.RealOptions):
    """Options of `explore.py export`."""

    seeds: tyro.conf.Suppress[tuple[ImageSeed, ...]] = (0, 1, 2, 3)
    count: Annotated[int, Range(1)] = 1000
    """Number of images in all; the classes take turns. 1 or more."""
    truncation_psi: Share = 1.0
    """1: full variety; closer to 0: more like the mean image of the class. 0 to 1."""
    style_mixing_prob: Share = 0.0
    """Share of images with style mixing: more variety, see the README. 0 to 1."""
    reject_copies: bool = False
    """Leave out samples nearer to a training slice than 99 % of the real test slices are."""
    onnx: Path | None = None
    """Write the generator as this ONNX file in place of images."""
    out: Path | None = None
    """Folder for the images; it is needed, but with --onnx."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("out", "style_mixing_prob", "reject_copies") if self.onnx else ():
            if value := getattr(self, name):
                raise UserError(f"{name} = {value}: --onnx writes a generator and no images")


class Copies:
    """Finds samples that lie too near to a training slice, in any pose."""

    def __init__(self, model: Model, options: Options) -> None:
        places = options.data_root, options.table
        without = "no copies can be found"
        real = runs.real_slices(model.source, model.config, model.classes, *places, without)
        if real is None:
            raise UserError("reject_copies: the training slices are not here; set --data-root")
        if not runs.trained_on(model.source, real[1]):
            raise UserError(f"reject_copies: {runs.OTHER_DATA}")
        train = metrics.normalise_pose(real[0]["train"].images)
        known = np.concatenate([train, train[:, :, ::-1]])  # mirrored too
        self.known = features.compute_features(known, features.PIXELS, None)
        self.threshold = float(np.percentile(self.gaps(real[0]["test"].images), THRESHOLD))

    def gaps(self, images: np.ndarray) -> np.ndarray:
        """Distance of images [n, R, R] to the nearest training slice. -> [n]."""
        points = features.compute_features(metrics.normalise_pose(images), features.PIXELS, None)
        return metrics.nearest_neighbour(points, self.known)[0]


def settings_of(model: Model, options: Options, copies: Copies | None) -> dict[str, Any]:
    """What decides the images; an export goes on only with the same."""
    return {
        "generator_sha256": utils.sha256_of(runs.weights_of(model.source)),
        "classes": model.classes,
        "truncation_psi": options.truncation_psi,
        "style_mixing_prob": options.style_mixing_prob,
        "position": options.position,
        "reject_copies": copies and round(copies.threshold, 3),
    }


def require_own(out: Path, settings: dict[str, Any]) -> None:
    """Raises UserError if a folder holds anything but an export of these settings."""
    if (path := out / SETTINGS).exists():
        before = runs.read_json(path)
        if changed := [k for k in settings if before.get(k) != settings[k]]:
            text = "; ".join(f"{k} = {before.get(k)}, now {settings[k]}" for k in changed)
            raise UserError(f"{out} holds an export with {text}; use another --out")
    elif out.exists() and [p for p in out.iterdir() if p.name[0] != "." and p.suffix != ".partial"]:
        raise UserError(f"{out} is not empty")


def read_journal(journal: Path) -> list[dict[str, str]]:
    """The rows of an export that was stopped, of seeds 0, 1, ... Raises UserError."""
    if not journal.exists():
        return []
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # a kill may have cut the last line
    if whole != content:
        utils.write_atomically(journal, lambda partial: partial.write_bytes(whole))
    rows = list(csv.DictReader(io.StringIO(whole.decode(*ENCODING), newline="")))
    whole_rows = [tuple(row) == COLUMNS and None not in row.values() for row in rows]
    if not all(whole_rows) or [row["seed"] for row in rows] != [str(i) for i in range(len(rows))]:
        raise UserError(f"{journal} cannot be read: delete {journal.parent} to start again")
    return rows


def draw(model: Model, seeds: list[int], options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Images and classes of some seeds; the classes take turns. -> uint8 [n, R, R], [n]."""
    labels = np.array(seeds) % len(model.classes)
    c = model.c(labels, seeds)
    ws = mapped(model.G, model.z(seeds), c, options.truncation_psi)
    if options.style_mixing_prob:
        second = model.z([utils.stream_seed("second latent", seed) for seed in seeds])
        others = mapped(model.G, second, c, options.truncation_psi)
        ws = with_mixed_styles(ws, others, seeds, options.style_mixing_prob)
    return images_of(model.G, ws), labels


def write_images(
    model: Model, options: Options, copies: Copies | None, settings: dict[str, Any]
) -> list[dict[str, str]]:
    """Write images and the journal, a batch at a time. -> all rows of the journal.

    Raises UserError if the folder is another's or in use, or after MAX_COPIES copies in a row.
    """
    out = model.out
    require_own(out, settings)
    with utils.lock_folder(out, "exporting"):
        utils.delete_partials(out)
        if not (out / SETTINGS).exists():  # the images were moved away
            (out / JOURNAL).unlink(missing_ok=True)
        report.write_text(json.dumps(settings, indent=2) + "\n", out / SETTINGS)
        rows = read_journal(out / JOURNAL)
        kept = [seed for seed, row in enumerate(rows) if row["kept"] == "yes"]
        for seed in kept:
            if not (out / rows[seed]["class"] / f"{name_of(seed)}.png").exists():
                raise UserError(f"{out} lacks {name_of(seed)}: delete the folder to start again")
        if len(kept) > options.count:
            text = f"{out} holds {len(kept)} images; ask for as many or more, or use another --out"
            raise UserError(f"count = {options.count}: {text}")
        with tqdm(total=options.count, initial=len(kept), desc="exporting", unit="image") as bar:
            while (missing := options.count - len(kept)) > 0:
                if len(rows) - max(kept, default=-1) > MAX_COPIES:
                    text = f"the last {MAX_COPIES} samples or more were copies of training slices"
                    rest = f"{out} holds {len(kept)} images; --count {len(kept)} completes it"
                    raise UserError(f"{text}; {rest if kept else 'none is left'}")
                for name in (MANIFEST, "README.md"):  # they would no longer be true
                    (out / name).unlink(missing_ok=True)
                seeds = list(range(len(rows), len(rows) + min(CHUNK, missing)))
                images, labels = draw(model, seeds, options)
                gaps = copies.gaps(images) if copies else np.full(len(seeds), np.nan)
                new = []
                for seed, image, label, gap in zip(seeds, images, labels, gaps, strict=True):
                    name, keep = model.classes[label], copies is None or gap >= copies.threshold
                    if keep:
                        kept.append(seed)
                        utils.save_grey(image, out / name / f"{name_of(seed)}.png")
                    where = f"{model.position_of(seed):.4f}" if model.G.by_position else ""
                    distance = f"{gap:.4f}" if copies else ""
                    row = str(seed), name, where, distance, "yes" if keep else "no"
                    new.append(dict(zip(COLUMNS, row, strict=True)))
                    bar.update(int(keep))
                append_journal(out / JOURNAL, new)
                rows += new
        known = {name_of(seed) for seed in kept}
        for path in out.glob("*/seed*.png"):  # a killed export of more images left it
            if path.stem not in known:
                path.unlink()
    return rows


def name_of(seed: int) -> str:
    """The id of the image of a seed, which is a virtual participant."""
    return f"seed{seed:07d}"


def append_journal(path: Path, rows: list[dict[str, str]]) -> None:
    """Append rows, after their images have been written."""
    with open(path, "a", newline="", encoding=ENCODING[0], errors=ENCODING[1]) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def write_manifest(model: Model, options: Options, rows: list[dict[str, str]], digest: str) -> None:
    """Write manifest.csv: an image is a participant of its own."""
    psi, own = options.truncation_psi, ("class", "seed", "position")

    def write(partial: Path) -> None:
        with open(partial, "w", newline="", encoding=ENCODING[0], errors=ENCODING[1]) as file:
            writer = csv.writer(file)
            writer.writerow(["id", "participant", *own, "psi", "latents", "generator_sha256"])
            for row in (row for row in rows if row["kept"] == "yes"):
                name, latents = name_of(int(row["seed"])), latents_of(model, options, row)
                writer.writerow([name, name, *(row[k] for k in own), psi, latents, digest])

    utils.write_atomically(model.out / MANIFEST, write)


def latents_of(model: Model, options: Options, row: dict[str, str]) -> int:
    """How many latents the image of a row has: 2 with style mixing, else 1."""
    num_ws = model.G.mapping.num_ws
    cutoffs = cutoffs_of([int(row["seed"])], options.style_mixing_prob, num_ws)
    return 1 + int(cutoffs[0] < num_ws)


def data_card(
    model: Model, options: Options, rows: list[dict[str, str]], digest: str, evaluation: str
) -> str:
    """README.md of the data set: what it is, what trained it, figures, limits."""
    kept = [row for row in rows if row["kept"] == "yes"]
    counts = {name: sum(row["class"] == name for row in kept) for name in model.classes}
    of_classes = ", ".join(f"{number} {name}" for name, number in counts.items())
    config, R = model.config, model.config.img_resolution
    of_two = sum(latents_of(model, options, row) == 2 for row in kept)
    copies = "Copies of training slices were not looked for (--reject-copies)."
    if options.reject_copies:
        copies = f"""{len(rows) - len(kept)} samples nearer to a training slice of the run itself
  than 99 % of the real test slices were left out. The seeds that are missing are
  theirs: whoever has the generator can draw them."""
    text = f"""# Synthetic brain slices

{len(kept)} images of {R} x {R} pixels, 8-bit grey: {of_classes}.
Every image was drawn by a generator; none is of a person. Classes are the labels that the generator
was given, not diagnoses.

- Trained on: {runs.training_data(config)}.
- Drawn with truncation psi {options.truncation_psi}; {of_two} images have styles of two latents.
- Generator: sha256 of its file {digest}.
- {copies}
- `manifest.csv`: class, seed, position, number of latents and generator of each image, which is a
  participant of its own.

## Evaluation of the generator

{evaluation}

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


def evaluation_of(source: Path, digest: str) -> str:
    """What the evaluation of these very weights found, or what measures it. Raises UserError."""
    path = runs.output_folder(source, "evaluation") / "evaluation.json"
    tables = report.with_nan(runs.read_json(path)) if path.exists() else {}
    same = tables.get("what", {}).get("sha256") == digest
    if not same:
        return "Not measured: `python evaluate.py RUN` measures it."
    names = ("extractor", "set", "fid_test", "precision", "recall", "coverage")
    rows = [{k: r.get(k) for k in names} for r in tables.get("distribution", ())]
    rows = [r for r in rows if r["set"] in ("all", SAME_SIZE, REAL)]
    psi, mixing = (tables["what"].get(name) for name in ("psi", "style_mixing_prob"))
    try:
        text = verdict(tables)
        if rows:
            text += f"\nSamples with psi {psi}, style mixing {mixing}:\n\n{report.as_table(rows)}"
        return text.rstrip()
    except LookupError as error:  # an earlier version wrote it
        raise UserError(f"{path} lacks {error}: evaluate the run again, or delete it") from error


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
    model = models.open_model(options, writes=options.onnx is None)
    if options.onnx is not None:
        utils.ensure_writable(options.onnx.parent)
        if options.onnx.is_dir():
            raise UserError(f"onnx = {options.onnx}: is a folder, not a file")
        largest = write_onnx(model, options)
        text = f"largest difference to torch: {largest:.5f} grey levels, over {len(options.seeds)}"
        utils.print_once(f"{text} seeds of each class")
        return options.onnx
    if options.out is None:
        raise UserError("out: name the folder of the data set, such as --out synthetic")
    copies = Copies(model, options) if options.reject_copies else None
    settings = settings_of(model, options, copies)
    digest = settings["generator_sha256"]
    evaluation = evaluation_of(model.source, digest)  # a damaged one shows before images are drawn
    rows = write_images(model, options, copies, settings)
    write_manifest(model, options, rows, digest)
    card = data_card(model, options, rows, digest, evaluation)
    report.write_text(card, model.out / "README.md")
    left_out = sum(row["kept"] == "no" for row in rows)
    how = f"{left_out} left out as copies" if copies else "copies were not looked for"
    utils.print_once(f"{len(rows) - left_out} images; {how}")
    return model.out
