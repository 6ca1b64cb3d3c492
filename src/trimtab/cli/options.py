"""Options of one command: flags over a YAML file over defaults, and options that would be ignored.

Covered: values of the file read as their flags are, errors by key and value; refusing what was given and nothing reads.
Not covered: reading the file (``vetting/plan.py``), what options do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from trimtab.errors import UsageError


def merged(
    context: click.Context, values: Mapping[str, Any], config: Mapping[str, Any], path: Path | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Every option's value, and how those that the user gave were given, by name.

    Args:
        values: as click has them. config: what the file at ``path`` holds; a key without a value is not there.

    Raises:
        UsageError: another kind of value than the flag takes; names file, key, value and what is expected.
    """
    options, given = dict(values), {}
    for parameter in context.command.params:
        key = parameter.name or ""
        by_default = context.get_parameter_source(key) in (ParameterSource.DEFAULT, None)
        if not by_default and options.get(key) not in (None, ()):
            given[key] = _as_given(parameter, options[key])
        elif config.get(key) is not None:
            options[key] = _from_file(context, parameter, config[key], path)
            given[key] = f"{path}: {key}: {config[key]}"
    return options, given


def refuse_ignored(
    context: click.Context, given: Mapping[str, str], names: Collection[str], when: str, fix: str
) -> None:
    """Raise where one of these options was given, for nothing would read it.

    Args:
        given: as ``merged`` gives it. when: behind "nothing reads --limit", e.g. "with --search".

    Raises:
        UsageError: names every such option and its value.
    """
    ignored = [parameter for parameter in context.command.params if parameter.name in names and parameter.name in given]
    if ignored:
        flags = ", ".join(map(flag, ignored))
        raise UsageError(f"nothing reads {flags} {when}", seen="; ".join(given[p.name or ""] for p in ignored), fix=fix)


def flag(parameter: click.Parameter) -> str:
    """As one writes it: --limit, --redact/--no-redact."""
    return "/".join([*parameter.opts, *parameter.secondary_opts])


def _as_given(parameter: click.Parameter, value: Any) -> str:
    if isinstance(value, bool):
        return (parameter.opts if value else parameter.secondary_opts)[0]
    return " ".join(f"{parameter.opts[0]} {one}" for one in (value if isinstance(value, tuple) else (value,)))


def _from_file(context: click.Context, parameter: click.Parameter, value: Any, path: Path | None) -> Any:
    """A value of the YAML file as its flag would have given it."""
    expected, kinds = _expected(parameter)
    problem = None
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        try:
            return tuple(value) if isinstance(value, list) else parameter.type_cast_value(context, value)
        except click.BadParameter as error:
            problem = error
    seen = f"{path}: {parameter.name}: {value!r}"
    what = f"{parameter.name} in the configuration is not {expected}"
    raise UsageError(what, seen=seen, fix=f"write {expected}") from problem


def _expected(parameter: click.Parameter) -> tuple[str, tuple[type, ...]]:
    """In words, and the types that YAML reads it as (a quoted number is read as the number)."""
    kind = parameter.type
    if parameter.multiple:
        return "a name or a list of names", (list,)
    if isinstance(kind, click.IntRange):
        return f"a whole number of at least {kind.min}", (int, str)
    if isinstance(kind, click.types.BoolParamType):
        return "true or false", (bool,)
    if isinstance(kind, click.Path):
        return "one path", (str,)
    return "one word or line of text", (str,)
