"""Find the row of a table that a path names."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from config import UserError
from participants.names import (
    DATE,
    keys_in,
    normalized,
    one_spelling,
    participants_of,
    simplified,
    spellings,
)
from participants.tables import MANIFEST, Entry, UnrelatedTable, read_manifest, read_table
from utils import print_once

PARTICIPANTS = ("participants.tsv", "participants.csv")  # tables that may lie beside the slices
BASELINE = {"bl", "m0"}  # ADNI's VISCODE, and its month in BIDS
MAX_LISTED = 5  # names in a hint
WHOLE_PARTS = "numbers and short names must be a whole part of a path"
VISIT_WORDS = r"ses|session|visit|timepoint|tp|wave"
VISIT = re.compile(  # a word begins after another sign, or as the V of scanVisit2
    rf"(?-i:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?:{VISIT_WORDS})[-_ ]?(\d+)"
    r"|(?<![a-z0-9])v(\d{1,2})(?![a-z0-9])"
    r"|miriad_\d+_[a-z]+_[mf]_(\d+)",
    re.IGNORECASE,
)
# MR2 is a visit if there is no other number, but MR_3T is a scanner
SCAN_OF_DAY = re.compile(r"(?<![a-z])mr[-_ ]?(\d+)(?![\d.]*t|\d)", re.IGNORECASE)
CONTRASTS = {"t1", "t2", "pd"}  # whole names of files that are no visits


class EntryFinder:
    """Finds the entry of a table whose scan or participant is named in a path."""

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, str],
        paths: Iterable[Path | str] | None = None,
        pick: str = "none",
    ) -> None:
        """`paths`, if known, are all that will be asked for: they show which columns name scans.

        `pick` is first, last or none: the row that gives the class of a scan whose participant has
        rows of several classes, if the path shows no visit. Raises UserError if the table cannot
        be read, or has two different rows for a scan.
        """
        self.path, self.pick, self.picked = path, pick, 0
        self.by_visit: list[str] = []  # paths whose visit or date chose the class
        names = None if paths is None else {key for path in paths for key in keys_in(path)}
        self.scans: dict[str, Entry] = {}
        self.participants: dict[str, list[Entry]] = defaultdict(list)
        self.known: dict[str, str] = {}  # names of the table by their simplified form
        entries = read_table(path, columns, names)
        people = one_spelling(entry.participant for entry in entries)
        for written, person in zip(entries, people, strict=True):
            entry = written._replace(participant=person)
            for key in spellings(entry.scan, of_scan=True) if entry.scan else ():
                if self.scans.setdefault(key, entry)[1:3] != entry[1:3]:
                    raise UserError(f"{path}: {entry.scan} has two rows that differ")
            for key in spellings(written.participant) | spellings(person):
                self.participants[key].append(entry)
            self.known |= {simplified(name): name for name in written[:2] if name}
        self.depth = depth_of_numbers(paths or (), self.participants)

    def named_in(self, path: Path | str) -> Entry | None:
        """The entry that a path or a scan's id names, or None.

        If it names a participant but no scan, the row of the visit or date in the path counts.
        Without those, an age or class that differs between the rows of the participant is unknown,
        but for a class that `pick` chooses. Raises ValueError if it names several participants.
        """
        keys = keys_in(path)
        scan = next((self.scans[key] for key in keys if key in self.scans), None)
        people = self.people_in(keys, str(path))
        entries = [rows[0] for rows in people] + ([scan] if scan else [])
        names = sorted({entry.participant for entry in entries})
        if len(names) > 1:
            raise ValueError(f"names several participants of the table: {', '.join(names)}")
        return scan if scan or not people else self.row_of(people[0], str(path))

    def people_in(self, keys: list[str], path: str) -> list[list[Entry]]:
        """The rows of each participant that a path names; `keys` are its parts, longest first."""
        chosen, rest = [], normalized(path)
        parts = Path(path).parts
        number = "" if self.depth is None else "".join(parts[self.depth : self.depth + 1])
        for key in (key for key in keys if key in self.participants):
            if number.isdigit() and key.isdigit() and key in parts and key != number:
                continue  # a session or a count
            # a name within a longer one is no other participant
            if not any(key in longer for longer in chosen) or key in keys_in(rest):
                chosen.append(key)
                rest = rest.replace(key, "/")
        return [self.participants[key] for key in chosen]

    def row_of(self, person: list[Entry], path: str) -> Entry:
        """What the rows of a participant say of the visit that a path shows, see `named_in`."""
        told = rows_of_visit(person, path)
        rows = told or person
        labelled = sorted((r for r in rows if r.label), key=visit_order) or rows
        labels, ages = {r.label for r in labelled}, {r.age for r in labelled}
        label = labelled[-1 if self.pick == "last" else 0].label
        if len(labels) > 1:
            if self.pick != "none" and len({visit_order(row) for row in labelled}) < len(labelled):
                raise ValueError("rows of its participant have no dates or ages to sort them by")
            self.picked += 1
            label = "" if self.pick == "none" else label
        if told and label and len({row.label for row in person} - {""}) > 1:
            self.by_visit.append(path)
        age = labelled[0].age if len(ages) == 1 else math.nan
        return labelled[0]._replace(scan="", label=label, age=age)

    def classes_of(self, participant: str) -> set[str]:
        """All classes in the rows of a participant."""
        return {entry.label for entry in self.participants.get(participant, ())} - {""}

    def hint(self, paths: Iterable[Path | str]) -> str:
        """A question for paths that name no row, if rows have nearly the same names; else ""."""
        alike = {}
        for path in paths:
            for key in keys_in(path):
                near = self.known.get(simplified(key), key)
                if near != key:
                    alike[key] = near
                    break
        chosen = list(alike.items())[:MAX_LISTED]
        if not chosen:
            return ""
        old, new = (", ".join(names) for names in zip(*chosen, strict=True))
        return f"{self.path}: no row names {old}; did you mean {new}? Rename the rows or the files"


def depth_of_numbers(paths: Iterable[Path | str], names: Collection[str]) -> int | None:
    """The depth at which most plain numbers in paths are `names`, from 0; None for several or none.

    At others they are sessions or counts.
    """
    found = defaultdict(set)
    for path in paths:
        for depth, part in enumerate(Path(path).parts):
            if part.isdigit() and part in names:
                found[depth].add(part)
    most = max(map(len, found.values()), default=0)
    depths = [depth for depth, numbers in found.items() if len(numbers) == most]
    return depths[0] if len(depths) == 1 else None


def visit_order(row: Entry) -> tuple:
    """Sorts the rows of a participant by date, or else by age."""
    return row.date, -math.inf if math.isnan(row.age) else row.age


def rows_of_visit(rows: list[Entry], path: str) -> list[Entry]:
    """The rows whose date, or else whose visit, a path shows; empty if it shows none of them."""
    dates = {"-".join(found) for found in DATE.findall(path)}
    visits = {simplified(word) for word in re.split(r"[\W_]+", path) if not word.isdigit()}
    if (name := Path(path).name.casefold()) in CONTRASTS:
        folders = {simplified(word) for word in re.split(r"[\W_]+", str(Path(path).parent))}
        visits -= {name} - folders
    numbers = ["".join(found) for found in VISIT.findall(path)] or SCAN_OF_DAY.findall(path)
    visits |= {str(int(number)) for number in numbers}
    if visits & BASELINE:
        visits |= BASELINE
    return [r for r in rows if r.date and r.date in dates] or [
        r for r in rows if r.visit and simplified(r.visit) in visits
    ]


def find_entries(
    scans: Collection[str], root: Path, table: Path | None, columns: Mapping[str, str]
) -> dict[str, Entry]:
    """What a table, or else ROOT/manifest.csv, or else ROOT/participants.tsv says of each scan.

    Raises UserError if one of these files is damaged, UnrelatedTable if the given table names no
    scan.
    """
    listed = read_manifest(root)
    entries = {k: entry for k, entry in listed.items() if k in scans}
    if missing := sorted(listed.keys() - entries):
        text = f"lists {len(listed)} scans, {len(missing)} have no slices, such as {missing[0]}"
        print_once(f"note: {root / MANIFEST} {text}: was the import interrupted?")
    beside = next(filter(Path.exists, (root / name for name in PARTICIPANTS)), None)
    if (source := table or beside) is None:
        return entries
    finder, found, unclear = EntryFinder(source, columns, scans), {}, []
    for scan in sorted(scans):
        try:
            if entry := finder.named_in(scan):
                found[scan] = entry
        except ValueError as error:
            unclear.append(f"{scan} {error}")
    found = with_named_participants(found)
    print_once(f"{source} names {len(found)} of {len(scans)} scans")
    if unclear:
        print_once(f"note: of {len(unclear)} scans it cannot be told whose they are: {unclear[0]}")
    if hint := finder.hint(sorted(scans - found.keys())):
        print_once(f"note: {hint}")
    if table and not found:
        text = f"{table} names none of the scans, such as {min(scans)}"
        raise UnrelatedTable(f"{text}; {WHOLE_PARTS}")
    return entries | found if table else found | entries


def with_named_participants(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries by scan or path: where a table tells no participant, the name in the key counts."""
    names = participants_of(entries)
    whose = [
        names.get(key, entry.participant) if entry.participant == entry.scan else entry.participant
        for key, entry in entries.items()
    ]
    people = zip(entries.items(), one_spelling(whose), strict=True)
    return {key: entry._replace(participant=person) for (key, entry), person in people}


def participants_by_scan(scans: set[str], entries: Mapping[str, Entry]) -> dict[str, str]:
    """The participant of each scan: that of its entry, else the one in its name, else the scan.

    If scans with an entry show the name too, it stands for the participant of their entries.
    """
    names = participants_of(scans)
    listed = {names[scan]: entries[scan].participant for scan in sorted(names.keys() & entries)}
    shown = {scan: listed.get(name, name) for scan, name in names.items() if scan not in entries}
    if shown and len(people := set(shown.values())) < len(shown):
        text = f"{len(shown)} scans are of {len(people)} participants by their names"
        print_once(f"{text}, such as {min(shown)} of {shown[min(shown)]}")
    if unknown := scans - entries.keys() - shown.keys():
        text = f"{len(unknown)} scans, such as {min(unknown)}, count as one participant each"
        print_once(f"warning: {text}: if people have several scans, give --table")
    whose = {scan: scan for scan in sorted(scans)} | shown
    whose |= {k: e.participant for k, e in entries.items()}
    return dict(zip(whose, one_spelling(whose.values()), strict=True))
