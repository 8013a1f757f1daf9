"""Pages in every format: what C++ codes is what torch reads, and attention over codes is attention over their numbers.

Shape suffixes as in serving/step/base.py.
"""

import heapq
import inspect
from ctypes import c_int32, c_void_p

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.pages import PAGE
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.decoder import read_decoder
from anabranch.serving.engine import Engine, EngineSettings
from anabranch.serving.native.library import library
from anabranch.serving.pools import FORMATS, KvShape, allocate, decode, first_page
from anabranch.serving.step.base import Rows
from anabranch.serving.step.native import NativeStep

SHAPE = KvShape(layers=2, heads=3, dim=48)


def page_of(kind: str, keys: Tensor, values: Tensor) -> Tensor:
    """Bytes of a page (layers * heads, bytes of a head) with keys (layers, heads, dim, 16) and values (.., 16, dim)."""
    parts = [keys, values]
    if kind == "bfloat16":  # two lines lie number by number side by side
        parts = [part.unflatten(-2, (-1, 2)).transpose(-1, -2) for part in parts]
    numbers = torch.cat([part.flatten(2) for part in parts], -1).flatten(0, 1)
    return numbers.to(getattr(torch, kind)).contiguous().view(torch.uint8)


def quantised(shape: KvShape, source: str, kind: str, numbers: Tensor) -> tuple[Tensor, ...]:
    """A page of `numbers` (layers, heads, 2 * 16 * dim): as kept in `source` and as coded in `kind`."""
    pools = {name: allocate(shape, name, 3) for name in FORMATS}
    keys, values = numbers.chunk(2, -1)
    pools[source][1] = page_of(
        source, keys.unflatten(-1, (shape.dim, PAGE)), values.unflatten(-1, (PAGE, shape.dim))
    )
    pointers = (c_void_p * len(FORMATS))(*(pools[name].data_ptr() for name in FORMATS))
    pages = (c_int32 * len(FORMATS))(*(len(pools[name]) for name in FORMATS))
    library().anabranch_rewrite(
        pointers, pages, shape.layers, shape.heads, shape.dim, first_page(source) + 1, first_page(kind) + 2
    )
    return *decode(shape, source, pools[source][1:2]), *decode(shape, kind, pools[kind][2:3])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dim", [16, 48, 128])
def test_page_bytes_are_those_of_the_library(kind, dim):
    assert library().anabranch_page_bytes(2, 3, dim, FORMATS.index(kind)) == KvShape(2, 3, dim).page_bytes(
        kind
    )


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_are_within_half_a_step_of_the_numbers(source, kind):
    torch.manual_seed(0)
    # Channels of very different sizes and offsets, as keys have them.
    numbers = torch.randn(SHAPE.layers, SHAPE.heads, 2 * PAGE * SHAPE.dim)
    numbers[..., : PAGE * SHAPE.dim] *= torch.rand(SHAPE.dim).mul(10).repeat_interleave(PAGE)
    numbers[..., : PAGE * SHAPE.dim] += torch.rand(SHAPE.dim).mul(5).repeat_interleave(PAGE)
    keys, values, coded_keys, coded_values = quantised(SHAPE, source, kind, numbers)
    for true, coded in ((keys, coded_keys), (values, coded_values)):
        if kind == "int8":
            # Scales are an eighth of an octave apart, and the first codes of all lines carry the bits of theirs: two
            # lines lie side by side.
            step = 2**0.125 * true.abs().amax(-1, keepdim=True) / 127
            lines, line = true.shape[-2:]
            place = torch.arange(lines).unsqueeze(-1) // 2 * 2 * line + 2 * torch.arange(line)
            most = step * torch.where(place < 8 * lines, 1.0, 0.5)
        else:
            # bf16 scales and zeros have 8 bits: the scale is up to 2^-7 larger, the zero 2^-8 of itself off.
            step = (true.amax(-1, keepdim=True) - true.amin(-1, keepdim=True)) / 15
            most = step * (0.5 + 2**-6) + true.amin(-1, keepdim=True).abs() * 2**-8
        assert bool(((true - coded).abs() <= most * (1 + 1e-5) + 1e-6).all())
        assert (true - coded).abs().max() > 0


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3, 1.0, 6e4, 1e6])
def test_int8_holds_numbers_of_every_size(size):
    numbers = torch.linspace(-size, size, 2 * PAGE * SHAPE.dim).repeat(SHAPE.layers, SHAPE.heads, 1)
    keys, values, coded_keys, coded_values = quantised(SHAPE, "float32", "int8", numbers)
    for true, coded in ((keys, coded_keys), (values, coded_values)):
        # Below and above what there are scales for: an absolute error, and the largest number there is.
        torch.testing.assert_close(coded, true.clamp(-119_000, 119_000), rtol=0, atol=max(3e-7, size / 100))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_equal_numbers_have_exact_codes(kind):
    numbers = torch.full((SHAPE.layers, SHAPE.heads, 2 * PAGE * SHAPE.dim), 0.5)
    numbers[0] = 0.0
    keys, values, coded_keys, coded_values = quantised(SHAPE, "float32", kind, numbers)
    torch.testing.assert_close(coded_keys, keys, rtol=2**-7, atol=0)
    torch.testing.assert_close(coded_values, values, rtol=2**-7, atol=0)
    assert bool((coded_keys[0, 0] == 0).all())


