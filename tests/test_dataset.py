"""Finding, decoding and loading slices; every kind of bad input; the demo brains."""

import csv
import os
import pickle
import platform
import struct
import subprocess
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_slice, write_folder
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import dataset
import prepare
from assets import demo_brains
from assets.demo_brains import draw_subject, load_template, subject_rng, write_demo
from config import Config, UserError
from dataset import (
    SPLITS,
    TrainingSlices,
    augment,
    decode,
    find_slices,
    load_slices,
    make_loader,
    normalize,
    pad_to_square,
)
from participants.names import normalized
from prepare import clean
from scans.checks import check
from training import runs
from training.process import tune
from utils import NUM_POSITIONS, conditions, machine, run_command


@pytest.fixture
def grey() -> np.ndarray:
    """A slice of 24 x 20 pixels."""
    return draw_slice(np.random.default_rng(1), (24, 20), dark=True)


# Finding


def test_classes_participants_and_splits_are_read_from_the_names(data_root: Path):
    classes, splits = find_slices(data_root)
    assert classes == ["AD", "NC"]
    assert [len(splits[s]) for s in ("train", "test")] == [16, 8]
    first = splits["train"][0]
    assert (first.path.name, first.participant, first.label) == ("1_0.png", "1", 0)


def test_class_folders_alone_are_split_by_participant_the_same_way_each_time(tmp_path: Path):
    root = write_folder(tmp_path / "flat", {"": 10}, slices=3)
    _, splits = find_slices(root)
    people = {k: {f.participant for f in files} for k, files in splits.items()}
    assert not people["train"] & people["test"] and len(people["train"] | people["test"]) == 20
    for label in range(2):
        assert len({f.participant for f in splits["test"] if f.label == label}) == 2
    assert find_slices(root)[1] == splits


def test_a_participant_of_two_classes_stays_on_one_side(tmp_path: Path):
    root = write_folder(tmp_path / "flat", {"": 10})
    for path in list((root / "AD").iterdir()):  # everyone was NC once
        Image.open(path).save(root / "NC" / path.name)
    _, splits = find_slices(root)
    assert not {f.participant for f in splits["train"]} & {f.participant for f in splits["test"]}


def test_any_number_of_classes(data_root: Path):
    for split in ("train", "test"):
        folder = data_root / split / "MCI"
        folder.mkdir()
        Image.new("L", (20, 24)).save(folder / f"{split}_1.png")
    assert find_slices(data_root)[0] == ["AD", "MCI", "NC"]


def test_slices_of_a_scan_come_in_their_order(tmp_path: Path):
    root = write_folder(tmp_path / "flat", {"": 2}, slices=11)
    names = [f.path.stem for f in dataset.list_slices(root / "AD", 0) if f.participant == "1"]
    assert names == [f"1_{i}" for i in range(11)]


def test_hidden_and_other_files_are_left_alone(data_root: Path):
    folder = data_root / "train" / "AD"
    for name in (".DS_Store", "._1_0.png", "notes.txt"):
        (folder / name).write_text("x")
    (data_root / "train" / ".hidden").mkdir()
    assert len(find_slices(data_root)[1]["train"]) == 16


