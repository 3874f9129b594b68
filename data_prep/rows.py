"""Rows of a task's files: reading the benchmark's JSON arrays, checking every row, naming each fault."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.orders import near_name

MAX_FAULTS_SHOWN = 10
_SPACE = re.compile(r"[ \t\r\n]*")

# Reasons for which a row is bad; the report counts dropped rows under these words.
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_AN_OBJECT = "not an object"
FIELDS = "wrong number of fields"
MISSING_KEY = "missing key"
NOT_A_STRING = "not a string"
EMPTY_TEXT = "empty text"
LABEL_OUTSIDE = "label outside the set"
DUPLICATE = "duplicate across splits"


@dataclass(frozen=True)
class Row:
    """One example. `id` is its position in its file, counted from 0, before anything was dropped."""

    id: int
    sentence: str
    label: str


@dataclass(frozen=True)
class Fault:
    """One bad row, or (`fatal`) a file that cannot be read from that row on; `row` None: none was reached."""

    row: int | None
    reason: str
    detail: str
    fatal: bool = False


def read_content(path: Path) -> bytes:
    """The file's bytes, unpacked where its name ends in .gz. Raises UserError where that is not possible."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend path or permissions") from error


def parse_array(content: bytes) -> tuple[list[Any], list[Fault]]:
    """The elements of a JSON array; a fatal fault, with the row it lies in, where the content is none.

    Bytes that are not UTF-8 come through as lone surrogates, which `check_records` finds: so the row can be
    named, and dropped, though the file as a whole cannot be decoded.
    """
    text = content.decode("utf-8-sig", errors="surrogateescape")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{error.msg}, line {error.lineno} column {error.colno}"
        return [], [Fault(_whole_rows(text), NOT_JSON, f"not JSON ({place})", fatal=True)]
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        return [], [Fault(_whole_rows(text), NOT_JSON, f"not JSON that can be read ({error})", fatal=True)]
    if not isinstance(records, list):
        kind = type(records).__name__
        return [], [Fault(None, NOT_JSON, f"a JSON {kind}, not an array of rows", fatal=True)]
    return records, []


def _whole_rows(text: str) -> int | None:
    """How many whole elements stand before the fault in a broken JSON array; None where no array begins."""
    decoder = json.JSONDecoder()
    position = _after_space(text, 0)
    if not text.startswith("[", position):
        return None
    rows = 0
    while True:
        try:
            _, position = decoder.raw_decode(text, _after_space(text, position + 1))
        except (ValueError, RecursionError):
            return rows
        rows += 1
        position = _after_space(text, position)
        if not text.startswith(",", position):
            return rows


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None  # the pattern matches the empty string
    return found.end()


def check_records(
    records: Sequence[Any],
    *,
    labels: Sequence[str],
    text_key: str = "sentence",
    label_key: str = "label",
    unmatchable: str | None = None,
    already_bad: Iterable[int] = (),
) -> tuple[list[Row], list[Fault]]:
    """The good rows, and one fault (the first found) for every other.

    `unmatchable` is a label outside the set that is known and kept; rows in `already_bad` are passed over.
    """
    legal = {*labels} | ({unmatchable} if unmatchable is not None else set())
    skipped = frozenset(already_bad)
    rows: list[Row] = []
    faults: list[Fault] = []
    for number, record in enumerate(records):
        if number in skipped:
            continue
        fault = _fault_of(number, record, legal, labels, text_key, label_key)
        if fault is None:
            rows.append(Row(number, record[text_key], record[label_key]))
        else:
            faults.append(fault)
    return rows, faults


def _fault_of(
    number: int, record: Any, legal: set[str], labels: Sequence[str], text_key: str, label_key: str
) -> Fault | None:
    if not isinstance(record, dict):
        return Fault(number, NOT_AN_OBJECT, f"a {type(record).__name__}, not an object with {text_key}, {label_key}")
    for key in (text_key, label_key):
        value = record.get(key)
        if value is None:
            has = ", ".join(sorted(k for k, v in record.items() if v is not None))
            return Fault(number, MISSING_KEY, f'no "{key}" (it has: {has or "nothing"})')
        if not isinstance(value, str):
            return Fault(number, NOT_A_STRING, f'"{key}" is {value!r:.60}, not a string')
        if not is_text(value):
            return Fault(number, NOT_UTF8, f'"{key}" is not UTF-8 text')
    if not record[text_key].strip():
        return Fault(number, EMPTY_TEXT, f'"{text_key}" is empty')
    label = record[label_key]
    if label not in legal:
        detail = f'label "{label:.60}" is outside the set{near_name(label, labels)}'
        return Fault(number, LABEL_OUTSIDE, detail)
    return None


def is_text(value: Any) -> bool:
    """Whether `value` is a string that UTF-8 can hold: no lone surrogates, as undecodable bytes leave."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def duplicate_faults(rows: Sequence[Row], others: Mapping[str, Sequence[Row]]) -> list[Fault]:
    """A fault for each of `rows` whose sentence, to the byte, stands in another split (file name -> rows)."""
    first: dict[str, str] = {}
    for file_name, other_rows in others.items():
        for row in other_rows:
            first.setdefault(row.sentence, f"row {row.id} of {file_name}")
    return [
        Fault(row.id, DUPLICATE, f"same sentence as {first[row.sentence]}") for row in rows if row.sentence in first
    ]


def describe_faults(path: Path, faults: Sequence[Fault], total: int, labels: Sequence[str]) -> str:
    """All faults of one file in one paragraph: the first ten by row, a count of the others, legal labels."""
    ordered = sorted(faults, key=lambda fault: -1 if fault.row is None else fault.row)
    if len(ordered) == 1 and ordered[0].row is None:
        return f"{path}: {ordered[0].detail}"
    of = "" if any(fault.fatal for fault in faults) else f" of {total}"
    lines = [f"{path}: {len(faults)} bad row{'s' * (len(faults) > 1)}{of} (rows are counted from 0)"]
    for fault in ordered[:MAX_FAULTS_SHOWN]:
        lines.append(f"  {'the file' if fault.row is None else f'row {fault.row}'}: {fault.detail}")
    if len(ordered) > MAX_FAULTS_SHOWN:
        counts = Counter(fault.reason for fault in ordered[MAX_FAULTS_SHOWN:])
        rest = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        lines.append(f"  and {len(ordered) - MAX_FAULTS_SHOWN} more: {rest}")
    if any(fault.reason == LABEL_OUTSIDE for fault in faults):
        lines.append("  legal labels: " + ", ".join(f'"{label}"' for label in labels))
    return "\n".join(lines)
