"""Check a dataset before any stage runs: its records, flaws, splits and metrics.

    capas check                           the dataset chosen in conf/
    capas check support.csv               any file; prints the YAML to use it
    capas check support.csv --write       write conf/own/dataset/support.yaml, copy the file to data/own
    capas check support.csv 'dataset.columns={user: pregunta, assistant: respuesta}'
    capas check --json                    the findings as JSON
    capas check --cost                    also download, disk, memory and minutes of each stage
    capas check --cost experiment=NAME    for another configuration, given as Hydra overrides

The check takes seconds and needs neither a model nor a network. Flaws of all kinds are reported at once, with
file and line. `--cost` also needs the model's config.json, and trains for about 20 seconds to measure.

Exit code: 0 ready; 1 records or splits have flaws; 2 a file cannot be read.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.config import cost
from capas.config.composition import CONF, Values, composer, word_given
from capas.config.dataset_option import Option, changed, proposed
from capas.config.hydra_overrides import key_of
from capas.config.preflight import composed_here
from capas.config.validation import validate
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.dataset.flaws import DROP
from capas.dataset.inspect import Found, Inspection
from capas.dataset.preview import Preview, preview
from capas.dataset.proposal import columns_of, format_of, propose_columns
from capas.dataset.references import read_references
from capas.dataset.source import FORMATS, sources_of
from capas.evaluation.choice import choose_metrics
from capas.evaluation.names import compares_labels
from capas.evaluation.power import power_in_words

_COLUMNS = "dataset.columns"
_OF_THE_FILE = ("preset", "path", "data_files", "split", "mix")
NUM_PLACES = 5  # examples shown of each kind of flaw


@dataclasses.dataclass(frozen=True)
class Check:
    """The findings of a check.

    Attributes:
        problems: what stops `fetch`.
        dataset: the group `dataset` of conf/ for these records.
    """

    preview: Preview
    metrics: list[str] | None
    why_metrics: str
    problems: list[str]
    dataset: Values

    @property
    def ready(self) -> bool:
        return not self.problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE",
        help="check this file instead of the dataset in conf/; KEY=VALUE is an override",
    )
    parser.add_argument("--json", action="store_true", help="write the findings as JSON")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="also estimate download, disk, memory and the minutes of each stage",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the YAML to conf/own/dataset, and copy FILE to data/own",
    )
    parser.add_argument("--name", help="name of the new option (default: from FILE's name)")
    parser.add_argument(
        "--force", action="store_true", help="with --write: replace an option of this name"
    )


def command(options: argparse.Namespace) -> int:
    overrides = [word for word in options.words if "=" in word and not Path(word).exists()]
    files = [Path(word) for word in options.words if word not in overrides]
    if options.write and not files:
        raise CapasError("--write needs a FILE: capas check FILE --write")
    if options.cost and files:
        raise CapasError(
            "--cost needs the dataset chosen in conf/, not a FILE: run capas check FILE "
            "--write first and choose it"
        )
    if (options.name or options.force) and not files:
        raise CapasError("--name and --force need --write: capas check FILE --write --name NAME")
    root, values = composed_here([] if files else overrides)
    with _quiet(), _seen(files, overrides, values, options.name, root) as seen:
        check = examine(seen.dataset, seen.root)
    if options.json:
        sys.stdout.write(json.dumps(as_json(check), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(_as_given("\n".join(in_words(check)), seen.option) + "\n")
    if options.cost:
        for line in cost.lines(Params(values), root, check.preview.splits):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    if seen.option is not None:
        _tell_option(seen.option, {**proposed(check.dataset), **seen.stated}, options)
    return 0 if check.ready else 1


def _tell_option(option: Option, wanted: Values, options: argparse.Namespace) -> None:
    """Write the option, or show what would be written."""
    choice = (
        f"choose it in conf/config.yaml: - dataset: {option.name}   "
        f"(once: dvc exp run -S dataset={option.name})\n"
    )
    if options.write:
        out = sys.stderr if options.json else sys.stdout  # standard output stays valid JSON
        out.write("\n".join(["", *option.write(wanted, options.force), choice]))
    elif not options.json:
        sys.stdout.write(
            f"\n# --write copies the records to data/own, and writes {option.file}:\n"
            f"{option.text(wanted)[0]}# then {choice}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence log lines of fetch, which the findings already contain."""
    log = logging.getLogger("capas")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclasses.dataclass(frozen=True)
class Seen:
    """The group dataset that is checked, and the folder with its files.

    If FILEs are given, the folder holds links to them, `option` is what --write writes and `stated` holds the
    values set by overrides.
    """

    dataset: Values
    root: Path
    option: Option | None = None
    stated: Values = dataclasses.field(default_factory=dict)


