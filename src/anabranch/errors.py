"""The error tree.

    AnabranchError(ValueError)      every mistake a user can make; the message names the setting and the remedy
    ├── ConfigError                 a setting is unknown, out of range, or contradicts another setting
    │   └── CatalogError            a hardware file is malformed, or a figure of it cannot be
    ├── PlanError                   a placement plan cannot be carried out as configured
    ├── DataError                   training text is missing, unreadable or too small
    ├── CheckpointError             a checkpoint is of another model, another run, or incomplete
    ├── TraceError                  a routing trace is malformed
    ├── BuildError                  native code cannot be compiled here
    └── RankError                   ranks disagree on configuration, or a rank died

Mistakes of ours are plain `assert`s.
"""


class AnabranchError(ValueError):
    """A mistake the user can correct. `setting` names what to change."""

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        super().__init__(message if setting is None else f"{setting}: {message}")
        self.setting = setting


class ConfigError(AnabranchError):
    """A setting is unknown, out of range, or contradicts another setting."""


class CatalogError(ConfigError):
    """A hardware file is malformed, or a figure of it cannot be. `setting` is the field's path in the file."""


class PlanError(AnabranchError):
    """A placement plan cannot be carried out as configured."""


class DataError(AnabranchError):
    """Training text is missing, unreadable or too small."""


class CheckpointError(AnabranchError):
    """A checkpoint is of another model, another run, or incomplete."""


class TraceError(AnabranchError):
    """A routing trace is malformed."""


class RankError(AnabranchError):
    """Ranks disagree on configuration, or a rank died."""


class BuildError(AnabranchError):
    """Native code cannot be compiled here."""
