"""Make an own option of the group dataset for files: its name, its YAML in conf/own, its data in data/own.

support.csv -> data/own/support.csv, conf/own/dataset/support.yaml, chosen by dataset=support
"""

import filecmp
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from capas.config import options
from capas.core.dag import read_yaml
from capas.core.errors import CapasError
from capas.core.files import write_whole
from capas.dataset.files import OWN, File

FOLDER = Path("conf", options.OWN, "dataset")
SHIPPED = Path("conf/dataset")
TEMPLATES = {"csv": "own_csv"}  # any other format: own_jsonl
_READ = ("preset", "path", "data_files", "shape", "columns")  # keys that set how records are read
_NESTED = ("reading", "flaws")  # groups within the group
_IN_PATTERNS = {*"*?["}  # characters of a pattern in dataset.data_files


@dataclass(frozen=True)
class Option:
    """An own option; `places` maps each file to its place, data/own/..."""

    name: str
    path: str
    places: dict[Path, Path]
    root: Path

    @classmethod
    def of(cls, files: Sequence[Path], path: str, name: str | None, root: Path) -> "Option":
        """Return the option for files of one format; without a `name`, the first file's name is used.

        Raises:
            CapasError: `name` cannot be chosen or is a shipped option's, or two files have the same name.
        """
        chosen = _checked(name, root) if name else _name_from(files[0], root)
        places = {file: _place(file, name, len(files), chosen, root) for file in files}
        for file, place in places.items():
            other = next(f for f, p in places.items() if p == place)
            if other != file:
                raise CapasError(f"{other} and {file} would both be {place}: rename one of them")
        return cls(chosen, path, places, root)

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.yaml"

    @property
    def data_files(self) -> str | list[str]:
        names = [place.as_posix() for place in self.places.values()]
        return names if len(names) > 1 else names[0]

    @property
    def base(self) -> str:
        """The option whose settings these files inherit: an own one that names them, or a template."""
        written = self.root / self.file
        if written.is_file() and read_yaml(written).get("data_files") == self.data_files:
            return self.name
        template = TEMPLATES.get(self.path, "own_jsonl")
        return template if (self.root / SHIPPED / f"{template}.yaml").is_file() else "own_jsonl"

    def write(self, wanted: Mapping[str, Any], force: bool) -> list[str]:
        """Write the YAML and copy the files; return a line for each action.

        Comments and all other keys of the YAML are kept. If anything is refused, nothing is written.

        Raises:
            CapasError: without `force`, if the YAML has other values or a file's place has other content.
        """
        copies = {f: p for f, p in self.places.items() if not _same(f, self.root / p)}
        replaced = [place for place in copies.values() if (self.root / place).exists()]
        text, changes = self.text(wanted)
        if (replaced or changes) and not force:
            found = [*(f"{place} has other content" for place in replaced), *changes]
            raise CapasError(
                f"an option named {self.name} exists already, nothing was written: "
                f"{'; '.join(found)}\nTo write another option: --name NAME. To replace this one: "
                "--force"
            )
        lines = []
        for file, place in copies.items():
            target = self.root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            shutil.copyfile(file, partial)
            partial.replace(target)
            lines.append(f"{file} was copied to {place}")
        written = self.root / self.file
        if written.is_file() and written.read_text(encoding="utf-8") == text:
            return [*lines, f"{self.file} is up to date"]
        written.parent.mkdir(parents=True, exist_ok=True)
        write_whole(written, text)
        return [*lines, f"{self.file} was written"]

    def text(self, wanted: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the text of the YAML, and the changes to an existing one."""
        from ruamel.yaml import YAML

        written = self.root / self.file
        template = written if written.is_file() else self.root / SHIPPED / f"{self.base}.yaml"
        yaml = YAML()
        yaml.width = 1000
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.representer.add_representer(
            type(None),
            lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null"),
        )
        values = yaml.load(template.read_text(encoding="utf-8"))
        if template != written:
            values.yaml_set_start_comment(
                f"Records of {', '.join(map(str, self.places.values()))}; written by `capas check --write`."
            )
        changes = []
        for key in {**dict.fromkeys(_READ), **wanted}:
            if key in values and key not in wanted:
                changes.append(f"{self.file} says {key}: {values.pop(key)}")
            elif key in wanted and (
                merged := _merged(key, values.get(key), wanted[key])
            ) != values.get(key):
                before = f"{key}: {values[key]}" if key in values else f"no {key}"
                changes.append(f"{self.file} says {before}, now {merged}")
                values[key] = merged
        stream = StringIO()
        yaml.dump(values, stream)
        return stream.getvalue(), changes if template == written else []


def proposed(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the YAML that set how these records are read."""
    return {key: dataset[key] for key in _READ if dataset[key] is not None}


def changed(dataset: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `dataset` whose values differ in `base`; nested groups keep only such keys."""
    found = {key: value for key, value in dataset.items() if value != base.get(key)}
    return {
        key: changed(value, base[key]) if key in _NESTED else value for key, value in found.items()
    }


def _merged(key: str, old: Any, new: Any) -> Any:
    """Return the value of a key; in nested groups, keys that are not given stay unchanged."""
    return {**(old or {}), **new} if key in _NESTED else new


def _checked(name: str, root: Path) -> str:
    if not options.is_name(name):
        raise CapasError(
            f"--name {name}: a name must begin with a letter and may contain letters, digits, . "
            "_ and -"
            + (f"; --name {plain} would do" if options.is_name(plain := _plain(name)) else "")
        )
    if name.casefold() in _shipped(root):
        raise CapasError(f"--name {name}: capas ships {SHIPPED / name}.yaml; take another name")
    return name


def _name_from(file: Path, root: Path) -> str:
    """Return a name derived from the file's name: `Preguntas 2024.csv.gz` -> preguntas_2024."""
    name = _plain(file.name.removesuffix(_suffix(file)))
    if not name:
        raise CapasError(
            f"{file}: the file name has no letter to name the option after; add --name NAME"
        )
    if not options.is_name(name):  # a number, or `true`
        name = f"data_{name}"
    return f"own_{name}" if name in _shipped(root) else name


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(c for c in decomposed if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9.-]+", "_", letters).strip("._-")


def _shipped(root: Path) -> set[str]:
    return {file.stem.casefold() for file in (root / SHIPPED).glob("*.yaml")}


def _suffix(file: Path) -> str:
    """Return the suffix for format and compression: `.csv`, `.jsonl.gz`."""
    found = File(file.name, file.parent)
    packed = file.suffix if found.compression else ""
    return Path(file.name.removesuffix(packed)).suffix + packed


def _place(file: Path, name: str | None, num_files: int, chosen: str, root: Path) -> Path:
    """Return the file's present or future place in data/own; a `name` from the user also names the copy."""
    own = (root / OWN).resolve()
    for absolute in (file.parent.resolve() / file.name, file.resolve()):
        if absolute.is_relative_to(own):
            return Path(OWN, absolute.relative_to(own))
    if num_files > 1:
        return Path(OWN, chosen, file.name) if name else Path(OWN, file.name)
    if name or _IN_PATTERNS & {*file.name}:
        return Path(OWN, chosen + _suffix(file))
    return Path(OWN, file.name)


def _same(file: Path, target: Path) -> bool:
    return target.exists() and (target.samefile(file) or filecmp.cmp(target, file, shallow=False))
