"""What an evaluation means, in five sentences for readers who know none of its measures."""

import math
from typing import Any, NamedTuple

Row = dict[str, Any]  # a row of a table, by column
Rows = list[Row]
MIN_PARTICIPANTS = 20  # for a verdict: distances of fewer are so large that samples look close
ENOUGH_SLICES = 100  # samples for a distance that says something
LOW_PRECISION = 0.05  # below it, what samples show of classes, people and variety means little
CHANCE = 0.01  # share of test slices below the audit's threshold
REAL = "real: test against train"  # a row of the distribution, and one to compare with it:
SAME_SIZE = "all, as many as test slices"
MIN_FOUND = 0.5  # share of planted copies that an audit must find to say that there are none
SAME_AUC = 0.1  # AUCs that may differ by more are not called about equal
MANY = 0.1  # a share too near that no honest generator had, with MIN_PARTICIPANTS or more
LIMITS = (
    "Do not use generated slices for diagnosis, as evidence about any person or disease, or as "
    "proof that data are anonymous."
)


def verdict(report: dict[str, Any]) -> str:
    """Closeness, variety, copies, classes and limits, one sentence each, as a Markdown list."""
    people, found = fewest_people(report), []
    few = f"there are {people} people in train or test, and {MIN_PARTICIPANTS} are needed in both"
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


def fewest_people(report: dict[str, Any]) -> float:
    """The number of people in the training or the test set, whichever is smaller."""
    what = report.get("what", {})
    return min(what.get(f"participants_{split}", math.inf) for split in ("train", "test"))


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
        if row["set"] != "samples" or not is_finite(row.get("over_memory")):
            continue
        ratio, (low, high) = row["over_memory"], row["over_memory_interval"]
        if not is_finite(low) or row.get("slices", ENOUGH_SLICES) < ENOUGH_SLICES:
            few = f"fewer than {ENOUGH_SLICES} generated or training slices"
            return f"How close the generated slices are to real ones cannot be told from {few}."
        whose = "people whom the generator never saw"
        if start := report.get("what", {}).get("started_from"):
            whose = f"people whom this run never saw, though {start}, where it began, may have"
        whose = "other data than the run's" if is_of_other_data(report) else whose
        limits = f"{low:.2g} to {high:.2g}" if is_finite(high) else f"{low:.2g} or more"
        return (
            f"The generated slices are {nearness(ratio)} real slices of {whose}: their "
            f"distance is {ratio:.2g} times that of real training slices ({limits}, by random "
            "halves of the people; training slices get 1, and a perfect generator 0.6 to 1, as "
            "each of its slices is of a person of its own)."
        )
    return ""


def variety(report: dict[str, Any]) -> str:
    """By recall over that of the test slices, else by how alike two slices are; "" if unknown.

    If recall is that of real slices once all are blurred, what is missing is detail, not variety.
    """
    sets = reversed(report.get("recall_without_detail", ()))  # of equal size; first extractor
    rows = {row["set"]: row for row in sets}
    fake, real, fake_blurred, real_blurred = (
        rows.get(which, {}).get(name, math.nan)
        for name in ("recall", "recall_blurred")
        for which in ("samples", "test slices")
    )
    if math.isfinite(fake) and real > 0:
        if precision_of(report) < LOW_PRECISION:
            share = f"only {precision_of(report):.0%} of them look like real slices at all"
            return f"Their variety cannot be judged, as {share}."
        if fake < 0.8 * real and fake_blurred >= 0.8 * real_blurred > 0:
            return (
                "Their shapes vary about as those of real slices do, but their fine detail is not "
                f"that of real slices: {fake:.0%} of the real training slices have a like among "
                f"them, and {fake_blurred:.0%} once all are blurred by a pixel (slices of unseen "
                f"people: {real:.0%} and {real_blurred:.0%})."
            )
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
    nearer: bool | None  # training people are nearer to samples than others; None: not compared
    unlike: bool  # real slices of others are nearer to training people than test people are
    copied: bool  # too many, of training people, and not because test people are unlike them
    found: list[float]  # the share that was found of each kind of planted copies


def audit_of(row: Row, memberships: Rows, people: float) -> Audit:
    """The audit of a row of the memorisation table; `people` counts test participants.

    Average heads are near to many slices, but no nearer to those of training participants.
    """
    share, (low, _) = row["share_too_near"], row["interval_over_participants"]
    by_chance = row.get("share_by_chance")
    by_chance = max(CHANCE, by_chance if is_finite(by_chance) else 0)
    nearer, unlike = None, False
    for m in memberships:
        same = (m["space"], m["near"]) == (row["space"], "samples")
        if same and is_finite(m.get("auc_calibrated")):
            nearer = m["auc_calibrated_interval"][0] > 0.5
            unlike = m.get("auc_cohorts_interval", [0.5])[0] > 0.5
    too_many = low > by_chance and row.get("excess_interval", [1])[0] > 0
    near = share >= (0.5 if people < MIN_PARTICIPANTS else MANY) if nearer is None else nearer
    found = [value for name, value in row.items() if name.startswith("found_")]
    copied = too_many and near and not unlike
    return Audit(share, by_chance, too_many, nearer, unlike, copied, found)


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
    audit = max(audits, key=lambda a: (a.copied, a.too_many, bool(a.nearer), a.share))
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
    detail += ")"
    if audit.copied:
        return f"Copies of training slices were found: {detail}; so do not share these samples."
    if audit.too_many:
        why = ""
        if audit.unlike:
            why = "; people of the test set differ from training people, which alone can cause this"
        elif audit.nearer is False:
            why = ", but training participants are no nearer to the samples than other people"
        return f"Look for copies among the nearest pairs: {detail}{why}."
    if least < MIN_FOUND:
        return f"Copies of training slices cannot be ruled out: {detail}."
    if audit.nearer and not audit.unlike:
        detail += ", but training participants are nearer to the samples than other people: a trace"
        detail += " of memorisation"
    if start := report.get("what", {}).get("started_from"):
        detail += f"; the slices of {start}, where it began, were not compared"
    return f"No copies of training slices were found: {detail}."


def classes(report: dict[str, Any]) -> str:
    """By classifiers trained on samples and on real slices, else by ventricles; "" if unknown."""
    rows = {r["measurement"]: r for r in report.get("labels", ()) if r["unit"] == "participants"}
    names = "TSTR", "TRTR", "TSTR, intensity alone"
    fake, real, grey = (rows.get(name, {}).get("auc", math.nan) for name in names)
    if math.isfinite(fake + real):
        low, high = rows["TSTR - TRTR"]["interval_over_participants"]
        if low < -SAME_AUC and high >= 0:
            return (
                "It cannot be said whether their classes look as in real slices: the test set is "
                "too small to tell how far a computer that learned them from generated slices "
                f"falls behind one that learned from real slices ({fake:.2f} against {real:.2f}, "
                f"difference {low:.2f} to {high:.2f}; 0.5 is guessing and 1 is always right)."
            )
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
            least, most = row.get("fake_effect_interval", [row["fake_effect"]] * 2)
            how = "as" if low <= most and least <= high else "unlike"
            if how == "as" and low <= 0 <= high:
                how = "perhaps as"
            return (
                f"The size of the ventricles differs between their classes {how} in real slices: "
                f"by {row['fake_effect']:.2g} standard deviations, against {low:.2g} to {high:.2g}."
            )
    return ""
