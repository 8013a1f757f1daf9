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
# A client that streams leaves at most so long after the answer has begun; another at most so long after it asked, by
# when its turn has come on a machine that answers in ten seconds.
LEAVE_STREAM_S, LEAVE_WHOLE_S = 2.0, 20.0
# A client waits so long on average between requests.
PAUSE_S = 1.0


class Case(NamedTuple):
    """A prompt, how many tokens are asked for, and the text that must come."""

    prompt: str
    tokens: int
    text: str


class Leave(NamedTuple):
    """When a client cuts its connection: so long after it asked, or after the first of the answer's body."""

    after_s: float
    once_begun: bool


class Reply(NamedTuple):
    """status: 0 where the connection broke before the head, or the body ended early. left: the client cut it; content
    is what had come by then."""

    status: int
    content: bytes
    retry_s: float
    left: bool = False


@dataclass
class Tally:
    """What came of all requests. An outcome is "action: status or what else"."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    latencies_s: list[float] = field(default_factory=list[float])


class Client:
    """Sends one request after the other while `going` is set. `busy` tells that one is under way."""

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
        case, leave = self._random.choice(self._cases), None
        body: dict[str, Any] = {"model": "soak", "prompt": case.prompt, "max_tokens": case.tokens}
        body |= {"temperature": 0, "stream": "stream" in action}
        if action == "samples":
            body |= {"temperature": 1, "n": 4}
        if action.startswith("leave"):
            body |= {"n": 2, "max_tokens": LEFT_TOKENS}
            most_s = LEAVE_STREAM_S if body["stream"] else LEAVE_WHOLE_S
            leave = Leave(self._random.uniform(0, most_s), body["stream"])
        content = json.dumps(body).encode()
        if action == "oversized":
            content = b" " * self._random.randint(self._limit + 1, 20 * self._limit)
        if action == "malformed":
            content = self._random.choice(RUBBISH)
        return await post(self._port, content, leave), case

    def _judge(self, action: str, reply: Reply, case: Case) -> str:
        """The status, or for a greedy answer whether it is right; of an error, whether it says what it is."""
        if reply.left:
            return "left midway" if reply.content else "left"
        if reply.status == 0:
            return "broken"
        try:
            if reply.status != 200:
                return str(reply.status) if _clear(json.loads(reply.content)) else f"unclear {reply.status}"
            if action == "whole":
                return self._compared(case, json.loads(reply.content)["choices"][0]["text"])
            if action in ("stream", "leave_stream"):
                return self._streamed(case, reply.content, compare=action == "stream")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return f"unreadable ({type(error).__name__})"
        return "200"

    def _streamed(self, case: Case, content: bytes, *, compare: bool) -> str:
        events = [e.removeprefix(b"data: ") for e in content.split(b"\n\n") if e]
        if b'"error"' in events[-1]:
            return "error event" if _clear(json.loads(events[-1])) else "unclear error event"
        if events[-1] != b"[DONE]":
            return "broken"
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        return self._compared(case, text) if compare else "200"

    def _compared(self, case: Case, text: str) -> str:
        if text == case.text:
            return "right"
        self._tally.wrong.append(f"{case.prompt!r}, {case.tokens} tokens: {text!r} instead of {case.text!r}")
        return "wrong"


def _clear(body: Any) -> bool:
    """Whether an error says in words what is wrong."""
    return bool(body["error"]["message"].strip())


async def post(port: int, content: bytes, leave: Leave | None = None) -> Reply:
    """One request on a connection of its own."""
    head = (
        f"POST {ENDPOINT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return await _exchange(port, head.encode() + content, leave)


async def get(port: int, path: str) -> Reply:
    """A page."""
    return await _exchange(
        port, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode(), None
    )


async def _exchange(port: int, request: bytes, leave: Leave | None) -> Reply:
    received, writer, left = bytearray(), None, False
    clock = asyncio.get_running_loop().time
    at_once = leave is not None and not leave.once_begun
    try:
        async with asyncio.timeout(leave.after_s if leave is not None and at_once else REPLY_S) as limit:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await writer.drain()
            while piece := await reader.read(1 << 16):
                begun = bool(_body(received))
                received += piece
                if leave is not None and leave.once_begun and not begun and _body(received) and _ok(received):
                    limit.reschedule(clock() + leave.after_s)
                    left = True
    except TimeoutError:
        if at_once or left:
            return Reply(0, _body(received), 0.0, left=True)
        return Reply(0, b"", 0.0)
    except OSError:
        return Reply(0, b"", 0.0)
    finally:
        if writer is not None:
            writer.transport.abort()
    return _reply(bytes(received))


def _body(received: bytes | bytearray) -> bytes:
    return bytes(received.partition(b"\r\n\r\n")[2])


def _ok(received: bytes | bytearray) -> bool:
    return received.split(b" ", 2)[1:2] == [b"200"]


def _reply(received: bytes) -> Reply:
    """All that came on a connection that the server closed."""
    head, ended, content = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    if not ended:
        return Reply(0, b"", 0.0)
    if fields.get("transfer-encoding") == "chunked":
        joined = _joined(content)
    else:
        joined = content if len(content) == int(fields.get("content-length", len(content))) else None
    if joined is None:
        return Reply(0, content, 0.0)
    return Reply(int(lines[0].split()[1]), joined, float(fields.get("retry-after", 0)))


def _joined(content: bytes) -> bytes | None:
    """A chunked body without its lengths; None where it ends early."""
    parts: list[bytes] = []
    while content:
        size, _, content = content.partition(b"\r\n")
        try:
            length = int(size, 16)
        except ValueError:
            return None
        if length == 0:
            return b"".join(parts)
        if len(content) < length + 2:
            return None
        parts.append(content[:length])
        content = content[length + 2 :]
    return None
