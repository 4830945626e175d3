"""Spreadsheets of ADNI, OASIS and BIDS, others, damaged ones; the manifest."""

import math
from pathlib import Path

import pytest

from config import UserError
from participants.matching import EntryFinder
from participants.names import plain_name
from participants.tables import class_of, read_manifest, read_table

ADNI = """"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description"
"I45108","002_S_0295","CN","M","84","sc","MRI","MP-RAGE"
"I45112","002_S_0559","AD","F","79","sc","MRI","MP-RAGE"
"I45113","002_S_0559","AD","F","80","m12","MRI","MP-RAGE"
"""
OASIS = """ID,M/F,Hand,Age,Educ,CDR
OAS1_0001_MR1,F,R,74,2,0
OAS1_0002_MR1,M,R,55,4,0.5
OAS1_0003_MR1,M,R,22,4,
"""
BIDS = "participant_id\tage\tsex\tdiagnosis\nsub-01\t70.5\tF\tAD\nsub-02\tn/a\tm\tControl\n"


def write(folder: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_adni_s_own_export_is_read(tmp_path: Path):
    entries = read_table(write(tmp_path, ADNI), {})
    assert entries[0] == ("I45108", "002_S_0295", "NC", 84.0, "M")
    assert [e.scan for e in entries[1:]] == ["I45112", "I45113"]


def test_oasis_is_read_by_its_rating(tmp_path: Path, capsys):
    entries = read_table(write(tmp_path, OASIS), {})
    assert [(e.scan, e.participant, e.label) for e in entries] == [
        ("OAS1_0001_MR1", "OAS1_0001", "NC"),
        ("OAS1_0002_MR1", "OAS1_0002", "AD"),
        ("OAS1_0003_MR1", "OAS1_0003", ""),
    ]
    assert "1 of 3 rows have no readable class" in capsys.readouterr().out


def test_bids_is_read(tmp_path: Path):
    first, second = read_table(write(tmp_path, BIDS, "participants.tsv"), {})
    assert first == ("", "sub-01", "AD", 70.5, "F")
    assert second[1:3] == ("sub-02", "NC") and math.isnan(second.age) and second.sex == "M"


@pytest.mark.parametrize("text", [ADNI.replace(",", ";"), "\ufeff" + ADNI, ADNI + "\n\n"])
def test_what_spreadsheet_programs_make_of_it_is_read(tmp_path: Path, text):
    assert len(read_table(write(tmp_path, text), {})) == 3


def test_a_table_of_an_old_program_is_read(tmp_path: Path):
    text = "subject,class\nm\xfcller,AD\n".encode("latin-1")
    assert read_table(write(tmp_path, text), {})[0].participant == "m\xfcller"


def test_columns_can_be_named(tmp_path: Path):
    path = write(tmp_path, "who,what,years\na,AD,70\nb,NC,71\n")
    given = {"participant": "who", "class": "what", "age": "years"}
    assert [e[1:4] for e in read_table(path, given)] == [("a", "AD", 70), ("b", "NC", 71)]


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        ("", {}, "holds no row"),
        ("subject,class\n", {}, "holds no row"),
        ("subject,class\na\n", {}, "row 2 has 1 cells, the header 2"),
        ("what,age\na,1\n", {}, "no column names scans or participants"),
        ("subject,class\na,AD\n", {"class": "DX"}, "no column 'DX'; it has subject, class"),
        ("subject,class\na,AD\n", {"colour": "class"}, "columns: no 'colour'"),
        ("subject,class\na,../../x\n", {}, "'../../x' in column 'class' is no valid name"),
        ("subject,class\na,/etc\n", {}, "is no valid name"),
        ("subject,class\na," + "A" * 1000 + "\n", {}, "is no valid name"),
        (b"PK\x03\x04", {}, "save it as CSV"),
        ('subject,class\na,"' + "x" * 200_000 + '"\n', {}, "is no table: field larger"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, content, columns, words):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as error:
        read_table(path, columns)
    assert str(path) in str(error.value) or "columns:" in words


def test_a_missing_table_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="none.csv cannot be read: No such file"):
        read_table(tmp_path / "none.csv", {})


