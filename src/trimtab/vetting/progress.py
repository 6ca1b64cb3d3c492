"""What an interrupted hardening has done already, in a folder of its own beside the adapter to be.

Covered: keeping and reading back plain values and tensors, one file a name, each moved into place when it is whole;
refusing what belongs to other settings. Files are read by PyTorch's restricted loader, which runs no code of theirs.
Not covered: what is kept and when (``distill.py``).
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import UsageError
from trimtab.vetting.held import differences

FOLDER = "progress"


class Progress:
    """Kept values of one run.

    Args:
        out: where the adapter will be.
        settings: what the run is; a folder with other settings is refused.

    Raises:
        UsageError: where ``out`` holds an interrupted run with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        known = self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if known.is_file():
            _same(json.loads(known.read_text()), wanted, out)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = known.with_suffix(".partial")
        partial.write_text(json.dumps(wanted, indent=1))
        partial.replace(known)

    def keep(self, name: str, value: Any) -> None:
        """Numbers, texts, tensors, and lists, tuples and dictionaries of them."""
        path = self.folder / f"{name}.pt"
        partial = path.with_suffix(".partial")
        torch.save(value, partial)
        partial.replace(path)

    def kept(self, name: str) -> Any | None:
        """What was kept under that name, or None.

        Raises:
            UsageError: for a file that the restricted loader does not read.
        """
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            fix = f"remove {self.folder}: the run then begins anew"
            raise UsageError("the progress of an interrupted run cannot be read", seen=path, fix=fix) from error

    def remove(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _same(known: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    if seen := differences(known, wanted):
        fix = f"repeat the settings that are there, name another --out, or remove {out / FOLDER}"
        raise UsageError("that folder holds an interrupted run with other settings", seen=seen, fix=fix)
