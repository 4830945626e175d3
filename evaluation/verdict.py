"""What an evaluation means, in five sentences for readers who know none of its measures."""

import math
from typing import Any, NamedTuple

Row = dict[str, Any]  # a row of a table, by column
Rows = list[Row]
MIN_PARTICIPANTS = 10  # in the test set, for a verdict
LOW_PRECISION = 0.05  # below it, what samples show of classes, people and variety means little
CHANCE = 0.01  # share of test slices below the audit's threshold
REAL = "real: test against train"  # a row of the distribution
MIN_FOUND = 0.5  # share of planted copies that an audit must find to say that there are none
MANY = 0.1  # a share too near that no honest generator had, with MIN_PARTICIPANTS or more
LIMITS = (
    "Do not use generated slices for diagnosis, as evidence about any person or disease, or as "
    "proof that data are anonymous."
)


def verdict(report: dict[str, Any]) -> str:
    """Closeness, variety, copies, classes and limits, one sentence each, as a Markdown list."""
    people, found = report.get("what", {}).get("participants_test", math.inf), []
    few = f"the test set has {people} people, and at least {MIN_PARTICIPANTS} are needed"
    questions = {
        "how close the generated slices are to real ones": closeness,
        "whether they vary as real slices do": variety,
        "whether they copy training slices": copies,
        "whether their classes look as in real slices": classes,
    }
    for question, answer in questions.items():
        text = answer(report)
        if not text:
            text = f"{question[0].upper()}{question[1:]} was not measured."
        elif people < MIN_PARTICIPANTS and not text.startswith("Copies of training slices were"):
            text = f"It cannot be said {question}: {few}."
        found.append(text)
    return "".join(f"- {sentence}\n" for sentence in (*found, LIMITS))


def nearness(ratio: float) -> str:
    """A distance to real slices, divided by one between real slices, in words."""
    grades = {1.2: "very close to", 3: "close to", 8: "some way from", 20: "far from"}
    return next((words for limit, words in grades.items() if ratio < limit), "very far from")


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)  # JSON has null for other numbers


def is_of_other_data(report: dict[str, Any]) -> bool:
    """Whether the real slices are not those that the generator was trained on."""
    return "not the slices of this run" in report.get("what", {}).get("data", "")


def precision_of(report: dict[str, Any]) -> float:
    """The share of samples that look like real slices, in the kindest extractor; 1 if unknown."""
    whole = [row for row in report.get("distribution", ()) if row.get("set") == "all"]
    return max((row.get("precision", 1.0) for row in whole), default=1.0)


def closeness(report: dict[str, Any]) -> str:
    """By the first extractor's Fréchet distance over that of the training slices; "" if unknown."""
    for row in report.get("headline", ()):
        if row["set"] == "samples" and is_finite(row.get("over_memory")):
            ratio, (low, high) = row["over_memory"], row["over_memory_interval"]
            unseen = "people whom the generator never saw"
            whose = "other data than the run's" if is_of_other_data(report) else unseen
            limits = f"{low:.2g} to {high:.2g}" if is_finite(high) else f"{low:.2g} or more"
            return (
                f"The generated slices are {nearness(ratio)} real slices of {whose}: their "
                f"distance is {ratio:.2g} times that of real training slices ({limits}, by random "
                "halves of the people; 1 is as close as real slices are)."
            )
    return ""


def variety(report: dict[str, Any]) -> str:
    """By recall over that of the test slices, else by how alike two slices are; "" if unknown."""
    sets = reversed(report.get("recall_without_detail", ()))  # of equal size; first extractor
    rows = {row["set"]: row for row in sets}
    fake, real = (rows.get(k, {}).get("recall", math.nan) for k in ("samples", "test slices"))
    if math.isfinite(fake) and real > 0:
        if precision_of(report) < LOW_PRECISION:
            share = f"only {precision_of(report):.0%} of them look like real slices at all"
            return f"Their variety cannot be judged, as {share}."
        grades = {0.4: "far smaller than that of", 0.8: "smaller than that of"}
        words = (words for limit, words in grades.items() if fake / real < limit)
        how = next(words, "about that of")
        return (
            f"Their variety is {how} real slices: {fake:.0%} of the real training slices have a "
            f"like among {rows['samples']['slices']} of them, and {real:.0%} have one among as "
            "many slices of unseen people."
        )
    rows = {r["pairs"]: r for r in report.get("diversity", ()) if is_finite(r.get("ms_ssim"))}
    if len(rows) < 2:
        return ""
    (a, error), (b, other) = ((rows[k]["ms_ssim"], rows[k]["error"]) for k in ("fake", "real"))
    how = "more" if a - b > 2 * math.hypot(error, other) else "no more"
    return f"Two of them are {how} alike than two real slices: {a:.2f} against {b:.2f} (1: equal)."


