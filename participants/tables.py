"""Read tables of scans and participants, such as exports of ADNI and OASIS or a participants.tsv.

Any other CSV or TSV works too, if the names of its columns are known or given.
"""

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from config import UserError
from participants.names import participant_in, plain_name, stem
from utils import first_line, print_once

MANIFEST = "manifest.csv"
# Column names in lower case without punctuation; the first one that a table has is used
COLUMNS = {
    "scan": ("image data id", "image id", "imageuid", "mri id", "scan id", "scan", "id"),
    "participant": ("participant id", "subject id", "subject", "ptid", "participant"),
    "class": ("group", "research group", "dx group", "diagnosis", "dx", "class", "label", "cdr"),
    "age": ("age", "age at scan", "age years"),
    "sex": ("sex", "gender", "m f"),
}
RENAMED = {"CN": "NC", "Control": "NC"}  # ADNI's slices are usually shared with the class name NC
MAX_TABLE = 200_000_000  # bytes


class Entry(NamedTuple):
    """What a table says about one scan or, if `scan` is empty, about a participant."""

    scan: str
    participant: str
    label: str  # class, "" if unknown
    age: float  # years, NaN if unknown
    sex: str  # F, M or ""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV or TSV, cells stripped. Raises UserError naming the file."""
    try:
        if path.stat().st_size > MAX_TABLE:
            raise UserError(f"{path} is larger than {MAX_TABLE / 1e6:.0f} MB")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if content[:2] == b"PK" or content[:4] == b"\xd0\xcf\x11\xe0":
        raise UserError(f"{path} is an Excel or OpenDocument file: save it as CSV")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # the encoding of older programs
    first = text.partition("\n")[0]
    delimiter = max("\t,;", key=first.count)
    try:
        lines = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error}") from error
    lines = [[cell.strip() for cell in line] for line in lines if any(map(str.strip, line))]
    if len(lines) < 2:
        raise UserError(f"{path} holds no row")
    header = lines[0]
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise UserError(f"{path}: row {number} has {len(line)} cells, the header {len(header)}")
    return header, [dict(zip(header, line, strict=True)) for line in lines[1:]]


def choose_columns(path: Path, header: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """The column of each part of an entry. Raises UserError if a column is missing or unknown."""
    plain = {re.sub(r"[^a-z0-9]+", " ", name.lower()).strip(): name for name in header}
    known = {what: [plain[n] for n in names if n in plain] for what, names in COLUMNS.items()}
    found = {what: names[0] for what, names in known.items() if names}
    for what, name in given.items():
        if what not in COLUMNS:
            raise UserError(f"columns: no {what!r}; there are {', '.join(COLUMNS)}")
        if name not in header:
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(header)}")
        found[what] = name
    if not {"scan", "participant"} & found.keys():
        raise UserError(f"{path}: no column names scans or participants; add --columns scan NAME")
    return found


def class_of(value: str, column: str) -> str:
    """The class of a cell; a clinical dementia rating (CDR) is NC if 0 and AD if higher."""
    if column.lower() != "cdr":
        return RENAMED.get(value, value)
    rating = finite_number(value)
    return "" if math.isnan(rating) else "NC" if rating == 0 else "AD"


def read_table(path: Path, given: Mapping[str, str]) -> list[Entry]:
    """The entries of a CSV or TSV that name a scan or a participant.

    `given` names columns that are called otherwise than in `COLUMNS`. Raises UserError if the file
    is no table, a column is missing, or a class is no plain name.
    """
    header, rows = read_rows(path)
    column = choose_columns(path, header, given)
    entries = []
    for row in rows:
        cell = {what: row[name] for what, name in column.items()}
        scan, name = stem(cell.get("scan", "")), column.get("class", "")
        label = class_of(cell.get("class", ""), name)
        participant = cell.get("participant") or participant_in(scan) or scan
        if label and not plain_name(label):
            raise UserError(f"{path}: {label[:40]!r} in column {name!r} is no valid name")
        if participant:
            age, sex = finite_number(cell.get("age", "")), cell.get("sex", "")[:1].upper()
            entries.append(Entry(scan, participant, label, age, sex if sex in "FM" else ""))
    print_once(f"{path}: {', '.join(f'{what} = {name}' for what, name in column.items())}")
    known = {
        "class": sum(bool(entry.label) for entry in entries),
        "age": sum(not math.isnan(entry.age) for entry in entries),
        "sex": sum(bool(entry.sex) for entry in entries),
    }
    for what, count in known.items():
        if what in column and (without := len(rows) - count):
            print_once(f"note: {path}: {without} of {len(rows)} rows have no readable {what}")
    return entries


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