def expect_error(root: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        find_slices(root)
    for word in words:
        assert word in str(error.value)


def pictures(folder: Path, *names: str) -> None:
    """Small images, for which folders are made."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / name)


def files(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


DICOM = bytes(128) + b"DICM"
CUT = "python prepare.py import {root} --out FOLDER cuts slices"
MISTAKES = {  # what lies there, and what the message says of it
    "volumes": (
        lambda r: files(r, "a.nii", "b.nii.gz", "c.NII.GZ"),
        "{root} holds no class folders", f"; found 3 NIfTI volume(s): {CUT}",
    ),
    "one volume per class": (
        lambda r: files(r, "AD/sub-1/anat/a.nii.gz", "AD/notes.txt"),
        "{root}/AD holds no image files", f"; found 1 NIfTI volume(s): {CUT}",
    ),
    "DICOM": (
        lambda r: files(r, "p1/s1/IM0001", "p1/s1/1.2.840.113", "p2/x.dcm", content=DICOM),
        f"; found 3 DICOM file(s): {CUT}",
    ),
    "an archive": (lambda r: files(r, "AD_NC.zip"), "; unpack {root}/AD_NC.zip first"),
    "the folder above": (
        lambda r: pictures(r, "AD_NC/train/AD/1_0.png", "AD_NC/test/AD/2_0.png"),
        "; did you mean {root}/AD_NC?",
    ),
    "two folders above, and an archive's rest": (
        lambda r: (pictures(r, "x/y/AD/1_0.png", "x/y/NC/2_0.png"), files(r, "__MACOSX/._1.png")),
        "; did you mean {root}/x/y?",
    ),
    "no classes": (
        lambda r: pictures(r, "1_0.png", "1_1.jpg"),
        "; 2 images lie in {root} itself: they belong into a folder for each class, such as {root}",
    ),
    "no classes in a split": (
        lambda r: pictures(r, "train/1_0.png", "test/2_0.png"),
        "{root}/train holds no class folders", "; 1 images lie in {root}/train itself",
    ),
    "no test set": (
        lambda r: pictures(r, "train/AD/1_0.png", "train/NC/2_0.png"),
        "train/ but no test/", "add test/, or leave out both",
    ),
    "patients in classes": (
        lambda r: pictures(r, "AD/p1/1_0.png", "NC/p2/2_0.png"),
        "{root}/AD holds no image files", "; images lie too deep, such as {root}/AD/p1/1_0.png",
    ),
    "other case": (
        lambda r: pictures(r, "Train/AD/1_0.png", "Test/AD/2_0.png"),
        "{root} has Test and Train: rename them to train and test",
    ),
    "other names": (
        lambda r: pictures(r, "training/AD/1_0.png", "validation/AD/2_0.png"),
        "{root} has training and validation: rename them to train and test",
    ),
    "splits without classes": (
        lambda r: pictures(r, "Train/1_0.png", "VAL/2_0.png"),
        "{root} has Train and VAL: rename them to train and test",
    ),
    "one other name": (
        lambda r: pictures(r, "train/AD/1_0.png", "val/AD/2_0.png"),
        "{root} has train/ but no test/; rename val to test",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_lies_in_a_wrong_folder_is_told(tmp_path: Path, mistake):
    make, *words = MISTAKES[mistake]
    root = tmp_path / "root"
    make(root)
    words = [text.format(root=root) for text in words]
    expect_error(root, *words)
    with pytest.raises(UserError) as error:
        check(root, out=tmp_path / "check.png")
    assert all(text in str(error.value) for text in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.zip", "is no folder; unpack {path} first"),
        ("a.tar.gz", "is no folder; unpack {path} first"),
        ("a.nii.gz", f"is no folder; found 1 NIfTI volume(s): {CUT}"),
        ("train/AD/1_0.png", "is no folder; did you mean {root}?"),
        ("a.txt", "is no folder"),
    ],
)
def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path, name, words):
    files(tmp_path, name)
    path = tmp_path / name
    expect_error(path, f"data_root = {path}: {words.format(path=path, root=tmp_path)}")


def test_classes_may_have_names_like_splits(tmp_path: Path):
    names = [f"{label}/{number}_0.png" for label in ("training", "rest") for number in range(5)]
    pictures(tmp_path / "data", *names)
    assert find_slices(tmp_path / "data")[0] == ["rest", "training"]


def test_an_empty_class_beside_a_full_one_gets_no_wrong_advice(data_root: Path):
    (data_root / "train" / "ZZ").mkdir()
    with pytest.raises(UserError) as error:
        find_slices(data_root)
    assert str(error.value) == f"class folder {data_root / 'train' / 'ZZ'} holds no image files"


def test_classes_that_differ_are_listed(data_root: Path):
    (data_root / "test" / "NC").rename(data_root / "test" / "CN")
    expect_error(data_root, "classes differ", "['AD', 'NC']", "['AD', 'CN']")


def test_too_few_participants_to_split_name_the_class(tmp_path: Path):
    root = write_folder(tmp_path / "flat", {"": 2}, slices=1)
    next((root / "NC").iterdir()).unlink()
    expect_error(root, "NC: too few participants")


SCANS = {  # names of the scans of a person, by study
    "ADNI": "ADNI_{0:03}_S_{1:04}_MR_MPRAGE_br_raw_2006_{2}_S1_I{0}{1}{2}",
    "OASIS-1": "OAS1_{1:04}_MR{2}",
    "OASIS-2": "OAS2_{1:04}_MR{2}",
    "OASIS-3": "OAS3{1:04}_MR_d0{2}00",
    "BIDS": "sub-{1:02}_ses-{2}_T1w",
}


def write_people(root: Path, name: str, people: int = 12, visits: int = 2) -> Path:
    """So many scans of each person, one slice each; the class may change from scan to scan."""
    rng = np.random.default_rng(0)
    for label in ("AD", "NC"):
        (root / label).mkdir(parents=True)
    for person in range(people):
        for visit in range(visits):
            folder = root / ("AD" if rng.random() < 0.3 + 0.4 * (person % 2) else "NC")
            path = folder / f"{name.format(person % 7, person, visit)}_80.png"
            Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8)).save(path)
    return root


@pytest.mark.parametrize("study", SCANS)
def test_scans_of_a_person_are_on_one_side_of_the_split(tmp_path: Path, study, capsys):
    _, splits = find_slices(write_people(tmp_path / "flat", SCANS[study]))
    people = {k: {f.participant for f in files} for k, files in splits.items()}
    assert len(people["train"] | people["test"]) == 12 and not people["train"] & people["test"]
    assert min(map(len, people.values())) >= 2
    assert "24 scans are of 12 participants by their names" in capsys.readouterr().out


@pytest.mark.parametrize("study", SCANS)
def test_a_test_set_with_scans_of_training_people_is_refused(tmp_path: Path, study):
    for split in ("train", "test"):
        write_people(tmp_path / "ours" / split, SCANS[study])
    with pytest.raises(UserError, match=r"12 participant\(s\) on both sides of the split: "):
        find_slices(tmp_path / "ours")


def test_a_table_without_participants_does_not_hide_those_in_names(tmp_path: Path):
    rows = ["Image Data ID,Group"]
    for number, split in enumerate(("train", "test")):
        for person in range(4):
            scan, label = f"I{number}{person}00", ("AD", "NC")[person % 2]
            pictures(tmp_path / "ours", f"{split}/{label}/002_S_000{person}_{scan}_0.png")
            rows.append(f"{scan},{label}")
    table = tmp_path / "ids.csv"
    table.write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"4 participant\(s\) on both sides of the split: 002_S"):
        find_slices(tmp_path / "ours", table=table)


@pytest.mark.parametrize("names", [("P000", "p000"), ("Zo\xeb1", "Zoe\u03081")])
def test_names_that_differ_in_case_or_accents_are_one_person(tmp_path: Path, names):
    for split, name in zip(("train", "test"), names, strict=True):
        pictures(tmp_path, *(f"{split}/{label}/{name}{label}_0.png" for label in "AB"))
    with pytest.raises(UserError, match=r"2 participant\(s\) on both sides"):
        find_slices(tmp_path)


def test_class_folders_may_write_an_accent_in_both_ways(tmp_path: Path):
    for split, name in (("train", "\xc4lter"), ("test", "A\u0308lter")):
        pictures(tmp_path, f"{split}/{name}/{split}1_0.png", f"{split}/B/{split}2_0.png")
    classes, splits = find_slices(tmp_path)
    for files in splits.values():
        assert {normalized(f.path.parent.name): f.label for f in files} == {
            name: classes.index(name) for name in ("\xc4lter", "B")
        }


def test_the_numbers_of_adni_s_images_need_a_table(tmp_path: Path, capsys):
    root = write_people(tmp_path / "flat", "2{1:04}{2}")  # names such as 200070_80
    find_slices(root)
    assert (
        "warning: 24 scans, such as 200000, count as one participant each"
        in capsys.readouterr().out
    )
    table = tmp_path / "table.csv"
    rows = [f'"I2{p:04}{v}","{p:03}_S_{p:04}","AD"' for p in range(12) for v in range(2)]
    table.write_text("\n".join(['"Image Data ID","Subject","Group"', *rows]) + "\n")
    _, splits = find_slices(root, table=table)
    people = {k: {f.participant for f in files} for k, files in splits.items()}
    assert len(people["train"] | people["test"]) == 12 and not people["train"] & people["test"]


def test_a_table_overrules_names_and_a_manifest_too(tmp_path: Path, config: Config, capsys):
    root = write_people(tmp_path / "flat", "OAS1_{1:04}_MR{2}")
    table = tmp_path / "table.csv"  # two ids of OASIS are one person
    rows = [f"OAS1_{p:04}_MR{v},P{p // 2}" for p in range(12) for v in range(2)]
    table.write_text("\n".join(["MRI ID,Subject", *rows]) + "\n")
    splits, _ = load_slices(replace(config, data_root=root, table=table))
    people = {k: set(part.participants) for k, part in splits.items()}
    assert people["train"] | people["test"] == {f"P{i}" for i in range(6)}
    assert not people["train"] & people["test"]
    assert "names 24 of 24 scans" in capsys.readouterr().out
    (root / "participants.csv").write_text(table.read_text())
    found = [
        set(part.participants) for part in load_slices(replace(config, data_root=root))[0].values()
    ]
    assert set.union(*found) == {f"P{i}" for i in range(6)}
    assert "unused" not in capsys.readouterr().out
    (root / "manifest.csv").write_text("id,participant,class\nOAS1_0000_MR0,Q,AD\n")
    assert "Q" in {f.participant for part in find_slices(root)[1].values() for f in part}
    assert "Q" not in {
        f.participant for part in find_slices(root, False, table)[1].values() for f in part
    }
    table.write_text("subject,sex\nsomeone,F\n")
    with pytest.raises(UserError, match="table.csv names none of the scans"):
        load_slices(replace(config, data_root=root, table=table))


def test_scans_that_a_table_lacks_are_of_the_people_it_lists(tmp_path: Path):
    for split, visit in (("train", 0), ("test", 1)):
        write_people(tmp_path / "ours" / split, f"OAS1_{{1:04}}_MR{visit}", visits=1)
    table = tmp_path / "table.csv"
    table.write_text("scan,subject\n" + "".join(f"OAS1_{p:04}_MR0,P{p}\n" for p in range(12)))
    with pytest.raises(UserError, match=r"12 participant\(s\) on both sides of the split: P0"):
        find_slices(tmp_path / "ours", False, table)


def test_the_table_of_a_run_is_left_out_for_slices_it_does_not_name(
    tmp_path: Path, config: Config, capsys
):
    root, table = write_people(tmp_path / "ours", "sub-{1:02}_ses-{2}"), tmp_path / "table.csv"
    table.write_text("scan,subject\nx1,P1\n")
    run = replace(config, table=table, data_root=None)
    splits, _ = runs.load_real(run, ["AD", "NC"], root, None)
    assert len(set(splits["train"].participants) | set(splits["test"].participants)) == 12
    assert f"note: the table of the run is not used: {table} names none" in capsys.readouterr().out
    with pytest.raises(UserError, match="table.csv names none of the scans"):
        runs.load_real(run, ["AD", "NC"], root, table)
    for split in SPLITS:
        write_people(tmp_path / "both" / split, f"{split}{{1:04}}", visits=1)
    lines = [f"{split}{p:04},P{p}\n" for p in range(12) for split in SPLITS]
    table.write_text("scan,subject\n" + "".join(lines))  # of these it names all
    with pytest.raises(UserError, match=r"12 participant\(s\) on both sides of the split: P0"):
        runs.load_real(run, ["AD", "NC"], tmp_path / "both", None)
    table.unlink()
    runs.load_real(run, ["AD", "NC"], root, None)
    assert f"is not used: {table} cannot be read" in capsys.readouterr().out


def test_the_encoder_s_positions_are_those_of_scans_not_of_people(tmp_path: Path, config: Config):
    root = tmp_path / "flat"
    for person in range(6):
        for visit in range(2):
            for i in range(3):
                path = root / ("AD", "NC")[person % 2] / f"sub-{person}_ses-{visit}_{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (16, 16), 20 * i + person).save(path)
    train = load_slices(replace(config, data_root=root))[0]["train"]
    assert len(set(train.participants)) * 2 == len(set(train.scans))
    assert dataset.find_positions(train.scans).tolist() == [0, 0.5, 1] * (len(train.labels) // 3)


def test_files_that_are_each_a_participant_of_their_own_are_pointed_out(
    tmp_path: Path, config, capsys
):
    root = write_folder(tmp_path / "flat", {"": 3}, slices=2)
    load_slices(replace(config, data_root=root))
    assert "note: every" not in capsys.readouterr().out
    for path in list(root.rglob("*.png")):
        path.rename(path.with_name(path.name.replace("_", "-")))
    load_slices(replace(config, data_root=root))
    assert "note: every file counts as a participant of its own" in capsys.readouterr().out


# Decoding


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".tif", ".bmp", ".gif", ".webp"])
def test_any_format_gives_the_same_grey_image(tmp_path: Path, grey, suffix):
    path = tmp_path / f"1_0{suffix}"
    Image.fromarray(grey).save(path, **({"quality": 100} if suffix in (".jpeg", ".webp") else {}))
    image = decode(path)
    assert image.dtype == torch.uint8 and image.shape == (1, 24, 20)
    assert (image[0].float() - torch.from_numpy(grey).float()).abs().mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P", "LA", "YCbCr"])
def test_any_mode_becomes_grey(tmp_path: Path, grey, mode):
    path = tmp_path / ("1_0.png" if mode in ("RGB", "RGBA", "P", "LA") else "1_0.tif")
    Image.fromarray(grey).convert(mode).save(path)
    image = decode(path)
    assert image.shape == (1, 24, 20)
    assert (image[0].float() - torch.from_numpy(grey).float()).abs().max() <= 3


def test_transparent_pixels_are_black(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "1_0.png")
    assert decode(tmp_path / "1_0.png").max() == 0


def test_16_bit_keeps_its_range_with_one_scale_per_scan(tmp_path: Path, config: Config, grey):
    """Twelve bits in sixteen: bright and dark slice of one scan keep their ratio."""
    root = tmp_path / "deep"
    for split, number in (("train", 1), ("test", 2)):
        (root / split / "AD").mkdir(parents=True)
        for i, scale in enumerate((16, 8)):
            deep = Image.fromarray(grey.astype(np.uint16) * scale)
            deep.save(root / split / "AD" / f"{number}_{i}.png")
    slices, _ = load_slices(replace(config, data_root=root))
    bright, dim = slices["train"].images.astype(float)
    assert bright.max() > 230
    assert dim.sum() / bright.sum() == pytest.approx(0.5, abs=0.02)


def test_slices_are_padded_never_stretched():
    image = pad_to_square(torch.full([1, 10, 6], 7, dtype=torch.uint8))
    assert image.shape == (1, 10, 10)
    assert (image[:, :, 2:8] == 7).all() and image.sum() == 7 * 60
    assert pad_to_square(torch.ones(1, 5, 8)).sum(2).tolist() == [[0, 8, 8, 8, 8, 8, 0, 0]]


def test_resizing_is_antialiased(tmp_path: Path, config: Config):
    """Stripes finer than a pixel become grey, not a coarser pattern."""
    stripes = np.tile(np.arange(128) % 3 == 0, (128, 1)) * 255
    for split in ("train", "test"):
        (tmp_path / "fine" / split / "AD").mkdir(parents=True)
        path = tmp_path / "fine" / split / "AD" / f"{split}_0.png"
        Image.fromarray(stripes.astype(np.uint8)).save(path)
    slices, _ = load_slices(replace(config, data_root=tmp_path / "fine"))
    assert abs(slices["train"].images[0].astype(float) - 85).max() < 15


def test_mixed_sizes_are_fine(data_root: Path, config: Config):
    Image.new("L", (300, 50), 200).save(data_root / "train" / "AD" / "1_9.png")
    slices, _ = load_slices(config)
    assert slices["train"].images.shape == (17, 16, 16)


def test_a_file_takes_no_memory_that_it_does_not_hold(data_root: Path, config: Config):
    """A hundred bytes of 20,000 x 1 pixels would become a square of 1.6 GB in float."""
    Image.new("L", (20_000, 1)).save(data_root / "train" / "AD" / "long_1.png")
    with pytest.raises(UserError, match="long_1.png: 20000 x 1 pixels: a side has at most 8192"):
        load_slices(config)


def test_no_file_starts_another_program(data_root: Path, config: Config, tmp_path, monkeypatch):
    """Pillow reads EPS by Ghostscript, whatever the file's name is."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    Image.new("L", (8, 8)).save(data_root / "train" / "AD" / "page_1.eps")
    assert len(load_slices(config)[0]["train"].labels) == 16  # by its name, it is no slice
    (data_root / "train" / "AD" / "page_1.eps").rename(data_root / "train" / "AD" / "page_1.png")
    with pytest.raises(UserError, match="page_1.png: not an image"):
        load_slices(config)
    assert not (tmp_path / "started").exists()


def test_all_bad_files_are_reported_in_one_table(data_root: Path, config: Config):
    folder = data_root / "train" / "AD"
    (folder / "text_1.jpeg").write_text("not an image")
    (folder / "empty_1.png").touch()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(
        folder / "cut_1.jpeg"
    )
    (folder / "cut_1.jpeg").write_bytes((folder / "cut_1.jpeg").read_bytes()[:700])
    (folder / "link_1.png").symlink_to(folder / "nowhere.png")
    pages = [Image.new("L", (8, 8), grey) for grey in (0, 200)]
    pages[0].save(folder / "pages_1.tif", save_all=True, append_images=pages[1:])
    nan = np.full((4, 4), np.nan, np.float32)
    Image.fromarray(nan).save(data_root / "test" / "NC" / "nan_1.tif")
    with pytest.raises(UserError) as error:
        load_slices(config)
    lines = str(error.value).splitlines()
    assert lines[0] == "6 of 30 files cannot be used:"
    problems = {
        "text_1.jpeg": "not an image",
        "empty_1.png": "empty file",
        "cut_1.jpeg": "truncated",
        "nan_1.tif": "not finite",
        "link_1.png": "No such file",
        "pages_1.tif": "more than one image",
    }
    for name, problem in problems.items():
        assert sum(name in line and problem in line for line in lines[1:]) == 1
    assert list(config.cache.iterdir()) == []
    with pytest.raises(UserError) as checked:
        check(data_root, out=config.out / "check.png")
    assert all(line in str(checked.value) for line in lines[1:])


@pytest.mark.parametrize("form", ["z-10 z-2 z+0 z+4 z+11", "z_-10 z_-2 z_0 z_4 z_11",
                                  "slice-0 slice-2 slice-4 slice-10 slice-011"])  # fmt: skip
def test_slices_come_in_the_order_of_their_numbers(tmp_path: Path, form):
    names = [f"sub-00_{name}.png" for name in form.split()]
    for name in names[::-1]:
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    assert [file.path.name for file in dataset.list_slices(tmp_path, 0)] == names


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_16_bits_of_each_colour_are_refused(tmp_path: Path, colour):
    """Pillow reads them as 8 bits: 12-bit values would become nearly black."""
    channels = {2: 3, 4: 2, 6: 4}[colour]
    rows = (b"\0" + bytes(2 * channels * 4)) * 4
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)),
             (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]  # fmt: skip
    chunks = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    ]
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ValueError, match="16 bits of each colour"):
        dataset.decode(path)


