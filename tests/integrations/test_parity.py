"""The parity matrix: every family, transport and planner on two and four ranks equals one process.

`make test` takes two cells of each family that between them take every transport with every planner; the
others are marked full. The errors are printed by family at the end of the run (docs/models.md).
"""

from collections.abc import Iterator
from itertools import product

import pytest
from tests.integrations.parity import Judge, Layout, on_rank
from tests.integrations.toy_models import FAMILIES

from anabranch.transport import TRANSPORTS
from run_distributed import RankPool

PLANNERS = ("static", "exact", "bounded")
BOUND = 1e-5  # fp32; see parity.py on what is compared and how


def matrix() -> Iterator[object]:
    pairs = list(product(TRANSPORTS, PLANNERS))
    for number, family in enumerate(FAMILIES):
        for index, (transport, planner) in enumerate(pairs):
            for ranks, offset in ((2, 0), (4, len(pairs) // 2)):
                quick = index == (number + offset) % len(pairs)
                marks = () if quick else pytest.mark.full
                yield pytest.param(
                    family,
                    transport,
                    planner,
                    ranks,
                    marks=marks,
                    id=f"{family}-{transport}-{planner}-{ranks}",
                )


@pytest.mark.parametrize(("family", "transport", "planner", "ranks"), list(matrix()))
def test_ranks_equal_one_process(family, transport, planner, ranks, judge: Judge, request) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
    # Two nodes for the transport that knows of them.
    per_node = ranks // 2 if transport == "two_level" else None
    layout = Layout(fsdp=ranks, ep=ranks, planner=planner, transport=transport, per_node=per_node)
    outcomes = pool.run(on_rank, judge.checkpoint(family), layout)
    errors = judge.errors(outcomes, family, batches=ranks)
    assert errors.worst <= BOUND, errors
    if planner == "static":
        assert outcomes[0].guests == 0
    else:
        assert outcomes[0].guests > 0, "the text does not load the experts unevenly: this cell proves nothing"
