"""How a chain's next token is chosen."""

from dataclasses import dataclass

from anabranch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one request, in the order in which they are applied to its logits.

    Raises ConfigError naming the setting that is out of range.
    """

    # Divides the logits of tokens already in the chain, prompt included, where positive; multiplies where
    # negative (Keskar et al., 2019, arXiv:1909.05858). 1 leaves them.
    repetition_penalty: float = 1.0
    # Divides all logits; 0 takes the most probable token, whatever the settings below.
    temperature: float = 0.0
    # Only so many most probable tokens stay; 0 for all.
    top_k: int = 0
    # Only the fewest most probable tokens whose probabilities reach this sum stay (Holtzman et al., 2019).
    top_p: float = 1.0
    # Only tokens of at least this fraction of the highest probability stay (Nguyen et al., 2024).
    min_p: float = 0.0
    # Of the random numbers; samples of one request differ all the same.
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "lie in 0.001 to 1000"),
            # Smaller ones would divide by what fp32 takes for zero.
            (
                "temperature",
                self.temperature == 0 or 1e-6 <= self.temperature < float("inf"),
                "be 0, or 0.000001 or above",
            ),
            ("top_k", 0 <= self.top_k < 2**31, "be 0 (all tokens) or above, and below 2**31"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "lie in [0, 1)"),
            ("seed", 0 <= self.seed < 2**63, "lie in [0, 2**63)"),
        )
        for name, fits, remedy in checks:
            if not fits:
                raise ConfigError(f"must {remedy}, not {getattr(self, name)}", setting=name)

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether the most probable token of the logits as they are is taken."""
        return self.greedy and self.repetition_penalty == 1.0
