"""LB-CL: sensitivities equal to autograd, leak-free, equal to twins, resumable; what is refused (methods.md 4, 8)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import context, learn, learns_alike_from_its_stage, new_method, rows_of
from plain_reference import Float64
from random_backbones import random_examples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.errors import UserError
from pipeline.adapters.triplet import PARTS, TripletLinear, Triplets, triplets_of
from pipeline.label_loss import LabelLoss
from pipeline.methods.injection import injected
from pipeline.methods.sensitivity import _LayerSums, measure_sensitivity
from pipeline.projection.features import FeaturesNotFinite
from pipeline.projection.subspace import Subspace
from pipeline.recipe import LbCl, Recipe, TripletAdapter
from pipeline.workload import Alone, load_workload

FAMILIES = ("t5", "llama2")
ADAPTER = TripletAdapter(kind="triplet", rank=3, scale=4.0, dropout=0.0, target_modules="all_linear")
SEEDS = {"seed_samples": 5}


def lbcl(folder: Path, family: str, adapter: TripletAdapter = ADAPTER, **settings: Any) -> Any:
    return new_method(folder, family, "lbcl", adapter, **(SEEDS | settings))


def bases(method: Any) -> dict[str, Tensor]:
    return {name: method.memory[name].basis for name in method.memory}


# ---- sensitivity


class Separate(nn.Module):
    """A layer with every old triplet beside it as a module of its own, written out."""

    def __init__(self, base: nn.Module, past: list[Triplets], scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.parts = nn.ParameterList(
            nn.Parameter(part.double()) for triplets in past for part in (triplets.U, triplets.sigma, triplets.V)
        )

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for U, sigma, V in zip(*(iter(self.parts),) * 3, strict=True):
            y = y + self.scale * (((x @ V.T) * sigma) @ U.T)
        return y


def by_autograd(
    folder: Path, family: str, method: Any, rows: list[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """`batch` and `per_sample` scores [tasks, r] and Fisher information by layer, from separate modules, float64."""
    bare = lbcl(folder, family)
    ctx = context(folder, family, bare, 3, dtype=torch.float64)
    past = method._old_triplets()
    layers = {name: Separate(ctx.model.get_submodule(name), triplets, 4.0) for name, triplets in past.items()}
    for name, layer in layers.items():
        ctx.model.set_submodule(name, layer)
    chosen = [ctx._examples[row] for row in rows]
    tokens = sum(len(row.label_ids) for row in chosen)
    module = LabelLoss(ctx.model, family)

    def gradients(of: list[int]) -> dict[str, list[Tensor]]:
        for layer in layers.values():
            layer.zero_grad()
        with Float64():
            (module(**ctx.collate(of)) / tokens).backward()
        return {name: [part.grad.clone() for part in layer.parts] for name, layer in layers.items()}

    def scores(name: str, found: list[Tensor]) -> Tensor:
        s = [(w.detach() * g).abs() for w, g in zip(layers[name].parts, found, strict=True)]
        triples = zip(*(iter(s),) * 3, strict=True)
        return torch.stack([sigma + U.mean(dim=0) + V.mean(dim=1) for U, sigma, V in triples])

    whole = gradients(rows)
    single = [gradients([row]) for row in rows]
    batch = {name: scores(name, found) for name, found in whole.items()}
    count = len(rows)  # a row's own gradient is `count` times its share in the mean
    per_sample = {name: sum(count * scores(name, one[name]) for one in single) / count for name in layers}
    fisher = {
        name: sum(float(((count * part) ** 2).sum()) for one in single for part in one[name])
        / count
        / sum(part.numel() for part in layer.parts)
        for name, layer in layers.items()
    }
    return batch, per_sample, fisher


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivities_equal_autograd_through_separate_modules(folders: dict[str, Path], family: str) -> None:
    """methods.md 8.4: with two old tasks merged, from one forward and backward over micro-batches of two rows."""
    folder = folders[family]
    method = lbcl(folder, family)
    for task in (1, 2):
        learn(folder, family, method, task)
    rows = [0, 2, 3, 5, 7]
    batch, per_sample, fisher = by_autograd(folder, family, method, rows)
    for how, wanted in (("batch", batch), ("per_sample", per_sample)):
        ctx = context(folder, family, method, 3, dtype=torch.float64)
        with Float64():
            found, loss = measure_sensitivity(ctx, method._old_triplets(), rows, scale=4.0, how=how)
        assert found.keys() == wanted.keys() == set(method.kind.targets)
        for name, layer in found.items():
            assert layer.scores.shape == (2, 3)
            assert (layer.scores - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), (name, how)
            assert layer.fisher == pytest.approx(fisher[name], rel=1e-5)
        assert loss == pytest.approx(ctx.run_rows(rows, backward=False), rel=1e-5)
        assert not any(module._forward_hooks for module in ctx.model.modules()), "no hook is left"


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor))])
        return made


@pytest.mark.parametrize("how", ["batch", "per_sample"])
def test_the_pass_forms_nothing_of_a_weights_size(how: str) -> None:
    """At T5-large's width, with 14 old tasks and 8 rows: the largest tensor is one of all old U, or of all old V."""
    d_out, d_in, r, tasks = 1024, 512, 8, 14
    old = [Triplets(torch.ones(d_out, r), torch.ones(r), torch.ones(r, d_in)) for _ in range(tasks)]
    sums = _LayerSums(old, 4.0, how)
    with Largest() as made:
        sums.add(torch.ones(8, 5, d_in), torch.ones(8, 5, d_out))
    assert made.numbers == tasks * r * d_out < d_out * d_in / 4


