"""The command line: verbs that parse, call a recipe, and turn errors into exit codes.

Verbs are loaded when they are called, so that ``slimtune --help`` answers at once; nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn

import click

from slimtune.cli.formatting import Context, say, terminal_width
from slimtune.errors import SlimtuneError, StopRequested, by_the_system, check_utf8
from slimtune.language import LANGUAGES, Lang, speak, spoken
from slimtune.training.stop import STOP_SIGNALS, end_anyway
from slimtune.width import cells, folded
from slimtune.words import told

__all__ = ["coloured", "main", "nobody_reads", "say_error", "slimtune_command"]

# verb: what its line in --help says. Its command stands in slimtune.cli.<verb> as `command`.
VERBS = {
    "init": "Ask for data, model and goal, and write run.yaml.",
    "train": "Fine-tune MODEL on DATA and save the adapter.",
    "demo": "The whole job on the embedded model: train, and see it learn.",
    "plan": "What a run of MODEL takes on which card, before its weights are downloaded.",
    "data": "Prove DATA row by row and show what the model will see.",
    "resume": "Go on with a run that was stopped.",
    "watch": "A live page of a run, or of several.",
    "chat": "Talk to a run, or to a bare model.",
    "generate": "Answer a file of prompts.",
    "eval": "Loss and perplexity of a run on held-out rows.",
    "compare": "Base against tuned on held-out rows.",
    "merge": "Merge the adapter into the 16-bit base.",
    "export": "Ship a run: GGUF, Ollama, MLX, vLLM.",
    "serve": "Serve runs by the OpenAI API.",
    "push": "Publish the adapter with its model card.",
    "runs": "A table of the runs in a folder.",
    "explain": "What this run did, from what was measured.",
    "config": "Print the documented defaults as YAML, or a JSON schema.",
    "doctor": "Check this machine and the installed versions.",
    "help": "Show what the documents say of a topic.",
    "completion": "Print what makes a shell complete verbs and flags.",
}


def _speak(ctx: click.Context, param: click.Parameter, lang: Lang | None) -> None:
    if lang is not None:
        ctx.with_resource(spoken(lang))


def _lang_option() -> click.Option:
    """``--lang``, which every verb has; :func:`main` has looked for it before, as mistakes are told in it too."""
    return click.Option(
        ["--lang"],
        type=click.Choice(LANGUAGES),
        help="The language that is spoken; the locale's unless given.",
        callback=_speak,
        expose_value=False,
        is_eager=True,
    )


class _Verbs(click.Group):
    """A group that imports a verb's module only when the verb is called."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"slimtune.cli.{cmd_name}").command
        command.context_class = Context
        if not any(param.name == "lang" for param in command.params):
            command.params.append(_lang_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verbs = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in verbs:
            near = difflib.get_close_matches(args[0], verbs, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such verb {args[0]!r}." + hint, ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, VERBS[verb]) for verb in self.list_commands(ctx)])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="slimtune", prog_name="slimtune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--lang", type=click.Choice(LANGUAGES), callback=_speak, expose_value=False, is_eager=True,
              help="The language that is spoken; the locale's unless given.")  # fmt: skip
@click.pass_context
def slimtune_command(ctx: click.Context, debug: bool) -> None:
    """Fine-tune a chat model in 4 bits on your own GPU.

    \b
    slimtune demo                          see it work, here, without a network
    slimtune train MODEL DATA -o RUN       train a LoRA adapter
    slimtune chat RUN                      talk to the result
    """
    ctx.ensure_object(dict)["debug"] = debug


def main() -> NoReturn:
    """Entry point of the ``slimtune`` command. Ends with the exit codes of :mod:`slimtune.errors`."""
    # Read by the Rust tokenizers when they load; it keeps their fork warning off the screen. Set in the command's own
    # process only, never by importing slimtune.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    debug = "--debug" in sys.argv
    # --debug is understood after the verb as well: people add it to the end of a line that failed.
    arguments = (["--debug"] if debug else []) + [word for word in sys.argv[1:] if word != "--debug"]
    if (lang := _asked_language(arguments)) is not None:
        speak(lang)
    try:
        for word in arguments:
            check_utf8("the argument", word)
        code: Any = slimtune_command.main(
            args=arguments, prog_name="slimtune", standalone_mode=False, obj={"own_process": True}
        )
        sys.exit(code if isinstance(code, int) else 0)
    except SlimtuneError as error:
        end(error, debug=debug)
    except click.ClickException as error:
        _say_usage(error)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__context__, StopRequested):  # a second Ctrl-C, on the way here
            end(error.__context__, debug=debug)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # people press it twice; the process is on its way out
        click.echo(f"\nslimtune: {told('interrupted')}", err=True)
        sys.exit(130)
    except BrokenPipeError:
        nobody_reads()
        sys.exit(0)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the last stop: said in one line, exits 1, --debug shows where
        if debug:
            traceback.print_exc()
        if (refused := by_the_system(error)) is not None:
            say_error(refused)
            sys.exit(refused.exit_code)
        text = str(error).strip().splitlines() or [""]
        what = f"slimtune: {told('internal error')}: {type(error).__name__}: {text[0]}"
        click.echo(coloured(what, fg="red"), err=True)
        say("This is a fault of slimtune's own. `--debug` shows where.", err=True)
        sys.exit(1)


