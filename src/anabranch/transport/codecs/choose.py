"""The registry of wire codecs."""

import difflib

from anabranch.errors import ConfigError
from anabranch.transport.codecs.base import Codec
from anabranch.transport.codecs.bf16 import Bf16
from anabranch.transport.codecs.fp8 import Fp8
from anabranch.transport.codecs.int8 import Int8, Int8Stochastic

CODECS: dict[str, type[Codec]] = {cls.name: cls for cls in (Bf16, Int8, Int8Stochastic, Fp8)}


def check_codec(name: str, setting: str) -> None:
    """Raise ConfigError naming `setting` unless `name` is `none` or a registered codec."""
    if name == "none" or name in CODECS:
        return
    near = difflib.get_close_matches(name, ["none", *CODECS], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name!r} is not one of none, {', '.join(CODECS)}.{hint}", setting=setting)


def make_codec(name: str) -> Codec | None:
    """The codec called `name`; None for `none`, which sends rows as they are."""
    check_codec(name, "wire")
    return None if name == "none" else CODECS[name]()
