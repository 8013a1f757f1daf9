"""`anabranch serve`: OpenAI's interface to a model on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.fail import fails_clearly
from anabranch.cli.process import quiet, say
from anabranch.errors import ConfigError
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.engine import EngineSettings


@fails_clearly
def serve(
    model: Annotated[
        str, typer.Argument(help="folder of a model and its tokenizer, as transformers saves them")
    ],
    host: Annotated[
        str, typer.Option(help="address to listen at; beyond loopback a key is needed")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for a free one")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ANABRANCH_API_KEY", help="what clients must send", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of the model, for clients [default: the folder's]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or int8 [default: the model's]")
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="of keys and values; int8 too [default: dtype]")
    ] = None,
    kv_memory_mib: Annotated[int, typer.Option(help="memory for keys and values")] = 512,
    threads: Annotated[int | None, typer.Option(help="of the native step [default: all cores]")] = None,
    step: Annotated[str, typer.Option(help="native, torch or auto")] = "auto",
    slots: Annotated[int, typer.Option(help="chains computed at once")] = 32,
    chunk: Annotated[int, typer.Option(help="prompt tokens a step")] = 512,
    max_tokens: Annotated[int, typer.Option(help="prompt and new tokens of an answer")] = 4096,
    max_requests: Annotated[int, typer.Option(help="requests computed at once")] = 64,
    max_queue: Annotated[int, typer.Option(help="requests that may wait; more get 429")] = 256,
    max_body_bytes: Annotated[int, typer.Option(help="of a request")] = 1 << 20,
    drain_s: Annotated[float, typer.Option(help="seconds for running requests at the end")] = 30.0,
) -> None:
    """Serve a model over HTTP, as OpenAI's API; SIGTERM or Ctrl-C lets running requests finish."""
    try:
        from anabranch.serving.server.config import ServerSettings
        from anabranch.serving.server.run import run_server
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'anabranch[serve]'") from None
    quiet()
    limits = Limits(slots, chunk, max_tokens)
    engine = EngineSettings(dtype, kv_dtype, kv_memory_mib, threads, step, limits)
    settings = ServerSettings(
        host, port, api_key or None, max_body_bytes, max_requests, max_queue, drain_s=drain_s, engine=engine
    )
    run_server(model, name or Path(model).absolute().name, settings, say)
