"""The command line: parse, call, print.  Results go to stdout, progress and errors to stderr; exit codes are in base/errors.py."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from typing import Annotated, Any

# Our own threads do the work; a second layer of threads inside numpy would only make results depend on the number of cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from edgemoe import __version__
from edgemoe.base.errors import EdgemoeError, MachineError, UsageError
from edgemoe.cli.build import build
from edgemoe.cli.devices import devices_app
from edgemoe.cli.plan import plan
from edgemoe.cli.price import price
from edgemoe.cli.progress import say
from edgemoe.cli.stages import calibrate, doctor, emit, inspect, report, verify

INTERRUPTED = 130  # exit code
SPACE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
MACHINE_ERRORS = SPACE_ERRORS | {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EIO, errno.ESTALE}
USAGE_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
PIPE_CLOSED = 141  # exit code, as of a program that SIGPIPE ends

app = typer.Typer(
    name="edgemoe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a Mixture-of-Experts checkpoint and a memory budget, get the best GGUF, ONNX or MLX folder that really fits.\n\n"
    "    edgemoe build Qwen/Qwen3-30B-A3B --memory 16GB -o qwen3-16gb\n\n"
    "`build` does everything; the other commands are its stages, each starting from the file that the one before wrote.",
)
app.add_typer(devices_app, name="devices")


def _version(value: bool) -> None:
    if value:
        print(f"edgemoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command; --debug is read in `main`."""


for command in (build, inspect, calibrate, price, plan, emit, verify, report, doctor):
    app.command()(command)


class _Notes(logging.Handler):
    """Prints what the stages have to tell, a line each, to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}", error=True)


class Stopped(BaseException):
    """Another program asked this one to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


def _check_folder() -> None:
    """Refuse to work from a folder that is gone, where every relative path would fail in its own way.

    Raises:
        MachineError: the current folder was deleted, or cannot be read.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise MachineError(f"the current folder cannot be used: {error.strerror}", hint="change to a folder that exists") from error


def main() -> None:
    """Run the command line; every error becomes one line and an exit code."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), _stop)
    logging.getLogger("edgemoe").handlers = [_Notes()]  # one, however often a process calls this
    try:
        _check_folder()
        code = app(standalone_mode=False)  # of a command that ends by typer.Exit; None of one that returns
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        _end_quietly()
    except (Exception, KeyboardInterrupt, Stopped) as error:
        if "--debug" in sys.argv:
            raise
        _fail(*_explain(error))
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # what typer makes of a closed pipe is exit 1
            _end_quietly()
        raise


def _explain(error: BaseException) -> tuple[str, str, int]:
    """An error as message, hint and exit code."""
    if isinstance(error, EdgemoeError):
        return str(error), error.hint, error.exit_code
    if hasattr(error, "format_message"):  # of typer: a wrong option, or no command at all, for which its message is the help
        return _explain_usage(error)
    if isinstance(error, Stopped):
        return f"stopped by {error}", "give the same command again to go on", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "give the same command again to go on", INTERRUPTED
    if isinstance(error, ImportError):
        return f"a package is missing: {error}", "run `edgemoe doctor`", MachineError.exit_code
    if isinstance(error, OSError):
        return _explain_os(error)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "this machine gives no more threads", "close other programs, or raise the limit (ulimit -u)", MachineError.exit_code
    if isinstance(error, MemoryError):
        return "this machine has too little memory", "close other programs, or use a larger machine", MachineError.exit_code
    return f"internal: {type(error).__name__}: {error}", "please report this; --debug shows where", 1


def _explain_usage(error: Any) -> tuple[str, str, int]:
    message, command = error.format_message(), error.ctx.command_path if error.ctx else "edgemoe"
    if "\n" in message:
        print(message, file=sys.stderr)
        sys.exit(UsageError.exit_code)
    return message.rstrip("."), f"`{command} --help` lists the options", UsageError.exit_code


def _explain_os(error: OSError) -> tuple[str, str, int]:
    if error.errno in USAGE_ERRORS:
        return str(error), "choose another name", UsageError.exit_code
    if error.errno not in MACHINE_ERRORS:
        return str(error), "", 1
    hints = {errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENFILE: "close other programs"}
    hints |= dict.fromkeys(SPACE_ERRORS, "free some space or choose another folder")
    return str(error), hints.get(error.errno, ""), MachineError.exit_code


def _end_quietly() -> None:
    """End as `edgemoe ... | head` expects: whoever reads the output has enough of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(PIPE_CLOSED)


def _fail(message: str, hint: str, code: int) -> None:
    """Print one line, and one for the hint: names from files may hold line breaks and escape sequences."""
    say(f"error: {message}", error=True)
    if hint:
        say(f"hint: {hint}", error=True)
    sys.stdout.flush()
    sys.exit(code)
