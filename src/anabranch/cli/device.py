"""What torch and transformers do in this process: the device they compute on, and what they print."""

import logging

import torch
from transformers.utils import logging as transformers_logging


def quiet() -> None:
    """Keep libraries' progress bars and advice off the run's display; errors and our warnings still show."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
