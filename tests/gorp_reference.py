"""GORP in plain PyTorch and float64, from methods.md section 3 alone: what cores, sketches and projectors must equal.

A full-rank module's weight W is a plain tensor whose full gradient autograd forms; no core is attached. Adam, the
growth of spaces and the chain rule through the projections are written out, projections as dense d x d matrices.
Shared with the code under test: the plan of steps, transformers' models, `plain_reference`, one complement basis.

Legend: d_in, d_out width of a layer; r rank of LoRA; k of the core or of a space; A [r, d_in]; B [d_out, r];
W, G [d_out, d_in] weight and its gradient; U [d_out, k], V [d_in, k] singular vectors; C [k, k] core; Q [d, k] basis of
a space, P = I - Q Q^T; N [d, d - k] basis of its complement; m, v Adam's moments; alpha `core_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from plain_reference import Branch, Float64, branch, load_plain, pad, rate_of
from torch import Tensor, nn

from data_prep.batches import Example
from pipeline.projection.subspace import Subspace
from pipeline.recipe import Training

BETAS = (0.9, 0.999)
MISSING = 1e-5  # of the largest singular value: the direction is not there
LEAST_EIGENVALUE = 1e-6  # of the largest: never appended to a space
Steps = Sequence[Sequence[Sequence[int]]]  # by step and micro-batch: rows, negative ones padding
LITERAL = {"mode": "literal", "project": "gradient", "project_b": False, "refresh_moments": "keep"}


@dataclass(frozen=True)
class GorpSettings:
    """The keys that matter here, under the recipe's names; LITERAL are those that `mode: literal` sets there."""

    core_rank: int = 8
    refresh_every: int = 10
    core_scale: float = 1.0
    full_rank_lr: float = 1e-5
    refresh_moments: Literal["rotate", "keep", "reset"] = "rotate"
    project: Literal["exact", "gradient", "off"] = "exact"
    project_b: bool = True
    lora: Literal["shared"] = "shared"
    energy: float = 0.95
    parts: str = "B+L+S"
    mode: Literal["corrected", "literal"] = "corrected"  # of the core


@dataclass
class TaskEnd:
    """How a task ended. Names: `<layer>.A`, `<layer>.B`, `<layer>.C` (`.S` in literal mode); cores by layer."""

    lora: dict[str, Tensor] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)  # W
    spaces: dict[str, Tensor] = field(default_factory=dict)  # bases [d, k], grown by this task
    moments: dict[str, Tensor] = field(default_factory=dict)  # m as the optimizer holds it
    second_moments: dict[str, Tensor] = field(default_factory=dict)  # v
    updates: dict[str, Tensor] = field(default_factory=dict)  # [d_out, d_in]: the task's lifted updates, added up
    bases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # U, V of the last window
    losses: list[float] = field(default_factory=list)


class Adam:
    """Adam with bias corrections (Kingma and Ba 2015, algorithm 1) for one tensor."""

    def __init__(self, like: Tensor, eps: float) -> None:
        self.eps = eps
        self.reset(like)

    def reset(self, like: Tensor) -> None:
        self.m, self.v, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """`m^ / (sqrt(v^) + eps)` after taking `gradient` in: what the rate multiplies."""
        first, second = BETAS
        self.count += 1
        self.m = first * self.m + (1 - first) * gradient
        self.v = second * self.v + (1 - second) * gradient**2
        m, v = self.m / (1 - first**self.count), self.v / (1 - second**self.count)
        return m / (v.sqrt() + self.eps)


def outside(Q: Tensor) -> Tensor:
    """`I - Q Q^T` [d, d]; zero where the space is full, so that no rounding is left for Adam to blow up."""
    identity = torch.eye(len(Q), dtype=torch.float64)
    return identity - Q @ Q.T if Q.shape[1] < len(Q) else torch.zeros_like(identity)


