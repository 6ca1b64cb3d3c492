"""DeepSpeed on a processor, with what it compiles kept inside the tests' own folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compiled_extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's own cache may hold the lock of a compilation that was cut off, for which PyTorch waits without end."""
    return tmp_path_factory.mktemp("torch_extensions")


@pytest.fixture
def deepspeed_on_cpu(compiled_extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this test and the processes it starts."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled_extensions))
