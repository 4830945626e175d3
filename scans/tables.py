"""Tables of participants: a spreadsheet beside scans, and the manifest of a folder of slices.

A spreadsheet is ADNI's own export, OASIS's, a BIDS participants.tsv, or any other CSV or TSV whose
columns are named; a manifest is what an import writes into the folder that it fills.
"""

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from config import UserError
from dataset import Entry, finite_number
from utils import print_once

# Names of columns, in small letters and without signs; the first that is there is taken
COLUMNS = {
    "scan": ("image data id", "image id", "imageuid", "mri id", "scan id", "scan", "id"),
    "participant": ("participant id", "subject id", "subject", "ptid", "participant"),
    "class": ("group", "research group", "dx group", "diagnosis", "dx", "class", "label", "cdr"),
    "age": ("age", "age at scan", "age years"),
    "sex": ("sex", "gender", "m f"),
}
RENAMED = {"CN": "NC", "Control": "NC"}  # as the slices that circulate call ADNI's controls
# How a name says whose scan it is: BIDS, ADNI, OASIS-1 with its number of the visit, OASIS-2 and 3
PARTICIPANT = re.compile(r"sub-[A-Za-z0-9]+|\d{3}_S_\d{4,5}|OAS1_\d{4}|OAS[23]_?\d{4}")
MAX_TABLE = 200_000_000  # bytes


def plain_name(name: str) -> bool:
    """Whether a name from a file may become that of a folder: nothing that leads elsewhere."""
    return bool(name) and len(name) <= 100 and name.isprintable() and not (
        name[0] in ". " or set(name) & set('/\\:*?"<>|')
    )  # fmt: skip


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV or TSV, without spaces around. Raises UserError naming the file."""
    try:
        if path.stat().st_size > MAX_TABLE:
            raise UserError(f"{path}: a table of more than {MAX_TABLE / 1e6:.0f} MB")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if content[:2] == b"PK" or content[:4] == b"\xd0\xcf\x11\xe0":
        raise UserError(f"{path} is a spreadsheet of a program: save it as CSV")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # as older programs save
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
    """The column for each thing that is known of an entry. Raises UserError naming what lacks."""
    plain = {re.sub(r"[^a-z0-9]+", " ", name.lower()).strip(): name for name in header}
    found = {}
    for what, names in COLUMNS.items():
        if name := next((plain[n] for n in names if n in plain), None):
            found[what] = name
    for what, name in given.items():
        if what not in COLUMNS:
            raise UserError(f"columns: no {what!r}; there are {', '.join(COLUMNS)}")
        if name not in header:
            raise UserError(f"{path} has no column {name!r}; it has {', '.join(header)}")
        found[what] = name
    if not {"scan", "participant"} & found.keys():
        raise UserError(f"{path}: no column names scans or participants; say --columns scan NAME")
    return found


def class_of(value: str, column: str) -> str:
    """The class that a cell stands for; a clinical dementia rating is NC at 0 and AD above."""
    if column.lower() != "cdr":
        return RENAMED.get(value, value)
    rating = finite_number(value)
    return "" if math.isnan(rating) else "NC" if rating == 0 else "AD"


def stem(name: str) -> str:
    """The name of a volume without its endings."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", name, flags=re.IGNORECASE)


def participant_in(name: str) -> str:
    """Whose scan it is by its name, in BIDS, ADNI and OASIS; "" if it does not say."""
    found = PARTICIPANT.search(name)
    return found[0] if found else ""


def read_table(path: Path, given: Mapping[str, str]) -> list[Entry]:
    """The entries of a spreadsheet that name a scan or a participant.

    Args:
        path: CSV or TSV.
        given: names of columns that are not found by themselves, by what they hold (`COLUMNS`).

    Raises:
        UserError: a file that is no table, a column that is not there, a class that is no plain
            name.
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
            raise UserError(f"{path}: {label[:40]!r} in column {column['class']!r} is no name")
        if participant:
            age, sex = finite_number(cell.get("age", "")), cell.get("sex", "")[:1].upper()
            entries.append(Entry(scan, participant, label, age, sex if sex in "FM" else ""))
    print_once(f"{path}: {', '.join(f'{what} = {name}' for what, name in column.items())}")
    for what, there in (
        ("class", [bool(entry.label) for entry in entries]),
        ("age", [not math.isnan(entry.age) for entry in entries]),
        ("sex", [bool(entry.sex) for entry in entries]),
    ):
        if what in column and (without := len(rows) - sum(there)):
            print_once(f"note: {path}: {without} of {len(rows)} rows have no {what} one can read")
    return entries


def keys_in(path: Path) -> list[str]:
    """All parts of a path that may name a scan or a participant, the longest first.

    A short one, or a mere number, which may be a date or a count, only as the whole name of a
    folder or of the file, after a BIDS "sub-" too.
    """
    parts = re.split(r"([^A-Za-z0-9]+)", str(path))
    words = range(0, len(parts), 2)
    found = {"".join(parts[i : j + 1]) for i in words for j in words if i <= j < i + 24}
    whole = {part.removeprefix("sub-") for part in path.parts} | set(path.parts)
    telling = {key for key in found if len(key) > 3 and not key.isdigit()} | whole
    return sorted(telling - {""}, key=lambda key: (-len(key), key))


class EntryFinder:
    """The entries of a table by the names of scans and participants in a path or an id."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        """Raises UserError where the table cannot be read, or says two things of a scan."""
        self.scans: dict[str, Entry] = {}
        self.participants: dict[str, list[Entry]] = defaultdict(list)
        for entry in read_table(path, columns):
            numbered = [f"I{entry.scan}"] if entry.scan.isdigit() else []  # as ADNI's files say
            for name in [entry.scan, *numbered] if entry.scan else ():
                if self.scans.setdefault(name, entry)[1:3] != entry[1:3]:
                    raise UserError(f"{path}: {entry.scan} stands in two rows that differ")
            self.participants[entry.participant].append(entry)

    def named_in(self, path: Path | str) -> Entry | None:
        """The entry that a path or an id names, None if none does.

        Where it names a participant but no scan, what differs between scans is left open.

        Raises:
            ValueError: it names several participants.
        """
        keys = keys_in(Path(path))
        scans = [self.scans[key] for key in keys if key in self.scans][:1]
        people = [self.participants[key] for key in keys if key in self.participants]
        names = sorted({entry.participant for entry in scans + [rows[0] for rows in people]})
        if len(names) > 1:
            raise ValueError(f"names several participants of the table: {', '.join(names)}")
        if scans or not people:
            return scans[0] if scans else None
        labelled = [row for row in people[0] if row.label] or people[0]
        first, labels, ages = labelled[0], {r.label for r in labelled}, {r.age for r in labelled}
        label = first.label if len(labels) == 1 else ""
        age = first.age if len(ages) == 1 else math.nan
        return first._replace(scan="", label=label, age=age)  # of no visit in particular