def grown(Q: Tensor, R: Tensor, energy: float) -> Tensor:
    """Section 1's rule by brute force: the residual's left singular vectors, one after another.

    Q [d, k], R [d, n] columns to depend on; the share inside is that of ||R||^2.
    """
    total = float(R.square().sum())
    if total == 0:
        return Q
    residual = R - Q @ (Q.T @ R)
    vectors, lengths, _ = torch.linalg.svd(residual, full_matrices=False)
    values = lengths.square().tolist()
    known = float(torch.linalg.matrix_norm(Q.T @ R, 2)) ** 2 if Q.shape[1] else 0.0
    captured, count = total - sum(values), 0
    for value in values:
        enough = energy < 1 and captured >= energy * total
        if enough or value <= LEAST_EIGENVALUE * max(known, values[0]) or Q.shape[1] + count == len(Q):
            break
        captured, count = captured + value, count + 1
    return torch.linalg.qr(torch.cat([Q, vectors[:, :count]], dim=1)).Q if count else Q


class Factor:
    """A LoRA tensor in section 1's trained form: plain, `start + A~ P`, or `start + C N^T`.

    All but `start`, `value`, `moment` and gradients given are rows of R^d: B is transposed, as Adam does not mind.
    """

    def __init__(self, start: Tensor, Q: Tensor, settings: GorpSettings, training: Training, *, left: bool) -> None:
        """`start` [r, d], or [d, r] with `left`; Q [d, k] the space that changes stay out of."""
        self.left, self.decay = left, training.weight_decay
        self.start = self._rows(start)
        d, k = Q.shape
        self.map: Tensor | None = None  # [d, n]: the change is `trained @ map.T`; None: the tensor itself is trained
        self.hook = outside(Q) if settings.project == "gradient" and k else None  # [d, d]
        if settings.project == "exact" and d / 2 < k < d:
            # Adam is not invariant to the choice of N, so this must be the very N of the code under test.
            self.map = Subspace(Q.float()).complement.double()
        elif settings.project == "exact" and k:
            self.map = outside(Q)
        self.trained = self.start if self.map is None else self.start.new_zeros(len(self.start), self.map.shape[1])
        self.adam = Adam(self.trained, training.adam_eps)

    def _rows(self, value: Tensor) -> Tensor:
        """Between the tensor's own layout and rows of R^d."""
        return value.T if self.left else value

    @property
    def value(self) -> Tensor:
        """The tensor that the forward uses."""
        return self._rows(self.trained if self.map is None else self.start + self.trained @ self.map.T)

    @property
    def moment(self) -> Tensor:
        """Adam's m of the trained tensor: A~ [r, d] or C [r, d - k]; for B transposed."""
        return self._rows(self.adam.m)

    @property
    def second_moment(self) -> Tensor:
        """Adam's v of the trained tensor, likewise."""
        return self._rows(self.adam.v)

    def gradient(self, g: Tensor) -> Tensor:
        """The trained tensor's gradient from the gradient of `value`: the chain rule, or the literal hook."""
        g = self._rows(g)
        if self.map is not None:
            return g @ self.map
        return g if self.hook is None else g @ self.hook

    def step(self, gradient: Tensor, rate: float) -> None:
        """AdamW: decoupled decay of the trained tensor, then Adam."""
        self.trained = self.trained * (1 - rate * self.decay) - rate * self.adam.direction(gradient)

    @property
    def columns(self) -> Tensor:
        """R [d, r] of the first moment: `m^T`, lifted by N where C is trained (P would change nothing)."""
        return (self.adam.m if self.map is None else self.adam.m @ self.map.T).T


