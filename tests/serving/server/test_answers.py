"""Answers through the real `openai` client equal those of the engine in this process."""

import openai
import pytest
from tests.serving.server.conftest import Server

from anabranch.scheduling.sampling import Sampling

PROMPT = "def wrap(text, width=70):"


def test_a_greedy_completion_is_the_engines(server, oracle):
    [(expected, text)] = oracle.complete(PROMPT, 24)
    got = server.client().completions.create(
        model="toy", prompt=PROMPT, max_tokens=24, temperature=0, logprobs=0
    )
    choice = got.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == (text, "length", 0)
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == 24
    prompt_tokens = len(oracle.tokenizer(PROMPT)["input_ids"])
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (prompt_tokens, 24)


def test_a_stream_of_completions_joins_to_the_whole(server):
    asked = {
        "model": "toy",
        "prompt": [PROMPT, "import re"],
        "max_tokens": 40,
        "n": 2,
        "seed": 3,
        "logprobs": 0,
    }
    client = server.client()
    whole = client.completions.create(**asked)
    text, ends, logprobs, usage = [""] * 4, [None] * 4, [[] for _ in range(4)], None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            logprobs[choice.index] += choice.logprobs.token_logprobs
    assert text == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    for mine, choice in zip(logprobs, whole.choices, strict=True):
        assert mine == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)


def test_an_answer_can_be_sent_back_as_it_came(server):
    """The client writes the fields that it got, those that are null too."""
    client, messages = server.client(), [{"role": "user", "content": "Dedent this"}]
    asked = {"model": "toy", "max_completion_tokens": 8, "temperature": 0}
    first = client.chat.completions.create(**asked, messages=messages)
    messages += [first.choices[0].message, {"role": "user", "content": "And that", "name": None}]
    assert client.chat.completions.create(**asked, messages=messages).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.refusal"):
        refused = [{"role": "user", "content": "x", "refusal": "no"}]
        client.chat.completions.create(**asked, messages=refused)


def test_a_developer_is_the_system_of_a_template_that_knows_none(server):
    def answer(role: str) -> str:
        messages = [{"role": role, "content": "Short."}, {"role": "user", "content": "Dedent this"}]
        asked = {"model": "toy", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
        return server.client().chat.completions.create(**asked).choices[0].message.content

    assert answer("developer") == answer("system") != answer("assistant")


def test_a_chat_is_the_engines_on_the_templates_text(server, oracle):
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": [{"type": "text", "text": "Dedent"}, {"type": "text", "text": " this"}]},
    ]
    [(_, text)] = oracle.complete("system: Short.\nuser: Dedent this\nassistant:", 20)
    asked = {"model": "toy", "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    client = server.client()
    whole = client.chat.completions.create(**asked, logprobs=True)
    assert whole.choices[0].message.content == text
    assert len(whole.choices[0].logprobs.content) == 20
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_without_a_limit_may_have_what_the_pages_hold(served_model, tmp_path):
    server = Server(served_model, tmp_path / "server", "--kv-memory-mib", "1")
    asked = {"model": "toy", "messages": [{"role": "user", "content": "Dedent this"}], "temperature": 0}
    try:
        answer = server.client().chat.completions.create(**asked)
        refused = server.post({**asked, "max_tokens": 4000}, "/v1/chat/completions")
    finally:
        server.stop()
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert refused.status_code == 400
    assert "more than 2048" in refused.json()["error"]["message"]


def test_samples_are_the_engines_of_the_same_seed(server, oracle):
    sampling = Sampling(1.1, 0.9, 40, 0.95, 0.01, seed=7)
    expected = [text for _, text in oracle.complete(PROMPT, 16, 3, sampling)]
    got = server.client().completions.create(
        model="toy", prompt=PROMPT, max_tokens=16, n=3, seed=7, temperature=0.9, top_p=0.95,
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert [choice.text for choice in got.choices] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("budget", [0, 6])
def test_a_thought_ends_where_its_budget_is_spent(server, oracle, budget):
    """The first tokens are those of the same request without a budget; the closing words and the end come next."""
    free = oracle.complete(PROMPT, budget)[0][1] if budget else ""
    got = server.client().completions.create(
        model="toy", prompt=PROMPT, max_tokens=30, temperature=0,
        extra_body={"thinking_budget": budget, "end_of_thought": "</think>", "closing_words": " So"},
    )  # fmt: skip
    assert got.choices[0].text.startswith(f"{free} So</think>")
    assert got.usage.completion_tokens == 30


def test_without_a_seed_samples_differ_from_call_to_call(server):
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 16}
    texts = {server.client().completions.create(**asked).choices[0].text for _ in range(3)}
    assert len(texts) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_its_choice(server, oracle, stream):
    [(_, text)] = oracle.complete(PROMPT, 200)
    at = next(
        i for i in range(30, len(text)) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i
    )
    stop = text[at : at + 3]
    asked = {
        "model": "toy",
        "prompt": PROMPT,
        "max_tokens": 4000,
        "temperature": 0,
        "stop": [stop, "no such text"],
    }
    if stream:
        pieces = [c.choices[0] for c in server.client().completions.create(**asked, stream=True)]
        got, end = "".join(piece.text for piece in pieces), pieces[-1].finish_reason
    else:
        whole = server.client().completions.create(**asked)
        got, end = whole.choices[0].text, whole.choices[0].finish_reason
        assert whole.usage.completion_tokens < 200
    assert (got, end) == (text[:at], "stop")


def test_token_ids_are_prompts_too(server, oracle):
    [(_, text)] = oracle.complete(PROMPT, 8)
    ids = oracle.tokenizer(PROMPT)["input_ids"]
    for prompt in (ids, [ids]):
        got = server.client().completions.create(model="toy", prompt=prompt, max_tokens=8, temperature=0)
        assert got.choices[0].text == text


def test_models(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health_and_metrics(server):
    assert server.get("/health").json() == {"status": "ready", "restarts": 0}
    server.post({"model": "toy", "prompt": "x", "max_tokens": 1})
    assert server.metric("requests_total", endpoint="/v1/completions", status="200") >= 1
    assert server.metric("worker_ready") == 1
    assert server.metric("kv_pages_leaked") == 0
