"""The documentation against the code: commands, options, links, targets, keys, and Python blocks that exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

import trimtab
from trimtab.cli import trimtab as command_line
from trimtab.comparison import policy_from_mapping
from trimtab.tuning.options import NO_GUARD, RULE_OPTIONS, GuardArguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *ROOT.glob("docs/**/*.md"),
    ]
    if path.is_file()
)
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
SHELLS = ("bash", "console", "sh", "shell")

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_MAKE = re.compile(r"\bmake((?: +(?:[A-Z_]+=\S+|[a-z][a-z0-9-]*))*)")


class Block(NamedTuple):
    """A fenced block of a page: where, language, content."""

    where: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    return [
        Block(f"{path.relative_to(ROOT)}:{path.read_text()[: match.start()].count(chr(10)) + 1}", *match.groups())
        for path in PAGES
        for match in _FENCE.finditer(path.read_text())
        if match[1] in languages
    ]


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each simple command: comments, prompts, continuation lines, pipes and variables are understood."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"[A-Za-z_]\w*=", word):
                words.append(word)


def trimtab_commands() -> list[tuple[str, list[str]]]:
    """Every command that starts with ``trimtab``: pages, headers of recipes, examples in the help of the verbs."""
    sources = [(block.where, block.text) for block in blocks(*SHELLS)]
    sources += [(path.name, path.read_text().splitlines()[0].removeprefix("# ")) for path in RECIPES]
    for group in (command_line, *command_line.commands.values()):
        examples = (group.epilog or "").partition("Examples:\n")[2].partition("\n\n")[0]
        sources.append((f"help of {group.name}", examples))
    return [(where, words) for where, text in sources for words in commands_in(text) if words[0] == "trimtab"]


@cache
def sft_names() -> frozenset[str]:
    """Names of all flags and YAML keys of ``trimtab sft``."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    kinds: tuple[Any, ...] = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, GuardArguments)
    return frozenset(item.name for kind in kinds for item in fields(kind)) | {"config", "env"}


def check_sft(words: list[str]) -> None:
    own = {option for parameter in command_line.commands["sft"].params for option in parameter.opts}
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and name not in own | {"--help"}:
            key = name[2:].replace("-", "_")
            assert key in sft_names() or key.removeprefix("no_") in sft_names(), f"no option {name}"
    if "--guard" in words:
        assert words[words.index("--guard") + 1] in (*RULE_OPTIONS, NO_GUARD)
    recipe = ROOT / words[words.index("--config") + 1] if "--config" in words else None
    if recipe is not None and recipe.is_file():
        data = {"dataset_name", "datasets"} & set(yaml.safe_load(recipe.read_text())) or "--dataset_name" in words
        assert data, f"{recipe.name} names no data, so the command needs --dataset_name"


