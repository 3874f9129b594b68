"""PEGP: its twins bit for bit, what is protected, features, sharing, growth, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import LORA, ROWS, context, learn, new_method, rows_of
from safetensors.torch import load, save
from torch import Tensor
from torch.testing import assert_close

from pipeline.layers import merge
from pipeline.methods.feature_pass import measure
from pipeline.models import load_backbone
from pipeline.projection.features import FeaturesNotFinite
from pipeline.projection.subspace import Subspace
from pipeline.recipe import Pegp
from pipeline.recipe_groups import BottleneckAdapter, PrefixAdapter, PromptAdapter

FAMILIES = ("t5", "llama2")
BOTTLENECK = BottleneckAdapter(kind="bottleneck", width=7)
PROMPT = PromptAdapter(kind="prompt", length=3)
PREFIX = PrefixAdapter(kind="prefix", length=3)
KINDS = {"lora": LORA, "shared": LORA, "bottleneck": BOTTLENECK, "prompt": PROMPT, "prefix": PREFIX}


def pegp(folder: Path, family: str, kind: str = "lora", **settings: Any) -> Any:
    lora = "shared" if kind == "shared" else "per_task"
    return new_method(folder, family, "pegp", KINDS[kind], **{"lora": lora, "feature_samples": ROWS} | settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("project", ["off", "exact"])
def test_without_protection_it_is_its_twin_bit_for_bit(
    folders: dict[str, Path], family: str, kind: str, project: str
) -> None:
    """methods.md 8.8: with `project: off`, and in the first task, where the memory is empty."""
    folder = folders[family]
    method = pegp(folder, family, kind, project=project)
    twin = new_method(folder, family, "inclora" if kind == "lora" else "seqlora", KINDS[kind])
    for task in (1, 2) if project == "off" else (1,):
        ours, theirs = learn(folder, family, method, task), learn(folder, family, twin, task)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_lora_gives_protected_inputs_nothing(folders: dict[str, Path], family: str) -> None:
    """methods.md 8.2: ||dW x|| / (||dW|| ||x||) at most 1e-5 for x in span(Q), in float32."""
    method = pegp(folders[family], family, energy=0.8)
    learn(folders[family], family, method, 1)
    spaces = {name: method.memory[name] for name in method.memory.state_dict()[1]["leaders"]}
    second = learn(folders[family], family, method, 2)
    random = torch.Generator().manual_seed(1)
    layers = [name.removesuffix(".A") for name in second if name.endswith(".A")]
    assert len(layers) > 10
    for layer in layers:
        A, B = second[f"{layer}.A"], second[f"{layer}.B"]
        space = spaces[layer]
        dW = B @ A
        free = torch.randn(5, space.width, generator=random)
        x = space.component(free)
        assert x.norm() > 0.1
        assert dW.norm() > 0
        assert (x @ dW.T).norm() / (dW.norm() * x.norm()) <= 1e-5
        assert (free @ dW.T).norm() / (dW.norm() * free.norm()) > 1e-3, "what is not protected is learnt"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix"])
def test_old_rows_get_the_same_outputs(folders: dict[str, Path], family: str, kind: str) -> None:
    """With all directions of a single short row protected, that row's loss stays as it was (float32 rounding)."""
    folder = folders[family]
    one_row = [rows_of(1, family)[:1], rows_of(2, family)]
    method = pegp(folder, family, kind, energy=1.0, prefix_values="freeze")
    free = pegp(folder, family, kind, project="off")
    losses: dict[str, list[float]] = {}
    for name, taught in (("protected", method), ("free", free)):
        for task in (1, 2):
            learn(folder, family, taught, task, rows=one_row[:task])
            losses.setdefault(name, []).append(loss_of_first_row(folder, family, taught, one_row))
    assert losses["protected"][1] == pytest.approx(losses["protected"][0], rel=2e-5)
    assert losses["free"][1] != pytest.approx(losses["free"][0], rel=1e-3)


def loss_of_first_row(folder: Path, family: str, method: Any, rows: Any) -> float:
    ctx = context(folder, family, method, 1, rows)
    merge(ctx.model, folder, ctx.targets, method.active())
    with method.equipped(ctx.model):
        return ctx.run_rows([0], backward=False)


