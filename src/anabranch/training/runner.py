"""One training run, as one rank sees it."""

import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import PrinterCallback

from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.integrations.callback import AdaptiveCallback
from anabranch.integrations.own_share import own_shares
from anabranch.integrations.transformers import NAME, register
from anabranch.placement.pricing import Pricing
from anabranch.telemetry.jsonl import JsonlSink
from anabranch.telemetry.sinks import Sink
from anabranch.telemetry.tensorboard import TensorboardSink
from anabranch.training.agreement import is_first, join, on_all_ranks, require_equal, wait_at_most, world_size
from anabranch.training.checkpoints import discard_after, latest_checkpoint, step_of
from anabranch.training.config import RunConfig
from anabranch.training.data import TrainingData, build_data
from anabranch.training.folder import write_json
from anabranch.training.origin import Origin, find_origin
from anabranch.training.recorder import OrderlyStop, StepRecorder, TraceRecorder
from anabranch.training.summary import RunSummary, read_records, summarise
from anabranch.training.trainer import AdaptiveTrainer

# Validation windows of one evaluation: enough to tell runs apart, few enough not to dominate short ones.
EVAL_WINDOWS = 128


def run(config: RunConfig, pricing: Pricing, watchers: Sequence[Sink] = ()) -> RunSummary:
    """Train as configured, on this rank of a group of ranks, which it joins if need be.

    1. The ranks make sure that settings, model, data and the checkpoint to go on from are usable on all of
       them, and load the model. Until then nothing is written to `out`.
    2. Rank 0 claims the folder, or clears it of what is to be done again.
    3. They train, evaluate and save. SIGINT and SIGTERM end the run after a step, with a checkpoint.

    pricing: where `auto` finds what a choice costs. watchers: further sinks for the step records, used on
    rank 0. The summary is complete on rank 0. Raises AnabranchError for what the user can correct, on every rank.
    """
    join(config.timeout_s)
    require_equal(_shared_settings(config))
    origin = on_all_ranks(lambda: _usable_here(config))
    data = _data(config, origin)
    identity = config.identity() | {"architecture": origin.digest(), "data_fingerprint": data.fingerprint}
    checkpoint = None
    if config.resume:
        checkpoint = on_all_ranks(lambda: latest_checkpoint(config.folder.checkpoints, identity))
    register(config.experts, pricing)
    model = _load(config, origin, checkpoint)
    wait_at_most(config.timeout_s)
    with OrderlyStop() as stop:
        on_all_ranks(lambda: _open_folder(config, checkpoint))
        return _train(config, model, data, identity, checkpoint, watchers, stop)


def usable_origin(config: RunConfig) -> Origin:
    """The run's model, once settings, folders and model are known to fit each other."""
    config.check()
    origin = find_origin(config.model, config.sequence_length)
    origin.homes(config.group_size)
    return origin


def _usable_here(config: RunConfig) -> Origin:
    if world_size() != config.ranks:
        raise ConfigError(f"{config.ranks} wanted, {world_size()} started; make them equal", setting="ranks")
    return usable_origin(config)


def _shared_settings(config: RunConfig) -> dict[str, Any]:
    """All settings, flat, but the cache, which may be elsewhere on another machine."""
    values = config.to_dict()
    return {**{k: v for k, v in values.items() if k not in ("experts", "cache")}, **values["experts"]}


def _data(config: RunConfig, origin: Origin) -> TrainingData:
    """One rank of each machine goes first: it fills the cache that the others read."""

    def build() -> TrainingData:
        data = build_data(
            list(config.data), vocab_size=origin.vocab_size, sequence_length=origin.sequence_length,
            seed=config.seed, cache_dir=Path(config.cache).expanduser(), max_bytes=config.max_bytes,
            tokenizer=origin.tokenizer(),
        )  # fmt: skip
        step = config.ranks * config.batch_size
        if len(data.train) < step:
            raise DataError(
                f"the text makes {len(data.train)} windows of {origin.sequence_length} tokens, a step takes "
                f"{step}; give more text, or lower batch_size, ranks or sequence_length",
                setting="data",
            )
        return data

    goes_first = os.environ.get("LOCAL_RANK", "0") == "0"
    data = on_all_ranks(lambda: build() if goes_first else None)
    return on_all_ranks(lambda: data or build())


def _load(config: RunConfig, origin: Origin, checkpoint: Path | None) -> PreTrainedModel:
    """The model with the weights of a checkpoint or of its origin, else with new ones of the run's seed."""
    if checkpoint is not None:
        return on_all_ranks(lambda: from_folder(config, checkpoint, "resume"))
    if (weights := origin.weights) is not None:
        return on_all_ranks(lambda: from_folder(config, weights, "model"))
    scratch = config.folder.scratch
    try:
        on_all_ranks(lambda: origin.write_initial(scratch, config.seed) if is_first() else None)
        return on_all_ranks(lambda: from_folder(config, scratch, "out"))
    finally:
        if is_first():
            shutil.rmtree(scratch, ignore_errors=True)


