"""The plain-text table that a run ends with."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.results import SCORES

NOT_MEASURED = "-"

PERPLEXITY = """\
Texts outside the stream. Perplexity: exp of the mean of -log p over their tokens, lower is better. A decoder-only model
predicts each token of a piece after those before it; T5 the last 3 of each 20 tokens, hidden behind sentinels as in its
pretraining. Other measures are lm-evaluation-harness's, as it defines them."""


def format_summary(results: Mapping[str, Any]) -> str:
    """The matrices, AA and BWT of `results`, the content of results.json; without a final newline."""
    order = results["order"]
    parts = [f"{results['method']}, seed {results['seed']}, {len(order)} tasks"]
    for score in SCORES:
        matrix = results["matrix"][score]
        if any(value is not None for row in [*matrix, results["untrained"][score]] for value in row):
            scalars = results if score == "exact_match" else results["label_scoring"]
            parts.append(_table(score_title(score), order, results["untrained"][score], matrix))
            parts.append(
                f"average accuracy (AA) {number(scalars['average_accuracy'])}   "
                f"backward transfer (BWT) {number(scalars['backward_transfer'])}"
            )
    return "\n".join(parts)


def score_title(score: str) -> str:
    """The name of a score for a reader."""
    return score.replace("_", " ").capitalize() + ", %"


def number(value: float | None, digits: int = 2) -> str:
    """A value for a reader."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """A value of any size for a reader: fractions beside perplexities."""
    return NOT_MEASURED if value is None else f"{value:.4g}"


def _table(
    title: str,
    order: Sequence[str],
    untrained: Sequence[float | None],
    matrix: Sequence[Sequence[float | None]],
) -> str:
    """Rows: after which task; columns: on which task."""
    stages = ["untrained", *order]
    rows = [[title, *order]]
    rows += [
        [
            f"  after {after}" if after != "untrained" else "  untrained",
            *(number(value, 1) for value in values),
        ]
        for after, values in zip(stages, [untrained, *matrix], strict=True)
    ]
    first = max(len(row[0]) for row in rows)
    width = max(len("100.0"), *(len(task) for task in order))
    return "\n".join(row[0].ljust(first) + "".join("  " + cell.rjust(width) for cell in row[1:]) for row in rows)
