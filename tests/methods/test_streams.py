"""seqlora, inclora and pertask over several tasks: what is merged, what goes on, what starts anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_backbones import PAD, random_examples
from torch import Tensor, nn

from pipeline.adapters.lora import Factors, LoraKind, to_tensors
from pipeline.context import Context
from pipeline.engine import Ranks
from pipeline.label_loss import LabelLoss
from pipeline.layers import merge, target_modules
from pipeline.methods import METHODS
from pipeline.models import load_backbone
from pipeline.recipe import IncLora, PerTask, SeqLora

FAMILIES = ("t5", "llama2")
SETTINGS = {
    "seqlora": SeqLora(name="seqlora"),
    "inclora": IncLora(name="inclora"),
    "pertask": PerTask(name="pertask"),
}


def new_method(name: str, folder: Path, family: str) -> Any:
    targets = target_modules(load_backbone(folder, family, dtype=torch.float32), family, None)
    return METHODS[name](SETTINGS[name], LoraKind(targets, rank=3, alpha=6, dropout=0.0), task_count=3)


def context(folder: Path, family: str, task_index: int, model: nn.Module | None = None) -> Context:
    model = model or load_backbone(folder, family, dtype=torch.float32)
    return Context(
        model,
        ranks=Ranks(0, 1, torch.device("cpu")),
        family=family,
        pad_id=PAD,
        targets=target_modules(model, family, None),
        task_index=task_index,
        examples=random_examples(6, family, seed=task_index),
        micro_batch_size=3,
        seed=7,
    )


def random_factors(model: nn.Module, targets: list[str], seed: int) -> dict[str, Factors]:
    """A finished task's update, large enough to matter."""
    random = torch.Generator().manual_seed(seed)
    factors = {}
    for name in targets:
        d_out, d_in = model.get_submodule(name).weight.shape
        A, B = (torch.randn(shape, generator=random) / 4 for shape in ((3, d_in), (d_out, 3)))
        factors[name] = Factors(A, B, 2.0)
    return factors


class Stack(nn.Module):
    """A layer with one separate LoRA module a task, added up: what merging must equal."""

    def __init__(self, base: nn.Module, parts: list[Factors]) -> None:
        super().__init__()
        self.base = base
        self.down = nn.ParameterList([nn.Parameter(part.A.clone()) for part in parts])
        self.up = nn.ParameterList([nn.Parameter(part.B.clone()) for part in parts])
        self.scales = [part.scale for part in parts]

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        branches = zip(self.down, self.up, self.scales, strict=True)
        return self.base(x) + sum(scale * (x @ down.T) @ up.T for down, up, scale in branches)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_past_equals_separate_modules(folders: dict[str, Path], family: str) -> None:
    """methods.md 8.3: logits and the new adapter's gradients, relative norms of at most 1e-5 in float32."""
    folder = folders[family]
    method = new_method("inclora", folder, family)
    separate = load_backbone(folder, family, dtype=torch.float32)
    targets = target_modules(separate, family, None)
    past = [random_factors(separate, targets, seed) for seed in (1, 2, 3)]
    for index, factors in enumerate(past, start=1):
        method.load_trained(index, to_tensors(factors))

    ctx = context(folder, family, 4)
    merge(ctx.model, folder, targets, method.frozen())
    method.begin_task(ctx)
    for name in targets:  # B zero would leave A without a gradient
        nn.init.normal_(ctx.model.get_submodule(name).B, std=0.3, generator=ctx.generator("test"))
    for name in targets:
        layer = ctx.model.get_submodule(name)
        new = Factors(layer.A.detach(), layer.B.detach(), layer.scale)
        stack = Stack(separate.get_submodule(name), [*(factors[name] for factors in past), new])
        separate.set_submodule(name, stack)

    batch = ctx.collate([0, 1, 2])
    outputs = [logits(model.eval(), family, batch) for model in (ctx.model, separate)]
    assert relative(outputs[0], outputs[1]) <= 1e-5
    assert relative(outputs[0], logits(load_backbone(folder, family, dtype=torch.float32), family, batch)) > 0.05
    for model in (ctx.model, separate):
        LabelLoss(model, family)(**batch).backward()
    for name in targets:
        merged, stack = ctx.model.get_submodule(name), separate.get_submodule(name)
        assert relative(merged.A.grad, stack.down[-1].grad) <= 1e-5
        assert relative(merged.B.grad, stack.up[-1].grad) <= 1e-5