def test_an_interrupted_import_is_noticed(config: Config, capsys):
    rows = "".join(f"{i},{i}\n" for i in range(1, 20))
    (config.data_root / "manifest.csv").write_text(f"id,participant\n{rows}")
    load_slices(config)
    text = "lists 19 scans, 7 have no slices, such as 13: was the import interrupted?"
    assert text in capsys.readouterr().out


def test_a_run_does_not_go_where_its_slices_are(config: Config, tmp_path: Path):
    flat, split = write_folder(tmp_path / "flat", {"": 4}), config.data_root
    for root, place in ((split, ""), (split, "train/a"), (split, "test"), (flat, "runs/a")):
        for name in ("out", "cache") if place else ("out",):
            with pytest.raises(UserError, match=f"^{name} = .*: lies in .* folders are classes"):
                runs.open_run(replace(config, data_root=root, **{name: root / place}))
    for root, place in ((split, "runs"), (flat, ".runs"), (flat, "../flat2/runs")):
        assert runs.open_run(replace(config, data_root=root, out=root / place)) is None
    assert runs.open_run(replace(config, cache=split)) is None  # its files are no classes


def test_a_full_disk_is_said_before_anything_is_written(config: Config, monkeypatch):
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda _: type("", (), {"free": 10})())
    with pytest.raises(UserError, match="less is free"):
        load_slices(config)
    assert list(config.cache.iterdir()) == []


