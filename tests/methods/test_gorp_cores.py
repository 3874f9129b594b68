"""GORP's cores: their gradient, what their layers collect, when bases are made, sketched against exact bases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import TRAINING, context, learn, new_method, rows_of
from plain_reference import Float64
from random_backbones import save_backbone
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.adapters.base import Trained
from pipeline.adapters.core import CoreLinear
from pipeline.label_loss import LabelLoss
from pipeline.layers import merge
from pipeline.methods.core_updates import CoreUpdates
from pipeline.models import load_backbone, prepare_for_training, recomputing
from pipeline.projection.sketch import ExactGradient
from pipeline.recipe import LoraAdapter

FAMILIES = ("t5", "llama2")
ADAPTER = LoraAdapter(rank=3, alpha=6, dropout=0.0)
SMALL: dict[str, Any] = {"core_rank": 4, "refresh_every": 4, "full_rank_lr": 1e-3}
WHOLE = TRAINING.model_copy(update={"global_batch_size": 8})  # every step sees all rows


def gorp(folder: Path, family: str, **settings: Any) -> Any:
    return new_method(folder, family, "gorp", ADAPTER, **(SMALL | settings))


def core_layer(d_out: int, d_in: int, k: int, alpha: float) -> CoreLinear:
    base = nn.Linear(d_in, d_out, bias=False, dtype=torch.float64).requires_grad_(False)
    return CoreLinear(base, Trained(torch.zeros(k, k)), alpha)


# ---- a layer


def test_a_cores_gradient_by_hand() -> None:
    """W 3 x 2, k = 1, alpha 2: U = e3, v = (0.6, 0.8); x = (1, 2), g = (5, 7, 3), so g^T U v^T x = 3 * 2.2."""
    layer = core_layer(3, 2, 1, alpha=2.0)
    layer.set_bases(torch.tensor([[0.0], [0.0], [1.0]]).double(), torch.tensor([[0.6], [0.8]]).double())
    layer.collecting = (seen := ExactGradient(3, 2),)
    x, g = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[5.0, 7.0, 3.0]]).double()
    layer(x).backward(g)
    assert_close(layer.C.grad, torch.tensor([[2 * 3 * 2.2]]).double())
    assert_close(seen.sums["G"], torch.tensor([[5.0, 10.0], [7.0, 14.0], [3.0, 6.0]]).double())
    layer.C.data.fill_(0.5)
    assert_close(layer(x) - layer.base(x), torch.tensor([[0.0, 0.0, 2 * 0.5 * 2.2]]).double())


def test_a_cores_gradient_is_autograds_of_the_weight() -> None:
    """`dL/dC = alpha U^T G V`, where G is the gradient of the whole weight W + alpha U C V^T."""
    random = torch.Generator().manual_seed(3)
    layer = core_layer(7, 5, 3, alpha=0.7)
    U, V = (torch.linalg.qr(torch.randn(d, 3, generator=random, dtype=torch.float64)).Q for d in (7, 5))
    layer.set_bases(U, V)
    layer.C.data = torch.randn(3, 3, generator=random, dtype=torch.float64)
    layer.collecting = (seen := ExactGradient(7, 5),)
    x = torch.randn(2, 4, 5, generator=random, dtype=torch.float64)
    W = (layer.weight + 0.7 * U @ layer.C.detach() @ V.T).requires_grad_()
    (x @ W.T).square().sum().backward()
    layer(x).square().sum().backward()
    assert_close(layer.C.grad, 0.7 * U.T @ W.grad @ V)
    assert_close(seen.sums["G"], W.grad)
    with torch.no_grad():
        layer(x)
    assert_close(seen.sums["G"], W.grad)  # a forward without a backward adds nothing


# ---- what is collected


class Collected:
    """The sums that bases are made of, in the order in which they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sums: list[dict[str, Tensor]] = []
        reduced = CoreUpdates._reduced

        def kept(cores: CoreUpdates, sums: Any) -> Any:
            self.sums.append(
                {f"{layer} {key}": s.clone() for layer, held in sums.items() for key, s in held.sums.items()}
            )
            return reduced(cores, sums)

        monkeypatch.setattr(CoreUpdates, "_reduced", kept)


