"""Clients that leave, too many of them, a worker that dies, and the server's end."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from tests.serving.server.conftest import until

LONG = {"model": "toy", "prompt": "def wrap", "max_tokens": 4000, "temperature": 0}


def unfinished(server) -> float:
    """Tokens that the worker has computed."""
    return server.metric("engine_decoded_total")


def test_a_client_that_leaves_a_stream_frees_its_pages(server):
    until(server.free)
    before = unfinished(server)
    stream = server.client().completions.create(**LONG, n=4, stream=True)
    next(iter(stream))
    stream.close()
    until(server.free)
    assert unfinished(server) - before < 4 * 3999, "they ran to their ends"
    until(lambda: server.metric("requests_total", endpoint="/v1/completions", status="499") >= 1)


def test_a_client_that_leaves_before_its_answer_frees_its_pages(server):
    until(server.free)
    before = unfinished(server)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**LONG, "n": 4}, timeout=0.5)
    until(server.free)
    assert unfinished(server) - before < 4 * 3999, "they ran to their ends"
    until(lambda: server.metric("kv_pages_leaked") == 0 and server.metric("requests_inside") == 0)


def test_a_killed_worker_is_replaced(server):
    client = server.client()
    asked = {**LONG, "max_tokens": 8}
    before = client.completions.create(**asked).choices[0].text
    with ThreadPoolExecutor(1) as thread:
        whole = thread.submit(client.completions.create, **LONG, n=4)
        stream = iter(client.completions.create(**LONG, n=4, stream=True))
        next(stream)
        until(lambda: server.metric("requests_running") == 2)
        os.kill(int(server.metric("worker_pid")), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine's process ended"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="engine's process ended"):
            whole.result()
    health = server.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "restarting", "restarts": 1})
    refused = server.post(asked)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    until(lambda: server.get("/health").status_code == 200, 60)
    assert client.completions.create(**asked).choices[0].text == before
    until(server.free)


def test_too_many_requests_then_a_drain(tight_server):
    """Last of this server: it ends here."""
    client, long = tight_server.client(), {**LONG, "model": "bare"}
    running = iter(client.completions.create(**long, stream=True))
    text = next(running).choices[0].text
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.completions.create, **{**long, "max_tokens": 4})
        until(lambda: tight_server.metric("requests_inside") == 2)
        with pytest.raises(openai.RateLimitError) as refusal:
            client.completions.create(**long)
        assert refusal.value.response.headers["Retry-After"] == "1"
        tight_server.process.send_signal(signal.SIGTERM)
        until(lambda: tight_server.get("/health").json()["status"] == "draining")
        late = tight_server.post(long)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        for chunk in running:
            text += chunk.choices[0].text
        assert chunk.choices[0].finish_reason == "length"
        assert waiting.result().choices[0].finish_reason == "length"
    assert len(text) > 4000 / 2
    assert tight_server.process.wait(20) == 0


def test_a_second_signal_cuts_the_drain_short(server):
    """Last of this server: it ends here."""
    running = iter(server.client().completions.create(**LONG, n=16, stream=True))
    next(running)
    server.process.send_signal(signal.SIGINT)
    until(lambda: server.get("/health").json()["status"] == "draining")
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(running)
    assert server.process.wait(20) == 0
    assert server.said.count("\n") == 2  # that it served, and that it ended
