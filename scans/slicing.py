"""Import scans: cut slices from volumes, and sort them into class folders by a table.

    python prepare.py import SCANS --out AD_NC --table subjects.csv

A volume is a file that nibabel opens (NIfTI, Analyze, MGH, MINC, PAR/REC, AFNI), or a folder of
DICOM files if the program dcm2niix is installed, at any depth, through links too. `import_scans`
says which are left out. A volume's row of the table is the one whose scan, or else whose
participant, is part of its path. Plain numbers count only if they are a whole file or folder name,
since others may be dates. A BIDS data set has a table of its own. Without a table the class is the
first folder, SCANS/CLASS/..., and the participant is a name such as sub-01, 002_S_0295 or OAS1_0001
in the path, else the next folder, else the file name. The class CN of a table becomes NC, and a CDR
above 0 becomes AD.
"""

import csv
import hashlib
import io
import logging
import math
import os
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

import utils
from config import UserError
from dataset import LEFT_OUT, SPLITS
from participants.matching import (
    PARTICIPANTS,
    VISIT_WORDS,
    WHOLE_PARTS,
    EntryFinder,
    with_named_participants,
)
from participants.names import normalized, one_spelling, participant_in, plain_name, stem
from participants.tables import (
    COLUMNS,
    MANIFEST,
    Entry,
    count_known,
    manifest_rows,
    plain_column,
    read_rows,
    usual_class,
)
from scans.finding import Reasons, find_volumes
from scans.volumes import (
    CutSlices,
    ImportOptions,
    cut,
    find_converter,
    open_volume,
    read_volume,
)

UNNAMED = "no row of the table names it"
VISIT_FOLDER = re.compile(
    r"bl|baseline|screening|follow[-_ ]?up[-_ ]?\d*|\d(\.\d+)? ?T"
    rf"|({VISIT_WORDS}|month|year)[-_ ]?([mv]?\d\w{{0,3}}|bl)",
    re.IGNORECASE,
)
VISIT_OR_PERSON = re.compile(  # such as V1, M12, 2009-11-14
    r"pre|post|[vm]\d{1,3}|(19|20)\d\d[-_ ]?\d\d[-_ ]?\d\d", re.IGNORECASE
)
YEAR = re.compile(r"(19|20)\d\d")
# At the end of a name: P1_bl, P1-m12, P1_2009-11-14; 12_20252_2_0 of UK Biobank
VISIT_AT_END = re.compile(
    rf"(?<=[^\W_])(_20\d{{3}}_\d_\d|[-_ ]({VISIT_FOLDER.pattern}|{VISIT_OR_PERSON.pattern}))$",
    re.IGNORECASE,
)
MAX_BYTES = 80  # of a scan's id
MAX_NAMES, MAX_REASONS = 5, 30  # that are printed
MANIFEST_SECONDS = 5  # from one writing of the manifest to the next; a kill may cost this much work
Split = dict[str, str]  # train or test, by participant
Rows = dict[str, dict[str, str]]  # of the manifest, by scan


# Naming


class Scan(NamedTuple):
    """A volume on disk, the id in the names of its slices, and its entry of the table."""

    path: Path
    name: str
    entry: Entry


def id_of(name: str) -> str:
    """A scan's id from any name: valid as a file name on any system, and not too long."""
    plain = re.sub(r"[^\w.+-]+", "-", normalized(name)).strip("-.")
    if len(plain.encode()) <= MAX_BYTES and plain:
        return plain
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f"{plain.encode()[: MAX_BYTES - 9].decode(errors='ignore')}-{digest}"


def visit_folders(insides: list[Path]) -> set[str]:
    """The names of CLASS/NAME/... if they are visits, not people: more names lie in than there are.

    V1 and V2, or 2019 and 2020, with p1 to p9 in each are visits; V01 to V20 with a T1 in each,
    with names such as V01_a or with visits of their own are people, and so are V01 and x.
    """
    found = [path for path in insides if len(path.parts) > 2]
    names, within = {path.parts[1] for path in found}, set()
    for path in found:
        folder, name = path.parts[1], path.parts[2] if len(path.parts) > 3 else stem(path.name)
        named_after = re.match(rf"{re.escape(folder)}([-_ .]|$)", name) and "-" not in folder
        within |= set() if named_after or like_visit(name) else {name}
    if not all(map(like_visit, names)) or len(within) <= len(names):
        return set()
    utils.print_once(f"note: folders such as {min(names)} count as visits, not as people")
    return names


