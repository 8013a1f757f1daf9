"""Prompts of a file, and their tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from anabranch.errors import ConfigError


class Prompt(NamedTuple):
    """Text, or the messages of a conversation. line: in its file, from 1 on."""

    line: int
    text: str | None
    messages: list[dict[str, Any]] | None


def read_prompts(path: Path) -> list[Prompt]:
    """A .txt file holds a prompt a line; a .jsonl file an object a line, with "prompt" or "messages".

    Empty lines are skipped. Raises ConfigError naming the line that is wrong.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{path} is neither a .txt nor a .jsonl file", setting="prompts")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", setting="prompts") from error
    read = _of_json if path.suffix == ".jsonl" else lambda _, number, line: Prompt(number, line, None)
    prompts = [read(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt", setting="prompts")
    return prompts


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[int, ...]:
    """The prompt's tokens; with `chat` as the model's template puts a user's message, or the messages.

    Raises ConfigError for messages without `chat`, and where there is no template or it refuses them.
    """
    if not chat:
        if prompt.text is None:
            raise ConfigError(f"line {prompt.line} holds messages; give --chat", setting="prompts")
        return tuple(tokenizer(prompt.text)["input_ids"])
    if tokenizer.chat_template is None:
        raise ConfigError("the model's tokenizer has no chat template; leave --chat out", setting="chat")
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise ConfigError(
            f"line {prompt.line}: the chat template refuses it: {error}", setting="prompts"
        ) from error
    assert isinstance(text, str)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokens_of(setting: str, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens of a setting's text by itself. Raises ConfigError where there are none."""
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokens:
        raise ConfigError(f"{text!r} has no tokens", setting=setting)
    return tokens


def _of_json(path: Path, number: int, line: str) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: no JSON: {error}", setting="prompts") from error
    text, messages = (
        (content.get("prompt"), content.get("messages")) if isinstance(content, dict) else (None, None)
    )
    if isinstance(text, str) and messages is None:
        return Prompt(number, text, None)
    if text is None and _are_messages(messages):
        return Prompt(number, None, messages)
    raise ConfigError(
        f'{path}, line {number}: must be {{"prompt": TEXT}} or {{"messages": [{{"role": ..., "content": ...}}]}}',
        setting="prompts",
    )


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    )
