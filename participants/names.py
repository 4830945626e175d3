"""Names of scans and participants: what a path tells, and which row of a table it names."""

import re

# Names of participants in BIDS, ADNI, OASIS-1, and OASIS-2 or 3
PARTICIPANT = re.compile(r"sub-[A-Za-z0-9]+|\d{3}_S_\d{4,5}|OAS1_\d{4}|OAS[23]_?\d{4}")


def plain_name(name: str) -> bool:
    """Whether a name from a file is safe as a folder name: it cannot lead to another folder."""
    if not name or len(name) > 100 or not name.isprintable():
        return False
    return name[0] not in ". " and not set(name) & set('/\\:*?"<>|')


def stem(name: str) -> str:
    """The name of a volume without .nii and .gz."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", name, flags=re.IGNORECASE)


def participant_in(name: str) -> str:
    """The participant in a name of BIDS, ADNI or OASIS; "" if there is none."""
    return next(iter(PARTICIPANT.findall(name)), "")
