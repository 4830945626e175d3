"""Import of volumes: where slices lie, who is where, and every kind of damage."""

import csv
import gzip
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from PIL import Image

import utils
from config import Config, UserError
from dataset import find_slices, load_slices
from participants.names import plain_name
from participants.tables import Entry
from scans import slicing
from scans.slicing import Scan, id_of, import_scans, split_participants, without_visit
from scans.volumes import ImportOptions, cut, read_volume, resample

VOXEL = 3  # mm
TOP = 85  # mm, of the head
HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
HOLD += "print('held', flush=True); time.sleep(60)"


def head(grey: float = 100.5, low: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid of 150 x 190 x 170 mm with dark ventricles, brighter at its left and front."""
    shape = np.array([68, 78, 70])
    affine = np.diag([VOXEL, VOXEL, VOXEL, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * VOXEL
    x, y, z = (np.indices(shape) * VOXEL + affine[:3, 3][:, None, None, None]).astype(float)
    values = np.where((x / 75) ** 2 + (y / 95) ** 2 + (z / TOP) ** 2 < 1, grey, low)
    values = np.where((x / 20) ** 2 + (y / 35) ** 2 + ((z - 15) / 15) ** 2 < 1, grey / 4, values)
    mark = (x + 40) ** 2 + (y - 50) ** 2 + (z - 10) ** 2 < 15**2
    return np.where(mark, 1.6 * grey, values).astype(np.float32), affine


def write(path: Path, values: np.ndarray, affine: np.ndarray, codes: str = "RAS") -> Path:
    """A NIfTI file whose axes run as `codes` say."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes)))
    affine = affine @ inv_ornt_aff(change, values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(apply_orientation(values, change), affine), path)
    return path


def write_scans(root: Path, people: int = 6) -> Path:
    """A volume each of so many participants, every other AD, and a table of them."""
    values, affine = head()
    rng = np.random.default_rng(0)
    lines = ["Image Data ID,Subject,Group,Sex,Age"]
    for i in range(people):
        name, person = f"I{100 + i}", f"{i:03}_S_0001"
        noisy = values + rng.normal(0, 2, values.shape).astype(np.float32) * (values > 0)
        write(root / person / f"ADNI_{person}_{name}.nii.gz", noisy, affine)
        lines.append(f"{name},{person},{('AD', 'CN')[i % 2]},{'FM'[i // 2 % 2]},{60 + i}")
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once: each test has a copy."""
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture
def options(scans: Path, tmp_path: Path) -> ImportOptions:
    root = shutil.copytree(scans, tmp_path / "scans")
    return ImportOptions(root, tmp_path / "out", root / "table.csv", slices=4, size=64)


def manifest(out: Path) -> list[dict[str, str]]:
    with open(out / "manifest.csv") as file:
        return list(csv.DictReader(file))


def left_out(out: Path) -> dict[str, str]:
    with open(out / "left_out.csv") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# Cutting


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "PIL", "ILA"])
def test_the_same_slices_come_of_any_orientation(tmp_path: Path, codes):
    values, affine = head()
    options = ImportOptions(tmp_path, tmp_path, slices=3, spacing=5, size=200)
    expected = cut(values, affine, options)
    found = cut(*read_volume(write(tmp_path / "a.nii", values, affine, codes), False), options)
    np.testing.assert_allclose(found.images, expected.images, atol=0.1)
    np.testing.assert_allclose(found.positions, expected.positions, atol=1e-3)
    bright = np.argwhere(found.images[1] > 130).mean(0) - 99.5
    np.testing.assert_allclose(bright, [-50, -40], atol=3)  # front is up, left is left


def test_slices_lie_at_the_ventricles_or_where_asked(tmp_path: Path):
    values, affine = head()
    options = ImportOptions(tmp_path, tmp_path, slices=5, spacing=2)
    assert abs(cut(values, affine, options).positions[2] - 15) < 6
    found = cut(values, affine, replace(options, centre=-20.0))
    assert found.positions.tolist() == [-24, -22, -20, -18, -16]
    assert found.images[0, 60:180, 100:140].min() > 90  # no ventricle there
    moved = affine + np.diag([0, 0, 0, 0])
    moved[:3, 3] += [31, -47, 400]  # another scanner's origin
    again = cut(values, moved, options)
    np.testing.assert_allclose(
        again.positions - 400, cut(values, affine, options).positions, atol=2.1
    )


def test_an_oblique_volume_is_cut_upright(tmp_path: Path):
    values, affine = head()
    turn = np.radians(20)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    # the same head, sampled on a grid that is tilted by 20 degrees
    grid = tilt @ affine
    tilted = resample(values, affine, grid[:3, 3], grid[:3, :3], values.shape, order=1)
    options = ImportOptions(tmp_path, tmp_path, centre=10.0, slices=1, size=200)
    a, b = (cut(v, m, options).images[0] for v, m in ((values, affine), (tilted, grid)))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("axis", ["coronal", "sagittal"])
def test_other_axes_need_a_centre_and_lie_upright(tmp_path: Path, axis):
    with pytest.raises(UserError, match=f"axis = {axis}: needs a --centre"):
        ImportOptions(tmp_path, tmp_path, axis=axis)
    centre = {"coronal": 50.0, "sagittal": -40.0}[axis]
    values, affine = head()
    found = cut(
        values, affine, ImportOptions(tmp_path, tmp_path, axis=axis, centre=centre, slices=1)
    )
    down, right = np.argwhere(found.images[0] > 130).mean(0) - 119.5
    # the axial middle of a head goes 110 mm down from its top
    assert down == pytest.approx((TOP + (TOP - 110)) / 2 - 10, abs=4)
    assert right == pytest.approx(-40 if axis == "coronal" else 50, abs=4)


def test_voxels_of_other_sizes_give_millimetres(tmp_path: Path):
    values, affine = head()
    thick = np.diag([1.0, 1.0, 2.0, 1.0])
    options = ImportOptions(tmp_path, tmp_path, centre=10.0, slices=1, size=200)
    a = cut(values, affine, options).images[0]
    b = cut(values[:, :, ::2], affine @ thick, options).images[0]
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(
    ("low", "window", "black"), [(0, None, 0), (-1000, None, -1000), (-1000, (0.0, 80.0), 0)]
)
def test_the_window_is_robust_and_follows_the_rule_of_slices(tmp_path: Path, low, window, black):
    values, affine = head(low=low)
    values[34, 39, 38] = 5000  # a single bright voxel
    options = ImportOptions(tmp_path, tmp_path, centre=0.0, slices=20, window=window)
    found = cut(values, affine, options)
    assert found.black == pytest.approx(black, abs=3)
    assert found.white < 400 if window is None else found.white == 80


# Import


def test_scans_become_a_training_set(options: ImportOptions, config: Config, capsys):
    import_scans(options)
    rows = manifest(options.out)
    assert [row["id"] for row in rows] == [f"I{100 + i}" for i in range(6)]
    assert {row["split"] for row in rows} == {"train", "test"}
    assert rows[1]["class"] == "NC" and rows[1]["age"] == "61" and len(rows[1]["sha256"]) == 64
    names = {p.name for p in options.out.rglob("*.png")}
    assert names == {f"I{100 + i}_{k}.png" for i in range(6) for k in range(4)}
    with Image.open(next(options.out.rglob("*.png"))) as image:
        assert (image.size, image.mode) == ((64, 64), "L")
    splits, _ = load_slices(replace(config, data_root=options.out))
    assert set(splits["train"].participants) >= {"000_S_0001"} - set(splits["test"].participants)
    assert splits["train"].classes == ["AD", "NC"]
    assert "6 scans of 6 participants" in capsys.readouterr().out


def test_a_folder_of_a_patient_is_the_participant(options: ImportOptions, tmp_path: Path):
    values, affine = head()
    root = tmp_path / "patients"
    for label, person in (("AD", "a"), ("AD", "b"), ("CN", "c"), ("CN", "d")):
        for visit in ("baseline", "followup"):
            write(root / label / person / f"{visit}.nii", values, affine)
        write(root / label / person / "brain_mask.nii", values, affine)
        write(root / label / "derivatives" / person / "x.nii", values, affine)
    import_scans(replace(options, scans=root, table=None, pattern="*.nii"))
    rows = manifest(options.out)
    assert len(rows) == 8 and {(r["class"], r["participant"]) for r in rows} == {
        ("AD", "a"), ("AD", "b"), ("CN", "c"), ("CN", "d"),
    }  # fmt: skip
    assert find_slices(options.out)[0] == ["AD", "CN"]
    with pytest.raises(UserError, match="no NIfTI file .* called \\*T1w\\*"):
        import_scans(replace(options, scans=root, table=None, pattern="*T1w*"))


def test_folders_of_visits_are_no_participants_and_lone_names_are_said(tmp_path: Path, capsys):
    values, affine = head()
    for label, people in (("AD", "ab"), ("HC", "cd")):
        for visit in ("baseline", "Follow-up"):
            for person in people:
                write(tmp_path / "s" / label / visit / f"{person}1.nii", values, affine)
    import_scans(ImportOptions(tmp_path / "s", tmp_path / "out", slices=1, size=64))
    rows = manifest(tmp_path / "out")
    assert {row["participant"] for row in rows} == {"a1", "b1", "c1", "d1"} and len(rows) == 8
    assert "8 scans lie in no folder of a person, and there is no table" in capsys.readouterr().out


def people_in(*paths: str) -> list[str]:
    """The participants of volumes without a table."""
    insides = [Path("AD", path) for path in paths]
    visits = slicing.visit_folders(insides)
    return [slicing.entry_of_volume(inside, None, visits).participant for inside in insides]


@pytest.mark.parametrize("visits", ["V1 V2", "2019 2021", "2019-03-02 2021-05-02", "bl m12"])
def test_folders_that_hold_more_names_than_they_are_are_visits(visits):
    a, b = visits.split()
    people = ("p1", "p2", "p3")
    flat = [f"{visit}/{person}.nii" for visit in (a, b) for person in people]
    deep = [f"{visit}/{person}/T1.nii" for visit in (a, b) for person in people]
    below = [f"{person}/{visit}/T1.nii" for visit in (a, b) for person in people]
    for paths in (flat, deep, below):
        assert people_in(*paths) == [*people, *people]


@pytest.mark.parametrize("names", ["V01 V02 V03", "M3 M6 M12", "19500312 2001", "F01 V01 x"])
def test_folders_of_one_name_each_are_people(names):
    names = names.split()
    assert people_in(*(f"{name}/T1.nii" for name in names)) == names
    assert people_in(*(f"{name}/anat/T1.nii" for name in names)) == names
    both = [f"{name}/{kind}.nii" for name in names for kind in ("T1", "FLAIR")]
    assert set(people_in(*both)) == set(names)
    named = [f"{name}/{name}_{i}{name}.nii" for name in names for i in range(3)]
    sessions = [
        f"{name}/201{i}-02-0{k + 1}/T1.nii" for k, name in enumerate(names) for i in range(4)
    ]
    for paths in (named, sessions):
        assert set(people_in(*paths)) == set(names)


def test_days_whose_files_carry_the_date_are_visits(capsys):
    paths = [f"{day}/{day}_p{i}.nii" for day in ("2019-03-02", "2021-05-02") for i in range(3)]
    assert {name[-2:] for name in people_in(*paths)} == {"p0", "p1", "p2"}
    assert "note: folders such as 2019-03-02 count as visits" in capsys.readouterr().out
    assert len(set(people_in("V1/V1x1.nii", "V1/V1x2.nii", "V1/V1x3.nii"))) == 3


def test_ids_that_differ_in_case_only_are_told_apart(tmp_path: Path):
    values, affine = head()
    for i, name in enumerate(("Scan", "scan", "other", "last")):
        write(tmp_path / "s" / ("AD", "HC")[i % 2] / f"p{i}" / f"{name}.nii", values, affine)
        write(tmp_path / "s" / ("AD", "HC")[i % 2] / f"q{i}" / f"own{i}.nii", values, affine)
    import_scans(ImportOptions(tmp_path / "s", tmp_path / "out", slices=1, size=64))
    assert {row["id"] for row in manifest(tmp_path / "out")} >= {"AD-p0-Scan", "HC-p1-scan"}


def test_two_spellings_in_names_of_volumes_are_one_participant(tmp_path: Path):
    values, affine = head()
    for label, site in (("AD", 2), ("HC", 3)):
        for i in range(2):
            for name in (f"{site:03}_S_000{i}", f"sub-ADNI{site:03}S000{i}"):
                write(tmp_path / "s" / label / f"{name}.nii", values, affine)
    import_scans(ImportOptions(tmp_path / "s", tmp_path / "out", slices=1, size=64))
    assert len({row["participant"] for row in manifest(tmp_path / "out")}) == 4


def test_a_table_that_names_no_volume_is_said(options: ImportOptions, tmp_path: Path):
    table = tmp_path / "other.csv"
    table.write_text("subject,dx\n1001,AD\n1002,CN\n")
    with pytest.raises(UserError, match="it names no volume; numbers and short names must be"):
        import_scans(replace(options, table=table))


def test_classes_may_be_called_as_in_the_table(options: ImportOptions, capsys):
    import_scans(replace(options, classes=("AD", "CN")))
    assert {row["class"] for row in manifest(options.out)} == {"AD", "NC"}
    with pytest.raises(UserError, match="classes: no MCI; there are AD, NC"):
        import_scans(replace(options, classes=("AD", "MCI"), out=options.out.with_name("b")))


def write_visits(root: Path, people: int = 6) -> Path:
    """Two volumes of each person, named as ADNI does; the last person is MCI first, then AD."""
    values, affine = head()
    lines = ["Image Data ID,Subject,Group,Sex,Age,Visit"]
    for i in range(people):
        for visit, name in enumerate(("bl", "m12")):
            person, image = f"{i:03}_S_10{i:02}", f"I{7000 + 10 * i + visit}"
            write(
                root / person / f"MPRAGE/{name}" / f"ADNI_{person}_MR_{image}.nii",
                values + i,
                affine,
            )
            label = ("MCI", "AD")[visit] if i == people - 1 else ("AD", "CN")[i % 2]
            lines.append(f"{image},{person},{label},{'FM'[i // 2 % 2]},{60 + i + visit},{name}")
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return root


def test_a_person_whose_class_changes_is_on_one_side_counted_and_named(tmp_path: Path, capsys):
    root = write_visits(tmp_path / "scans", 8)
    extra = "I9,900_S_1000,MCI,F,70,bl\nI10,901_S_1001,MCI,M,71,bl\n"
    (root / "table.csv").write_text((root / "table.csv").read_text() + extra)
    values, affine = head()
    for name, person in (("I9", "900_S_1000"), ("I10", "901_S_1001")):
        write(root / person / f"x_{name}.nii", values, affine)
    options = ImportOptions(root, tmp_path / "out", root / "table.csv", slices=2, size=64)
    import_scans(options)
    out = capsys.readouterr().out
    assert (
        "0 volumes have no row, 18 are of a wanted class; of these the table gives the class of 18"
        in out
    )
    assert "1 participants have scans of several classes: 007_S_1007" in out
    lines = [line for line in out.splitlines() if "/MCI: " in line]
    assert sum(int(re.search(r": (\d+) part", line)[1]) for line in lines) == 3
    rows = manifest(options.out)
    assert len({row["split"] for row in rows if row["participant"] == "007_S_1007"}) == 1


@pytest.mark.parametrize("pick", ["none", "first", "last"])
def test_a_table_of_visits_without_scans_gives_the_class_of_the_visit(tmp_path: Path, pick, capsys):
    root = write_visits(tmp_path / "scans")
    lines = (root / "table.csv").read_text().splitlines()
    (root / "table.csv").write_text("\n".join(line.split(",", 1)[1] for line in lines) + "\n")
    path = next(root.glob("005_S_1005/MPRAGE/m12/*.nii"))
    path.rename(root / "005_S_1005" / "later.nii")  # its path shows no visit
    options = ImportOptions(
        root, tmp_path / "out", root / "table.csv", slices=2, size=64, unknown_visit=pick
    )
    options = replace(options, classes=("AD", "NC") if pick != "first" else None)
    if pick == "first":
        with pytest.raises(UserError, match="class MCI: too few participants"):
            import_scans(options)
        return
    import_scans(options)
    later = [row["class"] for row in manifest(options.out) if "later" in row["source"]]
    out = capsys.readouterr().out
    assert later == {"none": [], "last": ["AD"]}[pick]
    assert ("rows of its participant differ in class (--unknown-visit)" in out) == (pick == "none")
    assert ("1 scans show no visit: class of their participant's last row" in out) == (
        pick == "last"
    )


def test_what_lacks_is_named_with_the_option_that_helps(tmp_path: Path, capsys):
    root = write_visits(tmp_path / "scans")
    table, options = root / "table.csv", {"slices": 2, "size": 64}
    text = table.read_text()
    table.write_text(text.replace("Group", "Diagnose"))
    with pytest.raises(UserError, match="table.csv: no volume has a class; --columns class NAME"):
        import_scans(ImportOptions(root, tmp_path / "out", table, **options))
    table.write_text(text)
    with pytest.raises(
        UserError, match=r"class MCI: too few .* \(005_S_1005\); --classes AD NC leaves it out"
    ):
        import_scans(ImportOptions(root, tmp_path / "out", table, **options))
    table.write_text(text.replace(",F,", ",x,").replace(",M,", ",m\xe4nnlich,"))
    import_scans(ImportOptions(root, tmp_path / "out", table, classes=("AD", "NC"), **options))
    out = capsys.readouterr().out
    assert "class CN is called NC" in out and "no readable sex, such as 'x'" in out
    assert "0% women" in out and "11 x the head reaches beyond the slice (--size): " in out


def test_a_bids_data_set_is_its_own_table(tmp_path: Path, capsys):
    root, (values, affine) = tmp_path / "bids", head()
    for i in range(4):
        write(root / f"sub-0{i}" / "anat" / f"sub-0{i}_T1w.nii", values, affine)
    (table := root / "participants.tsv").write_text(
        "participant_id\tdx\n" + "".join(f"sub-0{i}\t{'AD' if i < 2 else 'CN'}\n" for i in range(4))
    )
    options = ImportOptions(root, tmp_path / "out", slices=2, size=64)
    import_scans(options)
    assert f"no --table: {table} is used" in capsys.readouterr().out
    assert [r["class"] for r in manifest(options.out)] == ["AD", "AD", "NC", "NC"]
    table.write_text(table.read_text().replace("dx", "condition"))
    with pytest.raises(UserError, match="class sub-00: too few"):
        import_scans(replace(options, out=tmp_path / "b"))
    assert f"note: {table} is not used: it has no column of classes" in capsys.readouterr().out
    import_scans(replace(options, out=tmp_path / "c", columns={"class": "condition"}))
    assert files(tmp_path / "c").keys() == files(options.out).keys()


def import_of(root: Path, paths: list[str], out: str = "out", **options) -> ImportOptions:
    """Import the same head from all these paths, without a table."""
    values, affine = head()
    for path in paths:
        write(root / path, values, affine)
    chosen = ImportOptions(root, root.with_name(out), slices=2, size=64, **options)
    import_scans(chosen)
    return chosen


@pytest.mark.parametrize(
    ("paths", "people"),
    [
        ("{c}1_20252_2_0/T1/x {c}1_20252_3_0/T1/x {c}2_20252_2_0/T1/x", "1 2"),
        ("{c}1_bl/x {c}1_m12/x {c}2_bl/x {c}2_V2/x", "1 2"),
        ("{c}1_2009-11-14/x {c}1_2010-11-14/x {c}2/x", "1 2"),
        ("1.5T/{c}1/x 1.5T/{c}2/x 3T/{c}1/x", "1 2"),
    ],
)
def test_visits_and_scanners_in_names_of_folders_are_no_people(tmp_path: Path, paths, people):
    files = [f"{c}/{path.format(c=c)}.nii" for c in ("AD", "NC") for path in paths.split()]
    options = import_of(tmp_path / "scans", files)
    found = {row["participant"] for row in manifest(options.out) if row["class"] == "AD"}
    assert found == {f"AD{name}" for name in people.split()}


def test_what_looks_like_a_visit_may_be_the_end_of_a_name():
    kept = ["002_S_2010", "sub-2001", "sub-V01", "AD_M01", "brain_1900", "V01", "P1_x"]
    assert [*map(without_visit, kept)] == kept
    cut = {"P1_bl": "P1", "P1-m12": "P1", "P1 V2": "P1", "12_20252_2_0": "12"}
    assert [*map(without_visit, cut)] == list(cut.values())


def test_people_named_like_years_have_several_scans(tmp_path: Path):
    files = [f"AD/{person}/{person}_{scan}.nii" for person in (2001, 2002) for scan in "abc"]
    files += [file.replace("AD", "NC").replace("200", "201") for file in files]
    rows = manifest(import_of(tmp_path / "scans", files).out)
    assert {row["participant"] for row in rows} == {"2001", "2002", "2011", "2012"}


def test_a_folder_too_high_is_no_class(tmp_path: Path, capsys):
    files = [f"study/{c}/{c}{i}/x.nii" for c in ("AD", "NC") for i in (1, 2)]
    with pytest.raises(UserError, match=r"holds one class only, study; did you mean .*scans/study"):
        import_of(tmp_path / "scans", files)
    import_of(tmp_path / "scans", [], classes=("study",))


def test_a_later_import_keeps_the_side_of_people_written_otherwise(tmp_path: Path):
    (tmp_path / "a").mkdir()
    for step, name in enumerate(("sub-ADNI{i:03}S{i:04}", "{i:03}_S_{i:04}")):
        names = [f"{c}/{name.format(i=2 * i + k)}/x{step}.nii"
                 for k, c in enumerate(("AD", "NC")) for i in range(4)]  # fmt: skip
        options = import_of(tmp_path / f"scans{step}", names)
        import_scans(options)  # again: it goes on
    rows = manifest(options.out)
    sides = {(row["participant"], row["split"]) for row in rows}
    assert len(rows) == 16 and len(sides) == 8


def test_hints_are_given_where_a_table_names_nothing(tmp_path: Path):
    (table := tmp_path / "t.csv").write_text("SUB_ID,DX\n50002,AD\n50003,NC\n")
    with pytest.raises(UserError, match="no row names 0050002; did you mean 50002") as error:
        import_of(
            tmp_path / "scans", ["0050002/x.nii"], table=table, columns={"participant": "SUB_ID"}
        )
    assert "\n" not in str(error.value)


def test_several_volumes_of_one_scan_ask_for_a_pattern(tmp_path: Path):
    root, (values, affine) = tmp_path / "oasis", head()
    for scan in ("OAS1_0001_MR1", "OAS1_0002_MR1"):
        for i in (1, 2):
            write(root / scan / f"{scan}_mpr-{i}_anon.nii", values, affine)
    (root / "table.csv").write_text("ID,CDR\nOAS1_0001_MR1,0\nOAS1_0002_MR1,1\n")
    options = ImportOptions(root, tmp_path / "out", root / "table.csv", slices=2, size=64)
    text = "4 x several volumes are one scan; --pattern chooses one: OAS1_0001_MR1 (2 volumes)"
    with pytest.raises(UserError, match=re.escape(text) + " or similar"):
        import_scans(options)


def test_names_in_another_spelling_are_asked_about(options: ImportOptions, capsys):
    text = options.table.read_text().replace("I100,000_S_0001", "x1,0_s_1")
    options.table.write_text(text)
    import_scans(options)
    assert "no row names 000_S_0001; did you mean 0_s_1?" in capsys.readouterr().out


def test_names_of_any_script_and_length_become_ids_of_scans():
    assert [id_of(n) for n in ("Müller 1", "日本", "a/b", " x.", "sub-01_T1w")] == [
        "Müller-1", "日本", "a-b", "x", "sub-01_T1w",
    ]  # fmt: skip
    long = [id_of("ADNI_" + "\u4e2d" * 70 + end) for end in "ab"]
    assert (
        77 < max(len(name.encode()) for name in long) <= 80
        and long[0] != long[1]
        and plain_name(long[0])
    )


def test_a_bad_volume_takes_no_place_in_test(options: ImportOptions):
    import_scans(options)
    for row in manifest(options.out):
        if row["split"] == "test":  # were it drawn again, its class would have no test
            (options.scans / row["source"]).write_bytes(b"junk")
    again = replace(options, out=options.out.with_name("again"))
    import_scans(again)
    assert {(r["class"], r["split"]) for r in manifest(again.out)} == {
        ("AD", "train"), ("AD", "test"), ("NC", "train"), ("NC", "test"),
    }  # fmt: skip


def test_a_second_import_on_the_folder_is_refused(options: ImportOptions):
    options.out.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, options.out / ".lock"], stdout=-1) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is importing there"):
            import_scans(options)
        other.kill()


def test_slices_far_apart_are_as_sharp_as_near_ones_however_the_head_was_tilted(tmp_path: Path):
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    turn = np.radians(20)
    affine[1:3, 1:3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    y = (affine[:3, :3] @ np.indices((64, 64, 64)).reshape(3, -1))[1].reshape(64, 64, 64)
    stripes = 40 * np.sin(2 * np.pi * y / 5).astype(np.float32)
    for spacing in (1, 8):
        steps = np.array([[0.0, 0, 1], [0, 1, 0], [spacing, 0, 0]])
        found = resample(stripes, affine, np.array([20.0, 10, 25]), steps, (3, 24, 24))
        assert found[1].std() > 0.95 * 40 / np.sqrt(2)


def test_16_bits_keep_more_grey_levels(options: ImportOptions):
    import_scans(replace(options, bits=16))
    with Image.open(next(options.out.rglob("*.png"))) as image:
        assert image.mode.startswith("I;16") and len(np.unique(np.asarray(image))) > 300


def test_no_bad_volume_stops_the_rest_and_each_has_its_reason(options: ImportOptions, capsys):
    root, (values, affine) = options.scans, head()
    with open(options.table, "a") as table:
        table.writelines(f"B{i},9{i:02}_S_0001,AD,F,70\n" for i in range(12))
    path = write(root / "B0.nii", values, affine)
    path.write_bytes(path.read_bytes()[:5000])
    safetensors_bytes = write(root / "B1.nii.gz", values, affine)
    safetensors_bytes.write_bytes(safetensors_bytes.read_bytes()[:5000])
    (root / "B2.nii").write_bytes(b"hello" * 100)
    (root / "B3.nii.gz").write_bytes(b"")
    write(root / "B4.nii", values, np.diag([1e-3, 1e-3, 1e-3, 1]))
    nibabel.save(
        nibabel.Nifti1Image(np.stack([values[:8, :8, :8]] * 3, 3), affine), root / "B5.nii"
    )
    infinite = values.copy()
    infinite[30, 30, 30] = np.inf
    write(root / "B6.nii", infinite, affine)
    write(root / "B7.nii", values * 0, affine)
    unset = write(root / "B8.nii", values, affine)
    raw = bytearray(unset.read_bytes())
    raw[252:256] = bytes(4)  # qform_code, sform_code
    unset.write_bytes(raw)
    huge = bytearray(unset.read_bytes())
    huge[42:48] = np.array([30000] * 3, "<i2").tobytes()
    (root / "B9.nii").write_bytes(huge)
    (root / "B10.nii.gz").write_bytes(gzip.compress(bytes(huge)))
    write(root / "none.nii", values, affine)
    import_scans(options)
    out = capsys.readouterr().out
    for line in (
        "1 x truncated: 5000 bytes of", "1 x empty file: B3.nii.gz", "12 left out, see",
        "2 x 30000 x 30000 x 30000 voxels: too many for a file of",
        " or similar: B10.nii.gz, B9.nii",
    ):  # fmt: skip
        assert line in out, line
    assert str(options.out / "left_out.csv") in out
    reasons = left_out(options.out)
    for name, why in (
        ("B0.nii", "truncated: 5000 bytes of"), ("B1.nii.gz", "damaged: "), ("B2.nii", ""),
        ("B3.nii.gz", "empty file"), ("B4.nii", "voxels of 0.001 x"),
        ("B5.nii", "is no volume but 8 x 8 x 8 x 3"), ("B6.nii", "holds values that are infinite"),
        ("B7.nii", "all voxels have one value"), ("B8.nii", "no orientation in its header"),
        ("B9.nii", "30000 x 30000 x 30000 voxels: too many"),
        ("B10.nii.gz", "30000 x 30000 x 30000 voxels: too many"), ("none.nii", "no row of the tab"),
    ):  # fmt: skip
        assert reasons.pop(name).startswith(why), name
    assert not reasons
    assert len(manifest(options.out)) == 6
    assert not list(options.out.rglob("*.partial"))


def test_a_volume_without_orientation_is_taken_if_asked(options: ImportOptions, tmp_path: Path):
    values, affine = head()
    path = write(tmp_path / "a.nii", values, affine)
    raw = bytearray(path.read_bytes())
    raw[252:256] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="--unoriented"):
        read_volume(path, False)
    assert read_volume(path, True)[0].shape == values.shape


def test_what_is_not_a_number_is_background(tmp_path: Path):
    values, affine = head()
    values[0] = np.nan
    assert (read_volume(write(tmp_path / "a.nii", values, affine), False)[0][0] == 0).all()


def test_an_import_goes_on_and_ends_the_same(options: ImportOptions, monkeypatch):
    whole = replace(options, out=options.out.with_name("whole"))
    import_scans(whole)
    write_slices, count = slicing.write_slices, [0]

    def stop(*args: object) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        write_slices(*args)

    monkeypatch.setattr(slicing, "write_slices", stop)
    monkeypatch.setattr(utils, "map_on_cores", lambda f, items, *_: [f(item) for item in items])
    with pytest.raises(KeyboardInterrupt):
        import_scans(options)
    assert [bool(row["sha256"]) for row in manifest(options.out)] == [True] * 2 + [False] * 4
    monkeypatch.setattr(slicing, "write_slices", write_slices)
    read, asked = slicing.read_volume, []
    monkeypatch.setattr(slicing, "read_volume", lambda p, *a: asked.append(p) or read(p, *a))
    import_scans(options)
    assert len(asked) == 4 and files(options.out) == files(whole.out)
    import_scans(options)
    assert len(asked) == 4  # nothing is left to do


def test_a_volume_that_changed_is_cut_again(options: ImportOptions, monkeypatch):
    import_scans(options)
    before = files(options.out)
    values, affine = head(grey=80.5)
    values[20:30, 20:30] = 30
    write(options.scans / "000_S_0001" / "ADNI_000_S_0001_I100.nii.gz", values, affine)
    import_scans(options)
    changed = {name for name, content in files(options.out).items() if before[name] != content}
    assert {re.sub(r"_.*", "", name.split("/")[-1]) for name in changed} == {"I100", "manifest.csv"}


def test_a_volume_that_became_unreadable_leaves_no_slices(options: ImportOptions):
    import_scans(options)
    values, affine = head()
    write(options.scans / "000_S_0001" / "ADNI_000_S_0001_I100.nii.gz", values * 0, affine)
    import_scans(options)
    assert "I100" not in {row["id"] for row in manifest(options.out)}
    assert not list(options.out.rglob("I100_*"))


def test_other_choices_on_the_same_folder_are_refused(options: ImportOptions, tmp_path: Path):
    import_scans(options)
    before = files(options.out)
    with pytest.raises(UserError, match="I100 has slices = 4, now 5; use another --out"):
        import_scans(replace(options, slices=5))
    text = options.table.read_text()
    options.table.write_text(text.replace("I100,000_S_0001,AD", "I100,000_S_0001,CN"))
    with pytest.raises(UserError, match="I100 has class = AD, now NC"):
        import_scans(options)
    assert files(options.out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty, and has no manifest.csv"):
        import_scans(replace(options, out=other))


def test_who_was_split_stays_on_that_side_when_scans_come(options: ImportOptions):
    import_scans(options)
    before = {row["participant"]: row for row in manifest(options.out)}
    values, affine = head()
    people = {name: row["class"].replace("NC", "CN") for name, row in before.items()}
    people |= {f"{i}_S_0002": "AD" for i in range(900, 905)}
    with open(options.table, "a") as table:
        for i, (person, label) in enumerate(people.items()):
            write(options.scans / person / f"ADNI_{person}_I99{i}.nii", values, affine)
            table.write(f"I99{i},{person},{label},F,50\n")
    import_scans(options)
    rows = manifest(options.out)
    assert len(rows) == 17
    for row in rows:
        assert row["split"] == before.get(row["participant"], row)["split"]


def test_bad_input_writes_nothing(options: ImportOptions, tmp_path: Path):
    for change, words in (
        ({"scans": tmp_path / "none"}, "no such folder"),
        ({"scans": tmp_path / "empty"}, "no NIfTI file"),
        ({"table": tmp_path / "none.csv"}, "cannot be read"),
        ({"classes": ("MCI",)}, "classes: no MCI; there are AD, NC"),
        ({"table": None, "columns": {"class": "DX"}}, "columns: there is no --table"),
        ({"classes": ("AD",), "test_share": 0.2, "scans": options.scans / "000_S_0001"}, "too few"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=words):
            import_scans(replace(options, **change))
        assert not options.out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"slices": 0}, "slices = 0"), ({"spacing": 0.0}, "spacing = 0"), ({"size": 10}, "size = 10"),
     ({"test_share": 1.0}, "test_share = 1"), ({"window": (5.0, 5.0)}, "window = ")],
)  # fmt: skip
def test_bad_options_are_named(tmp_path: Path, change, words):
    with pytest.raises(UserError, match=words):
        ImportOptions(tmp_path, tmp_path, **change)


# Splitting


def people(count: int, label: str, rng: np.random.Generator) -> list[Scan]:
    found = []
    for i in range(count):
        entry = Entry("", f"{label}{i}", label, float(rng.normal(75, 8)), "FM"[rng.integers(2)])
        found += [Scan(Path(f"{label}{i}_{k}"), f"{label}{i}_{k}", entry) for k in range(2)]
    return found


def test_the_split_is_by_participant_even_in_class_age_and_sex():
    rng = np.random.default_rng(0)
    found = people(200, "AD", rng) + people(100, "NC", rng)
    split = split_participants(found, 0.2, 0, {})
    for label, count in (("AD", 40), ("NC", 20)):
        own = {s.entry.participant: s.entry for s in found if s.entry.label == label}
        sides = {k: [e for n, e in own.items() if split[n] == k] for k in ("train", "test")}
        assert len(sides["test"]) == count
        ages = [np.mean([e.age for e in side]) for side in sides.values()]
        women = [np.mean([e.sex == "F" for e in side]) for side in sides.values()]
        assert abs(ages[0] - ages[1]) < 1.2 and abs(women[0] - women[1]) < 0.04
    assert split == split_participants(found[::-1], 0.2, 0, {})
    assert split != split_participants(found, 0.2, 1, {})
    assert split == split_participants(found, 0.2, 5, split)


# DICOM


def test_a_dicom_folder_is_a_volume_or_says_what_it_needs(
    options: ImportOptions, monkeypatch, capsys
):
    folder = options.scans / "100_S_0001" / "I500"
    folder.mkdir(parents=True)
    (folder / "1.dcm").write_bytes(bytes(128) + b"DICM")
    with open(options.table, "a") as table:
        table.write("I500,100_S_0001,AD,F,70\n")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    import_scans(options)
    out = capsys.readouterr().out
    assert (
        f"1 x DICOM needs dcm2niix: pip install dcm2niix: {folder.relative_to(options.scans)}"
        in out
    )


DCM2NIIX = shutil.which("dcm2niix") or shutil.which("dcm2niix", path=Path(sys.executable).parent)
needs_converter = pytest.mark.skipif(DCM2NIIX is None, reason="needs dcm2niix")


@needs_converter
def test_a_dicom_series_gives_the_slices_of_its_nifti_file(tmp_path: Path):
    pydicom = pytest.importorskip("pydicom")
    values, affine = head()
    values = (values + np.random.default_rng(0).integers(0, 40, values.shape)).round()
    folder = tmp_path / "series"
    folder.mkdir()
    for k in range(values.shape[2]):
        write_dicom(pydicom, folder / f"{k}.dcm", values, affine, k)
    read, found = read_volume(folder, False)
    options = ImportOptions(tmp_path, tmp_path, centre=10.0, slices=3, spacing=5)
    a, b = (cut(v, m, options).images for v, m in ((values, affine), (read, found)))
    np.testing.assert_allclose(a, b, atol=2)


def write_dicom(pydicom, path: Path, values: np.ndarray, affine: np.ndarray, k: int) -> None:
    """One axial slice of a volume whose axes run as RAS; DICOM's run as LPS."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, f"1.2.3.{k + 1}"
    data.Modality, data.Manufacturer, data.PatientID = "MR", "Siemens", "p"
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.4", "1.2.5"
    data.SeriesNumber, data.InstanceNumber, data.SeriesDescription = 1, k + 1, "MPRAGE"
    data.Rows, data.Columns = values.shape[1], values.shape[0]
    data.PixelSpacing, data.SliceThickness = [VOXEL, VOXEL], VOXEL
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    x, y, z = affine[:3, 3]
    far = y + (values.shape[1] - 1) * VOXEL
    data.ImagePositionPatient = [-x - (values.shape[0] - 1) * VOXEL, -far, z + k * VOXEL]
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 0, 1
    data.PhotometricInterpretation = "MONOCHROME2"
    # rows run to the back, columns to the patient's left
    data.PixelData = values[::-1, ::-1, k].T.round().astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)
