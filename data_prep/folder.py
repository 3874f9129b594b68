"""The CL_Benchmark folder: where its tasks lie, their labels and the instructions of their families."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.labels import check_labels
from data_prep.rows import read_content

SPLITS = ("train", "dev", "test")
BUNDLED_INSTRUCTIONS = Path(__file__).with_name("instructions.json")
# Published runs give this family neither an instruction nor an option line: its sentences hold both.
WITHOUT_INSTRUCTION = "COPA"


@dataclass(frozen=True)
class BenchmarkFolder:
    """`root` holds <family>/<task>; `tasks` maps a task's name to its folders (more than one: ambiguous)."""

    root: Path
    config_file: Path
    tasks: Mapping[str, tuple[Path, ...]]


def open_folder(path: Path) -> BenchmarkFolder:
    """Find the tasks under `path`, which holds CL_Benchmark/ and configs/ or is CL_Benchmark itself.

    Raises UserError where there is no such folder or no task in it.
    """
    place = f"data.path: {path}"
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{place} {what}; name the folder that holds CL_Benchmark/, or CL_Benchmark itself")
    root = path / "CL_Benchmark" if (path / "CL_Benchmark").is_dir() else path
    tasks: dict[str, tuple[Path, ...]] = {}
    for folder in sorted(root.glob("*/*/")):
        if (folder / "labels.json").exists() or split_files(folder):
            tasks[folder.name] = (*tasks.get(folder.name, ()), folder)
    if not tasks:
        raise UserError(
            f"{place} holds no task: {root}/<family>/<task>/ with labels.json, train.json and test.json "
            "(or .json.gz) was looked for; `python -m data_prep hub --out DIR` makes such a folder"
        )
    return BenchmarkFolder(root, root.parent / "configs" / "instruction_config.json", tasks)


def split_files(folder: Path) -> dict[str, Path]:
    """The split files that exist in a task's folder; of a plain and a packed one, the plain."""
    found = {}
    for split in SPLITS:
        for name in (f"{split}.json", f"{split}.json.gz"):
            if (folder / name).is_file():
                found[split] = folder / name
                break
    return found


def read_labels(folder: Path) -> tuple[str, ...]:
    """The labels of a task's labels.json, in option order. Raises UserError where it is missing or wrong."""
    path = folder / "labels.json"
    if not path.is_file():
        raise UserError(
            f'{path}: missing; write the labels there in option order, a JSON array such as ["Good", "Bad"]'
        )
    return check_labels(_read_json(path), place=str(path))


def family_instruction(family: str, config_file: Path | None) -> str | None:
    """The family's instruction, ending in a newline: the folder's own, else the bundled one, else None."""
    own = _config_instructions(config_file) if config_file is not None and config_file.is_file() else {}
    bundled: dict[str, str] = json.loads(BUNDLED_INSTRUCTIONS.read_text(encoding="utf-8"))["families"]
    text = own.get(family) or bundled.get(family)
    return None if text is None else with_newline(text)


def with_newline(instruction: str) -> str:
    """The instruction with a newline at its end, unless it is empty or has one."""
    return instruction if not instruction or instruction.endswith("\n") else instruction + "\n"


def _config_instructions(path: Path) -> dict[str, str]:
    """Family -> instruction of an instruction_config.json: the first entry of each family's list."""
    config = _read_json(path)
    shape = '{"FAMILY": [{"instruction_type": "zero-shot", "instruction": "..."}]}'
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON {type(config).__name__}; write {shape}")
    instructions = {}
    for family, entries in config.items():
        entry = entries[0] if isinstance(entries, list) and entries else None
        text = entry.get("instruction") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: {family}: no instruction text; write {shape}")
        instructions[family] = text
    return instructions


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_content(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); mend the file") from error