@pytest.mark.parametrize(("source", "kind"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_plain_formats_are_rewritten_by_rounding(source, kind):
    numbers = torch.randn(SHAPE.layers, SHAPE.heads, 2 * PAGE * SHAPE.dim)
    keys, values, coded_keys, coded_values = quantised(SHAPE, source, kind, numbers)
    assert torch.equal(coded_keys, keys.to(getattr(torch, kind)).float())
    assert torch.equal(coded_values, values.to(getattr(torch, kind)).float())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_attention_over_codes_is_attention_over_their_numbers(model, wide, kind):
    shape = KvShape(2, 2, 16)
    pools = {name: allocate(shape, name, 8) for name in (wide, kind)}
    step = NativeStep(read_decoder(model), wide, pools, 128, 1)
    text = np.frombuffer(inspect.getsource(heapq).encode()[:41], dtype=np.uint8).astype(np.int32)
    table = np.full((1, 8), first_page(wide), dtype=np.int32) + np.arange(8, dtype=np.int32)

    def logits(first: int, last: int) -> Tensor:
        position = np.arange(first, last, dtype=np.int32)
        rows = Rows(text[first:last], position, position + 1, np.zeros_like(position), table,
                    np.array([last - first - 1], dtype=np.int32), last - first == 1)  # fmt: skip
        return step.run(rows).logits_WV.clone()

    logits(0, 40)
    exact = logits(40, 41)
    for page in range(2):
        step.rewrite(int(table[0, page]), first_page(kind) + page)
    wide_pages = table.copy()
    table[0, :2] = [first_page(kind), first_page(kind) + 1]
    coded = logits(40, 41)
    # The numbers of the codes, kept wide; bf16 rounds them once more.
    keys, values = decode(shape, kind, pools[kind][:2])
    for page in range(2):
        pools[wide][page] = page_of(wide, keys[page], values[page])
    table[:] = wide_pages
    numbers_kept_wide = logits(40, 41)
    tolerance = 1e-5 if wide == "float32" else 2e-2
    torch.testing.assert_close(coded, numbers_kept_wide, rtol=tolerance, atol=tolerance)
    assert not torch.equal(coded, exact)
    step.close()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_what_pages_held_before_changes_nothing(model, kind):
    asked = [Request(tuple(range(1, 1 + n)), 9) for n in (5, 20)]
    found = []
    for before in (0, 255):  # zeros, and what is no number in any format
        settings = EngineSettings(kind, step="native", threads=2, kv_memory_mib=1, limits=Limits(tokens=64))
        with Engine(model, settings) as engine:
            engine.pools[kind].fill_(before)
            found.append(engine.generate(asked))
    assert found[0] == found[1]


def test_the_torch_step_refuses_coded_pages(model):
    with pytest.raises(ConfigError, match="precision that it computes in"):
        Engine(model, EngineSettings(step="torch", kv_dtype="int4", kv_memory_mib=1))


# 2^44 pages are more than an address has bits for, 2^60 more than the system's call counts.
@pytest.mark.parametrize("pages", [1 << 44, 1 << 60])
def test_more_pages_than_the_system_has_memory_for_are_refused(pages):
    with pytest.raises(ConfigError, match="kv_memory_mib: the system does not grant"):
        allocate(KvShape(2, 2, 64), "bfloat16", pages)
