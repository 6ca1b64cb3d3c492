"""Approximations as strings: ``teal:0.5``, ``bolt+a8``, ``noise:up=0.05,down=0.02,layers=0-3``.

    WHOLE = PART ("+" PART)*        PART = NAME [":" ITEM ("," ITEM)*]        ITEM = VALUE | KEY "=" VALUE

Values without a key fill a technique's parameters in order. Every technique takes ``layers=FIRST-LAST``. The "+" of an
exponent (1e+3) joins nothing.

Covered: parsing with clear errors, nearest names, ranges of numbers. Not covered: what a technique offers to this
(``entries.py``) and does (a file a kind).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations

from trimtab.approximation.entries import Entry, LayerRange, Parameter
from trimtab.approximation.technique import Technique
from trimtab.errors import UsageError

SEVEN = ("iron", "bolt", "bumblebee", "nexus", "teal", "smoothquant", "omniquant")
ALL = (
    *("iron", "bolt", "bumblebee", "nexus"),
    *("teal:0.1", "teal:0.25", "teal:0.5", "teal:0.9", "cats:0.5"),
    *("a8", "a6", "a5", "a4", "smoothquant:8", "smoothquant:4", "omniquant:8", "omniquant:4", "kv8", "kv4"),
)  # what `--approx all` means

_JOIN = re.compile(r"(?<![\d.][eE])\+|\+(?!\d)")


def names() -> tuple[str, ...]:
    """Every technique's name."""
    return tuple(entries())


def entries() -> dict[str, Entry]:
    """All techniques by name. Imported here, so that reading names needs no torch."""
    from trimtab.approximation import activations, noise, quantization, sparsity

    return {**activations.ENTRIES, **sparsity.ENTRIES, **quantization.ENTRIES, **noise.ENTRIES}


def parse(text: str) -> tuple[Technique, ...]:
    """The techniques that a string names, in the order in which they are applied.

    Raises:
        UsageError: an unknown name (the nearest is suggested), an unknown key, a value out of range, two that would
            replace the same function or do one kind of thing to the same values.
    """
    parts = [part.strip() for part in _JOIN.split(text)]
    if not all(parts):
        raise UsageError("an approximation without a name", seen=text, fix=f"use one of: {', '.join(names())}")
    found = tuple(_parse_part(part) for part in parts)
    _check_replaced(found)
    _check_repeated(found)
    return found


def _check_replaced(techniques: Sequence[Technique]) -> None:
    """Two functions in the place of one do not compose: the second would take the first away, silently."""
    for first, second in combinations(techniques, 2):
        both = set(getattr(first, "replaces", ())) & set(getattr(second, "replaces", ()))
        if both and first.layers.meets(second.layers):
            raise UsageError(
                f"two techniques replace the same function: {', '.join(sorted(both))}",
                seen=f"{first.label} and {second.label}",
                fix="name one of them, give them different layers, or (softmax alone) give one softmax=no",
            )


def _check_repeated(techniques: Sequence[Technique]) -> None:
    """What is rounded (zeroed, moved by noise) twice is what neither of the two names says."""
    for first, second in combinations(techniques, 2):
        kinds = {getattr(one, "kind", type(one).__name__.lower()) for one in (first, second)}
        both = set(getattr(first, "sites", ())) & set(getattr(second, "sites", ()))
        alike = len(kinds) == 1 and (both or type(first) is type(second))
        if alike and first.layers.meets(second.layers):
            raise UsageError(
                f"{kinds.pop()} twice at the same place" + (f": {', '.join(sorted(both))}" if both else ""),
                seen=f"{first.label} and {second.label}",
                fix="name one of them, or give them different layers: layers=0-3 and layers=4-",
            )


def split_list(texts: Sequence[str]) -> list[str]:
    """Names from ``--approx`` values: "all" and "seven" stand for their lists; ";" separates several in one value.

    Raises:
        UsageError: as ``parse``.
    """
    found: list[str] = []
    for text in texts:
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            chosen = {"all": ALL, "seven": tuple(name for name in ALL if name.partition(":")[0] in SEVEN)}.get(part)
            for name in chosen or (part,):
                parse(name)
                if name not in found:
                    found.append(name)
    if not found:
        raise UsageError("no approximation to vet", fix='name one, or "all"')
    return found


