"""The command `turbojet`: install models on a device, look at them, talk to them."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from device_runtime import __version__
from device_runtime.apps.safe_text import one_line
from device_runtime.errors import EXIT_INTERRUPTED, DeviceError, TurbojetError

PROGRAM = "turbojet"
DEBUG = "TURBOJET_DEBUG"
"""When set, an internal error shows where it happened."""

_EPILOG = """\
Models are kept in $XDG_DATA_HOME/turbojet, or in $TURBOJET_DATA_DIR.
Exit codes: 0 ok, 1 internal, 2 usage, 3 package, 4 device, 5 request, 130 interrupted.
"""
_APPS = "device_runtime.apps"


@dataclass(frozen=True)
class Verb:
    """One verb; its module is imported when the verb is used, so that help is fast.

    Attributes:
        name: as typed.
        help: one line.
        module: below ``device_runtime.apps``; has ``run_<name>``.
        add_arguments: adds the arguments; None when the module's own ``add_arguments`` does.
    """

    name: str
    help: str
    module: str
    add_arguments: Callable[[argparse.ArgumentParser], None] | None

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code."""
        module = importlib.import_module(f"{_APPS}.{self.module}")
        return int(getattr(module, f"run_{self.name}")(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; every deliberate error ends here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        args = build_parser(arguments[0] if arguments else None).parse_args(arguments)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except TurbojetError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TurbojetError.exit_code
    except OSError as error:
        if os.environ.get(DEBUG):
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", DeviceError.exit_code)
    except Exception as error:  # the last line of defence: a traceback on a terminal is a bug
        if os.environ.get(DEBUG):
            raise
        return _fail(
            f"internal error, {type(error).__name__}: {error}; {DEBUG}=1 shows where, please "
            "report it",
            TurbojetError.exit_code,
        )


def _prepare_streams() -> None:
    """Make streams that take everything.

    Where whoever started us closed one, /dev/null, before a file takes its place; in a locale that
    lacks a character, its escape; for a typed byte that is no character, a surrogate.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as the C locale has it


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of every verb.

    Args:
        verb: the verb that will be parsed: its module may be imported to learn its arguments.
    """
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Large language models on NVIDIA Jetson.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for entry in VERBS:
        child = verbs.add_parser(
            entry.name,
            help=entry.help,
            description=f"{entry.help[0].upper()}{entry.help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if entry.add_arguments is not None:
            entry.add_arguments(child)
        elif entry.name == verb:
            importlib.import_module(f"{_APPS}.{entry.module}").add_arguments(child)
        child.set_defaults(run=entry.run)
    return parser


def _install(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "From another machine: ssh BOARD turbojet install - < X.tgz"
    parser.add_argument("archive", metavar="X.tgz", help="archive of a package; - reads a pipe")
    parser.add_argument("--name", default="", help="name of the model here (default: its own)")
    parser.add_argument(
        "--no-activate", action="store_true", help="keep the current release current"
    )
    parser.add_argument(
        "--force", action="store_true", help="unpack anew what is installed already"
    )
    _json(parser)


def _list(parser: argparse.ArgumentParser) -> None:
    _json(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="NAME|FOLDER", help="an installed model, or a folder")
    parser.add_argument(
        "--release", metavar="ID", help="a release of the model (default: the current one)"
    )
    _json(parser)


def _remove(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="an installed model")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--release", metavar="ID", help="remove this release only")
    which.add_argument("--old", action="store_true", help="remove all but the current release")


def _rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="an installed model")
    parser.add_argument(
        "--release", metavar="ID", help="the release to make current (default: the previous one)"
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def _fail(message: str, code: int) -> int:
    print(f"{PROGRAM}: {one_line(message)}", file=sys.stderr)
    return code


VERBS = (
    Verb("install", "install a package, or a new release of one", "commands", _install),
    Verb("list", "list installed models", "commands", _list),
    Verb("info", "show what is known about a model, and how it fits here", "info", None),
    Verb("verify", "compare every file of a model with its hash", "commands", _verify),
    Verb("rollback", "make the previous release of a model current again", "commands", _rollback),
    Verb("remove", "delete a model or old releases of it", "commands", _remove),
    Verb("chat", "talk to a model, or ask it one thing", "chat", None),
    Verb("selftest", "compare every kernel with its reference on this GPU", "selftest", None),
    Verb("bench", "measure how fast a model answers on this machine", "bench", None),
)


if __name__ == "__main__":
    sys.exit(main())
