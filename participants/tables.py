"""Read tables of scans and participants, such as exports of ADNI and OASIS or a participants.tsv.

Any other CSV or TSV works too, if the names of its columns are known or given.
"""

import csv
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from config import UserError
from participants.names import normalized, participant_in, plain_name, spellings, stem
from utils import first_line, print_once

MANIFEST = "manifest.csv"
# Names of columns in lower case without punctuation, as ADNI, AIBL, OASIS and BIDS export them
COLUMNS = {
    "scan": "imagedataid imageid imageuid loniimage mriid mrid mrsessionid mrsession scanid scan "
    "id",
    "participant": "participantid subjectid subject ptid oasisid participant patientid patient rid",
    "class": "group researchgroup dxgroup diagnosis dx dxcurren dxbl dx1 class label cdr cdglobal "
    "cdrtot",
    "age": "age ageatscan ageatvisit ageyears ageatentry",
    "sex": "sex gender ptgender mf",
    "visit": "visit viscode sessionid session timepoint",
    "date": "acqdate scandate studydate examdate visitdate date",
}
RATINGS = ("cdr", "cdglobal", "cdrtot")  # clinical dementia rating: 0 is NC, more is AD
# ADNI's slices are usually shared as AD and NC; its table ADNIMERGE writes Dementia for AD
RENAMED = {"cn": "NC", "nc": "NC", "control": "NC", "dementia": "AD", "ad": "AD"}
MISSING = ("", "n/a", "na", "nan", "none", "null", "-", ".", "?", "#n/a", "-4")  # -4: in ADNI
SEXES = {"F": ("f", "female", "w", "woman", "weiblich"), "M": ("m", "male", "man", "männlich")}
WINDOWS = "cp1252"  # encoding of spreadsheet programs in the west of Europe
MAX_TABLE = 200_000_000  # bytes
MAX_AGE = 130  # years


class Entry(NamedTuple):
    """What a table says about one scan or, if `scan` is empty, about a participant."""

    scan: str
    participant: str
    label: str  # class, "" if unknown
    age: float  # years, NaN if unknown
    sex: str  # F, M or ""
    visit: str = ""
    date: str = ""  # YYYY-MM-DD


class UnrelatedTable(UserError):
    """A table names none of the scans."""


# Files


def decode_text(content: bytes) -> tuple[str, bool]:
    """Text in the encodings and with the line ends of spreadsheet programs; whether it is Unicode.

    What is not is read as WINDOWS, or as Latin-1 where that has no such letter.
    """
    utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ("utf-16",) if utf_16 else ("utf-8-sig", WINDOWS):
        try:
            text = content.decode(encoding)
            break
        except UnicodeDecodeError:
            text = content.decode("latin-1")  # never fails
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding != WINDOWS


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV or TSV, cells stripped. Raises UserError naming the file."""
    try:
        if path.stat().st_size > MAX_TABLE:
            raise UserError(f"{path} is larger than {MAX_TABLE / 1e6:.0f} MB")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if content[:2] == b"PK" or content[:4] == b"\xd0\xcf\x11\xe0":
        raise UserError(f"{path} is an Excel or OpenDocument file: save it as CSV")
    text, is_unicode = decode_text(content)
    if not is_unicode and (odd := re.search(r"[^\x00-\x7f]", text)):
        part, advice = text[max(0, odd.start() - 9) :][:20], "save it as UTF-8 if that is wrong"
        print_once(f"note: {path} is read as {WINDOWS}, such as {part!r}; {advice}")
    told = re.match(r'"?sep=(.)"?\n', text)  # a first line that Excel writes
    text = text[told.end() :] if told else text
    delimiter = told[1] if told else max("\t,;|", key=lambda sign: regularity(text, sign))
    try:
        lines = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error}") from error
    lines = [[cell.strip() for cell in line] for line in lines if any(map(str.strip, line))]
    if len(lines) < 2:
        raise UserError(f"{path} holds no row")
    header, *rows = lines
    for number, row in enumerate(rows, 2):
        if any(row[len(header) :]):
            raise UserError(f"{path}: row {number} has {len(row)} cells, the header {len(header)}")
    # some programs leave out empty last cells
    if short := [i for i, row in enumerate(rows, 2) if len(row) < len(header)]:
        text = f"rows, such as row {short[0]}, are shorter than the header"
        print_once(f"note: {path}: {len(short)} {text}: their last cells count as empty")
    return header, [(row + [""] * len(header))[: len(header)] for row in rows]


def regularity(text: str, delimiter: str) -> tuple[float, int]:
    """How well a sign splits a table: the share of rows as long as the header, and its cells."""
    try:
        lines = [*csv.reader(io.StringIO(text[:100_000]), delimiter=delimiter)][:100]
    except csv.Error:
        return 0, 0
    counts = [len(line) for line in lines if line] or [0]
    return (counts.count(counts[0]) / len(counts) if counts[0] > 1 else 0), counts[0]


# Cells


def plain_column(name: str) -> str:
    """A column's name in lower case without spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.lower())


