"""The check for a GPU at hand for minutes, dry-run on the CPU: every stage runs, none can hang."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_check

TINY = ["--device", "cpu", "--resolutions", "16", "--channel-base", "64", "--channel-max", "8"]
TINY += ["--batch-size", "4", "--seconds", "0.01"]


def test_every_stage_runs_and_is_kept(tmp_path: Path):
    command = [sys.executable, gpu_check.__file__, *TINY, "--out", str(tmp_path / "check.txt")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {"TORCHDYNAMO_DISABLE": "1"}  # a CPU compiles for minutes
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "check.txt").read_text()
    check = gpu_check.Check(resolutions=(16,), device="cpu")
    assert all(f"{name} (at most" in done.stdout for name in gpu_check.stages(check))
    assert "failed with exit code" not in done.stdout and "killed after" not in done.stdout
    assert done.stdout.count("img/s") == 5 and done.stdout.count("compiled d_r1 in ") == 6
    assert done.stdout.count(" ms ") == 20  # kernels


def test_a_stage_over_its_limit_is_killed(tmp_path: Path):
    told: list[str] = []
    gpu_check.run_stage("kernels", 1, TINY, str(tmp_path), told.append)
    assert told[-1] == "  killed after 1 s"


def test_a_stage_that_fails_is_said_to(tmp_path: Path):
    told: list[str] = []
    gpu_check.run_stage("no such stage", 60, TINY, str(tmp_path), told.append)
    assert told[-1] == "  failed with exit code 1"
