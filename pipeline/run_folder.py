"""A run's folder: whose it is, that only one run writes it, and its `run.json`."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import TEMPORARY, write_atomic, write_json, writing
from pipeline.recipe import Recipe
from pipeline.recipe_source import ROOT, flatten
from pipeline.workload import Workload

LOCK = ".lock"  # held by rank 0 for as long as it lives
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """The folder of one run. Rank 0 alone writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, recipe: Recipe) -> bool:
        """Take the folder for `recipe`; True where a run of the same recipe is there to go on with.

        Raises `UserError` where it belongs to another recipe, to a run in progress, or cannot be written.
        """
        existing = self.path / "recipe.yaml"
        resumed = existing.is_file()
        if not resumed and self.path.exists() and (not self.path.is_dir() or any(map(_foreign, self.path.iterdir()))):
            raise UserError(
                f"output.dir: {self.path} exists and is not the folder of a run; choose another: output.dir=FOLDER"
            )
        if resumed:
            self._same_recipe(recipe, existing)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"output.dir: {self.path} is being written by another run ({self._owner()}); wait for it, or stop it"
            ) from error
        for leftover in self.path.rglob(f"{TEMPORARY}*"):
            if leftover.is_file():
                leftover.unlink()
        if not resumed:
            write_atomic(existing, recipe.to_yaml())
        return resumed

    def close(self) -> None:
        """The run is over, or leaves the folder to be gone on with."""
        (self.path / "pids").unlink(missing_ok=True)
        self._lock.close()

    def _owner(self) -> str:
        pids = self.path / "pids"
        lines = pids.read_text(encoding="utf-8").splitlines() if pids.is_file() else []
        return f"process {lines[0].split()[2]} on {lines[0].split()[1]}" if lines else "which is just starting"

    def _same_recipe(self, recipe: Recipe, existing: Path) -> None:
        old = Recipe.load_resolved(existing)
        if old.sha256 == recipe.sha256:
            return
        before, now = flatten(old.influences()), flatten(recipe.influences())
        lines = [
            f"  {key}: {before.get(key)!r} there, {now.get(key)!r} asked for"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        raise UserError(
            "\n".join(
                [
                    f"output.dir: {self.path} holds a run of another recipe; choose another folder "
                    "(output.dir=FOLDER), delete that one, or undo these changes:",
                    *lines,
                ]
            )
        )

    def write_pids(self, ranks: Sequence[tuple[str, int]]) -> None:
        """Name the ranks of the run: a line "rank host pid" each, for whoever wants to signal them."""
        lines = [f"{rank} {host} {pid}\n" for rank, (host, pid) in enumerate(ranks)]
        write_atomic(self.path / "pids", "".join(lines))

    def read_facts(self) -> dict[str, Any]:
        """The content of `run.json`, empty where there is none yet."""
        path = self.path / "run.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if content:
                _fingerprints(content, content)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: damaged ({error!r}); delete this file, and the run goes on from its stages"
            ) from error
        return content

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace `run.json`."""
        write_json(self.path / "run.json", facts)

    def check_data(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on where rows or weights are others than when the run began."""
        old = self.read_facts()
        for place, then, now in _fingerprints(old, facts):
            if then != now:
                raise UserError(
                    f"{place}: the content is not what this run began with ({then[:12]} then, {now[:12]} now); "
                    f"restore it, or begin a new run: output.dir=FOLDER (this one is {self.path})"
                )


def _fingerprints(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(place, then, now) of everything that a run reads."""
    if not old:
        return []
    pairs = [("model.path", old["model"]["fingerprint"], new["model"]["fingerprint"])]
    for task, facts in new["data"].items():
        for part in ("train", "evaluation"):
            key = f"{part}_fingerprint"
            pairs.append((f"task {task}, {part} rows", old["data"][task][key], facts[key]))
    return pairs


def this_process() -> tuple[str, int]:
    """Host and process id."""
    return platform.node(), os.getpid()


def _foreign(path: Path) -> bool:
    """Whether a folder that holds `path` is more than the first moments of a run that was killed."""
    return path.name != LOCK and not path.name.startswith(TEMPORARY)


def run_facts(workload: Workload) -> dict[str, Any]:
    """What `run.json` says from the start."""
    recipe = workload.recipe
    return {
        "order": list(recipe.task_names),
        "order_name": recipe.order.name,
        "unseen": [task.name for task in workload.unseen],
        "retention": {},
        "references": [],
        "method": recipe.method.name,
        "model": {
            "family": recipe.model.family,
            "path": recipe.model.path,
            "revision": recipe.model.revision,
            "fingerprint": workload.model_fingerprint,
            "quantization": recipe.model.quantization,
        },
        "seed": recipe.seed,
        "recipe_sha256": recipe.sha256,
        "data": {task.name: task.facts() for task in [*workload.tasks, *workload.unseen]},
        "settings": {
            "split": recipe.evaluation.split,
            "decoding": recipe.evaluation.decoding,
            "label_scoring": recipe.evaluation.label_scoring,
            "cells": recipe.evaluation.cells,
            "add_task_name": recipe.data.add_task_name,
            "add_dataset_name": recipe.data.add_dataset_name,
            "max_source_tokens": recipe.data.max_source_tokens,
            "truncation": recipe.data.truncation,
            "steps": {task.name: len(workload.steps(task)) for task in workload.trained_tasks},
            "joint": recipe.method.joint,
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "git": git_state(),
        "trainable_parameters": None,
        "leak": None,
        "timing": {},
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return versions


def git_state() -> dict[str, Any]:
    """The checkout's commit and whether tracked files differ from it; nulls outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}
