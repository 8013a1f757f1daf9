"""`anabranch bench codecs`: what each wire codec does to the loss of a whole training, and to one gradient.

Every run trains the same model on the same text in the same order with one transport, so that between them only
the codec differs. Gradients are of one micro-batch at the weights of the uncompressed run.
"""

import heapq
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import anabranch
from anabranch.cli.device import device
from anabranch.cli.launch import launch
from anabranch.integrations.transformers import NAME, AdaptiveSettings
from anabranch.training.config import RunConfig
from anabranch.training.presets import presets
from anabranch.transport.codecs import CODECS, make_codec

# (dispatch, combine): each codec both ways, and the finer one on the way back.
PAIRS = [("none", "none"), *((name, name) for name in CODECS), ("int8", "bf16")]
MODEL, RANKS, TRANSPORT = "tiny", 2, "dedup"
TOKENS = 2048


def bench_codecs(steps: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row a pair of codecs, as they are measured. The first is the uncompressed run."""
    plain_loss: float | None = None
    for dispatch, combine in PAIRS:
        experts = AdaptiveSettings(transport=TRANSPORT, dispatch_wire=dispatch, combine_wire=combine)
        out = folder / f"{dispatch}-{combine}"
        config = RunConfig(
            model=MODEL, ranks=RANKS, steps=steps, out=str(out), experts=experts, save_every=0, eval_every=0
        )
        loss = launch("train", config.to_dict(), RANKS)["eval_loss"]
        plain_loss = plain_loss or loss
        asked = {"model": str(folder / "none-none" / "model"), "dispatch": dispatch, "combine": combine}
        error = launch("codec_gradients", asked, RANKS)
        yield {
            "model": MODEL,
            "ranks": RANKS,
            "steps": steps,
            "transport": TRANSPORT,
            "dispatch_wire": dispatch,
            "combine_wire": combine,
            "bytes_a_number": [_bytes_a_number(name) for name in (dispatch, combine)],
            "eval_loss": round(loss, 5),
            "eval_loss_change_percent": round(100 * (loss / plain_loss - 1), 3),
            **error,
        }


def _bytes_a_number(name: str) -> float:
    hidden, codec = presets()[MODEL].config.hidden_size, make_codec(name)
    return 4.0 if codec is None else codec.row_bytes(hidden) / hidden


def codec_gradients_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The job of one rank: how far the codecs move the gradient of one micro-batch, over all parameters."""
    dist.init_process_group(dist.get_default_backend_for_device(device()))
    plain = _gradients(settings["model"], "none", "none")
    coded = _gradients(settings["model"], settings["dispatch"], settings["combine"])
    difference = torch.sqrt(
        sum(((coded[n] - plain[n]).double().square().sum() for n in plain), torch.zeros(()))
    )
    scale = torch.sqrt(sum((g.double().square().sum() for g in plain.values()), torch.zeros(())))
    cosine = sum(((coded[n] * plain[n]).double().sum() for n in plain), torch.zeros(()))
    norm = torch.sqrt(sum((g.double().square().sum() for g in coded.values()), torch.zeros(())))
    return {
        "gradient_relative_error": float(f"{float(difference / scale):.3g}"),
        "gradient_cosine": round(float(cosine / (scale * norm)), 6),
    }


def _gradients(folder: str, dispatch: str, combine: str) -> dict[str, Tensor]:
    """Whole gradients of one micro-batch of the standard library's text, which differs from rank to rank."""
    anabranch.enable(transport=TRANSPORT, dispatch_wire=dispatch, combine_wire=combine)
    sharding = DistributedConfig(fsdp_size=RANKS, ep_size=RANKS, ep_implementation=NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=sharding)
    text = inspect.getsource((heapq, textwrap)[dist.get_rank() % 2])
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :TOKENS].to(
        device()
    )
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