@contextmanager
def _seen(
    files: list[Path], overrides: list[str], values: Values, name: str | None, root: Path
) -> Iterator[Seen]:
    if not files:
        yield Seen(values["dataset"], root)
        return
    for file in files:
        if not file.is_file():
            raise CapasError(f"{file}: no such file")
    formats = {format_of(file) for file in files}
    if len(formats) > 1:
        raise CapasError(
            f"the files have different formats ({', '.join(sorted(formats))}): check each alone"
        )
    _check_of_dataset(overrides)
    path = formats.pop()
    option = Option.of(files, path, name, root)
    try:
        with _linked(option, overrides, values) as seen:
            yield seen
    except CapasError as error:
        raise CapasError(_as_given(str(error), option)) from None


def _as_given(text: str, option: Option | None) -> str:
    """Name the files as the user did: they are read through links in a temporary folder."""
    items = option.places.items() if option else ()
    for file, place in sorted(items, key=lambda item: -len(str(item[1]))):
        text = text.replace(str(place), str(file))
    return text


@contextmanager
def _linked(option: Option, overrides: list[str], values: Values) -> Iterator[Seen]:
    root, path = option.root, option.path
    with composer(root / CONF) as compose, TemporaryDirectory(prefix="capas-check-") as folder:
        base = compose([f"dataset={option.base}"])["dataset"]
        # Without the null, OmegaConf would merge the given columns with those of the template.
        anew = [
            f"{_COLUMNS}=null" for word in overrides if word.lstrip("+").startswith(f"{_COLUMNS}=")
        ]
        dataset = compose([f"dataset={option.base}", *anew, *overrides])["dataset"]
        stated, place = changed(dataset, base), Path(folder)
        for file, target in option.places.items():
            (place / target).parent.mkdir(parents=True, exist_ok=True)
            (place / target).symlink_to(file.resolve())
        dataset |= {"preset": option.name, "path": path, "split": None, "mix": []}
        dataset["data_files"] = option.data_files
        if path == "text":
            dataset |= {"shape": "auto", "columns": None}
        elif "columns" in stated:
            dataset["shape"] = "columns" if dataset["columns"] else dataset["shape"]
        elif "shape" not in stated:
            [source] = sources_of(Params(dataset), place)
            there = columns_of(source, place)
            dataset |= propose_columns(there, dataset["columns"]) if there else {}
        if stated:
            validate({**values, "dataset": dataset}, word_given(overrides, root / CONF))
        yield Seen(dataset, place, option, stated)


def _check_of_dataset(overrides: list[str]) -> None:
    """Check that all overrides set how FILE is read; others would have no effect.

    Raises:
        CapasError: one sets something else.
    """
    for override in overrides:
        key = key_of(override)
        if not key.startswith("dataset.") or key.split(".")[1] in _OF_THE_FILE:
            raise CapasError(
                f"{override}: with FILE, only keys that say how it is read can be set: "
                f"dataset.columns=..., dataset.reading.separator=... ({', '.join(_OF_THE_FILE)} "
                "follow from FILE)"
            )


def examine(dataset: Values, root: Path) -> Check:
    """Check all records as fetch does, and the splits that it would make.

    Args:
        dataset: the group `dataset` of the configuration.
        root: the folder that contains data/own.

    Raises:
        CapasError: a file cannot be read, or lacks a required column.
    """
    params = Params(dataset)
    found = preview(params, root)
    problems = list(_flaw_problems(found.inspection, params))
    if found.problem is not None:
        problems.append(found.problem)
    choice = None
    if all(source.path in FORMATS for source in sources_of(params, root)):
        choice = choose_metrics(read_references(params, root))
    return Check(
        preview=found,
        metrics=choice.metrics if choice else None,
        why_metrics=choice.why if choice else "",
        problems=problems,
        dataset=dataset,
    )


def _flaw_problems(found: Inspection, dataset: Params) -> Iterator[str]:
    refused = {kind: flaws.count for kind, flaws in found.flaws.items() if flaws.policy != DROP}
    if refused:
        counts = ", ".join(f"{kind} {count}" for kind, count in refused.items())
        yield f"fetch stops at {sum(refused.values())} of {found.num_read} records: {counts}"
    dropped = sum(flaws.count for flaws in found.flaws.values()) - sum(refused.values())
    if dropped > dataset.flaw_budget_fraction * found.num_read:
        yield (
            f"{dropped} of {found.num_read} records would be dropped, more than "
            f"dataset.flaw_budget_fraction={dataset.flaw_budget_fraction:g} allows"
        )


