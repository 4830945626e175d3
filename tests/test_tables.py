"""Spreadsheets of ADNI, OASIS and BIDS, others, damaged ones; the manifest."""

import math
import unicodedata
from pathlib import Path

import pytest

from config import UserError
from participants.matching import EntryFinder, find_entries
from participants.names import one_spelling, participant_in, participants_of, plain_name, simplified
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
    assert entries[0] == ("I45108", "002_S_0295", "NC", 84.0, "M", "sc", "")
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
    assert first[:5] == ("", "sub-01", "AD", 70.5, "F")
    assert second[1:3] == ("sub-02", "NC") and math.isnan(second.age) and second.sex == "M"


def test_columns_can_be_named(tmp_path: Path):
    path = write(tmp_path, "who,what,years\na,AD,70\nb,NC,71\n")
    given = {"participant": "who", "class": "what", "age": "years"}
    assert [e[1:4] for e in read_table(path, given)] == [("a", "AD", 70), ("b", "NC", 71)]


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        ("", {}, "holds no row"),
        ("subject,class\n", {}, "holds no row"),
        ("subject,class\na,AD,x\n", {}, "row 2 has 3 cells, the header 2"),
        ("what,age\na,1\n", {}, "no column names scans or participants"),
        ("subject,class\na,AD\n", {"class": "DX"}, "no column 'DX'; it has subject, class"),
        ("subject,class\na,AD\n", {"colour": "class"}, "columns: no 'colour'"),
        (b"PK\x03\x04", {}, "save it as CSV"),
        ('subject,class\na,"' + "x" * 200_000 + '"\n', {}, "is no table: field larger"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, content, columns, words):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as error:
        read_table(path, columns)
    assert str(path) in str(error.value) or "columns:" in words


@pytest.mark.parametrize("name", ["../../x", "/etc", "A" * 1000, "AD/MCI"])
def test_a_class_that_cannot_be_a_folder_counts_as_empty(tmp_path: Path, capsys, name):
    table = write(tmp_path, f"subject,class\na,{name}\nb,AD\n")
    assert [entry.label for entry in read_table(table, {})] == ["", "AD"]
    said = capsys.readouterr().out
    assert f"1 classes are no valid names of folders, such as {name[:40]!r}" in said


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("Subject;Group;Notes (age, drugs)\na;AD;x\nb;CN;y, z\n", [("a", "AD"), ("b", "NC")]),
        ("Subject;Group;MMSE, CDR, ADAS\na;AD;1\n", [("a", "AD")]),
        ("subject,class,notes\na,AD\nb,CN,x\nc\n", [("a", "AD"), ("b", "NC"), ("c", "")]),
        ("subject,class\na,AD,,\n", [("a", "AD")]),
        ("subject,class\na,mci\nb,MCI\nc,MCI\n", [("a", "MCI"), ("b", "MCI"), ("c", "MCI")]),
        ("subject,class\na,\xc4lter\nb,A\u0308lter\n", [("a", "\xc4lter"), ("b", "\xc4lter")]),
        ("subject,class\n50002.0,AD\n,CN\n", [("50002", "AD")]),
    ],
)
def test_tables_that_people_have_are_read(tmp_path: Path, text, rows):
    entries = read_table(write(tmp_path, text), {})
    assert [(entry.participant, entry.label) for entry in entries] == rows


def test_a_contrast_in_a_column_of_scans_is_no_scan(tmp_path: Path):
    table = write(
        tmp_path, "Subject,Scan,Group\np100,T1,AD\np200,T1,CN\np300,T1,CN\np400,T2,CN\np500,T1,AD\n"
    )
    finder = EntryFinder(table, {}, ["p200/T1"])
    assert finder.named_in("p200/T1").label == "NC"


