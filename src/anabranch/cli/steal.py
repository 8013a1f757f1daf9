"""CPU time that a hypervisor gave to others while this machine wanted it."""

from pathlib import Path

# The first line of /proc/stat: ticks of all processors by what they did, the eighth of them stolen (proc(5)).
STAT = Path("/proc/stat")
STOLEN, COUNTED = 7, 8


class Steal:
    """Measures from one `part` to the next. Where nothing is counted, nothing is stolen."""

    def __init__(self) -> None:
        self._before = _ticks()

    def part(self) -> float:
        """Of all CPU time since the last call, or since the beginning: the stolen part."""
        now = _ticks()
        spent = [after - before for before, after in zip(self._before, now, strict=True)]
        self._before = now
        return spent[STOLEN] / max(1, sum(spent))


def _ticks() -> list[int]:
    try:
        fields = STAT.read_text().split("\n", 1)[0].split()[1 : COUNTED + 1]
        return [int(field) for field in fields] + [0] * (COUNTED - len(fields))
    except (OSError, ValueError):
        return [0] * COUNTED
