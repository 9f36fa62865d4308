"""Answer flags of Hydra that a sweep does not have with the command that replaces them."""

from collections.abc import Sequence

from capas.core.errors import CapasError

_VALUES = "the values of a trial: python stages/compose_params.py --print lora.r=8"
_CONF = "a sweep always reads conf/; options of your own go to conf/own/GROUP/NAME.yaml"
_OTHERS = "python stages/sweep.py --help lists what there is"
_INSTEAD = {
    **dict.fromkeys(("--cfg", "-c", "--resolve", "--package", "-p"), _VALUES),
    **dict.fromkeys(("--info", "-i"), f"{_VALUES}; sweeps so far: python stages/sweep.py --list"),
    **dict.fromkeys(("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"), _CONF),
    **dict.fromkeys(("--run", "-r"), "leave out -m to run a single trial"),
    **dict.fromkeys(("--hydra-help", "--version", "--shell-completion", "-sc"), _OTHERS),
    "--experimental-rerun": "the same command runs only the trials that are not finished",
}


def refuse_hydra_flags(words: Sequence[str]) -> None:
    """Check that a command has no flag of Hydra other than -m.

    Raises:
        CapasError: it has one; the message names what replaces it.
    """
    for word in words:
        if instead := _INSTEAD.get(flag := word.partition("=")[0]):
            raise CapasError(f"{flag} is a flag of Hydra that a sweep does not have; {instead}")
