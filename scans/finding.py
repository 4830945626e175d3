"""Find which of many files are the scans: contrasts, outputs of other programs, links, DICOM.

All decisions here are made from names and, for DICOM, from a file's first bytes. Whatever is left
out gets a reason. Hidden files and folders are not looked at.
"""

import heapq
import os
import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from config import UserError
from participants.names import stem
from utils import is_dicom

Reasons = dict[str, str]  # why something is left out, by its path inside SCANS

# Headers in files of their own: the image file beside it, which stands for both
PAIRS = {".hdr": (".img", ".img.gz"), ".par": (".rec",), ".head": (".brik", ".brik.gz")}
SINGLE = (".nii", ".nii.gz", ".mgz", ".mgh", ".mnc", ".mnc.gz")
ENDINGS = (*SINGLE, *PAIRS, *(ending for own in PAIRS.values() for ending in own))
# Folders that hold no scan, of BIDS and of the Human Connectome Project
ASIDE = {"sourcedata", "derivatives", "code", "fmap", "mninonlinear"}
PHASE = re.compile(r"_part-(phase|real|imag)(_|$)", re.IGNORECASE)

# BIDS suffixes: what stands after the last underscore of a name
BIDS = """T1w T2w T2starw T2star FLAIR PDw PDT2 UNIT1 MP2RAGE inplaneT1 inplaneT2 inplanePD T1map
    T2map T2starmap R1map R2map PDmap angio defacemask bold sbref dwi epi phase phase1 phase2
    phasediff magnitude magnitude1 magnitude2 fieldmap asl m0scan pet"""
SUFFIXES = {name.lower(): name for name in BIDS.split()}
# Words that tell the contrast; the first that fits wins. T1, T2 and PD alone tell nothing: they can
# be time points or a disease
WORDS = {
    "localizer": r"\w*locali[sz]er\w*|(aa)?(head_)?scout|3_plane_loc|(b1_)?calibration(_\w+)?",
    "FLAIR": r"\w*flair\w*",
    "fieldmap": r"field_?map(ping)?|b0_?map",
    "T2starw": r"t2_?star(w|_weighted)?|t2_gre|swi|swan",
    "T2w": r"t2w|t2_(weighted|fse|tse|blade|propeller|space|spc)",
    "PDw": r"pdw|pd_(weighted|fse|tse)",
    "dwi": r"dwi|dti|adc|ep2d_diff|diffusion(_weighted)?",
    "asl": r"p?c?asl|perfusion(_weighted)?|m0scan",
    "bold": r"bold|rs_?fmri|resting_state",
    "angio": r"angio(graphy)?|tof",
    "T1w": r"t1w|\w*mp_?rage\w*|\w*spgr\w*|bravo|t1_(weighted|mpr|fl3d|tfe|ffe)|tfl3d",
}
WORDS = {name: re.compile(rf"(?<![a-z0-9])({w})(?![a-z0-9])") for name, w in WORDS.items()}
CONTRASTS = sorted({*SUFFIXES.values(), *WORDS})

# Outputs of other programs. Names that tell it by themselves:
CERTAIN = {
    "output of FreeSurfer": r"(.+_)?(aseg|aparc[+.].*|brainmask|wmparc|([lr]h\.)?ribbon)(\.\w+)?",
    "output of SPM or CAT12": r"(s\d*)?(m0?w|w|r)[cp][1-6].+|u_rc[1-6].+",
    "output of FSL": r".+_(pve_\d|pveseg|mixeltype|prob_\d|fseg)",
    "output of the HCP pipelines": r"T[12]w(Divided|Mul)ByT2w.*|BiasField(_.*)?",
    "mask or segmentation": r".*masks?|.+_(d|prob)?seg(_\d)?",
}
CERTAIN = {why: re.compile(pattern, re.IGNORECASE) for why, pattern in CERTAIN.items()}
# What stands before or after the name of a scan that lies in the same folder or the one above:
BEFORE = re.compile(r"(i?y_|u_|wj_|mean|BiasField_|s\d+|m0|[cp][0-6]|[mwrsua])+")
AFTER = re.compile(
    r"(_(brain|restore|biascorr|bet|skull|overlay|fast|bias|flirt|fnirt|warp|warped|std|reorient"
    r"|orig|fullfov|to_mni\w*|to_std\w*|mni\w*))+",
    re.IGNORECASE,
)
FREESURFER = {"orig.mgz", "rawavg.mgz", "nu.mgz", "brainmask.mgz", "aseg.mgz"}  # in SUBJECT/mri


