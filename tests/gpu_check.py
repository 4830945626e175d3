"""What a GPU that is at hand for minutes can tell: stages, each a process with a hard limit.

    python tests/gpu_check.py --data-root AD_NC              # ten minutes at most
    python tests/gpu_check.py --peer stylegan2-ada-pytorch   # a clone of it, measured beside
    TORCHDYNAMO_DISABLE=1 python tests/gpu_check.py --device cpu --resolutions 16  # dry run

Every line is printed when it is known, and kept in the file `--out`. A stage that is over its
limit shows where it is, and is killed, not asked.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmark import FORMS, PHASES, Options, matrix_rate, measure_row, milliseconds, our_phases

from config import GPU, Config
from training.process import resolve_device, tune
from utils import run_command


@dataclass(frozen=True)
class Check:
    """What to look at. Everything else is as in config.py for a GPU."""

    resolutions: tuple[int, ...] = (128, 256)
    """Image sizes in pixels; phases and kernels are shown at the last one."""
    channel_base: int = 16384
    """Feature maps times resolution."""
    channel_max: int = 512
    """Most feature maps at any resolution."""
    batch_size: int = 32
    """Images per step."""
    peer: Path | None = None
    """Folder of a clone of stylegan2-ada-pytorch."""
    seconds: float = 1.0
    """Least time to measure each phase for."""
    total: float = 600.0
    """Seconds for all stages together."""
    training: float = 150.0
    """Seconds of training."""
    data_root: Path | None = None
    """Slices to train on; None: demo brains."""
    run: Path = Path("runs/gpu_check")
    """Folder of that run."""
    device: str = "cuda"
    """cuda, or cpu for a dry run."""
    out: Path = Path("gpu_check.txt")
    """File that keeps what is printed."""
    stage: str | None = None
    """Internal: run one stage in this process."""

    def config(self, resolution: int) -> Config:
        sizes = {n: getattr(self, n) for n in ("channel_base", "channel_max", "batch_size")}
        return Config(**GPU | sizes | {"img_resolution": resolution, "device": self.device})


def card(check: Check) -> None:
    """Name of the device, versions, rate of matrix products."""
    device = resolve_device(check.device)
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores")
    for precision in ("bfloat16", "float32") if on_cuda else ("float32",):
        rate = matrix_rate(getattr(torch, precision), device)
        print(f"matrix products, {precision}: {rate / 1e12:.2f} TFLOP/s")


def speed(check: Check, form: str, resolution: int) -> None:
    """ms of each phase, images a second of a whole step, memory."""
    options = Options(device=check.device, seconds=check.seconds, peer=check.peer)
    row = measure_row(check.config(resolution), FORMS[form], options)
    phases = ", ".join(f"{name} {row[name]:.1f}" for name in PHASES)
    print(
        f"{form}, {resolution} pixels: {1000 / row['s_per_kimg']:.1f} img/s, {phases} ms, "
        f"{row['memory_mb']:.0f} MB, {row['build_s']:.0f} s until each phase had run"
    )


def compilation(check: Check, phase: str, resolution: int) -> None:
    """One phase, as it is and compiled: ms, and seconds of its first compiled call."""
    device, found = resolve_device(check.device), {}
    for form in ("bfloat16 NHWC", "bfloat16 NHWC compiled"):
        call = our_phases(check.config(resolution), FORMS[form], device)[phase]
        started = time.perf_counter()
        call()
        first = time.perf_counter() - started
        found[form] = milliseconds(call, check.seconds, device, warm_up=1)
    plain, compiled = found.values()
    print(f"{phase}: {plain:.1f} ms as it is, {compiled:.1f} ms compiled in {first:.0f} s")


def training(check: Check, resolution: int, seconds: float) -> None:
    """Training on slices, as a user starts it, until SIGTERM; then a grid of samples."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "train.py", "--out", str(check.run), "--device", check.device]
    command += ["--img-resolution", str(resolution), "--epochs", "1000000", "--num-workers", "0"]
    for name in ("channel_base", "channel_max", "batch_size"):
        command += [f"--{name}", str(getattr(check, name))]
    if check.data_root:
        command += ["--data-root", str(check.data_root)]
    trained = subprocess.Popen(command, cwd=root)
    try:
        trained.wait(seconds)
    except subprocess.TimeoutExpired:
        trained.terminate()
        trained.wait(60)
    command = ["predict.py", "--checkpoint", str(check.run), "--figures", "grid"]
    subprocess.run([sys.executable, *command], cwd=root, check=True)


