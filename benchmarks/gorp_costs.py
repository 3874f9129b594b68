"""What GORP's parts cost by formula: operations and bytes, beside what they stand in the place of.

Legend: d_in, d_out width of a layer; r rank of LoRA; k of cores; l = 2 k + 1; t task; N tokens of
a step; q directions of a protected space. One multiplication with its addition counts as 2 operations. Bytes: float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

RANK, CORE_RANK, REFRESH_EVERY = 8, 8, 10
FLOAT = 4


@dataclass(frozen=True)
class Layers:
    """Equal layers, and the tokens of a global batch that each of them reads."""

    count: int
    d_in: int
    d_out: int
    tokens: int

    def each(self, cost: Callable[[Layers], float]) -> float:
        """The cost of all of them."""
        return self.count * cost(self)


@dataclass(frozen=True)
class Backbone:
    """The layers that GORP trains: with LoRA, and with cores."""

    name: str
    lora: Sequence[Layers]
    cores: Sequence[Layers]
    micro_batches: int  # of a step on one rank: each forward passes the projectors again


# A global batch of 64 rows of 512 prompt tokens and 4 label tokens, in micro-batches of 8; LoRA on q and v.
PROMPTS, LABELS = 64 * 512, 64 * 4
LARGE = (
    Backbone(
        "T5-large",
        lora=[Layers(48, 1024, 1024, PROMPTS), Layers(48, 1024, 1024, LABELS)],  # self-attention: encoder, decoder
        cores=[Layers(48, 1024, 1024, PROMPTS), Layers(48, 1024, 1024, LABELS)],  # cross-attention: k and v, q and o
        micro_batches=8,
    ),
    Backbone(
        "LLaMA-2-7B",
        lora=[Layers(64, 4096, 4096, PROMPTS)],
        cores=[Layers(32, 4096, 11008, PROMPTS)],
        micro_batches=8,
    ),
)


def total(layers: Sequence[Layers], cost: Callable[[Layers], float]) -> float:
    """The cost over all layers."""
    return sum(group.each(cost) for group in layers)


# ---- operations


def olora_penalty(layer: Layers, task: int) -> float:
    """`A_old A^T` of (t - 1) r old rows, and in the backward its signs times `A_old`; once a step."""
    return 4 * (task - 1) * RANK**2 * layer.d_in


def projections(layer: Layers, in_a: float, in_b: float) -> float:
    """`A~ - (A~ Q) Q^T` and the same of B~ in the forward, and of their gradients in the backward; each micro-batch."""
    return 8 * RANK * (layer.d_in * in_a + layer.d_out * in_b)


def sketching(layer: Layers) -> float:
    """`x Omega`, `g^T (x Omega)`, `Psi g^T`, `(Psi g^T) x` over the tokens of a window's last step."""
    size = 2 * CORE_RANK + 1
    return 2 * layer.tokens * (layer.d_in + layer.d_out) * (3 * size + 1)


def small_svds(layer: Layers, protected: float) -> float:
    """Y's SVD, `(Psi Q_y)^+ Z`, the small B's SVD, U; Psi, drawn anew, and Y projected twice."""
    size = 2 * CORE_RANK + 1
    rows = 2 * size + 1
    products = 2 * rows * layer.d_out * size + 2 * size * rows * layer.d_in + 2 * layer.d_out * size**2
    projected = 8 * protected * layer.d_out * (rows + size)
    return svd(layer.d_out, size) + products + svd(layer.d_in, size) + projected


def merging(layer: Layers) -> float:
    """`alpha U C V^T` on the host."""
    return 2 * CORE_RANK * layer.d_in * layer.d_out


def full_gradient(layer: Layers) -> float:
    """What sketches stand in the place of: G over the same tokens."""
    return 2 * layer.tokens * layer.d_in * layer.d_out


def svd(m: int, n: int) -> float:
    """A thin SVD of m x n, whichever is larger (Golub and Van Loan, R-SVD with both factors)."""
    m, n = max(m, n), min(m, n)
    return 6 * m * n**2 + 20 * n**3


def constraint_operations(backbone: Backbone, task: int) -> dict[str, float]:
    """Operations of a mean step at `task`, refreshes included; spaces as large as they can be, r (or k) a task."""
    old = (task - 1) * RANK
    cores, every = backbone.cores, REFRESH_EVERY
    adapted = [*backbone.lora, *cores]  # O-LoRA's on all the layers that GORP trains
    return {
        "olora, penalty": total(adapted, lambda layer: olora_penalty(layer, task)),
        "olora, penalty on GORP's LoRA layers alone": total(backbone.lora, lambda layer: olora_penalty(layer, task)),
        "gorp, projections": backbone.micro_batches * total(backbone.lora, lambda layer: projections(layer, old, old)),
        "gorp, sketches / 10": total(cores, sketching) / every,
        "gorp, SVDs / 10": total(cores, lambda layer: small_svds(layer, (task - 1) * CORE_RANK)) / every,
        "gorp, merges / 10": total(cores, merging) / every,
        "naive, full gradients / 10": total(cores, full_gradient) / every,
        "naive, full SVDs / 10": total(cores, lambda layer: svd(layer.d_in, layer.d_out)) / every,
        "base, forward and backward of these layers": 2 * total(adapted, full_gradient),
    }


def counted(work: Callable[[], object]) -> int:
    """Operations of all matrix products and attentions that `work` runs, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


# ---- bytes


def bytes_of(backbone: Backbone) -> dict[str, float]:
    """Optimizer states, bytes averaged over ranks, and what stands on the host or beside the weights."""
    cores = backbone.cores
    k, size = CORE_RANK, 2 * CORE_RANK + 1
    weights = FLOAT * total(cores, lambda layer: layer.d_in * layer.d_out)
    sketches = FLOAT * total(cores, lambda layer: size * layer.d_out + (2 * size + 1) * layer.d_in)
    return {
        "Adam's moments: cores": 2 * FLOAT * total(cores, lambda _: k * k),
        "Adam's moments: full-rank Adam on the same layers": 2 * weights,
        "Adam's moments: the LoRA beside them": 2 * FLOAT * total(backbone.lora, _factors),
        "Adam's moments: inclora on all these layers": 2 * FLOAT * total([*backbone.lora, *cores], _factors),
        "averaged per step: cores": FLOAT * total(cores, lambda _: k * k),
        "averaged per step: sketches / 10": sketches / REFRESH_EVERY,
        "averaged per step: full-rank gradients": weights,
        "broadcast per step: bases / 10": FLOAT
        * total(cores, lambda layer: k * (layer.d_in + layer.d_out + 1))
        / REFRESH_EVERY,
        "host, on every rank: the full-rank weights, as found and as they change": 2 * weights,
        "disk, with every stage: the full-rank weights": weights,
        "device: bases U, V": FLOAT * total(cores, lambda layer: k * (layer.d_in + layer.d_out)),
        "device: bases of LoRA's projectors at task 15, at most": FLOAT * 14 * total(backbone.lora, _factors),
        "device, in a window's last step: sketches, Omega, Psi": sketches
        + FLOAT * total(cores, lambda layer: size * layer.d_in + (2 * size + 1) * layer.d_out),
    }


def _factors(layer: Layers) -> float:
    return RANK * (layer.d_in + layer.d_out)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at once during `work`, above what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def resident_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """The bytes of all memory that the tensors lie in, each piece once."""
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(pieces.values())