def gradients_of_weights(folder: Path, family: str, method: Any) -> dict[str, Tensor]:
    """Of the mean loss over a first task's rows, by plain autograd through the bare backbone."""
    model = load_backbone(folder, family, dtype=torch.float64)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in method.kind.cores}
    ctx = context(folder, family, method, 1)
    rows = rows_of(1, family)
    with Float64():
        loss = LabelLoss(model, family)(**ctx.collate(list(range(len(rows)))))
        (loss / sum(len(row.label_ids) for row in rows)).backward()
    return {f"{name} G": W.grad for name, W in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_collect_the_whole_gradient_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Before training and in a window's last step; whatever the micro-batches, recomputed activations or not.

    With T = 1 and one step a base, the first step's gradient is that of the bare backbone twice.
    """
    training = WHOLE.model_copy(update={"epochs": 2})
    wanted: Any = None
    for size, checkpointing in ((2, False), (8, False), (1, False), (2, True)):
        collected = Collected(monkeypatch)
        method = gorp(folders[family], family, svd="exact", refresh_every=1)
        wanted = wanted or gradients_of_weights(folders[family], family, method)
        divided = training.model_copy(update={"micro_batch_size": size})
        learn(folders[family], family, method, 1, training=divided, dtype=torch.float64, checkpointing=checkpointing)
        assert len(collected.sums) == 2
        for sums in collected.sums:
            assert sums.keys() == wanted.keys()
            for name, G in wanted.items():
                assert (sums[name] - G).norm() <= 1e-12 * G.norm(), (name, size, checkpointing)


@pytest.mark.parametrize("family", FAMILIES)
def test_sketches_are_the_same_with_recomputed_activations(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    seen, ends = [], []
    for checkpointing in (False, True):
        collected = Collected(monkeypatch)
        method = gorp(folders[family], family, gradient_space="mean_gradient")
        options: Any = {"training": TRAINING.model_copy(update={"epochs": 3}), "dtype": torch.float64}
        ends.append(learn(folders[family], family, method, 1, checkpointing=checkpointing, **options))
        seen.append(list(collected.sums))
    assert len(seen[0]) == len(seen[1]) == 3, "at the start, after four of six steps, and the task's means"
    for plain, again in zip(*seen, strict=True):
        assert all((again[name] - total).norm() <= 1e-9 * total.norm() for name, total in plain.items())
    assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)


def with_dropout(folder: Path, family: str) -> Path:
    """A backbone that drops half of all it may in training mode: T5 everywhere, LLaMA in attention."""
    save_backbone(folder, family, dropout=0.5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    return folder


# A layer that a block runs first, by which its forwards are counted: transformers keeps hooks on the block itself out
# of what it recomputes.
FIRST_LAYERS = {
    "t5": ["encoder.block.0.layer.0.layer_norm", "decoder.block.0.layer.0.layer_norm"],
    "llama2": ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_backward_before_training_recomputes_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, training: bool
) -> None:
    """Twice as many forwards of each block, in evaluation mode as without; after it the mode is the one before."""
    folder = with_dropout(tmp_path / family, family)
    adapter = ADAPTER.model_copy(update={"dropout": 0.5})
    counts: list[list[int]] = []
    sums: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        collected = Collected(monkeypatch)
        method = new_method(folder, family, "gorp", adapter, **SMALL, svd="exact")
        ctx = context(folder, family, method, 1, dtype=torch.float64)
        prepare_for_training(ctx.model, gradient_checkpointing=checkpointing)
        ctx.model.train(training)
        forwards = Forwards(ctx.model, FIRST_LAYERS[family])
        with Float64():
            method.begin_task(ctx)
        counts.append(forwards.counts)
        sums += collected.sums
        assert {module.training for module in ctx.model.modules()} == {training}
    assert counts == [[2, 2], [4, 4]], "a global batch of two micro-batches"
    plain, again = sums
    for name, total in plain.items():
        assert (again[name] - total).norm() <= 1e-12 * total.norm(), name


class Forwards:
    """How often layers of a model run."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.counts = [0] * len(layers)
        for number, layer in enumerate(layers):
            model.get_submodule(layer).register_forward_pre_hook(lambda *_, number=number: self._count(number))

    def _count(self, number: int) -> None:
        self.counts[number] += 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["not told", "told"])
