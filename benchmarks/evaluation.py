"""How fast rows are scored: `python benchmarks/evaluation.py [--model MODEL] [--run RUN]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/evaluation.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import exp, log
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks import gorp_costs
from benchmarks.command_line import writable
from benchmarks.finished_runs import FinishedRun
from benchmarks.pairs import Report, compare, table, write_json
from benchmarks.scoring_baselines import BASELINES, Predict, ended, generated
from benchmarks.streams import MODELS
from data_prep.batches import Example
from data_prep.errors import UserError
from eval.decode import predict
from eval.generation import end_ids
from eval.scoring import exact_match
from pipeline.models import load_backbone, prepare_for_scoring
from pipeline.recipe import Recipe
from pipeline.workload import Alone, StreamTask, Workload, load_workload

NEW_TOKENS = 50  # the benchmark's target length
GOALS = {"endless": 1 / 8, "untrained": 1.0, "trained": 1.0}  # of each task: our time to the baseline's
MEAN_GOAL = 1 / 1.5  # of the geometric mean over tasks, on models that stop by themselves


class Scoring:
    """A task's rows, scored by us and by transformers, in batches of equal size."""

    generation: ClassVar[dict[str, Any]] = {}  # what `generate` is told beside

    def __init__(self, model: Any, workload: Workload, task: StreamTask, rows: int, batch_size: int) -> None:
        """`model` as transformers loads it; ours scores with a copy that is prepared as a run's."""
        self.model, self.tokenizer, self.task = model, workload.tokenizer, task
        self.prepared = copy.deepcopy(model)
        prepare_for_scoring(self.prepared)
        self.family = workload.recipe.model.family
        self.examples: Sequence[Example] = task.evaluation[:rows]
        self.batch_size = batch_size
        self.texts: dict[str, list[str]] = {}
        self.lengths: list[int] = []

    def ours(self, _: int) -> None:
        """Early stop, rows dropped, batches of like length; no label scoring, which the baseline has not."""
        found = predict(
            self.prepared,
            self.tokenizer,
            self.examples,
            family=self.family,
            labels=self.task.data.task.labels,
            label_ids=self.task.label_ids,
            max_new_tokens=NEW_TOKENS,
            batch_size=self.batch_size,
            label_scoring=False,
        )
        self.texts["ours"] = [prediction.text for prediction in found]

    def baseline(self, _: int) -> None:
        """transformers' `generate`."""
        told = {"max_new_tokens": NEW_TOKENS, **self.generation}
        self._keep(generated(self.model, self.tokenizer, self.family, self.examples, self.batch_size, **told))

    def predict(self, _: int) -> None:
        """`Seq2SeqTrainer.predict`, which generates and takes the loss."""
        with tempfile.TemporaryDirectory() as folder:
            scored = Predict(self.model, self.tokenizer, self.batch_size, folder, new_tokens=NEW_TOKENS)
            self._keep(scored(self.examples))

    def _keep(self, rows: list[list[int]]) -> None:
        rows = ended(self.model, self.tokenizer, rows)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.texts["baseline"], self.lengths = [decode(row) for row in rows], [len(row) for row in rows]

    def check(self) -> int:
        """Rows that are right; both must agree on every row."""
        labels = [self.tokenizer.decode(example.label_ids, skip_special_tokens=True) for example in self.examples]
        right = {
            name: [exact_match(text, label) for text, label in zip(texts, labels, strict=True)]
            for name, texts in self.texts.items()
        }
        assert all(found == right["ours"] for found in right.values()), f"{self.task.name}: scores differ"
        return sum(right["ours"])


def endless(model: Any, tokenizer: Any) -> nn.Module:
    """The model with a head that knows no end: it generates to its limit, as a damaged one does."""
    damaged: Any = copy.deepcopy(model)
    damaged.lm_head.weight = nn.Parameter(damaged.lm_head.weight.detach().clone(), requires_grad=False)
    for end in end_ids(model, tokenizer):
        damaged.lm_head.weight[end] = 0
    return damaged


