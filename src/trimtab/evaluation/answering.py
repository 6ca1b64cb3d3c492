"""Solvers that ask for an answer: one draw an epoch, and a second, longer answer where the first was cut too early.

Covered: greedy and sampled answers; prefilled openings, which stay. Not covered: conversations (``crescendo.py``);
servers that do not say how many tokens they wrote: their answers stay as they are.
"""

from __future__ import annotations

from inspect_ai.model import GenerateConfigArgs, ModelOutput
from inspect_ai.solver import Generate, Solver, TaskState, chain, solver

from trimtab.evaluation.judges import FINISHED_TOKENS, undecided

CUT_ANSWER = "cut_answer"  # in a sample's metadata: the first answer, where a longer one took its place


@solver
def seeded(temperature: float) -> Solver:
    """Sample an answer with the number of the epoch as seed, so that every repetition is another draw."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, temperature=temperature, seed=state.epoch)

    return solve


@solver
def finished(temperature: float | None = None) -> Solver:
    """Ask an undecided answer again, once, with ``FINISHED_TOKENS``.

    Args:
        temperature: of an answer that ``seeded`` drew; None repeats the task's own settings.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if not _worth_asking(state):
            return state
        first, said = state.output, list(state.messages)
        state.messages = said[:-1]  # the answer goes, a prefilled opening before it stays
        again = GenerateConfigArgs(max_tokens=FINISHED_TOKENS)
        if temperature is not None:
            again |= GenerateConfigArgs(temperature=temperature, seed=state.epoch)
        state = await generate(state, **again)
        if not state.output.completion or state.output.stop_reason == "model_length":  # no room for the longer answer
            state.output, state.messages = first, said
        else:
            state.metadata[CUT_ANSWER] = first.completion
        return state

    return solve


def sampled(temperature: float, *, counts_refusals: bool) -> Solver:
    """``seeded``, and ``finished`` behind it where refusals are counted."""
    return chain(seeded(temperature), finished(temperature)) if counts_refusals else seeded(temperature)


def _worth_asking(state: TaskState) -> bool:
    request = str(state.metadata.get("request") or state.input_text)  # what the scorer judges, too
    return _cut_below(state.output, FINISHED_TOKENS) and undecided(request, state.output.completion, truncated=True)


def _cut_below(output: ModelOutput, tokens: int) -> bool:
    """Whether a limit of fewer tokens ended the answer.

    An answer that was cut is as long as its limit, so this also sees a limit that inspect's ``--max-tokens`` set.
    """
    cut = bool(output.choices) and output.stop_reason == "max_tokens"
    return cut and output.usage is not None and output.usage.output_tokens < tokens
