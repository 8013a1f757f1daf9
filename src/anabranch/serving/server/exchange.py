"""One request for tokens, from its head to the last piece of its answer."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from anabranch.serving.server.backend import Backend
from anabranch.serving.server.choices import pieces
from anabranch.serving.server.config import ServerSettings
from anabranch.serving.server.formats import Format
from anabranch.serving.server.gate import Gate
from anabranch.serving.server.metrics import Metrics
from anabranch.serving.server.reading import Asked, Reader
from anabranch.serving.server.refusal import ApiError

# The body of a refused request is read on so far, so that its client reads the refusal and not a broken pipe.
DISCARDED_BYTES = 32 << 20
CLIENT_LEFT = 499  # of metrics only; nginx's number


class ClientLeftError(Exception):
    """The client has closed its connection, or takes nothing any more."""


@dataclass
class Front:
    """What all requests share. `thread`: where bodies are understood, one at a time, off the event loop."""

    settings: ServerSettings
    reader: Reader
    backend: Backend
    gate: Gate
    metrics: Metrics
    thread: ThreadPoolExecutor


class Exchange(Response):
    """Reads, waits its turn, computes and answers, watching all the while whether the client is still there.

    Its pages are free as soon as it ends, however it ends.
    """

    def __init__(self, front: Front, read: Callable[[bytes], Asked], format: type[Format]) -> None:
        super().__init__()
        self._front, self._read, self._format = front, read, format
        self._started = self._received = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun_s, status = time.monotonic(), 200
        metrics, endpoint = self._front.metrics, scope["path"]

        async def sent(message: Any) -> None:
            self._started = True
            try:
                async with asyncio.timeout(self._front.settings.client_s):
                    await send(message)
                    await asyncio.sleep(0)  # others' turn, and a lost connection is noticed
            except TimeoutError:
                raise ClientLeftError from None

        try:
            try:
                with self._front.gate.admitted():
                    content = await self._body(scope, receive)
                    await _while_connected(receive, self._answer(content, scope, receive, sent))
            except ApiError as error:
                status = error.status
                if not self._received:
                    await self._discard(receive)
                await self._refuse(error, scope, receive, sent)
        except ClientLeftError:
            status = CLIENT_LEFT
        metrics.requests.labels(endpoint, status).inc()
        if status == 200:
            metrics.request_s.labels(endpoint).observe(time.monotonic() - begun_s)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit, length, content = self._front.settings.max_body_bytes, 0, bytearray()
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "send application/json", code="unsupported_media_type")
        try:
            async with asyncio.timeout(self._front.settings.client_s):
                async for piece in _arriving(receive):
                    length += len(piece)
                    if length <= limit:
                        content += piece
                self._received = True
        except TimeoutError:
            self._received = True  # no more of it is waited for
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        if length > limit:
            raise ApiError(413, f"the body may have {limit} bytes", code="body_too_large")
        return bytes(content)

    async def _discard(self, receive: Receive) -> None:
        """Read a body that is refused unread; a client that is slow with it gets its refusal first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._front.settings.client_s):
                async for _ in _arriving(receive):
                    pass

    async def _answer(self, content: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        front, loop = self._front, asyncio.get_running_loop()
        asked = await loop.run_in_executor(front.thread, self._read, content)
        format = self._format(front.reader.model, asked, front.reader.tokenizer)
        async with front.gate.slot():
            with closing(front.backend.stream(asked.requests)) as stream:
                async with aclosing(pieces(stream, asked, front.reader.tokenizer)) as coming:
                    if not asked.stream:
                        whole = format.whole([piece async for piece in coming])
                    else:
                        async for piece in coming:
                            await self._event(format.chunk(piece), send)
        if not asked.stream:
            await JSONResponse(whole)(scope, receive, send)
            return
        if asked.usage:
            await self._event(format.last_chunk(), send)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _event(self, data: dict[str, Any], send: Send) -> None:
        """One server-sent event; the first one begins the answer, so that errors before it have their status."""
        if not self._started:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._started:
            await error.response()(scope, receive, send)
            return
        await self._event(error.body, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _arriving(receive: Receive) -> AsyncIterator[bytes]:
    """A body as it comes, to its end or past `DISCARDED_BYTES`. Raises ClientLeftError."""
    length, more = 0, True
    while more and length <= DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        piece, more = message.get("body", b""), message.get("more_body", False)
        length += len(piece)
        yield piece


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, or drop it when the client leaves. Raises ClientLeftError then, and what the work raises."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, left = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        await working
    finally:
        for task in (working, left):
            task.cancel()
        await asyncio.wait({working, left})
