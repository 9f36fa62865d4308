"""Keep conf/revisions.yaml: the commits of branches, tags, folders and URLs when they were first used.

`revision: main` in conf/ is a name that moves. The first compose asks the Hub for its commit and records it
here. From then on params.yaml has that commit, on every machine and without a network, until
`python stages/compose_params.py --update-revisions`. One entry of the file:

    models:
      "org/name@main": "0123456789abcdef0123456789abcdef01234567"
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from capas.config.composition import CONF, Values
from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.dataset.files import is_url, url_revision
from capas.hub.repository import Repository, is_commit
from capas.hub.sources import (
    ADAPTER,
    MODEL,
    Kind,
    Source,
    adapter_revision,
    find_source,
    folder_revision,
    on_hub,
)

log = logging.getLogger("capas")
REVISIONS = CONF / "revisions.yaml"
KEYS = frozenset(  # keys that a pin changes
    {"model.revision", "lora.adapter_revision", "dataset.revision", "dataset.mix"}
)
# an adapter on the Hub is pinned under "models", because it is a model there
SECTIONS = ("models", "adapters", "datasets")
MAIN = "main"
_FILE = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|parquet|txt|arrow)(\.(gz|zst|bz2|xz))?")
_PINNED = re.compile(r"[0-9a-f]{40}|[0-9a-f]{16}(-[0-9a-f]{16})?")
_HEADER = """\
# What a branch or tag on the Hub, a folder or a URL stood for when first used. Compose writes it; commit it.
# To take what it stands for today: python stages/compose_params.py --update-revisions
"""


def is_hub_dataset(path: str, root: Path) -> bool:
    """Return whether `dataset.path` is owner/name on the Hub, and not a file or folder below `root`."""
    owner_and_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None
    return owner_and_name and not _FILE.fullmatch(path) and not (root / path).exists()


@dataclass(frozen=True)
class Place:
    """A mapping of the configuration whose `revision` may move."""

    node: dict[str, Any]
    key: str  # dotted key of the revision
    section: str  # section of conf/revisions.yaml
    entry: str  # key in that section
    ask: Callable[[], str]  # returns the present commit or digest

    @property
    def leaf(self) -> str:
        return self.key.rpartition(".")[2]


def _of_hub(node: dict[str, Any], key: str, repository: Repository) -> Iterator[Place]:
    """Yield the place of a revision on the Hub, unless conf/ gives the commit itself."""
    revision = node.get(key.rpartition(".")[2])  # a source of a mixture may leave it out
    if is_commit(revision):
        return

    def ask() -> str:
        try:
            return repository.commit(revision or MAIN)
        except CapasError as error:
            raise CapasError(
                f"{error}\n{key}={revision or 'null'} is not pinned yet. Set the revision to a "
                f"commit (40 hex digits, on {repository.page}, 'Files and versions'), or run `dvc "
                "repro compose` on a machine with a network and copy its conf/revisions.yaml."
            ) from None

    entry = f"{repository.name}@{revision or MAIN}"
    yield Place(node, key, f"{repository.kind}s", entry, ask)


class Pins:
    """The entries of conf/revisions.yaml; the caller writes the file, with the text from `dump`."""

    def __init__(self, entries: dict[str, dict[str, str]], root: Path) -> None:
        self.entries, self.root = entries, root
        self._before = copy.deepcopy(entries)

    @classmethod
    def read(cls, file: Path = REVISIONS, root: Path | None = None) -> "Pins":
        """Read the entries from a file.

        Raises:
            CapasError: the file does not have the form that this module writes.
        """
        entries = read_yaml(file) if file.exists() else {}
        for section, pins in entries.items():
            if section not in SECTIONS or not isinstance(pins, dict):
                raise CapasError(
                    f"{file}: {section}: expected {', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}, with their "
                    "entries"
                )
            for entry, pin in pins.items():
                if not isinstance(pin, str) or not _PINNED.fullmatch(pin):
                    raise CapasError(
                        f"{file}: {section}: {entry}: {pin!r} is neither a commit (40 hex digits) "
                        "nor the revision of a folder or of files. Remove the line; compose pins "
                        "it again"
                    )
        return cls(entries, root or Path.cwd())

    def known(self, values: Values) -> Values:
        """Return the values with every recorded pin; asks no server, and accepts invalid values."""
        return self._pinned(values, ask=False)

    def resolve(self, values: Values) -> Values:
        """Return the values with every revision pinned, as recorded, or else as it is now.

        A missing pin is requested from the Hub, or computed from the folder or the URL.

        Raises:
            CapasError: a model's name is not a source, or the Hub cannot answer.
        """
        return self._pinned(values, ask=True)

    def update(self, values: Values) -> None:
        """Ask again for every revision that these values use.

        Raises:
            CapasError: see `resolve`.
        """
        for place in self._places(copy.deepcopy(values), strict=True):
            old, new = self._recorded(place), place.ask()
            log.info(
                "%s: %s", place.entry, f"{old} -> {new}" if old != new else f"{old}, unchanged"
            )
            self._record(place, new)

    @property
    def changed(self) -> bool:
        return self.entries != self._before

    def dump(self) -> str:
        """Return the text of conf/revisions.yaml."""
        if not self.entries:
            return _HEADER
        # quoted: a commit of 39 digits and one `e` would be read as a number
        return _HEADER + yaml.safe_dump(self.entries, default_style='"', width=1000)

    def _pinned(self, values: Values, ask: bool) -> Values:
        values = copy.deepcopy(values)
        for place in self._places(values, strict=ask):
            pin = self._recorded(place)
            if pin is None and ask:
                pin = place.ask()
                log.info("pinned %s to %s in conf/revisions.yaml", place.entry, pin)
                self._record(place, pin)
            if pin is not None:
                place.node[place.leaf] = pin
        return values

    def _recorded(self, place: Place) -> str | None:
        return self.entries.get(place.section, {}).get(place.entry)

    def _record(self, place: Place, pin: str) -> None:
        self.entries.setdefault(place.section, {})[place.entry] = pin

    def _places(self, values: Values, strict: bool) -> Iterator[Place]:
        """Yield the places of revisions that may move; if `strict`, a name that is not a source raises."""
        yield from self._model(values, strict, MODEL)
        yield from self._model(values, strict, ADAPTER)
        yield from self._datasets(values)

    def _model(self, values: Values, strict: bool, kind: Kind) -> Iterator[Place]:
        """Yield the place of the base, or of the adapter that a training starts from."""
        group, _, key = kind.key.partition(".")
        revision = kind.revision.rpartition(".")[2]
        node = _named(values.get(group), key, revision)
        if node is None:
            return
        name = node[key]
        try:
            source = find_source(name, self.root, kind)
        except CapasError:
            if strict:
                raise
            return
        if source is Source.HUB:
            yield from _of_hub(node, kind.revision, on_hub(name, kind))
        # a folder has no branches; the stages check any other revision against its content
        elif source is Source.FOLDER and node.get(revision) in (None, MAIN):
            stands_for = folder_revision if kind is MODEL else adapter_revision
            ask = partial(stands_for, self.root / name)
            yield Place(node, kind.revision, f"{kind.called}s", name, ask)

    def _datasets(self, values: Values) -> Iterator[Place]:
        dataset = values.get("dataset")
        mix = dataset.get("mix") if isinstance(dataset, dict) else None
        entries = mix if isinstance(mix, list) else []
        nodes = {"dataset": dataset, **{f"dataset.mix[{i}]": n for i, n in enumerate(entries)}}
        for key, found in nodes.items():
            node = _named(found, "path")
            if node is None:
                continue
            yield from _of_urls(node, f"{key}.revision")
            if is_hub_dataset(node["path"], self.root):
                repository = Repository("dataset", node["path"], f"{key}.path")
                yield from _of_hub(node, f"{key}.revision", repository)


def _of_urls(node: dict[str, Any], key: str) -> Iterator[Place]:
    """Yield the place of files behind URLs; a revision given in conf/ is checked by fetch instead."""
    files: Any = node.get("data_files")
    urls = [text for text in _texts(files) if is_url(text)]
    if urls and node.get("revision") is None:
        yield Place(node, key, "datasets", " ".join(urls), lambda: url_revision(files))


def _texts(value: Any) -> list[str]:
    """Return all texts in lists and mappings; the schema reports other values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _named(node: Any, key: str, revision: str = "revision") -> dict[str, Any] | None:
    """Return the node if its name and revision have the right types; the schema reports wrong ones."""
    if not isinstance(node, dict) or not isinstance(node.get(key), str):
        return None
    return node if isinstance(node.get(revision), str | None) else None