def test_images_are_decoded_once_and_again_when_a_file_changes(config: Config, monkeypatch):
    first, identity = load_slices(config)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "decode_all", None)  # a second decoding would fail
        again, _ = load_slices(config)
        assert isinstance(again["train"].images, np.memmap)
        assert (again["train"].images == first["train"].images).all()
    path = config.data_root / "train" / "AD" / "1_0.png"
    Image.new("L", (20, 24), 255).save(path)
    changed, other = load_slices(config)
    assert changed["train"].images[0].max() == 255 and other != identity


def write_tiff(path: Path, values: np.ndarray, sample_format: int, photometric: int = 1) -> None:
    """A grey TIFF of kinds that Pillow reads but does not write."""
    H, W = values.shape
    bits, data = values.dtype.itemsize * 8, values.tobytes()
    tags = [(256, W), (257, H), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
            (278, H), (279, len(data)), (339, sample_format)]  # fmt: skip
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + fields + bytes(4))


@pytest.mark.parametrize(
    ("kind", "sample_format", "photometric", "low", "high"),
    [
        ("f4", 3, 1, -1.0, 1.0), ("f4", 3, 1, -2.5, 4.0), ("i1", 2, 1, -100, 100),
        ("i2", 2, 1, -1000, 3000), ("i4", 2, 1, -70000, 90000), ("u2", 1, 1, 0, 60000),
        ("u4", 1, 1, 0, 4_000_000_000), ("u2", 1, 0, 65535, 0),
    ],
)  # fmt: skip
def test_no_value_of_any_kind_of_file_is_lost(
    tmp_path: Path, kind, sample_format, photometric, low, high
):
    """A ramp from black to white, in numbers of any sign and width; white may be zero."""
    ramp = np.linspace(low, high, 256).reshape(16, 16).astype(kind)
    write_tiff(tmp_path / "1_0.tif", ramp, sample_format, photometric)
    expected = np.linspace(0, 255, 256).reshape(16, 16)
    images, problems = dataset.resized_scan([tmp_path / "1_0.tif"], 16)
    assert problems == []
    np.testing.assert_allclose(images[0].numpy(), expected, atol=1.5)


