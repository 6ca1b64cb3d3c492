"""The command line: parse, call one function, print. Heavy imports stay inside the verbs, one file for each family.

Exit codes: 0 pass, 1 usage, 2 could not run, 3 regression, 4 an axis unmeasured, 5 not enough evidence.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys

import click

from trimtab import __version__
from trimtab.cli import geometry, judging, machine, measuring, patching, structeval, training, vetting
from trimtab.cli.common import VERDICTS, examples
from trimtab.cli.quiet import quieten
from trimtab.errors import TrimtabError


def main() -> None:
    """Entry point of the ``trimtab`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    quieten()
    try:
        code = trimtab.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = _fail("interrupted\n  fix:  repeat the command to go on; for sft add --resume_from_checkpoint true", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 1
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\n  fix:  see `{context.command_path} --help`" if context else ""
        code = _fail(error.format_message() + hint, 1)
    except TrimtabError as error:
        code = _fail(str(error), error.exit_code)
    except OSError as error:  # a full disk, a missing permission: no stack trace helps the user there
        where = f"\n  seen: {error.filename}" if error.filename else ""
        code = _fail(f"{error.strerror or error}{where}\n  fix:  {_advice(error)}", 2)
    _leave(code or 0)


def _leave(code: int) -> None:
    """End the process; one of several that were launched together ends without tearing the interpreter down.

    Threads of the process group outlive it (DeepSpeed keeps references). One that asks for the interpreter while that
    is taken down is ended by force inside C++, which aborts the process (SIGABRT) after everything was saved.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    if code == 0:  # nobody may be in a collective any more; after a failure others may never come
        distributed.barrier()
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _advice(error: OSError) -> str:
    """What to do about what the system refused."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "a file is in the way: name another path"
    if error.errno == errno.EISDIR:
        return "a folder has that name: name a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space, then repeat the command"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check the permissions, or name another path"
    return "check the path, the space on the disk and the permissions, then repeat the command"


def _fail(message: str, code: int) -> int:
    click.echo(f"trimtab: {message}", err=True)
    return code


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "trimtab demo",
        "trimtab sft --config recipes/sft_lora.yaml --dataset_name my.jsonl",
        "trimtab compare runs/base runs/new",
        codes=VERDICTS,
    ),
)
@click.version_option(__version__, prog_name="trimtab")
def trimtab() -> None:
    """Keep a language model safe while you change it.

    A model is named the same way in every verb: a hub id, a local folder, a GGUF file, "demo" (an embedded aligned 135M
    model), each optionally with an adapter: NAME?adapter=FOLDER
    """


for verb in (
    training.demo,
    training.sft,
    patching.patch,
    measuring.evaluate,
    measuring.compare,
    measuring.plan,
    judging.judge,
    geometry.geometry,
    machine.doctor,
    machine.convert,
    vetting.vet,
    vetting.harden,
    structeval.structeval,
):
    trimtab.add_command(verb)