def like_visit(name: str) -> bool:
    """Whether a folder of that name may be one of a visit, a date or a year."""
    return any(kind.fullmatch(name) for kind in (VISIT_OR_PERSON, VISIT_FOLDER, YEAR))


def entry_of_volume(
    inside: Path, finder: EntryFinder | None, visits: Collection[str] = ()
) -> Entry:
    """The entry of a volume by its path within SCANS. Raises ValueError if it has no class.

    Without a table the class is the first folder, and the participant the next folder that is no
    visit, or else the file's name, unless the path holds a name of BIDS, ADNI and so on.
    """
    if finder:
        entry = finder.named_in(inside.parent / stem(inside.name))
        if entry is None:
            raise ValueError(UNNAMED)
        if not entry.label and len(finder.classes_of(entry.participant)) > 1:
            raise ValueError("rows of its participant differ in class (--unknown-visit)")
        if not entry.label:
            raise ValueError("no class in the table")
    elif len(inside.parts) < 2:
        raise ValueError("lies in no class folder, and there is no --table")
    else:
        folders = [part for part in inside.parts[1:-1] if part not in visits]
        folders = [part for part in folders if not VISIT_FOLDER.fullmatch(part)]
        own = folders[0] if folders else stem(inside.name)
        participant = participant_in(str(inside)) or own.strip()
        entry = Entry("", participant, inside.parts[0], math.nan, "")
    if not plain_name(entry.label):
        raise ValueError("its folder has a name that cannot be a class")
    return entry


def with_own_table(options: ImportOptions) -> ImportOptions:
    """The options, with the table of a BIDS data set if none is given and it has classes."""
    path = options.scans / PARTICIPANTS[0]
    own = path.is_file() and any(options.scans.glob("sub-*"))
    if options.table is None and options.columns and not own:
        raise UserError("columns: there is no --table that has them")
    if options.table or not own or options.columns.get("class") == "":
        return options
    known = {*COLUMNS["class"].split(), plain_column(options.columns.get("class", ""))}
    if known.isdisjoint(map(plain_column, read_rows(path)[0])):
        utils.print_once(f"note: {path} is not used: it has no column of classes (--columns)")
        return options
    utils.print_once(f"no --table: {path} is used")
    return replace(options, table=path)


def match_to_table(options: ImportOptions, volumes: list[Path], problems: Reasons) -> list[Scan]:
    """The volumes that have a class and a participant; `problems` gets the others, with reasons.

    Raises UserError if the table cannot be read, or no volume has one of the wanted classes.
    """
    insides = [path.relative_to(options.scans) for path in volumes]
    finder, wanted = None, set(options.classes or ())
    if options.table:
        names = [inside.parent / stem(inside.name) for inside in insides]
        finder = EntryFinder(options.table, options.columns, names, options.unknown_visit)
        wanted = set(map(usual_class, wanted))
    scans = scans_of(options.scans, insides, finder, problems)
    labels = {scan.entry.label for scan in scans}
    if finder and not labels:
        text = "no volume has a class; --columns class NAME names its column"
        if set(problems.values()) == {UNNAMED}:
            text = f"it names no volume; {WHOLE_PARTS}"
        hint = finder.hint(name for name, why in problems.items() if why == UNNAMED)
        hint = f"; {hint.partition(': ')[2]}" if hint else ""
        raise UserError(f"{options.table}: {text}{hint}{counts_of(problems)}")
    if finder:
        in_any_case = {label.casefold(): label for label in labels}
        wanted = {in_any_case.get(name.casefold(), name) for name in wanted}
    if missing := sorted(wanted - labels):
        raise UserError(f"classes: no {', '.join(missing)}; there are {', '.join(sorted(labels))}")
    found = []
    for scan in scans:
        if options.classes is None or scan.entry.label in wanted:
            found.append(scan)
        else:
            problems[inside_of(scan, options)] = f"class {scan.entry.label} (--classes)"
    if finder:
        entries = with_named_participants({inside_of(s, options): s.entry for s in found})
        found = with_participants(found, [entry.participant for entry in entries.values()])
        print_matches(finder, list(entries.values()), problems)
    else:
        if len(labels) == 1 and options.classes is None:
            (only,) = labels
            advice = f"did you mean {options.scans / only}, or a --table? --classes {only} takes it"
            raise UserError(f"{options.scans}: holds one class only, {only}; {advice}")
        found = with_one_spelling(found)
    counts = Counter(scan.name.casefold() for scan in found)
    for scan in found:
        if (count := counts[scan.name.casefold()]) > 1:
            text = "several volumes are one scan; --pattern chooses one"
            problems[inside_of(scan, options)] = f"{text}: {scan.name} ({count} volumes)"
    return [scan for scan in found if counts[scan.name.casefold()] == 1]


