"""Planners by name: the one place that turns settings into a planner."""

from collections.abc import Callable
from difflib import get_close_matches

from anabranch.errors import ConfigError
from anabranch.placement.base import Planner
from anabranch.placement.bounded import BoundedPlanner
from anabranch.placement.checks import require_count, require_number
from anabranch.placement.exact import ExactPlanner
from anabranch.placement.least_loaded import LeastLoadedPlanner
from anabranch.placement.periodic_replication import PeriodicReplicationPlanner
from anabranch.placement.static import StaticPlanner

# Each builder takes (epsilon, slots, min_rows) and uses what its planner knows.
PLANNERS: dict[str, Callable[[float, int, int], Planner]] = {
    "static": lambda epsilon, slots, min_rows: StaticPlanner(),
    "exact": lambda epsilon, slots, min_rows: ExactPlanner(),
    "bounded": BoundedPlanner,
    "least_loaded": lambda epsilon, slots, min_rows: LeastLoadedPlanner(1.0 + epsilon, max(1, min_rows)),
    "periodic_replication": lambda epsilon, slots, min_rows: PeriodicReplicationPlanner(slots),
}


def make_planner(name: str, *, epsilon: float = 0.05, slots: int = 2, min_rows: int = 0) -> Planner:
    """The planner called `name`, a new one at each call (`periodic_replication` needs one per layer).

    epsilon: tolerated load above the mean (`bounded`; alpha - 1 of `least_loaded`).
    slots: the most guests a rank hosts (`bounded`, `periodic_replication`).
    min_rows: the fewest rows worth a guest (`bounded`, `least_loaded`).

    Raises ConfigError naming `planner`, `epsilon`, `slots` or `min_rows`. Settings are checked whether
    the chosen planner uses them or not.
    """
    require_planner(name)
    require_number("epsilon", epsilon, 0.0)
    require_count("slots", slots, 1)
    require_count("min_rows", min_rows, 0)
    return PLANNERS[name](epsilon, slots, min_rows)


def require_planner(name: str, *more: str) -> None:
    """Raise ConfigError unless there is a planner called `name`, or it is one of `more`."""
    known = [*PLANNERS, *more]
    if name not in known:
        nearest = get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(f"{name!r} is unknown; {hint}choose one of {', '.join(known)}", setting="planner")