def measure(
    report: Report, name: str, state: str, model: Any, workload: Workload, options: argparse.Namespace
) -> Iterator[Callable[[], None]]:
    """One state of one model over all tasks, against one baseline after the other; what measures peaks, for later."""
    own = [b for b in BASELINES if b == "generate" or workload.recipe.model.family == "t5"]
    for baseline in own:
        if not options.baseline or baseline in options.baseline:
            title = f"{name}, {state}, {baseline}"
            yield from _measure(report, title, baseline, GOALS[state], model, workload, options)


def _measure(
    report: Report, name: str, baseline: str, goal: float, model: Any, workload: Workload, options: argparse.Namespace
) -> Iterator[Callable[[], None]]:
    ratios = []
    for task in workload.tasks:
        scoring = Scoring(model, workload, task, options.rows, options.batch_size)
        theirs = scoring.predict if baseline == "predict" else scoring.baseline
        title = f"{name}: {task.name}, {len(scoring.examples)} rows"
        found = compare(title, scoring.ours, theirs, pairs=options.pairs, goal=goal)
        ratios.append(found.ratio)
        report.add(found)
        speeds = {
            f"{side}: rows a second": round(1000 * len(scoring.examples) / ms, 1)
            for side, ms in (("ours", found.first_ms), ("the baseline", found.second_ms))
        }
        lengths = {"right": scoring.check(), "the baseline's mean length": round(fmean(scoring.lengths), 1)}
        report.state(title, lengths | speeds)
        if not options.no_peaks:
            yield partial(_state_peaks, report, title, {"ours": scoring.ours, "the baseline": theirs})
    mean, wanted = exp(fmean(map(log, ratios))), min(goal, MEAN_GOAL)
    verdict = "met" if mean <= wanted else "missed"
    report.state(f"{name}: times faster, geometric mean", f"{1 / mean:.2f} (goal {1 / wanted:.1f}: {verdict})")


def _state_peaks(report: Report, title: str, sides: dict[str, Callable[[int], None]]) -> None:
    found = {side: round(gorp_costs.peak_bytes(partial(work, 0)) / 2**20, 1) for side, work in sides.items()}
    report.state(f"{title}: peak MiB above the weights", found)


def states(options: argparse.Namespace) -> list[tuple[str, str, Callable[[], Any], Workload]]:
    """Name, state, what makes the model, and whose rows."""
    found: list[tuple[str, str, Callable[[], Any], Workload]] = []
    wanted = options.state or GOALS
    for name in [options.model] if options.model else MODELS:
        recipe = Recipe.load(f"recipes/{name}_order4.yaml")
        workload = load_workload(recipe, Alone())
        plain = partial(load_backbone, workload.model_folder, recipe.model.family, dtype=torch.float32)
        found += [(name, "untrained", plain, workload)]
        found += [(name, "endless", partial(_damaged, plain, workload.tokenizer), workload)]
    for folder in options.run or []:
        run = FinishedRun(folder)
        found.append((folder.name, "trained", partial(_last, run), run.workload))
    return [one for one in found if one[1] in wanted]


def _damaged(make: Callable[[], Any], tokenizer: Any) -> nn.Module:
    return endless(make(), tokenizer)


def _last(run: FinishedRun) -> nn.Module:
    *_, (_, _, model) = run.stages()
    return model


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/evaluation.py", description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--run", type=Path, action="append", help="a finished run, scored after its last task")
    parser.add_argument("--state", choices=GOALS, action="append", help="all by default")
    parser.add_argument("--baseline", choices=BASELINES, action="append", help="all that the model has by default")
    parser.add_argument("--rows", type=int, default=200, help="of each task")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--no-peaks", action="store_true", help="leave peak memory out, which takes longer than a pair")
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop
    report = Report()
    print(table([]), flush=True)
    try:
        # The profiler leaves the process with more memory in hand, and so without the page faults of one that only
        # scores, a tenth of the baseline's time: peaks come after all times.
        peaks: list[Callable[[], None]] = []
        for name, state, make, workload in states(options):
            peaks += measure(report, name, state, make(), workload, options)
        for state_peaks in peaks:
            state_peaks()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        arguments = {key: str(value) for key, value in vars(options).items() if key != "json"}
        write_json(options.json, report.ratios, report.stated, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
