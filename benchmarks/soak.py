"""A server of its own under many clients, some of which misbehave, and a worker that is killed:

    python -m benchmarks.soak --clients 500 --minutes 10 --json soak.json

Ends with 1 on a wrong answer, a leaked page, an unclear error or growing memory, and where something that it is for did
not happen: no chain that ran was cancelled, no body refused, nothing preempted.

Time is cut in quarters. After each one the clients pause, the server comes to rest, and its pages and memory are
looked at. In the second quarter the worker is killed.
"""

import asyncio
import inspect
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.soak_client import Case, Client, Tally, get
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from anabranch.cli.device import quiet
from anabranch.cli.fail import FAILED, RankDiedError, fails_clearly
from anabranch.cli.results import require_json_file, write_results
from anabranch.scheduling.chain import Request
from anabranch.serving.engine import Engine
from anabranch.serving.settings import EngineSettings
from anabranch.serving.text import text_of
from anabranch.training.tokens import load_or_train_tokenizer

BODY_LIMIT = 32 << 10
# Little memory, so that chains are preempted; fewer places than clients, so that some are sent away.
OPTIONS = ("--name", "soak", "--port", "0", "--max-body-bytes", str(BODY_LIMIT), "--kv-memory-mib", "8")
SOURCES = (textwrap, queue, random, asyncio.queues)
PROMPTS, LONGEST, LENGTHS = 64, 96, (4, 24, 96)
# A prompt whose two most probable tokens are nearly alike somewhere is no test: rounding may decide.
MARGIN = 1e-3
QUARTERS, START_S, REST_S = 4, 180, 60
# Memory may grow by so much over the last quarter: before that the new worker still fills what it keeps.
GROWTH, GROWTH_MIB = 0.01, 4
# The quarter in which the worker is killed.
KILL = 1
# Each of these has to happen. Outcomes of clients, all but the first of those that misbehave.
WANTED = (
    "whole: right", "stream: right", "samples: 200", "leave_stream: left midway", "leave_whole: left", "oversized: 413",
    "malformed: 400",
)  # fmt: skip
# How those end whose bodies are no requests.
OWN = {"oversized": {"413"}, "malformed": {"400", "404"}}
# Last lines of the server's log that a failed run shows.
LOG_LINES = 20
MIB = 1 << 20


@dataclass
class Course:
    """What was seen of a run, as far as it went. looks: the server at rest, before the first quarter and after each.
    outcomes: of each quarter. failure: why it went no further."""

    tally: Tally = field(default_factory=Tally)
    looks: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    outcomes: list[Counter[str]] = field(default_factory=list[Counter[str]])
    failure: str | None = None


def soak(clients: int, minutes: float, folder: Path) -> dict[str, Any]:
    """One row of what was counted and measured; `verdict` is empty when all is well. folder: for the model."""
    cases = write_model(folder)
    command = [sys.executable, "-m", "anabranch", "serve", str(folder), *OPTIONS]
    course, status, logged = Course(), None, folder / "server.log"
    with logged.open("w") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            asyncio.run(_load(clients, minutes * 60, logged, server, cases, course))
            server.send_signal(signal.SIGTERM)
            status = server.wait(REST_S)
        except (OSError, LookupError, ValueError, subprocess.TimeoutExpired) as error:
            course.failure = f"{type(error).__name__}: {error}"
        finally:
            server.kill()
    row = {**_row(clients, minutes, course, len(cases)), "exit_status": status}
    found = verdict(row)
    if found:
        row["log"] = logged.read_text().splitlines()[-LOG_LINES:]
    return {**row, "verdict": found}


