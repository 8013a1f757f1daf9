"""Which pages a long chain lets go while it decodes: those that draw little attention and say what later ones say.

After R-KV (Cai et al. 2025, arXiv:2505.24133), which ranks tokens by attention drawn from the last queries and by
likeness of keys, and keeps the later of those that are alike. Here whole pages go, of all layers and heads at once,
so that pages stay shared and the attended length shrinks. A prompt stays, where the budget has room for it: a chain
looks at a part of the question when that part's turn comes, and until then it draws no attention.
"""

from collections.abc import Sequence

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain
from anabranch.scheduling.pages import PAGE, pages_of

# The first page draws attention whatever it holds (Xiao et al. 2024, arXiv:2309.17453: attention sinks).
SINK_PAGES = 1
# The last pages were seldom looked at yet.
RECENT_PAGES = 4
# Share of attention in a page's worth; the rest is how little it is like later pages.
ATTENTION_SHARE = 0.5
# Of a page's drawn attention, what a step leaves of the steps before.
DECAY = 0.8
LEAST = 2 * (SINK_PAGES + RECENT_PAGES) * PAGE


def require_budget(above: int) -> None:
    """Raise ConfigError for a budget that leaves nothing to choose from."""
    if above < LEAST:
        raise ConfigError(f"must be at least {LEAST} tokens, not {above}", setting="evict_above")


def draw(chain: Chain, mass: Sequence[float]) -> None:
    """Take in the attention of one more query: its share on each of the chain's pages, in order."""
    old = chain.mass
    chain.mass = [DECAY * (old[i] if i < len(old) else 0.0) + now for i, now in enumerate(mass)]


def due(chain: Chain, above: int) -> bool:
    """Whether a decoding chain holds its budget of tokens."""
    return chain.remaining == 1 and chain.held >= above


def spared(chain: Chain, above: int) -> int:
    """How many pages at the front never leave: the prompt's, where the budget holds beside them what is recent and
    twice what leaves at once."""
    prompt = pages_of(len(chain.request.prompt))
    return prompt if (prompt + RECENT_PAGES) * PAGE + 2 * _freed(above) <= above else SINK_PAGES


def leaving(chain: Chain, likeness: Sequence[float], above: int) -> list[int]:
    """Places of the pages that leave, in order, so that an eighth of `above` tokens is free.

    likeness: of each full page, the greatest cosine similarity (at most 1) of its keys to those of a later one.
    """
    count = pages_of(chain.held - above + _freed(above))
    last = chain.held // PAGE - RECENT_PAGES
    most = max(chain.mass, default=0.0) or 1.0
    worth = {
        i: ATTENTION_SHARE * chain.mass[i] / most - (1 - ATTENTION_SHARE) * likeness[i]
        for i in range(spared(chain, above), last)
    }
    return sorted(sorted(worth, key=lambda i: (worth[i], i))[:count])


def _freed(above: int) -> int:
    """Tokens that are to be free after pages left."""
    return max(PAGE, above // 8)
