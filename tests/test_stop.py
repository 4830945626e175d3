"""A request to stop, at every moment: training ends in good order, and the same command resumes."""

import fcntl
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_flags, assert_same_run, copied, wait_for_epoch

import dataset
import train as training
from assets import demo_brains
from config import Config
from evaluation import features
from train import train
from training import recorder
from training.logs import STATS, read_log, read_losses
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
    "the last step of an epoch": (training, "ema_step", 4),
    "measuring": (recorder.Measurements, "measure", 1),
    "drawing a grid": (recorder.Recorder, "save_grid", 1),
    "writing a checkpoint": (torch, "save", 1),
    "measuring at the end": (recorder.Measurements, "measure", 2),
}


# A run that passes through all the moments: p rises by 0.24 every 3 steps, labels come by and by
EVERYTHING = {
    "fid_kimg": 0.001, "fid_images": 100, "label_ramp_kimg": 0.012,
    "augment": "ada", "ada_kimg": 0.05, "ada_target": -1.0, "ada_interval": 3,
}  # fmt: skip


@pytest.fixture
def run_config(config: Config, short_encoder, monkeypatch) -> Config:
    """Settings of that run; what it compiles costs nothing."""
    monkeypatch.setattr(torch, "compile", lambda phase, **_: phase)
    return replace(config, compile="on", **EVERYTHING)


@pytest.fixture
def demo_config(run_config: Config, monkeypatch) -> Config:
    """The same on the demo brains, few and of two slices."""
    small_demo = partial(demo_brains.write_demo, num_train=8, num_test=4)
    monkeypatch.setattr(dataset, "write_demo", small_demo)
    monkeypatch.setattr(demo_brains, "SLICES", 2)
    return replace(run_config, data_root=None)


def left_over(config: Config) -> list[Path]:
    return [path for path in config.out.parents[1].rglob("*") if "partial" in path.name]


def stop_and_go_on(config: Config, monkeypatch, capsys, moment: str) -> None:
    """Train a run that is stopped at that moment, and train it again."""
    (place, name, at_call), number = MOMENTS[moment], SIGNALS[list(MOMENTS).index(moment) % 3]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted(getattr(place, name), number, at_call))
        started = time.perf_counter()
        train(config)  # ends, and raises nothing
        assert time.perf_counter() - started < 10
    out = capsys.readouterr().out
    assert out.count(f"stopped by {number.name}; saved: ") == 1 and "done: " not in out
    assert left_over(config) == []
    train(config)


@pytest.mark.parametrize("moment", list(MOMENTS)[1:])
def test_a_stop_at_any_moment_loses_nothing(run_config, trained_once, monkeypatch, capsys, moment):
    whole = trained_once(**EVERYTHING)
    if moment not in ("decoding", "training the encoder", "features of the training slices"):
        shutil.rmtree(copied(whole, run_config.data_root.parent).out)  # its cache is left
    stop_and_go_on(run_config, monkeypatch, capsys, moment)
    assert_same_run(whole, run_config)
    assert [line["epoch"] for line in read_log(run_config.out)] == [1, 2]


def test_a_stop_while_demo_brains_are_written_loses_nothing(demo_config, monkeypatch, capsys):
    stop_and_go_on(demo_config, monkeypatch, capsys, list(MOMENTS)[0])
    whole = replace(demo_config, out=demo_config.out.with_name("whole"))
    train(whole)
    assert_same_run(whole, demo_config)


def test_the_run_that_is_stopped_has_everything_at_work(trained_once):
    run = trained_once(**EVERYTHING).out
    state, p = load_checkpoint(checkpoints(run)[-1]), read_losses(run)[:, 1 + STATS.index("ada_p")]
    assert state["cur_nimg"] == 32 and p[-1] == pytest.approx(0.48)
    assert state["D"]["augment.sign_sum"] != 0 and "fid" in read_log(run)[0]


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


