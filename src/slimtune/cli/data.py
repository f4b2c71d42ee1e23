"""``slimtune data DATA… --model MODEL``: the proof that ``train`` runs first, and what it found."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from slimtune.cli.early import check_files
from slimtune.cli.hub import check_model
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.cli.options import config_from_flags, some_config_options
from slimtune.errors import UserError, written_out
from slimtune.run.durable import replace_file
from slimtune.words import told

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.data.packing import MicroBatches
    from slimtune.data.view import Sample
    from slimtune.plan import Choice

__all__ = ["command"]

_SHOWN_CHARACTERS = 1500


def _is_model(folder: Path) -> bool:
    """Whether a model with its tokenizer lies there."""
    tokenizers = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in tokenizers)


@click.command()
@click.argument("data", nargs=-1, type=PATH_OR_NAME)
@click.option("--model", help="The model whose tokenizer and chat template are used  [Qwen/Qwen1.5-1.8B-Chat]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), help="Write what was found as a page.")
@click.option(
    "--ledger", "ledger_file", type=click.Path(path_type=Path), help="Write the account of every changed row."
)
@some_config_options(
    "revision", "trust_remote_code", "format", "map", "prefer", "template", "add_tokens", "template_vars", "date",
    "max_length", "overlong", "train_on", "packing", "micro_batch", "pack_tokens", "gradient_accumulation", "epochs",
    "max_steps", "allow_control_tokens", "max_dropped", "eval", "eval_share", "seed",
)  # fmt: skip
def command(
    data: tuple[str, ...],
    model: str | None,
    as_json: bool,
    html_file: Path | None,
    ledger_file: Path | None,
    config_file: Path | None,
    **flags: Any,
) -> None:
    """Prove DATA row by row and show what the model will see.

    DATA is one or more files (json, jsonl, csv, tsv, txt, parquet, arrow, each also .gz or .zst), folders, patterns,
    hub ids (owner/name:split), or - for standard input. FILE#500 takes a seeded sample, FILE*2 counts a file twice.
    Exits with 2 if training on it would be refused.
    """
    config = config_from_flags(config_file, {"model": model, "data": data, **flags})
    if not config.data:
        raise UserError("no data given", way_out="slimtune data DATA --model MODEL")
    for name in config.data:
        if _is_model(Path(name).expanduser()):
            raise UserError(f"data {name} is a folder without rows", way_out=f"That is a model: --model {name}")

    check_files(*config.data, *config.eval)
    check_model(config.model)

    # Here, as they load torch, and --help is to answer at once.
    with fast_imports():
        from rich.console import Console

        from slimtune.base.tokenizer import remarks
        from slimtune.base.vocabulary import tokenizer_of
        from slimtune.cli.page import Page
        from slimtune.data.packing import micro_batches
        from slimtune.data.page import page
        from slimtune.data.preflight import examine
        from slimtune.data.render import Manner, renderer_for
        from slimtune.data.stdin import keep_stdin
        from slimtune.data.view import hints, sample, summary, table
        from slimtune.plan import few_steps, resolve_amount, resolve_held_out, resolve_steps, steps_of_run
        from slimtune.run.lines import rehearsed_line, steps_line
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.rehearse import expected

    errors, named = Console(stderr=True, highlight=False), config.data
    reading = errors.status("  " + told("reading the tokenizer"))
    with TemporaryDirectory() as folder, upstream_to_log(None), reading as status:
        config = keep_stdin(config, Path(folder))
        tokenizer = tokenizer_of(config)
        proof = examine(config, tokenizer, on_progress=lambda rows: status.update("  " + told(f"{rows:,} rows")))
        batches: MicroBatches | None = None
        amount: list[Choice] = []
        if len(proof.train):
            config, _ = resolve_held_out(config, proof.share, proof.different_rows)
            config, amount = resolve_amount(config, proof.train, proof.eval)
            batches = micro_batches(proof.train, config)
    shown = sample(proof.train, tokenizer)
    variables = renderer_for(tokenizer, Manner.of(config)).variables
    lines, said = table(proof, config, batches), [*remarks(tokenizer), *hints(proof, config, variables)]
    if batches is not None:
        answers, per_epoch = expected(config, batches)
        decided, _ = resolve_steps(config, per_epoch, proof.eval_work)
        steps = steps_of_run(config, per_epoch)
        lines.append(("steps", steps_line(steps, decided, evaluates=proof.eval is not None)))
        lines += [("rehearse", rehearsed_line(answers))] if answers else []
        lines += [("chosen", f"{choice.key} {choice.value:g}: {told(choice.reason)}") for choice in amount]
        if (line := few_steps(config, per_epoch, proof.train)) is not None:
            said.append(f"{line}.")
    refusal = proof.refusal
    if ledger_file is not None:
        _write(ledger_file, proof.ledger.read_text(encoding="utf-8"))
    if html_file is not None:
        title = told(f"Data: {', '.join(named)}")
        _write(
            html_file,
            page(
                title, None if refusal is None else "\n".join(map(told, str(refusal).split("\n"))), lines, said, shown
            ),
        )
    if as_json:
        click.echo(json.dumps(summary(proof, batches, shown, said), ensure_ascii=False, indent=2))
    else:
        _show(Page(), named, lines, said, shown, refused=refusal is not None)
    if refusal is not None:
        raise refusal


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}", way_out="Choose another file.") from None


def _show(
    console: Console,
    data: tuple[str, ...],
    lines: list[tuple[str, str]],
    said: list[str],
    shown: Sample | None,
    *,
    refused: bool,
) -> None:
    from rich.padding import Padding
    from rich.table import Table

    from slimtune.cli.page import Prose

    console.print(Prose(written_out(", ".join(data)), style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    styles = {"dropped": "yellow", "repaired": "cyan"}
    for label, text in lines:
        grid.add_row(told(label), Prose(written_out(told(text)), style=styles.get(label.removeprefix("eval "), "")))
    console.print(Padding(grid, (0, 0, 0, 2)))
    for hint in said:
        console.print(Prose(f"  {told('look: ')}{written_out(told(hint))}", style="yellow"))
    if shown is None:
        return
    console.print()
    legend = Prose(told(f"One conversation, as the model sees it ({written_out(shown.place)}); "))
    legend.append(told("what is learnt is green"), style="bold green")
    console.print(legend)
    body = Prose()
    for segment in shown.segments:
        body.append(written_out(_shortened(segment.text)), style="bold green" if segment.supervised else "dim")
    console.print(Padding(body, (0, 0, 0, 2)))
    if not refused:
        console.print(Prose(told("Every row is accounted for; training may begin."), style="green"))


def _shortened(text: str) -> str:
    """A long text without its middle."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
