"""Find the options of conf/: the shipped ones in conf/GROUP, and the user's own in conf/own/GROUP.

    conf/dataset/alpaca.yaml          dataset=alpaca
    conf/own/dataset/support.yaml     dataset=support; an update of capas never writes below conf/own

conf/own is the second entry of Hydra's search path, wherever conf/ is composed: in this process, in DVC's
(.dvc/plugins) and in copies of conf/. An own option can inherit from a shipped one, as shipped ones do:
`defaults: [_base, _self_]`.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from capas.core.dag import parse_yaml
from capas.core.errors import CapasError

OWN = "own"  # the folder in conf/
NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
# Words that YAML 1.1 and Hydra read as a boolean, a null or a number instead of a name.
_WORDS = ("null", "none", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf")
_SHADOWING = (".yaml", ".jinja")  # suffixes of files that are found by name alone
_GLOBAL = re.compile(r"^#\s*@package\s+_global_\s*$", re.MULTILINE)
_CLOSE = 0.8


def files(conf: Path, group: str) -> list[Path]:
    """Return the YAML files of a group, the shipped ones first."""
    return [
        file for folder in (conf, conf / OWN) for file in sorted((folder / group).glob("*.yaml"))
    ]


def options_of(conf: Path, group: str) -> list[str]:
    """Return the options of a group, shipped and own, sorted."""
    return sorted({file.stem for file in files(conf, group) if not file.stem.startswith("_")})


def find_template(conf: Path, name: str) -> Path:
    """Return the file of a chat template given by name: a shipped one, or one of the user's own."""
    shipped, own = (folder / f"chat_template/{name}.jinja" for folder in (conf, conf / OWN))
    return own if own.is_file() and not shipped.is_file() else shipped


def file_of(conf: Path, group: str, name: str) -> Path:
    """Return the YAML file of an option, relative to the parent of `conf`; the option must exist."""
    return next(f.relative_to(conf.parent) for f in files(conf, group) if f.stem == name)


def is_name(text: str) -> bool:
    """Return whether a command line and a defaults list accept `text`, unquoted, as the name of an option."""
    return NAME.fullmatch(text) is not None and text.lower() not in _WORDS


def check(conf: Path) -> None:
    """Check the files in conf/own, if there are any.

    Raises:
        CapasError: lists all problems: a file that has the name of a shipped one, is in no group, has a
            name that cannot be chosen, or does not name itself in `preset`.
    """
    if not (conf / OWN).is_dir():
        return
    shipped = {_key(file): file for file in _found(conf) if file.parts[0] != OWN}
    groups = {file.parent.as_posix() for file in shipped.values()} - {"."}
    problems: list[str] = []
    for file in _found(conf / OWN):
        problems += _problems(conf, file, groups, shipped.get(_key(file)))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CapasError(f"conf/own has {len(problems)} problem(s); no stage was run:\n{lines}")


def _found(folder: Path) -> list[Path]:
    """Return files that may be options or templates, relative to `folder`."""
    suffixes = (".yml", *_SHADOWING)
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix in suffixes)
    return sorted(file for file in found if not any(part.startswith(".") for part in file.parts))


def _key(file: Path) -> str:
    """Return a key that identifies a file on systems that ignore case, such as macOS."""
    return file.as_posix().casefold()


def _problems(conf: Path, file: Path, groups: set[str], shipped: Path | None) -> Iterator[str]:
    group, here = file.parent.as_posix(), f"conf/{OWN}/{file.as_posix()}"
    if shipped is not None:
        yield (
            f"{here}: conf/{shipped.as_posix()} has the same name, and capas ships it. Rename yours (and its "
            f"preset); to inherit from it: defaults: [{shipped.stem}, _self_]"
        )
        return
    if file.suffix == ".jinja":
        return
    if group == ".":
        yield (
            f"{here}: the file is not in a group; move it to conf/{OWN}/GROUP/{file.name}, with a "
            "GROUP of conf/"
        )
    elif group not in groups:
        close = difflib.get_close_matches(group, sorted(groups), n=1, cutoff=_CLOSE)
        if close:
            yield f"{here}: there is no group {group}; did you mean conf/{OWN}/{close[0]}/{file.name}?"
    elif file.suffix == ".yml":
        yield f"{here}: Hydra does not read .yml files; rename it to {file.stem}.yaml"
    elif not file.stem.startswith("_"):
        yield from _problems_of_option(conf / OWN / file, group, here)


def _problems_of_option(file: Path, group: str, here: str) -> Iterator[str]:
    from capas.config.schema import GROUPS

    if not is_name(file.stem):
        yield (
            f"{here}: {group}={file.stem} is not a valid name; a name must begin with a letter and "
            "may contain letters, digits, . _ and -"
        )
    if group not in GROUPS and group != "sweep":  # Hydra's own groups, such as hydra/launcher
        return
    try:
        text = file.read_text(encoding="utf-8")
        tree = parse_yaml(text, here)
    except UnicodeDecodeError as error:
        yield f"{here}: is not UTF-8: {error}"
        return
    except CapasError as error:
        yield str(error)
        return
    is_global = _GLOBAL.search(text) is not None
    if group == "experiment" and not is_global:
        yield f"{here}: must begin with the line: # @package _global_"
    node = tree.get(group) if is_global or group == "experiment" else tree
    found = node.get("preset") if isinstance(node, dict) else None
    if found != file.stem:
        wanted = f"preset: {file.stem}"
        wanted = f"{group}: {{{wanted}}}" if node is not tree else wanted
        problem = "says no preset" if found is None else f"says preset: {found}"
        yield (
            f"{here}: {problem}; it must say {wanted}, because params.yaml records the choice by its "
            "preset"
        )
