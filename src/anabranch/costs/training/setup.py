"""What is priced: a model on a cluster, in a layout, under some software."""

from dataclasses import dataclass
from typing import Literal

from anabranch.hardware.instance import Cluster
from anabranch.workload.layout import Layout
from anabranch.workload.shape import ModelShape


@dataclass(frozen=True)
class Software:
    """The stack that runs a step, as far as published runs tell it.

    family: a trainer, such as "megatron-bridge"; the key of its efficiency. source: who measured, "" for a run of
    one's own. dispatcher: of experts' rows, "all_to_all" one a choice, "deduplicated" one a (token, node) (DeepEP,
    HybridEP). expert_overlap: the exchange runs beside computation. graphs: kernels are launched from recorded graphs.
    async_tp: tensor-parallel gathers are fused with products. compiled: by torch.compile. folded: the experts' mesh
    is not the attention's (arXiv:2504.14960). scaling: of fp8, per tensor, per row, or in blocks ("mx").
    adapters: LoRA, so most weights get no gradient. packed: fine-tuning on packed sequences.
    recomputed: parts that are run again in backward beside what `Layout.recompute` says, of "mlp" and "norm".
    """

    family: str = "megatron-bridge"
    source: str = ""
    dispatcher: Literal["all_to_all", "deduplicated"] = "all_to_all"
    expert_overlap: bool = False
    graphs: bool = False
    async_tp: bool = False
    compiled: bool = False
    folded: bool = False
    scaling: Literal["", "tensor", "row", "mx"] = ""
    adapters: bool = False
    packed: bool = False
    recomputed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Setup:
    """One run. skew: rows of the busiest rank over the mean, of the experts' computation and exchange."""

    shape: ModelShape
    cluster: Cluster
    layout: Layout
    software: Software = Software()
    skew: float = 1.0
