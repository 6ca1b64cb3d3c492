"""Messages of libraries that a user of trimtab can do nothing about, and that would stand above every result.

Covered: deprecations inside libraries, an optional kernel of bitsandbytes, DeepSpeed's guess of the device (which goes
to standard output). Not covered: everything else that they say. `PYTHONWARNINGS` or `python -W` bring warnings back.
"""

from __future__ import annotations

import logging
import sys
import warnings

LIBRARIES = "accelerate|peft|torch|transformers|trl"
UNACTIONABLE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # imported with Transformers where it is
    "DeepSpeed": "Setting accelerator to CPU",  # imported with Accelerate where it is
}


def quieten() -> None:
    """Once, before anything heavy is imported."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"({LIBRARIES})\.")
    for name, message in UNACTIONABLE.items():
        logging.getLogger(name).addFilter(_Without(message))


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record but those with this message."""
        return not record.getMessage().startswith(self.beginning)