def write_model(folder: Path) -> list[Case]:
    """Save a small random model with a tokenizer; what it writes after some prompts, by the engine in this process,
    where transformers' own forward agrees with some margin."""
    texts = [inspect.getsource(module) for module in SOURCES]
    tokenizer = load_or_train_tokenizer(texts, 1024, folder / "tokenizer")
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, moe_intermediate_size=128,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_experts=16,
        num_experts_per_tok=4, max_position_embeddings=4096, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.update({"head_dim": 32})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Bytes that are no character look alike: an answer of them would hide a mistake, so they are never chosen.
    broken = [i for i in range(len(tokenizer)) if not str(tokenizer.decode([i])).isascii()]
    model.get_output_embeddings().weight.data[broken] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    draw = random.Random(0)
    text = "\n".join(texts)
    starts = [draw.randrange(len(text) - 1500) for _ in range(PROMPTS)]
    prompts = [text[at : at + draw.choice((20, 200, 1500))] for at in starts]
    ids = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    with Engine(model, EngineSettings(kv_memory_mib=64)) as engine:
        done = [engine.generate([Request(p, LONGEST, stop_tokens=frozenset({end}))])[0] for p in ids]
    return [
        Case(prompt, length, text_of(tokenizer, completion.tokens[:length], tokens))
        for prompt, tokens, completion in zip(prompts, ids, done, strict=True)
        if agrees(model, tokens, completion.tokens)
        for length in LENGTHS
    ]


def agrees(model: PreTrainedModel, prompt: tuple[int, ...], new: list[int]) -> bool:
    """Whether each new token is the most probable one by more than the margin."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    best, second = logits.topk(2).values.unbind(1)
    assert bool((logits.argmax(1) == torch.tensor(new))[best - second > MARGIN].all())
    return bool((best - second > MARGIN).all())


def verdict(row: dict[str, Any]) -> list[str]:
    """All that is wrong."""
    found = [f"it ended early: {row['failure']}"] if row["failure"] else []
    found += [f"wrong answer: {text}" for text in row["wrong_answers"]]
    found += [f"{n} leaked pages after quarter {i}" for i, n in enumerate(row["leaked_pages"]) if n]
    found += [f"{n} requests ended as {name!r}" for name, n in row["unexpected"].items()]
    found += [f"no request ended as {name!r}" for name in WANTED if not row["outcomes"].get(name)]
    found += [f"no chain was {name}" for name in ("preempted", "cancelled") if not row[name]]
    for name in ("worker", "front"):
        memory = row[f"{name}_mib"]
        if memory[KILL + 2 :] and memory[-1] > memory[-2] * (1 + GROWTH) + GROWTH_MIB:
            found.append(f"memory of the {name} grew: {memory} MiB")
    if row["restarts"] != 1:
        found.append(f"{row['restarts']} workers were replaced, one was killed")
    if row["exit_status"] != 0:
        found.append(f"the server ended with {row['exit_status']}")
    return found


async def _load(
    clients: int,
    seconds: float,
    log: Path,
    server: subprocess.Popen[bytes],
    cases: list[Case],
    course: Course,
) -> None:
    port = await _port(log, server)
    tally, going = course.tally, asyncio.Event()
    crowd = [Client(i, port, cases, BODY_LIMIT, going, tally) for i in range(clients)]
    tasks = [asyncio.create_task(client.run()) for client in crowd]
    course.looks.append(await _rest(port, crowd))
    for quarter in range(QUARTERS):
        before = Counter(tally.outcomes)
        going.set()
        await asyncio.sleep(seconds / QUARTERS / 2)
        if quarter == KILL:
            os.kill(int((await _metrics(port))["worker_pid"]), signal.SIGKILL)
        await asyncio.sleep(seconds / QUARTERS / 2)
        going.clear()
        course.looks.append(await _rest(port, crowd))
        course.outcomes.append(tally.outcomes - before)
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended


def _row(clients: int, minutes: float, course: Course, cases: int) -> dict[str, Any]:
    tally, looks = course.tally, course.looks
    latencies = torch.tensor(tally.latencies_s or [0.0])
    rights = sum(n for name, n in tally.outcomes.items() if name.endswith(": right"))
    return {
        "clients": clients,
        "minutes": minutes,
        "cases": cases,
        "requests": tally.outcomes.total(),
        "right_answers": rights,
        "wrong_answers": tally.wrong,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "unexpected": unexpected(course.outcomes),
        "latency_p50_s": round(float(latencies.quantile(0.5)), 3),
        "latency_p99_s": round(float(latencies.quantile(0.99)), 3),
        "worker_mib": [round(look['resident_bytes{process="worker"}'] / MIB, 1) for look in looks],
        "front_mib": [round(look['resident_bytes{process="front"}'] / MIB, 1) for look in looks],
        "leaked_pages": list(map(_leaked, looks)),
        "preempted": _of_workers(looks, "engine_preempted_total"),
        "cancelled": _of_workers(looks, "engine_cancelled_total"),
        "restarts": int(looks[-1]["worker_restarts_total"]) if looks else 0,
        "failure": course.failure,
    }


def _leaked(look: dict[str, float]) -> int:
    """Pages at rest that are neither free nor in the prefix tree, as the server's own check or its counts say."""
    total, free, cached = (look[f'kv_pages{{state="{state}"}}'] for state in ("total", "free", "cached"))
    return int(max(look["kv_pages_leaked"], total - free - cached))


