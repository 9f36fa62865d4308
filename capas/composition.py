"""conf/ composed by Hydra, and params.yaml as capas writes it.

params.yaml is always exactly what conf/ composes to. Its first line holds a digest of its values, so
that an edit by hand, or by `dvc exp run -S`, is recognised and not lost.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capas.dag import read_yaml
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
    values, stamp = read(path)
    return stamp is not None and stamp != digest(values)


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
            config = compose("config", overrides=overrides)
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise CapasError(f"conf/ leaves mandatory values unset: {', '.join(missing)}")
            return to_values(config)

    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        yield run


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
