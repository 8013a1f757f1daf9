"""A request and its chains: what is asked, and how far each sample of it has come."""

from dataclasses import dataclass, field
from enum import Enum

from anabranch.errors import ConfigError
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.thinking import Thinking


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, continued `samples` times. Raises ConfigError naming the setting that cannot work."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 256
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    # A chain ends after any of these tokens, which it keeps.
    stop_tokens: frozenset[int] = frozenset()
    # Forces an end of thought; its tokens count as new ones.
    thinking: Thinking | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("must hold at least one token", setting="prompt")
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, name)}", setting=name)
        if self.thinking is not None and self.thinking.budget == 0:
            forced = len(self.thinking.forced(()))
            if self.max_new_tokens <= forced:
                raise ConfigError(
                    f"must be above the {forced} tokens of a thought that ends at once",
                    setting="max_new_tokens",
                )


class End(Enum):
    """Why a chain ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Chain:
    """One sample of a request: its tokens, and the pages that hold keys and values of the first `cached` of them.

    A chain whose every token but the last is cached decodes; before that it is in prefill, also when its pages
    were taken from it and it computes them once more.
    """

    request: Request
    sample: int
    arrival: int
    tokens: list[int]
    cached: int = 0
    # Of the cached tokens, those whose pages have left: a multiple of a page. Positions go on as if they were there.
    evicted: int = 0
    pages: list[int] = field(default_factory=list[int])
    # Attention that each page has drawn lately, where pages may be evicted.
    mass: list[float] = field(default_factory=list[float])
    # Whether its pages are in a tier, waiting with it.
    kept: bool = False
    slot: int | None = None
    # How often it has given a slot up: its pages of before are no longer its own.
    left: int = 0
    end: End | None = None
    # Whether the most probable token of the logits as they are is taken.
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.request.sampling.plain
        self._force()

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def held(self) -> int:
        """Tokens that its pages hold: what the next token attends to besides itself."""
        return self.cached - self.evicted

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are not cached yet; 1 while decoding."""
        return len(self.tokens) - self.cached

    @property
    def room(self) -> int:
        """Tokens it may get before it is full or an end of thought is forced."""
        thinking = self.request.thinking
        full = self.request.max_new_tokens - self.new_tokens
        if thinking is None or self.new_tokens >= thinking.budget:
            return full
        return min(full, thinking.budget - self.new_tokens)

    def append(self, token: int) -> None:
        """Add a generated token, and end the chain where it stops or is full."""
        self.tokens.append(token)
        if token in self.request.stop_tokens:
            self.end = End.STOP
            return
        self._force()
        if self.new_tokens >= self.request.max_new_tokens:
            self.end = End.LENGTH

    def _force(self) -> None:
        """Append the end of thought where the budget is spent; the next step enters it like a prompt."""
        request = self.request
        if request.thinking is not None and self.new_tokens == request.thinking.budget:
            forced = request.thinking.forced(self.tokens[len(request.prompt) :])
            self.tokens += forced[: request.max_new_tokens - self.new_tokens]
