"""Batched text generation on a model in memory.

Covered: rendering chats, sorting by length so that batches pad little, greedy or seeded sampling, context overflow;
continuous batching (``decoding.py``) where the model's cache allows it, the model's own ``generate`` elsewhere; weights
packed for the processor meanwhile (``packing.py``).
Not covered: judging, logging, servers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trimtab import prefix
from trimtab.errors import DataError
from trimtab.models import LoadedModel, require_chat_template
from trimtab.precision import without_graph

Message = dict[str, str]
CONTEXT_TO_FIT = 1024  # tokens of a row, prompt and answer, that memory is planned for
USUAL_ROWS = 16  # where a configuration does not say how large keys and values are
MOST_ROWS = 64  # more rows gain little, and a killed run loses the answers in flight


@dataclass(frozen=True)
class GenerationSettings:
    """How to decode. ``temperature`` 0 is greedy; otherwise ``seed`` makes sampling repeatable."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True)
class Generation:
    """One answer. ``truncated``: it ended because of the token limit, not by an end-of-turn token."""

    text: str
    tokens: int
    prompt_tokens: int
    truncated: bool


class Prompt(NamedTuple):
    """Token ids to continue; ``key`` is the caller's own."""

    key: Any
    ids: list[int]


def fitting_rows(loaded: LoadedModel, tokens: int = CONTEXT_TO_FIT, most: int = MOST_ROWS) -> int:
    """How many rows of so many tokens keep their keys and values in a quarter of the free memory; 1 to ``most``.

    Larger batches read the weights less often for each token: on the demo model on one core a step of 64 rows takes
    twice as long as one of 16 (docs/results/throughput.md).
    """
    config: Any = loaded.model.config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return min(most, USUAL_ROWS)
    kept = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    row = 2 * layers * kept * size * loaded.model.dtype.itemsize * tokens  # bytes of keys and values
    return int(min(most, max(1, _free_memory(loaded.model.device) // (4 * row))))


def _free_memory(device: Any) -> int:
    """Bytes free on the model's device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def render(loaded: LoadedModel, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat, ready for the model's answer; the template alone supplies special tokens (one BOS)."""
    require_chat_template(loaded.tokenizer, loaded.name)
    begun = bool(messages) and messages[-1]["role"] == "assistant"  # an answer that the model has to continue
    text = loaded.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def generate(
    loaded: LoadedModel,
    chats: Sequence[Sequence[Message]],
    settings: GenerationSettings = GenerationSettings(),
    progress: Callable[[int], Any] | None = None,
) -> list[Generation]:
    """Answer every chat; results are in the order of ``chats``.

    Raises:
        DataError: when a prompt plus its answer does not fit the model's context.
    """
    return generate_ids(loaded, [render(loaded, chat) for chat in chats], settings, progress)


def generate_ids(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    settings: GenerationSettings = GenerationSettings(),
    progress: Callable[[int], Any] | None = None,
) -> list[Generation]:
    """Continue every prompt, given as token ids; results are in the order of ``prompts``.

    Raises:
        DataError: as ``generate``.
    """
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    for index, ids in enumerate(prompts):
        if limit and len(ids) + settings.max_new_tokens > limit:
            seen = f"prompt {index} has {len(ids)} tokens, + {settings.max_new_tokens} new > {limit}"
            raise DataError("a prompt does not fit the model's context", seen=seen, fix="shorten it or lower the limit")
    waiting = deque(sorted((Prompt(*pair) for pair in enumerate(prompts)), key=lambda prompt: len(prompt.ids)))
    results: dict[int, Generation] = {}

    def take(count: int) -> list[Prompt]:
        return [waiting.popleft() for _ in range(min(count, len(waiting)))]

    def done(prompt: Prompt, answer: Generation) -> None:
        results[prompt.key] = answer
        if progress is not None:
            progress(1)

    answer(loaded, take, done, settings)
    return [results[index] for index in range(len(prompts))]


def answer(
    loaded: LoadedModel,
    take: Callable[[int], Sequence[Prompt]],
    done: Callable[[Prompt, Generation], None],
    settings: GenerationSettings,
) -> None:
    """Continue prompts as they come, until ``take`` gives none and all are answered.

    Args:
        loaded: the model.
        take: gives up to that many prompts that wait, an empty list if none do. Alike lengths together pad least.
        done: called with each answer as soon as it is there.
        settings: how to decode; ``batch_size`` is the most prompts in one pass.
    """
    from trimtab.packing import packed

    with packed(loaded.model, settings.batch_size):
        _answer(loaded, take, done, settings)


def _answer(
    loaded: LoadedModel,
    take: Callable[[int], Sequence[Prompt]],
    done: Callable[[Prompt, Generation], None],
    settings: GenerationSettings,
) -> None:
    from trimtab import decoding

    model, tokenizer = loaded.model, loaded.tokenizer
    if decoding.supports(model):
        limits = decoding.Limits(
            settings.batch_size, settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed
        )

        def told(prompt: Prompt, new: list[int], cut: bool) -> None:
            done(prompt, _decoded(tokenizer, len(prompt.ids), new, cut))

        decoding.decode(model, tokenizer, take, told, limits)
        return
    while prompts := take(settings.batch_size):
        for prompt, found in zip(prompts, _one_batch(loaded, [p.ids for p in prompts], settings), strict=True):
            done(prompt, found)


def _one_batch(loaded: LoadedModel, prompts: list[list[int]], settings: GenerationSettings) -> list[Generation]:
    import torch

    model, tokenizer = loaded.model, loaded.tokenizer
    pad = tokenizer.pad_token_id
    shared = prefix.shared_length(prompts) if prefix.supports(model) else 0
    batch = prefix.collate(prompts, pad, shared).to(model.device)
    rows = len(prompts)
    ids = torch.cat([batch.prefix.expand(rows, -1), batch.ids], dim=1)  # rows x width, padding after the shared prefix
    mask = torch.cat([batch.mask.new_ones(rows, shared), batch.mask], dim=1)
    width = ids.shape[1]
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), without_graph(model):
        torch.manual_seed(settings.seed)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            **({"cache": prefix.expanded_prefix(model, batch.prefix, rows)} if shared else {}),
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )
    return [ended(tokenizer, row[width:].tolist(), len(prompt)) for row, prompt in zip(output, prompts, strict=True)]


def ended(tokenizer: Any, new: list[int], prompt_tokens: int) -> Generation:
    """The answer within new ids that may run on behind its end token."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    stop = next((index for index, token in enumerate(new) if token in ends), None)
    return _decoded(tokenizer, prompt_tokens, new if stop is None else new[:stop], stop is None)


def _decoded(tokenizer: Any, prompt_tokens: int, kept: list[int], truncated: bool) -> Generation:
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Generation(text=text.strip(), tokens=len(kept), prompt_tokens=prompt_tokens, truncated=truncated)
