import numpy as np
import pytest

from anabranch.costs.curve import Curve


def test_between_below_and_beyond_the_points():
    curve = Curve({100: 2.0, 200: 3.0, 400: 7.0})
    np.testing.assert_allclose(curve.ms(np.array([0, 100, 150, 400, 500])), [2.0, 2.0, 2.5, 7.0, 9.0])
    assert float(curve.ms(300)) == pytest.approx(5.0)
    assert curve.rate_ms == pytest.approx(5 / 300)


def test_a_point_faster_than_a_smaller_one_is_lifted():
    curve = Curve({100: 2.0, 200: 5.0, 300: 4.0, 400: 6.0})
    times = curve.ms(np.linspace(0, 1000, 200))
    assert (np.diff(times) >= 0).all()
    assert float(curve.ms(300)) == 5.0


def test_flat_ends_do_not_make_large_sizes_free():
    assert float(Curve({100: 2.0, 200: 2.0}).ms(400)) == pytest.approx(4.0)


def test_a_single_point_is_latency_and_then_its_own_rate():
    np.testing.assert_allclose(Curve({100: 2.0}).ms(np.array([0, 100, 200])), [2.0, 2.0, 4.0])
    assert Curve({0: 2.0}).rate_ms == 2.0
