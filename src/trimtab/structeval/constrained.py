"""Constrained decoding: only tokens with which the answer can still become a document of its format are allowed.

So that "how much of the failure is syntax" can be answered: generate once with and once without, and compare. The
token masks are llguidance's, the grammars those of ``grammars.py``; for models behind a server a JSON schema goes with
the request, and the server (vLLM, SGLang, OpenAI) constrains.

Covered: JSON, Vega, YAML, TOML, XML, CSV in memory; JSON served. Not covered: formats that are drawn; an answer that
the length limit cuts, which is still no document.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from trimtab.errors import UsageError
from trimtab.generation import Generation, ended
from trimtab.models import LoadedModel
from trimtab.structeval import grammars
from trimtab.structeval.tasks import Task

INSTALL = "pip install 'trimtab[structeval-constrained]'"


def require(tasks: Sequence[Task], *, in_memory: bool) -> None:
    """Raise UsageError unless all tasks can be constrained and, for a model in memory, llguidance is there."""
    asked = [task.output_format for task in tasks]
    if others := grammars.unconstrained(asked):
        fix = f"choose tasks with --format {' --format '.join(grammars.FORMATS)}"
        raise UsageError("there is no grammar for a format", seen=f"tasks for {', '.join(others)}", fix=fix)
    if not in_memory and set(asked) != {"json"}:
        fix = "choose the JSON tasks with --format json"
        raise UsageError("a server constrains JSON only", seen=f"tasks for {', '.join(sorted(set(asked)))}", fix=fix)
    if in_memory and importlib.util.find_spec("llguidance") is None:
        raise UsageError("llguidance is not installed", fix=INSTALL)


def response_schema() -> Any:
    """For a server, through inspect: any JSON object (servers take no schema that is not an object)."""
    from inspect_ai.model import ResponseSchema
    from inspect_ai.util import JSONSchema

    return ResponseSchema(name="document", json_schema=JSONSchema(type="object"))


class Held:
    """A logits processor of Transformers for one batch; ``rows``: each row's grammar."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[str]) -> None:
        import llguidance.hf
        import llguidance.torch
        from llguidance import LLMatcher

        self._torch = llguidance.torch
        vocabulary = int(loaded.model.get_output_embeddings().weight.shape[0])
        ends = loaded.model.generation_config.eos_token_id
        try:
            tokenizer = llguidance.hf.from_tokenizer(loaded.tokenizer, n_vocab=vocabulary, eos_token=ends)
        except ValueError as error:
            fix = "generate without --constrain"
            raise UsageError("this model's tokenizer cannot be constrained", seen=error, fix=fix) from error
        self._matchers = [LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text)) for text in rows]
        self._mask = llguidance.torch.allocate_token_bitmask(len(rows), vocabulary)  # rows x vocabulary / 32
        self._read: int | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``input_ids``: rows x tokens so far; ``scores``: rows x vocabulary. Forbidden tokens get minus infinity."""
        width = int(input_ids.shape[1])
        for row, matcher in enumerate(self._matchers):
            for token in input_ids[row, self._read or width :].tolist():
                if not matcher.is_stopped():
                    matcher.consume_token(token)
            if matcher.is_stopped():
                self._mask[row].fill_(-1)  # this row is over; what comes is padding
            else:
                self._torch.fill_next_token_bitmask(matcher, self._mask, row)
        self._read = width
        mask = self._mask.to(scores.device)
        self._torch.apply_token_bitmask_inplace(scores, mask)
        return scores


def answer(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    rules: Sequence[str],
    max_tokens: int,
    temperature: float,
) -> list[Generation]:
    """Continue one batch of prompts (token ids), each by its grammar; greedy at ``temperature`` 0, else seed 0."""
    import torch

    from trimtab.packing import packed

    model, tokenizer = loaded.model, loaded.tokenizer
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    randomness = torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])
    with randomness, torch.inference_mode(), packed(model, len(prompts)):
        torch.manual_seed(0)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            logits_processor=[Held(loaded, rules)],
            **sampling,
        )
    return [ended(tokenizer, row[width:].tolist(), len(one)) for row, one in zip(output, prompts, strict=True)]