def test_numbers_of_people_are_looked_for_at_one_depth(tmp_path: Path):
    table = write(tmp_path, "subject,dx\n1,AD\n2,CN\n3,AD\n4,CN\n")
    paths = [f"{person}/{session}/T1" for person in (1, 2, 3, 4, 98) for session in (1, 2)]
    finder = EntryFinder(table, {}, paths)
    found = [getattr(finder.named_in(path), "participant", None) for path in paths]
    assert found == ["1", "1", "2", "2", "3", "3", "4", "4", None, None]
    table = write(tmp_path, "subject,dx\n01-02,AD\n01-03,CN\n")
    finder = EntryFinder(table, {})
    assert finder.named_in("01-09/2011-01-02/x") is None
    assert finder.named_in("01-03/2011-01-02/x").participant == "01-03"
    table = write(tmp_path, "subject,dx\n0123-45,AD\n1,CN\n2,AD\n1001,AD\n1002,AD\n1003,CN\n")
    assert EntryFinder(table, {}).named_in("0123-45-02_T1").participant == "0123-45"
    deep = ["s1/1001/x", "s1/1002/x", "s2/cohort/1003/x"]
    assert EntryFinder(table, {}, deep).named_in(deep[-1]).participant == "1003"
    with pytest.raises(ValueError, match="several participants of the table: 1, 2"):
        EntryFinder(table, {}, ["1/2/T1", "2/1/T1"]).named_in("1/2/T1")


def test_contrasts_and_field_strengths_are_no_visits(tmp_path: Path):
    table = write(tmp_path, "Subject,Timepoint,Group\np100,T1,CN\np100,T2,AD\np100,3,MCI\n")
    paths = {"p100/followup/T1": "", "p100/T2/T1": "AD", "p100/MR_3T/x": "", "p100/MR3/x": "MCI"}
    paths |= {"p100_T1": "NC", "p100_T2": "AD"}
    finder = EntryFinder(table, {}, paths)
    assert {path: finder.named_in(path).label for path in paths} == paths


def test_a_date_that_may_be_of_two_days_is_told(tmp_path: Path, capsys):
    for day, told in ((5, True), (25, False)):
        table = write(tmp_path, f"subject,class,Acq Date\na,AD,03/{day:02}/2006\n")
        assert read_table(table, {})[0].date == f"2006-03-{day:02}"
        assert ("read as month/day/year" in capsys.readouterr().out) is told
    table = write(tmp_path, "subject,class,Acq Date\na,AD,3/4 2006\n")
    assert read_table(table, {})[0].date == ""


def test_a_hyphen_may_follow_the_group_of_a_participant():
    names = ("sub-PD-001_T1w", "sub-HC-002_x", "sub-01-78", "sub-a_ses-1", "sub-NYU-51/anat")
    found = [participant_in(name) for name in names]
    assert found == ["sub-PD-001", "sub-HC-002", "sub-01", "sub-a", "sub-NYU-51"]
    slices = (f"sub-anna{end}" for end in ("-ses1", "-t1", "-001", "-V2"))
    assert set(map(participant_in, slices)) == {"sub-anna"}


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
    assert finder.named_in("011_S_0004/MPRAGE/2005-10-12_10_12_00.0/I500_2") is None
    assert finder.named_in("011_S_0003/MPRAGE/I500_2").participant == "RID 3"
    assert finder.named_in("12/scan").participant == "RID 12"
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


@pytest.mark.parametrize("name", ["002_S_0295_{}", "sub-ADNI002S0295_ses-{}"])
def test_scans_that_hold_the_name_of_their_participant_stay_apart(tmp_path: Path, name):
    rows = "".join(
        f"{name.format(visit)},{label}\n" for visit, label in (("bl", "CN"), ("m48", "AD"))
    )
    paths = [name.format(visit) for visit in ("bl", "m48")]
    finder = EntryFinder(write(tmp_path, "scan,class\n" + rows), {}, paths)
    assert [finder.named_in(path)[0::2][:2] for path in paths] == [
        (paths[0], "NC"),
        (paths[1], "AD"),
    ]
    first = write(tmp_path, "scan,class\n" + rows.splitlines()[0] + "\n")
    assert EntryFinder(first, {}, paths).named_in(paths[1]).scan == ""
    whole = write(tmp_path, "scan,class\nsub-ADNI002S0295,CN\n")
    assert EntryFinder(whole, {}, ["002_S_0295"]).named_in("002_S_0295").label == "NC"


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