@pytest.mark.parametrize("where", ["sensitivity", "loss"])
def test_what_is_not_finite_before_a_task_is_told(folders: dict[str, Path], where: str) -> None:
    folder = folders["llama2"]
    method = lbcl(folder, "llama2", init="with_sigma" if where == "sensitivity" else "random")
    learn(folder, "llama2", method, 1)
    ctx = context(folder, "llama2", method, 2)
    with torch.no_grad():
        ctx.model.get_submodule(method.kind.targets[-1]).weight[0, 0] = torch.nan
    with pytest.raises(FeaturesNotFinite) as caught:
        method.begin_task(ctx)
    assert caught.value.rows == method._seed_rows(ctx)[0]


# ---- the start


def disordered(method: Any) -> None:
    """The second task's triplets in another order, some turned round: the same update, which alignment sees through."""
    mixed = {}
    for layer, old in triplets_of(method._past[1]).items():
        signs = torch.tensor([-1.0, 1.0, 1.0])
        parts = (old.U * signs).roll(1, dims=1), old.sigma.roll(1), (old.V * signs[:, None]).roll(1, dims=0)
        mixed |= {f"{layer}.{name}": part for name, part in zip(PARTS, parts, strict=True)}
    method._past[1] = {**method._past[1], **mixed}


@pytest.mark.parametrize("sensitivity", ["batch", "per_sample"])
@pytest.mark.parametrize("align", ["signs", "hungarian", "none"])
def test_what_is_injected_follows_its_switches(folders: dict[str, Path], align: str, sensitivity: str) -> None:
    """Each gives another start than the others', and what is kept for the report is what was measured, with scale 4."""
    folder = folders["t5"]
    method = lbcl(folder, "t5", align=align, sensitivity=sensitivity, project="off")
    for task in (1, 2):
        learn(folder, "t5", method, task)
    disordered(method)
    past, bare = method._old_triplets(), context(folder, "t5", method, 3)
    rows = method._seed_rows(bare)[0]
    found = {how: measure_sensitivity(bare, past, rows, scale=4.0, how=how)[0] for how in ("batch", "per_sample")}
    method.begin_task(context(folder, "t5", method, 3))
    ways = [(way, how) for way in ("signs", "hungarian", "none") for how in found]
    distance = dict.fromkeys(ways, 0.0)
    for name in method.kind.targets:
        measured = found[sensitivity][name]
        kept = method._sensitivity[3][name]
        assert kept["mean"] == pytest.approx(float(measured.scores.mean()), rel=1e-4)
        assert kept["fisher"] == pytest.approx(measured.fisher, rel=1e-4)
        start = method._trained[f"{name}.U"].start
        for way, how in ways:
            other = injected(past[name], found[how][name].scores, align=way).U
            distance[way, how] += float((start - other).norm() / start.norm())
    ours = distance.pop((align, sensitivity)) / len(method.kind.targets)
    assert ours <= 1e-5
    assert min(distance.values()) / len(method.kind.targets) > 1e-3


