"""Runs the server until it is told to end, and drains it then."""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn

from anabranch.errors import ConfigError
from anabranch.serving.server.app import make_app
from anabranch.serving.server.backend import Backend, State
from anabranch.serving.server.config import ServerSettings
from anabranch.serving.server.exchange import Front
from anabranch.serving.server.gate import Gate
from anabranch.serving.server.metrics import Metrics
from anabranch.serving.server.reading import Reader

# Sockets of clients that read no more are closed so long after the last answer.
CLOSE_S = 2


def run_server(folder: str, model: str, settings: ServerSettings, tell: Callable[[str], None]) -> None:
    """Serve the model in `folder` under the name `model` until SIGTERM or SIGINT.

    Then new requests get 503, and running ones have `drain_s` to finish; a second signal cuts that short. `tell` gets
    a line once the server is ready, and one when it ends. Raises ConfigError for a folder that holds no model, and an
    address that is not free.
    """
    reader = Reader(folder, model, settings.engine.limits.tokens, settings.max_choices)
    listening = _listen(settings)
    with listening, ThreadPoolExecutor(1, "reading") as thread:
        asyncio.run(_serve(folder, reader, settings, listening, thread, tell))


async def _serve(
    folder: str,
    reader: Reader,
    settings: ServerSettings,
    listening: socket.socket,
    thread: ThreadPoolExecutor,
    tell: Callable[[str], None],
) -> None:
    backend, gate = Backend(folder, settings.engine), Gate(settings.max_requests, settings.max_queue)
    front = Front(settings, reader, backend, gate, Metrics(backend, gate), thread)
    server = DrainingServer(front, tell)
    backend.start()
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await asyncio.wait(
        {serving, settled := asyncio.create_task(backend.settled.wait())}, return_when="FIRST_COMPLETED"
    )
    settled.cancel()
    if backend.ready is not None:
        reader.bound(backend.ready.tokens)
        host, port = listening.getsockname()[:2]
        slow = backend.ready.why_not_native
        tell(f"serving {reader.model} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        if slow:
            tell(f"by transformers' own modules, slower: {slow}")
    failed = backend.state is State.FAILED
    if failed:
        server.should_exit = True
    await serving
    await backend.stop()
    if failed:
        raise ConfigError(f"{folder}: {backend.failure}", setting="model")


class DrainingServer(uvicorn.Server):
    """uvicorn, but a signal begins a drain, and the process then ends with 0."""

    def __init__(self, front: Front, tell: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            make_app(front), log_level="error", access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=CLOSE_S,
        )  # fmt: skip
        super().__init__(config)
        self._front, self._tell = front, tell
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = self._loop.create_task(self._drained())
        else:
            self._drain.cancel()

    async def _drained(self) -> None:
        gate = self._front.gate
        gate.draining = True
        self._tell(f"ending: {gate.inside} requests have {self._front.settings.drain_s:g} s to finish")
        try:
            await asyncio.wait_for(gate.empty(), self._front.settings.drain_s)
        except (TimeoutError, asyncio.CancelledError):
            await self._front.backend.stop()
        finally:
            self.should_exit = True


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {settings.host}:{settings.port}: {error}", setting="port"
        ) from None
    # A closed connection waits for its client to take what was written: so long, then the kernel drops it. Accepted
    # sockets inherit it; it is Linux's.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * settings.client_s))
    return listening
