"""Tables of scans and participants, such as exports of ADNI and OASIS or a BIDS participants.tsv.

Any other CSV or TSV works too, if the names of its columns are known or given.
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

# Column names in lower case without punctuation; the first one that a table has is used
COLUMNS = {
    "scan": ("image data id", "image id", "imageuid", "mri id", "scan id", "scan", "id"),
    "participant": ("participant id", "subject id", "subject", "ptid", "participant"),
    "class": ("group", "research group", "dx group", "diagnosis", "dx", "class", "label", "cdr"),
    "age": ("age", "age at scan", "age years"),
    "sex": ("sex", "gender", "m f"),
}
RENAMED = {"CN": "NC", "Control": "NC"}  # ADNI's slices are usually shared with the class name NC
# Names of participants in BIDS, ADNI, OASIS-1, and OASIS-2 or 3
PARTICIPANT = re.compile(r"sub-[A-Za-z0-9]+|\d{3}_S_\d{4,5}|OAS1_\d{4}|OAS[23]_?\d{4}")
MAX_TABLE = 200_000_000  # bytes


def plain_name(name: str) -> bool:
    """Whether a name from a file is safe as a folder name: it cannot lead to another folder."""
    if not name or len(name) > 100 or not name.isprintable():
        return False
    return name[0] not in ". " and not set(name) & set('/\\:*?"<>|')


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


def stem(name: str) -> str:
    """The name of a volume without .nii and .gz."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", name, flags=re.IGNORECASE)


def participant_in(name: str) -> str:
    """The participant in a name of BIDS, ADNI or OASIS; "" if there is none."""
    return next(iter(PARTICIPANT.findall(name)), "")


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


def keys_in(path: Path) -> list[str]:
    """All parts of a path that could name a scan or a participant, the longest first.

    Plain numbers, which may be dates or counts, and short parts must be a whole file or folder
    name; BIDS's "sub-" may precede them.
    """
    parts = re.split(r"([^A-Za-z0-9]+)", str(path))
    words = range(0, len(parts), 2)
    found = {"".join(parts[i : j + 1]) for i in words for j in words if i <= j < i + 24}
    whole = {part.removeprefix("sub-") for part in path.parts} | set(path.parts)
    telling = {key for key in found if len(key) > 3 and not key.isdigit()} | whole
    return sorted(telling - {""}, key=lambda key: (-len(key), key))


class EntryFinder:
    """Finds the entry of a table whose scan or participant is named in a path."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        """Raises UserError if the table cannot be read, or has two different rows for a scan."""
        self.scans: dict[str, Entry] = {}
        self.participants: dict[str, list[Entry]] = defaultdict(list)
        for entry in read_table(path, columns):
            prefixes = ("", "I") if entry.scan.isdigit() else ("",)  # ADNI's file names have an I
            for prefix in prefixes if entry.scan else ():
                if self.scans.setdefault(prefix + entry.scan, entry)[1:3] != entry[1:3]:
                    raise UserError(f"{path}: {entry.scan} has two rows that differ")
            self.participants[entry.participant].append(entry)

    def named_in(self, path: Path | str) -> Entry | None:
        """The entry that a path or a scan's id names, or None.

        If it names a participant but no scan, an age or class that differs between the scans of
        the participant is unknown. Raises ValueError if it names several participants.
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
        return first._replace(scan="", label=label, age=age)
