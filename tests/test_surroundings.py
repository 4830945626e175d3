"""Commands in odd surroundings: output without Unicode, variables that other programs left."""

import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_flags

import evaluate
import predict
import prepare
import train
from config import Config
from utils import (
    images_seen,
    read_safetensors,
    run_command,
    write_safetensors,
)

COMMANDS = {"train": train, "prepare": prepare, "predict": predict, "evaluate": evaluate}


def test_a_file_of_tensors_may_name_classes_in_any_language(tmp_path):
    state = {f"class {name}": torch.arange(3.0) for name in ("Größe", "健康", 'a"b')}
    write_safetensors(tmp_path / "x.safetensors", state, 7)
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == state.keys() and images_seen(tmp_path / "x.safetensors") == 7


def run(monkeypatch, name: str, *args: object, encoding: str = "utf-8") -> tuple[int, str]:
    """python NAME.py ARGS in this process. -> exit code, and output and errors as one text."""
    streams = [TextIOWrapper(BytesIO(), encoding, write_through=True) for _ in range(2)]
    code = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            run_command(COMMANDS[name].main)
        except SystemExit as end:
            code = end.code or 0
    return code, "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.fixture
def named(data_root: Path) -> Path:
    """Slices of two classes with names that few character sets have."""
    root = data_root
    for split in ("train", "test"):
        (root / split / "AD").rename(root / split / "łagodna")
        (root / split / "NC").rename(root / split / "健康")
    return root


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_without_a_code_are_printed_as_backslash_codes(
    named: Path, config: Config, tmp_path, monkeypatch, encoding
):
    Polish, Chinese = (
        name.encode(encoding, "backslashreplace").decode(encoding) for name in ("łagodna", "健康")
    )
    check = ["check", named, "--out", tmp_path / "a.png"]
    _, text = run(monkeypatch, "prepare", *check, encoding=encoding)
    assert f"train: {Polish} 4 participants, 8 slices; {Chinese} 4 participants" in text
    code, text = run(monkeypatch, "train", *as_flags(config), encoding=encoding)
    assert code == 0, text
    assert f"test: {Polish} 2 participants" in text and "done: 32 images" in text
    for path in (named / "test" / "健康").iterdir():
        path.unlink()
    code, text = run(monkeypatch, "prepare", *check, encoding=encoding)
    assert code == 2 and f"{Chinese} holds no image files" in text and "Traceback" not in text


@pytest.mark.slow
def test_figures_need_no_backend_of_a_notebook(tmp_path: Path):
    script = "import train, predict, evaluate, prepare, utils\n"
    script += "figure = utils.new_figure(figsize=(1, 1)); figure.subplots().plot([1, 2])\n"
    script += "import sys, pathlib; utils.save_figure(figure, pathlib.Path(sys.argv[1]))"
    path = tmp_path / "a.png"
    subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, check=True,
        env=os.environ | {"MPLBACKEND": "module://some_notebook.inline"},
    )  # fmt: skip
    assert path.stat().st_size > 1000


LEFT_OVER = [
    ({"RANK": "3", "WORLD_SIZE": "8"}, "RANK = 3, WORLD_SIZE = 8, but no MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "3"}, "RANK = 3"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but no RANK, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "many", "WORLD_SIZE": "2"}, "RANK = many, WORLD_SIZE = 2"),
    ({"RANK": "-1"}, "RANK = -1"),
    ({"RANK": "0", "WORLD_SIZE": "two"}, "RANK = 0, WORLD_SIZE = two"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK = 2"),
    (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "tcp://1"},
        "RANK = 0, WORLD_SIZE = 2, MASTER_ADDR = 127.0.0.1, MASTER_PORT = tcp://1",
    ),
]


@pytest.mark.parametrize(("left", "words"), LEFT_OVER)
def test_variables_of_another_program_are_one_line(config, monkeypatch, left, words):
    set_only(monkeypatch, left)
    code, text = run(monkeypatch, "train", *as_flags(config))
    assert code == 2 and text.startswith(f"error: {words}") and text.count("\n") == 1, text
    assert "start with torchrun, or unset" in text
    assert not config.out.exists()


HARMLESS = [
    {"RANK": "0", "WORLD_SIZE": "1"},
    {"RANK": "0"},
    {"MASTER_PORT": "tcp://10.0.0.1:80", "LOCAL_RANK": "x"},  # of a container's neighbours
]


def set_only(monkeypatch, variables: dict[str, str]) -> None:
    for name in train.process.LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("left", HARMLESS)
def test_one_process_trains_alone(config, monkeypatch, left):
    set_only(monkeypatch, left)
    code, text = run(monkeypatch, "train", *as_flags(config), "--epochs", "1")
    assert code == 0 and "done: 16 images" in text


@pytest.mark.parametrize(("left", "_"), LEFT_OVER[:5])
def test_other_commands_ignore_ranks(config, tmp_path, monkeypatch, left, _):
    set_only(monkeypatch, left)
    out = tmp_path / "check.png"
    _, text = run(monkeypatch, "prepare", "check", config.data_root, "--out", out)
    assert "train: AD 4 participants" in text and out.exists()
    for name, args in (("predict", ["--checkpoint", "no"]), ("evaluate", ["no"])):
        set_only(monkeypatch, left)
        code, text = run(monkeypatch, name, *args)
        assert code == 2 and text.startswith("error: no"), text
    set_only(monkeypatch, left)
    code, text = run(monkeypatch, "train", "--diagnose", "no")
    assert code == 2 and text.startswith("error: no is no run"), text


@pytest.mark.slow
def test_help_is_printed_in_any_encoding():
    done = subprocess.run(
        [sys.executable, "predict.py", "--help"], cwd=ROOT, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and b"--truncation-psi" in done.stdout, done.stderr
