"""Tasks and their rows: what a run reads, checked, with fingerprints."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.custom import read_custom
from data_prep.errors import UserError
from data_prep.rows import (
    Fault,
    Row,
    check_records,
    describe_faults,
    duplicate_faults,
    parse_array,
    read_content,
)
from data_prep.sources import CustomTask, DataSettings, InFolder, Source, Task, describe_task, find_sources
from data_prep.subsets import balanced_subset, carve_validation

__all__ = ["CustomTask", "DataSettings", "Row", "Task", "TaskData", "load_tasks"]

# Labels outside the set that the published test files hold; nothing can match them, and scores count them.
KNOWN_UNMATCHABLE = {"MNLI": "-"}


@dataclass(frozen=True)
class TaskData:
    """A task and the rows a run trains and scores on.

    `evaluation` is the test split, or the validation rows. `fingerprints` has a SHA-256 each for "train" and
    "evaluation". `dropped` counts the bad rows left out: split -> reason -> count. `unmatchable` counts the
    evaluation rows that are kept though no prediction can match their label.
    """

    task: Task
    train: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    fingerprints: Mapping[str, str] = field(hash=False)
    dropped: Mapping[str, Mapping[str, int]] = field(hash=False)
    unmatchable: int


def load_tasks(data: DataSettings, names: Sequence[str], *, split: str, seed: int) -> list[TaskData]:
    """Read, check and cut down the named tasks, in their order.

    `split` is "test" or "validation". Raises one UserError with the faults of all tasks: unknown names,
    missing files, bad rows (with data.bad_rows "drop": files that cannot be read, splits left empty).
    """
    if split not in ("test", "validation"):
        raise UserError(f'evaluation.split: "{split}" is neither test nor validation; choose one of them')
    loaded = []
    problems = []
    for name, source in zip(names, find_sources(data, names), strict=True):
        try:
            if isinstance(source, UserError):
                raise source
            loaded.append(_load_task(describe_task(name, source), source, data, split=split, seed=seed))
        except UserError as error:
            problems.append(str(error))
    if problems:
        if data.bad_rows == "refuse" and any("bad row" in problem for problem in problems):
            problems.append("mend the files, or set data.bad_rows=drop: bad rows are then left out and counted")
        raise UserError("\n".join(dict.fromkeys(problems)))
    return loaded


class _Reader:
    """Reads a task's splits and gathers their faults; with "drop", bad rows are counted and left out."""

    def __init__(self, task: Task, source: Source, *, drop: bool) -> None:
        self.task = task
        self.source = source
        self.drop = drop
        self.rows: dict[str, list[Row]] = {}
        self.totals: dict[str, int] = {}
        self.faults: dict[str, list[Fault]] = {}

    def read(self, split: str) -> list[Row]:
        """The good rows of a split; its faults are kept for `finish`."""
        path = self.task.files[split]
        if isinstance(self.source, InFolder):
            records, faults = parse_array(read_content(path))
            keys = ("sentence", "label")
        else:
            keys = (self.source.text_key, self.source.label_key)
            records, faults = read_custom(path, text_key=keys[0], label_key=keys[1])
        rows, bad = check_records(
            records,
            labels=self.task.labels,
            text_key=keys[0],
            label_key=keys[1],
            unmatchable=None if split == "train" else KNOWN_UNMATCHABLE.get(self.task.name),
            already_bad=[fault.row for fault in faults if fault.row is not None],
        )
        self.rows[split], self.totals[split], self.faults[split] = rows, len(records), faults + bad
        return rows

    def part_train(self) -> None:
        """Take rows that stand in another split out of train: test rows are what scores compare on."""
        others = {self.task.files[split].name: rows for split, rows in self.rows.items() if split != "train"}
        faults = duplicate_faults(self.rows["train"], others)
        gone = {fault.row for fault in faults}
        self.rows["train"] = [row for row in self.rows["train"] if row.id not in gone]
        self.faults["train"] += faults

    def finish(self) -> dict[str, dict[str, int]]:
        """Counts of what was dropped; raises UserError where that is not wanted, or leaves nothing."""
        problems = []
        for split, faults in self.faults.items():
            path = self.task.files[split]
            if any(fault.fatal for fault in faults) or (faults and not self.drop):
                problems.append(describe_faults(path, faults, self.totals[split], self.task.labels))
            elif not self.rows[split]:
                of = f" of {self.totals[split]} left" if self.totals[split] else ""
                problems.append(f"{path}: no row{of}; a split needs at least one good row")
        if problems:
            raise UserError("\n".join(problems))
        return {
            split: dict(Counter(fault.reason for fault in faults)) for split, faults in self.faults.items() if faults
        }


def _load_task(task: Task, source: Source, data: DataSettings, *, split: str, seed: int) -> TaskData:
    for needed in ("train", "test") if split == "test" else ("train",):
        if needed not in task.files:
            place = source.folder if isinstance(source, InFolder) else task.name
            raise UserError(
                f"{place}: no {needed}.json or {needed}.json.gz; put the file there, make the task with "
                f"`python -m data_prep hub --out DIR --tasks {task.name}`, or leave it out of the order"
            )
    reader = _Reader(task, source, drop=data.bad_rows == "drop")
    reader.read("train")
    if "test" in task.files:
        reader.read("test")
    use_dev = split == "validation" and _dev_is_apart(reader)
    reader.part_train()
    dropped = reader.finish()
    train, evaluation = tuple(reader.rows["train"]), tuple(reader.rows.get("test", ()))
    if use_dev:
        evaluation = tuple(reader.rows["dev"])
    elif split == "validation":
        train, evaluation = carve_validation(train, task=task.name)
    train = balanced_subset(train, task.labels, data.max_train_rows, seed=seed, task=task.name, purpose="train")
    evaluation = balanced_subset(
        evaluation, task.labels, data.max_test_rows, seed=seed, task=task.name, purpose="evaluation"
    )
    if not train or not evaluation:
        raise UserError(f"{task.files['train']}: too few rows to set some apart for validation; add rows or a dev")
    return TaskData(
        task=task,
        train=train,
        evaluation=evaluation,
        fingerprints={"train": _fingerprint(task, train), "evaluation": _fingerprint(task, evaluation)},
        dropped=dropped,
        unmatchable=sum(row.label not in task.labels for row in evaluation),
    )


def _dev_is_apart(reader: _Reader) -> bool:
    """Read dev if there is one that is not test over again; whether it shares no sentence with test.

    Without a test file this cannot be known (the published dev files are the test files): then it is not.
    """
    files = reader.task.files
    if "dev" not in files or "test" not in files or read_content(files["dev"]) == read_content(files["test"]):
        return False
    dev = reader.read("dev")
    if not duplicate_faults(dev, {"test": reader.rows["test"]}):
        return True
    for gathered in (reader.rows, reader.totals, reader.faults):
        del gathered["dev"]
    return False


def _fingerprint(task: Task, rows: Sequence[Row]) -> str:
    """SHA-256 over what decides the prompts and targets of these rows, in order, however they are stored."""
    digest = hashlib.sha256()
    digest.update(json.dumps([task.labels, task.instruction, task.show_options]).encode())
    for row in rows:
        digest.update(b"\n" + json.dumps([row.id, row.sentence, row.label]).encode())
    return digest.hexdigest()
