"""Row movement inside one rank, against plain indexing."""

import pytest
import torch
from torch import Tensor

from anabranch.transport.rows import fan_in, permute, spread, weigh
from anabranch.transport.segments import inverse_order


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_spread_and_permute_are_indexing() -> None:
    order_P = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    inverse_P = inverse_order(order_P)
    x_SD = random(4, 5).requires_grad_()
    torch.testing.assert_close(spread(x_SD, order_P, inverse_P, 3), x_SD[order_P // 3], rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x: spread(x, order_P, inverse_P, 3), (x_SD,))
    x_PD = random(12, 5).requires_grad_()
    torch.testing.assert_close(permute(x_PD, order_P, inverse_P), x_PD[order_P], rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x: permute(x, order_P, inverse_P), (x_PD,))


def test_weigh_and_fan_in_have_right_gradients() -> None:
    y_SKD, weights_SK = random(4, 3, 5).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    torch.testing.assert_close(weigh(y_SKD, weights_SK), (y_SKD * weights_SK.unsqueeze(-1)).sum(dim=1))
    assert torch.autograd.gradcheck(weigh, (y_SKD, weights_SK))
    y_ND, weight_N, token_N = (
        random(6, 5).requires_grad_(),
        random(6).requires_grad_(),
        torch.tensor([2, 0, 2, 2, 1, 0]),
    )
    assert torch.autograd.gradcheck(lambda y, w: fan_in(y, w, token_N, 4), (y_ND, weight_N))
    assert fan_in(y_ND, weight_N, token_N, 4)[3].abs().sum() == 0.0


@pytest.mark.parametrize("tokens", [0, 4])
def test_what_leaves_the_layer_is_no_view(tokens: int) -> None:
    """FSDP2 hooks it, and a model may add to it in place."""
    assert weigh(random(tokens, 3, 5).requires_grad_(), random(tokens, 3))._base is None


def test_weights_keep_their_precision() -> None:
    """Routing weights in fp32 with rows in bf16: products and sums in fp32, as in the models' own experts."""
    y_SKD = random(64, 2, 8).bfloat16().requires_grad_()
    weights_SK = torch.rand(64, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    out_SD = weigh(y_SKD, weights_SK)
    assert out_SD.dtype == torch.float32
    torch.testing.assert_close(out_SD, (y_SKD.float() * weights_SK.unsqueeze(-1)).sum(dim=1))
    out_SD.sum().backward()
    assert (y_SKD.grad.dtype, weights_SK.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(weights_SK.grad, y_SKD.detach().float().sum(dim=-1))


def test_fan_in_accumulates_in_fp32() -> None:
    """300 ones: a sum in bf16 stops at 256, for 256 + 1 rounds back to it."""
    ones_ND, token_N = torch.ones(300, 2, dtype=torch.bfloat16), torch.zeros(300, dtype=torch.int64)
    summed_UD = fan_in(ones_ND, torch.ones(300), token_N, 1)
    assert summed_UD.dtype == torch.bfloat16
    assert summed_UD.tolist() == [[300.0, 300.0]]