def test_an_entry_is_found_by_the_longest_name_in_a_path(tmp_path: Path):
    finder = EntryFinder(write(tmp_path, ADNI), {})
    named = finder.named_in("002_S_0559/MPRAGE/ADNI_002_S_0559_MR_MP-RAGE_br_raw_I45113")
    assert (named.scan, named.age) == ("I45113", 80)
    assert finder.named_in("x/002_S_0295.nii").participant == "002_S_0295"
    assert finder.named_in("I4510") is finder.named_in("I451080") is None


def test_a_participant_of_two_classes_has_none(tmp_path: Path):
    later = '"I9","002_S_0559","MCI","F","77","m06","MRI","x"\n'
    finder = EntryFinder(write(tmp_path, ADNI + later), {})
    assert finder.named_in("I9").label == "MCI"
    assert finder.named_in("002_S_0559/I77")[1:3] == ("002_S_0559", "")
    finder = EntryFinder(write(tmp_path, ADNI + later.replace("MCI", "")), {})
    assert finder.named_in("002_S_0559/I77").label == "AD"


def test_a_number_in_a_path_is_no_participant(tmp_path: Path):
    rids = write(tmp_path, "RID,class\n3,AD\n12,NC\n500,NC\n")
    finder = EntryFinder(rids, {"participant": "RID"})
    assert finder.named_in("011_S_0003/MPRAGE/2005-10-12_10_12_00.0/I500_2") is None
    assert finder.named_in("12/scan").participant == "12"
    bids = write(tmp_path, "subject,class\n01,AD\n02,NC\n")
    finder = EntryFinder(bids, {})
    assert finder.named_in("sub-01/ses-02/anat/sub-01_ses-02_T1w").participant == "01"


def test_a_path_of_two_participants_names_none(tmp_path: Path):
    table = write(tmp_path, "id,subject,group\n1,sub-500,AD\n7,sub-103,CN\n")
    finder = EntryFinder(table, {})
    assert finder.named_in("sub-103/ses-1/T1w").participant == "sub-103"
    with pytest.raises(ValueError, match="names several participants of the table: sub-103, sub-5"):
        finder.named_in("sub-103/1/T1w")


def test_scans_are_known_by_their_file_or_their_number(tmp_path: Path):
    finder = EntryFinder(write(tmp_path, "scan,subject,class\na_1.nii.gz,p,AD\n45000,q,NC\n"), {})
    assert finder.named_in("x/a_1").participant == "p"
    assert finder.named_in("q/ADNI_q_I45000").participant == "q"


def test_the_age_of_another_visit_is_not_taken(tmp_path: Path):
    finder = EntryFinder(write(tmp_path, ADNI), {})
    entry = finder.named_in("002_S_0559/first visit")
    assert (entry.scan, entry.participant, entry.label, entry.sex) == ("", "002_S_0559", "AD", "F")
    assert math.isnan(entry.age)
    assert finder.named_in("002_S_0295/only visit").age == 84


def test_what_is_not_understood_is_said(tmp_path: Path, capsys):
    path = write(tmp_path, "subject;class;age;sex\na;AD;60,5;1\nb;NC;old;2\n")
    assert [e.age for e in read_table(path, {})][0] == 60.5
    out = capsys.readouterr().out
    assert "participant = subject, class = class, age = age, sex = sex" in out
    assert "1 of 2 rows have no readable age" in out and "2 of 2 rows have no readable sex" in out


def test_two_rows_that_differ_are_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="I45108 has two rows that differ"):
        EntryFinder(write(tmp_path, ADNI + '"I45108","x","AD","F","1","","",""\n'), {})


def test_a_rating_is_a_class_only_in_its_own_column():
    assert [class_of(v, "CDR") for v in ("0", "0.5", "2", "", "x")] == ["NC", "AD", "AD", "", ""]
    assert [class_of(v, "Group") for v in ("0", "CN")] == ["0", "NC"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", ".x", "a\nb", "C:", "a" * 101, " a"]
)
def test_what_leads_elsewhere_is_no_plain_name(name):
    assert not plain_name(name)


def test_a_manifest_joins_scans_to_participants(tmp_path: Path):
    assert read_manifest(tmp_path) == {}
    write(tmp_path, "id,participant,class\nI1,p,AD\nI2,p,AD\n", "manifest.csv")
    assert {k: e.participant for k, e in read_manifest(tmp_path).items()} == {"I1": "p", "I2": "p"}
    write(tmp_path, "id,participant,class\nI1,p,AD\nI1,q,AD\n", "manifest.csv")
    with pytest.raises(UserError, match="two rows have the id I1"):
        read_manifest(tmp_path)
