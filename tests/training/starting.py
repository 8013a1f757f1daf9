"""Start a run the way `anabranch train` does on a rank: with the calibration in the run's own cache."""

from collections.abc import Sequence

from anabranch.cli.train import calibration
from anabranch.telemetry.sinks import Sink
from anabranch.training.config import RunConfig
from anabranch.training.runner import run
from anabranch.training.summary import RunSummary


def start(config: RunConfig, watchers: Sequence[Sink] = ()) -> RunSummary:
    return run(config, calibration(config), watchers)