def logits(model: Any, family: str, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if family == "t5":
        inputs["decoder_input_ids"] = model._shift_right(batch["labels"])
    return model(**inputs).logits[batch["labels"] != -100]


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_no_accumulated_rounding(folders: dict[str, Path], dtype: torch.dtype) -> None:
    folder = folders["t5"]
    model = load_backbone(folder, "t5", dtype=dtype)
    plain = load_backbone(folder, "t5", dtype=torch.float32)
    targets = target_modules(model, "t5", None)
    updates: dict[str, list[Factors]] = {name: [] for name in targets}
    for task in range(15):
        for name, part in random_factors(plain, targets, task).items():
            updates[name].append(part)
        merge(model, folder, targets, updates)  # after every task, into the same model
    for name in targets:
        exact = plain.get_submodule(name).weight.double()
        exact = exact + sum(part.scale * part.B.double() @ part.A.double() for part in updates[name])
        merged = model.get_submodule(name).weight
        if dtype == torch.float32:
            assert relative(merged, exact) <= 1e-6
        else:  # rounded once, to 8 significant bits: half a unit in the last place is at most 2^-8 of an entry
            assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    merge(model, folder, targets, {})
    for name in targets:
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight.to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_touches_targets_alone(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    model, before = (load_backbone(folder, family, dtype=torch.float32) for _ in range(2))
    targets = target_modules(model, family, None)
    merge(model, folder, targets, {targets[0]: [random_factors(model, targets, 1)[targets[0]]]})
    changed = [
        name
        for (name, value), old in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(value, old)
    ]
    assert changed == [f"{targets[0]}.weight"]


def learn(method: Any, folder: Path, family: str, task_index: int) -> dict[str, Tensor]:
    """One task as the stream runs it, with three steps of plain AdamW; returns its trained tensors."""
    ctx = context(folder, family, task_index)
    merge(ctx.model, folder, ctx.targets, method.frozen())
    method.begin_task(ctx)
    module = LabelLoss(ctx.model, family)
    optimizer = torch.optim.AdamW([p for p in ctx.model.parameters() if p.requires_grad], lr=0.05)
    for rows in ([0, 1, 2], [3, 4, 5], [0, 2, 4]):
        optimizer.zero_grad()
        module(**ctx.collate(rows)).backward()
        optimizer.step()
    tensors = {name: parameter.detach() for name, parameter in method._attached.parameters.items()}
    method.load_trained(task_index, tensors)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_task_is_the_same_bit_for_bit(folders: dict[str, Path], family: str) -> None:
    seq, inc = (
        learn(new_method(name, folders[family], family), folders[family], family, 1) for name in ("seqlora", "inclora")
    )
    assert list(seq) == list(inc)
    assert all(torch.equal(seq[name], inc[name]) for name in seq)


def test_seqlora_goes_on_from_its_factors(folders: dict[str, Path]) -> None:
    method = new_method("seqlora", folders["t5"], "t5")
    first = learn(method, folders["t5"], "t5", 1)
    assert method.frozen() == {}
    ctx = context(folders["t5"], "t5", 2)
    method.begin_task(ctx)
    attached = method._attached.parameters
    assert attached.keys() == first.keys()
    assert all(torch.equal(attached[name], first[name]) for name in first)
    second = learn(method, folders["t5"], "t5", 2)
    active = method.active()
    assert [len(parts) for parts in active.values()] == [1] * 6
    for name, (part,) in active.items():
        assert torch.equal(part.A, second[f"{name}.A"])
        assert not torch.equal(part.A, first[f"{name}.A"])


def test_pertask_learns_each_task_as_if_there_were_no_other(folders: dict[str, Path]) -> None:
    folder = folders["t5"]
    stream, second_alone, untouched = (new_method("pertask", folder, "t5") for _ in range(3))
    tensors = {task: learn(stream, folder, "t5", task) for task in (1, 2)}
    alone = learn(second_alone, folder, "t5", 2)
    assert all(torch.equal(tensors[2][name], alone[name]) for name in alone)
    inclora = new_method("inclora", folder, "t5")
    same, other = (learn(inclora, folder, "t5", task) for task in (1, 2))
    assert all(torch.equal(tensors[1][name], same[name]) for name in same)
    assert not all(torch.equal(tensors[2][name], other[name]) for name in other)

    for task in (1, 2):
        stream.begin_evaluation(f"task {task}", task)
        for name, (part,) in stream.active().items():
            assert torch.equal(part.A, tensors[task][f"{name}.A"])
            assert torch.equal(part.B, tensors[task][f"{name}.B"])
    for index in (3, None):  # a task to come, one outside the order
        stream.begin_evaluation("another", index)
        assert stream.active() == {} == untouched.active()


def test_inclora_starts_anew_and_keeps_the_past(folders: dict[str, Path]) -> None:
    method = new_method("inclora", folders["t5"], "t5")
    first = learn(method, folders["t5"], "t5", 1)
    ctx = context(folders["t5"], "t5", 2)
    method.begin_task(ctx)
    for name, parameter in method._attached.parameters.items():
        assert not torch.equal(parameter, first[name])
        assert name.endswith(".A") or not parameter.any(), "a new task's update starts at zero"
    second = learn(method, folders["t5"], "t5", 2)
    assert method.frozen() == method.active()
    for name, parts in method.active().items():
        assert [part.scale for part in parts] == [2.0, 2.0]
        for part, trained in zip(parts, (first, second), strict=True):
            assert torch.equal(part.A, trained[f"{name}.A"])
            assert torch.equal(part.B, trained[f"{name}.B"])


@pytest.mark.parametrize("name", ["seqlora", "inclora"])
def test_taking_stages_leads_where_learning_led(folders: dict[str, Path], name: str) -> None:
    """A method that takes the finished tasks' tensors and its own state learns the next task alike."""
    folder = folders["llama2"]
    learning, taking = (new_method(name, folder, "llama2") for _ in range(2))
    stages = [learn(learning, folders["llama2"], "llama2", task) for task in (1, 2)]
    for task, tensors in enumerate(stages, start=1):
        taking.load_trained(task, tensors)
    taking.load_state_dict(*learning.state_dict())
    third, again = (learn(method, folders["llama2"], "llama2", 3) for method in (learning, taking))
    assert all(torch.equal(third[part], again[part]) for part in third)


def test_stages_of_the_first_task_are_shared_and_later_ones_are_not(folders: dict[str, Path]) -> None:
    seq, inc = (new_method(name, folders["t5"], "t5") for name in ("seqlora", "inclora"))
    assert seq.influences(1) == inc.influences(1)
    assert seq.influences(2) != inc.influences(2)
