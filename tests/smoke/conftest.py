"""One finished run that the tests of the user's commands compare with."""

from pathlib import Path

import pytest
from commands import launch, run, small


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small run to the end, by the user's own command on one rank, from another folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    done = run(launch(1, "recipes/tiny_t5_order1.yaml", *small("output.dir=run")), cwd=folder, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "BWT" in done.stdout + done.stderr
    return folder / "run"