@pytest.mark.parametrize("init", ["with_sigma", "without_sigma", "copy", "random"])
def test_what_a_task_starts_from(folders: dict[str, Path], init: str) -> None:
    folder = folders["llama2"]
    method = lbcl(folder, "llama2", init=init, project="off")
    for task in (1, 2):
        learn(folder, "llama2", method, task)
    ctx = context(folder, "llama2", method, 3)
    seeds, others = method._seed_rows(ctx)
    samples = {"seed_samples": seeds, "other_rows": others}
    before = {name: ctx.run_rows(rows, backward=False) for name, rows in samples.items()}
    right_before = ctx.score_rows(others)[1]
    bare = context(folder, "llama2", method, 3)
    random = method.kind.starts(bare.model, bare.generator("lora"))
    method.begin_task(ctx)
    starts = {name: trained.start for name, trained in method._trained.items()}
    past = method._old_triplets()
    for name in method.kind.targets:
        ours = Triplets(*(starts[f"{name}.{part}"] for part in PARTS))
        if init == "random":
            assert all(torch.equal(starts[f"{name}.{part}"], random[f"{name}.{part}"]) for part in PARTS)
            assert not ours.sigma.any()
            assert 0.01 < float(ours.U.std()) < 0.03
        elif init == "copy":
            assert all(torch.equal(getattr(ours, part), getattr(past[name][-1], part)) for part in PARTS)
        else:
            again = context(folder, "llama2", method, 3)
            scores = measure_sensitivity(again, past, seeds, scale=4.0, how="batch")[0][name].scores
            wanted = injected(past[name], scores, align="signs")
            assert torch.allclose(ours.U, wanted.U, rtol=1e-4, atol=1e-6)
            assert torch.allclose(ours.V, wanted.V, rtol=1e-4, atol=1e-6)
            sigma = torch.zeros(3) if init == "without_sigma" else wanted.sigma
            assert torch.allclose(ours.sigma, sigma, rtol=1e-4, atol=1e-6)
    assert [(jump["jump_on"], jump["rows"]) for jump in method._jumps[3]] == [("seed_samples", 5), ("other_rows", 3)]
    for jump in method._jumps[3]:
        rows, plain = samples[jump["jump_on"]], before[jump["jump_on"]]
        assert jump["loss_at_random"] == pytest.approx(plain, rel=1e-6)
        assert jump["loss_injected"] == pytest.approx(ctx.run_rows(rows, backward=False), rel=1e-6)
        if jump["jump_on"] == "other_rows":
            assert jump["right_at_random"] == right_before
            assert jump["right_injected"] == ctx.score_rows(rows)[1]
        if init in ("without_sigma", "random"):
            assert jump["loss_injected"] == pytest.approx(plain, rel=1e-6), "dW is zero"
        else:
            assert abs(jump["loss_injected"] / plain - 1) > 1e-4  # rounding moves it by 1e-6


@pytest.mark.parametrize("family", ["t5", "llama2"])
def test_rows_are_right_where_greedy_generation_writes_their_label(folders: dict[str, Path], family: str) -> None:
    """Rows whose label is what the model generates, and the same with one other token, first or last, among them."""
    method = lbcl(folders[family], family)
    model = context(folders[family], family, method, 1).model
    rows, wrong = [], (1, 4, 5)
    for index, row in enumerate(random_examples(8, family, seed=9)):
        length = 2 + index % 3
        written = model.generate(
            torch.tensor([row.input_ids]), do_sample=False, min_new_tokens=length, max_new_tokens=length
        )[0][-length:].tolist()
        if index in wrong:
            place = 0 if index == 4 else -1
            written[place] = written[place] % 20 + 3  # another one
        rows.append(replace(row, label_ids=tuple(written)))
    ctx = context(folders[family], family, method, 1, [rows])
    loss, right = ctx.score_rows(range(8))
    assert right == 5 / 8
    assert loss == pytest.approx(ctx.run_rows(range(8), backward=False), rel=1e-6)
    assert ctx.score_rows(wrong)[1] == 0


