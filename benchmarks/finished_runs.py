"""Runs that are finished: their recipe, workload, and the model after each stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.methods import METHODS, Method
from pipeline.recipe import Recipe
from pipeline.stage_files import verified_manifest
from pipeline.stages import Stage
from pipeline.weights import Weights
from pipeline.workload import Alone, StreamTask, Workload, load_workload


class FinishedRun:
    """The folder of a run of a method whose changes can be merged into weights."""

    def __init__(self, folder: Path) -> None:
        """`UserError` where there is no such run."""
        self.folder = folder
        for needed in ("recipe.yaml", "results.json"):
            if not (folder / needed).is_file():
                raise UserError(f"{folder}: no {needed} here; give the folder of a finished run")
        self.recipe = Recipe.load_resolved(folder / "recipe.yaml")
        self.workload: Workload = load_workload(self.recipe, Alone())
        if not self.workload.targets:
            raise UserError(f"{folder}: a {self.workload.kind.name} cannot be merged, so no weight moves; give others")
        self.results: dict[str, Any] = json.loads((folder / "results.json").read_bytes())
        self._weights = Weights(self.workload, torch.device("cpu"))

    def stages(self) -> Iterator[tuple[StreamTask, Method[Any], nn.Module]]:
        """After each task: the method, and the one model, whose weights the next stage replaces."""
        settings = self.recipe.method
        method: Method[Any] = METHODS[settings.name](settings, self.workload.kind, task_count=len(self.workload.tasks))
        for task in self.workload.trained_tasks:
            stage = self._stage(task)
            method.load_state_dict(*stage.load_method(settings.name))
            method.load_trained(task.index, stage.load_trained())
            yield task, method, self._weights.model(method.active(), method.matrices())

    def _stage(self, task: StreamTask) -> Stage:
        """By its index: its address depends on the code that made it."""
        folders = list((self.folder / "stages").glob(f"{task.index:02d}-*"))
        if len(folders) != 1:
            raise UserError(f"{self.folder}: {len(folders)} stages of task {task.index} ({task.name}), not one")
        return Stage(folders[0], task.index, task.name, verified_manifest(folders[0])["key"])
