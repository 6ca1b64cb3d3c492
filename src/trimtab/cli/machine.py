"""Verbs about this machine and its files: doctor, convert. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path

import click

from trimtab.cli.common import emit, examples, json_option


@click.command(epilog=examples("trimtab doctor", "trimtab doctor --json", "trimtab doctor --install-renderers"))
@click.option(
    "--install-renderers", is_flag=True, help="First fetch the JavaScript that draws React, Vue, Angular, Mermaid."
)
@json_option
def doctor(install_renderers: bool, as_json: bool) -> None:
    """Say what this machine can run, and what to install for the rest."""
    from trimtab.doctor import examine

    if install_renderers:
        from trimtab.structeval.render.availability import install_libraries

        install_libraries()
    checks = examine()
    emit({"checks": [vars(check) for check in checks]}, [check.line() for check in checks], as_json)


@click.command(epilog=examples("trimtab convert old-checkpoint safe-checkpoint", "trimtab convert m.gguf folder"))
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@json_option
def convert(source: str, target: Path, as_json: bool) -> None:
    """Write SOURCE (a pickle checkpoint, a GGUF file, or an adapter to merge) as a safetensors folder.

    A pickle is read with PyTorch's restricted loader, which runs no code from the file.
    """
    from trimtab.convert import convert as write

    size = write(source, target)
    emit({"target": str(target), "bytes": size}, [f"wrote {target} ({size / 1e6:.0f} MB)"], as_json)
