"""Errors meant for the person at the keyboard: one line, and an exit code."""

import argparse
import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .. import end_at_once

MOST_CHARACTERS = 2000  # of a message: its cause and its advice stand at the two ends
INTERRUPTED = 130  # the shell's code for a run ended by Ctrl-C


class UserError(ValueError):
    """Something the user can put right; its message is one line that says what and how.

    A message names values of the user's files, and these can be of any length: its middle is left out beyond
    ``MOST_CHARACTERS``.
    """

    def __str__(self) -> str:
        return shorten(super().__str__())


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved what it needs to go on."""


class Parser(argparse.ArgumentParser):
    """A command's parser whose complaints are one line, and which takes no abbreviated options.

    Parameters
    ----------
    module : str
        As in ``python -m module``.
    description, epilog : str
        Text above and below the options in ``--help``.
    """

    def __init__(self, module: str, description: str, epilog: str = ""):
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main, arguments=None) -> int:
    """Run a command's ``main`` and turn expected failures into one line on stderr.

    Parameters
    ----------
    main : callable
        Takes a list of command-line strings and returns an exit code or None.
    arguments : list of str, optional
        Command line without the program's name; default ``sys.argv[1:]``.

    Returns
    -------
    int
        0 when done, 2 after an error of the user's, 130 after Ctrl-C or SIGTERM.
    """
    try:
        if signal.getsignal(signal.SIGINT) is end_at_once:  # imports are done
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(sys.argv[1:] if arguments is None else arguments) or 0
    except Interrupted as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except torch.OutOfMemoryError:
        print("error: out of GPU memory: lower --run.batch_size (total_batch stays, by accumulation)", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        print(f"error: a loader process died (out of memory?): try a smaller --data.workers; {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what reads our output has ended, as head does
        drop_output()
        return 2
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def drop_output() -> None:
    """Print nowhere from now on, as printing failed: Python's own flush at the end would fail, too."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


@contextmanager
def writing(path: Path):
    """Turn an operating system's refusal to write into a UserError that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def one_line(error) -> str:
    """Return an exception's message without line breaks and shortened, or its class name where it has none."""
    return shorten(" ".join(str(error).split())) or type(error).__name__


def shorten(message: str) -> str:
    """Return a message with its middle left out beyond ``MOST_CHARACTERS``."""
    if len(message) <= MOST_CHARACTERS:
        return message
    half = MOST_CHARACTERS // 2
    return f"{message[:half]} ... {message[-half:]}"
