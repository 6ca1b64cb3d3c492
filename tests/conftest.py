"""Shared fixtures: a tiny randomly initialised model with a real tokenizer; the place of optional data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))  # "default" draws new examples

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def denormals_as_python_expects() -> Iterator[None]:
    """``models.load`` flushes denormals for this whole process; hypothesis refuses to draw floats while that is on."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with benchmark data that is not part of the project; the test is skipped where it is absent."""
    folder = Path(os.environ.get("TRIMTAB_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"benchmark data not found: {folder} (set TRIMTAB_TEST_DATA)")
    return folder


@pytest.fixture
def tiny():  # type: ignore[no-untyped-def]
    """A two-layer Llama with random weights and a word-level chat tokenizer; a fresh one for each test."""
    from tests.tiny import tiny_model

    return tiny_model()