def test_layers_out_of_reach_start_at_random_and_train_projected(folders: dict[str, Path]) -> None:
    folder = folders["t5"]
    method = lbcl(folder, "t5", layers="top_1")
    learn(folder, "t5", method, 1)
    method.begin_task(ctx := context(folder, "t5", method, 2))
    injected_names = {name[: -len(".sigma")] for name in method._start if name.endswith(".sigma")}
    last = max(name.split(".")[2] for name in method.kind.targets if name.startswith("decoder"))
    assert injected_names == {name for name in method.kind.targets if name.startswith(f"decoder.block.{last}.")}
    assert set(method._sensitivity[2]) == injected_names
    other = next(name for name in method.kind.targets if name not in injected_names)
    assert not method._trained[f"{other}.sigma"].start.any()
    assert method._trained[f"{other}.U"].projector is not None
    assert isinstance(ctx.model.get_submodule(other), TripletLinear)


def test_a_random_start_lies_outside_the_old_span(folders: dict[str, Path]) -> None:
    """Ours: of B-CL's, whose start would else bring the old directions back; its rows keep their norms."""
    folder = folders["llama2"]
    method = lbcl(folder, "llama2", init="random")
    learn(folder, "llama2", method, 1)
    ctx = context(folder, "llama2", method, 2)
    random = method.kind.starts(ctx.model, ctx.generator("lora"))
    method.begin_task(ctx)
    for name, trained in method._trained.items():
        if not name.endswith(".sigma"):
            Q = method.memory[name].basis
            start = trained.start.T if name.endswith(".U") else trained.start
            assert (start @ Q).norm() <= 1e-5 * start.norm()
            before = random[name].T if name.endswith(".U") else random[name]
            assert torch.allclose(start.norm(dim=1), before.norm(dim=1), rtol=1e-5)


# ---- training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_penalty_is_the_naive_loop(folders: dict[str, Path], family: str) -> None:
    """`gamma * mean(||U^T U - I||_F, ||V V^T - I||_F)`, and its gradient, in a projected task."""
    folder = folders[family]
    method = lbcl(folder, family, gamma=0.3)
    learn(folder, family, method, 1)
    ctx = context(folder, family, method, 2)
    method.begin_task(ctx)
    parameters = method._attached.parameters
    for name, parameter in parameters.items():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    penalty = method.penalty(ctx)
    penalty.backward()
    twins = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    terms = []
    for name, trained in method._trained.items():
        if not name.endswith(".sigma"):
            value = twins[name] if trained.projector is None else trained.projector(twins[name])
            rows = value.T if name.endswith(".U") else value
            terms.append((rows @ rows.T - torch.eye(3)).square().sum().sqrt())
    expected = 0.3 * sum(terms) / len(terms)
    expected.backward()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, twin in twins.items():
        if not name.endswith(".sigma"):
            assert (parameters[name].grad - twin.grad).norm() <= 1e-5 * twin.grad.norm(), name


def test_the_penalty_in_a_step_reads_the_forwards_own_tensors(folders: dict[str, Path]) -> None:
    """Grouped projectors: the loss with its penalty gives the gradients that both would alone."""
    folder = folders["t5"]
    method = lbcl(folder, "t5", gamma=0.3)
    learn(folder, "t5", method, 1)
    ctx = context(folder, "t5", method, 2)
    method.begin_task(ctx)
    parameters, gradients = method._attached.parameters, []
    for name, parameter in parameters.items():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    module = LabelLoss(ctx.model.train(), "t5")
    for together in (True, False):
        for parameter in parameters.values():
            parameter.grad = None
        loss = module(**ctx.collate([0, 1]))
        if together:
            assert any(getattr(child, "latest", None) is not None for child in ctx.model.modules())
            (loss + method.penalty(ctx)).backward()
        else:
            loss.backward()
            for child in ctx.model.modules():
                if hasattr(child, "latest"):
                    child.latest = None
            method.penalty(ctx).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-5 * gradients[1][name].norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["with_sigma", "without_sigma", "random", "copy"])
