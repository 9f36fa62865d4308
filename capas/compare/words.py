"""Write the sentences of a comparison."""

from collections.abc import Iterator

from capas.compare.changes import Changes
from capas.compare.inputs import Inputs
from capas.compare.scores import LOSS, Compared, Difference, Score, headline
from capas.compare.sides import PREDICTIONS, Side
from capas.compare.why import TRAIN, Training


def number(value: float, is_share: bool) -> str:
    """Return a value as text: '90.8 %' for a share, otherwise four significant digits."""
    return f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def points(value: float, is_share: bool) -> str:
    """Return a difference as text: '+1.6 points' for a share, otherwise four significant digits."""
    return f"{100 * value:+.1f} points" if is_share else f"{value:+.4g}"


def bounds(low: float, high: float, is_share: bool) -> str:
    """Return the ends of an interval as text, '0.2 to 3.0'; in percent for a share."""
    return f"{100 * low:.1f} to {100 * high:.1f}" if is_share else f"{low:.3g} to {high:.3g}"


def score(found: Score | None, is_share: bool) -> str:
    """Return a score with its interval as text: '90.8 % (88.0 to 93.0)'."""
    if found is None:
        return "–"
    shown = number(found.value, is_share)
    if found.low is None or found.high is None:
        return shown
    return f"{shown} ({bounds(found.low, found.high, is_share)})"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def metric_name(name: str) -> str:
    return name.replace("_", " ")


def verdict(a: Side, b: Side, found: Compared, inputs: Inputs, changes: Changes) -> str:
    """Return one or a few sentences on which result is better, or why this is not known."""
    return " ".join(_verdict(a, b, found, inputs, changes))


def _verdict(a: Side, b: Side, found: Compared, inputs: Inputs, changes: Changes) -> Iterator[str]:
    if inputs.same_adapter:
        sha256 = b.sha256 or a.sha256
        yield f"The same adapter{f' (sha256 {sha256[:12]}…)' if sha256 else ''}."
        if found.test == "same" and not any(found.changed()):
            is_all = not changes.shown and not inputs.differ
            yield (
                "Nothing differs." if is_all else "Its answers score the same on every test record."
            )
            return
    if found.test == "other":
        yield _other_tests(a, b)
    elif found.difference is None:
        yield from _without_answers(a, b, found)
    else:
        yield _judged(found, found.difference)
    if found.metric == LOSS and LOSS not in (headline(a), headline(b)):
        yield (
            f"Scored by different metrics ({headline(a)}, {headline(b)}): only the loss can be compared."
        )
    if changes.only_seed and not inputs.differ:
        yield "Only the seed differs: this is how much trainings differ by chance."


def _other_tests(a: Side, b: Side) -> str:
    keys = ("dataset.preset", "dataset.path", "dataset.data_files", "dataset.seed")
    pairs = ((a.texts.get(key, "?"), b.texts.get(key, "?")) for key in keys)
    one, other = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    named = f" ({one}, {other})" if one else ""
    return f"Not comparable: the data sets{named} differ, and so do their test records."


def _judged(found: Compared, difference: Difference) -> str:
    share, name = found.is_share, metric_name(found.metric)
    before, after = (number(value, share) for value in (difference.before, difference.after))
    interval = bounds(difference.low, difference.high, share)
    change = points(difference.mean, share)
    records = f"{difference.num_records} test records"
    if found.test == "shared":
        one, other = found.num_tests
        records = f"the {difference.num_records} test records that both have (A {one}, B {other})"
    level = f"{100 * found.confidence:g} % interval"
    measured = f"{name} {before} -> {after}, {change}, {level}"
    if difference.verdict == "no difference seen":
        needed = difference.num_needed
        more = f" About {needed:,} records would show it." if needed else ""
        return (
            f"No difference is shown: {measured} {interval} on {records} contains zero."
            f"{more if needed and needed > difference.num_records else ''}"
        )
    return f"B is {difference.verdict}: {measured} {interval} on {records}."


