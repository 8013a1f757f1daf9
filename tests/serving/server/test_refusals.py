"""What is not answered is refused clearly, in the shape of OpenAI's errors."""

import socket

import openai
import pytest
from typer.testing import CliRunner

from anabranch.cli.main import app

GOOD = {"model": "toy", "prompt": "x", "max_tokens": 2}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"top_n": 3}, "top_n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"prompt": []}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_budget": 1, "end_of_thought": ""}, "end_of_thought"),
        ({"stream_options": {"include": True}}, "stream_options.include"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"closing_words": "So"}, "closing_words"),
        ({"top_k": 2**31}, "top_k"),
        ({"temperature": 1e-40}, "temperature"),
    ],
    ids=str,
)
def test_a_field_that_is_not_honoured(server, change, param):
    answer = server.post({**GOOD, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": "x"}, "prompt"),
    ],
    ids=str,
)
def test_a_field_of_a_chat_that_is_not_honoured(server, change, param):
    answer = server.post({**CHAT, **change}, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_fields_that_change_nothing_are_accepted(server):
    neutral = {
        "best_of": 1,
        "echo": False,
        "logit_bias": {},
        "frequency_penalty": 0,
        "user": "me",
        "suffix": None,
    }
    assert server.post({**GOOD, **neutral}).status_code == 200
    neutral = {"tools": [], "response_format": {"type": "text"}, "top_logprobs": 0, "metadata": {"a": "b"}}
    assert server.post({**CHAT, **neutral}, "/v1/chat/completions").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"temperature": NaN}',
        b'{"prompt": "\\ud800"}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json(server, body):
    answer = server.post(body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("token", [100_000, -1, 1 << 40])
def test_tokens_outside_the_vocabulary(server, token):
    answer = server.post({**GOOD, "prompt": [5, token]})
    assert (answer.status_code, answer.json()["error"]["message"].split(":")[0]) == (400, "prompt")


def test_another_model_another_route_another_kind(server):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        server.client().completions.create(model="other", prompt="x")
    assert server.post(GOOD, "/v1/embeddings").json()["error"]["type"] == "not_found_error"
    assert server.get("/v1/completions").status_code == 405
    assert server.client()._client.post(f"{server.url}/v1/completions", data={"a": "b"}).status_code == 415


def test_a_web_page_cannot_reach_it_by_another_name(server):
    answer = server.client()._client.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 403


def test_a_model_without_a_chat_template(tight_server):
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        tight_server.client().chat.completions.create(
            model="bare", messages=[{"role": "user", "content": "x"}]
        )


def test_a_wrong_key(tight_server):
    with pytest.raises(openai.AuthenticationError):
        tight_server.client("wrong").completions.create(model="bare", prompt="x")
    assert tight_server.client("wrong")._client.get(f"{tight_server.url}/metrics").status_code == 401
    assert tight_server.client("wrong")._client.get(f"{tight_server.url}/health").status_code == 200
    assert tight_server.client().completions.create(model="bare", prompt="x", max_tokens=1).choices


def test_a_large_body(tight_server):
    in_pieces = (b"x" * 1000 for _ in range(9))
    for body in (b"x" * 4001, b"x" * 8_000_000, in_pieces):
        answer = tight_server.post(body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_refusal_arrives_although_the_body_was_not_wanted(tight_server):
    """Refused by its head alone: the client is still sending megabytes when the answer is written."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {tight_server.key}\r\n"
        "Content-Type: text/plain\r\nContent-Length: 8000000\r\n\r\n"
    )
    port = int(tight_server.url.rsplit(":", 1)[1])
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head.encode() + b"x" * 8_000_000)
            assert connection.recv(100).startswith(b"HTTP/1.1 415")


@pytest.mark.full  # the server waits for a minute
def test_who_sends_its_body_too_slowly_loses_the_connection(tight_server):
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {tight_server.key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    port, got = int(tight_server.url.rsplit(":", 1)[1]), b""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(head.encode())
        for _ in range(75):
            try:
                connection.sendall(b" ")
                piece = connection.recv(4096)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            got += piece
            if not piece:
                break
        else:
            pytest.fail("still connected")
    assert got.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "needs a key"),
        (["--port", "70000"], "port"),
        (["--max-requests", "0"], "max_requests"),
        (["--dtype", "float64"], "dtype"),
    ],
)
def test_a_server_that_must_not_start(served_model, options, message):
    result = CliRunner().invoke(app, ["serve", str(served_model), *options])
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_a_folder_without_a_model(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        result = CliRunner().invoke(app, ["serve", str(folder)])
        assert (result.exit_code, "model" in result.stderr) == (2, True)
