"""Every deliberate error; the class says who can act, and its exit code tells a script the same."""


class TurbojetError(Exception):
    """Base of all deliberate errors.

    The message is one sentence: what happened, to which thing, the two numbers that disagree,
    what to do. Lower case, no full stop.
    """

    exit_code = 1


class UsageError(TurbojetError):
    """A flag, environment value or config key is wrong; the person who typed it can act."""

    exit_code = 2


class PackageError(TurbojetError):
    """A checkpoint, archive or package is damaged, hostile or incomplete; repack or fetch again."""

    exit_code = 3


class DeviceError(TurbojetError):
    """The machine cannot do it (no such GPU, too little memory); another board or context can."""

    exit_code = 4


class OutOfMemoryError(DeviceError):
    """A plan or an allocation does not fit in the memory that is there."""


class RequestError(TurbojetError):
    """A request cannot be served as asked; the caller can change it (HTTP 400)."""

    exit_code = 5


class FetchError(TurbojetError):
    """A source could not be reached or read; the network, the name or the token can be mended."""

    exit_code = 5


class InternalError(TurbojetError):
    """We broke one of our own rules; a bug report helps."""

    exit_code = 1


EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it (128 + SIGINT)."""