def test_a_stop_while_a_phase_is_first_used_compiled_saves_the_run(
    config: Config, monkeypatch, capsys
):
    def first_call(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return training.g_main(*args)

    def beside(phases, state):
        phases.processes = type("", (), {"poll": dict, "stop": lambda _: None})()
        if state.cur_nimg == 3 * config.batch_size:
            phases.compiled[training.g_main] = first_call

    monkeypatch.setattr(training.Phases, "compile_beside", beside)
    train(config)
    assert f"{4 * config.batch_size:010d}.pt" in capsys.readouterr().out


def test_a_deferred_request_is_noted_and_an_immediate_one_raises():
    with StopRequest() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        with pytest.raises(Stopped), stop.immediate():
            pytest.fail("the noted request was not answered")
        assert stop.defers
    with StopRequest() as stop, stop.deferred():
        with pytest.raises(Stopped), stop.immediate():
            os.kill(os.getpid(), signal.SIGTERM)


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
    monkeypatch.setattr(StopRequest, "PATIENCE", -1)
    with pytest.raises(KeyboardInterrupt):
        train(run_config)


def test_a_shell_and_the_system_may_both_tell_that_the_terminal_closed(
    run_config, tmp_path, monkeypatch
):
    def ask(state):
        training.process.STOP.terminals = [terminal]
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            os.kill(os.getpid(), number)

    terminal = os.open(tmp_path / "terminal", os.O_CREAT | os.O_WRONLY)
    monkeypatch.setattr(training, "ema_step", ask)
    train(run_config)
    assert_saved_at_its_last_step(run_config)
    os.write(terminal, b"lost")
    assert not (tmp_path / "terminal").read_bytes()  # as if to a terminal that is gone


def start(config: Config, cwd: Path, **kwargs) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *as_flags(config)]
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, text=True, **kwargs)


def assert_saved_at_its_last_step(config: Config) -> None:
    saved = load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"]
    assert read_losses(config.out)[-1, 0] == saved
    assert (config.out / "losses.png").exists() and (config.out / "progress.png").exists()


def test_a_signal_to_the_whole_group_saves_and_ends_cleanly(config, tmp_path):
    config = replace(config, epochs=10000, num_workers=2)
    process = start(config, tmp_path, stdout=subprocess.PIPE)
    wait_for_epoch(config, process)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=30)  # as Slurm waits from SIGTERM to SIGKILL
    assert process.returncode == 0
    assert "stopped by SIGTERM; saved: " in out and "the same command resumes the run" in out
    assert_saved_at_its_last_step(config)


@pytest.mark.parametrize("then", ["Ctrl-C", "no signal"])
def test_a_reader_that_vanishes_costs_nothing(config, tmp_path, then):
    """As when Ctrl-C ends tee too, or tee dies by itself."""
    config = replace(config, epochs=10000 if then == "Ctrl-C" else 60)
    process = start(config, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_epoch(config, process)
    process.stdout.close()
    if then == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.returncode == 0
    assert_saved_at_its_last_step(config)
    assert read_log(config.out)[-1]["epoch"] == 60 or then == "Ctrl-C"


def train_on_a_terminal(config: Config, ours: int, theirs: int) -> None:
    """In a process of its own, whose controlling terminal it becomes."""
    os.setsid()
    os.close(ours)
    for number in range(3):
        os.dup2(theirs, number)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    train(config)


@pytest.mark.skipif(sys.platform != "linux", reason="opens a terminal as Linux does")
@pytest.mark.parametrize("end", ["closed", "Ctrl-C"])
def test_a_terminal_that_closes_or_interrupts_saves_and_ends_cleanly(config: Config, end):
    """It goes away under a running process, as a lost connection does."""
    config = replace(config, epochs=10000)
    ours, theirs = os.openpty()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=train_on_a_terminal, args=(config, ours, theirs))
    process.start()
    os.close(theirs)
    os.set_blocking(ours, False)
    while not (config.out / "log.jsonl").exists() or not read_log(config.out):
        assert process.is_alive()
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)
        time.sleep(0.02)
    if end == "Ctrl-C":
        os.write(ours, b"\x03")
        while process.is_alive():
            with suppress(BlockingIOError, OSError):
                os.read(ours, 1 << 16)
            time.sleep(0.02)
    os.close(ours)
    process.join(60)
    assert process.exitcode == 0
    assert_saved_at_its_last_step(config)
