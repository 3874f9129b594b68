"""What a method may use while a task is learnt: the engine's side of `methods.base.TaskContext`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data_prep.batches import IGNORED, PADDING_ROW, Example, Family, collate
from pipeline.checkpoints import Checkpoint
from pipeline.engine import Ranks, TaskEngine
from pipeline.label_loss import LabelLoss
from pipeline.models import recomputing
from pipeline.seeds import generator

Value = TypeVar("Value")
Step = Sequence[Sequence[int]]  # micro-batches of row positions


class Context:
    """One task's context; see `methods.base.TaskContext` for the contract."""

    def __init__(
        self,
        model: nn.Module,
        *,
        ranks: Ranks,
        family: Family,
        pad_id: int,
        targets: Sequence[str],
        task_index: int,
        examples: Sequence[Example],
        micro_batch_size: int,
        seed: int,
        steps: Sequence[Step] = (),
        checkpoint: Checkpoint | None = None,
        earlier: Sequence[Sequence[Example]] = (),
        running: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext(),
    ) -> None:
        """`running`: inside what it gives, the model runs without an engine (`weights.Weights.running`)."""
        self.model = model
        self.targets = targets
        self.task_index = task_index
        self.step = 0
        self.ranks = ranks
        self._family = family
        self._pad_id = pad_id
        self._examples = examples
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._running = running
        self._earlier = earlier  # training rows of the finished tasks, for measurements alone
        self._steps = steps
        self._checkpoint = checkpoint
        self._masks: list[Tensor] = []
        self._positions: dict[int, Tensor] = {}  # what `real_positions` has found for the batch being run
        self._engine: TaskEngine | None = None

    def started(self, engine: TaskEngine) -> None:
        """From here on the trained tensors live in `engine`."""
        self._engine = engine

    @property
    def row_count(self) -> int:
        """The task's training rows."""
        return len(self._examples)

    @property
    def step_count(self) -> int:
        """The task's optimizer steps."""
        return len(self._steps)

    @property
    def first_rows(self) -> list[int]:
        """The rows of the task's first global batch."""
        return [row for micro_batch in self._steps[0] for row in micro_batch if row != PADDING_ROW]

    def original(self, layer: str) -> Tensor:
        """The checkpoint's own weight of a linear layer."""
        assert self._checkpoint is not None
        return self._checkpoint.read(f"{layer}.weight").float()

    @property
    def engine(self) -> TaskEngine:
        """The task's engine, once training has started."""
        assert self._engine is not None, "the engine starts after begin_task"
        return self._engine

    def generator(self, purpose: str) -> torch.Generator:
        """Seeded from (seed, task, purpose)."""
        return generator(self._seed, "task", self.task_index, purpose)

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """A micro-batch of training rows on the device; -1 is a padding row."""
        examples = [None if row < 0 else self._examples[row] for row in rows]
        batch = collate(examples, family=self._family, pad_id=self._pad_id)
        return {name: tensor.to(self.ranks.device) for name, tensor in batch.items()}

    def run_rows(self, rows: Sequence[int], *, backward: bool, task_index: int | None = None) -> float:
        """Rows through the model in evaluation mode, each rank its share; the mean loss per label token.

        The unit is a micro-batch of fixed content, so hooks see the same batches, each once over all ranks, on any
        number of ranks. Backward is possible before training starts only: later it would enter DeepSpeed's
        accumulation. It leaves this rank's gradients in the adapter's tensors, which training starts without.
        """
        return self._run(rows, backward=backward, task_index=task_index)[0]

    def score_rows(self, rows: Sequence[int]) -> tuple[float, float]:
        """The same, forward alone and before training, and the share of rows whose label greedy generation writes."""
        assert self._engine is None, "rows are scored before training"
        return self._run(rows, backward=False, scored=True)

    def _run(
        self, rows: Sequence[int], *, backward: bool, task_index: int | None = None, scored: bool = False
    ) -> tuple[float, float]:
        """Mean loss per label token; share of rows that are right, where `scored`."""
        assert rows, "a mean needs rows"
        assert not (backward and self._engine), "backward over extra rows belongs before training starts"
        source = self._examples if task_index in (None, self.task_index) else self._earlier[task_index - 1]
        examples = sorted((source[row] for row in rows), key=lambda example: len(example.input_ids))
        size = self._micro_batch_size
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        label_tokens = sum(len(example.label_ids) for example in examples)
        total = torch.zeros(2, dtype=torch.float64)  # loss, rows that are right
        was_training = self.model.training
        self.model.eval()
        with self._runnable(backward) as module, torch.set_grad_enabled(backward):
            for batch in batches[self.ranks.rank :: self.ranks.world]:
                if scored:
                    loss, right = module.loss_and_right(**self._seen(batch))
                    total[1] += right
                else:
                    loss = module(**self._seen(batch))
                if backward:
                    (loss / label_tokens).backward()
                total[0] += loss.item()
        if self._engine is not None and self._engine.forwards_together:
            self._masks, self._positions = [], {}
            shares = [len(batches[rank :: self.ranks.world]) for rank in range(self.ranks.world)]
            for _ in range(max(shares) - shares[self.ranks.rank]):
                self._engine.idle_forward(self.collate([-1] * size))
        self.model.train(was_training)
        loss_sum, right_sum = self.ranks.all_sum(total).tolist()
        return loss_sum / label_tokens, right_sum / len(rows)

    def run_probe(self) -> None:
        """The task's first row through the model, on every rank."""
        assert self._engine is None, "ranks run as many forwards as each other once training has started"
        was_training = self.model.training
        self.model.eval()
        with self._runnable(backward=False) as module, torch.no_grad():
            module(**self._seen(self._examples[:1]))
        self.model.train(was_training)

    def real_positions(self, width: int) -> Tensor:
        """Where the batch being run holds no padding, flat, by the width of prompts or of labels.

        Nowhere in a forward for the other ranks' sake, which an observer that is no hook sees too.
        """
        if not self._masks:
            return torch.empty(0, dtype=torch.long, device=self.ranks.device)
        if width not in self._positions:  # many layers ask
            found = [mask for mask in self._masks if mask.shape[1] == width]
            assert len(found) == 1, f"{width} positions: the batch has {[tuple(mask.shape) for mask in self._masks]}"
            self._positions[width] = found[0].flatten().nonzero().squeeze(1)
        return self._positions[width]

    def _seen(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch for hooks to see: its masks are known, and told apart by their widths."""
        batch = collate(examples, family=self._family, pad_id=self._pad_id)
        if self._family == "t5" and batch["labels"].shape[1] == batch["input_ids"].shape[1]:
            batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)
        batch = {name: tensor.to(self.ranks.device) for name, tensor in batch.items()}
        self._masks, self._positions = [batch["attention_mask"] > 0], {}
        if self._family == "t5":
            self._masks.append(batch["labels"] != IGNORED)  # the decoder reads one token before each it predicts
        return batch

    @contextmanager
    def _runnable(self, backward: bool) -> Iterator[Any]:
        """The module that gives a micro-batch's loss."""
        if self._engine is not None:
            yield self._engine.module
            return
        module = LabelLoss(self.model, self._family)
        with self._running(self.model):
            if not backward:
                yield module
                return
            # With every weight frozen, only a differentiable input makes autograd reach the layers.
            module.backbone.enable_input_require_grads()
            try:
                with recomputing(self.model):
                    yield module
            finally:
                module.backbone.disable_input_require_grads()

    def on_first(self, action: Callable[[], Value]) -> Value:
        """Rank 0's result."""
        return self.ranks.on_first(action)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.ranks.all_sum(tensor)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor."""
        return self.ranks.broadcast(tensor)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The averaged gradient."""
        return self.engine.gradient(parameter)

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's first moment."""
        return self.engine.first_moment(parameter)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 master copy."""
        return self.engine.master(parameter)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set both copies."""
        self.engine.write(parameter, value)

    def write_frozen(self, weight: Tensor, value: Tensor) -> None:
        """Set a frozen weight."""
        self.engine.write_frozen(weight, value)

    def second_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's second moment."""
        return self.engine.second_moment(parameter)

    def write_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor) -> None:
        """Set Adam's moments."""
        self.engine.write_moments(parameter, first, second)

    def restart_group(self, name: str) -> None:
        """Begin Adam's step count anew."""
        self.engine.restart_group(name)
