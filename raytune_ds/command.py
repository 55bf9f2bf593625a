"""What all command lines share: arguments for the config, and errors without a traceback."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable

from raytune_ds.console import err
from raytune_ds.errors import Stopped, UserError

# Libraries' banners, bars and hints, which would drown what we say; --debug brings them back.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "PYTHONWARNINGS": "ignore",
}


DISK_FULL = os.strerror(errno.ENOSPC)


class _Help(argparse.Action):
    """--help whose long part is made only when asked for."""

    def __init__(self, option_strings: list[str], dest: str, epilog: Callable[[], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)
        self._epilog = epilog

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
        parser.print_help()
        print("\n" + self._epilog())
        parser.exit()


def parser(
    program: str, description: str, epilog: Callable[[], str] | None = None
) -> argparse.ArgumentParser:
    """A command line with --debug; `epilog` makes the long part of its help."""
    command = argparse.ArgumentParser(prog=program, description=description, add_help=epilog is None)
    if epilog is not None:
        command.add_argument(
            "-h", "--help", action=_Help, epilog=epilog, help="show this and every config key"
        )
    command.add_argument("--debug", action="store_true", help="tracebacks, and all that the libraries say")
    return command


def add_config_arguments(command: argparse.ArgumentParser) -> None:
    """--config, --print-config and key=value."""
    command.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML file; several are merged left to right",
    )
    command.add_argument(
        "--print-config", action="store_true", help="print the resolved config as JSON and stop"
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as adapter.r=16")


def guarded(action: Callable[[], int], debug: bool) -> int:
    """Runs `action` and returns the exit code.

    That is 2 for a UserError, of which the message is shown, 130 for Ctrl-C and 143 for SIGTERM. All else is a crash.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a job's log is read while it is written
    if not debug:
        warnings.simplefilter("ignore")
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    try:
        return action()
    except UserError as error:
        if debug:
            raise
        err.print(f"error: {error}", markup=False, style="red")
        return 2
    except Exception as error:
        # Each library has its own error for a full disk, and Ray wraps those of workers as text.
        if debug or DISK_FULL not in str(error):
            raise
        err.print(
            f"error: {DISK_FULL}. Make room under run.storage; the same command then resumes.", style="red"
        )
        return 1
    except KeyboardInterrupt as stop:
        err.print("interrupted", markup=False)
        return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)
