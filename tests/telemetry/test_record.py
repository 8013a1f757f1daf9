"""What a layer's rows say about its balance; a step and a layer record for the tests of every sink."""

from anabranch.telemetry.record import LayerRecord, StepRecord


def step_record(step, **changes):
    fields = {
        "step": step,
        "loss": 4.5 - 0.25 * step,
        "tokens": 4096,
        "step_ms": 80.0,
        "tokens_per_s": 51200.0,
        "max_mean_before": 1.5,
        "max_mean_after": 1.0625,
        "guests": 3,
        "token_bytes": 1 << 20,
        "weight_bytes": 1 << 18,
        "plan_ms": 0.125,
        "joules": 2.5,
        "energy_source": "estimate",
        "learning_rate": 0.001953125,
        "grad_norm": 0.75,
        **changes,
    }
    return StepRecord(**fields)


def layer_record(layer, **changes):
    fields = {
        "layer": layer,
        "rows_before_max": 1500,
        "rows_after_max": 1250,
        "rows_mean": 1000.0,
        "guests": 2,
        "token_bytes": 1 << 16,
        "weight_bytes": 1 << 15,
        "plan_ms": 0.0625,
        "fits": True,
        **changes,
    }
    return LayerRecord(**fields)


def test_max_mean_is_the_fullest_rank_over_the_mean():
    layer = layer_record(0)
    assert (layer.max_mean_before, layer.max_mean_after) == (1.5, 1.25)


def test_a_layer_without_rows_is_balanced():
    layer = layer_record(0, rows_before_max=0, rows_after_max=0, rows_mean=0.0)
    assert (layer.max_mean_before, layer.max_mean_after) == (1.0, 1.0)
