"""Adopt values of params.yaml that conf/ does not compose to: decide which side counts, and keep them."""

import argparse
import logging
import os

from capas.config.auto_metrics import with_metrics
from capas.config.composition import CONF, PARAMS, Values, composer, digest, read, word_given
from capas.config.kept_overrides import absorb, difference
from capas.config.options import OWN, options_of
from capas.config.pins import Pins
from capas.config.resolved_files import resolved_files
from capas.config.schema import GROUPS
from capas.config.validation import validate
from capas.core.errors import CapasError

log = logging.getLogger("capas")


def came_from_outside(target: Values, pins: Pins, options: argparse.Namespace) -> bool:
    """Return whether params.yaml has values that conf/ does not compose to and that must not be lost.

    DVC writes revisions as in conf/, and capas writes them as pinned: this is no difference.

    Raises:
        CapasError: both params.yaml and conf/ changed, so that only the user knows which is meant.
    """
    if options.force or options.reset or not PARAMS.exists():
        return False
    found, stamp = read(PARAMS)
    old, target = with_metrics(pins.known(found)), pins.known(target)
    if not difference(old, target) and not difference(target, old):
        return False
    if stamp == digest(found):
        return False  # params.yaml is as capas wrote it, so conf/ was edited
    written_by_dvc = stamp is None and "DVC_EXP_NAME" in os.environ
    conf_unchanged = stamp == digest(target)
    if written_by_dvc or conf_unchanged or options.keep:
        return True
    keys = ", ".join({**difference(old, target), **difference(target, old)})
    what = (
        "params.yaml was left by an unfinished `dvc exp run` and differs from conf/"
        if stamp is None
        else "params.yaml was edited and conf/ changed as well"
    )
    raise CapasError(
        f"{what}; they differ in: {keys}\nTo keep conf/: python stages/compose_params.py --force\n"
        "To keep params.yaml: python stages/compose_params.py --keep"
    )


def adopt(values: Values, pins: Pins, keep: bool) -> Values:
    """Move values to conf/overrides.yaml if they are valid; return what conf/ then composes to.

    Raises:
        CapasError: a value is wrong; conf/overrides.yaml is unchanged.
    """
    validate(values, word_given())
    check_choices(values)
    pins.resolve(values)
    resolved_files(with_metrics(values))
    absorb(values, lambda found: with_metrics(pins.known(found)))
    with composer(CONF) as compose:
        target = with_metrics(compose([]))
    if "DVC_EXP_NAME" not in os.environ or keep:
        log.info("the edit of params.yaml was moved to conf/overrides.yaml")
    return target


def check_choices(values: Values) -> None:
    """Check that the option of every group exists, as `preset` names it.

    Raises:
        CapasError: an option is missing; `dvc exp run --temp` copies only files that git tracks.
    """
    for group, preset in ((g, values[g]["preset"]) for g in GROUPS):
        if preset not in (there := options_of(CONF, group)):
            raise CapasError(
                f"{group}={preset}: there is no {CONF / group / preset}.yaml, nor one in "
                f"{CONF / OWN / group}; {group} has {', '.join(there)}. Experiments with --temp or "
                f"--queue only see options that git tracks: git add {CONF / OWN}"
            )