def from_folder(config: RunConfig, folder: Path, setting: str) -> PreTrainedModel:
    """The model with the weights in `folder`, as the run shares it between ranks. setting: what named the folder.

    Raises CheckpointError where they cannot be read or are of another model.
    """
    sharding = DistributedConfig(
        fsdp_size=config.ranks,
        ep_size=config.group_size,
        ep_implementation=NAME,
        fsdp_mixed_precision=config.dtype == "bfloat16",
    )
    try:
        with warnings.catch_warnings():
            # Weights that the folder lacks are initialised, with a warning; they are refused below.
            warnings.filterwarnings("ignore", "DTensor random operators")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                distributed_config=sharding if config.ranks > 1 else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}", setting=setting) from error
    model, found = loaded
    wrong = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if wrong:
        raise CheckpointError(
            f"{folder} has {len(wrong)} weights missing or of another shape, such as {wrong[0]}; "
            "its config.json is of another model",
            setting=setting,
        )
    own_shares(model)
    return model


def _open_folder(config: RunConfig, checkpoint: Path | None) -> None:
    if not is_first():
        return
    if checkpoint is None:
        config.folder.claim(config.to_dict())
    else:
        discard_after(checkpoint)


def _train(
    config: RunConfig,
    model: PreTrainedModel,
    data: TrainingData,
    identity: dict[str, Any],
    checkpoint: Path | None,
    watchers: Sequence[Sink],
    stop: OrderlyStop,
) -> RunSummary:
    folder = config.folder
    trace = TraceRecorder(folder.trace, every=config.trace_every, ids=config.trace_ids)
    balance = AdaptiveCallback(config.meter)
    with ExitStack() as closers:
        recorder = _recorder(config, balance, data, checkpoint, watchers, closers)
        trainer = AdaptiveTrainer(
            model=model,
            args=arguments(config),
            train_dataset=data.train,
            eval_dataset=Subset(data.validation, range(min(EVAL_WINDOWS, len(data.validation)))),
            processing_class=data.tokenizer,
            callbacks=[balance, recorder, stop, *([trace] if config.trace_every else [])],
            identity=identity,
        )
        trainer.remove_callback(PrinterCallback)  # the run's own display shows the logs
        closers.callback(trace.save)
        # A run that died after its last step: the Trainer would take another one.
        if checkpoint is None or step_of(checkpoint) < config.steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        eval_loss = recorder.eval_loss
        if eval_loss is None and not stop.stopped:
            eval_loss = float(trainer.evaluate()["eval_loss"])
    if not stop.stopped:
        trainer.save_model(str(folder.model))
    summary = summarise(
        recorder.records, planner=config.experts.planner, stopped_early=stop.stopped, eval_loss=eval_loss
    )
    if is_first():
        write_json(folder.summary, summary.to_dict())
    return summary


def _recorder(
    config: RunConfig,
    balance: AdaptiveCallback,
    data: TrainingData,
    checkpoint: Path | None,
    watchers: Sequence[Sink],
    closers: ExitStack,
) -> StepRecorder:
    """Rank 0 writes; a resumed run goes on after the records of the checkpoint's step."""
    folder, sinks = config.folder, []
    step = None if checkpoint is None else step_of(checkpoint)
    earlier = on_all_ranks(lambda: [] if step is None else read_records(folder.metrics, step))
    if is_first():
        jsonl, events = (
            closers.enter_context(closing(sink))
            for sink in (
                JsonlSink(folder.metrics, resumed_step=step),
                TensorboardSink(folder.tensorboard, resumed_step=step),
            )
        )
        sinks = [jsonl, events, *watchers]
    tokens = config.ranks * config.batch_size * data.train[0]["input_ids"].shape[0]
    recorder = StepRecorder(balance, sinks, tokens, earlier)
    closers.callback(recorder.flush)
    return recorder


def arguments(config: RunConfig) -> TrainingArguments:
    """What the Trainer is told."""
    return TrainingArguments(
        output_dir=str(config.folder.checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, config.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        prediction_loss_only=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        seed=config.seed,
        # A sharded model has its own mixed precision; by itself a model takes autocast.
        bf16=config.dtype == "bfloat16" and config.ranks == 1,
        use_cpu=torch.accelerator.current_accelerator(check_available=True) is None,
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_timeout=config.timeout_s,
    )
