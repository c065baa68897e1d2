"""The command line: arguments here, the work in ``mmseg_volo``, which is imported only once there is work to do.

It is a package of its own because importing any part of ``mmseg_volo`` imports torch and mmseg, which takes seconds,
and ``--help`` should answer at once. Each module beside this one describes a group of commands in a dict ``COMMANDS``:
by name the description, a function that adds the arguments, and one that does the work and returns the exit status, or
None for success.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import data, listing, measuring, sharing, training, using


class _Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one sentence, with a suggestion for a mistyped command.

    Words may follow options even where they may be left out, which argparse's ``nargs`` '*' and '?' do not allow.
    """

    _is_inner = False  # Python 3.11's parse_known_intermixed_args() calls parse_known_args()

    def parse_known_args(self, args=None, namespace=None):
        may_be_empty = any(action.nargs in ('*', '?') for action in self._get_positional_actions())
        if self._is_inner or not may_be_empty:
            return super().parse_known_args(args, namespace)
        self._is_inner = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inner = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}; {self.prog} --help lists what it takes\n')

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(str(value), action.choices, n=3)
            hint = f'did you mean {" or ".join(near)}?' if near else f'choose from {", ".join(action.choices)}'
            self.error(f'no command named {value!r}: {hint}')
        super()._check_value(action, value)


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('shell', choices=['bash', 'zsh', 'tcsh'])


def _completion(args: dict) -> int:
    try:
        import shtab
    except ImportError:
        print("error: completion requires shtab; type: pip install 'mmseg-volo[completion]'", file=sys.stderr)
        return 2
    print(shtab.complete(parser(), args['shell']))
    return 0


Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[dict], int | None]]
# In the order in which --help lists them.
COMMANDS: dict[str, Command] = {
    **training.COMMANDS,
    **using.COMMANDS,
    **sharing.COMMANDS,
    **data.COMMANDS,
    **listing.COMMANDS,
    **measuring.COMMANDS,
    'completion': ('Print a completion script for a shell.', _add_completion, _completion),
}


def parser() -> argparse.ArgumentParser:
    """Parser for ``mmseg-volo COMMAND ...``."""
    top = _Parser(prog='mmseg-volo', description='VOLO backbones for MMSegmentation.')
    commands = top.add_subparsers(dest='command', metavar='COMMAND', title='commands')
    for name, (description, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=description, description=description))
    return top


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        command: a key of ``COMMANDS``; None reads it from the first argument.
        arguments: those after the program's name; None takes ``sys.argv``'s.
    """
    if command is None:
        top = parser()
        args = vars(top.parse_args(arguments))
        command = args.pop('command')
        if command is None:
            top.print_help()
            return 2
    else:
        description, add_arguments, _ = COMMANDS[command]
        single = _Parser(description=description)
        add_arguments(single)
        args = vars(single.parse_args(arguments))
    work = COMMANDS[command][2]
    return work(args) if work is _completion else _run(work, args)


def _run(work: Callable[[dict], int | None], args: dict) -> int:
    if 'local_rank' in args:
        os.environ.setdefault('LOCAL_RANK', str(args.pop('local_rank')))
    try:
        from mmseg_volo.config import parse_options
        from mmseg_volo.error_messages import one_sentence_errors
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        if error.name is not None:  # a module that is missing or broken, not mmseg_volo's own sentence about packages
            raise
        print('error:', error, file=sys.stderr)
        return 2
    with one_sentence_errors():
        if 'cfg_options' in args:
            args['cfg_options'] = parse_options(args['cfg_options'] or [])
        return work(args) or 0
