"""Compose conf/ with Hydra, and write params.yaml.

params.yaml is always exactly what conf/ composes to. Its first line holds a digest of its values, so
that an edit by hand, or by `dvc exp run -S`, is recognised and not lost.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capas.config import foreign_names, options
from capas.core.dag import parse_yaml, read_yaml
from capas.core.errors import CapasError

CONF, PARAMS, OVERRIDES = Path("conf"), Path("params.yaml"), Path("conf/overrides.yaml")
NOTHING_OVERRIDDEN = "# Nothing overridden.\n"
_HEADER = "# Composed from conf/ by stages/compose_params.py: edit conf/, not this file. values:{digest}\n"
_ADVICE = re.compile(
    r"To append to your|See https://hydra|Either remove \+|Or add a second \+|HYDRA_FULL|object_type="
)
_STAMP = re.compile(r"^# Composed from conf/ .* values:(?P<digest>\w+)$", re.MULTILINE)

Values = dict[str, Any]
Compose = Callable[[list[str]], Values]


def digest(values: Values) -> str:
    """Return a digest of values that does not depend on the order of keys or on comments."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path) -> tuple[Values, str | None]:
    """Return the values of a params.yaml and the digest in its first line, None if capas did not write it."""
    values = read_yaml(path)
    stamp = _STAMP.search(path.read_text(encoding="utf-8"))
    return values, stamp and stamp["digest"]


def edited_by_hand(path: Path) -> bool:
    """Return whether the values of a params.yaml were changed after capas wrote it."""
    return edited_values(path.read_text(encoding="utf-8")) is not None


def edited_values(text: str) -> Values | None:
    """Return the values of a params.yaml if they were changed after capas wrote it, otherwise None.

    Raises:
        CapasError: it is not valid YAML.
    """
    values, stamp = parse_yaml(text, str(PARAMS)), _STAMP.search(text)
    return values if stamp and stamp["digest"] != digest(values) else None


def dump(values: Values) -> str:
    """Return the text of params.yaml, from OmegaConf: PyYAML's '1e-3' would be read back as a string."""
    from omegaconf import OmegaConf

    return _HEADER.format(digest=digest(values)) + OmegaConf.to_yaml(OmegaConf.create(values))


def to_values(config: Any) -> Values:
    """Return a composed configuration as plain values, with all interpolations resolved."""
    from omegaconf import OmegaConf

    return dict(OmegaConf.to_container(config, resolve=True) or {})


@contextmanager
def composer(conf: Path) -> Iterator[Compose]:
    """Yield a function that composes conf/config.yaml with Hydra overrides (`lora.r=8`).

    The function raises CapasError if Hydra cannot compose it, or if a mandatory value is not set.

    Raises:
        CapasError: conf/own has problems.
    """
    from hydra import compose
    from omegaconf import OmegaConf

    from capas.config.searchpath import initialize

    def run(overrides: list[str]) -> Values:
        with hydra_errors():
            config = compose("config", overrides=with_new_keys(overrides, conf))
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise CapasError(f"conf/ leaves mandatory values unset: {', '.join(missing)}")
            return to_values(config)

    with initialize(conf):
        yield run


def with_new_keys(overrides: list[str], conf: Path = CONF) -> list[str]:
    """Add the prefixes that Hydra requires, so that no user needs to know them.

    `++` is for a key that may be new, below a key of conf/: `trainer.lr_scheduler_kwargs.num_cycles=2`, or
    `trainer.lr_scheduler_kwargs={num_cycles: 2}`. `+` is for a group that conf/config.yaml does not name:
    `smoke=tiny`.

    Raises:
        HydraException: an override cannot be parsed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from capas.config.schema import GROUPS
    from capas.config.validation import known_keys

    known, changed = known_keys(), []
    for override in OverridesParser.create().parse_overrides(overrides):
        text, key = str(override.input_line), override.key_or_group
        prefixed = override.is_add() or override.is_force_add() or override.is_delete()
        below = any(key.startswith(f"{name}.") for name in known)
        mapping = (
            key in known and not override.is_sweep_override() and isinstance(override.value(), dict)
        )
        beside = key not in (*GROUPS, "sweep") and is_group(key, conf)
        if prefixed:
            changed.append(text)
        elif below or mapping:
            changed.append(f"++{text}")
        else:
            changed.append(f"+{text}" if beside else text)
    return changed


def is_group(key: str, conf: Path = CONF) -> bool:
    """Return whether `key` is a folder of conf/ with options, other than Hydra's own."""
    if not key or "." in key or key.startswith("hydra") or key == options.OWN:
        return False
    return (conf / key).is_dir() or (conf / options.OWN / key).is_dir()