def is_missing(cell: str) -> bool:
    """Whether a cell holds nothing, or a word for nothing."""
    return cell.lower() in MISSING


def usual_class(name: str) -> str:
    """NC for CN and Control, AD for Dementia, in any case; other names but `normalized`."""
    return RENAMED.get(name.casefold(), normalized(name))


def class_of(value: str, column: str) -> str:
    """The class of a cell, "" if none; a clinical dementia rating is NC if 0 and AD if higher."""
    if is_missing(value):
        return ""
    if plain_column(column) not in RATINGS:
        return usual_class(value)
    rating = finite_number(value)
    return "" if not rating >= 0 else "NC" if rating == 0 else "AD"


def age_of(value: str) -> float:
    """Years in a cell, such as 71.5 or DICOM's 071Y; NaN if it holds no age."""
    age = finite_number(value.rstrip("Yy"))
    return age if 0 < age < MAX_AGE else math.nan


def sex_of(value: str, column: str) -> str:
    """F, M or "". ADNI's and AIBL's column PTGENDER has 1 for men and 2 for women."""
    if plain_column(column) == "ptgender":
        value = {"1": "M", "2": "F"}.get(value, value)
    return next((sex for sex, words in SEXES.items() if value.lower() in words), "")


def date_of(value: str, day_first: bool | None = False) -> str:
    """A date as YYYY-MM-DD, "" if there is none; ADNI writes 10/12/2005 for the 12th of October."""
    slashes = "%d/%m/%" if day_first else "%m/%d/%"
    for form in ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%", "%d-%b-%", slashes):
        for year in "Yy" if form[-1] == "%" else ("",):
            with suppress(ValueError):
                return str(datetime.strptime(re.split(r" |(?<=\d)T", value)[0], form + year).date())
    return ""


def day_comes_first(values: Sequence[str]) -> bool | None:
    """Whether dates with slashes have the day before the month; None if they could be either."""
    found = [re.match(r"(\d{1,2})/(\d{1,2})/", value) for value in values]
    first, second = (max((int(m[i]) for m in found if m), default=0) for i in (1, 2))
    return True if first > 12 else None if 0 < second <= 12 else False


def participant_of(value: str, column: str) -> str:
    """The participant in a cell, "" if none; ADNI's and AIBL's roster number 3 is RID 3."""
    value = re.sub(r"^(\d+)\.0$", r"\1", value)  # pandas writes numbers so beside empty cells
    roster = plain_column(column) == "rid" and value.isdigit()
    return "" if is_missing(value) else f"RID {int(value)}" if roster else value


def named_by(value: str, column: str) -> set[str]:
    """All ways in which a path may name the scan or participant in a cell."""
    return spellings(participant_of(value, column), of_scan=True)


def counts_rows(cells: Sequence[str]) -> bool:
    """Whether a column holds the numbers of the rows, from 0 or 1 on."""
    return cells in [tuple(map(str, range(first, first + len(cells)))) for first in (0, 1)]


def are_shared(scans: Sequence[str], people: Sequence[str]) -> bool:
    """Whether the values of a column, such as T1, stand beside two participants each, or more."""
    pairs = {pair for pair in zip(scans, people, strict=True) if not is_missing(pair[0])}
    return 2 * len({scan for scan, _ in pairs}) <= len(pairs)


# Entries


