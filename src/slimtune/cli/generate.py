"""``slimtune generate RUN PROMPTS.jsonl -o OUT.jsonl``: answer a file of prompts."""

from __future__ import annotations

from pathlib import Path

import click

from slimtune.cli.early import check_files, check_target
from slimtune.cli.formatting import say
from slimtune.cli.imports import fast_imports
from slimtune.cli.named import PATH_OR_NAME
from slimtune.cli.using import model_options, sampling_options, say_if_slow
from slimtune.errors import UserError

__all__ = ["command"]


def _part(ctx: click.Context, param: click.Parameter, value: str | None) -> slice:
    """Every N-th prompt from the I-th on, so that long and short ones come to all parts alike."""
    place, _, count = (value or "1/1").partition("/")
    if not (place.isdecimal() and count.isdecimal() and 1 <= int(place) <= int(count)):
        raise UserError(f"--part {value}", rule="It is I/N: the I-th of N parts, counted from 1.")
    return slice(int(place) - 1, None, int(count))


@click.command()
@click.argument("target", metavar="RUN", type=PATH_OR_NAME)
@click.argument("prompts", type=PATH_OR_NAME)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="One JSON object a line.")
@click.option("--part", metavar="I/N", callback=_part, help="Answer the I-th of N parts alone, as one of N processes.")
@click.option("--with-base", is_flag=True, help="Ask the base too, and put both replies side by side.")
@model_options
@sampling_options
def command(
    target: str,
    prompts: str,
    output: Path,
    part: slice,
    with_base: bool,
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
    """Answer every prompt of PROMPTS (json, jsonl, csv, tsv, parquet).

    A row is text, or has `prompt`, `messages` or `instruction`, or is a row as training reads it. A run that was
    stopped goes on where it was when the same command is given again.

    On several cards one process a card answers a part of the file, each into a file of its own; every line says by its
    index where its prompt stands in PROMPTS.

    A run is asked with the template variables and the date that it was trained with, a bare model with its
    template's defaults.
    """
    check_target(target)
    check_files(prompts)
    with fast_imports():
        from slimtune.cli.bar import busy, counting
        from slimtune.run.durable import check_writable
        from slimtune.run.quiet import upstream_to_log
        from slimtune.use.answers import answer_file
        from slimtune.use.load import open_model
        from slimtune.use.questions import read_questions
        from slimtune.use.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    questions = read_questions(prompts)
    numbers = range(len(questions))[part]
    questions = questions[part]
    check_writable(output.parent)
    with upstream_to_log(None):
        with busy("loading the model"):
            opened = open_model(
                target, base=base, quantization=quantization, dtype=compute_dtype, trust_remote_code=trust_remote_code
            )
        say_if_slow(opened)
        with counting({"replies": "answering"}) as tell:
            already = answer_file(
                opened,
                questions,
                output,
                sampling,
                with_base=with_base,
                numbers=numbers,
                on_progress=lambda done, total: tell("replies", done, total),
            )
    kept = f" ({already} replies were there already)" if already else ""
    say(f"{len(questions)} prompts answered in {output}{kept}")