def test_hand_computed_counts_of_shared_inputs(folders: dict[str, Path]) -> None:
    """q and v of a self-attention read one tensor; all cross-attention values (and keys) read the encoder's output."""
    method = pegp(folders["t5"], "t5")
    learn(folders["t5"], "t5", method, 1)
    leaders = method.memory.state_dict()[1]["leaders"]
    # Encoder: qkv, o, wi, wo; decoder: qkv, o, cross q, cross kv (encoder output), cross o, wi, wo.
    assert len(set(leaders.values())) == 11
    attention = "decoder.block.0.layer.1.EncDecAttention"
    assert leaders[f"{attention}.v"] == f"{attention}.k"
    assert leaders[f"{attention}.q"] == f"{attention}.q"

    method = pegp(folders["llama2"], "llama2")
    learn(folders["llama2"], "llama2", method, 1)
    # Per layer: qkv, o, gate and up, down.
    assert len(set(method.memory.state_dict()[1]["leaders"].values())) == 2 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_single_rows_without_padding(folders: dict[str, Path], family: str) -> None:
    """The streamed second moment equals X^T X of hooks on rows run alone, float64 sum, padding nowhere."""
    folder = folders[family]
    method = pegp(folder, family)
    ctx = context(folder, family, method, 1)
    method.begin_task(ctx)
    moments = measure(ctx, method._attached, method._shapes, range(ROWS))
    plain = load_backbone(folder, family, dtype=torch.float32)
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, 1).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    for name in moments:
        plain.get_submodule(name).register_forward_pre_hook(hook(name))
    for example in rows_of(1, family):
        with torch.no_grad():
            if family == "t5":
                ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.label_ids])
                plain(input_ids=ids, labels=labels)
            else:
                plain(input_ids=torch.tensor([[*example.input_ids, *example.label_ids]]))
    assert moments.keys() == sums.keys()
    for name, C in moments.items():
        assert_close(C.double(), sums[name], rtol=1e-4, atol=1e-4 * float(sums[name].abs().max()))


def test_a_prompts_own_rows_are_protected_with_the_tokens(folders: dict[str, Path]) -> None:
    method = pegp(folders["llama2"], "llama2", "prompt", energy=1.0)
    trained = learn(folders["llama2"], "llama2", method, 1)["prompt"]
    space = method.memory["prompt"]
    assert space.residual(trained).norm() / trained.norm() <= 1e-4
    tokens = load_backbone(folders["llama2"], "llama2", dtype=torch.float32).get_input_embeddings().weight
    seen = sorted({i for row in rows_of(1, "llama2") for i in (*row.input_ids, *row.label_ids)})
    assert space.residual(tokens[seen]).norm() / tokens[seen].norm() <= 1e-3


def test_the_second_space_of_a_shared_lora_is_that_of_its_hidden_values(folders: dict[str, Path]) -> None:
    method = pegp(folders["t5"], "t5", "shared", energy=0.6)
    trained = learn(folders["t5"], "t5", method, 1)
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    ctx = context(folders["t5"], "t5", method, 1)
    x: list[Tensor] = []
    ctx.model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: x.append(inputs[0]))
    h = torch.zeros(3, 3, dtype=torch.float64)
    method.begin_task(ctx)  # the features were taken with the finished adapter
    x.clear()
    for row in range(ROWS):
        ctx.run_rows([row], backward=False)
        states = x.pop()[0].double() @ trained[f"{layer}.A"].double().T
        h += states.T @ states
    space = method.memory[f"{layer}.h"]
    assert space.width == 3
    values = torch.linalg.eigvalsh(h).flip(0)
    wanted = int((values.cumsum(0) / values.sum() < 0.6).sum()) + 1
    assert space.rank == wanted
    assert space.share(h) >= 0.6 - 1e-5


def test_max_rank_never_caps_hidden_spaces_and_caps_the_others(folders: dict[str, Path]) -> None:
    method = pegp(folders["t5"], "t5", "shared", energy=1.0, max_rank=2)
    learn(folders["t5"], "t5", method, 1)
    for name in method.memory:
        assert method.memory[name].rank == (3 if name.endswith(".h") else 2), name


def test_a_full_layer_gets_no_new_lora_and_a_full_model_trains_nothing(folders: dict[str, Path]) -> None:
    folder = folders["llama2"]
    method = pegp(folder, "llama2", energy=1.0)
    learn(folder, "llama2", method, 1)
    names = list(method.memory)
    full, rest = names[0], names[1:]
    width = method.memory[full].width
    method.memory.put(full, Subspace(torch.eye(width)))
    for name in rest:
        method.memory.put(name, Subspace(torch.eye(method.memory[name].width)[:, :2]))
    second = learn(folder, "llama2", method, 2)
    closed = [name for name, leader in method.memory.state_dict()[1]["leaders"].items() if leader == full]
    assert len(closed) == 3, "q, k and v"
    assert not [name for name in second if name.rpartition(".")[0] in closed]
    assert len([name for name in second if name.endswith(".A")]) == 14 - 3
    assert {len(parts) for parts in method.active().values()} == {1, 2}
    for name in names:
        method.memory.put(name, Subspace(torch.eye(method.memory[name].width)))
    assert learn(folder, "llama2", method, 3) == {}