def choose_columns(
    path: Path,
    header: list[str],
    cells: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
    names: set[str] | None,
) -> dict[str, str]:
    """The column of each part of an entry: that of `given`, else the first known and filled one.

    Raises UserError if a column is unknown, missing or there twice.
    """
    known = {}
    for what, plain in COLUMNS.items():
        fitting = [c for name in plain.split() for c in header if plain_column(c) == name]
        known[what] = [c for c in fitting if not all(map(is_missing, cells[c]))] or fitting
    useless = choose_names(path, known, cells, given, names)
    for what, name in given.items():
        if what not in COLUMNS:
            raise UserError(f"columns: no {what!r}; there are {', '.join(COLUMNS)}")
        if name and name not in header:
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(header)}")
        known[what] = [name] if name else []
    found = {what: chosen[0] for what, chosen in known.items() if chosen}
    for what, name in found.items():
        alike = [c for c in header if plain_column(c) == plain_column(name)]
        if header.count(name) > 1:
            raise UserError(f"{path} has several columns {name}: rename all but one")
        if len(alike) > 1 and what not in given:
            text = f"columns {' and '.join(alike)} may both be the {what}"
            raise UserError(f"{path}: {text}; rename one, or give prepare.py --columns {what} NAME")
    if not {"scan", "participant"} & found.keys():
        if useless:
            text = f"column {' and '.join(useless)} names none of the scans"
            raise UnrelatedTable(f"{path}: {text}: is it the right table?")
        text = "rename one to scan or participant, or give prepare.py --columns scan NAME"
        raise UserError(f"{path}: no column names scans or participants; {text}")
    return found


def choose_names(
    path: Path,
    known: dict[str, list[str]],
    cells: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
    names: set[str] | None,
) -> list[str]:
    """Leave only those columns of scans and participants in `known` that name one of `names`.

    A column `id` whose values repeat holds participants. Numbers of rows are no scans if another
    column names participants. -> the columns of scans that name none.
    """
    useless: list[str] = []
    scans, people = known["scan"], known["participant"]
    people += [c for c in scans if plain_column(c) == "id" and len(set(cells[c])) < len(cells[c])]
    listed = scans = [c for c in scans if c not in people]
    if people:
        scans = [c for c in scans if not are_shared(cells[c], cells[people[0]])]
    if names is not None:
        named = [c for c in scans + people if any(names & named_by(v, c) for v in cells[c])]
        people.sort(key=lambda c: c not in named)
        if people and people[0] in named:
            named = [c for c in named if not counts_rows(cells[c])]
        if (useless := [c for c in listed if c not in named]) and "scan" not in given:
            text = f"column {' and '.join(useless)} names no file, and is not used"
            print_once(f"note: {path}: {text}")
        scans = [c for c in scans if c in named]
    known["scan"] = scans
    return useless


def read_table(path: Path, given: Mapping[str, str], names: set[str] | None = None) -> list[Entry]:
    """The entries of a CSV or TSV that name a scan or a participant.

    `given` names columns that are called otherwise than in `COLUMNS`; an empty name says that the
    table has no such column. `names` are the parts of all paths that could name a scan. Raises
    UserError if the file is no table or a column is missing. A class that is no plain name counts
    as empty.
    """
    header, rows = read_rows(path)
    cells = dict(zip(header, zip(*rows, strict=True), strict=False))
    column = choose_columns(path, header, cells, given, names)
    entries, name, unnamed = [], column.get("class", ""), []
    dates = cells[column["date"]] if "date" in column else ()
    odd, day_first, invalid = [], day_comes_first(dates), []
    classes = spellings_of_classes(cells[name], name) if name else {}
    if day_first is None:
        such = next(date for date in dates if re.match(r"\d{1,2}/", date))
        print_once(f"note: {path}: dates such as {such} are read as month/day/year")
    for row in zip(*(cells[c] for c in column.values()), strict=True):
        cell = defaultdict(str, zip(column, row, strict=True))
        scan, label = stem(cell["scan"]), class_of(cell["class"], name)
        if is_missing(scan):
            scan = ""
        label = classes.get(label.casefold(), label)
        if label and not plain_name(label):
            invalid.append(label)
            label = ""
        participant = participant_of(cell["participant"], column.get("participant", ""))
        date = date_of(cell["date"], day_first)
        if not date and not is_missing(cell["date"]):
            odd.append(cell["date"])
        if scan and not participant and not participant_in(scan):
            unnamed.append(scan)
        if participant := participant or participant_in(scan) or scan:
            sex = sex_of(cell["sex"], column.get("sex", ""))
            told = age_of(cell["age"]), sex, cell["visit"], date
            entries.append(Entry(scan, participant, label, *told))
    print_once(f"{path}: {', '.join(f'{what} = {name}' for what, name in column.items())}")
    for what, count in count_known(entries).items():
        if what in column and (without := len(rows) - count):
            unread = [v for v in unreadable(cells[column[what]], column[what], what) if v]
            such = f", such as {unread[0][:20]!r}" if unread else ""
            print_once(f"note: {path}: {without} of {len(rows)} rows have no readable {what}{such}")
    if invalid:
        text = f"{len(invalid)} classes are no valid names of folders, such as {invalid[0][:40]!r}"
        print_once(f"note: {path}: {text}: they count as empty")
    if odd:
        print_once(f"note: {path}: {len(odd)} dates cannot be read, such as {odd[0][:20]!r}")
    if unnamed:
        text = f"{len(unnamed)} of {len(rows)} rows have no participant, such as {unnamed[0]}"
        print_once(f"note: {path}: {text}: each counts as a participant of its own")
    for old in sorted({*cells[name]} if name and plain_column(name) not in RATINGS else ()):
        new = classes.get(usual_class(old).casefold(), old)
        if new != old and not is_missing(old):
            print_once(f"{path}: class {old} is called {new}")
    return agree_on_sex(path, entries)