class Core:
    """The full-rank update of one weight W through k x k coordinates; `Q` protects R^d_out, or R^k in literal mode."""

    def __init__(self, W: Tensor, Q: Tensor, settings: GorpSettings, training: Training) -> None:
        self.W, self.settings = W, settings
        self.total = torch.zeros_like(W)
        k, project = settings.core_rank, settings.project != "off"
        self.P = outside(Q) if project and Q.shape[1] else torch.eye(len(Q), dtype=torch.float64)
        self.adam = Adam(torch.zeros(k, k, dtype=torch.float64), training.adam_eps)
        self.U = self.V = torch.empty(0)

    @property
    def _literal(self) -> bool:
        return self.settings.mode == "literal"

    def begin(self, G: Tensor) -> None:
        """The task's first U, V."""
        self.U, self.V = leading(G if self._literal else self.P @ G, self.settings.core_rank)

    def gradient(self, G: Tensor) -> Tensor:
        """`dL/dC = alpha U^T G V`; in literal mode with S projected out of it."""
        core = self.settings.core_scale * self.U.T @ G @ self.V
        return self.P @ core if self._literal else core

    def step(self, gradient: Tensor, rate: float) -> None:
        """`W <- W - lr alpha U dC V^T`; no decay."""
        change = -rate * self.settings.core_scale * self.U @ self.adam.direction(gradient) @ self.V.T
        self.total = self.total + change
        self.W.add_(change)

    def refresh(self, G: Tensor) -> None:
        """New U, V from G; the moments go with them (`m` rotated, `v` by the squared rotation), stay, or restart."""
        U, V = self.U, self.V
        self.begin(G)
        if self.settings.refresh_moments == "rotate":
            left, right = self.U.T @ U, V.T @ self.V
            self.adam.m = left @ self.adam.m @ right
            self.adam.v = left**2 @ self.adam.v @ right**2
        elif self.settings.refresh_moments == "reset":
            self.adam.reset(self.adam.m)

    @property
    def columns(self) -> Tensor:
        """R of the first moment: `U m` [d_out, k], or m [k, k] itself in literal mode."""
        return self.adam.m if self._literal else self.U @ self.adam.m


