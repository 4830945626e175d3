"""A request to stop, at every moment: training ends in good order, and the same command goes on."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_flags, same_tensors, wait_for_epoch

import dataset
import train as training
from assets import demo_brains
from config import Config
from evaluation import features
from train import train
from training import recorder
from training.logs import read_log, read_losses
from training.process import Stopped, StopRequest
from training.runs import checkpoints, load_checkpoint

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def interrupted(function: Callable, number: int, at_call: int = 1) -> Callable:
    """The function, sending a signal to its own process within one of its calls."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        number_of_call = next(calls)
        result = function(*args, **kwargs)
        if number_of_call == at_call:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # in a thread: the main one answers meanwhile
        return result

    return call


# Where each moment is: the object and the name of what runs then, and which call is cut
MOMENTS = {
    "writing demo brains": (demo_brains, "write_subject", 3),
    "decoding": (dataset, "resized_scan", 3),
    "training the encoder": (features.Encoder, "embedding", 3),
    "features of the training slices": (features, "features_of", 1),
    "compiling": (training.Phases, "backward", 2),
    "waiting for the loader": (dataset.TrainingSlices, "__getitem__", 3),
    "a step": (training, "ema_step", 3),
    "measuring": (recorder.Measurements, "measure", 1),
    "drawing a grid": (recorder.Recorder, "save_grid", 1),
    "writing a checkpoint": (torch, "save", 1),
    "measuring at the end": (recorder.Measurements, "measure", 2),
}


@pytest.fixture
def run_config(config: Config, short_encoder, monkeypatch) -> Config:
    """A run that passes through all the moments; what it compiles costs nothing."""
    monkeypatch.setattr(torch, "compile", lambda phase, **_: phase)
    small_demo = partial(demo_brains.write_demo, num_train=8, num_test=4)
    monkeypatch.setattr(dataset, "write_demo", small_demo)
    monkeypatch.setattr(demo_brains, "SLICES", 2)
    return replace(config, compile="on", fid_kimg=0.001, fid_images=100)


def left_over(config: Config) -> list[Path]:
    return [path for path in config.out.parents[1].rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_at_any_moment_loses_nothing(run_config, monkeypatch, capsys, moment):
    config, (place, name, at_call) = run_config, MOMENTS[moment]
    if "demo" in moment:
        config = replace(config, data_root=None)
    number = SIGNALS[list(MOMENTS).index(moment) % 3]
    cut = replace(config, out=config.out.with_name("cut"))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted(getattr(place, name), number, at_call))
        started = time.perf_counter()
        train(cut)  # ends, and raises nothing
        assert time.perf_counter() - started < 10
    out = capsys.readouterr().out
    assert out.count(f"stopped by {number.name}; saved: ") == 1 and "done: " not in out
    assert left_over(cut) == []
    train(cut)
    train(config)
    whole, joined = (load_checkpoint(checkpoints(c.out)[-1]) for c in (config, cut))
    for state in (whole, joined):
        del state["settings"]["out"]
    assert same_tensors(whole, joined) == []
    assert (config.out / "losses.csv").read_text() == (cut.out / "losses.csv").read_text()
    times = ("seconds", "img_per_s", "data_wait")
    logs = [[{k: v for k, v in line.items() if k not in times} for line in read_log(c.out)]
            for c in (config, cut)]  # fmt: skip
    assert logs[0] == logs[1] and [line["epoch"] for line in logs[0]] == [1, 2]
    assert {p.name for p in (config.out / "grids").iterdir()} == {
        p.name for p in (cut.out / "grids").iterdir()
    }


def test_what_was_ignored_stays_ignored(run_config, monkeypatch, capsys):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        patched = interrupted(training.ema_step, signal.SIGHUP)
        monkeypatch.setattr(training, "ema_step", patched)
        train(run_config)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "done: 32 images" in capsys.readouterr().out


def test_a_request_that_was_lost_is_made_again(monkeypatch):
    monkeypatch.setattr(StopRequest, "SECONDS", 0.2)
    with StopRequest():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(Stopped):
                time.sleep(5)


def test_a_process_that_waits_where_python_cannot_answer_is_ended_by_a_request():
    """As a rank that waits for rank 0: torchrun would wait half a minute for it."""
    with StopRequest() as stop, stop.default_handlers():
        waiting = [signal.getsignal(number) for number in SIGNALS]
        assert waiting == [signal.SIG_DFL] * len(SIGNALS)
    with StopRequest() as stop:
        with stop.default_handlers():
            pass
        assert signal.getsignal(signal.SIGTERM) == stop.ask


def test_a_second_request_ends_it_at_once(run_config, monkeypatch):
    def ask_twice(state):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "ema_step", ask_twice)
    with pytest.raises(KeyboardInterrupt):
        train(run_config)


def start(config: Config, cwd: Path, **kwargs) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(config)]
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, text=True, **kwargs)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_to_the_whole_group_saves_and_ends_cleanly(config, tmp_path, number, workers):
    config = replace(config, epochs=10000, num_workers=workers)
    process = start(config, tmp_path, stdout=subprocess.PIPE)
    wait_for_epoch(config, process)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=30)  # as Slurm waits from SIGTERM to SIGKILL
    assert process.returncode == 0
    assert f"stopped by {number.name}; saved: " in out and "the same command goes on" in out
    saved = load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"]
    assert read_losses(config.out)[-1, 0] == saved
    assert (config.out / "losses.png").exists() and (config.out / "progress.png").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="opens a terminal as Linux does")
def test_a_closed_terminal_saves_and_ends_cleanly(config: Config, tmp_path):
    """The terminal goes away under a running process, as a lost connection does."""
    config = replace(config, epochs=10000)
    ours, theirs = os.openpty()
    settle = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    settle += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", settle, str(ROOT / "train.py"), *as_flags(config)]
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **terminal)
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline = time.time() + 120
    while not (config.out / "log.jsonl").exists() or not read_log(config.out):
        assert time.time() < deadline and process.poll() is None
        try:
            os.read(ours, 1 << 16)
        except BlockingIOError:
            time.sleep(0.1)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    saved = load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"]
    assert read_losses(config.out)[-1, 0] == saved
    assert (config.out / "progress.png").exists()
