"""The worker process: one engine, driven by messages."""

import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from transformers.utils import logging as transformers_logging

from anabranch.errors import AnabranchError, ConfigError
from anabranch.scheduling.chain import Chain
from anabranch.serving.engine import Engine
from anabranch.serving.server.messages import Cancel, Event, Failed, Ready, Refused, Stats, Submit, Tokens
from anabranch.serving.settings import EngineSettings
from anabranch.telemetry.memory import resident_bytes

# Without a message for so long an idle engine checks its pages.
IDLE_S = 0.05
STATS_EVERY_S = 0.25


def work(connection: Connection, folder: str, settings: EngineSettings) -> None:
    """Serve the model in `folder` until the front asks to end, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal signals both processes; the front decides
        signal.signal(number, signal.SIG_IGN)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        engine = Engine.from_folder(Path(folder), settings)
    except (AnabranchError, OSError, ValueError) as error:
        connection.send([Failed(str(error))])
        return
    with engine:
        try:
            connection.send([Ready(engine.why_not_native, engine.longest)])
            EngineLoop(engine, connection).run()
        except (EOFError, ConnectionError):
            return  # the front is gone


@dataclass
class _Running:
    """A chain under way, by which name the front knows it, and how many new tokens it was sent."""

    chain: Chain
    key: tuple[int, int]
    sent: int = 0


class EngineLoop:
    """Takes messages between steps. Blocks for them only when nothing is left to compute."""

    def __init__(self, engine: Engine, connection: Connection) -> None:
        self._engine, self._connection = engine, connection
        self._by_key: dict[tuple[int, int], _Running] = {}
        self._by_chain: dict[Chain, _Running] = {}
        self._outbox: list[Event] = []
        self._leaked, self._checks, self._stats_at = 0, 0, 0.0

    def run(self) -> None:
        """Until a None arrives. Raises EOFError or ConnectionError when the front is gone."""
        while True:
            idle = self._engine.scheduler.idle
            if idle and not self._connection.poll(IDLE_S):
                self._check_pages()
                self._send(stats=True)
            if idle or self._connection.poll():
                for message in self._connection.recv():
                    if message is None:
                        return
                    self._take(message)
            if not self._engine.scheduler.idle:
                self._advance()
            self._send(stats=time.monotonic() - self._stats_at > STATS_EVERY_S)

    def _take(self, message: Submit | Cancel) -> None:
        if isinstance(message, Cancel):
            running = self._by_key.get((message.id, message.sample))
            if running is not None:
                self._engine.cancel(running.chain)
                self._forget(running)
            return
        try:
            chains = self._engine.submit(message.request)
        except ConfigError as error:
            self._outbox.append(Refused(message.id, str(error)))
            return
        for chain in chains:
            running = _Running(chain, (message.id, chain.sample))
            self._by_key[running.key] = self._by_chain[chain] = running

    def _advance(self) -> None:
        for chain in self._engine.advance():
            running = self._by_chain[chain]
            new = chain.tokens[len(chain.request.prompt) + running.sent :]
            logprobs = self._engine.logprobs[chain][running.sent :]
            running.sent += len(new)
            self._outbox.append(Tokens(*running.key, new, logprobs, chain.end))
            if chain.end is not None:
                self._forget(running)

    def _forget(self, running: _Running) -> None:
        self._engine.completion(running.chain)
        del self._by_key[running.key], self._by_chain[running.chain]

    def _check_pages(self) -> None:
        """At idle the prefix tree alone holds pages; others have leaked."""
        pool, tree = self._engine.scheduler.pool, self._engine.scheduler.prefixes.pages
        self._checks += 1
        self._leaked = pool.pages - pool.free - len(tree)
        try:
            self._engine.check()
        except AssertionError:
            self._leaked = max(self._leaked, 1)

    def _send(self, stats: bool) -> None:
        if stats:
            self._stats_at = time.monotonic()
            scheduler = self._engine.scheduler
            pool, cached = scheduler.pool, len(scheduler.prefixes.pages)
            self._outbox.append(
                Stats(
                    len(scheduler.running), len(scheduler.waiting), pool.pages, pool.free, cached,
                    self._leaked, self._checks, resident_bytes(), scheduler.tally,
                )
            )  # fmt: skip
        if self._outbox:
            self._connection.send(self._outbox)
            self._outbox = []