def test_slices_of_a_scan_keep_one_scale_below_zero_too(tmp_path: Path):
    paths = [tmp_path / f"1_{i}.tif" for i in range(2)]
    for path, low in zip(paths, (-1.0, 0.0), strict=True):
        Image.fromarray(np.linspace(low, 1, 256, dtype=np.float32).reshape(16, 16)).save(path)
    dark, light = dataset.resized_scan(paths, 16)[0].float()
    assert dark.min() == 0 and light.min() == pytest.approx(127.5, abs=2)
    assert dark.max() == light.max() == 255


def test_files_of_one_scan_without_a_common_scale_are_refused(data_root: Path, config: Config):
    path = sorted((data_root / "train" / "AD").iterdir())[0]
    Image.fromarray(np.full((24, 20), 0.5, np.float32)).save(path.with_suffix(".tif"))
    path.unlink()
    with pytest.raises(
        UserError, match="8-bit and other files in one scan have no common grey scale"
    ):
        load_slices(config)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_the_orientation_that_a_camera_or_viewer_noted_is_honoured(tmp_path: Path, suffix):
    upright = np.zeros((24, 16), np.uint8)
    upright[:8, :8] = 250  # in the upper left corner
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / f"1_0{suffix}", exif=exif)
    found = dataset.decode(tmp_path / f"1_0{suffix}")[0].numpy()
    assert found.shape == (24, 16)
    assert found[:6, :6].mean() > 200 > 30 > found[:6, -6:].mean()
    assert found[-6:].mean() < 30


def test_a_pipe_called_like_an_image_is_named_and_not_waited_for(data_root: Path, config: Config):
    os.mkfifo(data_root / "train" / "AD" / "30_0.png")
    (data_root / "train" / "NC" / "31_0.png").mkdir()
    with pytest.raises(UserError, match=r"(?s)2 of 26 files.*AD/30_0.png: not a regular file"):
        load_slices(config)


def test_names_that_are_no_utf_8_or_hold_escape_codes_are_no_obstacle(
    data_root: Path, config: Config, capsys
):
    folder = data_root / "train" / "AD"
    bad = [b"\xff\xfe7_0.png", b"\x1b[31m8_0.png"]
    for path, name in zip(sorted(folder.iterdir()), bad, strict=False):
        path.rename(folder / os.fsdecode(name))
    load_slices(config)
    (folder / os.fsdecode(bad[0])).write_bytes(b"no image")
    (folder / os.fsdecode(bad[1])).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        run_command(lambda: check(data_root, out=config.out / "check.png"))
    out, err = capsys.readouterr()
    assert "\\udcff\\udcfe7_0.png: not an image" in err and "\\x1b[31m8_0.png: not an image" in err
    assert "\x1b" not in out + err


