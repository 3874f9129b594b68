"""A user's own files: JSON arrays, JSON lines and CSV, read with `datasets` from a temporary cache."""

import csv
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.rows import NOT_JSON, NOT_UTF8, Fault, parse_array, read_content

SUFFIXES = (".json", ".jsonl", ".csv")


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read, a trailing .gz aside. Raises UserError for any other."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path}: cannot tell the format; name the file .json, .jsonl or .csv (.gz may follow)"
        )
    return suffix


def read_custom(path: Path) -> tuple[list[Any], list[Fault]]:
    """The records of a user's file as dicts, and the faults of its form.

    A broken line of a JSON-lines file is one bad row: its record is empty and its fault is returned. Any
    other fault of form is fatal and leaves no records. Every value of a CSV file is a string.
    """
    kind = file_kind(path)
    content = read_content(path)
    if not content.strip():
        return [], [Fault(None, NOT_JSON, "is empty", fatal=True)]
    if kind == ".csv":
        return _read_csv(content)
    if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_array(content)
    return _read_lines(content)


def _read_array(content: bytes) -> tuple[list[Any], list[Fault]]:
    records, faults = parse_array(content)
    if faults:
        return [], faults
    # A row that is no object, or whose text is not UTF-8, would fail the whole file inside `datasets`,
    # unnamed. Such rows are checked as they were parsed, the others as `datasets` gives them.
    whole = [isinstance(record, dict) and _is_text(record) for record in records]
    lines = [
        json.dumps(record, ensure_ascii=False) if ok else "{}"
        for record, ok in zip(records, whole, strict=True)
    ]
    loaded, faults = _load_lines(lines)
    return [new if ok else old for new, old, ok in zip(loaded, records, whole, strict=False)], faults


def _is_text(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(content: bytes) -> tuple[list[Any], list[Fault]]:
    lines: list[str] = []
    faults: list[Fault] = []
    for raw in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not raw.strip():
            continue
        fault = _line_fault(len(lines), raw)
        if fault is not None:
            faults.append(fault)
        lines.append("{}" if fault is not None else raw.decode("utf-8").strip())
    records, unreadable = _load_lines(lines)
    return records, faults + unreadable


def _line_fault(number: int, raw: bytes) -> Fault | None:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(number, NOT_UTF8, f"byte {error.start} of the line is not UTF-8")
    except json.JSONDecodeError as error:
        return Fault(number, NOT_JSON, f"not JSON ({error.msg}, column {error.colno})")
    return None if isinstance(value, dict) else Fault(number, NOT_JSON, "the line is not a JSON object")


def _load_lines(lines: list[str]) -> tuple[list[Any], list[Fault]]:
    with _quiet_datasets() as folder:
        from datasets import Dataset

        source = Path(folder, "rows.jsonl")
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return _records(lambda: Dataset.from_json(str(source), cache_dir=folder, keep_in_memory=True))


def _read_csv(content: bytes) -> tuple[list[Any], list[Fault]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", errors="replace")
        row = max(sum(1 for _ in csv.reader(io.StringIO(before))) - 2, 0)
        return [], [Fault(row, NOT_UTF8, f"byte {error.start} of the file is not UTF-8", fatal=True)]
    header = next(csv.reader(io.StringIO(text)))
    with _quiet_datasets() as folder:
        from datasets import Dataset, Features, Value

        source = Path(folder, "rows.csv")
        source.write_text(text, encoding="utf-8", newline="")
        # All columns as strings, and no value taken for "missing": else a label True becomes a boolean, 1 a
        # number, and the texts "NA" and "None" vanish.
        features = Features({name: Value("string") for name in header})
        return _records(
            lambda: Dataset.from_csv(
                str(source), features=features, cache_dir=folder, keep_in_memory=True,
                na_filter=False, keep_default_na=False,
            )
        )  # fmt: skip


def _records(load: Any) -> tuple[list[Any], list[Fault]]:
    from datasets.exceptions import DatasetGenerationError

    try:
        return load().to_list(), []
    except (DatasetGenerationError, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        return [], [Fault(None, NOT_JSON, f"cannot be read as rows ({str(cause).strip()})", fatal=True)]


@contextmanager
def _quiet_datasets() -> Iterator[str]:
    """A temporary folder for the cache; meanwhile `datasets` draws no bars and logs no faults of its own."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
            yield folder
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
