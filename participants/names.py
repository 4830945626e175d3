"""Names of scans and participants: which parts of a path can name one."""

import math
import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import groupby
from pathlib import Path

# Names of participants in BIDS (and sub-PD-001, which it forbids), in ADNI and its sister studies,
# OASIS-1 to -4, AIBL, PPMI, MIRIAD
PARTICIPANT = re.compile(
    r"(?<![a-z0-9])sub-(?-i:[A-Z]{2,4}-(?=\d))?[^\W_]+|(?<![a-z0-9])\d{1,3}_S_\d{4,5}(?![a-z0-9])"
    r"|OAS[1-4]_?\d{4}(?!\d)|(?<![a-z0-9])(?:AIBL|PPMI|MIRIAD)_\d+",
    re.IGNORECASE,
)
ADNI = re.compile(r"(?<!\d)(\d{1,3})_?S_?(\d{4,5})(?!\d)", re.IGNORECASE)  # site, number
DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)-?(0\d|1[012])-?([012]\d|3[01])(?!\d)")
WHOLE_ADNI = f"(sub-)?(ADNI)?{ADNI.pattern}"


def plain_name(name: str) -> bool:
    """Whether a name from a file is safe as a folder name: it cannot lead to another folder."""
    if not name or len(name) > 100 or not name.isprintable():
        return False
    return name[0] not in ". " and not set(name) & set('/\\:*?"<>|')


def normalized(name: str) -> str:
    """A name with each letter as one character: macOS writes an accent as another character."""
    return unicodedata.normalize("NFC", name)


def in_word(sign: str) -> bool:
    """Whether a sign is part of a word: a letter, a number, or a vowel sign of Indian scripts."""
    return sign.isalnum() or unicodedata.category(sign)[0] == "M"


def stem(name: str) -> str:
    """The name of a volume without .nii.gz or the ending of another format."""
    endings = r"(\.(nii|hdr|img|mgz|mgh|mnc|par|rec|head|brik))?(\.gz)?$"
    return re.sub(endings, "", name, flags=re.IGNORECASE)


def participant_in(name: str) -> str:
    """The participant in a name of BIDS, ADNI, OASIS, AIBL, PPMI or MIRIAD; "" if none is there."""
    found = PARTICIPANT.search(normalized(name))
    if found is None:
        return ""
    return found[0] if found[0].lower().startswith("sub-") else found[0].upper()


def participants_of(scans: Collection[str]) -> dict[str, str]:
    """The participant of each scan whose name shows one; none if all scans show the same one."""
    found = {scan: name for scan in scans if (name := participant_in(scan))}
    found = dict(zip(found, one_spelling(found.values()), strict=True))
    return found if len(set(found.values())) > 1 or len(found) < len(scans) else {}


def one_spelling(names: Iterable[str]) -> list[str]:
    """The names, with the first of several ways to write a participant in the place of all.

    Such ways are 002_S_0295 and sub-ADNI002S0295, or OAS1_0001 and sub-OAS10001. Names of no known
    study may differ in case only.
    """
    first: dict[str, str] = {}

    def key(name: str) -> tuple[str, str]:
        if participant_in(name).casefold() != normalized(name).casefold():
            return normalized(name).casefold(), ""
        own = adni_name(name) if re.fullmatch(WHOLE_ADNI, name, re.IGNORECASE) else name
        return "", simplified(re.sub(r"(?i)OAS(?:IS)?([1-4])_?(?=\d{4})", r"OAS\1", own))

    return [first.setdefault(key(name), name) for name in names]


def adni_name(name: str) -> str:
    """ADNI's own name of a participant, 002_S_0295 for sub-ADNI002S0295; "" if there is none."""
    found = ADNI.search(name)
    return f"{found[1]}_S_{found[2]}" if found else ""


def roster_name(name: str) -> str:
    """The roster number (RID) of the ADNI or AIBL participant in a name, as RID 295; "" if none."""
    found = re.search(r"\d+_?S_?(\d{4,5})(?!\d)|AIBL_?(\d+)", name, re.IGNORECASE)
    return f"RID {int(found[1] or found[2])}" if found else ""


def spellings(name: str, of_scan: bool = False) -> set[str]:
    """The ways in which a path may write a name of a table, such as 7 for RID 7.

    ADNI's image I123 may be called 123, and the other way round. A scan is called like its
    participant only if its name says no more, such as a visit.
    """
    name = normalized(name)
    found = {stem(name), name.removeprefix("RID ")}
    if not of_scan or re.fullmatch(WHOLE_ADNI, name, re.IGNORECASE):
        found.add(adni_name(name))
    if of_scan and re.fullmatch(r"I?\d+", name):
        found |= {name.removeprefix("I"), f"I{name.removeprefix('I')}"}
    return found - {""}


def keys_in(path: Path | str) -> list[str]:
    """All parts of a path that could name a scan or a participant, the longest first.

    Plain numbers, which may be dates or counts, and short parts must be a whole file or folder
    name; BIDS's "sub-" may precede them. A short name such as P01 may also begin the file's name.
    """
    path = Path(normalized(str(path)))
    parts = ["".join(group) for _, group in groupby(str(path), in_word)]
    words = [i for i, part in enumerate(parts) if in_word(part[0])]
    found = {"".join(parts[i : j + 1]) for i in words for j in words if i <= j < i + 24}
    whole = {part.removeprefix("sub-") for part in path.parts} | set(path.parts)
    telling = {key for key in found if len(key.encode()) > 3 and not key.isdigit()} | whole
    dates, undated = [found[0] for found in DATE.finditer(str(path))], DATE.sub("/", str(path))
    telling = {k for k in telling if k in undated or not any(k in d and k != d for d in dates)}
    telling |= set(re.findall(r"^[^\W\d_]+\d+(?![^\W_])", path.name))
    telling |= set(re.findall(r"(?<![a-z0-9])(?:AIBL|PPMI)_(\d+)", str(path), re.IGNORECASE))
    telling |= {kind(str(path)) for kind in (participant_in, adni_name, roster_name)}
    return sorted(telling - {""}, key=lambda key: (-len(key), key))


def number_of(name: str) -> float:
    """The number at the end of a slice's name: _-3 and _z-3 mean -3, but _slice-3 means 3."""
    found = re.search(r"(?:_[a-z]?(-))?(\d+)$", name, re.IGNORECASE)
    return -math.inf if found is None else -int(found[2]) if found[1] else int(found[2])


def simplified(name: str) -> str:
    """A name without case, punctuation, BIDS's prefixes and leading zeros, for comparisons."""
    bare = re.sub(r"^(sub|ses)-", "", normalized(name).casefold())
    return re.sub(r"[\W_]+", "", re.sub(r"(?<!\d)0+(?=\d)", "", bare))
