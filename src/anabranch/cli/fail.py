"""How a command ends when something is wrong: one line, an exit code, no traceback."""

import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import typer

from anabranch.cli.process import say, speaks
from anabranch.errors import AnabranchError, RankError

P = ParamSpec("P")
T = TypeVar("T")

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
# torchrun ends all ranks once one is gone: the others give rank 0 so long to say why.
SPEAKER_S = 1.0


class RankDiedError(RankError):
    """A rank's process ended in the middle of a job."""


def fails_clearly(command: Callable[P, T]) -> Callable[P, T]:
    """Print an `AnabranchError` as one line and exit with 2; exit with 130 when interrupted.

    A rank that died is not the user's mistake: exit with 1. Under an outer torchrun rank 0 alone prints.
    """

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except AnabranchError as error:
            if speaks():
                typer.secho("error", fg="red", bold=True, nl=False, err=True)
                typer.echo(f" {' '.join(str(error).split())}", err=True)
            else:
                time.sleep(SPEAKER_S)
            raise typer.Exit(FAILED if isinstance(error, RankDiedError) else USER_ERROR) from None
        except (KeyboardInterrupt, *_launcher_signals()):
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return guarded


def _launcher_signals() -> tuple[type[BaseException], ...]:
    """What torch's launcher raises on a signal. Nothing raises it where that module is not loaded, and commands that
    do without torch do not load it."""
    launcher = sys.modules.get("torch.distributed.elastic.multiprocessing")
    return () if launcher is None else (launcher.SignalException,)
