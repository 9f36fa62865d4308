"""What DVC and Hydra have no command for: `capas COMMAND`, or `python -m capas COMMAND`."""

import argparse
import sys

from capas import rebuild, registry
from capas.errors import CapasError

COMMANDS = {"register": registry, "rebuild": rebuild}


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
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
    options = parser.parse_args(argv)
    try:
        code: int = options.command(options)
    except CapasError as error:
        sys.stderr.write(f"capas: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("capas: stopped\n")
        return 130
    return code