def kernels(check: Check, resolution: int, count: int = 20) -> None:
    """The costliest kernels of the four phases, compiled: ms in all, calls, name."""
    device = resolve_device(check.device)
    phases = our_phases(check.config(resolution), FORMS["bfloat16 NHWC compiled"], device)
    for _ in range(2):
        for call in phases.values():
            call()
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA if device.type == "cuda" else kinds.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for call in phases.values():
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, kind))
    for event in events[:count]:
        print(f"{getattr(event, kind) / 1000:9.2f} ms {event.count:5} x {event.key[:100]}")


class Stage(NamedTuple):
    """A function of this module, its arguments after the settings, and its limit in seconds."""

    call: Callable[..., None]
    args: tuple[Any, ...]
    limit: float


# Twice the seconds that compiling a phase for an H200 took with 16 workers, without benchmarks
LIMITS = {"g_main": 150, "g_path": 190, "d_main": 100, "d_r1": 110}


def stages(check: Check) -> dict[str, Stage]:
    """All stages in the order of their worth; training gets what is left of the time."""
    last = check.resolutions[-1]
    found = {"card": Stage(card, (), 40)}
    found[f"bfloat16 NHWC, {last} pixels"] = Stage(speed, ("bfloat16 NHWC", last), 60)
    for phase, limit in LIMITS.items():
        found[f"{phase}, compiled"] = Stage(compilation, (phase, last), limit)
    form = "bfloat16 NHWC compiled"
    found[f"{form}, {last} pixels"] = Stage(speed, (form, last), 100)
    found["training"] = Stage(training, (last, check.training), check.training + 90)
    found["kernels"] = Stage(kernels, (last,), 60)
    if check.peer is not None:
        for form in ("peer float16", "peer float32"):
            found[f"{form}, {last} pixels"] = Stage(speed, (form, last), 120)
    others = [("bfloat16 NHWC graphs", last), ("bfloat16 NCHW", last)]
    for form, resolution in others + [("bfloat16 NHWC", r) for r in check.resolutions[:-1]]:
        found[f"{form}, {resolution} pixels"] = Stage(speed, (form, resolution), 100)
    return found


def run_stage(name: str, limit: float, arguments: list[str], cache: str, tell: Callable) -> None:
    """One stage in a process of its own, whose group is killed at its limit."""
    command = [sys.executable, "-u", __file__, *arguments, "--stage", name]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "STAGE_SECONDS": str(limit)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    timer.start()
    for line in process.stdout:
        tell(f"  {line.rstrip()}")
    code = process.wait()
    timer.cancel()
    if killed.is_set():
        tell(f"  killed after {limit:.0f} s")
    elif code:
        tell(f"  failed with exit code {code}")


def main() -> None:
    """Command line of this module."""
    check = tyro.cli(Check, description=__doc__)
    if check.stage is not None:
        faulthandler.dump_traceback_later(
            max(1, float(os.environ.get("STAGE_SECONDS", "3600")) - 3)
        )
        tune(resolve_device(check.device), Path("cache"))
        stage = stages(check)[check.stage]
        return stage.call(check, *stage.args)
    started = time.perf_counter()
    with open(check.out, "w") as file, tempfile.TemporaryDirectory() as cache:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        for name, stage in stages(check).items():
            left = check.total - (time.perf_counter() - started)
            if left < 5:
                tell(f"{name}: no time left")
                continue
            tell(f"{name} (at most {min(stage.limit, left):.0f} s)")
            run_stage(name, min(stage.limit, left), sys.argv[1:], cache, tell)
        tell(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    run_command(main)
