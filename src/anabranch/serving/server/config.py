"""Settings of the server."""

import ipaddress
from dataclasses import dataclass, field

from anabranch.errors import ConfigError
from anabranch.serving.settings import EngineSettings


@dataclass(frozen=True)
class ServerSettings:
    """Where it listens and what it lets in. Raises ConfigError naming the setting."""

    # Address to listen at; one that is not loopback needs a key.
    host: str = "127.0.0.1"
    # 0 takes a free one.
    port: int = 8000
    # What clients send as `Authorization: Bearer KEY`; None lets everyone on this machine in.
    api_key: str | None = None
    # Bytes of a request's body.
    max_body_bytes: int = 1 << 20
    # Requests computed at once.
    max_requests: int = 64
    # Requests that may wait for that; more are answered with 429.
    max_queue: int = 256
    # Answers of one request: its prompts times its samples.
    max_choices: int = 64
    # Seconds a client has to send its body, and to take each piece of its answer.
    client_s: float = 60.0
    # Seconds that running requests have to finish once the server is told to end.
    drain_s: float = 30.0
    # Of the engine in the worker; limits.tokens bounds prompt and new tokens of an answer.
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"must lie in 0 to 65535, not {self.port}", setting="port")
        if not self.api_key and not self.loopback:
            raise ConfigError(
                f"listening at {self.host}, beyond this machine, needs a key: --api-key or ANABRANCH_API_KEY",
                setting="api_key",
            )
        for name in ("max_body_bytes", "max_requests", "max_choices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, name)}", setting=name)
        for name in ("max_queue", "client_s", "drain_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must be 0 or above, not {getattr(self, name)}", setting=name)

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host names this machine to itself only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
