"""Fixtures every room's tests may use."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from run_distributed import RankPool

# No test asserts times, so no example has a deadline. `make test` tries the same examples every time, so a
# change is judged by itself; `make test-full` explores new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two live ranks: `ranks2.run(fn, *args)`."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four live ranks: `ranks4.run(fn, *args)`."""
    with RankPool(4) as pool:
        yield pool
