"""Which process this is: the only one of its command, or one of several ranks that run the same command."""

import logging
import os

import torch
import typer
from transformers.utils import logging as transformers_logging


def under_torchrun() -> bool:
    """Whether an outer torchrun has already started this process as one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def speaks() -> bool:
    """Whether this process speaks for all."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def say(text: str) -> None:
    """A line to the user, beside the result: on stderr."""
    if speaks():
        typer.echo(text, err=True)


def quiet() -> None:
    """Keep libraries' progress bars and advice off the run's display; errors and our warnings still show."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
