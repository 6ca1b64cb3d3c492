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
from trimtab.evaluation.utility import choice_of_file, rouge_of_file

__all__ = [
    "accuracy",
    "choice_of_file",
    "jailbreak",
    "over_refusal",
    "perplexity",
    "register",
    "rouge_of_file",
    "safety",
    "structeval",
    "structeval_t_conv",
    "structeval_t_gen",
    "structeval_v_conv",
    "structeval_v_gen",
]
