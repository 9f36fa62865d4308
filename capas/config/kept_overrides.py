"""Write conf/overrides.yaml: values that came in through params.yaml, as overrides of the rest of conf/.

A value can reach params.yaml from outside conf/: `dvc exp run -S trainer.learning_rate=1e-3` makes DVC
compose into it, `dvc exp apply` adopts it, people edit it. It is moved here, last in the defaults list,
so that conf/ composes to exactly params.yaml and a later edit of another key does not undo it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.config.composition import CONF, NOTHING_OVERRIDDEN, OVERRIDES, Compose, Values, composer
from capas.config.pins import KEYS
from capas.core.dag import parse_yaml
from capas.core.errors import CapasError
from capas.core.files import write_whole
from capas.core.params import flatten

_HEADER = """\
# Set by `dvc exp run -S`, by a sweep, or by an edit of params.yaml. Wins over the rest of conf/.
# Move a line into the file it belongs to, or `python stages/compose_params.py --reset` to drop all.
"""


_CHOICE = "override /"


def difference(values: Values, base: Values) -> dict[str, Any]:
    """Return the leaves of `values` that are missing or different in `base`, by dotted key."""
    have = flatten(base)
    return {k: v for k, v in flatten(values).items() if k not in have or not _same(have[k], v)}


def absorb(values: Values, pinned: Callable[[Values], Values], conf: Path = CONF) -> None:
    """Write the overrides with which `conf` composes to exactly `values`.

    They are tried on a copy of conf/, so that a killed process never leaves an unfinished file.

    Args:
        pinned: puts the commits of conf/revisions.yaml into values: a pin is not an override.

    Raises:
        CapasError: params.yaml lacks a key that conf/ sets, or cannot be expressed over conf/.
    """
    with TemporaryDirectory() as folder:
        trial = Path(shutil.copytree(conf, Path(folder) / "conf"))
        with composer(trial) as compose:
            text = _express(values, compose, pinned, trial / OVERRIDES.name)
    write_whole(conf / OVERRIDES.name, text)


def in_force(conf: Path = CONF) -> list[str]:
    """Return the overrides that conf/overrides.yaml sets: ['lora.r=8', 'model=tiny']."""
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.load(conf / OVERRIDES.name)) or {}
    assert isinstance(tree, dict)
    entries = tree.pop("defaults", [])
    choices = [item for entry in entries if isinstance(entry, dict) for item in entry.items()]
    named = [f"{str(group).removeprefix(_CHOICE)}={option}" for group, option in choices]
    return named + [f"{key}={value}" for key, value in flatten(tree).items()]


def _express(
    values: Values, compose: Compose, pinned: Callable[[Values], Values], file: Path
) -> str:
    """Return the shortest text that composes to `values`: group choices, then the remaining leaves.

    A leaf that conf/ derives from another one is only set if the derived value is wrong.
    """
    file.write_text(NOTHING_OVERRIDDEN, encoding="utf-8")
    base = compose([])
    kept = flatten(values)
    gone = sorted(
        k for k in flatten(base) if not any(v == k or v.startswith(f"{k}.") for v in kept)
    )
    choices = _choices(values, base, compose, file)
    if gone and not choices:
        raise CapasError(
            f"params.yaml lacks {', '.join(gone)}, which conf/ sets. To remove a key, remove it "
            "in conf/"
        )
    wanted = pinned(values)
    derived, left = _interpolated() | KEYS, difference(wanted, pinned(compose([])))
    leaves = {key: value for key, value in left.items() if key not in derived}
    for _ in range(3):
        text = _written(choices, leaves)
        file.write_text(text, encoding="utf-8")
        found = pinned(compose([]))
        left = {**difference(wanted, found), **difference(found, wanted)}
        if not left:
            return text
        leaves |= {key: kept[key] for key in left if key in kept}
    raise CapasError(
        f"params.yaml cannot be expressed as overrides of conf/: {', '.join(left)}; "
        "make the change in conf/ by hand, then `python stages/compose_params.py --force`"
    )


def _choices(values: Values, base: Values, compose: Compose, file: Path) -> dict[str, str]:
    """Return {group: option} of the groups whose `preset` differs, and leave `file` with these choices.

    Groups are handled one after the other. A model implies its chat template, which is then not a choice of
    its own. If it were written down, it would stay whatever model is chosen next.
    """
    choices: dict[str, str] = {}
    while new := [g for g in _differing(values, base) if g not in choices]:
        choices[new[0]] = values[new[0]]["preset"]
        file.write_text(_written(choices, {}), encoding="utf-8")
        base = compose([])
    return choices


def _differing(values: Values, base: Values) -> list[str]:
    return [
        group
        for group, node in base.items()
        if isinstance(node, dict) and values.get(group, {}).get("preset") != node.get("preset")
    ]


def _interpolated() -> set[str]:
    """Return the leaves that conf/ defines by interpolation; their changes may follow from another value."""
    from hydra import compose
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(compose("config"), resolve=False)
    assert isinstance(raw, dict)
    leaves = flatten({str(k): v for k, v in raw.items()})
    return {key for key, value in leaves.items() if isinstance(value, str) and "${" in value}


def _written(choices: dict[str, str], leaves: dict[str, Any]) -> str:
    """Return the text for values; a text that looks like an interpolation stays a text."""
    return render(choices, {key: _literal(value) for key, value in leaves.items()})


def parse(text: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the group choices and the leaves of a conf/overrides.yaml, with interpolations unresolved.

    Raises:
        CapasError: it is not valid YAML.
    """
    tree = parse_yaml(text, str(OVERRIDES))
    entries = tree.pop("defaults", None) or []
    items = [item for entry in entries if isinstance(entry, dict) for item in entry.items()]
    return {group.removeprefix(_CHOICE): option for group, option in items}, flatten(tree)


def render(choices: dict[str, str], leaves: dict[str, Any]) -> str:
    """Return the text of conf/overrides.yaml; the inverse of `parse`."""
    from omegaconf import OmegaConf

    if not choices and not leaves:
        return NOTHING_OVERRIDDEN
    tree: dict[str, Any] = {}
    if choices:
        tree["defaults"] = ["_self_", *({f"{_CHOICE}{g}": o} for g, o in choices.items())]
    for dotted, value in leaves.items():
        *groups, leaf = dotted.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return _HEADER + OmegaConf.to_yaml(OmegaConf.create(tree))


def _literal(value: Any) -> Any:
    """Escape texts that look like an interpolation, so that they stay texts."""
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of one type.

    Python takes 1, 1.0 and true as equal, but a reader of a configuration does not.
    """
    return type(one) is type(other) and bool(one == other)
