"""A run, complete: how a recipe file and the command line become one `Recipe`, and which recipes are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from data_prep.errors import UserError
from data_prep.orders import order_tasks
from pipeline.recipe_combinations import check_adapter, check_bits
from pipeline.recipe_faults import fault_lines, render_faults
from pipeline.recipe_groups import (
    SYNTHETIC,
    Adapter,
    AdapterTraining,
    Batching,
    Constrained,
    CustomTask,
    Data,
    Engine,
    Evaluation,
    Gorp,
    Group,
    IncLora,
    LbCl,
    LoraAdapter,
    MethodSettings,
    Model,
    Mtl,
    OLora,
    Order,
    Output,
    Pegp,
    PerTask,
    Projecting,
    SeqLora,
    TaskTraining,
    Training,
    TripletAdapter,
)
from pipeline.recipe_names import name_faults
from pipeline.recipe_paths import resolve_paths
from pipeline.recipe_source import ROOT, apply_override, changed_keys, find_recipe, read_recipe, split_override

__all__ = [
    "SYNTHETIC",
    "Adapter",
    "AdapterTraining",
    "Batching",
    "Constrained",
    "CustomTask",
    "Data",
    "Engine",
    "Evaluation",
    "Gorp",
    "Group",
    "IncLora",
    "LbCl",
    "LoraAdapter",
    "MethodSettings",
    "Model",
    "Mtl",
    "OLora",
    "Order",
    "Output",
    "Pegp",
    "PerTask",
    "Projecting",
    "Recipe",
    "SeqLora",
    "TaskTraining",
    "Training",
    "TripletAdapter",
]


class Recipe(Group):
    """One run, complete. Paths are absolute once loaded; `Recipe.load` and `Recipe.load_resolved` are the ways in."""

    model: Model
    data: Data
    order: Order
    method: MethodSettings
    adapter: Adapter = LoraAdapter()
    training: Training = Training()
    batching: Batching = Batching()
    evaluation: Evaluation = Evaluation()
    engine: Engine = Engine()
    output: Output = Output()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42

    @model_validator(mode="before")
    @classmethod
    def _own_adapter(cls, raw: object) -> object:
        """LB-CL's own adapter where `adapter.kind` is null: a recipe's alpha is LoRA's, triplets have a scale.

        `mode: literal` sets the paper's scale, 1, where none is given.
        """
        method, adapter = (raw.get(key) or {} for key in ("method", "adapter")) if isinstance(raw, dict) else ({}, {})
        if not isinstance(method, dict) or method.get("name") != "lbcl" or not isinstance(adapter, dict):
            return raw
        if adapter.get("kind") not in (None, "triplet"):
            return raw
        assert isinstance(raw, dict)
        own = {key: value for key, value in adapter.items() if key != "alpha"}
        papers = {"scale": 1.0} if method.get("mode") == "literal" else {}
        return {**raw, "adapter": {**papers, **own, "kind": "triplet"}}

    @model_validator(mode="after")
    def _fitting_groups(self) -> Self:
        check_adapter(self.adapter, self.method, self.training, self.engine)
        check_bits(self.model, self.method, self.training, self.engine)
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file, apply `key.path=value` overrides in order, resolve paths and check everything.

        Raises `UserError` with every fault of the recipe in one message.
        """
        source = find_recipe(path)
        raw = read_recipe(source)
        given: list[str] = []
        for text in overrides:
            key, value = split_override(text)
            apply_override(raw, key, value)
            given.append(key)
        faults = resolve_paths(raw, given)
        if "adapter.alpha" in given and isinstance(raw.get("method"), dict) and raw["method"].get("name") == "lbcl":
            faults.append("adapter.alpha: LoRA's, and lbcl trains triplets; set adapter.scale")
        faults += name_faults(raw)
        try:
            # Through JSON: strict types, while a YAML list may still stand for any sequence.
            recipe = cls.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            faults += fault_lines(error, cls)
        if faults:
            raise UserError(render_faults(_shown(path), faults))
        if recipe.output.dir is not None:
            return recipe
        name = "-".join([source.stem, *changed_keys(overrides), f"s{recipe.seed}"])
        return recipe.model_copy(update={"output": Output(dir=str(ROOT / "runs" / name))})

    @classmethod
    def load_resolved(cls, path: Path) -> Recipe:
        """The recipe that a run saved in its folder, exactly as saved.

        Raises `UserError` where this version cannot read it: edited by hand, or saved by another version.
        """
        try:
            return cls.model_validate_json(json.dumps(read_recipe(path)))
        except ValidationError as error:
            fault = render_faults(str(path), fault_lines(error, cls))
        except UserError as error:
            fault = str(error)
        raise UserError(
            f"{fault}\n  it was edited, or saved by another version; "
            f"delete the folder {path.parent} or choose another: output.dir=FOLDER"
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The stream's tasks in order."""
        if self.order.tasks is not None:
            return tuple(self.order.tasks)
        assert self.order.name is not None
        return order_tasks(self.order.name)

    @property
    def run_dir(self) -> Path:
        """Absolute folder of the run."""
        assert self.output.dir is not None
        return Path(self.output.dir)

    def influences(self) -> dict[str, Any]:
        """What decides a run's results: everything but paths, ZeRO stage, offload, checkpointing,
        micro-batching and the folder of the run (data and weights are compared by fingerprint instead).
        """
        content = self.model_dump(mode="json")
        content["order"] = list(self.task_names)
        del content["output"], content["model"]["path"], content["data"]["path"]
        del content["training"]["micro_batch_size"], content["evaluation"]["batch_size"]
        for beside in ("references", "retention"):  # files, whose scores stand beside the run's own
            del content["evaluation"][beside]
        content["engine"] = {"precision": self.engine.precision}
        content["method"].pop("feature_drift", None)
        for task in content["data"]["tasks"].values():
            for part in ("train", "test", "dev"):
                del task[part]
        return content

    @property
    def weights_on_host(self) -> bool:
        """Whether the backbone rests in the host's memory, and a device holds the layers at work alone.

        A quantized one stays where it was loaded.
        """
        return self.engine.offload == "parameters" and self.model.quantization is None

    @property
    def sha256(self) -> str:
        """Hash of `influences`: two recipes of one hash are "the same recipe"."""
        return hashlib.sha256(json.dumps(self.influences(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `Recipe.load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _shown(path: str | Path) -> str:
    """The recipe's path as short as it stays clear."""
    resolved = Path(path)
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else str(path)
