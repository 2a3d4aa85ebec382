"""A command is a module with a docstring for `--help`, EXAMPLES, `add_arguments(parser)` and `run(arguments)`."""

import argparse
from importlib import import_module


def add_commands(
    parser: argparse.ArgumentParser, commands: dict[str, str], package: str, arguments: list[str], kind: str
) -> None:
    """Add a subparser for each of `commands` (name: one line of help), modules of `package`.

    Only the module that `arguments` asks for is imported, so that `--help` stays fast.
    """
    subparsers = parser.add_subparsers(required=True, metavar=kind)
    for name, one_line in commands.items():
        if name not in arguments[:1]:
            subparsers.add_parser(name, help=one_line)
            continue
        module = import_module(f".{name.replace('-', '_')}", package)
        subparser = subparsers.add_parser(
            name,
            help=one_line,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if hasattr(module, "COMMANDS"):
            add_commands(subparser, module.COMMANDS, module.__name__, arguments[1:], module.KIND)
        else:
            subparser.set_defaults(run=module.run, prog=subparser.prog)
            module.add_arguments(subparser)