def find_volumes(root: Path, pattern: str, contrast: str, problems: Reasons) -> list[Path]:
    """The volumes whose names fit a pattern, and folders of DICOM files, sorted.

    `contrast` is one of CONTRASTS, or "any". `problems` gets a reason for each volume that is left
    out, each dead link, and each folder or file that two paths reach. A volume of two files is
    named after its image file. Raises UserError if there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"scans = {root}: no such folder")
    files = files_by_folder(root, problems)
    volumes = [path for own in files.values() for path in volumes_of(own)]
    volumes = [path for path in volumes if fnmatch(path.name, pattern)]
    names: dict[Path, set[str]] = {}
    for path in volumes:
        names.setdefault(path.parent, set()).add(stem(path.name))
    dicom = [folder for folder, own in files.items() if any(map(is_dicom, own))]
    dicom = [folder for folder in dicom if fnmatch(folder.name, pattern)]
    orig = fnmatch("orig.mgz", pattern)
    found: dict[Path, Path] = {}
    for path in sorted(volumes, key=lambda path: (path.is_symlink(), path)) + dicom:
        inside = path.relative_to(root)
        why = why_aside(inside.parts if path in files else inside.parts[:-1])
        if path not in files:
            near = names[path.parent] | names.get(path.parent.parent, set())
            why = why or "phase image" * bool(PHASE.search(stem(path.name)))
            why = why or "output of FreeSurfer" * (orig and is_of_freesurfer(path, files))
            why = why or derived(stem(path.name), near)
        why = why or other_contrast(inside, contrast)
        real = path.resolve()
        if not why and real in found:
            why = f"the same file as {found[real].relative_to(root)}"
        if why:
            problems[str(inside)] = why
        else:
            found[real] = path
    return sorted(found.values())


def files_by_folder(root: Path, problems: Reasons) -> dict[Path, list[Path]]:
    """The files of each folder at any depth, through links too; each real folder once.

    Of two ways to a folder, one without links is taken, and folders that are left out come last.
    """
    found: dict[Path, list[Path]] = {}
    seen: dict[Path, Path] = {}
    ways, top = [(0, root)], root.resolve()
    while ways:
        detours, folder = heapq.heappop(ways)
        inside, real = str(folder.relative_to(root)), folder.resolve()
        if seen and (real in seen or top.is_relative_to(real)):
            problems[inside] = f"the same folder as {seen.get(real, root).relative_to(root)}"
            continue
        seen[real], own = folder, []
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            problems[inside] = f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            path, link = folder / entry.name, entry.is_symlink()
            if entry.name[0] == ".":
                continue
            if path.is_dir() if link else entry.is_dir():
                cost = 2 if why_aside([entry.name]) else int(link)
                heapq.heappush(ways, (max(detours, cost), path))
            elif path.is_file() if link else entry.is_file():
                own.append(path)
            elif link:
                problems[str(path.relative_to(root))] = "dead link"
        found[folder] = own
    return found


def volumes_of(files: list[Path]) -> list[Path]:
    """The volumes among the files of a folder, without the headers that have an image file."""
    names = {path.name.lower() for path in files}
    found = []
    for path in files:
        name, ending = path.name.lower(), path.suffix.lower()
        images = {name.removesuffix(ending) + image for image in PAIRS.get(ending, ())}
        if name.endswith(ENDINGS) and not images & names:
            found.append(path)
    return found


def why_aside(folders: Collection[str]) -> str:
    """Why a path with these folders holds no scan, or ""."""
    return next((f"in folder {name}" for name in folders if name.lower() in ASIDE), "")


def contrast_of(path: Path | str) -> str:
    """The contrast that a path says, or "": its last name says it, or else the one before.

    A name says it by a BIDS suffix after its last underscore, or else by one of the WORDS.
    """
    parts = Path(path).parts or ("",)
    name = stem(parts[-1])
    if suffix := SUFFIXES.get(name.lower().rpartition("_")[2]):
        return suffix
    for part in (name, *parts[-2::-1]):
        words = re.sub(r"[^a-z0-9]+", "_", part.lower().replace("t2*", "t2star"))
        said = [contrast for contrast, pattern in WORDS.items() if pattern.search(words)]
        if said:
            return said[0]
    return ""


def other_contrast(path: Path | str, contrast: str) -> str:
    """Why a volume of this path is not wanted, or ""; a path that says nothing is wanted."""
    said = contrast_of(path)
    return "" if contrast == "any" or said in ("", contrast) else f"contrast {said} (--contrast)"


def derived(name: str, near: Collection[str]) -> str:
    """Which program made a volume of this name, "output of ...", or "" if it may be a scan.

    `near` has the names of the volumes in the same folder and in the one above.
    """
    for why, pattern in CERTAIN.items():
        if pattern.fullmatch(name):
            return why
    cuts = range(1, len(name))
    if any(name[i:] in near and BEFORE.fullmatch(name[:i]) for i in cuts):
        return "output of SPM or CAT12"
    if any(name[:i] in near and AFTER.fullmatch(name[i:]) for i in cuts):
        return "output of FSL"
    return ""


def is_of_freesurfer(path: Path, files: dict[Path, list[Path]]) -> bool:
    """Whether a file belongs to a subject of FreeSurfer, but is not the scan, mri/orig.mgz."""
    if path.suffix.lower() not in (".mgz", ".mgh"):
        return False
    for folder in (path.parent, path.parent.parent):
        names = {file.name for file in files.get(folder, ())}
        if folder.name == "mri" and names & FREESURFER:
            return path != folder / "orig.mgz"
    return bool(re.match(r"[lr]h\.", path.name))