def test_nothing_leaks_into_the_joint_bases(folders: dict[str, Path], family: str, init: str) -> None:
    """methods.md 8.2, of U - U_start and V - V_start, with AdamW, weight decay, clipping and the regulariser."""
    folder = folders[family]
    method = lbcl(folder, family, init=init)
    learn(folder, family, method, 1)
    old = bases(method)
    starts: dict[str, Tensor] = {}
    finished: dict[str, Any] = {}
    end = method.finished
    method.finished = lambda ctx: finished.update(end(ctx)) or dict(finished)
    begin = method.begin_task
    method.begin_task = lambda ctx: (
        begin(ctx),
        starts.update({name: trained.start for name, trained in method._trained.items()}),
    )
    second = learn(folder, family, method, 2)
    leaks = {}
    for name, Q in old.items():
        change = finished[name].change.double()
        assert change.norm() > 1e-3, "something was learnt"
        assert torch.allclose(second[name], starts[name] + finished[name].change)
        inside = Q.double().T @ change if name.endswith(".U") else change @ Q.double()
        leaks[name] = float(inside.norm() / change.norm())
    assert max(leaks.values()) <= 1e-5, leaks
    told = method.leaks()[2]
    assert told == pytest.approx(leaks, abs=1e-7)
    for name, Q in old.items():  # the next bases hold the old span and the new vectors
        grown = method.memory[name]
        columns = second[name] if name.endswith(".U") else second[name].T
        assert grown.residual(Q.T).norm() <= 1e-5 * Q.norm()
        assert grown.residual(columns.T).norm() <= 1e-3 * columns.norm()


@pytest.mark.parametrize("projection", ["joint", "sum"])
def test_gradients_are_projected_on_the_old_vectors(folders: dict[str, Path], projection: str) -> None:
    """Joint: outside the old span. Sum, the paper's: less the projection on each old vector, one by one."""
    folder = folders["t5"]
    method = lbcl(folder, "t5", project="gradient", projection=projection)
    for task in (1, 2):
        learn(folder, "t5", method, task)
    method.begin_task(context(folder, "t5", method, 3))
    draw = torch.Generator().manual_seed(5)
    for name, parameter in method._attached.parameters.items():
        layer, _, part = name.rpartition(".")
        gradient = torch.randn(parameter.shape, generator=draw)
        (parameter * gradient).sum().backward()
        found = parameter.grad
        if part == "sigma":
            assert torch.equal(found, gradient)
            continue
        columns, projected = (gradient, found) if part == "U" else (gradient.T, found.T)  # [d, r]
        if projection == "joint":
            Q = method.memory[name].basis
            expected = columns - Q @ Q.T @ columns
            assert (Q.T @ projected).norm() <= 1e-5 * columns.norm()
        else:
            expected = columns.clone()
            for triplets in method._old_triplets()[layer]:
                for vector in triplets.U.unbind(1) if part == "U" else triplets.V.unbind(0):
                    unit = vector / vector.norm()
                    expected -= torch.outer(unit, unit @ columns)
        assert (projected - expected).norm() <= 1e-5 * expected.norm()
        assert (expected - columns).norm() > 1e-2 * columns.norm()


@pytest.mark.parametrize("projection", ["joint", "sum"])
def test_projecting_gradients_alone_leaks(folders: dict[str, Path], projection: str) -> None:
    """It shows that the measurement above can fail."""
    folder = folders["llama2"]
    method = lbcl(folder, "llama2", project="gradient", projection=projection)
    for task in (1, 2):
        learn(folder, "llama2", method, task)
    assert max(method.leaks()[2].values()) > 1e-2


def test_sigma_has_a_learning_rate_of_its_own(folders: dict[str, Path]) -> None:
    folder, ends = folders["t5"], {}
    for rate in (None, 3e-2, 1e-9):
        method = lbcl(folder, "t5", sigma_lr=rate, gamma=0.0)
        ends[rate] = learn(folder, "t5", method, 1)
    sigmas = [name for name in ends[None] if name.endswith(".sigma")]
    for name in sigmas:
        assert torch.equal(ends[None][name], ends[3e-2][name]), "TRAINING's own rate"
        assert ends[1e-9][name].abs().max() < 1e-7
        assert ends[None][name].abs().max() > 1e-3


