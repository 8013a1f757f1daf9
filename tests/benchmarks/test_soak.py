"""The soak test of the server: what it calls a failure, and a short one for real."""

import asyncio
import json
from collections import Counter

import pytest
import typer
from benchmarks.soak import main, unexpected, verdict
from benchmarks.soak_client import get
from typer.testing import CliRunner

GOOD = {
    "wrong_answers": [], "leaked_pages": [0, 0, 0, 0, 0], "unexpected": {}, "restarts": 1, "exit_status": 0,
    "worker_mib": [300.0, 310.0, 305.0, 308.0, 309.0], "front_mib": [200.0, 201.0, 202.0, 202.0, 202.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wrong_answers": ["'x'"]}, "wrong answer"),
        ({"leaked_pages": [0, 0, 3, 0, 0]}, "3 leaked pages after quarter 2"),
        ({"unexpected": {"whole: 500": 2}}, "2 requests ended as 'whole: 500'"),
        ({"worker_mib": [300, 310, 305, 330, 360]}, "memory of the worker grew"),
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
    fine = [
        "whole: right",
        "whole: 429",
        "stream: error event",
        "stream: 503",
        "leave_whole: left",
        "samples: 200",
    ]
    fine += ["oversized: 413", "oversized: 429", "malformed: 400", "malformed: 404"]
    bad = [
        "whole: broken",
        "stream: left",
        "whole: 400",
        "oversized: 200",
        "malformed: 500",
        "oversized: broken",
    ]
    assert unexpected(Counter(fine + bad)) == dict.fromkeys(bad, 1)


def test_a_reply_in_pieces_is_joined():
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 x\r\nRetry-After: 3\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n")
        writer.close()

    async def asked():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await get(server.sockets[0].getsockname()[1], "/")

    assert asyncio.run(asked()) == (429, b"abc0123456789", 3.0)


@pytest.mark.full
def test_a_short_soak(tmp_path):
    file = tmp_path / "soak.json"
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--clients", "20", "--minutes", "0.5", "--json", str(file)])
    [row] = json.loads(file.read_text())["rows"]
    assert (result.exit_code, row["verdict"]) == (0, [])
    assert row["right_answers"] > 0 and row["restarts"] == 1
