import pytest
import torch

from anabranch.cli.roofs import PRECISIONS, higher, measure_roof
from anabranch.costs.decode import Roof


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_roof_is_of_this_machine(dtype: str) -> None:
    threads = torch.get_num_threads()
    roof = measure_roof(dtype)
    assert roof.read_gbps > 0.1 and roof.gflops > 0.1
    assert torch.get_num_threads() == threads


def test_the_higher_roof_takes_the_better_of_each() -> None:
    assert higher(Roof(10.0, 300.0), Roof(20.0, 200.0)) == Roof(20.0, 300.0)
