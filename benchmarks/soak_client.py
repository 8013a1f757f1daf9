"""Clients of the soak: good ones, and those that leave, flood and send rubbish. HTTP by hand, so that they may."""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ENDPOINT = "/v1/completions"
# What a client does, and how often.
ACTIONS = {
    "whole": 50, "stream": 20, "samples": 5, "leave_stream": 8, "leave_whole": 7, "oversized": 5, "malformed": 5,
}  # fmt: skip
RUBBISH = (
    b"{",
    b"[]",
    b"\xff\xfe\x00",
    b'{"model": "soak"}',
    b'{"model": "soak", "prompt": "x", "colour": 1}',
)
REPLY_S = 120.0
# Of an answer whose client leaves: more than it waits for.
LEFT_TOKENS = 1500
# A client waits so long on average between requests.
PAUSE_S = 1.0


class Case(NamedTuple):
    """A prompt, how many tokens are asked for, and the text that must come."""

    prompt: str
    tokens: int
    text: str


class Reply(NamedTuple):
    """status: 0 where the connection broke before the head, or the body ended early."""

    status: int
    content: bytes
    retry_s: float


@dataclass
class Tally:
    """What came of all requests. An outcome is "action: status or what else"."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    latencies_s: list[float] = field(default_factory=list[float])


class Client:
    """Sends one request after the other while `going` is set. `paused` tells that none is under way."""

    def __init__(
        self, number: int, port: int, cases: list[Case], limit: int, going: asyncio.Event, tally: Tally
    ) -> None:
        self._random, self._port, self._cases = random.Random(number), port, cases
        self._limit, self._going, self._tally = limit, going, tally
        self.busy = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._going.wait()
            await asyncio.sleep(self._random.expovariate(1 / PAUSE_S))
            if not self._going.is_set():
                continue
            self.busy = True
            try:
                action = self._random.choices(list(ACTIONS), list(ACTIONS.values()))[0]
                begun_s = time.monotonic()
                reply, case = await self._act(action)
            finally:
                self.busy = False
            outcome = self._judge(action, reply, case)
            if outcome in ("right", "200"):
                self._tally.latencies_s.append(time.monotonic() - begun_s)
            self._tally.outcomes[f"{action}: {outcome}"] += 1
            await asyncio.sleep(reply.retry_s * self._random.uniform(0.5, 2))

    async def _act(self, action: str) -> tuple[Reply, Case]:
        case, leave_s = self._random.choice(self._cases), None
        body: dict[str, Any] = {"model": "soak", "prompt": case.prompt, "max_tokens": case.tokens}
        body |= {"temperature": 0, "stream": "stream" in action}
        if action == "samples":
            body |= {"temperature": 1, "n": 4}
        if action.startswith("leave"):
            body |= {"n": 2, "max_tokens": LEFT_TOKENS}
            leave_s = self._random.uniform(0, 1.0)
        content = json.dumps(body).encode()
        if action == "oversized":
            content = b" " * self._random.randint(self._limit + 1, 20 * self._limit)
        if action == "malformed":
            content = self._random.choice(RUBBISH)
        return await post(self._port, content, leave_s), case

    def _judge(self, action: str, reply: Reply, case: Case) -> str:
        """The status, or for a greedy answer whether it is right."""
        if reply.status != 200 or action not in ("whole", "stream"):
            return str(reply.status) if reply.status else "left" if action.startswith("leave") else "broken"
        if action == "whole":
            text = json.loads(reply.content)["choices"][0]["text"]
        else:
            events = [e.removeprefix(b"data: ") for e in reply.content.split(b"\n\n") if e]
            if b'"error"' in events[-1]:
                return "error event"
            if events[-1] != b"[DONE]":
                return "broken"
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        if text == case.text:
            return "right"
        self._tally.wrong.append(f"{case.prompt!r}, {case.tokens} tokens: {text!r} instead of {case.text!r}")
        return "wrong"


async def post(port: int, content: bytes, leave_s: float | None = None) -> Reply:
    """One request on a connection of its own, which is cut after `leave_s`."""
    head = (
        f"POST {ENDPOINT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return await _exchange(port, head.encode() + content, REPLY_S if leave_s is None else leave_s)


async def get(port: int, path: str) -> Reply:
    """A page."""
    return await _exchange(
        port, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode(), REPLY_S
    )


async def _exchange(port: int, request: bytes, within_s: float) -> Reply:
    writer = None
    try:
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            content = await reader.read()
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        return Reply(0, b"", 0.0)
    finally:
        if writer is not None:
            writer.transport.abort()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    if fields.get("transfer-encoding") == "chunked":
        content = _joined(content)
    return Reply(int(head.split()[1]), content, float(fields.get("retry-after", 0)))


def _joined(content: bytes) -> bytes:
    """A chunked body without its lengths."""
    parts: list[bytes] = []
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        parts.append(content[:length])
        content = content[length + 2 :]
    return b"".join(parts)
