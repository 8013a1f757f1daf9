"""The front's side of the engine: streams of tokens, and a worker that is started again when it dies."""

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from anabranch.scheduling.chain import End, Request
from anabranch.serving.server.link import END_S, Link
from anabranch.serving.server.messages import Cancel, Event, Failed, Ready, Refused, Stats, Submit, Tokens
from anabranch.serving.server.refusal import ApiError
from anabranch.serving.settings import EngineSettings

# From a worker's death to the next one's start; doubled while they die before they are ready.
RESTART_S, RESTART_MOST_S = 0.5, 30.0
LOST = "the engine's process ended while it computed this answer; it is being restarted"


class State(Enum):
    """Of the worker, as /health shows it."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    ENDED = "ended"


class News(NamedTuple):
    """New tokens of one choice of a stream; end where they are its last."""

    choice: int
    tokens: list[int]
    logprobs: list[float | None]
    end: End | None


class Stream:
    """The chains of some requests as they come. Choices are numbered over requests, then samples."""

    def __init__(self, backend: "Backend") -> None:
        self._backend = backend
        self.news: asyncio.Queue[News | ApiError] = asyncio.Queue()
        self.keys: list[tuple[int, int]] = []

    async def next(self) -> News:
        """The next tokens of any choice that was not cancelled. Raises ApiError when there will be none."""
        news = await self.news.get()
        if isinstance(news, ApiError):
            raise news
        return news

    def cancel(self, choice: int) -> None:
        """Free a choice's pages, where it has not ended."""
        self._backend.cancel(self.keys[choice])

    def close(self) -> None:
        """Cancel what has not ended."""
        for key in self.keys:
            self._backend.cancel(key)


class Backend:
    """Keeps one worker running for the model in `folder`."""

    def __init__(self, folder: str, settings: EngineSettings) -> None:
        self._folder, self._settings = folder, settings
        self.state = State.STARTING
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.failure: str | None = None
        self.restarts = 0
        # Set once the first worker is ready, or never will be.
        self.settled = asyncio.Event()
        self._link: Link | None = None
        self._gone_event = asyncio.Event()
        self._routes: dict[tuple[int, int], tuple[Stream, int]] = {}
        self._requests, self._delay_s = 0, RESTART_S
        self._launching: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """Of the worker."""
        return self._link and self._link.pid

    def start(self) -> None:
        """Start a worker; `state` tells when it is ready."""
        self._gone_event.clear()
        self._link = Link(self._folder, self._settings, self._deliver, self._gone)

    async def stop(self) -> None:
        """End the worker, and every stream with an error."""
        self.state = State.ENDED
        self.fail(ApiError(503, "the server is shutting down", code="shutting_down", retry_s=5))
        if self._launching is not None:
            self._launching.cancel()
        if self._link is not None:
            self._link.send(None)
            try:
                await asyncio.wait_for(self._gone_event.wait(), END_S)
            except TimeoutError:  # still loading, or in a very long step
                self._link.kill()
                await self._gone_event.wait()

    def stream(self, requests: Sequence[Request]) -> Stream:
        """Submit requests. Raises ApiError while there is no worker to compute them."""
        if self.state is not State.READY or self._link is None:
            raise ApiError(503, f"the engine is {self.state.value}", code="engine_unavailable", retry_s=5)
        stream = Stream(self)
        for request in requests:
            self._requests += 1
            for sample in range(request.samples):
                key = (self._requests, sample)
                self._routes[key] = stream, len(stream.keys)
                stream.keys.append(key)
            self._link.send(Submit(self._requests, request))
        return stream

    def cancel(self, key: tuple[int, int]) -> None:
        """From a stream: nobody waits for this chain any more."""
        if self._routes.pop(key, None) is not None and self._link is not None:
            self._link.send(Cancel(*key))

    def fail(self, error: ApiError) -> None:
        """End every stream with this error."""
        for stream in {stream for stream, _ in self._routes.values()}:
            stream.news.put_nowait(error)
        self._routes.clear()

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Tokens():
                    self._route(event)
                case Stats():
                    self.stats = event
                case Refused():
                    refused = self._routes.get((event.id, 0))
                    if refused is not None:
                        refused[0].news.put_nowait(ApiError(400, event.message))
                case Failed():
                    self.failure = event.message
                case Ready():
                    self.ready, self._delay_s = event, RESTART_S
                    if self.state is not State.ENDED:
                        self.state = State.READY
                    self.settled.set()

    def _route(self, event: Tokens) -> None:
        key = (event.id, event.sample)
        if key in self._routes:  # else cancelled meanwhile
            stream, choice = self._routes[key] if event.end is None else self._routes.pop(key)
            stream.news.put_nowait(News(choice, event.tokens, event.logprobs, event.end))

    def _gone(self) -> None:
        self._gone_event.set()
        if self.state is State.ENDED:
            return
        self.fail(ApiError(503, LOST, code="engine_lost", retry_s=5))
        if self.ready is None:
            self.state = State.FAILED
            self.failure = self.failure or "the worker ended before its model was loaded"
            self.settled.set()
            return
        self.state = State.RESTARTING
        self.restarts += 1
        self._launching = asyncio.get_running_loop().call_later(self._delay_s, self.start)
        self._delay_s = min(2 * self._delay_s, RESTART_MOST_S)
