"""The command `speedk`: each file of this folder whose name opens with a letter is a subcommand.

A subcommand has HELP (a line), add_arguments(parser) and run(args) -> exit code; EPILOG (examples) and LOWER (what to
lower where memory runs out) where it has something to say. It imports what is heavy inside `run`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from speedk import __version__
from speedk.errors import Interrupted, SpeedkError, one_line
from speedk.registry import nearest

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE
BUG = 70  # EX_SOFTWARE of sysexits.h
_LOWER = "lower the batch or the number of images, or free some memory"
_DESCRIPTION = "Dataset distillation: a few learned numbers that a network can be trained on in place of a data set."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    0 done; 1 something the user can mend; 2 a wrong command line or a damaged file; 70 a bug; 130 interrupted; 141 the
    reader of the output went away. Errors are one line on stderr; SPEEDK_DEBUG=1 adds the traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal's encoding lacks is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("SPEEDK_DEBUG") == "1":
            traceback.print_exc()
        return _report(error, argv)


def commands() -> dict[str, str]:
    """The subcommands: the name that is typed -> its module's."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return {name.replace("_", "-"): name for name in sorted(found) if not name.startswith("_")}


def _run(argv: list[str]) -> int:
    known = commands()
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        hint = nearest(argv[0], list(known)) or f"; there are {', '.join(known)}"
        _say(f"no command {argv[0]!r}{hint}")
        return 2
    wanted = [argv[0]] if argv and argv[0] in known else list(known)
    parser = _parser({name: _module(known[name]) for name in wanted})
    try:
        args, rest = parser.parse_known_args(argv)
        # argparse takes positional arguments from one place only; key=value may stand anywhere between options.
        if hasattr(args, "fields"):
            args.fields += [word for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            parser.unknown(rest, args.command)
    except SystemExit as stop:
        sys.stdout.flush()  # a pipe that broke during --help is met here
        return stop.code if isinstance(stop.code, int) else 2
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    return args.run(args) or 0


class _Parser(argparse.ArgumentParser):
    """A parser that does not swallow what the system says to its help: a full disk, a pipe nobody reads. What is wrong
    with a command line it says in one line."""

    def _print_message(self, message, file=None):
        if message:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"speedk: {one_line(message)}; see {self.prog} --help\n")

    def unknown(self, words: Sequence[str], command: str | None) -> NoReturn:
        """Refuse options that `command` (None: no command) does not have."""
        subparsers, = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        known = subparsers.choices.get(command, self)
        option = words[0].partition("=")[0]
        known.error(f"unrecognized arguments: {' '.join(words)}{nearest(option, list(known._option_string_actions))}")


class _Help(argparse.HelpFormatter):
    """Leaves room for every command's name beside its help: argparse counts their indent two columns too small."""

    def add_argument(self, action):
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2


def _parser(modules: dict[str, ModuleType]) -> _Parser:
    parser = _Parser("speedk", description=_DESCRIPTION, allow_abbrev=False,
                     epilog="`speedk COMMAND --help` says more about each command.", formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"speedk {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in modules.items():
        sub = subparsers.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False,
                                    epilog=getattr(module, "EPILOG", None),
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _report(error: BaseException, argv: list[str]) -> int:
    """Say `error` in one line and return its exit code."""
    if isinstance(error, SpeedkError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | Interrupted):
        _say(str(error) or "interrupted")
        return INTERRUPTED
    if is_memory(error):
        known = commands()
        lower = getattr(_module(known[argv[0]]), "LOWER", _LOWER) if argv and argv[0] in known else _LOWER
        _say(f"out of memory: {lower}")
        return 1
    if isinstance(error, OSError) and error.strerror:
        _drop_output()
        _say(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
        return 1
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    _say(f"a bug in speedk, please report it with what SPEEDK_DEBUG=1 shows: {text}")
    return BUG


def _drop_output() -> None:
    """Where stdout cannot be written to, send what is left in its buffer nowhere: Python would complain as it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the GPU's, or what torch raises a plain RuntimeError for on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def name_failed(what: str, error: Exception, lower: str) -> None:
    """Say in one line that `what`, one of several runs, failed, so that the others can be run. `lower`: what to lower
    where memory ran out. Raises `error` again where it is nothing that the user can mend."""
    if not (isinstance(error, SpeedkError) or is_memory(error)):
        raise error
    why = str(error) if isinstance(error, SpeedkError) else f"out of memory: {lower}"
    _say(f"{what}: {why}")


def _say(line: str) -> None:
    print(f"speedk: {one_line(line, 1000)}", file=sys.stderr)
