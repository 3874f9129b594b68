"""Tasks without their rows: found in the CL_Benchmark folder or in the recipe's own list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from data_prep.errors import UserError
from data_prep.folder import (
    WITHOUT_INSTRUCTION,
    BenchmarkFolder,
    family_instruction,
    open_folder,
    read_labels,
    split_files,
    with_newline,
)
from data_prep.labels import check_labels
from data_prep.orders import near_name
from data_prep.task_names import task_name_fault


class CustomTask(Protocol):
    """A user's own task, as the recipe gives it under data.tasks.<name>."""

    @property
    def family(self) -> str:
        """The prompt's family."""

    @property
    def labels(self) -> Sequence[str]:
        """The options, in order."""

    @property
    def instruction(self) -> str | None:
        """None: the family's, if it has one."""

    @property
    def train(self) -> str:
        """Path of the training rows."""

    @property
    def test(self) -> str:
        """Path of the test rows."""

    @property
    def dev(self) -> str | None:
        """Path of validation rows of its own."""

    @property
    def text_key(self) -> str:
        """The key or column of the text."""

    @property
    def label_key(self) -> str:
        """The key or column of the label."""


class DataSettings(Protocol):
    """What loading needs of the recipe's `data` group."""

    @property
    def path(self) -> str | None:
        """The benchmark's folder, or "synthetic"; None: there are only the user's own tasks."""

    @property
    def max_train_rows(self) -> int | None:
        """Size of the balanced subset to train on; None: all."""

    @property
    def max_test_rows(self) -> int | None:
        """Size of the balanced subset to score on; None: all."""

    @property
    def bad_rows(self) -> Literal["refuse", "drop"]:
        """Whether bad rows stop the run."""

    @property
    def tasks(self) -> Mapping[str, CustomTask]:
        """The user's own tasks, by name."""


@dataclass(frozen=True)
class Task:
    """One task.

    `labels` in option order; `instruction` empty or ending in a newline; `show_options` whether the prompt
    has an option line; `files` the split files that exist, under "train", "dev" and "test".
    """

    name: str
    family: str
    labels: tuple[str, ...]
    instruction: str
    show_options: bool
    files: Mapping[str, Path] = field(hash=False)


@dataclass(frozen=True)
class InFolder:
    """A task's own folder, and the instructions beside the benchmark it lies in."""

    folder: Path
    config_file: Path


Source = InFolder | CustomTask


def find_sources(data: DataSettings, names: Sequence[str]) -> list[Source | UserError]:
    """Where each named task comes from; an error in the place of a name that is unknown or ambiguous."""
    folder = None if all(name in data.tasks for name in names) else open_folder(_data_path(data))
    return [_find_source(name, data, folder) for name in names]


def _data_path(data: DataSettings) -> Path:
    if data.path is None:
        raise UserError("data.path: missing; name the benchmark's folder, or put all tasks under data.tasks")
    if data.path != "synthetic":
        return Path(data.path)
    # Imported here because it writes files on first use, for which other runs have no need.
    from data_prep.synthetic import ensure_folder

    return ensure_folder()


def _find_source(name: str, data: DataSettings, folder: BenchmarkFolder | None) -> Source | UserError:
    in_folder = folder.tasks.get(name, ()) if folder is not None else ()
    fault = task_name_fault(name)
    if name in data.tasks:
        if fault:
            return UserError(f"data.tasks: {fault}")
        if in_folder:
            return UserError(f"data.tasks.{name}: {in_folder[0]} has that name; give your task another")
        return data.tasks[name]
    assert folder is not None
    if len(in_folder) > 1:
        places = ", ".join(str(place) for place in in_folder)
        return UserError(f'task "{name}" is in more than one family: {places}; keep one of them')
    if not in_folder:
        known = sorted([*folder.tasks, *data.tasks])
        return UserError(
            f'no task "{name}" in {folder.root}; there are: {", ".join(known)}; '
            f"a task of your own stands under data.tasks{near_name(name, known)}"
        )
    if fault:
        return UserError(f"{in_folder[0]}: {fault}")
    return InFolder(in_folder[0], folder.config_file)


def describe_task(name: str, source: Source) -> Task:
    """The task that a source describes. Raises UserError for labels, instruction or files that are wrong."""
    if isinstance(source, InFolder):
        family = source.folder.parent.name
        instruction = family_instruction(family, source.config_file)
        if instruction is None and family != WITHOUT_INSTRUCTION:
            raise UserError(
                f'{source.config_file}: no instruction for the family "{family}", and none is bundled; add '
                f'{{"{family}": [{{"instruction_type": "zero-shot", "instruction": "..."}}]}}'
            )
        labels = read_labels(source.folder)
        return Task(name, family, labels, instruction or "", instruction is not None, split_files(source.folder))
    place = f"data.tasks.{name}"
    files = {"train": Path(source.train), "test": Path(source.test)}
    if source.dev is not None:
        files["dev"] = Path(source.dev)
    for split, path in files.items():
        if not path.is_file():
            raise UserError(f"{place}.{split}: no file {path}; mend the path (.json, .jsonl or .csv)")
    instruction = source.instruction
    if instruction is None:
        instruction = family_instruction(source.family, None)
    labels = check_labels(list(source.labels), place=f"{place}.labels")
    show = instruction is not None or source.family != WITHOUT_INSTRUCTION
    return Task(name, source.family, labels, with_newline(instruction or ""), show, files)
