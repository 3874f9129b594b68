"""Exports: stock PEFT and transformers compute what our own merged or attached tensors do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import AUTO, FAMILIES, Run, family_of, new_backbone, relative, target_names
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, EncoderDecoderCache

from pipeline.adapters.base import Trained
from pipeline.adapters.lora import Factors, from_tensors, to_tensors
from pipeline.adapters.prompt import PromptKind
from pipeline.attention import prefix_kind
from pipeline.layers import full_rank_modules
from pipeline.models import load_backbone, load_tokenizer

# PEFT 0.21.2 asks transformers 5.23 by the old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Its own `generate` hands LLaMA position ids that it then takes away.
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {family: new_backbone(root / family, family, 4) for family in FAMILIES}


def random_task(backbone: Path, seed: int, *, rank: int, scale: float, missing: int = 0) -> dict[str, Factors]:
    """A finished task's LoRA on all linear layers but the fourth, and but every `missing`-th."""
    shapes = shapes_of(backbone)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for number, name in enumerate(target_names(backbone)):
        if number == 3 or (missing and number % missing == 0):
            continue
        d_out, d_in = shapes[f"{name}.weight"]
        A, B = (torch.randn(shape, generator=generator) / 10 for shape in ((rank, d_in), (d_out, rank)))
        factors[name] = Factors(A, B, scale)
    return factors


@cache
def shapes_of(backbone: Path) -> Mapping[str, torch.Size]:
    model = load_backbone(backbone, family_of(backbone), dtype=torch.float32)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def three_tasks(backbone: Path) -> list[dict[str, Factors]]:
    """LoRAs of several ranks and scales; layers 0 and 3 of the list start with the second task or never."""
    return [
        random_task(backbone, 1, rank=3, scale=4.0, missing=2),
        random_task(backbone, 2, rank=2, scale=0.3),
        random_task(backbone, 3, rank=3, scale=1.7, missing=5),
    ]


def stream_of(folder: Path, backbone: Path, family: str, *overrides: str) -> tuple[Run, list[dict[str, Factors]]]:
    run = Run(folder, backbone, family, *overrides)
    tasks = three_tasks(backbone)
    for index, task in enumerate(tasks, start=1):
        run.finish(to_tensors(task), index=index)
    # What a stage keeps: scales are float32 there.
    return run, [from_tensors(to_tensors(task)) for task in tasks]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["inclora", "olora", "pegp"])
def test_the_streams_loras_are_one_lora(
    tmp_path: Path, backbones: dict[str, Path], family: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tasks = stream_of(tmp_path / "run", backbones[family], family, f"method={method}")
    folder = run.export(name=run.tasks[2])
    ours = run.logits(run.merged(*tasks))
    assert relative(run.logits(run.with_peft(folder)), ours) <= 1e-5
    assert relative(run.logits(run.merged(tasks[2])), ours) > 0.05, "the earlier tasks matter"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8

    # The printed line loads it too.
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"exported: {folder}"
    names: dict[str, Any] = {}
    exec(said[1], names)
    assert relative(run.logits(names["model"].eval()), ours) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_up_to_a_task_and_of_one_task(tmp_path: Path, backbones: dict[str, Path], family: str) -> None:
    run, tasks = stream_of(tmp_path / "run", backbones[family], family)
    second = run.tasks[1]
    up_to = run.export("--after", second, name=second)
    alone = run.export("--after", second, "--part", "task", name=f"{second}-task")
    assert relative(run.logits(run.with_peft(up_to)), run.logits(run.merged(*tasks[:2]))) <= 1e-5
    assert relative(run.logits(run.with_peft(alone)), run.logits(run.merged(tasks[1]))) <= 1e-5
    own = json.loads((alone / "adapter_config.json").read_text())
    assert own["r"] == 2, "no room for other tasks"


@pytest.mark.parametrize("family", FAMILIES)
def test_triplets_are_written_as_loras(tmp_path: Path, backbones: dict[str, Path], family: str) -> None:
    """`s U diag(sigma) V` of two tasks: as one LoRA, as one task's, merged."""
    backbone, generator = backbones[family], torch.Generator().manual_seed(5)
    run, tasks = Run(tmp_path / "run", backbone, family, "method=lbcl"), []
    for index in (1, 2):
        tensors: dict[str, Tensor] = {}
        for name in target_names(backbone):
            d_out, d_in = shapes_of(backbone)[f"{name}.weight"]
            shapes = {"U": (d_out, 3), "sigma": (3,), "V": (3, d_in)}
            tensors |= {f"{name}.{part}": torch.randn(shape, generator=generator) / 5 for part, shape in shapes.items()}
            tensors[f"{name}.scale"] = torch.tensor(4.0)
        run.finish(tensors, index=index)
        layers = target_names(backbone)
        products = {name: tensors[f"{name}.U"] @ torch.diag(tensors[f"{name}.sigma"]) for name in layers}
        tasks.append({name: Factors(tensors[f"{name}.V"], product, 4.0) for name, product in products.items()})
    both, last = run.logits(run.merged(*tasks)), run.tasks[1]
    assert relative(run.logits(run.with_peft(run.export(name=last))), both) <= 1e-5
    alone = run.export("--part", "task", name=f"{last}-task")
    assert relative(run.logits(run.with_peft(alone)), run.logits(run.merged(tasks[1]))) <= 1e-5
    merged = run.export("--merged", name=f"{last}-merged")
    assert relative(run.logits(AUTO[family].from_pretrained(merged)), both) <= 1e-5
    assert relative(run.logits(run.merged(tasks[1])), both) > 0.05, "the earlier task matters"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [["method=seqlora"], ["method=pegp", "method.lora=shared"]])
