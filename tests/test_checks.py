"""What check finds in a folder: leaks planted in every way, confounds, bad files."""

import csv
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import ndimage

from config import Config, UserError
from dataset import load_slices
from scans.checks import SAME_EDGES, best_correlation, check, most_telling_auc


def textured(seed: int, slices: int = 2) -> list[np.ndarray]:
    """Slices of a head with folds of its own, uint8 [120, 110]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :110]
    outline = np.hypot((y - 60) / rng.uniform(45, 52), (x - 55) / rng.uniform(38, 44)) < 1
    found = []
    for _ in range(slices):
        folds = ndimage.gaussian_filter(rng.normal(0, 1, (120, 110)), 2.5)
        grey = 110 + 25 * folds / folds.std() + rng.normal(0, 3)
        found.append((grey * outline).clip(0, 255).astype(np.uint8))
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """6 training and 3 test participants of each class, 2 slices each, and subjects.csv."""
    lines, number = ["subject,class,age,sex"], 0
    for split, people in (("train", 6), ("test", 3)):
        for label in ("AD", "NC"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for _ in range(people):
                number += 1
                for i, image in enumerate(textured(number)):
                    Image.fromarray(image).save(folder / f"{number}_{i}.png")
                lines.append(f"p{number},{label},{70 + number % 5},{'FM'[number % 2]}")
    (tmp_path / "subjects.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def run(root: Path, **options: object) -> str:
    """What is wrong, or an empty text."""
    try:
        check(root, out=root.parent / "check.png", cache=root.parent / "cache", **options)
    except UserError as error:
        return str(error)
    return ""


def load(root: Path, name: str) -> Image.Image:
    return Image.open(next(root.rglob(name)))


def test_what_is_not_known_about_people_is_said(tmp_path, capsys):
    """Files that show no scan, and numbers that begin anew in each class."""
    root, number = tmp_path / "data", 0
    for split, count in (("train", 3), ("test", 2)):
        for name in ("AD", "NC"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                number += 1
                file = root / split / name / f"{split} {i}.png"
                Image.fromarray(textured(number)[0]).save(file)
    check(root, out=tmp_path / "s.png", cache=tmp_path / "cache")
    out = capsys.readouterr().out
    assert "every file can be read; whose 5 scans are is not known" in out
    assert "5 participants have slices of several classes, such as test 0" in out


def save(image: Image.Image, root: Path, name: str = "99_0.png") -> None:
    image.save(root / "test" / "NC" / name)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    content = BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content)


def moved(image: Image.Image, pixels: int) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(image), (pixels, -pixels), (0, 1)))


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_an_honest_folder_passes(root: Path, capsys):
    assert run(root) == ""
    out = capsys.readouterr().out
    for line in (
        "train: AD 6 participants, 12 slices; NC 6 participants, 12 slices", "pixels: 110x120 (36)",
        "modes: L (36)", "slices per scan: 2 to 2", "mean grey of 18 participants",
        "no participant and no picture is in both train and test",
    ):  # fmt: skip
        assert line in out
    assert (root.parent / "check.png").exists()
    for name in ("sheet", "folder.png"):
        (root.parent / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{name}: must be a file that ends with .png"):
            check(root, out=root.parent / name)
    with suppress(UserError):
        check(root, cache=root.parent / "own")
    assert [p.name for p in (root.parent / "own").glob("*.png")] == [
        p.with_suffix(".png").name for p in (root.parent / "own").glob("*.txt")
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image, "the same file in train and test, 1 times"),
        (lambda image: Image.merge("RGB", [image] * 3), "the same pixels in train and test"),
        (lambda image: jpeg(image, 60), "the same image in test and train (1 slices, correlation"),
        (lambda image: jpeg(moved(image, 2), 80), "the same image in test and train"),
        (
            lambda image: jpeg(mirrored(image), 80),
            "the same image in test and train (1 slices, mirr",
        ),
        (
            lambda image: image.rotate(2, Image.Resampling.BILINEAR),
            "the same image in test and train",
        ),
        (lambda image: image.point(lambda v: int(0.8 * v)), "the same image in test and train"),
        (lambda image: image.resize((96, 105)), "the same image in test and train"),
        (
            lambda image: image.rotate(9, Image.Resampling.BICUBIC),
            "the same image in test and train",
        ),
        (lambda image: image.crop((6, 2, 104, 118)), "the same image in test and train"),
        (lambda image: ImageOps.expand(image, 12), "the same image in test and train"),
    ],
    ids=[
        "file",
        "pixels",
        "encoded",
        "shifted",
        "mirrored",
        "turned",
        "darkened",
        "resized",
        "turned far",
        "cropped",
        "framed",
    ],
)
def test_a_training_slice_in_test_is_found(root: Path, change, words):
    save(change(load(root / "train", "3_1.png")), root)
    problem = run(root)
    assert words in problem
    assert "test/NC/99_0.png" in problem and "3_1.png" in problem
    assert problem.count("\n") == 1


def test_a_participant_on_both_sides_is_found_and_the_rest_is_still_looked_at(root: Path):
    save(Image.fromarray(textured(77)[0]), root, "3_7.png")
    (root / "train" / "AD" / "1_5.png").write_text("x")
    problem = run(root)
    assert "1 participant(s) on both sides of the split: 3" in problem
    assert "1_5.png: not an image" in problem


@pytest.mark.parametrize("source", ["table", "manifest"])
def test_a_participant_with_two_scans_is_found(root: Path, source):
    save(Image.fromarray(textured(77)[0]), root)
    text = "id,participant,class\n99,p3,NC\n3,p3,AD\n"
    path = root / "manifest.csv" if source == "manifest" else root.parent / "table.csv"
    path.write_text(text)
    problem = run(root, table=None if source == "manifest" else path)
    assert "1 participant(s) on both sides of the split: p3" in problem


def test_a_table_that_names_nobody_is_no_proof(root: Path, capsys):
    table = root.parent / "table.csv"
    table.write_text("subject,class\nsomeone,NC\n")
    assert "names none of the scans" in run(root, table=table)
    table.write_text("Image Data ID,Subject,Group\nI3,p,AD\nI13,p,AD\n")  # of 18 scans
    assert "1 participant(s) on both sides of the split: p" in run(root, table=table)
    assert "names 2 of 18 scans" in capsys.readouterr().out


def test_a_table_of_changing_classes_still_joins(root: Path):
    table = root.parent / "table.csv"
    table.write_text("subject,visit,class\n3,bl,NC\n3,m12,AD\n7,bl,NC\n")
    assert run(root, table=table) == ""


def test_training_says_what_the_check_found_last(root: Path, capsys):
    config = Config(data_root=root, cache=root.parent / "cache", img_resolution=16)
    load_slices(config)
    assert (
        "note: prepare.py check has not looked for leaks in these slices" in capsys.readouterr().out
    )
    assert run(root) == ""
    capsys.readouterr()
    load_slices(config)
    assert "prepare.py check" not in capsys.readouterr().out
    table = root.parent / "table.csv"  # the check did not know that two scans are of one person
    table.write_text("scan,subject\n3,p\n4,p\n")
    load_slices(replace(config, table=table))
    assert "check has not looked for leaks" in capsys.readouterr().out
    load(root / "train" / "AD", "3_1.png").save(root / "test" / "AD" / "98_0.png")
    assert "the same file in train and test" in run(root)
    capsys.readouterr()
    load_slices(config)
    out = capsys.readouterr().out
    assert (
        "warning: prepare.py check found 1 problems in these slices, such as: the same file" in out
    )


def test_a_class_that_the_table_denies_is_found(root: Path):
    table = root.parent / "table.csv"
    table.write_text("subject,class\n3,NC\n4,AD\n")
    assert "class NC in the table, folder AD: 1 scans, 3" in run(root, table=table)


def test_one_picture_in_two_classes_is_found(root: Path):
    load(root / "train" / "AD", "3_1.png").save(root / "train" / "NC" / "98_0.png")
    assert "the same file in two classes, 1 times" in run(root)


def test_doubles_of_one_split_and_class_are_noted(root: Path, capsys):
    load(root / "train" / "AD", "3_1.png").save(root / "train" / "AD" / "98_0.png")
    Image.new("L", (110, 120)).save(root / "train" / "NC" / "97_0.png")
    Image.new("L", (110, 120)).save(root / "test" / "NC" / "96_0.png")
    assert run(root) == ""
    out = capsys.readouterr().out
    assert "note: the same file in one split, 1 times, in scans 3, 98" in out
    assert "note: 2 slices have a single grey value" in out


def test_age_that_tells_the_class_is_named(root: Path, capsys):
    table = root.parent / "table.csv"
    rows = list(csv.DictReader((root.parent / "subjects.csv").read_text().splitlines()))
    lines = [f"{r['subject'][1:]},{60 + 20 * (r['class'] == 'AD')},{r['sex']}" for r in rows]
    table.write_text("subject,age,sex\n" + "\n".join(lines) + "\n")
    assert run(root, table=table) == ""
    out = capsys.readouterr().out
    assert "age of 18 participants: AD 80.00, NC 60.00; it tells the classes apart" in out
    assert "with an AUC of 1.00: a network may learn the age in place of the class" in out
    assert "sex (women) of 18 participants" in out


def test_a_number_without_meaning_is_not_accused():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    found = [most_telling_auc(rng.normal(size=40), labels) for _ in range(200)]
    assert np.mean([best > chance for best, chance in found]) < 0.1
    assert most_telling_auc(labels * 1.0, labels)[0] == 1
    assert np.isnan(most_telling_auc(labels * 1.0, labels * 0)[0])


def test_values_of_other_types_are_described(tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "data" / "AD" / f"{number}_0.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = rng.permutation(np.linspace(-1, 1, 256, dtype=np.float32)).reshape(16, 16)
        Image.fromarray(values).save(path)
    run(tmp_path / "data")
    out = capsys.readouterr().out
    assert "values of 6 scans: -1 to 1, 50.0% below 0; black of a scan: -0.99" in out


@pytest.mark.drawn
def test_the_contact_sheet_has_a_row_for_each_class(root: Path):
    run(root)
    with Image.open(root.parent / "check.png") as sheet:
        assert sheet.width > 6 * sheet.height


def test_edges_of_other_heads_correlate_little():
    small = {s: ndimage.zoom(textured(s, 1)[0], 0.6) for s in range(1, 5)}  # of 72 x 66 pixels
    small = {s: np.pad(image, ((12, 12), (15, 15))) for s, image in small.items()}
    a, b = np.stack([small[1], small[2]]), np.stack([small[3], small[4]])
    assert best_correlation(a, b).max() < 0.6 * SAME_EDGES
    np.testing.assert_allclose(best_correlation(a, np.roll(a, (3, -5), (1, 2))), 1, atol=0.02)


def test_a_sheet_that_cannot_be_written_is_said_before_the_work(root: Path):
    (root.parent / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to"):
        check(root, out=root.parent / "file" / "check.png")
