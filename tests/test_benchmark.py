"""The benchmark runs to its end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_whole_benchmark_runs_at_its_smallest_size(tmp_path: Path):
    out = tmp_path / "benchmark.json"
    command = [sys.executable, Path(__file__).with_name("benchmark.py"), "--device", "cpu"]
    command += ["--resolutions", "16", "--batch-size", "4", "--channel-base", "64"]
    command += ["--channel-max", "8", "--w-dim", "8", "--repeats", "1", "--seconds", "0.01"]
    command += ["--forms", "naive", "float32 NHWC", "--out", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["tables"][0]["rows"]) == {"naive", "float32 NHWC"}
    assert {row["resolution"] for row in found["resampling"]} == {16}
    assert all(row["in use"] > 0 and row["depthwise"] > 0 for row in found["resampling"])
    assert found["tables"][0]["loader_img_per_s"] > 0
