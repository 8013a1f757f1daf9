"""What each step computes: which chains hold a slot, and which of their tokens enter.

A chain waits, gets a slot and pages, enters its prompt in chunks, then one token a step. When pages run out, the
youngest chain gives its pages back and waits again; a tier keeps copies of them, or they are computed once more (then
also those that had been evicted: such a chain sees all of itself again until it is over its budget).
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Chain, End, Request
from anabranch.scheduling.pages import PAGE, PagePool, pages_of
from anabranch.scheduling.prefix import PrefixTree
from anabranch.scheduling.speculation import Speculator
from anabranch.scheduling.tally import Tally
from anabranch.scheduling.tier import Tier


@dataclass(frozen=True)
class Limits:
    """slots: chains at once. chunk: prompt tokens a step, of all chains together. tokens: of a chain at most."""

    slots: int = 32
    chunk: int = 512
    tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("slots", "chunk", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, name)}", setting=name)


class Part(NamedTuple):
    """Tokens of one chain that enter a step: so many after those cached, guesses of a draft the last of them.

    last: the logits of its last token are wanted, and with a draft those of each guess.
    """

    chain: Chain
    tokens: int
    last: bool
    draft: tuple[int, ...] = ()

    def entered(self, got: int) -> int:
        """Tokens that stay cached where the chain got so many: those before the draft, and guesses that came true."""
        return self.tokens - len(self.draft) + max(got - 1, 0)


class Scheduler:
    """Decides; the engine computes what `plan` returns and tells the outcome by `done`.

    tier: where pages of preempted chains go; None where they are computed once more. copy: writes what a chain's
    page of this place holds into another chain's, or returns False where it cannot; None where the end of a prompt is
    computed for each sample.
    """

    def __init__(
        self,
        limits: Limits,
        pool: PagePool,
        speculator: Speculator | None = None,
        tier: Tier | None = None,
        copy: Callable[[Chain, Chain, int], bool] | None = None,
    ) -> None:
        self.limits, self.pool, self.tally = limits, pool, Tally()
        self.speculator, self._tier, self._copy = speculator, tier, copy
        self.prefixes = PrefixTree(pool)
        self.waiting: deque[Chain] = deque()
        self.running: list[Chain] = []
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self._arrivals = 0

    def add(self, request: Request) -> list[Chain]:
        """The request's chains, waiting. Raises ConfigError for a request that could never run."""
        longest = len(request.prompt) + request.max_new_tokens
        if longest > self.limits.tokens:
            raise ConfigError(
                f"prompt and new tokens make {longest}, more than the {self.limits.tokens} a chain may have",
                setting="max_new_tokens",
            )
        if pages_of(longest) > self.pool.pages:
            raise ConfigError(
                f"a chain of {longest} tokens needs {pages_of(longest)} pages and there are {self.pool.pages}",
                setting="kv_memory",
            )
        chains: list[Chain] = []
        for sample in range(request.samples):
            chains.append(Chain(request, sample, self._arrivals, list(request.prompt)))
            self._arrivals += 1
        self.waiting.extend(chains)
        return chains

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and not self.running

    def plan(self) -> list[Part]:
        """The next step's tokens: one of each decoding chain and its draft, and prompt tokens up to the chunk."""
        self.tally.steps += 1
        self._admit()
        drafts = self._drafts()
        parts: list[Part] = []
        budget = self.limits.chunk
        for chain in sorted(self.running, key=lambda c: c.arrival):
            if chain.slot is None:
                continue  # preempted for an older one just now
            count = min(chain.remaining, budget) if chain.remaining > 1 else 1
            if count == 0 or not self._make_room(chain, count):
                continue
            budget -= count if chain.remaining > 1 else 0
            draft = drafts.get(chain, ())
            if draft and pages_of(chain.held + count + len(draft)) - len(chain.pages) > self.pool.free:
                draft = ()  # no chain gives way to a guess
            elif draft:
                self._make_room(chain, count + len(draft))
            parts.append(Part(chain, count + len(draft), count == chain.remaining, draft))
        return parts

    def done(self, parts: Iterable[Part], tokens: Iterable[Sequence[int]]) -> None:
        """The parts are cached. tokens: those that each part whose logits were wanted got, in order: the guesses of
        its draft that came true, and one more. Pages that rejected guesses reached stay the chain's."""
        following = iter(tokens)
        for part in parts:
            chain, prompt = part.chain, len(part.chain.request.prompt)
            got = next(following) if part.last else ()
            entered = part.entered(len(got))
            if part.last and part.tokens == 1 + len(part.draft):
                self.tally.decoded += len(got)
            else:
                self.tally.prefilled += entered
            fresh = chain.cached < prompt <= chain.cached + entered
            chain.cached += entered
            if fresh:
                full = prompt // PAGE
                self.prefixes.insert(chain.tokens, chain.pages[:full])
            if part.last:
                self._append(part, got)

    def _append(self, part: Part, got: Sequence[int]) -> None:
        chain = part.chain
        self.tally.drafted += len(part.draft)
        self.tally.accepted += min(len(got) - 1, len(part.draft))
        if self.speculator is not None:
            self.speculator.came(chain, got)
        for token in got:
            chain.append(token)
            if chain.end is not None:
                self._vacate(chain)
                break  # guesses went on after a stop

    def cancel(self, chain: Chain) -> None:
        """End the chain now, whatever it is doing; its pages are free at once."""
        if chain.end is None:
            chain.end = End.CANCELLED
            if chain.slot is None:
                self.waiting.remove(chain)
                if chain.kept and self._tier is not None:
                    self._tier.drop(chain)
                    chain.kept, chain.cached, chain.evicted, chain.mass = False, 0, 0, []
            else:
                self.tally.cancelled += 1
                self._vacate(chain)

    def evict(self, chain: Chain, places: Sequence[int]) -> None:
        """Full pages leave a running chain; who else holds them keeps them."""
        for place in reversed(places):
            self.pool.give_back(chain.pages.pop(place))
            del chain.mass[place]
        chain.evicted += len(places) * PAGE
        self.tally.evicted += len(places) * PAGE

    def check(self) -> None:
        """Assert that every held page is a running chain's or the prefix tree's."""
        held: dict[int, int] = {}
        for page in [*self.prefixes.pages, *(p for c in self.running for p in c.pages)]:
            held[page] = held.get(page, 0) + 1
        self.pool.check(held)

    def _drafts(self) -> dict[Chain, tuple[int, ...]]:
        if self.speculator is None:
            return {}
        decoding = [chain for chain in self.running if chain.remaining == 1]
        prompts = sum(chain.remaining for chain in self.running) - len(decoding)
        return self.speculator.drafts(decoding, min(prompts, self.limits.chunk))

    def _admit(self) -> None:
        """Give slots to waiting chains, in order, while there are pages to begin with."""
        while self.waiting and self._free_slots:
            chain = self.waiting[0]
            if self._prompt_under_way(chain):
                return  # its pages are nearly there to share
            shared = self._give_pages(chain)
            if shared is None:
                return
            self.waiting.popleft()
            chain.slot = self._free_slots.pop()
            self.running.append(chain)
            if chain.kept:
                self._fetch(chain, shared)
            else:
                self._fork(chain)

    def _give_pages(self, chain: Chain) -> int | None:
        """Pages that a waiting chain begins with. Returns how many are shared, the first; None for too few free."""
        shared: list[int] = []
        if not chain.evicted:
            # A token is left to compute even where all of the prompt is known: its logits are wanted.
            shared = self.prefixes.match(chain.tokens[: chain.cached or len(chain.tokens) - 1])
        reused = len(shared) * PAGE
        entering = chain.held if chain.kept else min(reused + self.limits.chunk, len(chain.tokens))
        needed = pages_of(entering) - len(shared)
        # Half a page for each running chain: a step later it may need one.
        room = not self.running or self._reachable() >= needed + len(self.running) // 2
        if room and chain.kept:
            # An evicted page that only the tree holds stays while a chain holds a later one.
            self.prefixes.forget(needed - self.pool.free)
            room = self.pool.free >= needed
        if not room:
            for page in shared:
                self.pool.give_back(page)
            return None
        chain.pages = shared[:]
        if chain.kept:
            self.pool.extend(chain.pages, needed)
        else:
            chain.cached = reused
            self.tally.reused += reused
        return len(shared)

    def _fetch(self, chain: Chain, shared: int) -> None:
        assert self._tier is not None
        chain.kept = False
        if self._tier.fetch(chain, shared):
            self.tally.fetched += 1
        else:
            chain.cached, chain.evicted, chain.mass = shared * PAGE, 0, []

    def _fork(self, chain: Chain) -> None:
        """Copy the prompt's last page, which is shared only up to where samples part, from one that has computed it."""
        known = len(chain.request.prompt) - 1  # the last token's logits are wanted
        place, count = known // PAGE, known % PAGE
        if self._copy is None or not count or len(chain.pages) != place or not self.pool.free:
            return
        for other in self.running:
            if other.request is chain.request and other.cached > known and not other.evicted:
                self.pool.extend(chain.pages, 1)
                chain.cached += count
                if self._copy(other, chain, place):
                    self.tally.reused += count
                else:
                    chain.cached -= count
                return

    def _prompt_under_way(self, chain: Chain) -> bool:
        """Whether a sample of the same prompt computes it, and none has."""
        cached = [c.cached for c in self.running if c.request is chain.request]
        return bool(cached) and max(cached) < len(chain.request.prompt)

    def _reachable(self) -> int:
        """Free pages, and those that the prefix tree could give back."""
        return self.pool.free + self.prefixes.forgettable

    def _make_room(self, chain: Chain, count: int) -> bool:
        """Pages for so many more tokens, from the prefix tree or the youngest chain where none is free."""
        needed = pages_of(chain.held + count) - len(chain.pages)
        if needed <= 0:
            return True
        while self.pool.free < needed:
            if self.prefixes.forget(needed - self.pool.free):
                continue
            youngest = max(self.running, key=lambda c: c.arrival)
            self._preempt(youngest)
            if youngest is chain:
                return False
        self.pool.extend(chain.pages, needed)
        return True

    def _preempt(self, chain: Chain) -> None:
        self.tally.preempted += 1
        if chain.held and self._tier is not None and self._tier.keep(chain):
            chain.kept = True
            self.tally.kept += 1
        self._vacate(chain)
        self.waiting.appendleft(chain)

    def _vacate(self, chain: Chain) -> None:
        assert chain.slot is not None
        self.running.remove(chain)
        self._free_slots.append(chain.slot)
        chain.slot, chain.left = None, chain.left + 1
        for page in reversed(chain.pages):  # whose next holder gets them in order, to be read as a stream
            self.pool.give_back(page)
        chain.pages = []
        if not chain.kept:
            chain.cached, chain.evicted, chain.mass = 0, 0, []
