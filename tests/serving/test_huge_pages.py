import re
from pathlib import Path

import pytest
import torch

from anabranch.serving import huge_pages


def _flags_at(address: int) -> set[str]:
    """Of the mapping that holds the address, as the kernel tells them."""
    mapping = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            mapping = line if int(found[1], 16) <= address < int(found[2], 16) else ""
        elif mapping and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"{address:#x} is in no mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no kernel with huge pages"
)
def test_large_tensors_ask_for_huge_pages_of_their_own() -> None:
    tensor = huge_pages.empty(torch.Size((3, 1 << 20)), torch.bfloat16)
    assert tensor.shape == (3, 1 << 20) and tensor.dtype == torch.bfloat16
    assert not tensor.any(), "fresh from the system"
    flags = _flags_at(tensor.data_ptr())
    assert "hg" in flags, "advised"
    assert "sh" not in flags, "private: what is shared gets huge pages by another setting, mostly off"
    view = tensor[1]
    del tensor
    assert view.fill_(2.0).sum() == 2 << 20, "a view keeps the memory"


def test_small_tensors_are_torchs() -> None:
    assert huge_pages.empty(torch.Size((4, 0)), torch.uint8).shape == (4, 0)
    assert huge_pages.empty(torch.Size((7,)), torch.float32).fill_(1.0).sum() == 7
