"""Wire codecs: what a row loses, row by row and through a whole round trip.

Shape suffixes: N rows, D hidden size, W bytes of an encoded row.
"""

import pytest
import torch
import torch.distributed as dist

from anabranch.errors import ConfigError
from anabranch.transport import Wires
from anabranch.transport.codecs import CODECS, check_codec, make_codec
from anabranch.transport.flight import Flight
from anabranch.transport.lanes import Lanes
from run_distributed import RankPool

# The largest error of a number, as a part of the largest number of its block (of itself for bf16 and fp8).
WORST = {"bf16": 2**-8, "int8": 1 / 254, "int8_stochastic": 1 / 127, "fp8": 1 / 16}


def rows(count: int, hidden: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different scale, and one of zeros."""
    draw = torch.Generator().manual_seed(hidden)
    x_ND = torch.randn(count, hidden, generator=draw) * torch.logspace(-6, 6, count).unsqueeze(1)
    x_ND[count // 2] = 0.0
    return x_ND.to(dtype)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("hidden", [1, 5, 128, 200, 512])
def test_each_number_returns_within_its_bound(name: str, hidden: int) -> None:
    codec = make_codec(name)
    assert codec is not None
    x_ND = rows(9, hidden)
    wire_NW = codec.encode(x_ND)
    assert (wire_NW.dtype, wire_NW.shape) == (torch.uint8, (9, codec.row_bytes(hidden)))
    error_ND = (codec.decode(wire_NW, hidden, torch.float32) - x_ND).abs()
    blocks = x_ND.split(128, dim=1)
    for error_NB, x_NB in zip(error_ND.split(128, dim=1), blocks, strict=True):
        largest_N1 = x_NB.abs().amax(dim=1, keepdim=True)
        # fp8 is relative to the number itself, down to its subnormal step.
        bound = (
            x_NB.abs() * WORST[name] + largest_N1 * 2**-17
            if name in ("bf16", "fp8")
            else largest_N1 * WORST[name]
        )
        assert (error_NB <= bound * 1.0001).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("hidden", [1, 128, 200])
def test_no_row_is_no_byte(name: str, hidden: int) -> None:
    codec = make_codec(name)
    assert codec is not None
    wire_NW = codec.encode(torch.empty(0, hidden))
    assert wire_NW.shape == (0, codec.row_bytes(hidden))
    assert codec.decode(wire_NW, hidden, torch.float32).shape == (0, hidden)


@pytest.mark.parametrize("name", CODECS)
def test_a_row_is_encoded_by_itself(name: str) -> None:
    codec = make_codec(name)
    assert codec is not None
    x_ND = rows(8, 200)
    torch.manual_seed(0)
    whole_NW = codec.encode(x_ND)
    assert codec.encode(x_ND[:0]).shape == (0, codec.row_bytes(200))
    if name != "int8_stochastic":
        assert torch.equal(torch.cat([codec.encode(row_1D) for row_1D in x_ND.split(1)]), whole_NW)


@pytest.mark.parametrize("name", ["int8", "int8_stochastic", "fp8", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_not_hidden(name: str, bad: float) -> None:
    codec = make_codec(name)
    assert codec is not None
    x_ND = rows(3, 256)
    x_ND[1, 7] = bad
    back_ND = codec.decode(codec.encode(x_ND), 256, torch.float32)
    assert not back_ND[1, :128].isfinite().all()
    assert back_ND[0].isfinite().all()


def test_stochastic_rounding_keeps_the_mean() -> None:
    codec = make_codec("int8_stochastic")
    assert codec is not None
    torch.manual_seed(0)
    x_ND = torch.arange(128.0).sin().expand(4096, 128)
    back_ND = codec.decode(codec.encode(x_ND), 128, torch.float32)
    step = 1 / 127
    assert (back_ND.mean(dim=0) - x_ND[0]).abs().max() < 5 * step / 4096**0.5
    nearest = make_codec("int8")
    assert nearest is not None
    assert (nearest.decode(nearest.encode(x_ND[:1]), 128, torch.float32) - x_ND[0]).abs().max() > step / 4


def test_half_the_precision_of_bf16_rows_is_sent_whole() -> None:
    codec = make_codec("bf16")
    assert codec is not None
    x_ND = rows(5, 64, torch.bfloat16)
    assert torch.equal(codec.decode(codec.encode(x_ND), 64, torch.bfloat16), x_ND)


def test_a_wrong_name_is_told() -> None:
    with pytest.raises(
        ConfigError, match=r"dispatch_wire: 'int9' is not one of none, bf16.* Did you mean 'int8'"
    ):
        check_codec("int9", "dispatch_wire")
    with pytest.raises(ConfigError, match="combine_wire"):
        Wires("none", "zip")


def fly(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows to both ranks and their gradients back: what arrived, and the gradients sent and returned."""
    assert dist.group.WORLD is not None
    rank = dist.get_rank()
    sizes = [[2, 3], [4, 1]]
    flight = Flight(
        Lanes(dist.group.WORLD, dist.group.WORLD), sizes[rank], [s[rank] for s in sizes], make_codec(name)
    )
    x_PD = rows(5, 130).requires_grad_()
    y_ND = flight.arrive(flight.depart(x_PD))
    y_ND.backward(y_ND.detach() * 3)
    assert x_PD.grad is not None
    return x_PD.detach(), y_ND.detach(), x_PD.grad


@pytest.mark.parametrize("name", ["none", *CODECS])
def test_only_what_changes_ranks_is_encoded(name: str, ranks2: RankPool) -> None:
    (x0, y0, grad0), (x1, y1, grad1) = ranks2.run(fly, name)
    assert torch.equal(y0[:2], x0[:2])
    assert torch.equal(y1[3:], x1[4:])
    assert torch.equal(grad0[:2], 3 * x0[:2])
    crossed = [(y0[2:], x1[:4]), (y1[:3], x0[2:]), (grad0[2:] / 3, x0[2:]), (grad1[:4] / 3, x1[:4])]
    for arrived, sent in crossed:
        error = (arrived - sent).norm() / sent.norm()
        assert error < 1e-6 if name == "none" else 0 < error < 4 * WORST[name]
