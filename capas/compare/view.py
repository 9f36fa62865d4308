"""Show a comparison of two results as lines of text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from capas.compare import layout, words
from capas.compare.changes import PRESET, Changes
from capas.compare.inputs import Inputs
from capas.compare.layout import one_line, printable, shortened, width_of
from capas.compare.scores import LOSS, Compared, Score, Settings, headline, is_share, score
from capas.compare.sides import Row, Side
from capas.compare.why import A, Near, Training
from capas.core.errors import listed

ABSENT = "–"
MAX_CHANGES = 20  # rows of parameters
MIN_CELL, _MIN_VALUE, _MAX_KEY, MAX_NAME = 14, 21, 34, 30
_NUM_FILES = 3
_WORDS = {"None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True)
class Pair:
    """A comparison of two results with everything that is shown of it."""

    a: Side
    b: Side
    changes: Changes
    inputs: Inputs
    compared: Compared
    questions: Mapping[str, str]  # {id: question} of the records that are shown

    @property
    def letters(self) -> tuple[tuple[str, Side], tuple[str, Side]]:
        return ("A", self.a), ("B", self.b)


def pair_lines(pair: Pair, width: int) -> Iterator[str]:
    """Yield the differences, the scores, and a sentence on which result is better."""
    yield from _legend(pair.letters, width)
    yield ""
    verdict = words.verdict(pair.a, pair.b, pair.compared, pair.inputs, pair.changes)
    yield from layout.wrapped(verdict, width)
    yield ""
    heads = ("", *(f"{letter} {one_line(side.name)}" for letter, side in pair.letters))
    changed, scored = _parameters(pair), _scores(pair)
    rows = [heads, *changed, *scored]
    key, cell = widest([row[0] for row in rows]), widest([c for _, *cells in rows for c in cells])
    if changed:
        yield from _three_columns([heads, *changed], width, key, cell)
    yield from _other_changes(pair, width)
    yield ""
    yield from _three_columns(scored if changed else [heads, *scored], width, key, cell)
    if loss := _loss(pair.compared):
        yield ""
        yield from layout.wrapped(loss, width)
    notes = words.notes(pair.a, pair.b, pair.compared, pair.inputs)
    if notes:
        yield ""
    for note in notes:
        yield from _hanging("Note: ", note, width)


def answers_lines(pair: Pair, width: int) -> Iterator[str]:
    """Yield one record that B answers better and one that it answers worse, both answers side by side."""
    compared = pair.compared
    if not any("completion" in row and row["completion"] for p in compared.pairs for row in p):
        return
    won, lost = compared.changed()
    yield ""
    if all(before["completion"] == after["completion"] for before, after in compared.pairs):
        yield f"The answers are the same, all {len(compared.pairs)} of them."
        return
    yield from layout.wrapped(_counts(compared, len(won), len(lost)), width)
    shown = [(mark, found[0]) for mark, found in ((">", won), ("<", lost)) if found]
    if not shown:
        shown = [("=", next(p for p in compared.pairs if p[0]["completion"] != p[1]["completion"]))]
    for mark, chosen in shown:
        yield ""
        yield _titles(compared)[mark]
        yield from record_lines(pair, chosen, width)
    if won or lost:
        yield ""
        yield from layout.wrapped("--why shows more of them, with similar training records", width)


def record_lines(pair: Pair, chosen: tuple[Row, Row], width: int) -> Iterator[str]:
    """Yield the question and the reference of a test record, and the answers of both models."""
    before, after = chosen
    room = width - 10
    for label, text in (
        ("asked", pair.questions.get(after["id"], after.get("prompt") or "")),
        ("wanted", after["reference"] or ""),
    ):
        lines = layout.wrapped(printable(text), room, 3)
        yield from (f"  {label if not i else '':7} {line}" for i, line in enumerate(lines))
    texts = [printable(row["completion"] or "(nothing)") for row in (before, after)]
    cell = (width - 2 - layout.GAP) // 2
    if cell < 2 * MIN_CELL:
        for letter, text in zip("AB", layout.focused(texts, 3 * room), strict=True):
            lines = layout.wrapped(text, room, 3)
            yield from (f"  {letter if not i else '':7} {line}" for i, line in enumerate(lines))
        return
    texts = layout.focused(texts, 5 * cell)
    left, right = (
        [letter, *layout.wrapped(t, cell, 5)] for letter, t in zip("AB", texts, strict=True)
    )
    yield from (f"  {line}" for line in layout.beside(left, right, cell))


def why_lines(
    pair: Pair,
    training: Training,
    records: Sequence[tuple[str, tuple[Row, Row], Sequence[Near]]],
    totals: tuple[int, int],
    width: int,
) -> Iterator[str]:
    """Yield the records won and lost, each with the nearest training records that one side lacks.

    Args:
        records: (">" won or "<" lost, rows of A and B, nearest training records).
        totals: how many were won and lost in all.
    """
    yield ""
    yield from layout.wrapped(words.training(pair.a, pair.b, training), width)
    for mark, name, total in ((">", "won", totals[0]), ("<", "lost", totals[1])):
        chosen = [entry for entry in records if entry[0] == mark]
        if not total:
            continue
        yield ""
        yield f"{_titles(pair.compared)[mark]}: {len(chosen)} of {total} {name}"
        for _, rows, near in chosen:
            yield ""
            yield f"  test record {shortened(one_line(str(rows[1]['id'])), width - 14)}"
            yield from record_lines(pair, rows, width)
            for one in near:
                yield from _near_lines(one, width)


def _near_lines(near: Near, width: int) -> Iterator[str]:
    lacking = "B" if near.only == A else "A"
    name = shortened(one_line(near.record_id), 24)
    yield (
        f"  nearest training record of {near.only} that {lacking} lacks: {name}, similarity "
        f"{near.similarity:.2f}"
    )
    for label, text in (("asked", near.question), ("answer", near.answer)):
        lines = layout.wrapped(printable(text), width - 12, 2)
        yield from (f"    {label if not i else '':7} {line}" for i, line in enumerate(lines))


def baseline_lines(side: Side, width: int) -> Iterator[str]:
    """Yield one result together with the score of its base model."""
    settings, metric = Settings.of(side.texts), headline(side)
    share, found = is_share(side, metric), score(side, headline(side), settings)
    rows = [(words.metric_name(metric), words.score(found, share))]
    if (base := side.baseline.get(metric)) is not None:
        rows.append(("  of its base model", words.number(float(base), share)))
    if metric != LOSS:
        rows.append(("loss", value_of(side, LOSS, False)))
    rows.append(("training, seconds", words.seconds(side.seconds.get("train"))))
    yield f"{side.name}  {shortened(one_line(side.origin), width - width_of(side.name) - 2)}"
    yield ""
    label = max(width_of(name) for name, _ in rows)
    yield from layout.table(rows, [label, width - label - layout.GAP], [False, False])


def _legend(letters: Sequence[tuple[str, Side]], width: int) -> Iterator[str]:
    room = min(MAX_NAME, max(width_of(one_line(side.name)) for _, side in letters))
    for letter, side in letters:
        origin = one_line(side.origin)
        same = f" = {side.same_as}" if side.same_as else ""
        yield from layout.table(
            [(letter, one_line(side.name), f"{origin}{same}")],
            [1, room, max(MIN_CELL, width - room - 1 - 2 * layout.GAP)],
            [False] * 3,
        )


def _parameters(pair: Pair) -> list[tuple[str, ...]]:
    """Return a row for each parameter that differs, without those of `_one_sided`."""
    shown = [key for key in pair.changes.shown if key not in _one_sided(pair)]
    return [
        (key.removesuffix(PRESET), *(as_yaml(side.texts.get(key)) for _, side in pair.letters))
        for key in shown[:MAX_CHANGES]
    ]


def _one_sided(pair: Pair) -> dict[str, str]:
    """Return {key: letter of the side that has it} of keys that only one version of conf/ has.

    If there are only a few, it is empty: they are shown as rows. So are the keys of a mapping that is empty
    on the other side.
    """
    found = {}
    for key in pair.changes.shown:
        having = [letter for letter, side in pair.letters if key in side.texts]
        parents = {key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)}
        is_filled = any(not parents.isdisjoint(side.texts) for _, side in pair.letters)
        if len(having) == 1 and not is_filled:
            found[key] = having[0]
    return found if len(found) > _NUM_FILES else {}


def _other_changes(pair: Pair, width: int) -> Iterator[str]:
    """Yield the differences besides the parameters in the table."""
    changes, one_sided = pair.changes, _one_sided(pair)
    if not changes.shown:
        yield "The parameters are the same."
    more = len(changes.shown) - len(one_sided) - MAX_CHANGES
    if more > 0:
        yield f"{more} more parameters differ: --json has them all."
    if changes.explained:
        count = len(changes.explained)
        yield f"({count} more {'value follows' if count == 1 else 'values follow'} from these.)"
    for letter, _ in pair.letters:
        keys = [key for key, having in one_sided.items() if having == letter]
        yield from _listed(f"Parameters that {letter} alone has: ", keys, width)
    yield from _inputs(pair.inputs, width)


def _inputs(inputs: Inputs, width: int) -> Iterator[str]:
    yield from _listed("Code that differs: ", inputs.code, width)
    yield from _listed("Files that differ: ", inputs.files, width)
    if inputs.packages:
        changed = [f"{n} {one} -> {other}" for n, (one, other) in inputs.packages.items()]
        yield from _hanging("Packages that differ: ", ", ".join(changed), width)


def _listed(label: str, names: Sequence[str], width: int) -> Iterator[str]:
    """Yield the first names and how many more there are."""
    if names:
        yield from _hanging(label, listed(names, _NUM_FILES), width)


def _scores(pair: Pair) -> list[tuple[str, ...]]:
    compared = pair.compared
    rows: list[tuple[str, ...]] = []
    for name, found in compared.scores.items():
        is_first = name == compared.metric
        share = all(is_share(side, name) for _, side in pair.letters)
        shown = found if is_first else map(_without_interval, found)
        rows.append((words.metric_name(name), *(words.score(one, share) for one in shown)))
        bases = [side.baseline.get(name) for _, side in pair.letters]
        if is_first and (compared.test == "other" or bases[0] != bases[1]):
            texts = (ABSENT if b is None else words.number(float(b), share) for b in bases)
            rows.append(("  of the base model", *texts))
    times = (words.seconds(side.seconds.get("train")) for _, side in pair.letters)
    rows.append(("training, seconds", *times))
    trained = tuple(side.num_train for _, side in pair.letters)
    for label, numbers in (("training records", trained), ("test records", compared.num_tests)):
        if numbers[0] != numbers[1]:
            rows.append((label, *(ABSENT if n is None else f"{n:,}" for n in numbers)))
    return rows


def _loss(compared: Compared) -> str:
    """Return a sentence on the paired difference of the losses, if the headline is another metric."""
    change = compared.loss
    if change is None or compared.metric == LOSS or change.low == change.high == 0:
        return ""
    verdict = "no difference is shown" if change.verdict == "no difference seen" else change.verdict
    return (
        f"Loss of B: {verdict}, {words.points(change.mean, False)}, {100 * compared.confidence:g} % interval "
        f"{words.bounds(change.low, change.high, False)}."
    )


def _three_columns(rows: Sequence[Sequence[str]], width: int, key: int, cell: int) -> Iterator[str]:
    """Yield key, A and B in columns, or below each other on a narrow terminal.

    Args:
        key, cell: the widths of the widest key and of the widest value.
    """
    key = min(_MAX_KEY, key)
    room = (width - key - 2 * layout.GAP) // 2
    if room >= min(cell, _MIN_VALUE):
        yield from layout.table(rows, [key, min(room, cell), min(room, cell)], [False] * 3)
        return
    for name, *cells in rows:
        if name:
            yield shortened(name, width)
            for letter, text in zip("AB", cells, strict=True):
                yield f"  {letter}  {shortened(text, width - 5)}"


def _hanging(label: str, text: str, width: int) -> Iterator[str]:
    """Yield `text` beside its label, or below it if little room is left."""
    if len(label) > width // 3:
        yield from layout.wrapped(label + text, width)
        return
    lines = layout.wrapped(text, width - len(label))
    yield from (f"{label if not i else ' ' * len(label)}{line}" for i, line in enumerate(lines))


def _counts(compared: Compared, won: int, lost: int) -> str:
    total = len(compared.pairs)
    alike = f"{total - won - lost} score alike"
    if _is_right_or_wrong(compared):
        return f"Of {total} test records B alone is right on {won}, A alone on {lost}; {alike}."
    return f"Of {total} test records B scores higher on {won}, A on {lost}; {alike}."


def _titles(compared: Compared) -> dict[str, str]:
    if _is_right_or_wrong(compared):
        return {">": "Only B is right", "<": "Only A is right", "=": "An example"}
    return {">": "B scores higher", "<": "A scores higher", "=": "An example"}


def _is_right_or_wrong(compared: Compared) -> bool:
    name = compared.metric
    return all(row[name] in (0, 1) for pair in compared.pairs for row in pair)


def _without_interval(found: Score | None) -> Score | None:
    return found and Score(found.value)


def as_yaml(value: str | None) -> str:
    """Return a parameter's text as YAML writes it."""
    if value is None:
        return ABSENT
    return one_line(_WORDS.get(value, value.replace("'", "") if value[:1] in "[{" else value))


def value_of(side: Side, metric: str, share: bool) -> str:
    value = side.metrics.get(metric)
    return ABSENT if value is None else words.number(float(value), share)


def widest(column: Sequence[str]) -> int:
    return max(map(width_of, column))
