"""What inspect finds by its entry point: the provider ``trimtab/...`` and the tasks ``trimtab/safety`` and so on.

Covered: imports for their side effect of registering. Not covered: anything else.
"""

from __future__ import annotations

from trimtab.evaluation.provider import register
from trimtab.evaluation.tasks import accuracy, over_refusal, perplexity, safety

__all__ = ["accuracy", "over_refusal", "perplexity", "register", "safety"]
