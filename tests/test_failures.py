"""Failures that are really caused: kills, full disks, damaged and foreign files, lost memory."""

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_run, copied, tiny, write_folder
from tqdm import tqdm

import dataset
import predict as prediction
import train as training
import utils
from config import Config, UserError
from dataset import load_slices, make_loader
from predict import Options, predict
from train import train
from training import logs, runs
from training.logs import STATS, losses_text, read_log, read_losses
from training.runs import checkpoints, load_checkpoint, load_generator, read_run_config
from utils import append_checksum, has_checksum, make_array_once

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


@pytest.fixture(autouse=True)
def own_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's lock is shared with forks: one that is killed while it writes would keep it."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)


def left_over(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix in (".partial", ".damaged")]


@pytest.fixture
def whole(trained_once, config: Config) -> Config:
    """A run that nothing disturbed, of three epochs: this test's own copy."""
    return copied(trained_once(epochs=3), config.data_root.parent, "whole")


# Kills


@pytest.mark.slow
@pytest.mark.skipif(FORK is None, reason="forks")
def test_twenty_kills_lose_nothing(trained_once, config: Config):
    whole, rng = trained_once(epochs=6), np.random.default_rng(0)
    config = replace(config, epochs=6)
    load_slices(config)
    for number in range(20):
        if number % 5 == 0:  # so that some fall into decoding
            shutil.rmtree(config.cache)
        child = FORK.Process(target=train, args=(config,))
        child.start()
        time.sleep(rng.uniform(0.02, 0.6))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    train(config)
    assert_same_run(whole, config)
    assert left_over(config.out) == left_over(config.cache) == []