def check_command(words: list[str]) -> None:
    """Parse without running; raises for an unknown verb or option, a missing argument, a value of the wrong type."""
    if len(words) == 1 or words[1] in ("--help", "-h", "--version"):
        return
    assert words[1] in command_line.commands, f"no verb {words[1]}"
    if words[1] == "sft":
        check_sft(words[2:])
    elif not {"--help", "-h"} & set(words):
        command_line.commands[words[1]].make_context(words[1], list(words[2:]))


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def _slugs(page: Path) -> set[str]:
    return {_slug(found) for found in re.findall(r"^#+ +(.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)}


def test_there_is_something_to_check() -> None:
    assert len(trimtab_commands()) > 20
    assert len(blocks("python")) >= 4
    assert len(RECIPES) >= 2


@pytest.mark.parametrize(("where", "words"), trimtab_commands(), ids=lambda value: str(value)[:90])
def test_commands_exist_with_their_options(where: str, words: list[str]) -> None:
    try:
        check_command(words)
    except click.ClickException as error:
        pytest.fail(f"{where}: {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize(
    "line", ["trimtab frobnicate", "trimtab eval demo", "trimtab eval demo --out x --nope", "trimtab sft --gaurd keel"]
)
def test_the_check_itself_notices_what_is_wrong(line: str) -> None:
    with pytest.raises((AssertionError, click.ClickException)):
        check_command(line.split())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    broken = []
    for found in _LINK.finditer(_FENCE.sub("", path.read_text())):
        target, _, anchor = (found[1] or found[2]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        page = (path.parent / target).resolve() if target else path
        if not page.exists() or (anchor and page.suffix == ".md" and anchor not in _slugs(page)):
            broken.append(found[1] or found[2])
    assert not broken


def _ragged_rows(text: str) -> list[str]:
    """Rows of tables with another number of cells than their header; escaped pipes and those in code part no cells."""
    found, width = [], 0
    for line in _FENCE.sub("", text).splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = re.sub(r"(`+).+?\1|\\\|", "", line.strip()).removeprefix("|").removesuffix("|").count("|") + 1
        width = width or cells
        if cells != width:
            found.append(f"{cells} cells, header {width}: {line[:80]}")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rows_of_tables_have_as_many_cells_as_the_header(path: Path) -> None:
    assert not _ragged_rows(path.read_text())


def test_the_check_of_tables_knows_which_pipes_part_cells() -> None:
    head = "| a | b |\n|---|---|\n"
    assert not _ragged_rows(head + "| `x|y` | p \\| q |\n| | |\n\n| one |\n|---|\n")
    assert len(_ragged_rows(head + "| 1 | 2 | 3 |\n| 1 |\n| 1 | 2 |\n")) == 2


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "\n".join(match[2] for match in _FENCE.finditer(path.read_text()) if match[1] in SHELLS)
    spans = re.findall(r"`(make [^`]+)`", _FENCE.sub("", path.read_text()))
    lines = [line.split("#")[0] for line in [*shell.splitlines(), *spans]]
    named = {word for line in lines for match in _MAKE.finditer(line) for word in match[1].split() if "=" not in word}
    assert named <= targets


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_have_known_keys_and_a_header_that_names_them(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert set(values) <= sft_names()
    GuardArguments(**{key: value for key, value in values.items() if key.startswith("guard")}).options()
    assert f"trimtab sft --config recipes/{path.name}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("block", blocks("yaml", "yml"), ids=lambda block: block.where)
def test_yaml_blocks_have_known_keys(block: Block) -> None:
    values = yaml.safe_load(block.text)
    if any(key.partition(".")[0] in ("alpha", "power", "margin", "max_lost") for key in values):
        policy_from_mapping(values)
    else:
        assert set(values) <= sft_names()


@pytest.mark.parametrize("block", blocks("json", "jsonl"), ids=lambda block: block.where)
def test_json_blocks_are_json(block: Block) -> None:
    for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
        json.loads(text)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.where)
def test_python_blocks_compile_and_use_what_exists(block: Block) -> None:
    tree = ast.parse(block.text, block.where)
    compile(tree, block.where, "exec")
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "trimtab":
                    names[alias.asname or "trimtab"] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trimtab":
            home = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(home, alias.name), f"{node.module} has no {alias.name}"
                names[alias.asname or alias.name] = getattr(home, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _resolve(node, names)
        elif isinstance(node, ast.Call):
            _check_call(node, names)


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object that a dotted name stands for, None where it is not trimtab's; a missing attribute fails."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        home = _resolve(node.value, names)
        if home is not None and (inspect.ismodule(home) or inspect.isclass(home)):
            assert hasattr(home, node.attr), f"{home} has no {node.attr}"
            return getattr(home, node.attr)
    return None


def _check_call(node: ast.Call, names: dict[str, Any]) -> None:
    target = _resolve(node.func, names)
    if target is None:
        return
    keywords = {word.arg: None for word in node.keywords if word.arg}
    inspect.signature(target).bind(*node.args, **keywords)


def test_the_reference_names_every_option_and_every_export() -> None:
    pages = [ROOT / "docs/reference.md", *sorted((ROOT / "docs").glob("reference-*.md"))]
    text = "\n### \n".join(page.read_text() for page in pages)
    for verb, command in command_line.commands.items():
        section = text.partition(f"### trimtab {verb}\n")[2].partition("\n### ")[0]
        assert section, f"no section for {verb}"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert any(f"`{option}" in section for option in parameter.opts), f"{verb} {parameter.opts}"
    missing = [item.name for item in fields(GuardArguments) if f"`--{item.name} " not in text]
    assert not missing
    assert not [name for name in trimtab.__all__ if name not in text and name != "__version__"]


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs/index.md").read_text()
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/design/*.md")]
    missing = [path.name for path in pages if path.name != "index.md" and path.name not in text]
    assert not missing


def test_the_tests_that_the_guard_s_design_names_exist() -> None:
    text = (ROOT / "docs/design/guard.md").read_text()
    named = re.findall(r"`((?:tuning|gradients)/test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 25
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests/unit" / file).read_text(), f"{file}::{name}"