def spellings_of_classes(cells: Sequence[str], column: str) -> dict[str, str]:
    """The most frequent spelling of each class of a column, by the class in lower case."""
    found: dict[str, str] = {}
    for label, _ in Counter(class_of(cell, column) for cell in cells).most_common():
        found.setdefault(label.casefold(), label)
    return found


def unreadable(values: Sequence[str], column: str, what: str) -> list[str]:
    """The values of a column from which no class, age or sex can be read."""
    if what == "age":
        return [value for value in values if math.isnan(age_of(value))]
    read = class_of if what == "class" else sex_of
    return [value for value in values if not read(value, column)]


def count_known(entries: list[Entry]) -> dict[str, int]:
    """How many entries have a class, an age, a sex."""
    return {
        "class": sum(bool(entry.label) for entry in entries),
        "age": sum(not math.isnan(entry.age) for entry in entries),
        "sex": sum(bool(entry.sex) for entry in entries),
    }


def agree_on_sex(path: Path, entries: list[Entry]) -> list[Entry]:
    """The entries, with the same sex in all rows of a participant; "" if rows contradict."""
    known = defaultdict(set)
    for entry in entries:
        known[entry.participant] |= {entry.sex} - {""}
    if unclear := sorted(name for name, sexes in known.items() if len(sexes) > 1):
        text = f"rows of {len(unclear)} participants differ in sex, such as {unclear[0]}"
        print_once(f"note: {path}: {text}: their sex is unknown")
    sex = {name: next(iter(sexes)) if len(sexes) == 1 else "" for name, sexes in known.items()}
    return [entry._replace(sex=sex[entry.participant]) for entry in entries]


def finite_number(text: str) -> float:
    """The number in a table cell; NaN if the cell holds no finite number."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def manifest_rows(root: Path) -> dict[str, dict[str, str]]:
    """Rows of ROOT/manifest.csv by scan; empty without it. Raises UserError if it is damaged."""
    path, rows = root / MANIFEST, {}
    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row or None in row.values():
                    raise ValueError(f"row {len(rows) + 2} is longer or shorter than the header")
                if row["id"] in rows:
                    raise ValueError(f"two rows have the id {row['id']}")
                if not row["participant"]:
                    raise ValueError(f"the row of id {row['id']} names no participant")
                rows[row["id"]] = row
    except KeyError as error:
        raise UserError(f"{path} has no column {error}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    return rows


def read_manifest(root: Path) -> dict[str, Entry]:
    """The entry of each scan in ROOT/manifest.csv. Raises UserError as `manifest_rows` does."""
    found = {}
    for scan, row in manifest_rows(root).items():
        label, age, sex = (row.get(column, "") for column in ("class", "age", "sex"))
        found[scan] = Entry(scan, row["participant"], label, finite_number(age), sex)
    return found
