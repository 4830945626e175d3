"""Inputs that nobody would write: every outcome is a success or one clear line that names the file.

FUZZ_EXAMPLES=1400 python -m pytest tests/test_fuzz.py    # 10,000 inputs, by hand

Damaged logs are in test_monitor.py.
"""

import gzip
import json
import os
import sys
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import tyro
from conftest import draw_slice
from PIL import Image
from test_scans import head

import prepare
from config import Config, UserError
from dataset import resized_scan
from evaluate import Options as EvaluateOptions
from participants.matching import EntryFinder
from predict import Options as PredictOptions
from scans.volumes import ImportOptions, cut, read_volume
from train import parse_settings
from training.runs import load_checkpoint, read_run_config, write_run_config
from utils import first_line, read_safetensors, safetensors_bytes

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 15))  # of each of seven
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=10_000,  # ms: nothing hangs
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
# Where a file is changed, as a share of its length, and to which byte; how much of it is left
EDITS = st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), max_size=8)
LEFT = st.one_of(st.just(1.0), st.floats(0, 1))


def changed(content: bytes, edits: list[tuple[float, int]], left: float) -> bytes:
    """Some bytes set, the rest cut off."""
    new = bytearray(content)
    for place, value in edits:
        if new:
            new[int(place * len(new))] = value
    return bytes(new[: int(left * len(new))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def as_file(image: Image.Image, kind: str) -> bytes:
    content = BytesIO()
    image.save(content, kind)
    return content.getvalue()


GREY = draw_slice(np.random.default_rng(0), (24, 20), dark=True)
IMAGES = {kind: as_file(Image.fromarray(GREY), kind) for kind in ("PNG", "JPEG", "GIF", "BMP")}
IMAGES |= {
    "TIFF": as_file(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "PPM": as_file(Image.fromarray(GREY.astype(np.uint16)), "PPM"),
    "WEBP": as_file(Image.fromarray(GREY), "WEBP"),
}


@FUZZ
@given(st.sampled_from(sorted(IMAGES)), EDITS, LEFT)
def test_an_image_is_read_or_named(folder: Path, kind, edits, left):
    path = folder / "1_0.png"
    path.write_bytes(changed(IMAGES[kind], edits, left))
    images, problems = resized_scan([path], 16)
    if images is None:
        assert len(problems) == 1 and problems[0].startswith(f"{path}: ")
        assert "\n" not in problems[0]
    else:
        assert images.shape == (1, 16, 16)


def volume() -> bytes:
    values, affine = head()
    small = nibabel.Nifti1Image(values[::3, ::3, ::3], affine @ np.diag([3.0, 3, 3, 1]))
    return small.to_bytes()


@FUZZ
@given(EDITS, EDITS, LEFT, st.booleans())
def test_a_volume_is_cut_or_refused_with_a_reason(folder: Path, edits, header, left, compressed):
    content = volume()
    content = changed(content[:352], header, 1) + changed(content[352:], edits, left)
    path = folder / ("a.nii.gz" if compressed else "a.nii")
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    try:
        with np.errstate(all="ignore"):
            made = cut(*read_volume(path, False), ImportOptions(folder, folder, slices=2, size=64))
    except Exception as error:  # as an import catches it
        assert not isinstance(error, MemoryError | AssertionError | NameError), error
        assert first_line(error)
    else:
        assert made.images.shape == (2, 64, 64) and np.isfinite(made.images).all()


CELLS = st.text(st.characters(codec="utf-8"), max_size=12)
HEADERS = ["Image Data ID", "Subject", "Group", "Age", "Sex", "CDR", "participant_id", "x", ""]


@FUZZ
@given(
    st.lists(st.sampled_from(HEADERS) | CELLS, min_size=1, max_size=6),
    st.lists(st.lists(CELLS, max_size=6), max_size=5), EDITS, st.sampled_from(",;\t"),
)  # fmt: skip
def test_a_table_is_read_or_named(folder: Path, header, rows, edits, delimiter):
    text = "\n".join(delimiter.join(row) for row in [header, *rows])
    path = folder / "table.csv"
    path.write_bytes(changed(text.encode("utf-8", "replace"), edits, 1))
    try:
        finder = EntryFinder(path, {})
        finder.named_in(text[:200])
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    except ValueError as error:
        assert "several participants" in str(error)


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    content = BytesIO()
    state = {"G_ema": {"a": torch.ones(50)}, "settings": {"seed": 0}, "cur_nimg": 4}
    torch.save(state, content)
    return content.getvalue()


@FUZZ
@given(EDITS, LEFT)
def test_a_checkpoint_is_whole_or_named(folder: Path, checkpoint: bytes, edits, left):
    path = folder / "0000000004.pt"
    content = changed(checkpoint, edits, left)
    path.write_bytes(content)
    try:
        state = load_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(state["G_ema"]["a"], torch.ones(50))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = sorted(Config.__dataclass_fields__)


@FUZZ
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), JSON, EDITS, LEFT)
def test_settings_are_read_or_named(folder: Path, values, classes, edits, left):
    write_run_config(folder, Config(), ["AD", "NC"], "data")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["settings"] |= values
    if classes is not None:
        content["classes"] = classes
    path.write_bytes(changed(json.dumps(content).encode(), edits, left))
    try:
        config, names, _ = read_run_config(folder)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(config, Config) and names


@FUZZ
@given(EDITS, LEFT)
def test_tensors_are_whole_or_named(folder: Path, edits, left):
    path = folder / "generator.safetensors"
    path.write_bytes(
        changed(safetensors_bytes({"a": torch.arange(40.0)}, cur_nimg="4"), edits, left)
    )
    try:
        state = read_safetensors(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert all(value.numel() in (0, 40) for value in state.values())


FLAGS = [
    "--epochs", "--out", "--classes", "--position", "--centre", "--seeds", "--slices", "--table",
    "--columns", "--window", "check", "import", "clean", "--device", "--help", "--data-root", "-x",
    "--",
]  # fmt: skip
WORDS = ["3", "-1", "1e400", "nan", "None", "True", "a", "../x", "", "=", "cpu", "\x1b[31m", "é"]


@FUZZ
@given(st.sampled_from(["train", "predict", "evaluate", "dataset"]),
       st.lists(st.sampled_from(FLAGS + WORDS) | CELLS, max_size=5))  # fmt: skip
def test_a_command_line_is_taken_or_refused(capsys, folder: Path, name, args):
    read = {
        "train": parse_settings,
        "predict": lambda args: tyro.cli(PredictOptions, args=args),
        "evaluate": lambda args: tyro.cli(EvaluateOptions, args=args),
        "dataset": lambda args: prepare.main(),
    }[name]
    before = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = [name, *args]
    try:
        read(args)
    except UserError as error:
        assert str(error)
    except SystemExit as end:
        assert end.code in (0, 2)
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