def scans_of(
    root: Path, insides: list[Path], finder: EntryFinder | None, problems: Reasons
) -> list[Scan]:
    """The volumes that have a class and a participant; `problems` gets the others."""
    scans, visits = [], visit_folders(insides)
    stems = Counter(stem(inside.name).casefold() for inside in insides)
    for inside in insides:
        name = stem(inside.name)
        try:
            entry = entry_of_volume(inside, finder, visits)
        except ValueError as error:
            problems[str(inside)] = str(error)
            continue
        own = name if stems[name.casefold()] == 1 else str(inside.parent / name)
        scans.append(Scan(root / inside, id_of(entry.scan or own), entry))
    return scans


def with_participants(scans: list[Scan], names: Iterable[str]) -> list[Scan]:
    """The scans, with other names of their participants."""
    pairs = zip(scans, names, strict=True)
    return [scan._replace(entry=scan.entry._replace(participant=name)) for scan, name in pairs]


def without_visit(name: str) -> str:
    """A participant's name without a visit at its end, if it then still holds a number."""
    person = VISIT_AT_END.sub("", name)
    return person if re.search(r"\d", person) else name


def with_one_spelling(scans: list[Scan]) -> list[Scan]:
    """Scans whose folders or names show participants, each written in one way, without visits."""
    names = [scan.entry.participant for scan in scans]
    people = list(map(without_visit, names))
    if cut := sorted((a, b) for a, b in zip(names, people, strict=True) if a != b):
        utils.print_once("note: {} counts as a visit of {}, and so on".format(*cut[0]))
    scans = with_participants(scans, one_spelling(people))
    alone = [s.name for s in scans if s.entry.participant == stem(s.path.name)]
    if alone := sorted(name for name in alone if not participant_in(name)):
        text = f"{len(alone)} scans lie in no folder of a person, and there is no table"
        utils.print_once(f"note: {text}: their file names count as participants")
    return scans


def print_matches(finder: EntryFinder, entries: list[Entry], problems: Reasons) -> None:
    """Print what the table says about the scans, and which names it may write in another way."""
    known = ", ".join(f"{what} of {count}" for what, count in count_known(entries).items())
    unnamed = sum(why == UNNAMED for why in problems.values())
    text = f"{unnamed} volumes have no row, {len(entries)} are of a wanted class"
    utils.print_once(f"{text}; of these the table gives the {known}")
    if finder.picked and finder.pick != "none":
        text = f"class of their participant's {finder.pick} row"
        utils.print_once(f"{finder.picked} scans show no visit: {text}")
    if finder.by_visit:
        text = f"{len(finder.by_visit)} scans have the class of the visit or date in their path"
        utils.print_once(f"{text}, such as {finder.by_visit[0]}")
    if hint := finder.hint(name for name, why in problems.items() if why == UNNAMED):
        utils.print_once(f"note: {hint}")


# Splitting


def split_participants(scans: list[Scan], share: float, seed: int, before: Split) -> Split:
    """The side of each participant, train or test: each class gives test the same share.

    The participants of a class are sorted by sex and age; of each group of neighbours one goes to
    test. Participants in `before` stay on their side. Raises UserError if a class lacks one side.
    """
    people: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        people[scan.entry.participant].append(scan)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, own in people.items():
        strata[tuple(sorted({s.entry.label for s in own}))].append(name)

    def order(name: str) -> tuple:
        entry = people[name][0].entry
        unknown = math.isnan(entry.age)
        return entry.sex, unknown, 0 if unknown else entry.age, name

    rng, split = np.random.default_rng(seed), {}
    for label in sorted(strata):
        names = sorted(strata[label], key=order)
        count = math.ceil(share * len(names)) if len(names) > 1 else 0
        edges = np.linspace(0, len(names), count + 1).astype(int)
        drawn = set(edges[:-1] + (rng.random(count) * np.diff(edges)).astype(int))
        split |= {name: "test" if i in drawn else "train" for i, name in enumerate(names)}
    split |= before
    for label, _ in one_sided(scans, split):
        people = sorted({s.entry.participant for s in scans if s.entry.label == label})
        others = sorted({s.entry.label for s in scans} - {label})
        which = f"--classes {' '.join(others) or '...'} leaves it out"
        if len({(s.entry.label, s.entry.participant) for s in scans}) == len(others) + 1 > 2:
            which = f"all {len(others) + 1} classes have one, so they may be patients"
        text = f"too few participants to split them ({', '.join(people[:MAX_NAMES])}); {which}"
        raise UserError(f"class {label}: {text}; without --table a class is the first folder")
    return split


