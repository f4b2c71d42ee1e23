"""``slimtune chat RUN``: talk to a run, an adapter or a bare model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from slimtune.cli import say_error
from slimtune.cli.early import check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.cli.using import model_options, sampling_options, say_if_slow
from slimtune.errors import UserError, written_out
from slimtune.words import told

if TYPE_CHECKING:
    from slimtune.use.chat import ChatSession

__all__ = ["command"]

HELP = """\
  /base, /tuned  ask the base, or what was trained: another model, another conversation
  /reset         forget the conversation
  /system TEXT   set the system text, and start anew
  /exit          leave, as does Ctrl-D"""


@click.command()
@click.argument("target", metavar="RUN", type=PATH_OR_NAME)
@click.option("--prompt", metavar="TEXT", help="Answer once and exit, for scripts.")
@click.option("--system", metavar="TEXT", help="The system text.")
@model_options
@sampling_options
def command(
    target: str,
    prompt: str | None,
    system: str | None,
    base: str | None,
    quantization: str | None,
    compute_dtype: str | None,
    trust_remote_code: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Talk to RUN: a run's folder, an adapter's, or a bare model (hub id, folder, smollm2-135m).

    Ctrl-C stops a reply and keeps the conversation.

    A run is asked with the template variables and the date that it was trained with, a bare model with its
    template's defaults.
    """
    check_target(target)
    with fast_imports():
        from slimtune.cli.bar import busy
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.chat import ChatSession
        from slimtune.use.load import open_model
        from slimtune.use.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    with upstream_to_log(None):
        with busy("loading the model"):
            opened = open_model(
                target, base=base, quantization=quantization, dtype=compute_dtype, trust_remote_code=trust_remote_code
            )
        say_if_slow(opened)
        session = ChatSession(opened, sampling, system)
        if prompt is not None:
            session.reply(_utf8(prompt, "--prompt"), _show)
            click.echo()
            return
        converse(session)


def converse(session: ChatSession) -> None:
    """Read lines until the person leaves."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() line editing and history

    click.echo(told(f"{session.model}: ready.") + f"\n{told(HELP)}", err=True)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n" + told("(Ctrl-D or /exit leaves)"), err=True)
            continue
        if line == "/exit":
            return
        if line.startswith("/"):
            _command(session, line)
        elif line:
            _answer(session, line)


def _answer(session: ChatSession, line: str) -> None:
    try:
        text = _utf8(line, "the line")
        # On standard error, so that a script that reads the replies gets them alone.
        click.echo(f"{session.model}: ", nl=False, err=True)
        session.reply(text, _show)
        click.echo()
    except KeyboardInterrupt:
        click.echo("\n" + told("(stopped)"), err=True)
    except UserError as error:
        say_error(error)


def _command(session: ChatSession, line: str) -> None:
    word, _, rest = line.partition(" ")
    if word == "/reset":
        session.reset()
        say("(the conversation is forgotten)", err=True)
    elif word in ("/base", "/tuned"):
        try:
            session.switch(base=word == "/base")
        except UserError as error:
            say_error(error)
        else:
            say(f"({session.model} answers from here on, in a conversation of its own)", err=True)
    elif word == "/system" and rest.strip():
        session.system = rest.strip()
        session.reset()
        say("(system text set; the conversation starts anew)", err=True)
    elif word == "/system":
        say(f"(system text: {session.system or 'none'})", err=True)
    else:
        click.echo(("" if word == "/help" else told(f"unknown command {word}") + "\n") + told(HELP), err=True)


def _show(text: str) -> None:
    click.echo(written_out(text) if sys.stdout.isatty() else text, nl=False)
    sys.stdout.flush()


def _utf8(text: str, where: str) -> str:
    """Bytes that were no UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is no UTF-8 text", way_out="Check the terminal's or script's encoding.") from None
    return text