def slug(text: str) -> str:
    """A name as a folder's name."""
    return "".join(char if char.isalnum() or char in ".-" else "_" for char in text)


def _parse_part(part: str) -> Technique:
    name, colon, rest = part.partition(":")
    known = entries()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        fix = f"did you mean {near[0]}? " if near else ""
        raise UsageError("unknown approximation", seen=name, fix=f"{fix}Known: {', '.join(known)}")
    if colon and not rest:
        raise UsageError(f"{name}: nothing after the colon", seen=part, fix=f"write {name}:VALUE or {name}")
    entry = known[name]
    given: dict[str, str] = {}
    free = [key for key in entry.parameters if key != "layers"]
    for place, item in enumerate(rest.split(",") if rest else []):
        key, equals, value = item.partition("=")
        if not equals:
            if place >= len(free) or given.keys() - set(free[:place]):
                raise UsageError(
                    f"{name}: a value without a key", seen=item, fix=f"keys: {', '.join(entry.parameters)}"
                )
            key, value = free[place], item
        _check_key(name, key, entry, given)
        given[key] = value.strip()
    values = {key: _value(name, key, given.get(key), rule) for key, rule in entry.parameters.items()}
    return entry.make(**values, **entry.fixed)


def _check_key(name: str, key: str, entry: Entry, given: Mapping[str, str]) -> None:
    if key not in entry.parameters:
        near = difflib.get_close_matches(key, entry.parameters, n=1, cutoff=0.4)
        fix = (f"did you mean {near[0]}? " if near else "") + f"Keys: {', '.join(entry.parameters) or 'none'}"
        raise UsageError(f"{name} has no such parameter", seen=key, fix=fix)
    if key in given:
        raise UsageError(f"{name}: a parameter is given twice", seen=key, fix="leave one of them out")


def _value(name: str, key: str, text: str | None, rule: Parameter) -> object:
    if text is None:
        if rule.required:
            raise UsageError(f"{name} needs {key}", fix=f"write, say, {name}:{rule.example}")
        return rule.default
    if rule.kind is LayerRange:
        return _layer_range(name, text)
    if rule.choices:
        if text not in rule.choices:
            raise UsageError(f"{name}: {key} is a word", seen=text, fix=f"use one of: {', '.join(rule.choices)}")
        return text
    try:
        number = rule.kind(text)
    except ValueError as error:
        kind = "a whole number" if rule.kind is int else "a number"
        raise UsageError(
            f"{name}: {key} is {kind}",
            seen=text,
            fix=f"write {key}={kind.removeprefix('a ').upper().replace(' ', '_')}",
        ) from error
    below = number < rule.low or (rule.open_low and number == rule.low)
    above = number > rule.high or (rule.open_high and number == rule.high)
    if below or above or not math.isfinite(number):
        fix = f"use a value {_range_text(rule)}"
        raise UsageError(f"{name}: {key} is out of range", seen=text, fix=fix)
    return number


def _range_text(rule: Parameter) -> str:
    low = f"{'above' if rule.open_low else 'at least'} {rule.low:g}" if rule.low > -math.inf else ""
    high = f"{'below' if rule.open_high else 'at most'} {rule.high:g}" if rule.high < math.inf else ""
    return " and ".join(filter(None, (low, high))) or "that is finite"


def _layer_range(name: str, text: str) -> LayerRange:
    first, dash, last = text.partition("-")
    try:
        found = LayerRange(int(first), int(last) if last else (None if dash else int(first)))
    except ValueError as error:
        raise UsageError(f"{name}: layers are FIRST-LAST", seen=text, fix="write, say, layers=0-3") from error
    if found.first < 0 or (found.last is not None and found.last < found.first):
        raise UsageError(f"{name}: an empty range of layers", seen=text, fix="write, say, layers=0-3")
    return found