def word_given(
    overrides: Iterable[str] = (), conf: Path = CONF
) -> Callable[[str, Any], str | None]:
    """Return word(key, value): the text that was read as `value`, from the command line or a file of conf/.

    It is None if no such text is found.
    """

    def word(key: str, value: Any) -> str | None:
        for override in overrides:
            name, _, text = override.lstrip("+").partition("=")
            if name == key:
                return text
        group, _, rest = key.partition(".")
        files = [
            conf / "config.yaml",
            conf / OVERRIDES.name,
            *options.files(conf, group),
        ]
        texts = (text for file in files if file.is_file() for text in _scalars(file, rest or group))
        return next((text for text in texts if _reads_as(text, value)), None)

    return word


def _scalars(file: Path, dotted: str) -> Iterator[str]:
    """Yield the unquoted texts in a YAML file under the last part of a dotted key."""
    from yaml import MappingNode, ScalarNode, SequenceNode, compose

    leaf = next(part for part in reversed(dotted.split(".")) if not part.isdigit())
    waiting: list[Any] = [compose(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, SequenceNode):
            waiting += node.value
        elif isinstance(node, MappingNode):
            for name, value in node.value:
                waiting.append(value)
                found = value.value if isinstance(value, SequenceNode) else [value]
                scalars = (v for v in found if isinstance(v, ScalarNode) and v.style is None)
                yield from (str(v.value) for v in scalars if name.value == leaf)


def _reads_as(text: str, value: Any) -> bool:
    from omegaconf import OmegaConf

    # to_container leaves `???` and `${...}` as they are
    read: Any = OmegaConf.to_container(OmegaConf.create(f"x: {text}"))
    read = read["x"]
    return type(read) is type(value) and bool(read == value)


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that Hydra raises if something does not compose."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    return HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn Hydra's errors into CapasError.

    Raises:
        CapasError: something in the block does not compose.
    """
    try:
        yield
    except failures() as error:
        raise CapasError(f"conf/ does not compose: {reasons(error)}") from None


def reasons(error: BaseException | None) -> str:
    """Return the messages of an exception and of its causes, because Hydra hides the useful one in a cause.

    Its advice to add prefixes is left out: `with_new_keys` adds them.
    """
    texts: list[str] = []
    while error is not None:
        if sentence := _no_such_option(error):
            return "\n  ".join([*texts, sentence])
        lines = (line.rstrip() for line in str(error).strip().splitlines())
        text = "\n".join(line for line in lines if not _ADVICE.search(line))
        if text and text not in texts:
            texts.append(text)
        error = error.__cause__
    return "\n  ".join(texts)


def _no_such_option(error: BaseException) -> str:
    """Return a sentence for Hydra's error about a missing option, or "" for any other error."""
    group, _, option = str(getattr(error, "missing_cfg_file", None) or "").rpartition("/")
    if not group:
        return ""
    if group.startswith("hydra/"):
        return (
            f"{group}={option}: no such option, or its package is not installed: pip install -e "
            "'.[sweep]'"
        )
    there = [name for name in getattr(error, "options", None) or () if not name.startswith("_")]
    return f"{group}={option}: no such option{meant(option, there, group)}"


def meant(option: str, there: list[str], group: str) -> str:
    """Return a suggestion of the intended option, or a list of options, to follow `no such option`."""
    if answer := foreign_names.OPTIONS.get((group, option)):
        return f"; write {answer}"
    close = difflib.get_close_matches(option, there, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; {group} has {', '.join(there)}"
