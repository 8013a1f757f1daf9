"""Answers in the shapes of OpenAI's two endpoints, whole or in pieces."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from anabranch.serving.server.choices import Piece
from anabranch.serving.server.reading import Asked
from anabranch.serving.text import BROKEN


class Format(ABC):
    """One answer. Pieces are shown in the order in which they come."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str, asked: Asked, tokenizer: PreTrainedTokenizerBase) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        # Of each choice: characters shown so far, which is where a piece's tokens begin.
        self._shown: dict[int, int] = {}
        self._new_tokens = 0

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One event of a stream."""
        choice = self._choice(piece, self._delta(piece.text, piece.choice not in self._shown))
        usage = {"usage": None} if self._asked.usage else {}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **usage}

    def last_chunk(self) -> dict[str, Any]:
        """The counts that end a stream, for those who ask."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage()}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer at once, of one piece a choice."""
        choices = [self._choice(piece, self._text(piece.text)) for piece in sorted(pieces)]
        return {**self._head, "object": self.object, "choices": choices, "usage": self._usage()}

    def _choice(self, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if self._asked.logprobs else None
        self._shown[piece.choice] = self._shown.get(piece.choice, 0) + len(piece.text)
        self._new_tokens += len(piece.tokens)
        return {"index": piece.choice, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt) for request in self._asked.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._new_tokens,
            "total_tokens": prompt + self._new_tokens,
        }

    def _token_texts(self, piece: Piece) -> list[str]:
        return [str(self._tokenizer.decode([token])) for token in piece.tokens]

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, text: str, first: bool) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, piece: Piece) -> dict[str, Any]: ...


class CompletionFormat(Format):
    """Of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str, first: bool) -> dict[str, Any]:
        return self._text(text)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        texts = self._token_texts(piece)
        offsets = [self._shown.get(piece.choice, 0)]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": piece.logprobs,
            "top_logprobs": None,
            "text_offset": offsets[: len(texts)],
        }


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, "content": text}}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        content = [
            {"token": text, "logprob": logprob, "bytes": _bytes(text), "top_logprobs": []}
            for text, logprob in zip(self._token_texts(piece), piece.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}


def _bytes(text: str) -> list[int] | None:
    """None for a part of a character, whose bytes the text does not tell."""
    return None if BROKEN in text else list(text.encode())