@pytest.mark.parametrize("moment", ["decoding", "writing a checkpoint", "writing a line"])
@pytest.mark.skipif(FORK is None, reason="forks")
def test_a_kill_at_the_worst_moment_loses_nothing(whole, config: Config, monkeypatch, moment):
    config = replace(whole, out=config.out)
    shutil.rmtree(config.cache)
    owner, name, at_call = {
        "decoding": (dataset, "resized_scan", 3),
        "writing a checkpoint": (torch, "save", 2),
        "writing a line": (logs, "append_losses", 2),
    }[moment]
    function, calls = getattr(owner, name), itertools.count(1)

    def kill(*args, **kwargs):
        if next(calls) == at_call:
            if moment == "writing a checkpoint":
                args[1].write(b"half")
                args[1].flush()
            if moment == "writing a line":
                with open(config.out / "losses.csv", "a") as file:
                    file.write("36,0.7,0.")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        child = FORK.Process(target=train, args=(config,))
        child.start()
        child.join(60)
    assert child.exitcode == -signal.SIGKILL
    train(config)
    assert_same_run(whole, config)
    assert left_over(config.out) == left_over(config.cache) == []


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for some bytes."""
    path = disk / "filler"
    path.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return path


@pytest.mark.parametrize("lost", ["the write", "the file", "its end"])
def test_a_finished_run_whose_generator_was_not_written_gets_it(config: Config, monkeypatch, lost):
    """A full disk or a kill after the last checkpoint leaves an old generator, or none."""
    path, write = config.out / "generator.safetensors", runs.save_generator
    train(replace(config, out=config.out.with_name("whole")))
    whole = (config.out.with_name("whole") / "generator.safetensors").read_bytes()

    def no_room(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if lost == "the write":
        monkeypatch.setattr(runs, "save_generator", no_room)
        with pytest.raises(OSError, match="No space left"):
            train(config)
        monkeypatch.setattr(runs, "save_generator", write)
    else:
        train(config)
        path.unlink() if lost == "the file" else path.write_bytes(whole[:-100])
    (config.out / "README.md").unlink(missing_ok=True)
    assert not path.exists() or path.read_bytes() != whole
    train(config)
    assert path.read_bytes() == whole and (config.out / "README.md").exists()


@pytest.mark.parametrize(
    "left",
    [
        0,
        40,
        160,
        *(pytest.param(left, marks=pytest.mark.slow) for left in (8, 90, 300, 500)),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    trained_once, trained: Config, small_disk: Path, command, capfd, left
):
    config = replace(trained, out=small_disk / "run", epochs=3)
    shutil.copytree(trained.out, config.out)
    filler = fill(small_disk, left * 1024)
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "parse_settings", lambda *_: config)
        code = command()
    out, err = capfd.readouterr()
    assert code in (0, 2)
    if code:
        assert err.count("error: ") == 1 and "No space left on device" in err
    assert "Traceback" not in out + err
    assert load_checkpoint(checkpoints(config.out)[-1])["cur_nimg"] >= 16
    filler.unlink()
    train(config)
    assert_same_run(trained_once(epochs=3), config)
    assert left_over(config.out) == []


def test_a_disk_that_fills_while_slices_are_decoded_is_one_line(
    config: Config, small_disk: Path, monkeypatch
):
    config = replace(config, cache=small_disk / "cache", img_resolution=64)
    config.cache.mkdir()
    filler = fill(small_disk, 50_000)  # of 98,000 that are needed
    with monkeypatch.context() as patch:  # as another process may take it after we looked
        patch.setattr(dataset.shutil, "disk_usage", lambda _: type("", (), {"free": 10**9})())
        with pytest.raises(OSError, match="No space left"):
            load_slices(config)
    assert left_over(config.cache) == []
    filler.unlink()
    assert len(load_slices(config)[0]["train"].images) == 16


def test_an_output_folder_that_vanishes_is_one_line(config: Config, monkeypatch, command, capfd):
    step, calls = training.train_step, itertools.count(1)

    def remove(*args):
        if next(calls) == 3:
            shutil.rmtree(config.out)
        return step(*args)

    monkeypatch.setattr(training, "train_step", remove)
    monkeypatch.setattr(training, "parse_settings", lambda *_: config)
    assert command() == 2
    err = capfd.readouterr().err
    assert "error: " in err and "Traceback" not in err


# Damaged checkpoints


@pytest.mark.parametrize("damage", ["a bit", "another bit", "an end"])
def test_a_damaged_newest_checkpoint_changes_nothing(trained_once, whole: Config, damage, capsys):
    """Nor do half lines in the logs, as a killed run may leave them."""
    newest = checkpoints(whole.out)[-1]
    content = bytearray(newest.read_bytes())
    if damage == "an end":
        content = content[:1000]
    else:
        rng = np.random.default_rng(len(damage))
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    newest.write_bytes(content)
    for name, half in (("losses.csv", "52,0.7,0."), ("log.jsonl", '{"epoch": 4, "ni')):
        with open(whole.out / name, "a") as file:
            file.write(half)
    train(replace(whole, epochs=4))
    assert_same_run(trained_once(epochs=4), whole)
    if damage == "an end":
        assert f"warning: {newest} is truncated" in capsys.readouterr().out


def test_without_a_whole_checkpoint_nothing_is_overwritten(whole: Config):
    for path in checkpoints(whole.out):
        path.write_bytes(path.read_bytes()[:5000])
    before = {p: p.read_bytes() for p in whole.out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="all checkpoints are damaged"):
        train(replace(whole, epochs=4))
    assert {p: p.read_bytes() for p in whole.out.rglob("*") if p.is_file()} == before


def test_lost_checkpoints_do_not_start_the_run_anew(whole: Config):
    shutil.rmtree(whole.out / "checkpoints")
    generator = (whole.out / "generator.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists, but no checkpoint to resume from"):
        train(whole)
    assert (whole.out / "generator.safetensors").read_bytes() == generator


def test_other_files_among_the_checkpoints_are_left_alone(whole: Config):
    folder = whole.out / "checkpoints"
    shutil.copy(checkpoints(whole.out)[0], folder / "best.pt")
    (folder / "zzz.pt").write_bytes(b"foreign")
    train(replace(whole, epochs=4))
    assert read_log(whole.out)[-1]["nimg"] == 64
    assert {"best.pt", "zzz.pt"} < {p.name for p in folder.iterdir()}


def change_first(state: dict) -> None:
    state["G"]["synthesis.const"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("D"), "its checkpoint does not fit this version: .D."),
        (change_first, "its checkpoint does not fit"),
        (lambda state: state["g_opt"].update(state={}, param_groups=[]), "does not fit"),
        (lambda state: state.update(D=3), "does not fit"),
        (lambda state: state.update(cur_nimg="many"), "all checkpoints are damaged"),
        (lambda state: state.update(settings=None), "all checkpoints are damaged"),
    ],
)
def test_a_checkpoint_with_other_parts_is_one_line(whole: Config, change, words):
    for path in checkpoints(whole.out):
        state = load_checkpoint(path)
        change(state)
        torch.save(state, path)
    with pytest.raises(UserError, match=words):
        train(replace(whole, epochs=4))


def test_lost_memory_is_not_called_damage(whole: Config, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="too little memory to read it"):
        train(replace(whole, epochs=4))
    assert len(checkpoints(whole.out)) == 2


def test_out_of_gpu_memory_names_what_to_lower(config: Config, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training, "train_step", refuse)
    with pytest.raises(UserError, match=r"lower batch_size \(now 4\).*CUDA out of memory"):
        train(config)


def test_a_clock_that_is_set_back_is_no_obstacle(whole: Config, config: Config, monkeypatch):
    clock = itertools.count(2e9, -3600)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(clock))
        config = replace(whole, out=config.out)
        train(replace(config, epochs=2))
        train(config)
    assert_same_run(whole, config)


# Nothing unsafe is loaded


@pytest.fixture
def no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are not arranged by UMAP and t-SNE: that takes long, and reads no file."""
    monkeypatch.setattr(prediction, "draw_embedding", lambda *_: None)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("target", ["checkpoint", "zip", "generator", "encoder", "cache"])
