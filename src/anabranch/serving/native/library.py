"""The C++ library's functions and structures, as model.h and library.cpp declare them."""

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache

from anabranch.serving.native.build import build


class Layer(ctypes.Structure):
    """`AnabranchLayer`."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "attention_norm", "mlp_norm", "q_norm", "k_norm", "qkv", "qkv_bias", "out", "out_bias", "router", "gate_up",
            "down", "shared_gate_up", "shared_down", "shared_gate",
        )),
        *((name, c_int32) for name in ("experts", "top_k", "width", "shared_width", "first_record")),
    )  # fmt: skip


class Store(ctypes.Structure):
    """`AnabranchStore`."""

    _fields_ = (
        *((name, c_int32) for name in ("file", "slots", "records")),
        *((name, c_int64) for name in ("first_byte", "record_bytes")),
        *((name, c_void_p) for name in ("arena", "checksums", "wanted", "needed", "figures")),
    )


class Model(ctypes.Structure):
    """`AnabranchModel`."""

    _fields_ = (
        *((name, c_int32) for name in (
            "weights", "layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "rotary_dim",
            "normalise_top_k", "qk_norm_all",
        )),
        ("eps", c_float),
        *((name, c_void_p) for name in ("embedding", "final_norm", "head", "cosines", "sines")),
        ("layer", POINTER(Layer)),
        ("store", POINTER(Store)),
    )  # fmt: skip


class Rows(ctypes.Structure):
    """`AnabranchRows`."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "wanted", "one_each", "table_stride")),
        *((name, c_void_p) for name in ("token", "position", "length", "chain", "table", "want")),
        ("pool", c_void_p * 4),
        ("pool_pages", c_int32 * 4),
        *((name, c_void_p) for name in ("logits", "best", "log_total", "routed", "mass")),
    )


class Heads(ctypes.Structure):
    """`AnabranchHeads`."""

    _fields_ = (("data", c_void_p), *((name, c_int64) for name in ("sequence", "head", "token")))


class Attention(ctypes.Structure):
    """`AnabranchAttention`."""

    _fields_ = (
        *((name, c_int32) for name in ("sequences", "heads", "kv_heads", "rows", "tokens", "dim")),
        ("scale", c_float),
        *((name, Heads) for name in ("query", "key", "value")),
        *((name, c_void_p) for name in ("first", "last", "out")),
    )


@cache
def library() -> ctypes.CDLL:
    """The library of this machine, with typed functions. Raises BuildError."""
    made = build()
    made.anabranch_open.argtypes, made.anabranch_open.restype = [POINTER(Model), c_int], c_void_p
    made.anabranch_close.argtypes, made.anabranch_close.restype = [c_void_p], None
    made.anabranch_step.argtypes, made.anabranch_step.restype = [c_void_p, POINTER(Rows)], c_int
    made.anabranch_draw.argtypes = [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_int, c_void_p]
    made.anabranch_draw.restype = None
    made.anabranch_page_bytes.argtypes = [c_int, c_int, c_int, c_int]
    made.anabranch_page_bytes.restype = c_int64
    made.anabranch_rewrite.argtypes = [POINTER(c_void_p), POINTER(c_int32), *[c_int] * 3, *[c_int32] * 2]
    made.anabranch_rewrite.restype = None
    made.anabranch_product.argtypes = [*[c_void_p] * 4, *[c_int] * 3]
    made.anabranch_product.restype = None
    made.anabranch_attention.argtypes, made.anabranch_attention.restype = [POINTER(Attention)], None
    made.anabranch_checksum.argtypes, made.anabranch_checksum.restype = [c_void_p, c_int64], c_uint64
    return made
