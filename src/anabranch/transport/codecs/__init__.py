"""Wire codecs: the form in which rows cross a link."""

from anabranch.transport.codecs.base import Codec
from anabranch.transport.codecs.choose import CODECS, check_codec, make_codec

__all__ = ["CODECS", "Codec", "check_codec", "make_codec"]