def one_sided(scans: list[Scan], split: Split) -> list[tuple[str, str]]:
    """Each class that is on one side of the split only, and that side."""
    sides: dict[str, set[str]] = defaultdict(set)
    for scan in scans:
        sides[scan.entry.label].add(split[scan.entry.participant])
    return [(label, *there) for label, there in sorted(sides.items()) if len(there) == 1]


def print_balance(scans: Iterable[Scan], split: Split) -> None:
    """Print participants, mean age and share of women for each class on each side of the split."""
    people = {(s.entry.participant, s.entry.label): s.entry for s in scans}
    for label in sorted({label for _, label in people}):
        for side in SPLITS:
            own = [e for e in people.values() if e.label == label and split[e.participant] == side]
            ages = [e.age for e in own if not math.isnan(e.age)]
            women = [e.sex == "F" for e in own if e.sex]
            text = f"{side}/{label}: {len(own)} participants"
            if ages:
                text += f", age {np.mean(ages):.1f} (deviation {np.std(ages):.1f})"
            if women:
                known = f" of the {len(women)} of known sex" * (len(women) < len(own))
                text += f", {np.mean(women):.0%} women{known}"
            utils.print_once(text)
    counts = Counter(participant for participant, _ in people)
    if several := sorted(name for name, count in counts.items() if count > 1):
        first = ", ".join(several[:MAX_NAMES]) + ", ..." * (len(several) > MAX_NAMES)
        utils.print_once(f"{len(several)} participants have scans of several classes: {first}")


# Writing


def option_columns(options: ImportOptions) -> dict[str, str]:
    """The options that change slices or split, as columns of the manifest."""
    window = "percentile" if options.window is None else " ".join(f"{v:g}" for v in options.window)
    return {
        "axis": options.axis,
        "centre": "ventricles" if options.centre is None else f"{options.centre:g} mm",
        "slices": str(options.slices),
        "spacing_mm": f"{options.spacing:g}",
        "size": str(options.size),
        "window": window,
        "bits": str(options.bits),
        "test_share": f"{options.test_share:g}",
        "seed": str(options.seed),
    }


def row_of(scan: Scan, side: str, made: CutSlices | None, options: ImportOptions) -> dict[str, str]:
    """A scan's row of the manifest; until its slices are made some columns are empty."""
    entry, measured = scan.entry, [""] * 5
    if made:
        ends = [f"{mm:.2f}" for mm in made.positions[[0, -1]]]
        measured = [utils.sha256_of(scan.path), *ends, f"{made.black:g}", f"{made.white:g}"]
    columns = ("sha256", "lowest_mm", "highest_mm", "black", "white")
    return {
        "id": scan.name,
        "participant": entry.participant,
        "class": entry.label,
        "age": "" if math.isnan(entry.age) else f"{entry.age:g}",
        "sex": entry.sex,
        "split": side,
        "source": utils.printable(scan.path.relative_to(options.scans)),
        **dict(zip(columns, measured, strict=True)),
        **option_columns(options),
    }


def slice_paths(scan: Scan, side: str, options: ImportOptions) -> list[Path]:
    """The paths of a scan's slices, lowest first."""
    folder = options.out / side / scan.entry.label
    return [folder / f"{scan.name}_{number}.png" for number in range(options.slices)]


def write_slices(scan: Scan, side: str, made: CutSlices, options: ImportOptions) -> None:
    """Write one PNG for each slice."""
    top = 2**options.bits - 1
    grey = (made.images - made.black) * (top / (made.white - made.black))
    images = grey.round().clip(0, top).astype(f"uint{options.bits}")
    for image, path in zip(images, slice_paths(scan, side, options), strict=True):
        utils.save_grey(image, path)


def write_manifest(rows: Rows, path: Path) -> None:
    """Write the rows, sorted by scan."""
    text = io.StringIO()
    columns = list(next(iter(rows.values()), ("id", "participant", "class")))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    utils.write_atomically(path, lambda partial: partial.write_text(text.getvalue(), "utf-8"))


