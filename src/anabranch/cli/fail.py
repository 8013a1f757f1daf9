"""How a command ends when something is wrong: one line, an exit code, no traceback."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from torch.distributed.elastic.multiprocessing import SignalException

from anabranch.errors import AnabranchError

P = ParamSpec("P")
T = TypeVar("T")

USER_ERROR = 2
INTERRUPTED = 130


def fails_clearly(command: Callable[P, T]) -> Callable[P, T]:
    """Print an `AnabranchError` as one line and exit with 2; exit with 130 when interrupted."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except AnabranchError as error:
            Console(stderr=True).print(f"[bold red]error[/] {error}", soft_wrap=True, highlight=False)
            raise typer.Exit(USER_ERROR) from None
        except (KeyboardInterrupt, SignalException):
            Console(stderr=True).print("interrupted", highlight=False)
            raise typer.Exit(INTERRUPTED) from None

    return guarded
