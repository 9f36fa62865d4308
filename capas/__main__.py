"""Commands that DVC and Hydra lack: `capas COMMAND`, or `python -m capas COMMAND`."""

import argparse
import sys
import traceback

from capas.compare import command as compare
from capas.config import check_data, preflight
from capas.core.errors import CapasError, reason_of
from capas.tracking import registry, ui
from capas.use import chat, merge, push
from capas.use.lab import command as lab
from capas.workspace import rebuild, restore

COMMANDS = {
    "chat": chat,
    "check": check_data,
    "compare": compare,
    "lab": lab,
    "memory": preflight,
    "merge": merge,
    "push": push,
    "register": registry,
    "rebuild": rebuild,
    "restore": restore,
    "ui": ui,
}


def main(argv: list[str] | None = None) -> int:
    """The exit code; 2 also after a defect of the program, for 1 is an answer: other bytes, or refused."""
    parser = argparse.ArgumentParser(prog="capas", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        doc = module.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=doc.partition("\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(command=module.command)
    options = _parse(parser, argv)
    try:
        code: int = options.command(options)
    except CapasError as error:
        sys.stderr.write(f"capas: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("capas: stopped\n")
        return 130
    except Exception as error:  # noqa: BLE001  printed with its traceback, so that it can be reported
        if reason := reason_of(error):
            sys.stderr.write(f"capas: {reason}\n")
            return 2
        traceback.print_exc()
        sys.stderr.write(f"capas: unexpected: {type(error).__name__}: {error}\n")
        return 2
    return code


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse a command; words may stand before and behind its options, which argparse alone refuses."""
    options, more = parser.parse_known_args(argv)
    words = next((value for value in vars(options).values() if isinstance(value, list)), None)
    if more and (words is None or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if words is not None:
        words += more
    return options


if __name__ == "__main__":
    raise SystemExit(main())