def test_a_pickle_is_never_run(measured, tmp_path: Path, target, short_encoder, no_embedding):
    config, mark = replace(measured, epochs=2), tmp_path / "was here"
    evil = pickle.dumps(Evil(mark))
    newest = checkpoints(config.out)[-1]
    if target == "checkpoint":
        newest.write_bytes(evil)
    if target == "zip":
        with zipfile.ZipFile(newest, "w") as file:
            file.writestr("archive/data.pkl", evil)
            file.writestr("archive/version", "3")
    if target == "generator":
        (config.out / "generator.safetensors").write_bytes(evil)
    if target == "encoder":
        (config.out / "encoder.safetensors").write_bytes(evil)
    if target == "cache":
        for path in config.cache.glob("*.npy"):
            with open(path, "wb") as file:
                np.save(file, np.array([Evil(mark)], object), allow_pickle=True)
    for use in (lambda: train(config), lambda: predict(Options(config.out, count=2))):
        try:
            use()
        except UserError:
            assert target in ("checkpoint", "zip", "generator")
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()  # it would have been


def attack(run: Path, **changes: object) -> None:
    """Change config.json, settings or classes."""
    content = json.loads((run / "config.json").read_text())
    classes = changes.pop("classes", content["classes"])
    content["settings"] |= changes
    (run / "config.json").write_text(json.dumps(content | {"classes": classes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["../../x", "NC"]}, "a class is named like a path"),
        ({"classes": ["/tmp/x", "NC"]}, "a class is named like a path"),
        ({"classes": [".."]}, "a class is named like a path"),
        ({"augment": "bogus"}, "augment = bogus"),
        ({"seed": 0.5}, "seed = 0.5"),
        ({"w_dim": True}, "w_dim = True"),
        ({"w_dim": 10**9}, "w_dim = 1000000000: must be int, 1 to 65536"),
        ({"mapping_layers": 10**9}, "mapping_layers = 1000000000"),
        ({"z_dim": 2**16, "w_dim": 2**16, "channel_max": 2**16}, "does not fit"),
        ({"img_resolution": 512, "channel_base": 2**20, "channel_max": 2**16}, "does not fit"),
    ],
)
def test_a_shared_run_leads_nowhere_and_takes_no_memory(whole: Config, tmp_path, changes, words):
    run = shutil.copytree(whole.out, tmp_path / "shared")
    attack(run, **changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        predict(Options(run, out=tmp_path / "figures"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shared_run_does_not_choose_where_its_cache_goes(
    whole: Config, tmp_path, monkeypatch, no_embedding
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = shutil.copytree(whole.out, tmp_path / "shared")
    (tmp_path / "victim").mkdir()
    attack(run, cache=str(tmp_path / "victim"))
    paths = json.loads((run / "paths.json").read_text()) | {"cache": str(tmp_path / "victim")}
    (run / "paths.json").write_text(json.dumps(paths))
    predict(Options(run, count=2))
    assert list((tmp_path / "victim").iterdir()) == []
    assert (tmp_path / "here" / "cache").is_dir()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "{" + " " * 2_000_000 + "}"])
def test_deep_or_long_settings_are_one_line(tmp_path: Path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json cannot be read"):
        read_run_config(tmp_path)


# Caches


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_flipped_byte_in_a_cache_is_found_and_made_anew(measured, short_encoder, capsys):
    config = replace(measured, epochs=2)
    good = {p.name: p.read_bytes() for p in config.cache.iterdir() if p.is_file()}
    assert any("encoder" in name for name in good) and len(good) >= 4
    for path in config.cache.iterdir():
        if path.is_file():
            flip(path, len(good[path.name]) // 2)
    flip(config.out / "encoder.safetensors", 5000)
    capsys.readouterr()
    train(config)
    assert {p.name: p.read_bytes() for p in config.cache.iterdir() if p.is_file()} == good
    assert capsys.readouterr().out.count("is damaged, and is made again") == len(good) + 1


def test_a_flipped_byte_in_a_shared_generator_is_found(whole: Config):
    flip(whole.out / "generator.safetensors", -100)
    with pytest.raises(UserError, match="its values are not what was written"):
        load_generator(whole.out)


def test_a_sealed_array_is_an_array_for_others(tmp_path: Path):
    made = []

    def write(path: Path) -> None:
        made.append(path)
        with open(path, "wb") as file:
            np.save(file, np.arange(1000))

    path = tmp_path / "a.npy"
    for _ in range(2):
        assert (make_array_once(path, write) == np.arange(1000)).all()
    assert len(made) == 1 and has_checksum(path) and (np.load(path) == np.arange(1000)).all()
    for cut in (0, 3, 100, 4000):
        path.write_bytes(path.read_bytes()[:cut])
        assert not has_checksum(path)
        make_array_once(path, write)
    (tmp_path / "b.npy").write_bytes(b"")
    append_checksum(tmp_path / "b.npy")
    with pytest.raises(UserError, match="b.npy is no array: delete it"):
        make_array_once(tmp_path / "b.npy", write)


def test_two_processes_of_one_number_write_under_two_names(tmp_path: Path):
    assert utils.partial_path(tmp_path / "a") != utils.partial_path(tmp_path / "a")


@pytest.mark.skipif(FORK is None, reason="forks")
def test_of_many_processes_one_decodes(tmp_path: Path, monkeypatch):
    root = write_folder(tmp_path / "data", {"train": 10, "test": 4})
    config, decode = replace(tiny(tmp_path), data_root=root), dataset.resized_scan

    def slow(paths, resolution):
        (tmp_path / f"{os.getpid()}-{paths[0].name}").touch()
        time.sleep(0.02)
        return decode(paths, resolution)

    monkeypatch.setattr(dataset, "resized_scan", slow)
    children = [FORK.Process(target=load_slices, args=(config,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len({p.name.split("-")[0] for p in tmp_path.glob("*.png")}) == 1
    assert len(list(tmp_path.glob("*.png"))) == 28 and left_over(config.cache) == []


# Long runs


def test_a_long_run_takes_no_memory_before_it_starts(config: Config):
    slices = load_slices(config)[0]["train"]
    loader = make_loader(slices, config, 0, 10**12)
    assert len(next(iter(loader))[0]) == 4


def test_losses_are_read_as_they_were_written_without_damaged_lines(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 1 + len(STATS))) * 10.0 ** rng.integers(-12, 12, (200, 1))
    rows[rng.random(rows.shape) < 0.3] = np.nan
    rows[-1, -2:], rows[5, 3], rows[6, 3] = np.nan, np.inf, -np.inf
    rows[:, 0] = np.arange(2, 802, 4) + 10**9 * (np.arange(200) > 100)
    lines, head = losses_text(rows).splitlines(), ",".join(("nimg", *STATS))
    for bad in (None, "x" + lines[3], lines[3] + ",1", lines[3][5:], lines[2], "", ",", "4_0" * 12):
        some = lines if bad is None else [*lines[:3], bad, *lines[3:]]
        (tmp_path / "losses.csv").write_text("\n".join([head, *some, ""]))
        np.testing.assert_allclose(read_losses(tmp_path), rows, rtol=1e-8)


def test_whole_logs_are_not_written_again(whole: Config):
    before = [(whole.out / n).stat().st_mtime_ns for n in ("losses.csv", "log.jsonl")]
    train(whole)
    assert before == [(whole.out / n).stat().st_mtime_ns for n in ("losses.csv", "log.jsonl")]


def test_helpers_of_this_file_can_fail(whole: Config, config: Config, monkeypatch):
    """The comparison that all of the above rests on sees a step that differs."""
    step = training.ema_step

    def forget(state: training.TrainingState) -> None:
        if state.cur_nimg != 8:
            step(state)

    monkeypatch.setattr(training, "ema_step", forget)
    config = replace(whole, out=config.out)
    train(config)
    with pytest.raises(AssertionError):
        assert_same_run(whole, config)
