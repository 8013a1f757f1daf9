"""What a layer's rows say about its balance."""

from tests.telemetry.records import layer_record


def test_max_mean_is_the_fullest_rank_over_the_mean():
    layer = layer_record(0)
    assert (layer.max_mean_before, layer.max_mean_after) == (1.5, 1.25)


def test_a_layer_without_rows_is_balanced():
    layer = layer_record(0, rows_before_max=0, rows_after_max=0, rows_mean=0.0)
    assert (layer.max_mean_before, layer.max_mean_after) == (1.0, 1.0)
