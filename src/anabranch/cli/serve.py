"""`anabranch serve`: OpenAI's interface to a model on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli import generate as options
from anabranch.cli.device import quiet
from anabranch.cli.fail import fails_clearly
from anabranch.cli.process import say
from anabranch.errors import ConfigError
from anabranch.scheduling.scheduler import Limits
from anabranch.serving.settings import EngineSettings

Host = Annotated[str, typer.Option(help="address to listen at; beyond loopback a key is needed")]
Port = Annotated[int, typer.Option(help="0 for a free one")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="ANABRANCH_API_KEY", help="what clients must send", show_default=False)
]
Name = Annotated[str | None, typer.Option(help="of the model, for clients [default: the folder's]")]
Chunk = Annotated[int, typer.Option(help="prompt tokens a step")]
MaxTokens = Annotated[int, typer.Option(help="prompt and new tokens of an answer")]
MaxRequests = Annotated[int, typer.Option(help="requests computed at once")]
MaxQueue = Annotated[int, typer.Option(help="requests that may wait; more get 429")]
MaxBodyBytes = Annotated[int, typer.Option(help="of a request")]
DrainS = Annotated[float, typer.Option(help="seconds for running requests at the end")]


@fails_clearly
def serve(
    model: options.Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    name: Name = None,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    kv_memory_mib: options.KvMemory = 512,
    evict_above: options.EvictAbove = None,
    spill_mib: options.Spill = 0,
    spill_folder: options.SpillFolder = None,
    memory_limit_mib: options.MemoryLimit = None,
    store_folder: options.StoreFolder = EngineSettings.store_folder,
    threads: options.Threads = None,
    step: options.Step = "auto",
    speculate: options.Speculate = 0,
    slots: options.Slots = 32,
    chunk: Chunk = 512,
    max_tokens: MaxTokens = 4096,
    max_requests: MaxRequests = 64,
    max_queue: MaxQueue = 256,
    max_body_bytes: MaxBodyBytes = 1 << 20,
    drain_s: DrainS = 30.0,
) -> None:
    """Serve a model over HTTP, as OpenAI's API; SIGTERM or Ctrl-C lets running requests finish."""
    try:
        from anabranch.serving.server.config import ServerSettings
        from anabranch.serving.server.run import run_server
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'anabranch[serve]'") from None
    quiet()
    engine = EngineSettings(
        dtype, kv_dtype, kv_memory_mib, threads, step, Limits(slots, chunk, max_tokens), speculate,
        memory_limit_mib=memory_limit_mib, store_folder=store_folder, evict_above=evict_above, spill_mib=spill_mib,
        spill_folder=spill_folder,
    )  # fmt: skip
    settings = ServerSettings(
        host, port, api_key or None, max_body_bytes, max_requests, max_queue, drain_s=drain_s, engine=engine
    )
    run_server(model, name or Path(model).absolute().name, settings, say)
