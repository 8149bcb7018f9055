"""The command `turbojet-host`: one verb a stage, and `build` for all of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from device_runtime import __version__
from device_runtime.errors import EXIT_INTERRUPTED, DeviceError, TurbojetError, UsageError
from host_tools import arguments, commands

PROGRAM = "turbojet-host"
DEBUG = f"{arguments.ENVIRONMENT_PREFIX}DEBUG"
HOST_LIBRARIES = ("torch", "safetensors", "modelscope", "gguf", "pyarrow")
"""What the extra `host` installs; without them `--help` works and the verbs say what to install."""

VERBS = {
    "fetch": "get a checkpoint from ModelScope, a folder or a GGUF file",
    "calibrate": "write statistics of activations, keys and values",
    "quantize": "make 4-bit weights (AWQ)",
    "convert": "write a TurboMind workspace",
    "kv-qparams": "write the parameters of the static int8 KV cache",
    "pack": "write one archive for the target boards",
    "build": "all of these, from a source to the archive",
    "report": "draw the report of a build again, with all that was measured since",
    "kernels": "compile the CUDA kernels for every board",
    "evaluate": "measure perplexity, of several targets side by side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; every deliberate error ends here."""
    # Read by torch's OpenMP when it loads: threads that spin while another process has the core
    # made a quantization on two busy cores five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        args = build_parser().parse_args(argv)
        return int(args.run(args))
    except TurbojetError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in HOST_LIBRARIES:
            return _unexpected(error)
        return _fail(
            f"{library} is not installed; pip install 'turbojet-llm[host]'", UsageError.exit_code
        )
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TurbojetError.exit_code
    except OSError as error:
        if os.environ.get(DEBUG):
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", DeviceError.exit_code)
    except RuntimeError as error:
        # Known by name: importing torch takes seconds, and without it nothing raises this.
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get(DEBUG):
            return _unexpected(error)
        return _fail(
            f"{str(error).partition('. GPU')[0]}; free memory of the GPU or use --device cpu, what "
            f"is finished is kept",
            DeviceError.exit_code,
        )
    except Exception as error:  # the last line of defence: a traceback on a terminal is a bug
        return _unexpected(error)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb; nothing heavy is imported."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Turn a checkpoint into one file for an NVIDIA Jetson.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, help_text in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
            allow_abbrev=False,
            formatter_class=arguments.HelpFormatter,
        )
        function = name.replace("-", "_")
        getattr(arguments, f"{function}_arguments")(verb)
        verb.set_defaults(run=getattr(commands, f"run_{function}"))
    return parser


def _unexpected(error: Exception) -> int:
    if os.environ.get(DEBUG):
        raise error
    first_line = (str(error).splitlines() or [""])[0]
    return _fail(
        f"internal error, {type(error).__name__}: {first_line}; {DEBUG}=1 shows where, please "
        "report it",
        TurbojetError.exit_code,
    )


def _fail(message: str, exit_code: int) -> int:
    # Names from somebody else's files may hold what a terminal obeys.
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
    print(f"{PROGRAM}: {shown}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