def rows_before(scans: list[Scan], options: ImportOptions) -> Rows:
    """The rows, by scan, of the manifest that an earlier import wrote.

    Raises UserError if that import had other options, or other classes or participants for these
    scans, or if the folder holds files but no manifest.
    """
    path = options.out / MANIFEST
    if not path.exists():
        if options.out.is_dir() and any(p.name[0] != "." for p in options.out.iterdir()):
            raise UserError(f"out = {options.out}: is not empty, and has no {MANIFEST}")
        return {}
    rows = manifest_rows(options.out)
    wanted = {scan.name: scan.entry for scan in scans}
    for name, row in rows.items():
        entry = wanted.get(name)
        expected = {"class": entry.label, "participant": entry.participant} if entry else {}
        for key, value in (option_columns(options) | expected).items():
            if (old := row.get(key)) != value:
                raise UserError(f"{path}: {name} has {key} = {old}, now {value}; use another --out")
        if row.get("split") not in SPLITS or not plain_name(name):
            text = "is no valid id, or its split is not train or test"
            raise UserError(f"{path}: {name[:40]!r} {text}")
    return rows


def is_done(scan: Scan, row: dict[str, str] | None, options: ImportOptions) -> bool:
    """Whether all slices of a scan exist and its file has not changed since they were made."""
    if row is None or not row.get("sha256"):
        return False
    whole = all(path.exists() for path in slice_paths(scan, row["split"], options))
    return whole and row["sha256"] == utils.sha256_of(scan.path)


def import_scans(options: Annotated[ImportOptions, tyro.conf.arg(name="")]) -> None:
    """Cut slices from scans, and write them into class folders of a training and a test set.

    A scan is a volume, or a folder of DICOM files, at any depth. Where a name tells a contrast by a
    BIDS suffix, such as _FLAIR, or by a word, such as MPRAGE, only --contrast is taken; names that
    tell nothing are kept. Left out are also the folders sourcedata, derivatives, code and fmap,
    phase images, segmentations, and what SPM, CAT12, FSL and FreeSurfer made of a scan. One series
    of a DICOM folder must be the scan. The end of the output counts by reason what was left out;
    OUT/left_out.csv lists it.

    Raises:
        UserError: no scan can be used; or, before anything is written, the options, the table or a
            folder is bad.
    """
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # errors are printed here
    problems: Reasons = {}
    options = with_own_table(options)
    volumes = find_volumes(options.scans, options.pattern, options.contrast, problems)
    if not volumes:
        text = "no NIfTI file or other volume, no DICOM folder"
        raise UserError(f"{options.scans}: {text} called {options.pattern}{counts_of(problems)}")
    scans = match_to_table(options, volumes, problems)
    if not scans:
        text = f"none of {len(volumes)} volumes can be used"
        raise UserError(f"{options.scans}: {text}{counts_of(problems)}")
    utils.ensure_writable(options.out)
    before = {r["participant"]: r.get("split", "") for r in manifest_rows(options.out).values()}
    names = one_spelling([*before, *(scan.entry.participant for scan in scans)])
    scans = with_participants(scans, names[len(before) :])
    rows = rows_before(scans, options)
    scans = [scan for scan in scans if has_header(scan, problems, options)]
    if not scans:
        raise UserError(f"{options.scans}: no volume could be used{counts_of(problems)}")
    try:
        split = split_participants(scans, options.test_share, options.seed, before)
    except UserError:
        print_reasons(f"{len(problems)} left out:", problems.items())
        raise
    with utils.lock_folder(options.out, "importing"):
        if rows_before(scans, options) != rows:
            text = "another process has just imported there; run this again"
            raise UserError(f"{options.out}: {text}")
        utils.delete_partials(options.out)
        cut_all(scans, split, rows, problems, options)
        if rows or before:
            write_left_out(problems, options.out / LEFT_OUT)
        else:  # nothing was written but a manifest without rows
            (options.out / MANIFEST).unlink()
            with suppress(OSError):  # other hidden files may lie there
                (options.out / ".lock").unlink()
                options.out.rmdir()
    if gone := sorted(rows.keys() - {scan.name for scan in scans}):
        first = ", ".join(gone[:5])
        utils.print_once(f"note: {len(gone)} scans of an earlier import remain: {first}")
    print_report([scan for scan in scans if scan.name in rows], split, problems, options)


