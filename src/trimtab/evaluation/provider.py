"""An inspect model provider over models in this process: ``trimtab/<name>``, or ``provider_for(loaded)``.

Covered: batched generation, max_tokens, temperature, top_p, seed, stop sequences, context overflow, text likelihood.
Not covered: tools, images, several choices, log probabilities: asking for them raises, because an ignored setting would
be measured as if it had been honoured. Servers: use inspect's own providers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Model,
    ModelAPI,
    ModelInfo,
    ModelOutput,
    ModelUsage,
    modelapi,
    set_model_info,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from trimtab.errors import DataError, UsageError
from trimtab.evaluation.batching import Batcher, Request
from trimtab.evaluation.journal import Journal, answer_key, from_row, to_row
from trimtab.generation import Generation, GenerationSettings, Message, fitting_rows, render
from trimtab.models import LoadedModel, fingerprint, load

DEFAULT_MAX_TOKENS = 256
BATCHES_IN_FLIGHT = 16  # so many batches' worth of chats wait at once: enough to sort them by length
_NOT_HONOURED = (
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_schema",
)


class Likelihood(NamedTuple):
    """Sum of -log p (nats) of a text's tokens given those before, and how many tokens were predicted."""

    nats: float
    tokens: int


class TrimtabAPI(ModelAPI):
    """The provider. ``model_name`` is everything after ``trimtab/``, as ``trimtab.models.load`` reads it."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        *,
        loaded: LoadedModel | None = None,
        batch_size: int | str | None = None,
        on_answers: Callable[[int], object] | None = None,
        expected: int = 0,
        journal: Journal | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.loaded = loaded if loaded is not None else load(model_name, **model_args)
        _tell_inspect(f"trimtab/{model_name}", self.loaded)
        rows = int(batch_size or fitting_rows(self.loaded))
        self.journal = journal
        keep = self._keep if journal is not None else None
        self.batcher = Batcher(self.loaded, rows, on_answers, min(expected, rows * BATCHES_IN_FLIGHT), keep)
        self._fingerprint: dict[str, str] | None = None

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002 - inspect's name
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002 - inspect's signature
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one chat; concurrent calls share batches."""
        refuse_what_would_be_ignored(config, tools)
        chat = plain_messages(input)
        settings = settings_from(config, self.batcher.batch_size)
        ids = render(self.loaded, chat)
        context = getattr(self.loaded.model.config, "max_position_embeddings", None)
        if context and len(ids) + settings.max_new_tokens > context:
            error = f"{len(ids)} tokens + {settings.max_new_tokens} new do not fit the context of {context}"
            return ModelOutput.from_content(self.model_name, "", stop_reason="model_length", error=error)
        answer = await self._answer(chat, ids, settings)
        return output_from(self.model_name, answer, config.stop_seqs or ())

    async def _answer(self, chat: list[Message], ids: list[int], settings: GenerationSettings) -> Generation:
        """From the journal of a run that was interrupted, else from the model."""
        if self.journal is None:
            return await self.batcher.answer(chat, ids, settings)
        if (kept := self.journal.get(answer_key(chat, settings))) is not None:
            return from_row(kept)
        return await self.batcher.answer(chat, ids, settings)

    def _keep(self, request: Request, answer: Generation) -> None:
        """Into the journal, on the model's thread."""
        if self.journal is not None:
            self.journal.put(answer_key(request.messages, request.settings), to_row(answer))

    async def likelihood(self, texts: Sequence[str]) -> list[Likelihood]:
        """Likelihood of each text under the model (raw, without a chat template), on the model's thread."""
        found = await self.batcher.in_thread(lambda: [likelihood(self.loaded, text) for text in texts])
        if self.batcher.on_answers is not None:
            self.batcher.on_answers(len(texts))
        return found

    async def continuations(self, chat: Sequence[ChatMessage], options: Sequence[str]) -> list[float]:
        """Sum of log p (nats) of each option as the whole beginning of the answer to a chat, on the model's thread."""
        plain = plain_messages(chat)
        found = await self.batcher.in_thread(lambda: continuation_nats(self.loaded, plain, options))
        if self.batcher.on_answers is not None:
            self.batcher.on_answers(1)
        return found

    def fingerprint(self) -> dict[str, str]:
        """Content hashes of the model, computed once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.loaded)
        return self._fingerprint

    async def count_text_tokens(self, text: str) -> int:
        """Tokens of a text by the model's own tokenizer (inspect's default downloads another one)."""
        tokenizer: Any = self.loaded.tokenizer
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def max_connections(self) -> int:
        """How many chats may wait at once; high, so that batches fill and can be sorted by length."""
        return self.batcher.batch_size * BATCHES_IN_FLIGHT

    def max_tokens(self) -> int | None:
        """Answer length where a task sets none."""
        return DEFAULT_MAX_TOKENS

    def close(self) -> None:
        """Let the worker thread end."""
        self.batcher.close()


register: Callable[..., ModelAPI] = modelapi("trimtab")(TrimtabAPI)


def _tell_inspect(name: str, loaded: LoadedModel) -> None:
    """Register what inspect would look up: for a name that it does not know it makes the model a second time."""
    config: Any = loaded.model.config
    set_model_info(name, ModelInfo(context_length=getattr(config, "max_position_embeddings", None)))


def provider_for(
    loaded: LoadedModel,
    *,
    batch_size: int | None = None,
    on_answers: Callable[[int], object] | None = None,
    expected: int = 0,
    journal: Journal | None = None,
) -> Model:
    """An inspect model over an object that exists only in this process (patched, approximated, in training).

    Args:
        loaded: the model.
        batch_size: most chats in one forward pass; as many as fit into memory (``fitting_rows``) unless given.
        on_answers: called with the number of chats answered, as they are.
        expected: how many chats will be asked together, where known; see ``Batcher``.
        journal: answers that are already there, and where new ones are kept.
    """
    api = register(
        loaded.name, loaded=loaded, batch_size=batch_size, on_answers=on_answers, expected=expected, journal=journal
    )
    return Model(api, GenerateConfig())


def refuse_what_would_be_ignored(config: GenerateConfig, tools: Sequence[ToolInfo]) -> None:
    """Raise for settings that this provider cannot honour."""
    if tools:
        raise UsageError("trimtab's provider has no tool calls", seen=[tool.name for tool in tools], fix="use a server")
    asked = [name for name in _NOT_HONOURED if getattr(config, name, None)]
    if (config.num_choices or 1) > 1:
        asked.append("num_choices")
    if asked:
        raise UsageError("trimtab's provider does not honour a setting", seen=", ".join(asked), fix="leave it out")


def plain_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Role and text of each message."""
    for message in messages:
        if not isinstance(message.content, str) and any(part.type != "text" for part in message.content):
            raise UsageError(
                "trimtab's provider reads text only",
                seen=[part.type for part in message.content],
                fix="leave images and other media out of the messages",
            )
    return [{"role": message.role, "content": message.text} for message in messages]


