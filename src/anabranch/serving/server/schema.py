"""What clients may ask: OpenAI's fields, and this engine's own. No field is ignored in silence."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from anabranch.serving.server.refusal import ApiError

# Fields of OpenAI's that are not supported, with the value at which they change nothing.
NEUTRAL: dict[str, dict[str, Any]] = {
    "completions": {"best_of": 1, "echo": False, "suffix": ""},
    "chat": {
        "audio": None, "function_call": "none", "functions": [], "modalities": ["text"],
        "parallel_tool_calls": True, "prediction": None, "reasoning_effort": None,
        "response_format": {"type": "text"}, "store": False, "tool_choice": "none", "tools": [],
        "top_logprobs": 0, "verbosity": None, "web_search_options": None,
    },
}  # fmt: skip
ANYWHERE = {"frequency_penalty": 0, "logit_bias": {}, "presence_penalty": 0, "service_tier": "auto"}
# Fields of OpenAI's that say who asks and what for, and never change an answer.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """A field that is not named is a mistake, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """A field that is null was left out: clients send an answer's message back as they got it."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Strict):
    """include_usage: a last piece tells how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(Strict):
    """What both endpoints know. The ranges of sampling settings are checked by `Sampling`."""

    model: str
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # Not OpenAI's: see scheduling/sampling.py.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    # See scheduling/thinking.py; the ends are texts.
    thinking_budget: int | None = None
    end_of_thought: Stop = "</think>"
    closing_words: Annotated[str, Field(max_length=256)] = ""


class CompletionBody(Body):
    """Of /v1/completions. logprobs 0 asks for those of the chosen tokens; other tokens' are not kept."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Literal[0] | None = None


class TextPart(Strict):
    """A part of a message; other kinds than text are refused."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False


B = TypeVar("B", bound=Body)


def read_body(content: bytes, kind: type[B]) -> B:
    """The body of a request. Raises ApiError (400) naming the field; null means that a field was left out."""
    try:
        given = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    neutral = ANYWHERE | NEUTRAL["chat" if kind is ChatBody else "completions"]
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or name in LABELS:
            continue
        if name not in neutral:
            fields[name] = value
        elif value != neutral[name]:
            raise ApiError(
                400, f"{name} is not supported; leave it out", param=name, code="unsupported_field"
            )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """Of the first field that is wrong: all that is said about it, since a union complains once a member."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    name = str(details[0]["loc"][0])
    if details[0]["type"] == "extra_forbidden":
        where = ".".join(map(str, details[0]["loc"]))
        return ApiError(400, f"unknown field {where}", param=where, code="unknown_field")
    said = dict.fromkeys(d["msg"] for d in details if str(d["loc"][0]) == name)
    return ApiError(400, f"{name}: {' or '.join(said)}", param=name, code="invalid_value")
