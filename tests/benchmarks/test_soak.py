"""The soak test of the server: what it calls a failure, and a short one for real."""

import asyncio
import json
from collections import Counter

import pytest
import typer
from benchmarks.soak import KILL, QUARTERS, WANTED, main, unexpected, verdict
from benchmarks.soak_client import Case, Client, Leave, Reply, Tally, get, post
from typer.testing import CliRunner

from benchmarks import soak as module

GOOD = {
    "failure": None, "wrong_answers": [], "leaked_pages": [0, 0, 0, 0, 0], "unexpected": {}, "restarts": 1,
    "exit_status": 0, "preempted": 3, "cancelled": 7, "outcomes": dict.fromkeys(WANTED, 1),
    "worker_mib": [300.0, 310.0, 305.0, 308.0, 309.0], "front_mib": [200.0, 201.0, 202.0, 202.0, 202.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"failure": "OSError: x"}, "it ended early: OSError: x"),
        ({"wrong_answers": ["'x'"]}, "wrong answer"),
        ({"leaked_pages": [0, 0, 3, 0, 0]}, "3 leaked pages after quarter 2"),
        ({"unexpected": {"whole: 500": 2}}, "2 requests ended as 'whole: 500'"),
        ({"outcomes": dict.fromkeys(WANTED[1:], 1)}, "no request ended as 'whole: right'"),
        ({"preempted": 0}, "no chain was preempted"),
        ({"cancelled": 0}, "no chain was cancelled"),
        ({"worker_mib": [300, 310, 305, 310, 318]}, "memory of the worker grew"),
        ({"front_mib": [200, 210, 220, 230, 240]}, "memory of the front grew"),
        ({"restarts": 2}, "2 workers"),
        ({"exit_status": -9}, "ended with -9"),
    ],
    ids=str,
)
def test_one_fault_is_one_line(change, said):
    assert verdict(GOOD) == []
    [line] = verdict({**GOOD, **change})
    assert said in line


def test_what_no_client_should_see():
    fine = ["whole: right", "whole: 429", "leave_whole: left", "leave_stream: left midway", "samples: 200"]
    fine += ["oversized: 413", "oversized: 429", "malformed: 400", "malformed: 404"]
    killed = ["stream: error event", "stream: 503"]
    bad = [
        "whole: broken", "stream: left", "whole: 400", "oversized: 200", "malformed: 500", "oversized: broken",
        "leave_whole: broken", "whole: unclear 503", "whole: unreadable (ValueError)", "malformed: 503",
    ]  # fmt: skip
    quarters = [Counter(fine)] * QUARTERS
    quarters[KILL] = Counter(fine + killed + bad)
    assert unexpected(quarters) == dict.fromkeys(bad, 1)
    quarters[KILL + 1] = Counter(fine + killed)
    assert unexpected(quarters) == dict.fromkeys(killed + bad, 1)


def _served(*pieces, waits=False, asked):
    """What `asked` gets of a server that sends these pieces, and then waits until the client is gone, or closes."""

    async def run():
        ended = asyncio.Event()

        async def serve(reader, writer):
            try:
                await reader.readuntil(b"\r\n\r\n")
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                while waits and await reader.read(100):
                    pass
            except ConnectionError:
                pass
            finally:
                writer.close()
                ended.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            reply = await asked(server.sockets[0].getsockname()[1])
            await ended.wait()
            await asyncio.sleep(0.01)  # closing takes a turn of the loop
        return reply

    return asyncio.run(run())


CHUNKED = b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_reply_in_pieces_is_joined():
    head = CHUNKED.replace(b"200 x", b"429 x\r\nRetry-After: 3")
    reply = _served(head, b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", asked=lambda port: get(port, "/"))
    assert reply == (429, b"abc0123456789", 3.0, False)


@pytest.mark.parametrize(
    "pieces",
    [
        (CHUNKED, b"3\r\nabc\r\n"),
        (CHUNKED, b"A\r\nabc"),
        (CHUNKED, b"A"),
        (b"HTTP/1.1 200 x\r\nContent-Length: 9\r\n\r\nabc",),
        (b"HTTP/1.1 200 x\r\nConte",),
        (),
    ],
    ids=str,
)
def test_a_reply_that_ends_early_is_none(pieces):
    reply = _served(*pieces, asked=lambda port: get(port, "/"))
    assert reply.status == 0 and not reply.left


def test_who_left_is_told_from_who_was_cut_off():
    begun = b"3\r\nabc\r\n"
    midway = _served(
        CHUNKED, begun, waits=True, asked=lambda port: post(port, b"", Leave(0.05, once_begun=True))
    )
    assert midway.left and midway.content == begun
    early = _served(waits=True, asked=lambda port: post(port, b"", Leave(0.05, once_begun=False)))
    assert early == Reply(0, b"", 0.0, left=True)
    cut = _served(CHUNKED, begun, asked=lambda port: post(port, b"", Leave(5.0, once_begun=True)))
    assert cut.status == 0 and not cut.left


def test_a_client_judges_what_it_gets():
    tally, case = Tally(), Case("p", 4, "text")
    client = Client(0, 0, [case], 10, asyncio.Event(), tally)

    def judged(action, status, content, **more):
        return client._judge(action, Reply(status, content, 0.0, **more), case)

    clear = b'{"error": {"message": "too many"}}'
    assert judged("whole", 429, clear) == "429"
    for unclear in (b"", b"<html>", b"{}", b'{"error": {"message": " "}}', b'{"error": "x"}'):
        assert judged("whole", 503, unclear).startswith(("unclear", "unreadable"))
    assert judged("whole", 200, b'{"choices": [{"text": "text"}]}') == "right"
    assert judged("whole", 200, b'{"choices": []}') == "unreadable (IndexError)"
    assert judged("stream", 200, b"") == "unreadable (IndexError)"
    streamed = b'data: {"choices": [{"text": "te"}]}\n\ndata: {"choices": [{"text": "xt"}]}\n\n'
    assert judged("stream", 200, streamed) == "broken"
    assert judged("stream", 200, streamed + b"data: [DONE]\n\n") == "right"
    assert judged("leave_stream", 200, streamed + b"data: [DONE]\n\n") == "200"
    assert judged("stream", 200, b"data: " + clear) == "error event"
    assert judged("stream", 200, b'data: {"error": {}}').startswith("unreadable")
    assert judged("leave_stream", 0, b"x", left=True) == "left midway"
    assert judged("leave_whole", 0, b"") == "broken"
    assert not tally.wrong
    assert judged("whole", 200, b'{"choices": [{"text": "other"}]}') == "wrong" and tally.wrong


def test_a_server_that_dies_leaves_a_row(tmp_path, monkeypatch):
    async def load(clients, seconds, log, server, cases, course):
        course.tally.outcomes["whole: right"] += 1
        raise ConnectionError("gone")

    monkeypatch.setattr(module, "write_model", lambda folder: [])
    monkeypatch.setattr(module, "_load", load)
    row = module.soak(1, 0.1, tmp_path)
    assert row["right_answers"] == 1 and "it ended early: ConnectionError: gone" in row["verdict"]
    assert "no chain was cancelled" in row["verdict"]


@pytest.mark.full
def test_a_short_soak(tmp_path):
    file = tmp_path / "soak.json"
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--clients", "20", "--minutes", "0.5", "--json", str(file)])
    [row] = json.loads(file.read_text())["rows"]
    assert (result.exit_code, row["verdict"]) == (0, [])
    assert row["right_answers"] > 0 and row["restarts"] == 1
