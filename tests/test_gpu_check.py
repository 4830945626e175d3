"""The check for a GPU at hand for minutes, dry-run on the CPU: every stage runs, none can hang."""

import re
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
import tyro
from conftest import write_folder

import modules
import train as training

TINY = ["--device", "cpu", "--resolutions", "16", "--channel-base", "64", "--channel-max", "8"]
TINY += ["--batch-size", "4", "--seconds", "0.01"]


@pytest.mark.slow
def test_every_stage_runs(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # which takes minutes on a CPU
    for module in (modules, training):  # rows of the benchmark change the layout of features
        monkeypatch.setattr(module, "MEMORY_FORMAT", modules.MEMORY_FORMAT)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *TINY])
    arguments = [*TINY, "--run", str(tmp_path / "run"), "--training", "30"]
    root = write_folder(tmp_path / "data", {"train": 4, "test": 2})
    arguments += ["--data-root", str(root)]
    check = tyro.cli(gpu_check.Check, args=arguments)
    for name, stage in gpu_check.stages(check).items():
        print(name)
        stage.call(check, *stage.args)
    out = capsys.readouterr().out
    assert out.count("img/s") == 4
    for phase in gpu_check.LIMITS:
        assert re.search(rf"{phase}: \d+\.\d ms as it is, \d+\.\d ms compiled in \d+ s", out)
    assert out.count(" x ") == 20  # kernels
    assert (tmp_path / "run" / "predict" / "grid_AD.png").exists()


@pytest.mark.slow
def test_what_stages_print_is_kept_and_they_share_the_time(tmp_path, monkeypatch, capsys):
    out, card = tmp_path / "check.txt", gpu_check.stages(gpu_check.Check())["card"]
    arguments = [*TINY, "--out", str(out), "--total", "30"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    monkeypatch.setattr(gpu_check, "stages", lambda check: {"card": card, "kernels": card})
    monkeypatch.setattr(gpu_check.time, "perf_counter", iter([0, 5, 26, 30]).__next__)
    gpu_check.main()
    assert capsys.readouterr().out == out.read_text()
    assert "card (at most 25 s)\n  CPU, torch" in out.read_text()
    assert "kernels: no time left" in out.read_text()


def test_a_stage_over_its_limit_is_killed(tmp_path: Path):
    told: list[str] = []
    gpu_check.run_stage("kernels", 1, TINY, str(tmp_path), told.append)
    assert told[-1] == "  killed after 1 s"


@pytest.mark.slow
def test_a_stage_that_fails_is_said_to(tmp_path: Path):
    told: list[str] = []
    gpu_check.run_stage("no such stage", 60, TINY, str(tmp_path), told.append)
    assert told[-1] == "  failed with exit code 1"
