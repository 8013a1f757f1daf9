"""Run a plain function on several real ranks: `run_distributed(fn, ranks, *args)`, or a lasting `RankPool`.

A rank is a spawned process in one gloo group over 127.0.0.1, with one thread and the environment that
torchrun would set. Functions and arguments travel by pickle, so a test's rank function stands at the top
level of its module. Starting a rank costs seconds (it imports torch), a call on a live pool milliseconds.

torch is imported only inside the ranks: every pytest run loads this file, also those of torch-free rooms.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

Value = TypeVar("Value")

START_S = 120.0  # a rank's start: importing torch, several at once on two busy cores
OPEN_FILES = 500  # a process group is never given back: each costs about 5 open files and 3 threads
GRACE_S = 0.5  # after a first failure, how long the other ranks may take to tell theirs


class RankDiedError(RuntimeError):
    """A rank's process ended in the middle of a call."""


class Returned(NamedTuple):
    value: Any
    open_files: int


class Raised(NamedTuple):
    error: BaseException
    traceback: str


class RankPool:
    """`ranks` processes that stay alive across calls. They start at the first `run`, not before.

    After any failure every rank is killed, and the next `run` starts new ones: a call never meets the
    leftovers of a broken one. Global state that a *passing* function changes stays for later calls, until
    the process groups it made fill OPEN_FILES: then, too, the next `run` starts new ranks.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def run(self, fn: Callable[..., Value], *args: Any, timeout_s: float = 120.0) -> list[Value]:
        """Call `fn(*args)` on every rank; the returned values by rank.

        Each call starts from `torch.manual_seed(0)` and under the caller's warning filters, so a warning
        that would fail a test here fails it there.

        Raises the first rank's own exception with every failing rank's traceback in its notes, RankDiedError
        when a process ended, TimeoutError when a rank has not answered after `timeout_s`.
        """
        call = pickle.dumps((fn, args, list(warnings.filters)))
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                with contextlib.suppress(BrokenPipeError):  # the rank is dead: `_collect` tells
                    connection.send_bytes(call)
            replies = self._collect(timeout_s)
        except BaseException:
            self.close()
            raise
        if any(reply.open_files > OPEN_FILES for reply in replies):
            self.close()
        return [reply.value for reply in replies]

    def close(self) -> None:
        """Kill every rank. The pool can be used again."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.ranks), daemon=True)
            process.start()
            theirs.close()  # ours then reports the end of file when the process ends
            self._processes.append(process)
            self._connections.append(ours)
        if not self._connections[0].poll(START_S):
            raise TimeoutError(f"rank 0 did not start within {START_S:g} s")
        port = self._connections[0].recv()
        for connection in self._connections[1:]:
            connection.send(port)

    def _collect(self, timeout_s: float) -> list[Returned]:
        """One reply of each rank. Once a rank failed, the others get GRACE_S to say so too."""
        replies: dict[int, Returned] = {}
        failures: dict[int, BaseException] = {}
        deadline = time.monotonic() + timeout_s
        while waiting := [r for r in range(self.ranks) if r not in replies and r not in failures]:
            ready = wait([self._connections[r] for r in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (r for r in waiting if self._connections[r] in ready):
                reply = self._receive(rank)
                if isinstance(reply, Returned):
                    replies[rank] = reply
                else:
                    deadline = deadline if failures else min(deadline, time.monotonic() + GRACE_S)
                    failures[rank] = reply
        if failures:
            raise _blame(failures)
        if waiting:
            self._print_stacks(waiting)
            raise TimeoutError(f"ranks {waiting} of {self.ranks} did not finish within {timeout_s:g} s")
        return [replies[rank] for rank in range(self.ranks)]

    def _receive(self, rank: int) -> Returned | BaseException:
        try:
            reply: Returned | Raised = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            code = self._processes[rank].exitcode
            return RankDiedError(
                f"rank {rank} of {self.ranks} ended with exit code {code} in the middle of a call"
            )
        if isinstance(reply, Returned):
            return reply
        reply.error.add_note(f"On rank {rank} of {self.ranks}:\n{reply.traceback}")
        return reply.error

    def _print_stacks(self, ranks: list[int]) -> None:
        """Have the hanging ranks print where they hang, to the stderr that pytest captures."""
        for rank in ranks:
            os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(GRACE_S)


def run_distributed(
    fn: Callable[..., Value], ranks: int, *args: Any, timeout_s: float = 120.0
) -> list[Value]:
    """`RankPool.run` on ranks of this one call."""
    with RankPool(ranks) as pool:
        return pool.run(fn, *args, timeout_s=timeout_s)


def _blame(failures: dict[int, BaseException]) -> BaseException:
    """The failure to raise: a death before the errors it caused on its peers, else the first to arrive."""
    first = next(
        (e for e in failures.values() if isinstance(e, RankDiedError)), next(iter(failures.values()))
    )
    for error in failures.values():
        if error is not first:
            first.add_note("\n".join(getattr(error, "__notes__", [str(error)])))
    return first


def _serve(connection: Connection, rank: int, ranks: int) -> None:
    """The life of one rank: join the group, then answer calls until the pool hangs up."""
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _join_group(connection, rank, ranks)
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(call))


def _end_with_parent() -> None:
    """A killed pytest leaves no rank behind, not even one that hangs in a collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _join_group(connection: Connection, rank: int, ranks: int) -> None:
    """Rank 0 lets the system choose the store's port and tells the pool: no race for a free one."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    if sys.platform == "linux":  # else gloo looks up the host's name, which may have no address
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        connection.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", connection.recv(), ranks, is_master=False)
    devices = torch.accelerator.device_count()  # shared by ranks beyond them, over gloo
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank % devices if devices else rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
    }.items():
        os.environ[name] = str(value)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


def _answer(call: bytes) -> bytes:
    """Carry out one pickled call; whatever goes wrong is the answer, so `BaseException` is meant."""
    import torch

    try:
        fn, args, filters = pickle.loads(call)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.filters.extend(filters)  # type: ignore[attr-defined]
            value = fn(*args)
        return pickle.dumps(Returned(value, open_files=len(os.listdir("/dev/fd"))))
    except BaseException as error:  # noqa: BLE001
        return _pickled(Raised(error, traceback.format_exc()))


def _pickled(raised: Raised) -> bytes:
    """Some exceptions cannot travel; their type and text do."""
    try:
        answer = pickle.dumps(raised)
        pickle.loads(answer)
    except Exception:  # noqa: BLE001 - a foreign class's own __reduce__ may raise anything
        text = f"{type(raised.error).__name__}: {raised.error}"
        return pickle.dumps(Raised(RuntimeError(text), raised.traceback))
    return answer