def test_blocks_told_to_recompute_go_back_to_evaluation(
    folders: dict[str, Path], family: str, checkpointing: bool
) -> None:
    """Also where a forward fails; blocks that were not told so stay as they are."""
    model = load_backbone(folders[family], family, dtype=torch.float32)
    prepare_for_training(model, gradient_checkpointing=checkpointing)
    model.eval()
    inside: set[str] = set()

    def fail() -> None:
        inside.update(name for name, module in model.named_modules() if module.training)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), recomputing(model):
        fail()
    blocks = {layer.partition(".layer.0")[0].removesuffix(".input_layernorm") for layer in FIRST_LAYERS[family]}
    assert blocks <= inside if checkpointing else not inside
    assert not any(module.training for module in model.modules())


# ---- when bases are made


@pytest.mark.parametrize(
    ("epochs", "every", "times"), [(6, 10, 2), (5, 10, 1), (5, 5, 2), (4, 4, 2), (2, 1, 4), (1, 1, 2), (1, 10, 1)]
)
def test_bases_are_made_at_the_start_and_after_each_window_but_the_last(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, epochs: int, every: int, times: int
) -> None:
    """Two steps an epoch. After the task's last step nothing is refreshed: the core is merged, and that is all."""
    collected = Collected(monkeypatch)
    method = gorp(folders["llama2"], "llama2", refresh_every=every)
    before = load_backbone(folders["llama2"], "llama2", dtype=torch.float32)
    tensors = learn(folders["llama2"], "llama2", method, 1, training=TRAINING.model_copy(update={"epochs": epochs}))
    assert len(collected.sums) == times
    for name in method.kind.cores:
        assert not torch.equal(tensors[f"{name}.W"], before.get_submodule(name).weight)


def test_layers_collect_in_a_windows_last_step_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method = gorp(folders["t5"], "t5", refresh_every=4)
    told: dict[int, bool] = {}
    monkeypatch.setattr(
        method,
        "before_step",
        lambda ctx: told.update({ctx.step + 1: any(layer.collecting for layer in method._attached.cores.values())}),
    )
    learn(folders["t5"], "t5", method, 1, training=TRAINING.model_copy(update={"epochs": 4}))
    assert told == {step: step == 4 for step in range(1, 9)}, "the eighth is the task's last"


# ---- sketched against exact bases


def angles(one: Tensor, other: Tensor) -> list[float]:
    """Principal angles between two spans, in degrees, rising."""
    cosines = torch.linalg.svdvals(one.double().T @ other.double()).clamp(max=1)
    return [math.degrees(math.acos(float(cosine))) for cosine in cosines]


@pytest.mark.parametrize("family", FAMILIES)
def test_sketched_bases_train_as_exact_ones_do(folders: dict[str, Path], family: str, record_property: Any) -> None:
    """One pass of Gaussian sketches finds what is large; on these flat spectra the last directions differ."""
    folder, found = folders[family], {}
    for svd in ("exact", "randomized"):
        method = gorp(folder, family, svd=svd)
        ctx = context(folder, family, method, 1)
        method.begin_task(ctx)
        bases = method._cores.bases()
        method, training = gorp(folder, family, svd=svd), TRAINING.model_copy(update={"epochs": 6})
        for task in (1, 2):
            learn(folder, family, method, task, training=training)
        ctx = context(folder, family, method, 2)
        merge(ctx.model, folder, ctx.targets, method.active(), method.matrices())
        found[svd] = bases, ctx.run_rows(range(8), backward=False)
    (exact, loss), (sketched, sketched_loss) = found["exact"], found["randomized"]
    record_property("final loss, exact and randomized", (loss, sketched_loss))
    assert sketched_loss == pytest.approx(loss, rel=0.02)
    for name, pair in exact.items():
        for U, other in zip(pair, sketched[name], strict=True):
            record_property(f"{name}: principal angles in degrees", angles(U, other))
            assert angles(U[:, :1], other)[0] < 15, "the leading direction is there"
            assert angles(U, other)[0] < 5
