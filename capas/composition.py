"""conf/ composed by Hydra, and params.yaml as capas writes it.

params.yaml is always exactly what conf/ composes to. Its first line holds a digest of its values, so
that an edit by hand, or by `dvc exp run -S`, is recognised and not lost.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capas.dag import parse_yaml, read_yaml
from capas.errors import CapasError

CONF, PARAMS, OVERRIDES = Path("conf"), Path("params.yaml"), Path("conf/overrides.yaml")
NOTHING_OVERRIDDEN = "# Nothing overridden.\n"
_HEADER = "# Composed from conf/ by stages/compose_params.py: edit conf/, not this file. values:{digest}\n"
_UNKNOWN = re.compile(r"Could not override '(?P<key>[^']+)'")
_STAMP = re.compile(r"^# Composed from conf/ .* values:(?P<digest>\w+)$", re.MULTILINE)

Values = dict[str, Any]
Compose = Callable[[list[str]], Values]


def digest(values: Values) -> str:
    """Independent of the order of keys and of comments."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path) -> tuple[Values, str | None]:
    """The values of a params.yaml and the digest in its first line (None: capas did not write it)."""
    values = read_yaml(path)
    stamp = _STAMP.search(path.read_text(encoding="utf-8"))
    return values, stamp and stamp["digest"]


def edited_by_hand(path: Path) -> bool:
    """Whether capas wrote this params.yaml and somebody changed its values since."""
    return edited_values(path.read_text(encoding="utf-8")) is not None


def edited_values(text: str) -> Values | None:
    """Return the values of a params.yaml that were changed after capas wrote it; None: they were not.

    Raises:
        CapasError: it is not YAML.
    """
    values, stamp = parse_yaml(text, str(PARAMS)), _STAMP.search(text)
    return values if stamp and stamp["digest"] != digest(values) else None


def dump(values: Values) -> str:
    """The text of params.yaml. OmegaConf writes it: PyYAML's '1e-3' would be read back as a string."""
    from omegaconf import OmegaConf

    return _HEADER.format(digest=digest(values)) + OmegaConf.to_yaml(OmegaConf.create(values))


def to_values(config: Any) -> Values:
    """A composed configuration as plain values, all interpolations resolved."""
    from omegaconf import OmegaConf

    return dict(OmegaConf.to_container(config, resolve=True) or {})


@contextmanager
def composer(conf: Path) -> Iterator[Compose]:
    """Gives compose(overrides): conf/config.yaml composed with Hydra overrides (`lora.r=8`).

    Raises:
        CapasError: Hydra cannot compose it, or a mandatory value is not set.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    def run(overrides: list[str]) -> Values:
        with hydra_errors():
            if unknown := unknown_keys(overrides):
                raise CapasError(f"conf/ does not compose: {'; '.join(unknown.values())}")
            config = compose("config", overrides=with_new_keys(overrides))
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise CapasError(f"conf/ leaves mandatory values unset: {', '.join(missing)}")
            return to_values(config)

    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        yield run


def with_new_keys(overrides: list[str]) -> list[str]:
    """Mark the overrides that may add keys below one that conf/ has, as Hydra's `++` does.

    `trainer.lr_scheduler_kwargs={num_cycles: 2}` and `trainer.lr_scheduler_kwargs.num_cycles=2` are such:
    Hydra itself refuses them, since conf/ leaves the mapping empty.
    """
    from capas.config import known_keys

    known = known_keys()
    changed = []
    for override in _parsed(overrides):
        text, key = str(override.input_line), override.key_or_group
        below = any(key.startswith(f"{name}.") for name in known)
        mapping = key in known and isinstance(override.value(), dict)
        changed.append(f"++{text}" if _changes(override) and (below or mapping) else text)
    return changed


def unknown_keys(overrides: list[str]) -> dict[str, str]:
    """{override: sentence} of all overrides that change a key which conf/ does not have."""
    from capas.config import GROUPS, known_keys, nearest

    found, known = {}, {*known_keys(), *GROUPS}
    for override in _parsed(overrides):
        key = override.key_or_group
        there = any(key == name or key.startswith(f"{name}.") for name in known - {*GROUPS})
        dotted = "." in key and "/" not in key and "@" not in key and not key.startswith("hydra.")
        if _changes(override) and dotted and not there:
            found[str(override.input_line)] = f"{key}: no such key{nearest(key)}"
    return found


def checked(compose: Callable[[list[str]], Any], overrides: list[str], conf: Path) -> Any:
    """What `compose` makes of the overrides, once its values are known to be valid.

    Args:
        compose: gives Hydra's configuration, in which its own node `hydra` may stand.

    Raises:
        CapasError: all unknown keys and wrong values at once.
    """
    from omegaconf import OmegaConf

    from capas.config import find_problems, refused

    with hydra_errors():
        unknown = unknown_keys(overrides)
        known = [override for override in overrides if override not in unknown]
        config = compose(with_new_keys(known))
        own = {key: config._get_node(key) for key in config if key != "hydra"}
        plain = OmegaConf.create(own)
        if missing := sorted(OmegaConf.missing_keys(plain)):
            raise CapasError(f"conf/ leaves mandatory values unset: {', '.join(missing)}")
        values = to_values(plain)
    problems = [*unknown.values(), *find_problems(values, word_given(known, conf))]
    if problems:
        raise refused(problems)
    return config


def _parsed(overrides: list[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return list(OverridesParser.create().parse_overrides(overrides))


def _changes(override: Any) -> bool:
    return not (override.is_add() or override.is_force_add() or override.is_delete())


def word_given(
    overrides: Iterable[str] = (), conf: Path = CONF
) -> Callable[[str, Any], str | None]:
    """Give word(key, value): the text that was read as `value`, on the command line or in a file of conf/.

    None where no text is found, or where it is written as Python writes the value.
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
            *sorted((conf / group).glob("*.yaml")),
        ]
        texts = (text for file in files if file.is_file() for text in _scalars(file, rest or group))
        return next((text for text in texts if _reads_as(text, value)), None)

    return word


def _scalars(file: Path, dotted: str) -> Iterator[str]:
    """The unquoted texts in a YAML file that stand under the last part of a dotted key."""
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

    read = OmegaConf.create(f"x: {text}").x
    return type(read) is type(value) and bool(read == value)


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Hydra's errors as one of ours.

    Raises:
        CapasError: what is composed in the block does not compose.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        reasons = _reasons(error)
        if unknown := _UNKNOWN.match(reasons):
            from capas.config import nearest

            reasons = f"{unknown['key']}: no such key{nearest(unknown['key'])}"
        raise CapasError(f"conf/ does not compose: {reasons}") from None


def _reasons(error: BaseException | None) -> str:
    """The messages of an exception and of its causes: Hydra hides the useful one in the cause."""
    texts: list[str] = []
    while error is not None:
        text = str(error).strip()
        if text and text not in texts:
            texts.append(text)
        error = error.__cause__
    return "\n  ".join(texts)
