"""One worker process, and the two threads that speak with it so that the event loop never waits for a pipe."""

import asyncio
import multiprocessing
import pickle
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from anabranch.serving.server.messages import Cancel, Event, Submit
from anabranch.serving.server.worker import work
from anabranch.serving.settings import EngineSettings

# A worker that has been asked to end, or has closed its pipe, has so long to be gone.
END_S = 5.0


class Link:
    """Starts a worker. On the loop, `deliver` gets each list of its events and `gone` is called once at its end."""

    def __init__(
        self,
        folder: str,
        settings: EngineSettings,
        deliver: Callable[[list[Event]], None],
        gone: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver, self._gone = deliver, gone
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, folder, settings), daemon=True)
        self._process.start()
        theirs.close()  # the worker's alone, so that its death ends our reading
        self._outbox: SimpleQueue[Submit | Cancel | None] = SimpleQueue()
        Thread(target=self._read, name="from-worker", daemon=True).start()
        Thread(target=self._write, name="to-worker", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Of the worker."""
        return self._process.pid

    def send(self, message: Submit | Cancel | None) -> None:
        """Returns at once. None asks the worker to end."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the worker without asking."""
        self._process.kill()

    def _read(self) -> None:
        try:
            while True:
                self._loop.call_soon_threadsafe(self._deliver, self._connection.recv())
        except (EOFError, OSError, pickle.UnpicklingError):
            pass  # it has ended, or was killed in the middle of a message
        self._outbox.put(None)
        self._process.join(END_S)
        self._process.kill()
        self._process.join()
        self._loop.call_soon_threadsafe(self._gone)

    def _write(self) -> None:
        while True:
            batch = [self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get())
            try:
                self._connection.send(batch)
            except OSError:
                return
            if None in batch:
                return
