"""How a command ends when something is wrong: one line, an exit code, no traceback."""

import errno
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import typer

from anabranch.cli.process import say, speaks, under_torchrun
from anabranch.errors import AnabranchError, RankError

P = ParamSpec("P")
T = TypeVar("T")

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
SIGNALLED = 128
# What a file named by the user may be: another's, too long a name, on a full disk.
UNUSABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
}
# torchrun ends all ranks once one is gone: the others give rank 0 so long to say why.
SPEAKER_S = 1.0


class RankDiedError(RankError):
    """A rank's process ended in the middle of a job."""


def fails_clearly(command: Callable[P, T]) -> Callable[P, T]:
    """Print an `AnabranchError`, or which file cannot be used, as one line and exit with 2; exit with 130 when
    interrupted, and with 128 + its number after SIGTERM or SIGHUP.

    A rank that died is not the user's mistake: exit with 1. Under an outer torchrun rank 0 alone prints.
    """

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with _ending_in_order():
                return command(*args, **kwargs)
        except AnabranchError as error:
            raise _told(str(error), FAILED if isinstance(error, RankDiedError) else USER_ERROR) from None
        except OSError as error:
            if error.errno not in UNUSABLE or error.filename is None:
                raise
            raise _told(f"{error.filename}: {error.strerror}", USER_ERROR) from None
        except (KeyboardInterrupt, *_launcher_signals()):
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return guarded


def _told(reason: str, code: int) -> typer.Exit:
    """The command's end, once the reason is on stderr in one line."""
    if speaks():
        typer.secho("error", fg="red", bold=True, nl=False, err=True)
        typer.echo(f" {' '.join(reason.split())}", err=True)
    else:
        time.sleep(SPEAKER_S)
    return typer.Exit(code)


@contextmanager
def _ending_in_order() -> Generator[None]:
    """Let SIGTERM and SIGHUP end this process as SIGINT does: by unwinding, which ends ranks and removes what is
    temporary. Not a rank's: the agent that ends it may find it waiting for another, where no handler runs."""
    if under_torchrun() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(SIGNALLED + number)

    heeded = [
        n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN
    ]  # nohup's stays
    before = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launcher_signals() -> tuple[type[BaseException], ...]:
    """What torch's launcher raises on a signal. Nothing raises it where that module is not loaded, and commands that
    do without torch do not load it."""
    launcher = sys.modules.get("torch.distributed.elastic.multiprocessing")
    return () if launcher is None else (launcher.SignalException,)