def cut_all(
    scans: list[Scan], split: Split, rows: Rows, problems: Reasons, options: ImportOptions
) -> None:
    """Cut and write the scans that are not done yet, and update `rows` and the manifest.

    The manifest is first written with the planned split, so that the same command can continue
    after a kill.
    """
    todo = [scan for scan in scans if not is_done(scan, rows.get(scan.name), options)]
    rows |= {s.name: row_of(s, split[s.entry.participant], None, options) for s in todo}
    manifest, guard = options.out / MANIFEST, threading.Lock()
    write_manifest(rows, manifest)
    written, warnings = time.monotonic(), []

    def work(scan: Scan) -> None:
        nonlocal written
        side, inside, said = split[scan.entry.participant], inside_of(scan, options), []
        try:
            volume = read_volume(scan.path, options.unoriented, options.contrast, said)
            made = cut(*volume, options)
            if made.reaches_out:
                said.append("the head reaches beyond the slice (--size)")
            row = row_of(scan, side, made, options)
        except Exception as error:  # nibabel raises many types of errors
            problems[inside] = utils.first_line(error)
            for path in slice_paths(scan, side, options):
                path.unlink(missing_ok=True)  # a slice of an earlier version of the file
            with guard:
                del rows[scan.name]
            return
        write_slices(scan, side, made, options)
        with guard:
            warnings.extend((inside, text) for text in said)
            rows[scan.name] = row
            if time.monotonic() > written + MANIFEST_SECONDS:
                write_manifest(rows, manifest)
                written = time.monotonic()

    try:
        utils.map_on_cores(work, todo, "scans", "scan")
    finally:
        write_manifest(rows, manifest)
        print_reasons("warnings:", warnings)


def has_header(scan: Scan, problems: Reasons, options: ImportOptions) -> bool:
    """Whether a volume's header is good; a bad volume must not be chosen for the test set."""
    try:
        find_converter() if scan.path.is_dir() else open_volume(scan.path, options.unoriented)
    except Exception as error:  # nibabel raises many types of errors
        problems[inside_of(scan, options)] = utils.first_line(error)
        return False
    return True


def inside_of(scan: Scan, options: ImportOptions) -> str:
    """The path of a scan inside SCANS."""
    return str(scan.path.relative_to(options.scans))


def by_reason(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Reasons and the names that have them, most names first, from pairs of name and reason.

    Reasons that differ in numbers only, or after a colon, are one, with the text of the first.
    """
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, why in sorted(pairs):
        groups[re.sub(r"\b\d[\d.e+-]*\b", "N", why.partition(": ")[0])].append((name, why))
    found = []
    for group in groups.values():
        alike = len({why for _, why in group}) == 1
        found.append((group[0][1] + " or similar" * (not alike), [name for name, _ in group]))
    return sorted(found, key=lambda item: (-len(item[1]), item[0]))


def print_reasons(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print reasons, how many names each has, and the first of these names."""
    reasons = by_reason(pairs)
    if reasons:
        utils.print_once(title)
    for why, names in reasons[:MAX_REASONS]:
        more = ", ..." * (len(names) > 2)
        first = ", ".join(names[:2]).replace("\n", " ")
        utils.print_once(f"  {len(names)} x {why}: {first}{more}")
    if len(reasons) > MAX_REASONS:
        utils.print_once(f"  and {len(reasons) - MAX_REASONS} other reasons")


def counts_of(problems: Reasons) -> str:
    """How often each reason occurs, as the end of an error's line."""
    counts = [f"{len(names)} x {why}" for why, names in by_reason(problems.items())]
    return f"; left out: {'; '.join(counts[:MAX_REASONS])}" if counts else ""


def write_left_out(problems: Reasons, path: Path) -> None:
    """Write the complete list of what is left out, with the reasons."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "reason"))
    writer.writerows((utils.printable(name), problems[name]) for name in sorted(problems))
    utils.write_atomically(path, lambda partial: partial.write_text(text.getvalue(), "utf-8"))


def print_report(
    scans: list[Scan], split: Split, problems: Reasons, options: ImportOptions
) -> None:
    """Print what was imported, how even the split is, and what was left out."""
    print_balance(scans, split)
    if not scans:
        raise UserError(f"{options.scans}: no volume could be used{counts_of(problems)}")
    print_reasons(f"{len(problems)} left out, see {options.out / LEFT_OUT}:", problems.items())
    for label, side in one_sided(scans, split):
        text = f"all volumes of class {label} that could be used are in {side}/"
        raise UserError(f"{text}; remove those left out from the scans, and use another --out")
    people = len({scan.entry.participant for scan in scans})
    utils.print_once(f"{len(scans)} scans of {people} participants in {options.out}")
    utils.print_once(f"check them with: python prepare.py check {options.out}")