class Audit(NamedTuple):
    """How near the samples are to training slices, in one space of features."""

    share: float  # of samples nearer to a training slice than 99 % of test slices are
    by_chance: float  # the same of slices of test people, against the other test people
    too_many: bool  # more than by chance
    copied: bool  # too many, and training people are nearer to samples than other people
    compared: bool  # whether people were compared
    found: list[float]  # the share that was found of each kind of planted copies


def audit_of(row: Row, memberships: Rows, people: float) -> Audit:
    """The audit of a row of the memorisation table; `people` counts test participants.

    Average heads are near to many slices, but no nearer to those of training participants.
    """
    share, (low, _) = row["share_too_near"], row["interval_over_participants"]
    by_chance = row.get("share_by_chance")
    by_chance = max(CHANCE, by_chance if is_finite(by_chance) else 0)
    limits = [
        m["auc_calibrated_interval"][0]
        for m in memberships
        if (m["space"], m["near"]) == (row["space"], "samples")
        and is_finite(m.get("auc_calibrated"))
    ]
    near = limits[0] > 0.5 if limits else share >= (0.5 if people < MIN_PARTICIPANTS else MANY)
    found = [value for name, value in row.items() if name.startswith("found_")]
    return Audit(share, by_chance, low > by_chance, low > by_chance and near, bool(limits), found)


def copies(report: dict[str, Any]) -> str:
    """By the space with most samples too near to training slices; "" if unknown."""
    rows = [r for r in report.get("memorisation", ()) if is_finite(r.get("share_too_near"))]
    if not rows:
        return ""
    if is_of_other_data(report):
        return (
            "Whether they copy training slices cannot be said: these are not the slices that the "
            "generator was trained on."
        )
    people = report.get("what", {}).get("participants_test", math.inf)
    audits = [audit_of(row, report.get("membership", []), people) for row in rows]
    audit = max(audits, key=lambda audit: (audit.copied, audit.share))
    least = min(audit.found, default=1.0)
    detail = (
        f"{audit.share:.1%} of the generated slices are nearer to a training slice than 99 % of "
        f"unseen real slices are ({100 * audit.by_chance:.2g} % by chance"
    )
    if least < MIN_FOUND:
        detail += f"; of some kinds of copies hidden as a test only {least:.0%} are found"
    elif audit.found:
        share = "all" if least == 1 else f"{least:.0%} or more"
        detail += f"; of copies hidden as a test, {share} are found"
    if audit.copied:
        return f"Copies of training slices were found: {detail}), so do not share these samples."
    if audit.too_many:
        why = ", but training participants are no nearer to the samples than other people"
        return f"Look for copies among the nearest pairs: {detail}){why * audit.compared}."
    if least < MIN_FOUND:
        return f"Copies of training slices cannot be ruled out: {detail})."
    return f"No copies of training slices were found: {detail})."


def classes(report: dict[str, Any]) -> str:
    """By classifiers trained on samples and on real slices, else by ventricles; "" if unknown."""
    rows = {r["measurement"]: r for r in report.get("labels", ()) if r["unit"] == "participants"}
    names = "TSTR", "TRTR", "TSTR, intensity alone"
    fake, real, grey = (rows.get(name, {}).get("auc", math.nan) for name in names)
    if math.isfinite(fake + real):
        low, high = rows["TSTR - TRTR"]["interval_over_participants"]
        how = "worse than" if high < 0 else "better than" if low > 0 else "about as well as"
        more = ", but even real slices hardly show the classes" if real < 0.6 else ""
        if grey > fake - 0.02 and not more:
            more = ", but brightness and sharpness alone tell them as well"
        return (
            "A computer that learned the classes from generated slices tells them in unseen people "
            f"{how} one that learned from real slices ({fake:.2f} against {real:.2f}, where 0.5 "
            f"is guessing and 1 is always right){more}."
        )
    for row in report.get("anatomy", ()):
        if row["area"] == "ventricles" and is_finite(row.get("fake_effect")):
            low, high = row["real_effect_interval"]
            how = "as" if low <= row["fake_effect"] <= high else "unlike"
            return (
                f"The size of the ventricles differs between their classes {how} in real slices: "
                f"by {row['fake_effect']:.2g} standard deviations, against {low:.2g} to {high:.2g}."
            )
    return ""
