"""What planners demand of their settings. Each failure is a ConfigError naming the setting and the remedy."""

import math

from anabranch.errors import ConfigError


def require_number(setting: str, value: float, least: float) -> None:
    """`value` is a finite number of at least `least`."""
    if not math.isfinite(value) or value < least:
        raise ConfigError(f"{value} must be a finite number of at least {least:g}", setting=setting)


def require_count(setting: str, value: int, least: int) -> None:
    """`value` is a whole number of at least `least`."""
    # A float gets this far from untyped callers, and 1.5 slots would silently be two.
    if not isinstance(value, int) or value < least:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"{value} must be a whole number of at least {least}", setting=setting)
