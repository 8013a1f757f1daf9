"""Text of a chain as its tokens come: whole characters only, and never a piece of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# What a tokenizer shows for bytes that are no character, or not yet one.
BROKEN = "\ufffd"
# Tokens decoded together: those before the newest decide about its leading space.
CONTEXT, WINDOW = 8, 24


class Detokenizer:
    """Turns one chain's tokens into text that is final: all it returns, joined, is the chain's text.

    Text that may be the beginning of a stop string, and bytes that may be the beginning of a character, are held
    back until the next tokens decide. prompt: the tokens before the chain's new ones, which are not returned.
    Special tokens have no text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        # The stop string that has ended the text; it and what follows it are not returned.
        self.stopped: str | None = None
        self._window = _context(tokenizer, prompt)
        # Of the window: characters returned or held back for a stop string, and tokens these are of.
        self._taken = len(_decode(tokenizer, self._window).rstrip(BROKEN))
        self._settled = len(self._window)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is final since the call before; empty after a stop string."""
        if self.stopped is not None:
            return ""
        self._window.append(token)
        text = _decode(self._tokenizer, self._window)
        if len(text) <= self._taken or text.endswith(BROKEN):
            return ""
        self._held += text[self._taken :]
        self._settle(len(text))
        self._find_stop()
        return self._release(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """What was held back, when the chain ends without a stop string."""
        if self.stopped is not None:
            return ""
        self._held += _decode(self._tokenizer, self._window)[self._taken :]
        self._find_stop()
        return self._release(len(self._held))

    def _settle(self, taken: int) -> None:
        """All of the window is taken; keep its newest part where it has grown long."""
        before, self._settled = self._settled, len(self._window)
        self._taken = taken
        if len(self._window) > WINDOW:
            del self._window[:before]
            self._settled = len(self._window)
            self._taken = len(_decode(self._tokenizer, self._window))

    def _find_stop(self) -> None:
        """Cut what is held before the stop string that is complete first, however the text came in pieces."""
        hits = [(at + len(s), at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if hits:
            _, at, self.stopped = min(hits)
            self._held = self._held[:at]

    def _doubtful(self) -> int:
        """Characters at the end that may begin a stop string."""
        if self.stopped is not None:
            return 0
        return max((_overlap(self._held, s) for s in self._stop), default=0)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
    """The text of finished new tokens after a prompt."""
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    return "".join([*map(detokenizer.push, tokens), detokenizer.finish()])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _context(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, from where a character begins."""
    count = CONTEXT
    while count < len(prompt) and _decode(tokenizer, prompt[-count:]).startswith(BROKEN):
        count *= 2
    return list(prompt[-count:])


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
