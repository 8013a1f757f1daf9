import pytest
import torch

from anabranch.cli.roofs import PRECISIONS, measure_roof, typical
from anabranch.costs.decode import Roof


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_roof_is_of_this_machine(dtype: str) -> None:
    threads = torch.get_num_threads()
    roof = measure_roof(dtype)
    assert roof.read_gbps > 0.1 and roof.gflops > 0.1
    assert torch.get_num_threads() == threads


def test_the_typical_roof_is_the_middle_of_each() -> None:
    assert typical([Roof(10.0, 300.0), Roof(20.0, 200.0), Roof(11.0, 100.0)]) == Roof(11.0, 200.0)