# ---- twins


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_past_all_variants_are_one(folders: dict[str, Path], family: str) -> None:
    """methods.md 8.8: in the first task LB-CL is NLNB-CL bit for bit, in later ones with neither half."""
    folder = folders[family]
    nlnb, first = lbcl(folder, family, init="random", project="off"), {}
    first = learn(folder, family, nlnb, 1)
    for settings in ({}, {"init": "random"}, {"project": "off"}, {"mode": "literal"}, {"layers": "top_1"}):
        other = lbcl(folder, family, **settings)
        found = learn(folder, family, other, 1)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], first[name]) for name in first), settings
        assert other.influences(1) == nlnb.influences(1)
    second = learn(folder, family, nlnb, 2)
    other = lbcl(folder, family, init="random", project="gradient", projection="sum")
    other.memory.put = lambda name, space: None  # nothing is remembered
    other._old_triplets = dict
    learn(folder, family, other, 1)
    found = learn(folder, family, other, 2)
    assert all(torch.equal(found[name], second[name]) for name in second)


def test_a_layer_without_a_free_direction_gets_no_triplets(folders: dict[str, Path]) -> None:
    """With U's space full alone, U keeps its start; with both, the layer is left out and told; with all, the task."""
    folder = folders["llama2"]
    method = lbcl(folder, "llama2")
    learn(folder, "llama2", method, 1)

    def fill(*names: str) -> None:
        for name in names:
            method.memory.put(name, Subspace(torch.eye(method.memory[name].width)))

    half, gone = method.kind.targets[:2]
    fill(f"{half}.U", f"{gone}.U", f"{gone}.V")
    method.begin_task(context(folder, "llama2", method, 2))
    start = method._trained[f"{half}.U"].start
    start_of_V = method._trained[f"{half}.V"].start
    second = learn(folder, "llama2", method, 2)
    assert torch.equal(second[f"{half}.U"], start)
    assert not torch.equal(second[f"{half}.V"], start_of_V)
    assert not [name for name in second if name.startswith(f"{gone}.")]
    assert {record["space"] for record in method.records() if record.get("closed")} == {f"{gone}.U", f"{gone}.V"}
    assert len(method.active()[gone]) == 1
    fill(*method.memory)
    assert learn(folder, "llama2", method, 3) == {}
    method.load_trained(3, {})
    assert len(method.active()[half]) == 2


# ---- what is kept


@pytest.mark.parametrize("settings", [{}, {"mode": "literal"}, {"init": "copy"}], ids=["corrected", "literal", "copy"])
def test_taking_stages_leads_where_learning_led(folders: dict[str, Path], settings: Any) -> None:
    """methods.md 8.6: memory and triplets survive a file, and the next task is learnt alike, bit for bit."""
    folder = folders["t5"]
    learning, taking = (lbcl(folder, "t5", **settings) for _ in range(2))
    learns_alike_from_its_stage(folder, "t5", learning, taking)


def test_records_say_what_was_measured(folders: dict[str, Path]) -> None:
    folder = folders["t5"]
    method = lbcl(folder, "t5")
    for task in (1, 2, 3):
        learn(folder, "t5", method, task)
    kinds = {key: [record for record in method.records() if key in record] for key in ("space", "sensitivity_of")}
    assert len(kinds["space"]) == 2 * len(method.kind.targets)
    assert [record["sensitivity_of"] for record in kinds["sensitivity_of"]] == sorted(method.kind.targets)
    for record in kinds["sensitivity_of"]:
        assert len(record["per_task"]) == 2
        assert record["mean"] == pytest.approx(sum(record["per_task"]) / 2, rel=1e-5)
        assert record["fisher"] > 0
    assert set(method.state_dict()[1]["sensitivity"]) == {"2", "3"}


def test_what_is_active_is_what_was_trained(folders: dict[str, Path]) -> None:
    """Merged: `s U diag(sigma) V` of every task, as `methods.base` hands it to the weights."""
    folder = folders["llama2"]
    method = lbcl(folder, "llama2")
    tensors = [learn(folder, "llama2", method, task) for task in (1, 2)]
    for name, parts in method.active().items():
        wanted = sum(
            4.0 * t.U.double() @ torch.diag(t.sigma.double()) @ t.V.double()
            for t in (triplets_of(found)[name] for found in tensors)
        )
        found = sum(part.scale * part.B.double() @ part.A.double() for part in parts)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


# ---- what is refused


