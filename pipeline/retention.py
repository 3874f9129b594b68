"""Retention of general ability: texts and foreign tasks scored untrained and after each task, in no average."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.errors import UserError
from data_prep.files import write_json
from data_prep.texts import SUFFIXES, Text, load_text
from eval import harness
from eval.retention import negative_log_likelihoods, perplexity
from eval.run_files import retention_path
from eval.summary import significant
from pipeline.engine import Ranks
from pipeline.runlog import RunLog
from pipeline.stages import stage_key
from pipeline.stopping import Stopped, StopRequest
from pipeline.workload import Workload


class RetentionBook:
    """What `evaluation.retention` lists: which scores exist, and how a missing one is made."""

    def __init__(self, workload: Workload, ranks: Ranks) -> None:
        """Reads it all; `UserError`, on all ranks, where something cannot be had. Nothing is written."""
        recipe = workload.recipe
        self._workload, self._ranks, self._run_dir = workload, ranks, recipe.run_dir
        self._tasks: dict[str, harness.HarnessTask] = {}  # on rank 0, which alone scores them
        entries = recipe.evaluation.retention
        self._texts = ranks.together(lambda: [self._text(Path(name)) for name in entries if name.endswith(SUFFIXES)])
        others = [name for name in entries if not name.endswith(SUFFIXES)]
        fingerprints = ranks.on_first(lambda: self._load_tasks(others))
        self._fingerprints = {text.name: text.fingerprint for text in self._texts} | fingerprints
        ranks.together(lambda: self._refuse_twins(len(entries)))

    def _text(self, path: Path) -> Text:
        recipe, tokenizer = self._workload.recipe, self._workload.tokenizer
        return load_text(path, tokenizer, family=recipe.model.family, piece_tokens=recipe.data.max_source_tokens)

    def _load_tasks(self, entries: Sequence[str]) -> dict[str, str]:
        self._tasks = {task.name: task for task in map(harness.load_task, entries)}
        return {name: task.fingerprint for name, task in self._tasks.items()}

    def _refuse_twins(self, entries: int) -> None:
        if len(self._fingerprints) < entries:
            raise UserError(
                f"evaluation.retention: {entries} entries of only {len(self._fingerprints)} names "
                f"({', '.join(self._fingerprints)}); results are told apart by name, rename a file or drop one"
            )

    def facts(self) -> dict[str, dict[str, Any]]:
        """What `run.json` says of it, by name."""
        texts = {text.name: {"tokens": text.tokens} for text in self._texts}
        return {name: {"fingerprint": found, **texts.get(name, {})} for name, found in self._fingerprints.items()}

    def missing(self, after: str, stage: str, *, again: bool = False) -> list[str]:
        """Names of what is not scored for these weights. Collective."""
        return self._ranks.on_first(
            lambda: [name for name in self._fingerprints if again or not self._exists(after, stage, name)]
        )

    def _exists(self, after: str, stage: str, name: str) -> bool:
        try:
            content = json.loads(retention_path(self._run_dir, after, name).read_text(encoding="utf-8"))
            return bool(content["key"] == self._key(stage, name))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _key(self, stage: str, name: str) -> str:
        tokens = self._workload.recipe.data.max_source_tokens
        return stage_key(stage, {"retention": self._fingerprints[name], "piece_tokens": tokens})

    def score(
        self, model: nn.Module, after: str, stage: str, names: Sequence[str], log: RunLog, stop: StopRequest
    ) -> None:
        """Score what is named and write it. Collective."""
        for text in self._texts:
            if text.name in names:
                found = {f"{text.name}: perplexity": perplexity(self._nll(model, text, stop), text.tokens)}
                self._ranks.on_first(partial(self._write, after, stage, text.name, found, log))
        for name in names:
            if name not in {text.name for text in self._texts}:
                self._ranks.check_stop(stop)
                self._ranks.on_first(partial(self._write_task, model, after, stage, name, log))

    def _nll(self, model: nn.Module, text: Text, stop: StopRequest) -> float:
        """Each rank its share of the pieces; `fsum` is exact, so their sum is the same on any number of ranks."""
        recipe, tokenizer = self._workload.recipe, self._workload.tokenizer
        mine: list[float] = []
        with suppress(Stopped):  # all ranks stop together below
            mine = negative_log_likelihoods(
                model,
                text.pieces[self._ranks.rank :: self._ranks.world],
                family=recipe.model.family,
                pad_id=int(tokenizer.pad_token_id),
                batch_size=recipe.evaluation.batch_size,
                on_batch=stop.check,
            )
        self._ranks.check_stop(stop)
        return math.fsum(value for share in self._ranks.gather(mine) for value in share)

    def _write_task(self, model: nn.Module, after: str, stage: str, name: str, log: RunLog) -> None:
        """On rank 0 alone, within the hour for which the others wait in a collective."""
        recipe = self._workload.recipe
        found = harness.scores(
            self._tasks[name],
            model,
            self._workload.tokenizer,
            family=recipe.model.family,
            batch_size=recipe.evaluation.batch_size,
        )
        self._write(after, stage, name, found, log)

    def _write(self, after: str, stage: str, name: str, found: Mapping[str, float | None], log: RunLog) -> None:
        content = {"key": self._key(stage, name), "after": after, "name": name, "scores": dict(found)}
        write_json(retention_path(self._run_dir, after, name), content)
        log.event("retention", **content)
        for measure, value in found.items():
            log.say(f"after {after}: {measure} {significant(value)}")
