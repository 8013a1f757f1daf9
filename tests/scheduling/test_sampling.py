"""Settings of sampling that cannot work are refused before a step meets them."""

import pytest

from anabranch.errors import ConfigError
from anabranch.scheduling.sampling import Sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", 1e-40), ("temperature", float("inf")), ("temperature", float("nan")),
        ("top_k", -1), ("top_k", 2**31), ("repetition_penalty", 0.0), ("repetition_penalty", 1e-39),
        ("repetition_penalty", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0), ("seed", -1),
        ("seed", 2**63),
    ],
)  # fmt: skip
def test_what_no_step_could_compute_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}: must"):
        Sampling(**{name: value})


def test_the_least_and_the_most_that_work() -> None:
    assert Sampling(temperature=1e-6, top_k=2**31 - 1, repetition_penalty=1e-3).temperature > 0
    assert Sampling(temperature=0.0).greedy
