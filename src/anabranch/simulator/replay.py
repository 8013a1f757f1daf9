"""Discrete events: lanes that carry out programs, wait for each other, and leave spans of time behind.

A lane is a rank (or ranks that always do the same). Its program is a sequence of instructions. An event happens at a
time and returns the events that follow from it; a heap yields them in order of time, and of their making where times
are equal, so that a replay is always the same.
"""

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Key = tuple[str | int, ...]
WAITING = "waiting"


class Work(NamedTuple):
    """The lane alone is busy."""

    name: str
    seconds: float


class Meet(NamedTuple):
    """All `members` take part: it begins when the last one has come, and ends for all together."""

    name: str
    key: Key
    members: Sequence[int]
    seconds: float


class Send(NamedTuple):
    """A message is on its way for `seconds`; the lane goes on at once. key: names it, once in a replay."""

    key: Key
    seconds: float


class Receive(NamedTuple):
    """The lane waits for a message."""

    key: Key


Instruction = Work | Meet | Send | Receive


class Span(NamedTuple):
    """What a lane did, from when on, for how long."""

    lane: int
    name: str
    start_s: float
    seconds: float


@dataclass
class World:
    """What is under way. spans: of all lanes, each lane's in order of time."""

    programs: Sequence[Iterator[Instruction]]
    spans: list[Span] = field(default_factory=list[Span])
    came: dict[Key, dict[int, float]] = field(default_factory=dict[Key, dict[int, float]])
    arrived: set[Key] = field(default_factory=set[Key])
    waiting: dict[Key, "Turn"] = field(default_factory=dict[Key, "Turn"])

    def spend(self, lane: int, name: str, start_s: float, seconds: float) -> None:
        if seconds > 0:
            self.spans.append(Span(lane, name, start_s, seconds))


class Turn(NamedTuple):
    """A lane comes to its next instruction."""

    time_s: float
    lane: int

    def happen(self, world: World) -> "list[Event]":
        now_s, lane = self
        match next(world.programs[lane], None):
            case Work(name, seconds):
                world.spend(lane, name, now_s, seconds)
                return [Turn(now_s + seconds, lane)]
            case Meet() as meet:
                return self._meet(meet, world)
            case Send(key, seconds):
                return [Arrival(now_s + seconds, key), self]
            case Receive(key) if key in world.arrived:
                return [self]
            case Receive(key):
                world.waiting[key] = self
                return []
            case None:
                return []

    def _meet(self, meet: Meet, world: World) -> "list[Event]":
        came = world.came.setdefault(meet.key, {})
        came[self.lane] = self.time_s
        if len(came) < len(meet.members):
            return []
        del world.came[meet.key]
        for lane, since_s in came.items():
            world.spend(lane, WAITING, since_s, self.time_s - since_s)
            world.spend(lane, meet.name, self.time_s, meet.seconds)
        return [Turn(self.time_s + meet.seconds, lane) for lane in meet.members]


class Arrival(NamedTuple):
    """A message comes in."""

    time_s: float
    key: Key

    def happen(self, world: World) -> "list[Event]":
        world.arrived.add(self.key)
        turn = world.waiting.pop(self.key, None)
        if turn is None:
            return []
        world.spend(turn.lane, WAITING, turn.time_s, self.time_s - turn.time_s)
        return [Turn(self.time_s, turn.lane)]


Event = Turn | Arrival


@dataclass(frozen=True)
class Replay:
    """A replay that has ended. lanes: how many."""

    spans: Sequence[Span]
    lanes: int

    @property
    def makespan_s(self) -> float:
        """When the last lane ends."""
        return max((span.start_s + span.seconds for span in self.spans), default=0.0)

    def seconds(self, name: str) -> float:
        """Spent on `name`, the mean over lanes."""
        return sum(span.seconds for span in self.spans if span.name == name) / self.lanes

    def write_trace(self, file: Path, ranks: int) -> None:
        """For chrome://tracing and Perfetto (the Trace Event Format, microseconds): each `ranks` lanes are a stage."""
        events: list[dict[str, Any]] = [
            {"name": f"{kind}_name", "ph": "M", "pid": lane // ranks, "tid": lane, "args": {"name": name}}
            for lane in range(self.lanes)
            for kind, name in (("process", f"stage {lane // ranks}"), ("thread", f"rank {lane % ranks}"))
        ]
        for lane, name, start_s, seconds in self.spans:
            times = {"ts": round(start_s * 1e6, 3), "dur": round(seconds * 1e6, 3)}
            events.append({"name": name, "ph": "X", "pid": lane // ranks, "tid": lane, **times})
        file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def replay(programs: Sequence[Iterable[Instruction]]) -> Replay:
    """Carry out one program a lane, from time 0 until nothing is left to do."""
    world = World([iter(program) for program in programs])
    heap: list[tuple[float, int, Event]] = [(0.0, lane, Turn(0.0, lane)) for lane in range(len(programs))]
    made = len(heap)
    while heap:
        for event in heapq.heappop(heap)[2].happen(world):
            heapq.heappush(heap, (event.time_s, made, event))
            made += 1
    assert not world.came and not world.waiting, "lanes wait for each other for ever"
    return Replay(world.spans, len(programs))