def test_one_lora_through_the_stream_is_exported_as_it_stands(
    tmp_path: Path, backbones: dict[str, Path], family: str, method: list[str]
) -> None:
    run, tasks = stream_of(tmp_path / "run", backbones[family], family, *method)
    shutil.rmtree(next((run.folder / "stages").glob("01-*")))  # not looked at
    folder = run.export(name=run.tasks[2])
    assert relative(run.logits(run.with_peft(folder)), run.logits(run.merged(tasks[2]))) <= 1e-5
    merged = run.export("--merged", "--after", run.tasks[1], name=f"{run.tasks[1]}-merged")
    assert relative(run.logits(AUTO[family].from_pretrained(merged)), run.logits(run.merged(tasks[1]))) <= 1e-5


class Branches(nn.Module):
    """A layer with its updates beside it."""

    def __init__(self, base: nn.Module, parts: list[Factors]) -> None:
        super().__init__()
        self.base, self.parts, self.weight = base, parts, base.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x) + sum(part.scale * (x @ part.A.T) @ part.B.T for part in self.parts)
        return output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_folder_needs_no_code_of_ours(
    tmp_path: Path, backbones: dict[str, Path], family: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tasks = stream_of(tmp_path / "run", backbones[family], family, f"engine.precision={precision}")
    folder = run.export("--merged", name=f"{run.tasks[2]}-merged")
    names: dict[str, Any] = {}
    exec(capsys.readouterr().out.splitlines()[1], names)
    model = names["model"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    separate = run.stock()
    for name in {name for task in tasks for name in task}:
        parts = [task[name] for task in tasks if name in task]
        separate.set_submodule(name, Branches(separate.get_submodule(name), parts))
    assert relative(run.logits(model.eval()), run.logits(separate.eval())) <= 1e-5
    assert model.generation_config.eos_token_id == separate.generation_config.eos_token_id

    tokenizer, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(run.backbone, family)
    texts = ["Which topic?  Two spaces", " a space before", "line\nnext\ttab", "café 1804", "", "x </s> y"]
    for text in texts:
        assert tokenizer(text).input_ids == ours(text).input_ids, text
        assert tokenizer.decode(tokenizer(text).input_ids) == ours.decode(ours(text).input_ids)
    assert tokenizer.pad_token == ours.pad_token
    batch = tokenizer(texts[:2], return_tensors="pt", padding=True)
    assert sorted(batch) == ["attention_mask", "input_ids"], "what a call gives is what the model takes"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert family == "t5" or settings["model_input_names"] == ["input_ids", "attention_mask"], "in older releases too"
    assert "local_files_only" not in settings
    padding = 0 if family == "llama2" else -1
    assert batch["attention_mask"][1, padding] == 0, "LLaMA writes on at the right"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_task_merged(tmp_path: Path, backbones: dict[str, Path], family: str) -> None:
    run, tasks = stream_of(tmp_path / "run", backbones[family], family)
    folder = run.export("--merged", "--part", "task", name=f"{run.tasks[2]}-task-merged")
    assert relative(run.logits(AUTO[family].from_pretrained(folder)), run.logits(run.merged(tasks[2]))) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", ["shared", "per_task"])
def test_whole_weights_are_merged_as_they_stand_after_a_task(
    tmp_path: Path, backbones: dict[str, Path], family: str, lora: str
) -> None:
    """GORP's: a full-rank module's weight holds all tasks up to there; LoRA lies on other layers."""
    backbone = backbones[family]
    run = Run(tmp_path / "run", backbone, family, "method=gorp", f"method.lora={lora}")
    cores = full_rank_modules(run.stock(), family, None)
    tasks = [{n: f for n, f in task.items() if n not in cores} for task in three_tasks(backbone)]
    random = torch.Generator().manual_seed(6)
    weights = []
    for index, task in enumerate(tasks, start=1):
        shapes = {name: shapes_of(backbone)[f"{name}.weight"] for name in cores}
        weights.append({name: torch.randn(shape, generator=random) / 3 for name, shape in shapes.items()})
        run.finish(to_tensors(task) | {f"{name}.W": W for name, W in weights[-1].items()}, index=index)

    for last in (3, 2):
        after = run.tasks[last - 1]
        folder = run.export("--merged", "--after", after, name=f"{after}-merged")
        by_hand = run.stock()
        active = tasks[last - 1 : last] if lora == "shared" else tasks[:last]
        for name, W in weights[last - 1].items():
            by_hand.get_submodule(name).weight.data.copy_(W)
        for name in {name for task in active for name in task}:
            parts = [task[name] for task in active if name in task]
            by_hand.set_submodule(name, Branches(by_hand.get_submodule(name), parts))
        ours = run.logits(by_hand.eval())
        assert relative(run.logits(AUTO[family].from_pretrained(folder)), ours) <= 1e-5
        assert relative(run.logits(run.merged(*active)), ours) > 0.05, "the whole weights matter"


PREFIXED = {"t5": "decoder.block.{}.layer.0.SelfAttention", "llama2": "model.layers.{}.self_attn"}
LENGTH = 5


def soft_tensors(kind: str, model: Any, layers: int) -> dict[str, Tensor]:
    """A trained prompt or prefix, as a stage keeps it."""
    generator = torch.Generator().manual_seed(8)
    if kind == "prompt":
        return {"prompt": torch.randn(LENGTH, model.config.hidden_size, generator=generator)}
    config = model.config
    t5 = config.model_type == "t5"
    shape = (3, LENGTH, 4) if t5 else (2, LENGTH, config.head_dim)
    return {
        f"{PREFIXED[config.model_type.replace('llama', 'llama2')].format(layer)}.{part}": torch.randn(
            shape, generator=generator
        )
        for layer in reversed(range(layers))  # not in the order of the layers
        for part in ("value", "key")
    }


class ByHand(nn.Module):
    """The model with a prompt given as embeddings, or a prefix given as a filled cache."""

    def __init__(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.tensors = model, tensors

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Any:
        rows, t5 = len(input_ids), self.model.config.model_type == "t5"
        longer = torch.cat([torch.ones(rows, LENGTH, dtype=torch.long), attention_mask], dim=1)
        if "prompt" in self.tensors:
            embedded = self.model.get_input_embeddings()(input_ids)
            embedded = torch.cat([self.tensors["prompt"].expand(rows, -1, -1), embedded], dim=1)
            return self.model(inputs_embeds=embedded, attention_mask=longer, **others)
        cache = DynamicCache()
        for layer in range(len(self.tensors) // 2):
            name = PREFIXED["t5" if t5 else "llama2"].format(layer)
            key, value = (self.tensors[f"{name}.{part}"].expand(rows, -1, -1, -1) for part in ("key", "value"))
            cache.update(key, value, layer)
        if t5:
            others["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **others)
        return self.model(input_ids=input_ids, attention_mask=longer, past_key_values=cache, **others)


@pytest.mark.parametrize("layers", [3, 12])  # odd and even; and 10 stands before 2 in a stage's file
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_prefix_are_those_of_peft(tmp_path: Path, family: str, kind: str, layers: int) -> None:
    backbone = new_backbone(tmp_path / "backbone", family, layers)
    run = Run(tmp_path / "run", backbone, family, "method=seqlora", f"adapter={kind}", f"adapter.length={LENGTH}")
    tensors = soft_tensors(kind, run.stock(), layers)
    run.finish({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, index=1)
    run.finish(tensors, index=2)
    peft = run.with_peft(run.export(name=run.tasks[1]))
    by_hand = run.logits(ByHand(run.stock(), tensors))
    assert relative(run.logits(peft), by_hand) <= 1e-5
    assert relative(run.logits(run.stock()), by_hand) > 0.02
    first = run.with_peft(run.export("--after", run.tasks[0], name=run.tasks[0]))
    assert relative(run.logits(first), by_hand) > 0.02

    ours = run.stock()
    (prefix_kind(LENGTH) if kind == "prefix" else PromptKind(LENGTH)).attach(
        ours, {name: Trained(tensor, fixed=True) for name, tensor in tensors.items()}
    )
    assert relative(run.logits(peft), run.logits(ours)) <= 1e-5
    ids = torch.tensor([[7, 30, 11, 9]])
    assert peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **WRITE).tolist()[0][-6:] == greedy(
        ours, family, ids
    )


WRITE: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@torch.no_grad()
def greedy(model: Any, family: str, ids: Tensor) -> list[int]:
    """Six tokens, without any cache between them; never the end (1)."""
    written = ids.new_zeros(1, 1) if family == "t5" else ids
    for _ in range(6):
        if family == "t5":
            scores = model(input_ids=ids, decoder_input_ids=written).logits[0, -1]
        else:
            scores = model(input_ids=written).logits[0, -1]
        scores[1] = -torch.inf
        written = torch.cat([written, scores.argmax().view(1, 1)], dim=1)
    return written[0, -6:].tolist()
