import numpy as np

from anabranch.placement.base import Homes
from anabranch.placement.static import StaticPlanner


def test_static_is_the_identity_and_always_fits():
    homes = Homes.contiguous(3, 2)
    plan = StaticPlanner().plan(np.array([[5, 0, 1], [5, 3, 0]]), homes)
    assert plan.quota_RE.tolist() == [[10, 3, 0], [0, 0, 1]]
    assert plan.cap == 13
    assert plan.fits
    assert StaticPlanner().slots_needed(homes) == 0