def _without_answers(a: Side, b: Side, found: Compared) -> Iterator[str]:
    missing = [letter for letter, side in (("A", a), ("B", b)) if side.predictions is None]
    name = found.metric
    if name == LOSS and found.same_tokens is False:
        yield "Not comparable: the losses are means over different tokens (tokenizer or template)."
        return
    one, other = found.scores[name]
    if one is not None and other is not None:
        change = points(other.value - one.value, found.is_share)
        shown = f"{number(one.value, found.is_share)} -> {number(other.value, found.is_share)}"
        yield f"{metric_name(name).capitalize()} {shown}, {change}."
    if missing:
        yield (
            "Whether this is more than chance is not known: the answers of "
            f"{' and '.join(missing)} are not here (see the note)."
        )
    elif name == LOSS:
        yield "No interval: MLflow does not record how many tokens each loss is a mean of."
    if found.test == "unknown":
        yield "It is not known either whether the test records are the same."
    elif found.test == "shared":
        yield "They were scored on different numbers of test records."


def training(a: Side, b: Side, found: Training) -> str:
    """Return a sentence on how the training records of the two models differ."""
    if found.missing:
        lacking = [pair for pair in (("A", a), ("B", b)) if pair[0] in found.missing]
        return "The training records cannot be compared. " + " ".join(
            f"{letter}: {how_to_get(side, TRAIN, 'fetch format')}." for letter, side in lacking
        )
    if not found.differs:
        return "Both were trained on the same records: the difference comes from something else."
    return (
        f"Training records: {found.num_same:,} in both, {len(found.only_a):,} only in A, "
        f"{len(found.only_b):,} only in B."
    )


def notes(a: Side, b: Side, found: Compared, inputs: Inputs) -> list[str]:
    """Return what a reader must know besides the verdict."""
    return list(_notes(a, b, found, inputs))


def _notes(a: Side, b: Side, found: Compared, inputs: Inputs) -> Iterator[str]:
    for letter, side in (("A", a), ("B", b)):
        if side.predictions is None:
            yield f"{letter}: {how_to_get(side)}"
        if side.stale:
            yield (
                f"{letter}: {side.stale} has not run since train, so the scores are of an earlier adapter: "
                "run `dvc repro`"
            )
        if side.pending:
            yield f"{letter}: {side.pending}"
        yield from _contradiction(letter, side)
    if found.test != "other" and found.same_tokens is False:
        yield "The losses cannot be compared: the answers have different tokens (tokenizer or template)"
    if headline(a) != headline(b) and found.metric != LOSS and found.test != "other":
        yield (
            f"The headline of A is {metric_name(headline(a))}, that of B is {metric_name(headline(b))}"
        )
    if a.cpu and b.cpu and a.cpu != b.cpu:
        yield f"The seconds are of different CPUs: A {a.cpu}, B {b.cpu}"
    unknown = [letter for letter, side in (("A", a), ("B", b)) if "train" not in side.seconds]
    if unknown and not inputs.same_adapter:
        yield (
            f"The seconds of {' and '.join(unknown)} are not known here: DVC restored the training, or it "
            "ran on another machine"
        )
    if inputs.same_data is False and found.test == "same":
        yield "The data set differs, the test records are the same (--why: the training records that differ)"


def _contradiction(letter: str, side: Side) -> Iterator[str]:
    """Yield a note if the metrics in git and the answers in DVC's cache are from different runs."""
    if side.predictions is None or side.kind == "run" or not side.predictions.rows:
        return
    for name in side.predictions.metrics[:1]:
        values = [float(row[name]) for row in side.predictions.rows]
        mean, reported = sum(values) / len(values), side.metrics.get(name)
        if reported is not None and abs(mean - float(reported)) > 1e-4 * max(1.0, abs(mean)):
            yield (
                f"{letter}: reports/metrics/tuned.json says {name} {reported:.4g}, the answers in dvc.lock "
                f"score {mean:.4g}: they are of different runs. Run `dvc repro`"
            )


def how_to_get(side: Side, what: str = PREDICTIONS, stages: str = "evaluate") -> str:
    """Return a sentence on how to get an output of `stages` that is not on this machine."""
    ways = {
        "workspace": f"`dvc pull {stages}` from a remote, or make it again: `dvc repro`",
        "experiment": f"`dvc exp pull REMOTE {side.name}`, or make it again: `dvc exp apply {side.name}`, "
        "`dvc repro`",
        "commit": f"`dvc fetch --all-commits {stages}` from a remote, or make it again: `git checkout "
        f"{side.name}`, `dvc repro`",
        "run": f"`capas rebuild {side.name} --all --keep FOLDER` makes it again",
    }
    return f"{what} is not in DVC's cache here: {ways[side.kind]}"