def leading(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U, V of G's k leading singular triplets; columns that are not there are zero.

    Of the two signs of a pair, the one with which u_i's largest entry is positive. Flipping u_i and v_i flips row and
    column i of the core, and Adam with them: only moments that are kept, and S of the literal mode, depend on it.
    """
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    there = min(k, int((S / S[0].clamp(min=1e-300) > MISSING).sum()))
    largest = U[U.abs().argmax(dim=0), torch.arange(U.shape[1])]
    U, V = (nn.functional.pad((part * largest.sign())[:, :there], (0, k - there)) for part in (U, Vt.T))
    return U, V


def clipped(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """All gradients, scaled to a common norm of at most `limit` (0: as they are), as torch and DeepSpeed do it."""
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    return [factor * gradient for gradient in gradients]


class Stream:
    """The model, LoRA and spaces as they stand between tasks."""

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        scale: float,
        cores: Sequence[str],
        settings: GorpSettings,
    ) -> None:
        assert not {name[:-2] for name in start} & set(cores), "a full-rank module carries no LoRA"
        self.model, self.settings = model, settings
        self.lora = {name: value.double().clone() for name, value in start.items()}
        self.branches: dict[str, Branch] = {}
        for layer in sorted({name[:-2] for name in start}):
            self.branches[layer] = branch(model, layer)
            self.branches[layer].add(start[f"{layer}.A"], start[f"{layer}.B"], scale)
        self.weights = {name: model.get_submodule(name).weight for name in cores}
        for W in self.weights.values():
            W.requires_grad_("L" in settings.parts.split("+"))
        self.core_space = "S" if settings.mode == "literal" else "C"
        self.spaces: dict[str, Tensor] = {}

    def space(self, name: str, width: int) -> Tensor:
        """The basis [width, k] of a space."""
        return self.spaces.get(name, torch.zeros(width, 0, dtype=torch.float64))

    def factors(self, training: Training) -> dict[str, Factor]:
        """The trained forms of A (right) and B (left), from where the last task left them."""
        found = {}
        for name, value in self.lora.items():
            left = name.endswith(".B")
            width = value.shape[0 if left else 1]
            guarded = not left or self.settings.project_b
            Q = self.space(name, width) if guarded else torch.zeros(width, 0, dtype=torch.float64)
            found[name] = Factor(value, Q, self.settings, training, left=left)
        return found

    def cores(self, training: Training) -> dict[str, Core]:
        """The full-rank weights that are trained."""
        found = {}
        for layer, W in self.weights.items():
            if W.requires_grad:
                width = self.settings.core_rank if self.core_space == "S" else len(W)
                Q = self.space(f"{layer}.{self.core_space}", width)
                found[layer] = Core(W.detach(), Q, self.settings, training)
        return found

    def backward(self, rows: Sequence[Example], family: str, factors: Mapping[str, Factor]) -> float:
        """Leave the gradients of A, B and W in the model; the loss."""
        with torch.no_grad():
            for name, factor in factors.items():
                self.parameter(name).copy_(factor.value)
        self.model.zero_grad()
        with Float64():
            loss = self.model(**pad(rows, family)).loss
            loss.backward()
        return loss.item()

    def parameter(self, name: str) -> nn.Parameter:
        """`<layer>.A` or `<layer>.B` as it lies in the model."""
        lists = self.branches[name[:-2]]
        return lists.A[0] if name.endswith(".A") else lists.B[0]

    def grow(self, columns: Mapping[str, Tensor]) -> None:
        """Extend each space by its R; without part S, a space is the last task's alone."""
        for name, R in columns.items():
            old = self.space(name, len(R)) if "S" in self.settings.parts.split("+") else R[:, :0]
            self.spaces[name] = grown(old, R, self.settings.energy)


def gorp_plain(
    folder: Path,
    family: str,
    *,
    tasks: Sequence[tuple[Sequence[Example], Steps]],
    start: Mapping[str, Tensor],
    scale: float,
    cores: Sequence[str],
    training: Training,
    settings: GorpSettings,
) -> list[TaskEnd]:
    """Train the backbone of `folder` on `tasks`, one after another; how each of them ended.

    `tasks`: rows, and the plan of steps over them. `start`: the one LoRA, `<layer>.A` and `<layer>.B`, with `scale`
    s; `cores`: full-rank layers. Evaluation mode throughout: transformers' dropout is off.
    """
    stream = Stream(load_plain(folder, family), start, scale, cores, settings)
    return [_task(stream, family, examples, steps, training) for examples, steps in tasks]


def _task(stream: Stream, family: str, examples: Sequence[Example], steps: Steps, training: Training) -> TaskEnd:
    settings = stream.settings
    factors, cores, end = stream.factors(training), stream.cores(training), TaskEnd()
    core_training = training.model_copy(update={"learning_rate": settings.full_rank_lr})
    for number, micro_batches in enumerate(steps):
        rows = [examples[row] for micro_batch in micro_batches for row in micro_batch if row >= 0]
        end.losses.append(stream.backward(rows, family, factors))
        G = {layer: stream.weights[layer].grad for layer in cores}
        for layer, core in cores.items() if number == 0 else ():
            core.begin(G[layer])  # of the first global batch, before the first update
        gradients = [factor.gradient(stream.parameter(name).grad) for name, factor in factors.items()]
        gradients += [core.gradient(G[layer]) for layer, core in cores.items()]
        gradients = clipped(gradients, training.gradient_clipping)
        rates = [rate_of(training, number, len(steps))] * len(factors)
        rates += [rate_of(core_training, number, len(steps))] * len(cores)
        for trained, gradient, rate in zip([*factors.values(), *cores.values()], gradients, rates, strict=True):
            trained.step(gradient, rate)
        if (number + 1) % settings.refresh_every == 0 and number + 1 < len(steps):
            for layer, core in cores.items():
                core.refresh(G[layer])
    _finish(stream, factors, cores, end)
    return end


def _finish(stream: Stream, factors: Mapping[str, Factor], cores: Mapping[str, Core], end: TaskEnd) -> None:
    """Keep what was trained, grow the spaces of what is projected by the first moments."""
    stream.lora = {name: factor.value.clone() for name, factor in factors.items()}
    columns = {name: factor.columns for name, factor in factors.items() if not factor.left or stream.settings.project_b}
    columns |= {f"{layer}.{stream.core_space}": core.columns for layer, core in cores.items()}
    stream.grow(columns)
    end.lora, end.spaces = dict(stream.lora), dict(stream.spaces)
    end.full = {layer: W.detach().clone() for layer, W in stream.weights.items()}
    end.moments = {name: factor.moment for name, factor in factors.items()}
    end.moments |= {f"{layer}.C": core.adam.m for layer, core in cores.items()}
    end.second_moments = {name: factor.second_moment for name, factor in factors.items()}
    end.second_moments |= {f"{layer}.C": core.adam.v for layer, core in cores.items()}
    end.updates = {layer: core.total for layer, core in cores.items()}
    end.bases = {layer: (core.U, core.V) for layer, core in cores.items()}
