"""Find the row of a table that a path names."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from config import UserError
from participants.tables import Entry, read_table


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