def test_a_full_single_module_stays_as_it_is(folders: dict[str, Path]) -> None:
    method = pegp(folders["t5"], "t5", "bottleneck")
    first = learn(folders["t5"], "t5", method, 1)
    for name in method.memory:
        method.memory.put(name, Subspace(torch.eye(method.memory[name].width)))
    second = learn(folders["t5"], "t5", method, 2)
    assert all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("values", "keys_leak", "values_change"),
    [("free", False, True), ("project", False, True), ("freeze", False, False)],
)
def test_prefix_values(folders: dict[str, Path], values: str, keys_leak: bool, values_change: bool) -> None:
    method = pegp(folders["llama2"], "llama2", "prefix", energy=0.6, prefix_values=values)
    first = learn(folders["llama2"], "llama2", method, 1)
    spaces = {name: method.memory[name] for name in method.memory}
    second = learn(folders["llama2"], "llama2", method, 2)
    name = "model.layers.0.self_attn"
    for part in ("key", "value"):
        change = second[f"{name}.{part}"].double() - first[f"{name}.{part}"].double()
        if part == "value" and not values_change:
            assert not change.any()
            continue
        inside = torch.stack(
            [spaces[f"{name}#{head}"].coordinates(rows).norm() for head, rows in enumerate(change)]
        ).norm()
        leak = float(inside / change.norm())
        assert leak > 1e-2 if (part == "value" and values == "free") else leak <= 1e-5


@pytest.mark.parametrize("kind", list(KINDS))
def test_taking_stages_leads_where_learning_led(folders: dict[str, Path], kind: str) -> None:
    """methods.md 8.6: the memory survives a file, and the next task is learnt alike, bit for bit."""
    folder = folders["llama2"]
    learning, taking = (pegp(folder, "llama2", kind, energy=0.7, feature_drift=True) for _ in range(2))
    stages = []
    for task in (1, 2):
        tensors = learn(folder, "llama2", learning, task)
        state, values = learning.state_dict()
        stages.append((save({n: t.contiguous() for n, t in tensors.items()}), save(state), json.dumps(values)))
    for task, (tensors, state, values) in enumerate(stages, start=1):
        taking.load_state_dict(load(state), json.loads(values))
        taking.load_trained(task, load(tensors))
    third, again = (learn(folder, "llama2", method, 3) for method in (learning, taking))
    assert third.keys() == again.keys()
    assert all(torch.equal(third[name], again[name]) for name in third)
    assert learning.leaks() == taking.leaks()
    assert learning.records() == taking.records()


def test_the_energy_rises_by_its_schedule(folders: dict[str, Path]) -> None:
    method = pegp(folders["t5"], "t5", energy=0.9, energy_max=0.99)
    assert [method.energy(task) for task in (1, 2, 3)] == pytest.approx([0.93, 0.96, 0.99])
    assert method.influences(2)["task_count"] == 3, "its length changes how a stream trains"
    constant = pegp(folders["t5"], "t5", energy=0.9)
    assert [constant.energy(task) for task in (1, 3)] == [0.9, 0.9]
    assert "task_count" not in constant.influences(2)


def test_drift_is_the_share_of_old_features_left_in_their_space(folders: dict[str, Path]) -> None:
    folder = folders["llama2"]
    method = pegp(folder, "llama2", energy=0.7, feature_drift=True, project="off")
    learn(folder, "llama2", method, 1)
    kept = {name: method.memory[name].share for name in method.memory}
    learn(folder, "llama2", method, 2)
    drift = {record["space"]: record for record in method.records() if "drift_of" in record}
    assert drift.keys() == kept.keys()
    assert all(record["drift_of"] == 1 and 0 <= record["share"] <= 1 for record in drift.values())
    first = "model.layers.0.self_attn.q_proj"  # reads embeddings, which no LoRA moves
    assert drift[first]["share"] >= 0.7
    assert min(record["share"] for record in drift.values()) < 0.7, "unprojected features drift"


def test_features_that_are_not_finite_name_layer_and_rows(folders: dict[str, Path]) -> None:
    folder = folders["t5"]
    method = pegp(folder, "t5")
    ctx = context(folder, "t5", method, 1)
    method.begin_task(ctx)
    row = 3
    token = ctx._examples[row].input_ids[0]
    guilty = [i for i, example in enumerate(ctx._examples) if token in example.input_ids]
    ctx.model.get_input_embeddings().weight.data[token] = float("inf")
    with pytest.raises(FeaturesNotFinite) as caught:
        method._moments(ctx, {}, list(range(ROWS)))
    assert caught.value.layer == "encoder.block.0.layer.0.SelfAttention.q"
    assert set(guilty) <= set(caught.value.rows)


def test_literal_mode_is_the_papers_form(folders: dict[str, Path]) -> None:
    literal = Pegp.model_validate({"name": "pegp", "mode": "literal"})
    assert (literal.project, literal.lora) == ("gradient", "shared")
    assert Pegp.model_validate({"name": "pegp", "mode": "literal", "lora": "per_task"}).lora == "per_task"
