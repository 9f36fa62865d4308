"""Compare results: how they differ in parameters, scores and answers.

    capas compare               the workspace with the last commit, and the newest experiments on it
    capas compare A             A with the workspace
    capas compare A B           how B differs from A
    capas compare A B C ...     one row each, compared with the first
    capas compare A B --why     the records that B won and lost, and the nearest training records that differ

A name is `workspace`, a commit, branch or tag, a DVC experiment, or an MLflow run: its id, the beginning
of its id, or its name (`run:NAME` if a commit has the same name). Intervals of a difference are paired,
over the test records that both answered. Nothing is run and nothing is changed.

Exit code: 0 compared, 2 a name is unknown or has no result.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capas.compare import layout, listing, view, words
from capas.compare.changes import Changes, find_changes
from capas.compare.inputs import differing_inputs
from capas.compare.repository import Repository, open_repository
from capas.compare.scores import Compared, Settings, compare, headline, is_share, score
from capas.compare.sides import HEAD, Row, Side
from capas.compare.view import Pair
from capas.compare.why import Near, Training, differing_training, questions_of
from capas.config.composition import CONF
from capas.core.errors import CapasError
from capas.use.tuned_model import bounded

NUM_ROWS, NUM_RECORDS = 10, 3
# ">" (won) or "<" (lost), the rows of A and B, the nearest training records
Shown = tuple[str, tuple[Row, Row], Sequence[Near]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="A", help="workspace, commit, experiment or MLflow run"
    )
    parser.add_argument(
        "--why", action="store_true", help="show records won and lost, and training records near"
    )
    counts = bounded(int, 1, sys.maxsize)
    parser.add_argument(
        "--records",
        type=counts,
        default=NUM_RECORDS,
        metavar="N",
        help=f"of each kind with --why (default: {NUM_RECORDS})",
    )
    parser.add_argument(
        "--rows",
        type=counts,
        default=NUM_ROWS,
        metavar="N",
        help=f"newest experiments to list without names (default: {NUM_ROWS})",
    )
    parser.add_argument("--json", action="store_true", help="write the comparison as JSON")


def command(options: argparse.Namespace) -> int:
    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise CapasError(f"{root} has no dvc.yaml; start it in the repository's top folder")
    with open_repository(root) as repository:
        parts = _named(repository, options) if options.names else _here(repository, options)
        if options.json:
            facts: dict[str, Any] = {}
            for part in parts:
                assert isinstance(part, dict)
                facts |= part
            sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        else:
            sys.stdout.write("\n".join(map(str, parts)).rstrip() + "\n")
    return 0


def _named(repository: Repository, options: argparse.Namespace) -> Iterator[Any]:
    words_given = options.names
    sides = [repository.find(word) for word in words_given]
    if len(sides) == 1:
        sides.append(_with_result(repository.workspace()))
    if len(sides) == 2:
        yield from _pair(sides[0], sides[1], repository, options)
    elif options.why:
        raise CapasError("--why compares two results: capas compare A B --why")
    else:
        yield from _table(sides, repository, options)
    if page := repository.page(sides):
        address, hint = page
        yield {"mlflow": address} if options.json else f"\nIn MLflow: {address}{hint}"


def _with_result(workspace: Side) -> Side:
    if not workspace.has_result:
        raise CapasError(
            "the workspace has no result to compare with: run `dvc repro`, or name two results"
        )
    return workspace


def _here(repository: Repository, options: argparse.Namespace) -> Iterator[Any]:
    """Yield the workspace compared with HEAD, then one row for each newer result on HEAD."""
    workspace = repository.workspace()
    head = repository.commit(HEAD, repository.head) if repository.head else None
    recent = [e for e in repository.experiments if e.baseline == repository.head]
    read = [repository.commit(e.name, e.commit, "experiment") for e in recent[: options.rows]]
    experiments = [
        dataclasses.replace(e, same_as="the workspace") if _is_same(e, workspace) else e
        for e in read
        if e.has_result
    ]
    same = next((e for e in experiments if e.same_as), None)
    if same:
        workspace = dataclasses.replace(workspace, same_as=f"experiment {same.name}")
    if head is None or not head.has_result:
        rows = [side for side in (workspace,) if side.has_result and not same] + experiments
    else:
        is_head = _is_same(head, workspace) or not workspace.has_result
        rows = [head, *([] if same or is_head else [workspace]), *experiments]
    rows += repository.unlisted_runs(rows)
    if not rows:
        raise CapasError(
            "there is no result yet: run `dvc repro`. Its result is the baseline for later ones"
        )
    if rows[0] is not head or not workspace.has_result or _is_same(head, workspace):
        yield from _alone(rows[0], workspace, options)
        num_shown = 1
    else:
        yield from _pair(head, workspace, repository, options)
        num_shown = 2
    shown = rows[: options.rows + 1]
    hidden = len(rows) - len(shown) + len(recent) - len(read)
    if len(rows) > num_shown or hidden:
        yield from _table(shown, repository, options, hidden)


def _is_same(one: Side, other: Side) -> bool:
    """Return whether two names stand for one result: the same training and the same evaluation."""
    if not (one.has_result and other.has_result):
        return False
    return all(
        one.outputs.md5.get(out) == other.outputs.md5.get(out)
        for out in ("data/models/adapter", "reports/predictions.parquet", "reports/evaluation.json")
    )


def _alone(first: Side, workspace: Side, options: argparse.Namespace) -> Iterator[Any]:
    """Yield the baseline result alone, if the workspace has no result of its own to compare with it."""
    if options.json:
        yield {"baseline": _side_facts(first)}
        return
    change = "Change a value (`dvc exp run -S lora.r=8`), and `capas compare` says what it changed."
    if first.name != HEAD:
        text = (
            "This result is the first, the baseline: no commit here has one yet. Keep it: `git add -A && git "
            f"commit`. {change}"
        )
    elif workspace.has_result:
        text = f"The workspace has the result of the last commit, the baseline. {change}"
    else:
        text = "The workspace has no result of its own yet: run `dvc repro`."
    width = layout.terminal_width()
    yield from view.baseline_lines(first, width)
    yield ""
    yield from layout.wrapped(text, width)
    if workspace.pending:
        yield from layout.wrapped(f"Note: {workspace.pending}", width)


def _pair(a: Side, b: Side, repository: Repository, options: argparse.Namespace) -> Iterator[Any]:
    compared = compare(a, b)
    changes = find_changes([a.texts, b.texts], repository.root / CONF)
    training = differing_training(a, b) if options.why else None
    won, lost = compared.changed()
    questions = questions_of([*won, *lost] if won or lost else compared.pairs, b, a)
    pair = Pair(a, b, changes, differing_inputs(a, b, repository.root), compared, questions)
    records = _records(pair, training, options.records) if training else []
    if options.json:
        yield _pair_facts(pair, training, records)
        return
    width = layout.terminal_width()
    yield from view.pair_lines(pair, width)
    if training:
        yield from view.why_lines(pair, training, records, (len(won), len(lost)), width)
    else:
        yield from view.answers_lines(pair, width)


def _records(pair: Pair, training: Training, count: int) -> list[Shown]:
    """Return up to `count` records won and as many lost, nearest to a differing training record first."""
    found: list[Shown] = []
    for mark, changed in zip("><", pair.compared.changed(), strict=True):
        near = training.nearest([pair.questions[after["id"]] for _, after in changed])
        entries = [(mark, rows, one) for rows, one in zip(changed, near, strict=True)]
        entries.sort(key=lambda entry: -max((n.similarity for n in entry[2]), default=0.0))
        found += entries[:count]
    return found


def _table(
    sides: Sequence[Side], repository: Repository, options: argparse.Namespace, hidden: int = 0
) -> Iterator[Any]:
    partial = any(not side.lock for side in sides)
    texts = [side.texts for side in sides]
    changes = find_changes(texts, repository.root / CONF, partial)
    found = [None, *(compare(sides[0], side) for side in sides[1:])]
    if options.json:
        yield {
            "rows": [
                _side_facts(side, changes) | ({} if one is None else _compared_facts(one))
                for side, one in zip(sides, found, strict=True)
            ]
        }
        return
    width = layout.terminal_width()
    if not options.names:
        yield ""
    yield from listing.table_lines(sides, changes, found, width)
    if hidden > 0:
        yield f"{hidden} older ones are not listed (--rows {len(sides) + hidden})."


def _side_facts(side: Side, changes: Changes | None = None) -> dict[str, Any]:
    name = headline(side)
    found = score(side, name, Settings.of(side.texts))
    shown = {} if changes is None else {key: side.texts.get(key) for key in changes.shown}
    return {
        "name": side.name,
        "kind": side.kind,
        "origin": side.origin,
        "commit": side.commit,
        "same_as": side.same_as or None,
        "adapter_sha256": side.sha256,
        "headline": name,
        "is_share": is_share(side, name),
        "score": found and found._asdict(),
        "metrics": side.metrics,
        "base_model": side.baseline,
        "seconds": side.seconds,
        "cpu": side.cpu,
        "params": shown,
    }


def _compared_facts(found: Compared) -> dict[str, Any]:
    return {
        "test_records": found.test,
        "difference": found.difference and found.difference._asdict(),
        "loss_difference": found.loss and found.loss._asdict(),
    }


def _pair_facts(pair: Pair, training: Training | None, records: Sequence[Shown]) -> dict[str, Any]:
    a, b, compared = pair.a, pair.b, pair.compared
    won, lost = compared.changed()
    facts: dict[str, Any] = {
        "a": _side_facts(a),
        "b": _side_facts(b),
        "verdict": words.verdict(a, b, compared, pair.inputs, pair.changes),
        "notes": words.notes(a, b, compared, pair.inputs),
        "metric": compared.metric,
        **_compared_facts(compared),
        "confidence_fraction": compared.confidence,
        "choices": list(pair.changes.choices),
        "params": {key: [side.texts.get(key) for side in (a, b)] for key in pair.changes.shown},
        "explained": list(pair.changes.explained),
        "code": list(pair.inputs.code),
        "files": list(pair.inputs.files),
        "packages": pair.inputs.packages,
        "same_data": pair.inputs.same_data,
        "same_adapter": pair.inputs.same_adapter,
        "won": [after["id"] for _, after in won],
        "lost": [after["id"] for _, after in lost],
    }
    if training:
        facts["training"] = {
            "num_only_a": len(training.only_a),
            "num_only_b": len(training.only_b),
            "missing": list(training.missing),
        }
        facts["records"] = [
            {
                "id": after["id"],
                "won": mark == ">",
                "asked": pair.questions[after["id"]],
                "reference": after["reference"],
                "answers": [before["completion"], after["completion"]],
                "nearest": [one._asdict() for one in near],
            }
            for mark, (before, after), near in records
        ]
    return facts
