"""Who is let in, and who must try again later."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from anabranch.serving.server.refusal import ApiError


class Gate:
    """So many requests run at once and so many more wait for it; during a drain no new one enters."""

    def __init__(self, running: int, waiting: int) -> None:
        self._slots = asyncio.Semaphore(running)
        self._most = running + waiting
        self.inside, self.running = 0, 0
        self.draining = False

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Before a body is read. Raises ApiError: 503 in a drain, 429 when too many are inside."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_s=5)
        if self.inside >= self._most:
            raise ApiError(429, f"{self.inside} requests are under way", code="too_many_requests", retry_s=1)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """While it is computed; waits, first come, first served."""
        async with self._slots:
            self.running += 1
            try:
                yield
            finally:
                self.running -= 1

    async def empty(self) -> None:
        """Until nobody is inside."""
        while self.inside:
            await asyncio.sleep(0.02)
