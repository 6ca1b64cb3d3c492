"""What inspect finds by its entry point: the provider ``trimtab/...`` and the tasks ``trimtab/safety`` and so on.

Covered: imports for their side effect of registering. Not covered: anything else.
"""

from __future__ import annotations

from trimtab.evaluation.provider import register
from trimtab.evaluation.structured import (
    structeval,
    structeval_t_conv,
    structeval_t_gen,
    structeval_v_conv,
    structeval_v_gen,
)
from trimtab.evaluation.tasks import accuracy, jailbreak, over_refusal, perplexity, safety

__all__ = [
    "accuracy",
    "jailbreak",
    "over_refusal",
    "perplexity",
    "register",
    "safety",
    "structeval",
    "structeval_t_conv",
    "structeval_t_gen",
    "structeval_v_conv",
    "structeval_v_gen",
]
