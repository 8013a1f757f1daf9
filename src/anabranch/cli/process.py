"""Which process this is: the only one of its command, or one of several ranks that run the same command; and the
cores that it may use."""

import os

import typer

from anabranch.errors import ConfigError


def under_torchrun() -> bool:
    """Whether an outer torchrun has already started this process as one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def refuse_torchrun(what: str, setting: str) -> None:
    """Raise ConfigError where several ranks run a command that starts ranks by itself."""
    if under_torchrun():
        raise ConfigError(f"{what} starts its own ranks; run it without torchrun", setting=setting)


def usable_cores() -> int:
    """Of the machine's, those that this process was not kept away from."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def speaks() -> bool:
    """Whether this process speaks for all."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def say(text: str) -> None:
    """A line to the user, beside the result: on stderr."""
    if speaks():
        typer.echo(text, err=True)
