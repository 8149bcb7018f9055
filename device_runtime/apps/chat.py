"""`turbojet chat`: talk to an installed model, or ask it one thing."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.text import Text

from device_runtime.apps.chat_commands import COMMANDS
from device_runtime.apps.chat_filter import printable
from device_runtime.apps.chat_kept import keep_conversation, take_notice
from device_runtime.apps.chat_once import answer_as_json, answer_as_text, read_piped_prompt
from device_runtime.apps.chat_settings import ChatSettings, add_chat_arguments, chat_settings
from device_runtime.apps.chat_view import make_console
from device_runtime.apps.end_signals import on_end
from device_runtime.apps.engine_flags import add_engine_arguments, engine_options
from device_runtime.apps.model import open_model
from device_runtime.apps.places import data_dir
from device_runtime.engine.chat_session import ChatSession
from device_runtime.engine.configure import package_sampling
from device_runtime.engine.engine import Engine
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import UsageError
from device_runtime.package_format.package import Package

HISTORY_FILE = "chat_history"
EPILOG = """\
At a terminal it is a conversation; /help lists what it understands. With --prompt, or when
standard input is no terminal (all of it is then the prompt), it prints the answer as plain text
and ends. Every option of the engine and of answers can be set by a variable: --top-k is
TURBOJET_TOP_K. Exit codes: 0, 130 after Ctrl-C, else as `turbojet --help` says.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``turbojet chat``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "target",
        nargs="?",
        metavar="NAME|X.tgz|FOLDER",
        help="an installed model, an archive to install first, or a package folder; may be left "
        "out when one model is installed",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the answer")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a saved conversation")
    parser.add_argument("--no-markdown", action="store_true", help="show answers as they are")
    add_chat_arguments(parser)
    add_engine_arguments(parser)


def run_chat(args: argparse.Namespace) -> int:
    """Run ``turbojet chat``; return its exit code.

    Raises:
        TurbojetError: whatever stands in the way.
    """
    is_conversation = _is_conversation(args)
    options = engine_options(args, os.environ)
    package = open_model(args.target)
    settings = chat_settings(args, os.environ, package_sampling(package))
    system = None if args.system is None else _argument("--system", args.system)
    prompt = "" if is_conversation else _prompt(args)
    with _open_engine(package, options) as engine:
        conversation = ChatSession(engine, system=system)
        if args.load:
            conversation.load(args.load)
            if system is not None:
                conversation.restore(system, conversation.messages)
        if is_conversation:
            return _talk(engine, conversation, settings, is_markdown=not args.no_markdown)
        for note in engine.plan.notes:
            print(f"turbojet: {printable(note)}", file=sys.stderr)
        if args.json:
            return answer_as_json(
                conversation, prompt, settings, model=package.name, backend=engine.backend_name
            )
        return answer_as_text(conversation, prompt, settings)


def _open_engine(package: Package, options: EngineOptions) -> Engine:
    """Load the model; say so on a terminal, since it can take a while."""
    console = make_console(is_error=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return Engine.open(package, options)
    with console.status(Text(f"loading {printable(package.name)}")):
        return Engine.open(package, options)


def _talk(
    engine: Engine, conversation: ChatSession, settings: ChatSettings, *, is_markdown: bool
) -> int:
    # Only a conversation needs prompt_toolkit, which takes a tenth of a second to import.
    from device_runtime.apps.chat_input import PlainReader, PromptReader
    from device_runtime.apps.chat_repl import Repl

    console = make_console()
    reader = (
        PlainReader()
        if console.is_dumb_terminal
        else PromptReader(
            history_path=data_dir() / HISTORY_FILE,
            commands=[command.name for command in COMMANDS],
            status=lambda: repl.prompt_status(),
        )
    )
    repl = Repl(
        conversation=conversation,
        model=printable(engine.package.name),
        plan=engine.plan,
        settings=settings,
        reader=reader,
        console=console,
        is_markdown=is_markdown,
    )
    for path in take_notice(data_dir()):
        repl.say(f"a conversation was cut off; /load {path} goes on with it")
    is_at_its_end = False
    with on_end(repl.cut_off):
        try:
            code = repl.run()
            # A terminal that is gone has no more lines, which may be known before a signal comes.
            is_at_its_end = not repl.is_cut_off and sys.stdin.isatty()
        finally:
            if not is_at_its_end:
                keep_conversation(conversation, data_dir())
    return code


def _is_conversation(args: argparse.Namespace) -> bool:
    """Whether this is a conversation at a terminal, rather than one question.

    Raises:
        UsageError: it can be neither.
    """
    if args.prompt is not None or not sys.stdin.isatty():
        return False
    if args.json:
        raise UsageError("--json answers one prompt: give --prompt TEXT, or pipe it in")
    if not sys.stdout.isatty():
        raise UsageError("standard output is no terminal: give --prompt TEXT, or pipe it in")
    return True


def _prompt(args: argparse.Namespace) -> str:
    prompt = read_piped_prompt() if args.prompt is None else _argument("--prompt", args.prompt)
    if not prompt.strip():
        raise UsageError("the prompt is empty, give --prompt TEXT, or pipe it in")
    return prompt


def _argument(flag: str, text: str) -> str:
    """Return text of the command line as UTF-8, whatever the locale takes it for.

    Raises:
        UsageError: it is no UTF-8.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} is not UTF-8 at byte {error.start}") from error
