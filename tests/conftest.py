"""Shared fixtures: the checkout on the import path, and outside data that a test may need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Tests run on the CPU, wherever they run; those of tests/gpu give what was here to the commands that they start.
DEVICES = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable) or ROOT / default)
    if not path.is_dir():
        pytest.skip(f"{variable} not set and {default} absent: this test reads real data or weights")
    return path


@pytest.fixture(scope="session")
def benchmark_dir() -> Path:
    """The real CL_Benchmark files."""
    return _folder("CL_BENCHMARK_DIR", "../shared/cl_benchmark")


@pytest.fixture(scope="session")
def mini_dir() -> Path:
    """The small 15-task benchmark."""
    return _folder("CL_BENCHMARK_MINI_DIR", "../shared/cl_benchmark_mini")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of mini backbones and tokenizers."""
    return _folder("CL_MODEL_DIR", "../shared/models")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random backbones of both families, by family."""
    from random_backbones import save_backbone  # not at the top: transformers takes seconds to load

    root = tmp_path_factory.mktemp("backbones")
    return {family: save_backbone(root / family, family) for family in ("t5", "llama2")}


def _gpus() -> int:
    found = shutil.which("nvidia-smi")
    return subprocess.run([found, "-L"], capture_output=True, text=True).stdout.count("GPU ") if found else 0


@pytest.fixture(scope="session")
def gpu_environment() -> dict[str, str]:
    """The environment of a command that may see this machine's GPUs."""
    if not _gpus():
        pytest.skip("no NVIDIA GPU on this machine (nvidia-smi lists none)")
    given = {name: value for name, value in DEVICES.items() if value is not None}
    return {name: value for name, value in os.environ.items() if name not in DEVICES} | given


@pytest.fixture(scope="session")
def two_gpus(gpu_environment: dict[str, str]) -> dict[str, str]:
    """The same, of a machine with more than one."""
    if _gpus() < 2:
        pytest.skip("one NVIDIA GPU on this machine: two ranks need two")
    return gpu_environment
