"""The demo's small task: route a support message to one of five queues."""

from __future__ import annotations

from trimtab.data import TICKET_LABELS


def routing_prompt(text: str) -> str:
    """The instruction that the demo trains on and is measured with."""
    return f"Route this message to one of: {', '.join(TICKET_LABELS)}.\nMessage: {text}\nQueue:"