STUDIES = {  # tables as the studies export them, a path of a scan, and what is to be read
    "ADNI's search": (
        "Image Data ID,Subject,Group,Sex,Age,Visit,Modality,Description,Acq Date\n"
        "I12345,002_S_0295,CN,M,84,sc,MRI,MP-RAGE,4/18/2006\n",
        "002_S_0295/ADNI_002_S_0295_MR_MP-RAGE_br_raw_20060418193713091_1_S13408_I12345",
        ("NC", 84, "M"),
    ),
    "ADNI's images without the letter": (
        "Image Data ID,Subject,Group,Sex,Age\nI12345,002_S_0295,CN,M,84\n", "12345",
        ("NC", 84, "M"),
    ),
    "ADNIMERGE": (
        "RID,PTID,VISCODE,EXAMDATE,DX_bl,AGE,PTGENDER,IMAGEUID,DX\n"
        "295,002_S_0295,bl,2006-04-18,CN,84.8,Male,45108,CN\n"
        "295,002_S_0295,m48,2010-05-06,CN,84.8,Male,,Dementia\n",
        "002_S_0295/MPRAGE/2010-05-06_08_11_12.0/I174600/x", ("AD", 84.8, "M"),
    ),
    "ADNI's diagnoses, by roster number": (
        "Phase,RID,VISCODE,DXCURREN\nADNI1,295,m06,1\nADNI1,3,bl,3\n",
        "011_S_0003/MPRAGE/2005-09-12/I8801/x", ("3", None, ""),
    ),
    "ADNI's demographics": (
        "RID,PTGENDER,PTMARRY\n295,1,1\n3,2,1\n", "011_S_0003/I8801", ("", None, "F")
    ),
    "AIBL": (
        "RID,SITEID,VISCODE,DXCURREN\n12,2,bl,1\n13,2,bl,3\n",
        "AIBL_13_MR_MPRAGE_br_raw_20090101_1_S2_I77", ("3", None, ""),
    ),
    "OASIS-1": (
        "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV\nOAS1_0002_MR1,F,R,55,4,1,29,0,1147\n"
        "OAS1_0003_MR1,M,R,73,4,3,27,0.5,1454\n",
        "OAS1_0003_MR1/PROCESSED/OAS1_0003_MR1_mpr_n4_anon_111_t88_gfc", ("AD", 73, "M"),
    ),
    "OASIS-2": (
        "Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR\n"
        "OAS2_0009,OAS2_0009_MR1,Demented,1,0,M,R,68,12,2,27,0.5\n"
        "OAS2_0009,OAS2_0009_MR2,Converted,2,576,M,R,69,12,2,27,0.5\n",
        "OAS2_0009_MR2/RAW/mpr-1.nifti", ("Converted", 69, "M"),
    ),
    "OASIS-3's sessions": (
        "MR ID,Subject,M/F,Age,Scans\nOAS30001_MR_d0129,OAS30001,F,65,T1w\n"
        "OAS30001_MR_d0757,OAS30001,F,67,T1w\n",
        "OAS30001_MR_d0757/anat2/NIFTI/sub-OAS30001_ses-d0757_T1w", ("", 67, "F"),
    ),
    "OASIS-3's diagnoses": (
        "OASISID,OASIS_session_label,days_to_visit,age at visit,CDRTOT,dx1\n"
        "OAS30001,OAS30001_UDSb4_d0000,0,65.1,0,Cognitively normal\n"
        "OAS30002,OAS30002_UDSb4_d0000,0,67.2,0.5,AD Dementia\n",
        "OAS30002_MR_d0653/x", ("AD Dementia", 67.2, ""),
    ),
    "Clinica's BIDS of ADNI": (
        "participant_id\tsession_id\tdiagnosis\tage\tsex\n"
        "sub-ADNI002S0295\tses-M000\tCN\t84.8\tM\nsub-ADNI002S0295\tses-M048\tMCI\t88.8\tM\n",
        "sub-ADNI002S0295/ses-M048/anat/sub-ADNI002S0295_ses-M048_T1w", ("MCI", 88.8, "M"),
    ),
    "ADNI's table, Clinica's paths": (
        "Subject,Group,Sex\n002_S_0295,CN,M\n", "sub-ADNI002S0295/ses-M000/x", ("NC", None, "M")
    ),
    "BIDS in a spreadsheet's case": (
        "Participant ID;Dx Group;Age At Scan;SEX\nsub-01;AD;071Y;Female\nsub-02;n/a;150;x\n",
        "sub-01/anat/sub-01_T1w", ("AD", 71, "F"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_a_table_is_read_as_its_study_exports_it(tmp_path: Path, name):
    text, path, (label, age, sex) = STUDIES[name]
    other = "elsewhere/nobody_I1"
    entry = EntryFinder(write(tmp_path, text), {}, [path, other]).named_in(path)
    assert (entry.label, entry.sex) == (label, sex)
    assert math.isnan(entry.age) if age is None else entry.age == age
    assert EntryFinder(write(tmp_path, text), {}, [path, other]).named_in(other) is None


@pytest.mark.parametrize(
    ("name", "participant"),
    [
        ("OAS1_0001_MR1", "OAS1_0001"), ("oas2_0002_mr2", "OAS2_0002"),
        ("OAS30003_MR_d0129", "OAS30003"), ("ADNI_002_S_0295_MR_x_I12", "002_S_0295"),
        ("sub-01_ses-02_T1w", "sub-01"), ("AD-sub-7_x", "sub-7"), ("NIFD_1_S_0012_MR", "1_S_0012"),
        ("AIBL_12_MR_1", "AIBL_12"), ("miriad_188_AD_M_01_MR_1", "MIRIAD_188"),
        ("1003730", ""), ("substance_1", ""), ("S_1234", ""), ("I45108", ""), ("", ""),
    ],
)  # fmt: skip
def test_a_participant_is_read_from_a_name(name, participant):
    assert participant_in(name) == participant


def test_a_word_that_all_scans_share_is_no_participant():
    assert participants_of(["sub-study_1", "sub-study_2"]) == {}
    assert len(participants_of(["sub-1_1", "sub-1_2", "sub-2_1", "x"])) == 3
    assert participants_of(["OAS1_0001_MR1", "OAS1_0001_MR2", "x"]).keys() >= {"OAS1_0001_MR2"}


@pytest.mark.parametrize("name", ["Groß", "张伟", "André", "Müller", "सीता", "ไทย1"])
def test_names_of_any_language_are_found(tmp_path: Path, name):
    table = write(tmp_path, f"subject,dx\n{name},AD\nX1,CN\n")
    for form in ("NFC", "NFD"):  # macOS writes the latter
        paths = [unicodedata.normalize(form, f"x/{name}{end}") for end in ("_T1w", "_2", "/T1")]
        finder = EntryFinder(table, {}, paths)
        assert [finder.named_in(path).participant for path in paths] == [name] * 3
    names = [unicodedata.normalize("NFD", f"sub-{name}_1") for name in ("Müller", "Mühl")]
    assert [participant_in(name) for name in names] == ["sub-Müller", "sub-Mühl"]
    assert simplified(names[0]) == simplified("sub-Müller_1") == "müller1"
    table = write(tmp_path, f"subject,dx\n{name},AD\n{name}_2,CN\n")
    path = unicodedata.normalize("NFD", f"x/{name}_2_T1w")
    assert EntryFinder(table, {}).named_in(path).label == "NC"


def test_a_name_within_another_is_no_second_participant(tmp_path: Path):
    finder = EntryFinder(write(tmp_path, "subject,dx\nHC_1,CN\nHC_1_2,AD\n"), {})
    assert finder.named_in("HC_1_2_a").participant == "HC_1_2"
    assert finder.named_in("HC_1_a").participant == "HC_1"
    with pytest.raises(ValueError, match="several participants"):
        finder.named_in("HC_1/HC_1_2_a")
    overlapping = EntryFinder(write(tmp_path, "subject,dx\nA_B1,CN\nB1_C,AD\n"), {})
    with pytest.raises(ValueError, match="several participants"):
        overlapping.named_in("A_B1_C_T1")
    assert finder.hint(["HC_1_2_a"]) == ""


def test_scans_of_several_participants_are_said(tmp_path: Path, capsys):
    table = write(tmp_path, "subject,dx\nHC_1,CN\nHC_2,AD\n")
    assert list(find_entries(["HC_1_HC_2", "HC_2_x"], tmp_path, table, {})) == ["HC_2_x"]
    out = capsys.readouterr().out
    assert "of 1 scans it cannot be told whose they are: HC_1_HC_2 names several" in out


def test_flat_files_of_aibl_and_ppmi_are_found_by_their_number(tmp_path: Path):
    finder = EntryFinder(write(tmp_path, "Subject,Group\n3103,Control\n14,AD\n"), {})
    assert finder.named_in("flat/PPMI_3103_MR_x_S1_I13").label == "NC"
    assert finder.named_in("AIBL_14_MR_1").participant == "14"


def test_only_words_for_visits_choose_a_row(tmp_path: Path):
    table = write(tmp_path, "subject,visit,dx\np100,1,CN\np100,2,AD\n")
    paths = ["cases_2/p100/T1", "p100/phases-1/x", "diseases2/p100", "visit2/p100"]
    paths += ["p100/scanVisit2", "p100/V3", "p100_visit1", "p100/2/x"]
    table.write_text(table.read_text() + "p100,3,\n")
    finder = EntryFinder(table, {}, paths)
    found = [finder.named_in(path).label for path in paths]
    assert found == ["", "", "", "AD", "AD", "", "NC", ""]
    assert finder.by_visit == ["visit2/p100", "p100/scanVisit2", "p100_visit1"]


def test_classes_are_renamed_in_any_case(tmp_path: Path, capsys):
    table = write(tmp_path, "subject,dx\na,cn\nb,control\nc,DEMENTIA\nd,MCI\n")
    assert [entry.label for entry in read_table(table, {})] == ["NC", "NC", "AD", "MCI"]
    assert "class DEMENTIA is called AD" in capsys.readouterr().out


def test_a_table_that_is_not_utf_8_is_said(tmp_path: Path, capsys):
    read_table(write(tmp_path, "subject,dx\nMüller,AD\n".encode("cp1252")), {})
    assert "is read as cp1252, such as 'ject,dx\\nMüller,AD\\n'" in capsys.readouterr().out
    text = "subject,dx\r\nMüller,AD\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        read_table(write(tmp_path, text.encode(encoding)), {})
    assert "cp1252" not in capsys.readouterr().out


VISITS = (
    "subject,visit,date,dx\np100,bl,1/2/2010,CN\np100,m06,7/9/2010,MCI\np100,m24,2012-03-04,AD\n"
)


@pytest.mark.parametrize(
    ("path", "none", "first", "last"),
    [
        ("p100/ses-M000/x", "NC", "NC", "NC"), ("p100_bl", "NC", "NC", "NC"),
        ("p100/m06/x", "MCI", "MCI", "MCI"), ("p100/ses-M006/x", "MCI", "MCI", "MCI"),
        ("p100/2012-03-04_11_12_13.0/x", "AD", "AD", "AD"), ("p100_20100102_x", "NC", "NC", "NC"),
        ("p100/m60/x", "", "NC", "AD"), ("p100/x", "", "NC", "AD"),
    ],
)  # fmt: skip
def test_the_class_is_that_of_the_visit_that_a_path_shows(tmp_path: Path, path, none, first, last):
    for text in (VISITS, "\n".join([VISITS.split()[0], *VISITS.split()[:0:-1]])):  # in any order
        table = write(tmp_path, text)
        for pick, label in (("none", none), ("first", first), ("last", last)):
            assert EntryFinder(table, {}, [path], pick).named_in(path).label == label


def test_a_visit_in_a_name_beats_the_number_of_the_scan_of_a_day(tmp_path: Path):
    text = "subject,visit,dx\nmiriad_201,1,MCI\nmiriad_201,2,AD\nHC001,1,CN\nHC001,2,AD\n"
    paths = ["miriad_201_AD_M_02_MR_1", "HC001_V1", "HC001_V2_T1w", "HC001/MR1/ses-2", "HC001_MR2"]
    finder = EntryFinder(write(tmp_path, text), {}, paths)
    assert [finder.named_in(path).label for path in paths] == ["AD", "NC", "AD", "AD", "AD"]


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("12.10.2005", "14.11.2009"), ("12.10.05", "2.1.09"), ("12-OCT-05", "14-Nov-2009"),
        ("10/02/2005", "05/08/2006"), ("25/12/2005", "02/01/2006"), ("05/11/2005", "13/11/2005"),
        ("2005/10/12", "2009-11-14"), ("2009-11-14T10:00", "2009-11-15 09:00:00"),
    ],
)  # fmt: skip
def test_rows_are_sorted_by_dates_as_people_write_them(tmp_path: Path, early, late):
    table = write(tmp_path, f"subject;examdate;dx\nHC001;{late};AD\nHC001;{early};CN\n")
    for pick, label in (("first", "NC"), ("last", "AD")):
        assert EntryFinder(table, {}, ["HC001"], pick).named_in("HC001").label == label


def test_rows_without_dates_have_no_last_one(tmp_path: Path, capsys):
    table = write(tmp_path, "subject,examdate,dx\nHC001,spring,AD\nHC001,,CN\n")
    assert EntryFinder(table, {}, ["HC001"]).named_in("HC001").label == ""
    assert "note: " in (out := capsys.readouterr().out) and "1 dates cannot be read" in out
    with pytest.raises(ValueError, match="no dates or ages to sort them by"):
        EntryFinder(table, {}, ["HC001"], "last").named_in("HC001")


def test_gaps_in_a_column_of_participants_are_said(tmp_path: Path, capsys):
    text = "subject;imageid;dx\nHC001;I1001;AD\n;I1002;AD\nHC002;I1003;CN\n"
    read_table(write(tmp_path, text), {}, {"I1001", "I1002", "I1003"})
    assert "1 of 3 rows have no participant, such as I1002" in capsys.readouterr().out
    read_table(write(tmp_path, "image,dx\nOAS1_0001_MR1,AD\nOAS1_0002_MR1,CN\n"), {"scan": "image"})
    assert "have no participant" not in capsys.readouterr().out


def test_a_short_name_may_begin_the_name_of_a_file(tmp_path: Path):
    finder = EntryFinder(write(tmp_path, "subject,dx\nP01,AD\nP02,CN\n"), {})
    found = [finder.named_in(path) for path in ("P01", "P01_V2", "x/P02-T1.nii", "XP01_2", "P0_1")]
    assert [entry and entry.participant for entry in found] == ["P01", "P01", "P02", None, None]


def test_two_spellings_of_a_participant_are_one(tmp_path: Path):
    names = [
        "002_S_0002_1",
        "sub-ADNI002S0002_2",
        "sub-OAS30001_x",
        "OAS30001_MR",
        "sub-a",
        "sub-A",
    ]
    found = list(participants_of(names).values())
    assert found == ["002_S_0002"] * 2 + ["sub-OAS30001"] * 2 + ["sub-a"] * 2
    names = ["OAS1_0001_MR1", "sub-OAS10001_T1w", "sub-OASIS10001_x", "OAS1_0002_MR1"]
    assert list(participants_of(names).values()) == ["OAS1_0001"] * 3 + ["OAS1_0002"]
    table = write(tmp_path, "imageid;subject\nI1;002_S_0295\nI2;sub-ADNI002S0295\n")
    finder = EntryFinder(table, {})
    paths = ("I1", "I2", "sub-ADNI002S0295_T1w", "002_S_0295_x")
    assert {finder.named_in(path).participant for path in paths} == {"002_S_0295"}
    apart = ["sub-1-12", "sub-11-2", "PPMI_3103_1", "PPMI_31031", "sub-01", "1", "sub-X1S12345"]
    assert one_spelling([*apart, "sub-Y1S12345"]) == [*apart, "sub-Y1S12345"]
    assert one_spelling(["1-12", "11-2", "P1", "p1", "Straße", "STRASSE"]) == [
        "1-12",
        "11-2",
        "P1",
        "P1",
        "Straße",
        "Straße",
    ]


def test_rows_of_a_participant_agree_on_sex(tmp_path: Path, capsys):
    table = write(tmp_path, "subject,visit,sex\na1,1,F\na1,2,\nb1,1,F\nb1,2,M\n")
    assert [e.sex for e in read_table(table, {})] == ["F", "F", "", ""]
    assert "rows of 1 participants differ in sex, such as b1" in capsys.readouterr().out


def test_an_id_that_repeats_is_the_participant(tmp_path: Path):
    table = write(tmp_path, "id,visit,dx\np100,bl,CN\np100,m12,AD\np200,bl,CN\n")
    paths = ["p100/m12/x", "p200/x"]
    finder = EntryFinder(table, {}, paths)
    assert [finder.named_in(path)[1:3] for path in paths] == [("p100", "AD"), ("p200", "NC")]


def test_numbers_of_rows_are_no_scans(tmp_path: Path, capsys):
    table = write(tmp_path, "id,subject,dx\n1,sub-02,AD\n2,sub-01,CN\n3,sub-03,CN\n")
    finder = EntryFinder(table, {}, ["sub-01/x", "sub-02/x"])
    assert finder.named_in("sub-01/x").label == "NC"
    assert "column id names no file, and is not used" in capsys.readouterr().out
    table = write(tmp_path, "scan,subject,dx\nz9,p100,AD\nz8,p200,CN\n")
    assert EntryFinder(table, {}, ["p200/x"]).named_in("p200/x").label == "NC"
    assert "column scan names no file" in capsys.readouterr().out
    finder = EntryFinder(table, {"scan": ""}, ["p200/z9"])
    assert finder.named_in("p200/z9").label == "NC"  # as told: there is no column of scans
    rows = "p100,I11,AD\np200,,AD\np300,,AD\np400,,CN\n"  # few scans are known
    table = write(tmp_path, f"subject,Image Data ID,dx\n{rows}")
    assert EntryFinder(table, {}, ["I11/x"]).named_in("I11/x").participant == "p100"


def test_nearly_the_same_names_are_shown(tmp_path: Path):
    finder = EntryFinder(write(tmp_path, "subject,dx\n7,AD\nPat_12,CN\n"), {}, ["007", "x"])
    assert finder.hint(["007", "pat-12/a", "x"]).endswith(
        "no row names 007, pat-12; did you mean 7, Pat_12? Rename the rows or the files"
    )
    assert finder.hint(["x", "70"]) == ""
    assert simplified("sub-0100") == "100" and simplified("002_S_0295") == "2s295"


@pytest.mark.parametrize("cell", ["n/a", "", "NA", "NaN", "#N/A", "-4", "None"])
def test_a_class_that_is_missing_is_none(tmp_path: Path, cell):
    table = write(tmp_path, f"subject,dx,age\np1,{cell},-4\np2,AD,70\n")
    first, second = read_table(table, {})
    assert first.label == "" and math.isnan(first.age) and second.label == "AD"


def test_a_column_that_stands_twice_is_named(tmp_path: Path):
    table = write(tmp_path, "subject,dx,dx\np1,AD,CN\n")
    with pytest.raises(UserError, match="table.csv has several columns dx: rename all but one"):
        read_table(table, {})
    table = write(tmp_path, "subject,DX,dx\np1,AD,CN\n")
    with pytest.raises(UserError, match="DX and dx may both be the class; rename one"):
        read_table(table, {})
    assert read_table(table, {"class": "dx"})[0].label == "NC"
    table = write(tmp_path, "subject,dx,x,x\np1,AD,1,2\n")
    assert read_table(table, {})[0].label == "AD"  # the repeated one is not used


@pytest.mark.parametrize(
    "content",
    [
        "subject,class\rm\xfcller,AD\rb,NC\r".encode("cp1252"),
        "subject,class\r\nm\xfcller,AD\r\nb,NC".encode("utf-8-sig"),
        "subject\tclass\nm\xfcller\tAD\nb\tNC\n".encode("utf-16"),
        "sep=;\nsubject;class\nm\xfcller;AD\nb;NC\n\n\n".encode("cp1252"),
        'subject|class\n"m\xfcller"|"AD"\nb|NC\n'.encode(),
    ],
)
def test_every_encoding_and_line_end_of_spreadsheets_is_read(tmp_path: Path, content):
    entries = read_table(write(tmp_path, content), {})
    assert [(e.participant, e.label) for e in entries] == [("m\xfcller", "AD"), ("b", "NC")]


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
