"""Memory of this process."""

import mmap

from anabranch.telemetry.memory import peak_resident_bytes, resident_bytes

SIZE = 64 << 20


def test_what_is_touched_is_counted() -> None:
    before = resident_bytes()
    # Pages of its own: an allocator may hand out what this process already holds.
    with mmap.mmap(-1, SIZE) as block:
        block.write(b"x" * SIZE)
        during = resident_bytes()
    assert during - before >= SIZE - (4 << 20)
    assert peak_resident_bytes() >= during - (1 << 20)
