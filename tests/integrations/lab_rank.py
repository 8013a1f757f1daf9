"""One rank of parity in the emulated cluster: `python -m tests.integrations.lab_rank FOLDER` under torchrun.

FOLDER/request.pt holds (checkpoint, layout) pairs; the outcome of each is left beside it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.integrations.parity import on_rank


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number, (checkpoint, layout) in enumerate(torch.load(folder / "request.pt", weights_only=False)):
        torch.manual_seed(0)
        torch.save(on_rank(checkpoint, layout), folder / f"{number}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