def test_what_is_not_used_is_counted_and_named(data_root: Path, config: Config, capsys):
    (data_root / "notes.txt").touch()
    for folder in ("val/AD", "train/AD/more/deep"):
        (data_root / folder).mkdir(parents=True)
        for i in range(3):
            (data_root / folder / f"{i}_0.png").touch()
    (data_root / "train" / "NC" / "list.csv").touch()
    table = data_root / "whose.csv"
    table.write_text("scan,subject\n1,p\n")
    load_slices(replace(config, table=table))
    out = capsys.readouterr().out
    for text in (f"1 in {data_root};", f"3 in {data_root}/val", f"3 in {data_root}/train/AD/more",
                 f"1 in {data_root}/train/NC"):  # fmt: skip
        assert text in out
    assert "train: AD 4 participants, 8 slices; NC 4 participants, 8 slices\n" in out


@pytest.mark.parametrize("split", [True, False])
def test_folders_of_patients_are_not_taken_for_classes(tmp_path: Path, config: Config, split):
    for number in range(25):
        for part in ("train", "test") if split else (".",):
            folder = tmp_path / "scans" / part / f"patient{number:03}"
            folder.mkdir(parents=True)
            for i in range(3):
                name = f"{part.strip(chr(46))}{number}x{i}_0.png"
                Image.fromarray(np.full((16, 16), 99, np.uint8)).save(folder / name)
    config = replace(config, data_root=tmp_path / "scans")
    with pytest.raises(UserError, match="25 class folders .patient000, .* --any-classes"):
        load_slices(config)
    assert len(load_slices(replace(config, any_classes=True))[0]["train"].classes) == 25
    assert load_slices(replace(config, conditional=False))[0]["train"].classes == ["all"]


def test_classes_of_a_single_participant_each_ask_for_consent(tmp_path: Path):
    black = Image.fromarray(np.zeros((16, 16), np.uint8))
    for part in ("train", "test"):
        for name in "abc":
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(3):
                black.save(folder / f"{part}{name}_{i}.png")
    expect_error(tmp_path, "3 class folders (a, b, c, ...) with a single participant each")
    assert find_slices(tmp_path, any_classes=True)[0] == ["a", "b", "c"]


def test_patients_with_two_scans_each_are_not_taken_for_classes(tmp_path: Path):
    names = [f"{k}/OAS1_000{k}_MR{v}_{i}.png" for k in (1, 2, 3) for v in (1, 2) for i in (0, 1)]
    pictures(tmp_path / "data", *names)
    expect_error(tmp_path / "data", "3 class folders (1, 2, 3, ...) with a single participant each")