def settings_from(config: GenerateConfig, batch_size: int) -> GenerationSettings:
    """Decoding settings from inspect's; greedy where no temperature is given."""
    return GenerationSettings(
        max_new_tokens=config.max_tokens or DEFAULT_MAX_TOKENS,
        temperature=config.temperature or 0.0,
        top_p=config.top_p if config.top_p is not None else 1.0,
        seed=config.seed or 0,
        batch_size=batch_size,
    )


def output_from(model: str, answer: Generation, stops: Sequence[str]) -> ModelOutput:
    """An inspect output; the text ends before the first stop sequence."""
    text, stopped = cut_at(answer.text, stops)
    reason = "max_tokens" if answer.truncated and not stopped else "stop"
    usage = ModelUsage(
        input_tokens=answer.prompt_tokens,
        output_tokens=answer.tokens,
        total_tokens=answer.prompt_tokens + answer.tokens,
    )
    choice = ChatCompletionChoice(
        message=ChatMessageAssistant(content=text, model=model, source="generate"),
        stop_reason=reason,  # type: ignore[arg-type]
    )
    return ModelOutput(model=model, choices=[choice], usage=usage)


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of several stop sequences, and whether there was one."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def likelihood(loaded: LoadedModel, text: str) -> Likelihood:
    """Negative log-likelihood of one text by one forward pass: all tokens after the first (or after BOS).

    Raises:
        DataError: where the text is longer than the context, or has fewer than two tokens.
    """
    import torch

    tokenizer: Any = loaded.tokenizer
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    context = getattr(loaded.model.config, "max_position_embeddings", None) or len(ids)
    if len(ids) < 2 or len(ids) > context:
        seen = f"{len(ids)} tokens; the context is {context}"
        raise DataError("a window of text cannot be scored", seen=seen, fix="choose another window_chars")
    row = torch.tensor([ids], device=loaded.device)
    with torch.inference_mode():
        logits = loaded.model(input_ids=row).logits[0, :-1].float()  # tokens - 1 x vocabulary
        nats = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return Likelihood(nats, len(ids) - 1)


def continuation_nats(loaded: LoadedModel, chat: Sequence[Message], options: Sequence[str]) -> list[float]:
    """log p(option | chat) in nats for each option, one padded forward pass for all of them.

    Nothing looks at the padding, but an approximation that counts a row's tokens has to be told of it.

    Raises:
        DataError: where chat and option do not fit the context, or an option has no token.
    """
    import torch

    tokenizer: Any = loaded.tokenizer
    asked = render(loaded, chat)
    told = [list(tokenizer(option, add_special_tokens=False)["input_ids"]) for option in options]
    width = len(asked) + max(map(len, told))
    context = getattr(loaded.model.config, "max_position_embeddings", None) or width
    if width > context or not all(told):
        seen = f"{width} tokens; the context is {context}"
        raise DataError("a question with its options cannot be scored", seen=seen, fix="shorten it")
    rows = [[*asked, *ids, *[tokenizer.pad_token_id] * (width - len(asked) - len(ids))] for ids in told]
    batch = torch.tensor(rows, device=loaded.device)  # options x width, padded behind
    ends = torch.tensor([[len(asked) + len(ids)] for ids in told], device=loaded.device)
    mask = (torch.arange(width, device=loaded.device) < ends).long()
    with torch.inference_mode():
        logits = loaded.model(input_ids=batch, attention_mask=mask).logits[:, len(asked) - 1 :].float()
        chances = torch.log_softmax(logits, -1)
    return [sum(float(chances[row, place, token]) for place, token in enumerate(ids)) for row, ids in enumerate(told)]
