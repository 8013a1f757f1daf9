"""What a lab delivers against what was set: every link, both ways at once, and every rank's quota."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import count, permutations
from typing import NamedTuple

from anabranch.errors import AnabranchError
from anabranch.lab import network, probe
from anabranch.lab.cluster import Lab

PORTS = range(20_000, 29_000)
SECONDS = 1.0


class Finding(NamedTuple):
    """kind: "inter" (one pair of nodes, one direction), "both_ways" (the same while the other direction is
    busy too), "intra" (within one node) or "cpu" (one rank, while all ranks are busy). where: "0>1", "node 0",
    "rank 3". unit: "mbit" or "cores". set: None where not limited. percent: delivered of set, or None.
    """

    kind: str
    where: str
    unit: str
    set: float | None
    delivered: float
    percent: float | None


def check(lab: Lab, seconds: float = SECONDS) -> Iterator[Finding]:
    """Measure one thing after the other, `seconds` each. Raises AnabranchError where a probe fails.

    Everything an idle link delivers is the machine's, so figures of unlimited links are the CPU's.
    """
    ports = count(PORTS.start)
    nodes, inter_mbit = range(lab.spec.nodes), lab.spec.inter_mbit
    for pair in permutations(nodes, 2):
        yield _finding("inter", _way(pair), "mbit", inter_mbit, _links(lab, [pair], ports, seconds)[0])
    if lab.spec.nodes > 1:
        ways = [(0, 1), (1, 0)]
        for way, mbit in zip(ways, _links(lab, ways, ports, seconds), strict=True):
            yield _finding("both_ways", _way(way), "mbit", inter_mbit, mbit)
    for node in nodes:
        mbit = _links(lab, [(node, node)], ports, seconds)[0]
        yield _finding("intra", f"node {node}", "mbit", lab.spec.intra_mbit, mbit)
    for rank, cores in enumerate(_quotas(lab, seconds)):
        yield _finding("cpu", f"rank {rank}", "cores", lab.spec.cpu, cores)


def _finding(kind: str, where: str, unit: str, goal: float | None, delivered: float) -> Finding:
    percent = None if goal is None else round(100 * delivered / goal, 1)
    return Finding(kind, where, unit, goal, round(delivered, 3), percent)


def _way(pair: tuple[int, int]) -> str:
    return f"{pair[0]}>{pair[1]}"


def _links(lab: Lab, ways: list[tuple[int, int]], ports: Iterator[int], seconds: float) -> list[float]:
    """Megabits a second over each (from, to), all at once."""
    ends = [(source, target, str(next(ports))) for source, target in ways]
    sinks = [
        _probe(lab, target, "sink", network.address(target), port, str(seconds)) for _, target, port in ends
    ]
    for sink in sinks:
        assert sink.stdout is not None
        sink.stdout.readline()
    sources = [_probe(lab, node, "source", network.address(target), port) for node, target, port in ends]
    delivered = [_figure(sink) for sink in sinks]
    for source in sources:
        source.communicate()
    return delivered


def _quotas(lab: Lab, seconds: float) -> list[float]:
    """The cores that each rank gets while all are busy."""
    nodes = [rank // lab.spec.ranks_per_node for rank in range(lab.spec.ranks)]
    busy = [_probe(lab, node, "spin", str(seconds), rank=rank) for rank, node in enumerate(nodes)]
    return [_figure(one) for one in busy]


def _probe(lab: Lab, node: int, *part: str, rank: int | None = None) -> subprocess.Popen[str]:
    return lab.spawn(node, [sys.executable, "-P", probe.__file__, *part], rank=rank)


def _figure(one: subprocess.Popen[str]) -> float:
    """The last line of a probe."""
    told = one.communicate()[0].split()
    if one.returncode or not told:
        raise AnabranchError("a probe failed; its complaint is above", setting="lab")
    return float(told[-1])