def test_a_folder_that_may_not_be_read_is_one_line(data_root: Path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    expect_error(data_root, "train cannot be read: Permission denied")


@pytest.mark.parametrize("node", ["laptop", "n7.cluster.example"])
def test_what_a_killed_process_left_half_written_is_deleted(config: Config, monkeypatch, node):
    monkeypatch.setattr(platform, "node", lambda: node)
    config.cache.mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = f"{machine()}.0123abcd.partial"
    names = [f"a.npy.{ended.pid}@{here}", f"b.npy.{os.getpid()}@{here}",
             "c.npy.12@elsewhere.partial", "d.npy.12@elsewhere.partial"]  # fmt: skip
    for name in names:
        (config.cache / name).touch()
    os.utime(config.cache / names[3], (0, 0))  # of another machine, but old
    load_slices(config)
    assert [n for n in names if (config.cache / n).exists()] == names[1:3]


def test_clean_deletes_what_nothing_used_for_a_month_and_no_other_file(
    config: Config, monkeypatch, capsys
):
    load_slices(config)
    (used,) = config.cache.glob("*.npy")
    names = (f"{7:016x}-16.npy", "mine.txt", "demo-1", "twins-2-200")
    old, mine, demo, twins = (config.cache / name for name in names)
    others = {config.cache / name for name in ("my-results.npy", "poetry.lock", "demo-videos")}
    demo.mkdir()
    (demo / "x").write_text("x")
    for path in (old, mine, twins, *others):
        path.write_text("x")
    with suppress(UserError):
        check(config.data_root, cache=config.cache)
    (checked,), (sheet,) = config.cache.glob("check-*.txt"), config.cache.glob("check-*.png")
    (compiled := config.cache / "compiled").mkdir()
    for path in (used, old, mine, demo, twins, checked, sheet, compiled, *others):
        os.utime(path, (0, 0))
    load_slices(config)  # uses two of them again
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    tune(torch.device("cpu"), config.cache)
    clean(config.cache)
    assert "4 of 7 entries deleted" in capsys.readouterr().out
    assert set(config.cache.iterdir()) == {used, mine, checked, compiled} | others
    clean(config.cache, days=0)
    assert set(config.cache.iterdir()) == {mine} | others
    with pytest.raises(UserError, match="no such folder"):
        clean(config.cache / "none")


# Loading


def test_a_position_is_the_place_of_a_slice_in_its_scan(tmp_path: Path, config: Config):
    root = write_folder(tmp_path / "levels", {"train": 2, "test": 2}, slices=5)
    for path in root.glob("*/*/*_1.png"):
        path.rename(path.with_stem(path.stem.replace("_1", "_10")))  # 0, 2, 3, 4, 10
    for path in sorted(root.glob("test/AD/*"))[:4]:
        path.unlink()  # a single slice is left
    splits, _ = load_slices(replace(config, data_root=root, condition_position=True))
    assert splits["train"].positions.tolist() == [0, 0.25, 0.5, 0.75, 1] * 4
    assert splits["test"].positions[0] == 0.5
    assert load_slices(replace(config, data_root=root))[0]["train"].positions is None


def test_a_position_is_shared_out_between_its_neighbours():
    c = conditions(np.array([0, 1, 1]), np.array([0, 0.125, 1]), 2 * NUM_POSITIONS).unflatten(
        1, (2, -1)
    )
    torch.testing.assert_close(c.sum((1, 2)), torch.ones(3))
    assert c[0, 0].tolist() == [1, 0, 0, 0, 0] and c[1, 1].tolist() == [0.5, 0.5, 0, 0, 0]
    assert c[2, 1, -1] == 1 and c[0, 1].sum() == c[1, 0].sum() == 0
    assert conditions(np.zeros(2, int), np.array([0, 1]), NUM_POSITIONS).shape == (
        2,
        NUM_POSITIONS,
    )  # one class


def show(stream: TrainingSlices, nimg: int) -> tuple[np.ndarray, int]:
    """Image [R, R] at one position, and which slice it is."""
    images, rows = stream[range(nimg, nimg + 1)]
    return images[0], rows[0]


def test_a_slice_shown_depends_on_seed_and_position_only(config: Config):
    slices = load_slices(config)[0]["train"]
    stream, fresh = TrainingSlices(slices, config), TrainingSlices(slices, config)
    images, rows = stream[range(40)]
    torch.manual_seed(123)
    for nimg in (33, 5, 17):
        image, row = show(fresh, nimg)
        np.testing.assert_allclose(image.astype(int), images[nimg], atol=1)
        assert row == rows[nimg]
    other = TrainingSlices(slices, replace(config, seed=1))[range(16)][0]
    assert np.abs(other.astype(int) - images[:16]).max() > 12


def test_loading_leaves_the_global_random_state_alone(config: Config):
    stream = TrainingSlices(load_slices(config)[0]["train"], config)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    stream[range(3, 7)]
    assert torch.rand(1) == expected


def test_an_epoch_shows_every_slice_once_in_a_new_order(config: Config):
    slices = load_slices(config)[0]["train"]
    stream = TrainingSlices(slices, replace(config, augment="none"))
    orders = []
    for epoch in range(2):
        shown, rows = stream[range(epoch * 16, epoch * 16 + 16)]
        assert (shown == slices.images[rows]).all()
        assert sorted(rows) == list(range(16))
        orders.append(rows.tolist())
    assert orders[0] != orders[1]


def test_the_loader_goes_on_at_any_image_with_any_number_of_workers(config: Config):
    slices = load_slices(config)[0]["train"]
    whole = [image for image, _ in make_loader(slices, config, 0, 32)]
    parts = [image for image, _ in make_loader(slices, config, 12, 32)]
    workers = replace(config, num_workers=2)
    parallel = [image for image, _ in make_loader(slices, workers, 12, 32)]
    assert (np.concatenate(whole)[12:] == np.concatenate(parts)).all()
    assert (np.concatenate(parts) == np.concatenate(parallel)).all()


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_share_each_batch_evenly(config: Config, monkeypatch, ranks):
    slices = load_slices(config)[0]["train"]
    whole = list(make_loader(slices, config, 4, 32))
    shares = []
    for number in range(ranks):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("RANK", str(number))
        shares.append(list(make_loader(slices, config, 4, 32)))
    assert len(whole) == 7
    for step, (images, labels) in enumerate(whole):
        parts = [share[step] for share in shares]
        assert all(len(image) == 4 // ranks for image, _ in parts)
        joined = np.concatenate([image for image, _ in parts])
        np.testing.assert_allclose(joined.astype(int), images, atol=1)
        assert (np.concatenate([label for _, label in parts]) == labels).all()


def test_a_spawned_worker_gets_the_name_of_the_file_of_pixels_not_a_copy(config: Config):
    splits, _ = load_slices(replace(config, img_resolution=64))
    for slices in splits.values():
        stream = TrainingSlices(slices, config)
        sent = pickle.dumps(stream)
        assert len(sent) < slices.images.nbytes / 4
        assert (pickle.loads(sent)[range(12)][0] == stream[range(12)][0]).all()
    in_memory = replace(splits["test"], images=np.array(splits["test"].images))
    stream = TrainingSlices(in_memory, config)
    assert (pickle.loads(pickle.dumps(stream))[range(8)][0] == stream[range(8)][0]).all()


STILL = {"flip_prob": 0.0, "rotation": 0.0, "brightness": 0.0, "contrast": 0.0}


def ramp() -> torch.Tensor:
    return torch.arange(256.0).view(1, 1, 16, 16) / 255


def test_images_are_normalized_to_plus_minus_one(config: Config):
    slices = load_slices(config)[0]["train"]
    stream = TrainingSlices(slices, replace(config, augment="none"))
    images = normalize(torch.from_numpy(stream[range(16)][0]))
    assert (images.min(), images.dtype, images.shape[1]) == (-1, torch.float32, 1)
    assert images.max() == pytest.approx(slices.images.max() / 127.5 - 1)


def test_each_augmentation_can_be_turned_off(config: Config):
    draws = torch.tensor([[0.2, 0.9, 0.1, 0.3]])
    for flip_prob, expected in ((0.0, ramp()), (0.1, ramp()), (0.3, ramp().flip(3))):
        image = augment(ramp(), draws, replace(config, **STILL | {"flip_prob": flip_prob}))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)  # never up-down


def test_augmentations_do_what_they_are_named(config: Config):
    image, draws = ramp() * 0.6 + 0.2, torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    bright = augment(image, draws, replace(config, **STILL | {"brightness": 0.25}))
    torch.testing.assert_close(bright, image * 1.25)
    contrast = augment(image, draws, replace(config, **STILL | {"contrast": 0.2}))
    torch.testing.assert_close(contrast - image.mean(), (image - image.mean()) * 1.2)
    assert augment(image, draws, replace(config, **STILL | {"brightness": 1.0})).max() == 1
    turned = augment(image, draws, replace(config, **STILL | {"rotation": 90.0}))
    torch.testing.assert_close(turned, image.rot90(1, (2, 3)), rtol=0, atol=1e-5)


def test_every_image_has_draws_of_its_own(config: Config):
    images, draws = ramp().expand(3, -1, -1, -1), torch.rand(3, 4)
    config = replace(config, rotation=20.0)
    alone = torch.cat([augment(ramp(), draw[None], config) for draw in draws])
    torch.testing.assert_close(augment(images, draws, config), alone)


def test_rotation_turns_by_its_angle_and_fills_with_background(config: Config):
    config = replace(config, **STILL | {"rotation": 45.0})
    image = augment(torch.ones(1, 1, 16, 16), torch.tensor([[0.0, 1.0, 0.5, 0.5]]), config)
    assert image[0, 0, 0, 0] == 0 and image[0, 0, 8, 8] == 1
    assert 0.7 < image.mean() < 0.9  # an octagon is left: 2 sqrt(2) - 2


# Demo brains


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Demo brains of 6 training and 2 test subjects."""
    root = tmp_path_factory.mktemp("demo") / "brains"
    write_demo(root, num_train=6, num_test=2)
    return root


def manifest(root: Path) -> list[dict[str, str]]:
    with open(root / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_demo_brains_have_the_layout_of_the_real_set(demo: Path):
    classes, splits = find_slices(demo)
    assert classes == ["AD", "NC"]
    assert [len(splits[s]) for s in ("train", "test")] == [120, 40]
    image = Image.open(splits["train"][0].path)
    assert (image.size, image.mode, image.format) == ((256, 240), "L", "JPEG")
    rows = manifest(demo)
    people = {f.participant: (classes[f.label], s) for s, files in splits.items() for f in files}
    assert people == {row["participant"]: (row["class"], row["split"]) for row in rows}


def test_a_demo_subject_depends_on_its_number_only(demo: Path, tmp_path: Path):
    write_demo(tmp_path / "fewer", num_train=2, num_test=0)
    for path in (tmp_path / "fewer").rglob("*.jpeg"):
        assert path.read_bytes() == (demo / path.relative_to(tmp_path / "fewer")).read_bytes()
    write_demo(tmp_path / "other", num_train=2, num_test=0, seed=1)
    assert manifest(tmp_path / "other")[0] != manifest(demo)[0]


def test_demo_slices_look_like_a_head_on_black(demo: Path):
    for path in list(demo.rglob("*.jpeg"))[::7]:
        image = np.asarray(Image.open(path)).astype(float)
        assert image[:10].max() < 12 and image[:, :10].max() < 12  # JPEG ringing at most
        assert 0.2 < (image > 60).mean() < 0.6
        assert 120 < image[image > 60].mean() < 230


def drawn(name: str, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """A drawn value for many subjects of each class: AD, NC."""
    return tuple(
        np.array([draw_subject(ad, subject_rng(0, 2 * i + ad))[name] for i in range(n)])
        for ad in (True, False)
    )


def effect_size(a: np.ndarray, b: np.ndarray) -> float:
    return (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)


def test_demo_classes_overlap_as_measured_in_adni():
    ad, nc = drawn("ventricle_ml")
    assert np.median(ad) / np.median(nc) == pytest.approx(1.32, abs=0.05)
    assert effect_size(np.log(ad), np.log(nc)) == pytest.approx(0.5, abs=0.07)
    assert effect_size(*drawn("cortical_z")) == pytest.approx(-1.0, abs=0.07)
    assert effect_size(*drawn("temporal_z")) == pytest.approx(-1.5, abs=0.07)


def test_the_template_is_complete_and_its_notice_is_beside_it():
    template = load_template()
    ventricles = (template.sorted_distance < 0).sum() * template.spacing.prod().abs() / 1000
    assert 12 < ventricles < 20  # ml
    notice = Path(dataset.__file__).parent / "assets" / "icbm152_notice.txt"
    assert "Copyright (C) 1993-2009 Louis Collins" in notice.read_text()


def test_no_data_root_means_demo_brains_made_once(config: Config, monkeypatch):
    made = []

    def small(root, num_train=6, num_test=2, seed=0):
        made.append(root)
        write_demo(root, 4, 4, seed)

    monkeypatch.setattr(dataset, "write_demo", small)
    config = replace(config, data_root=None)
    first, _ = load_slices(config)
    second, _ = load_slices(config)
    assert len(made) == 1 and not made[0].exists()  # renamed when complete
    assert (first["train"].images == second["train"].images).all()


def test_demo_never_writes_into_a_folder_in_use(
    data_root: Path, tmp_path: Path, monkeypatch, capsys
):
    with pytest.raises(UserError, match="is not empty"):
        prepare.demo(data_root)
    monkeypatch.setattr(prepare, "write_demo", lambda root: write_demo(root, 2, 2))
    prepare.demo(tmp_path / "brains")
    assert "manifest.csv" in capsys.readouterr().out
    assert len(find_slices(tmp_path / "brains")[1]["train"]) == 40
    assert capsys.readouterr().out == ""  # the manifest says whose each scan is


@pytest.mark.slow
def test_a_linear_reader_tells_demo_classes_apart_about_as_well_as_real_ones(
    tmp_path, config, monkeypatch
):
    """AUC by unseen participant, every other position: well above chance, far from perfect."""
    monkeypatch.setattr(demo_brains, "SLICES", 10)
    monkeypatch.setattr(demo_brains, "STEP", (4.0, *demo_brains.STEP[1:]))
    dataset.write_demo(tmp_path / "many", num_train=60, num_test=40)
    config = replace(config, data_root=tmp_path / "many", img_resolution=32)
    train, test = load_slices(config)[0].values()
    pca = PCA(30, random_state=0).fit(train.images.reshape(len(train.images), -1))
    x, y = (pca.transform(s.images.reshape(len(s.images), -1)) for s in (train, test))
    scale = x.std(0)
    reader = LogisticRegression(C=0.01, max_iter=1000).fit(x / scale, train.labels)
    scores = reader.decision_function(y / scale).reshape(40, 10).mean(1)
    assert 0.6 < roc_auc_score(test.labels[::10], scores) < 0.95
