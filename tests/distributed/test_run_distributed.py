"""The harness itself: values by rank, failures told, nothing left behind."""

import multiprocessing
import os
import pickle
import signal
import threading
import warnings

import pytest
import torch
import torch.distributed as dist

from anabranch.errors import ConfigError
from run_distributed import OPEN_FILES, RankDiedError, RankPool, run_distributed


def add_rank(base: int) -> int:
    return base + dist.get_rank()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    total = values * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def surroundings() -> dict[str, object]:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"]
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "draw": torch.rand(1).item(),
        "backend": dist.get_backend(),
        **{name: os.environ[name] for name in names},
    }


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ConfigError("no such planner; take bounded", setting="planner")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        threading.Event().wait()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def warn() -> None:
    warnings.warn("careless", UserWarning, stacklevel=1)


def return_unpicklable() -> object:
    return threading.Lock()


held_files: list[int] = []


def hold_files(count: int) -> None:
    held_files.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(count))


class LocalError(Exception):
    """Cannot be pickled back: its constructor takes what `args` does not hold."""

    def __init__(self, code: int, place: str) -> None:
        super().__init__(f"code {code} at {place}")


def raise_unpicklable() -> None:
    raise LocalError(5, "home")


def test_values_come_back_by_rank() -> None:
    before = multiprocessing.active_children()
    assert run_distributed(add_rank, 3, 10) == [10, 11, 12]
    assert multiprocessing.active_children() == before


def test_tensors_travel_and_ranks_are_joined(ranks2: RankPool) -> None:
    for total in ranks2.run(sum_over_ranks, torch.tensor([1.0, 2.0])):
        assert total.tolist() == [3.0, 6.0]


def test_ranks_look_like_torchruns_and_stay_alive(ranks2: RankPool) -> None:
    first, second = ranks2.run(surroundings), ranks2.run(surroundings)
    assert first == second  # the same processes, each call from the same seed
    for rank, seen in enumerate(first):
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert (seen["backend"], seen["threads"], seen["OMP_NUM_THREADS"]) == ("gloo", 1, "1")
        assert seen["MASTER_ADDR"] == "127.0.0.1"
    assert len({seen["pid"] for seen in first} | {os.getpid()}) == 3


def test_an_exception_keeps_its_type_and_tells_its_rank(ranks2: RankPool) -> None:
    with pytest.raises(ConfigError, match="no such planner") as caught:
        ranks2.run(raise_on, 1)  # rank 0 waits in a barrier for ever
    assert caught.value.setting == "planner"
    assert "On rank 1 of 2" in caught.value.__notes__[0]
    assert "in raise_on" in caught.value.__notes__[0]
    assert ranks2.run(add_rank, 0) == [0, 1]


def test_every_failing_rank_is_told(ranks2: RankPool) -> None:
    with pytest.raises(UserWarning, match="careless") as caught:
        ranks2.run(warn)  # warnings are errors on the ranks, too
    notes = "\n".join(caught.value.__notes__)
    assert "On rank 0 of 2" in notes
    assert "On rank 1 of 2" in notes


def test_a_hanging_rank_times_out(ranks2: RankPool, capfd: pytest.CaptureFixture[str]) -> None:
    ranks2.close()  # ranks started under capfd print where it reads
    ranks2.run(add_rank, 0)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not finish within 1 s"):
        ranks2.run(hang_on, 1, timeout_s=1)
    assert "in hang_on" in capfd.readouterr().err
    ranks2.close()
    assert ranks2.run(add_rank, 0) == [0, 1]


def test_a_dead_rank_is_blamed_not_its_peers(ranks2: RankPool) -> None:
    with pytest.raises(RankDiedError, match="rank 1 of 2 ended with exit code 7"):
        ranks2.run(die_on, 1)
    assert ranks2.run(add_rank, 0) == [0, 1]


def test_a_rank_killed_between_calls_is_told_at_the_next(ranks2: RankPool) -> None:
    victim = ranks2.run(os.getpid)[0]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(RankDiedError, match="rank 0 of 2 ended with exit code -9"):
        ranks2.run(add_rank, 0)


def test_ranks_that_hold_too_many_files_are_renewed(ranks2: RankPool) -> None:
    before = ranks2.run(os.getpid)
    ranks2.run(hold_files, 10)
    assert ranks2.run(os.getpid) == before
    ranks2.run(hold_files, OPEN_FILES)
    assert not set(ranks2.run(os.getpid)) & set(before)


@pytest.mark.parametrize(
    ("fn", "text"), [(return_unpicklable, "cannot pickle"), (raise_unpicklable, "code 5")]
)
def test_what_cannot_travel_is_told(ranks2: RankPool, fn, text: str) -> None:
    with pytest.raises((TypeError, RuntimeError), match=text):
        ranks2.run(fn)


def test_a_function_without_a_module_is_refused_before_any_rank_starts() -> None:
    before = multiprocessing.active_children()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match=r"lambda|local"):
        RankPool(2).run(lambda: None)
    assert multiprocessing.active_children() == before