def _of_workers(looks: list[dict[str, float]], name: str) -> int:
    """What both workers counted, the killed one up to the last rest before its end."""
    return int(sum(look[name] for look in (looks[KILL : KILL + 1] + looks[KILL + 1 :][-1:])))


def unexpected(quarters: Sequence[Counter[str]]) -> dict[str, int]:
    """Outcomes that no client should see. 429 comes of the crowd, 503 and an error event of the kill in its quarter."""
    found = Counter[str]()
    for quarter, outcomes in enumerate(quarters):
        killed = {"503", "error event"} if quarter == KILL else set[str]()
        for name, n in outcomes.items():
            action, end = name.split(": ", 1)
            own = OWN.get(action, {"right", "wrong", "200"} | killed)
            left = {"left", "left midway"} if action.startswith("leave") else set[str]()
            if end not in own | left | {"429"}:
                found[name] += n
    return dict(found)


async def _port(log: Path, server: subprocess.Popen[bytes]) -> int:
    for _ in range(START_S * 10):
        found = re.search(r"at http://127.0.0.1:(\d+)/v1\n", log.read_text())
        if found:
            return int(found[1])
        if server.poll() is not None:
            break
        await asyncio.sleep(0.1)
    raise RankDiedError(f"the server did not start: {log.read_text()[-2000:]}")


async def _metrics(port: int) -> dict[str, float]:
    reply = await get(port, "/metrics")
    if reply.status != 200:
        raise ConnectionError(f"/metrics answered {reply.status or 'nothing'}")
    lines = reply.content.decode().splitlines()
    pairs = (line.removeprefix("anabranch_").rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def _rest(port: int, crowd: list[Client]) -> dict[str, float]:
    """What the server shows once nobody asks anything; one that finds no rest shows the pages it still holds."""
    while any(client.busy for client in crowd):
        await asyncio.sleep(0.05)
    for _ in range(REST_S * 10):
        look = await _metrics(port)
        busy = sum(look.get(name, 1) for name in ("requests_inside", "chains_running", "chains_waiting"))
        if look["worker_ready"] and not busy:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)  # an idle worker checks its pages and says so
    return await _metrics(port)


@fails_clearly
def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="where the row is written")] = None,
    clients: Annotated[int, typer.Option(min=1, help="at once")] = 500,
    minutes: Annotated[float, typer.Option(min=0.1, help="of load; starting and resting come on top")] = 10.0,
) -> None:
    """Hammer a server on loopback with good and bad clients, kill its worker once; ends with 1 where it fails."""
    require_json_file(json_file)
    quiet()
    with tempfile.TemporaryDirectory(prefix="anabranch-soak-") as folder:
        row = soak(clients, minutes, Path(folder))
    write_results(json_file, [row])
    for name, value in row.items():
        if name not in ("wrong_answers", "verdict"):
            typer.echo(f"{name:>16}  {value}")
    for trouble in row["verdict"]:
        typer.secho(trouble, fg="red")
    raise typer.Exit(FAILED if row["verdict"] else 0)


if __name__ == "__main__":
    typer.run(main)