def test_too_few_rows_are_told_before_anything_is_trained() -> None:
    recipe = Recipe.load("recipes/tiny_t5_order1.yaml", ["method=lbcl", "method.seed_samples=9999"])
    with pytest.raises(UserError, match=r"method.seed_samples: 9999, but task notes has \d+ training rows"):
        load_workload(recipe, Alone())


def test_triplets_of_another_rank_or_none_are_refused(folders: dict[str, Path]) -> None:
    folder = folders["t5"]
    wider = lbcl(folder, "t5", ADAPTER.model_copy(update={"rank": 4}))
    first = learn(folder, "t5", wider, 1)
    with pytest.raises(ValueError, match="task 1 left triplets of rank 4; triplets are paired by index, at rank 3"):
        lbcl(folder, "t5").load_trained(1, first)
    lora = learn(folder, "t5", new_method(folder, "t5", "inclora"), 1)
    with pytest.raises(ValueError, match="task 1 left no triplets"):
        lbcl(folder, "t5").load_trained(1, lora)


def test_wrong_settings_are_told(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="top_9, but the decoder blocks with adapters number 1"):
        lbcl(folders["t5"], "t5", layers="top_9")
    recipe = "recipes/tiny_t5_order1.yaml"
    for overrides, words in (
        (["method.layers=four"], "'four' is neither all nor top_<k>"),
        (["method.layers=4"], "4 is neither all nor top_<k>, such as top_4"),
        (["method.projection=sum"], "projection: sum is taken off gradients"),
        (["adapter=lora"], "adapter.kind: lora does not go with lbcl"),
        (["adapter=prompt"], "adapter.kind: prompt does not go with lbcl"),
        (["method.seed_samples=0"], "method.seed_samples"),
        (["adapter.scale=0"], "adapter.scale"),
    ):
        with pytest.raises(UserError) as caught:
            Recipe.load(recipe, ["method=lbcl", *overrides])
        assert words in str(caught.value)
    with pytest.raises(UserError, match="triplet does not go with pegp"):
        Recipe.load(recipe, ["adapter=triplet"])


def test_a_recipes_lora_keys_serve_triplets_too() -> None:
    """`method=lbcl` over any recipe: rank, dropout and targets stay, alpha is LoRA's, the scale is 4 at every rank."""
    lora = Recipe.load("recipes/mini_t5_order1.yaml", ["method=inclora"]).adapter
    triplets = Recipe.load("recipes/mini_t5_order1.yaml", ["method=lbcl"]).adapter
    assert isinstance(triplets, TripletAdapter)
    assert triplets == TripletAdapter(
        kind="triplet", rank=lora.rank, scale=4.0, dropout=lora.dropout, target_modules=lora.target_modules
    )
    wide = Recipe.load("recipes/mini_t5_order1.yaml", ["method=lbcl", "adapter.rank=16", "adapter.scale=1"]).adapter
    assert (wide.rank, wide.scale) == (16, 1.0)
    given = Recipe.load("recipes/mini_t5_order1.yaml", ["method=lbcl", "adapter.kind=triplet"]).adapter
    assert given == triplets
    with pytest.raises(UserError, match=r"adapter\.alpha: LoRA's, and lbcl trains triplets; set adapter.scale"):
        Recipe.load("recipes/mini_t5_order1.yaml", ["method=lbcl", "adapter.alpha=16"])


def test_literal_mode_is_the_papers_form() -> None:
    literal = LbCl.model_validate({"name": "lbcl", "mode": "literal"})
    assert (literal.project, literal.projection, literal.align) == ("gradient", "sum", "none")
    assert LbCl.model_validate({"name": "lbcl", "mode": "literal", "align": "signs"}).align == "signs"
    overrides = ["method=lbcl", "method.mode=literal"]
    for given, scale in (([], 1.0), (["adapter.kind=triplet"], 1.0), (["adapter.scale=2"], 2.0)):
        assert Recipe.load("recipes/mini_t5_order1.yaml", [*overrides, *given]).adapter.scale == scale


def test_seed_rows_are_the_recipes_alone(folders: dict[str, Path]) -> None:
    method = lbcl(folders["t5"], "t5")
    rows = [method._seed_rows(context(folders["t5"], "t5", method, task)) for task in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
    seeds, others = rows[0]
    assert len(seeds) == 5
    assert sorted(seeds + others) == list(range(len(rows_of(1, "t5"))))
