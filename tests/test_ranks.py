"""Several processes train as one, and end as one."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, as_flags, same_tensors, wait_for_epoch

import train as training
import utils
from config import Config, UserError
from train import train
from training.logs import read_log, read_losses
from training.process import average_over_ranks, leave
from training.runs import checkpoints, load_checkpoint
from utils import run_command

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None

WATCHED_RANK = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from test_ranks import watched_rank
watched_rank()
"""


def watched_rank() -> None:
    """python train.py, and what it leaves in rank0.pt or rank1.pt; averages are checked too."""
    states = []

    class Watched(training.TrainingState):
        def __init__(self, *args):
            super().__init__(*args)
            states.append(self)

    training.TrainingState = Watched
    training.main()
    parts = [torch.full([2, 3], utils.rank() + 1.0).T, torch.tensor(10.0 * utils.rank())]
    average_over_ranks(parts)
    assert parts[0].tolist() == [[1.5, 1.5]] * 3 and parts[1] == 5, parts
    left = {"seed": torch.initial_seed(), "state": states[0].state_dict()}
    torch.save(left, f"rank{utils.rank()}.pt")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(config: Config, tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED_RANK.format(root=str(ROOT)))
    process = start_ranks(script, 2, replace(config, epochs=1, device="cuda"), tmp_path)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    a, b = (torch.load(tmp_path / f"rank{i}.pt", "cpu", weights_only=True) for i in range(2))
    assert same_tensors(a["state"], b["state"]) == [".G_ema.mapping.w_avg"]


def start_ranks(script: Path, count: int, config: Config, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", str(script), *as_flags(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_rank(number: int, port: int, main: Callable, config: Config, cwd: Path) -> None:
    """In a fork: what torchrun would start, with what it prints in rank0.txt or rank1.txt."""
    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.chdir(cwd)
    sys.argv = ["train.py", *as_flags(config)]
    sys.stdout = sys.stderr = open(f"rank{number}.txt", "w")
    run_command(main)
    leave()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork_ranks(main: Callable, config: Config, cwd: Path) -> list:
    """Two ranks without torchrun, which costs seconds of imports."""
    port = free_port()
    ranks = [FORK.Process(target=run_rank, args=(i, port, main, config, cwd)) for i in range(2)]
    for process in ranks:
        process.start()
    return ranks


def printed(cwd: Path) -> list[str]:
    return [(cwd / f"rank{i}.txt").read_text() for i in range(2)]


@pytest.mark.skipif(FORK is None, reason="forks")
def test_two_ranks_train_as_one_and_one_rank_goes_on(config: Config, tmp_path, capsys):
    ada = {"augment": "ada", "ada_kimg": 0.05, "ada_target": -1.0, "ada_interval": 3}
    config = replace(config, **ada, seed=1)
    for process in fork_ranks(watched_rank, replace(config, epochs=1), tmp_path):
        process.join(100)
        assert process.exitcode == 0, printed(tmp_path)
    out, other = printed(tmp_path)
    assert out.count("done: 16 images") == out.count("settings: ") == 1  # rank 0 alone speaks
    assert "done: " not in other and "settings: " not in other
    a, b = (torch.load(tmp_path / f"rank{i}.pt", "cpu", weights_only=True) for i in range(2))
    differing = same_tensors(a["state"], b["state"])
    assert differing == [".G_ema.mapping.w_avg"]  # estimated when saved, on rank 0
    assert a["seed"] != b["seed"]  # random streams of their own
    assert a["state"]["D"]["augment.p"] == pytest.approx(0.24)
    assert a["state"]["D"]["augment.sign_sum"] != 0  # of both: the same, though D saw other slices
    assert a["state"]["cur_nimg"] == 16
    assert read_losses(config.out)[:, 0].tolist() == [4, 8, 12, 16]
    assert np.isfinite(read_losses(config.out)[0]).all()

    train(config)
    out = capsys.readouterr().out
    assert "at 16 images\nnote: 2 processes before, 1 now: random numbers differ" in out
    assert [line["nimg"] for line in read_log(config.out)] == [16, 32]


def children(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in found.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_a_killed_rank_ends_the_job_with_an_error(config: Config, tmp_path):
    process = start_ranks(ROOT / "train.py", 2, replace(config, epochs=10000), tmp_path)
    wait_for_epoch(config, process)
    started = time.time()
    os.kill(children(process)[-1], signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.time() - started < 60


@pytest.mark.skipif(FORK is None, reason="forks")
def test_a_signal_stops_all_ranks_at_the_same_step(config: Config, tmp_path):
    config = replace(config, epochs=10000)
    ranks = fork_ranks(training.main, config, tmp_path)
    while not (config.out / "log.jsonl").exists() or not read_log(config.out):
        assert all(process.is_alive() for process in ranks), printed(tmp_path)
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGTERM)  # rank 0 hears of it from this one
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0, printed(tmp_path)
    assert "stopped by another rank" in printed(tmp_path)[0]
    saved = load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"]
    assert read_losses(config.out)[-1, 0] == saved


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_ranks_at_the_same_step(config: Config, tmp_path):
    process = start_ranks(ROOT / "train.py", 2, replace(config, epochs=10000), tmp_path)
    wait_for_epoch(config, process)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert "stopped by" in out, err
    assert (
        read_losses(config.out)[-1, 0] == load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"]
    )


def test_a_batch_that_cannot_be_split_evenly_is_an_error(config: Config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size = 4: must split evenly over the 3 processes"):
        train(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="2 images or more for each"):
        train(config)
    assert not config.out.exists()


@pytest.mark.slow
def test_bad_input_to_many_ranks_is_one_line(config: Config, tmp_path):
    bad = replace(config, data_root=tmp_path / "nowhere")
    process = start_ranks(ROOT / "train.py", 2, bad, tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("no such folder") == 1


@pytest.mark.skipif(FORK is None, reason="forks")
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_says_that_it_waits_and_can_be_ended(config: Config, tmp_path, number):
    patch = pytest.MonkeyPatch()
    patch.setattr(training.process, "SAID_AFTER", 0.2)
    lone = FORK.Process(
        target=run_rank, args=(number, free_port(), training.main, config, tmp_path)
    )
    lone.start()
    text = f"rank {number} of 2 waits for the others at 127.0.0.1:"
    deadline, file = time.time() + 60, tmp_path / f"rank{number}.txt"
    while not file.exists() or text not in file.read_text():
        assert time.time() < deadline and lone.is_alive()
        time.sleep(0.05)
    lone.terminate()
    lone.join(10)
    patch.undo()
    assert lone.exitcode == -signal.SIGTERM


def test_a_port_that_is_taken_is_one_line(config: Config, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in (where | {"RANK": "0", "WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="rank 0 of 2 waits for the others at .* unset RANK"):
            train(config)
