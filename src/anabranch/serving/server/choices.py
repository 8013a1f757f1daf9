"""Text of the chains of one request, as it becomes final."""

from collections.abc import AsyncGenerator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from anabranch.scheduling.chain import End, Request
from anabranch.serving.server.backend import News, Stream
from anabranch.serving.server.reading import Asked
from anabranch.serving.text import Detokenizer


class Piece(NamedTuple):
    """What is new of one choice. tokens: those its text is of; finish_reason on its last piece, "stop" or "length"."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[float | None]
    finish_reason: str | None


class _Choice:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, asked: Asked, request: Request) -> None:
        self._detokenizer = Detokenizer(tokenizer, asked.stop, request.prompt)
        self._stream = asked.stream
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[float | None] = []

    def push(self, news: News) -> Piece | None:
        """None while nothing is to be sent. After a stop string, tokens that came with it are dropped."""
        end = news.end
        for token, logprob in zip(news.tokens, news.logprobs, strict=True):
            self._text += self._detokenizer.push(token)
            self._tokens.append(token)
            self._logprobs.append(logprob)
            if self._detokenizer.stopped is not None:
                break
        if end is not None:
            self._text += self._detokenizer.finish()
        if self._detokenizer.stopped is not None:
            end = End.STOP
        if end is None and not (self._stream and self._text):
            return None
        piece = Piece(news.choice, self._text, self._tokens, self._logprobs, end and end.value)
        self._text, self._tokens, self._logprobs = "", [], []
        return piece


async def pieces(
    stream: Stream, asked: Asked, tokenizer: PreTrainedTokenizerBase
) -> AsyncGenerator[Piece, None]:
    """All pieces of all choices; one of each unless they are to be streamed. Raises ApiError.

    A choice that meets a stop string is cancelled.
    """
    choices = [
        _Choice(tokenizer, asked, request) for request in asked.requests for _ in range(request.samples)
    ]
    left = set(range(len(choices)))
    while left:
        news = await stream.next()
        # Of a choice that has ended, tokens may come until its cancellation arrives.
        piece = choices[news.choice].push(news) if news.choice in left else None
        if piece is not None:
            if piece.finish_reason is not None:
                left.remove(piece.choice)
                stream.cancel(piece.choice)
            yield piece