def end(error: SlimtuneError, *, debug: bool) -> NoReturn:
    """Say the error and end with its code; a run that was asked to stop isn't kept from that by another signal."""
    if isinstance(error, StopRequested):
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        end_anyway()
    if debug:
        traceback.print_exc()
    if not error.told:
        say_error(error)
    if error.last is not None:
        error.last()
    sys.exit(error.exit_code)


def nobody_reads() -> None:
    """The reader of standard output (head, less) went away: what is still printed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_error(error: SlimtuneError) -> None:
    """Print an error, or a stop that was asked for: what, its table, rule, way out, each on its own line, at the
    terminal's width broken between words."""
    if isinstance(error, StopRequested):  # what the person asked for is no error
        _say("", error.said(), 2, fg="yellow", bold=True)
    else:
        _say(told("error: "), error.said())


def _say(label: str, texts: Iterable[str], indent: int | None = None, **style: Any) -> None:
    """A label and texts clear of it, each on lines of its own."""
    indent = cells(label) if indent is None else indent
    click.echo(coloured(label, fg="red", bold=True), nl=False, err=True)
    width = terminal_width()
    for number, text in enumerate(filter(None, texts)):
        lines = text.split("\n") if width is None else folded(text, width - indent)
        for at, line in enumerate(lines):
            first = number == at == 0
            click.echo(coloured(line, **style) if first else " " * indent + line, err=True)


def _say_usage(error: click.ClickException) -> None:
    """As click says that a line can't be understood."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        if isinstance(error, click.exceptions.NoArgsIsHelpError) or error.message == "Missing command.":
            click.echo(error.ctx.get_help(), err=True)  # no verb, or --lang alone: no error to a person
            return
        click.echo(error.ctx.get_usage(), err=True)
        say(f"Try '{error.ctx.command_path} --help' for help.", err=True)
        click.echo(err=True)
    _say(told("error: "), [told(error.format_message())])


def _asked_language(words: list[str]) -> Lang | None:
    """What ``--lang`` asks for, wherever it stands, before anything is understood."""
    for at, word in enumerate(words):
        name, _, value = word.partition("=")
        value = value or next(iter(words[at + 1 :]), "")
        if name == "--lang" and value in LANGUAGES:
            return value
    return None


def coloured(text: str, **style: Any) -> str:
    """``text`` in a style of click's, unless NO_COLOR is set (no-color.org), which click doesn't know."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)