def in_words(check: Check) -> Iterator[str]:
    """Yield the findings, a line each, in the order in which a reader asks for them."""
    found, splits = check.preview.inspection, check.preview.splits
    for source in found.sources:
        for file in source.files:
            how = [file[key] for key in ("encoding", "separator") if file.get(key)]
            shown = f" ({', '.join(map(repr, how))})" if how else ""
            yield f"{'file':12}{file['file']}{shown}"
        yield f"{'read as':12}{source.why}"
        yield f"{'columns':12}{', '.join(f'{name} {n}' for name, n in source.columns.items())}"
        if source.path == "text":
            yield from _of_texts(source, check.dataset["reading"])
    if isinstance(columns := check.dataset.get("columns"), Mapping):
        yield f"{'':12}{', '.join(f'{role} = {_joined(names)}' for role, names in columns.items())}"
    yield f"{'records':12}{found.num_valid} of {found.num_read} can be used"
    if found.lengths:
        lengths = found.lengths
        yield (
            f"{'characters':12}{lengths.shortest} to {lengths.largest}, median {lengths.median:g}; longest: "
            f"{lengths.longest}"
        )
    for key, count in found.left_out.items():
        yield f"{'not used':12}{key} ({count})"
    for kind, count in found.repaired.items():
        yield f"{'repaired':12}{kind} {count}"
    for kind, flaws in found.flaws.items():
        yield f"{'flaw':12}{kind} {flaws.count}"
        for e in flaws.examples[:NUM_PLACES]:
            value = f"{e['field']} is {e['value']}" if e["field"] else e["value"]
            yield f"{'':12}  {e['file']}, {e['at']}: {value}: {e['why']}"
        if flaws.count > NUM_PLACES:
            yield f"{'':12}  and {flaws.count - NUM_PLACES} more"
    if found.duplicates:
        copy = found.copies[0]
        yield f"{'copies':12}{found.duplicates}; the first: {copy.place} is {copy.first}"
    for reason, count in check.preview.dropped.items():
        yield f"{'dropped':12}{reason} {count}"
    near = check.preview.near_duplicates
    if near and near["num_records"]:
        groups = f"{near['num_groups']} group{'' if near['num_groups'] == 1 else 's'}"
        yield (
            f"{'alike':12}{near['num_records']} records are near-duplicates, in {groups}; "
            f"{near['num_test_records_like_train']} test records have one in train"
        )
        for e in near["examples"][:1]:
            yield f"{'':12}  {e['file']}, {e['at']}: {e['value']}: {e['why']}"
    if any(splits.values()):
        yield f"{'splits':12}{', '.join(f'{split} {count}' for split, count in splits.items())}"
        yield f"{'':12}{power_in_words(splits['test'])}"
    if check.metrics is not None:
        yield f"{'metrics':12}{', '.join(check.metrics) or 'the loss alone'} ({check.why_metrics})"
        if compares_labels(check.metrics):
            yield (
                f"{'':12}a classification: use evaluation=labels, which compares the likelihoods of the "
                "labels (evaluation=auto chooses it)"
            )
    for problem in check.problems:
        yield f"{'problem':12}{problem}"
    yield "ready" if check.ready else "not ready"


def _of_texts(source: Found, reading: Values) -> Iterator[str]:
    """Yield how text files become records, and how long texts are cut: by characters, not by tokens."""
    record = "each file" if reading["documents"] == "file" else "each block between blank lines"
    yield f"{'texts':12}record = {record} (dataset.reading.documents={reading['documents']})"
    most = reading["max_characters"]
    if most is None:
        yield (
            f"{'':12}texts are not split (dataset.reading.max_characters=null); `format` checks "
            "dataset.max_length in tokens"
        )
        return
    yield (
        f"{'':12}{source.num_cut} texts longer than dataset.reading.max_characters={most} are split "
        f"into {source.num_pieces} records at paragraphs (characters, not tokens)"
    )
    yield f"{'':12}a longer paragraph is not split; `format` checks dataset.max_length in tokens"


def _joined(names: str | list[str]) -> str:
    return names if isinstance(names, str) else " + ".join(names)


def as_json(check: Check) -> dict[str, Any]:
    found = _plain(check)
    shown = found.pop("preview")
    del shown["problem"]  # `problems` contains it
    for source, facts in zip(
        check.preview.inspection.sources, shown["inspection"]["sources"], strict=True
    ):
        facts["why"] = source.why
    return {"ready": check.ready, **shown, **found, "dataset": proposed(check.dataset)}


def _plain(value: Any) -> Any:
    """Return dataclasses and mappings as dicts (dataclasses.asdict breaks a Counter)."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
