"""From a client's body to requests of the engine."""

import secrets
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from anabranch.errors import ConfigError
from anabranch.scheduling.chain import Request
from anabranch.scheduling.sampling import Sampling
from anabranch.scheduling.thinking import Thinking
from anabranch.serving.batch.prompts import tokens_of
from anabranch.serving.loading import load_config, load_tokenizer, positions_of, stop_tokens
from anabranch.serving.server.refusal import ApiError
from anabranch.serving.server.schema import Body, ChatBody, CompletionBody, Message, read_body

# New tokens of a completion that does not say, as in OpenAI's; a chat may fill what is left.
COMPLETION_TOKENS = 16
OPENAI_NAMES = {"samples": "n", "max_new_tokens": "max_tokens"}


class Asked(NamedTuple):
    """A body, understood. usage: a streamed answer ends with counts."""

    requests: list[Request]
    stop: tuple[str, ...]
    logprobs: bool
    stream: bool
    usage: bool


class Reader:
    """Knows the tokenizer and the limits. Takes time: not for the event loop."""

    def __init__(self, folder: str, model: str, tokens: int, max_choices: int) -> None:
        self.model = model
        self.tokenizer = load_tokenizer(Path(folder))
        self._tokens = min(tokens, positions_of(load_config(Path(folder))))
        self._max_choices = max_choices
        self._stop_tokens = stop_tokens(Path(folder), self.tokenizer)

    def bound(self, tokens: int) -> None:
        """No chain of the engine can have more tokens than this, which is known once it runs."""
        self._tokens = min(self._tokens, tokens)

    def completion(self, content: bytes) -> Asked:
        """Of /v1/completions. Raises ApiError."""
        body = read_body(content, CompletionBody)
        given: Any = body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        prompts = [self._encode(p) if isinstance(p, str) else tuple(p) for p in given]
        return self._asked(body, prompts, body.logprobs is not None, COMPLETION_TOKENS)

    def chat(self, content: bytes) -> Asked:
        """Of /v1/chat/completions. Raises ApiError, also where the tokenizer has no chat template."""
        body = read_body(content, ChatBody)
        if body.max_completion_tokens is not None:
            body.max_tokens = body.max_completion_tokens
        if not self.tokenizer.chat_template:
            raise ApiError(
                400, f"{self.model} has no chat template; use /v1/completions", code="no_chat_template"
            )
        turns = [self._turn(message) for message in body.messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(400, f"the chat template refuses this: {error}", param="messages") from None
        assert isinstance(text, str)
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._asked(body, [tuple(prompt)], body.logprobs, None)

    def _turn(self, message: Message) -> dict[str, str]:
        """As the template takes it: one that knows no developer might leave out what a developer says."""
        turn = message.plain()
        if turn["role"] == "developer" and "developer" not in str(self.tokenizer.chat_template):
            turn["role"] = "system"
        return turn

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text)["input_ids"])

    def _asked(
        self, body: Body, prompts: list[tuple[int, ...]], logprobs: bool, default: int | None
    ) -> Asked:
        if body.model != self.model:
            raise ApiError(
                404,
                f"no model {body.model!r}; {self.model!r} is served",
                param="model",
                code="model_not_found",
            )
        thinks = body.thinking_budget is not None
        for name, without, has_effect in (
            ("stream_options", "stream", body.stream),
            ("end_of_thought", "thinking_budget", thinks),
            ("closing_words", "thinking_budget", thinks),
        ):
            if name in body.model_fields_set and not has_effect:
                raise ApiError(
                    400, f"{name} says nothing without {without}", param=name, code="invalid_value"
                )
        if not 1 <= len(prompts) * body.n <= self._max_choices:
            raise ApiError(
                400,
                f"prompts times n make {len(prompts) * body.n}, must lie in 1 to {self._max_choices}",
                param="n",
            )
        try:
            requests = [self._request(body, prompt, default) for prompt in prompts]
        except ConfigError as error:
            name = OPENAI_NAMES.get(str(error.setting), error.setting)
            said = str(error).removeprefix(f"{error.setting}: ")
            raise ApiError(400, f"{name}: {said}", param=name, code="invalid_value") from None
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        return Asked(requests, stop, logprobs, body.stream, body.stream_options.include_usage)

    def _request(self, body: Body, prompt: tuple[int, ...], default: int | None) -> Request:
        left = self._tokens - len(prompt)
        wanted = body.max_tokens or (left if default is None else default)
        if left < max(wanted, 1):
            raise ApiError(
                400,
                f"{len(prompt)} tokens of prompt and {max(wanted, 1)} new ones are more than {self._tokens}",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        sampling = Sampling(
            body.repetition_penalty, body.temperature, body.top_k, body.top_p, body.min_p,
            secrets.randbits(62) if body.seed is None else body.seed,
        )  # fmt: skip
        return Request(prompt, wanted, body.n, sampling, self._stop_tokens, thinking=self._thinking(body))

    def _thinking(self, body: Body) -> Thinking | None:
        if body.thinking_budget is None:
            return None
        end = tokens_of("end_of_thought", body.end_of_thought, self.tokenizer)
        words = body.closing_words
        return Thinking(
            body.thinking_budget, end, tokens_of("closing_words", words, self.tokenizer) if words else ()
        )
