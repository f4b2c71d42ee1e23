"""Every verb where it may not write, where there is no room, and where its home isn't there.

It ends with exit 2 or 3, the file and a way out, and leaves nothing behind that looks whole; what only reads, reads.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.campaigns import campaign
from tests.campaigns.campaign import Process

HERE = "tests.campaigns.test_places"
_CAPABILITIES = 0x20080522
"""The third version of Linux's capability interface."""


def as_anyone(cache: str, temporary: str = "/tmp") -> None:
    """In the verb's process, before it: permissions count, for root too."""
    library = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(header, held) == 0, errno.errorcode[ctypes.get_errno()]
    for at in range(3):
        held[at] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert library.capset(header, held) == 0, errno.errorcode[ctypes.get_errno()]
    os.environ["XDG_CACHE_HOME"], os.environ["TMPDIR"] = cache, temporary


ASK = ("--max-new-tokens", "2")
WRITERS: dict[str, tuple[str, ...]] = {
    "train": ("train", "{model}", "{rows}", "-o", "{place}/new", "--max-steps", "2", *campaign.OPTIONS),
    "generate": ("generate", "{run}", "{asks}", "-o", "{place}/out.jsonl", *ASK),
    "compare": ("compare", "{run}", "{rows}", "-o", "{place}/out", "--no-general", *ASK),
    "merge": ("merge", "{run}", "-o", "{place}/out"),
    "push": ("push", "{run}", "{place}/out"),
    "data": ("data", "{rows}", "--model", "{model}", "--html", "{place}/page.html"),
}
READERS: dict[str, tuple[str, ...]] = {
    "chat": ("chat", "{run}", "--prompt", "Say 3.", *ASK),
    "eval": ("eval", "{run}", "{rows}"),
    "explain": ("explain", "{run}"),
}
FEW = {("train", "read-only"), ("push", "16 kB"), ("merge", "300 kB"), ("eval", "read-only")}
"""What runs without CAMPAIGN=full."""


def cases(verbs: dict[str, tuple[str, ...]], *places: str) -> list[tuple[str, str]]:
    return [(verb, place) for verb in verbs for place in places if campaign.FULL or (verb, place) in FEW]


@pytest.fixture(scope="module")
def words(
    train: Callable[..., list[str]], parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run that is done, and what is asked of it."""
    folder = tmp_path_factory.mktemp("words")
    process = Process(train(folder / "run", "--max-steps", "2", "--engine", "plain"), folder / "log.txt")
    assert process.wait() == 0, process.output()
    (folder / "asks.jsonl").write_text('"Say 3."\n')
    return {"run": folder / "run", "asks": folder / "asks.jsonl", "model": parts[0], "rows": parts[1]}


def run(arguments: tuple[str, ...], words: dict[str, Path], place: Path, log: Path, **values: str) -> tuple[int, str]:
    values = {"cache": str(log.parent / "cache"), **values}
    process = Process([word.format(place=place, **words) for word in arguments], log, f"{HERE}:as_anyone", **values)
    return process.wait(), process.output()


def check(code: int, said: str, *codes: int) -> None:
    assert code in codes, said
    assert "internal error" not in said, said
    assert "Traceback" not in said, said


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A tmpfs of so many kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)],
                              capture_output=True, check=False)  # fmt: skip
        if made.returncode:
            pytest.skip("no tmpfs can be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize(("verb", "place"), cases(WRITERS, "read-only"))
def test_where_it_may_not_write(verb: str, place: str, words: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    code, said = run(WRITERS[verb], words, folder, tmp_path / "log.txt")
    check(code, said, 2)
    assert str(folder) in "".join(said.split())
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("verb", "place"), cases(WRITERS, "16 kB", "100 kB", "300 kB"))
def test_where_there_is_no_room(
    verb: str, place: str, words: dict[str, Path], disk: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = disk(int(place.split()[0]))
    code, said = run(WRITERS[verb], words, folder, tmp_path / "log.txt")
    check(code, said, 0, 2, 3)
    if code:
        left = {path.name for path in folder.iterdir()}
        assert left <= ({"new"} if verb == "train" else {"out.jsonl.partial"} if verb == "generate" else {"out"}), left
        assert not [path for path in folder.glob("out/*") if verb != "compare" or path.name != "compare.html"]
        assert not (folder / "new" / "adapter").exists()
    elif verb == "compare":
        assert json.loads((folder / "out" / "compare.json").read_text())["numbers"]


@pytest.mark.parametrize(("verb", "place"), cases(READERS, "read-only"))
def test_a_run_of_somebody_elses_is_read(verb: str, place: str, words: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(words["run"], tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    subprocess.run(["chmod", "-R", "a-w", str(tmp_path / "run")], check=True)
    code, said = run(READERS[verb], {**words, "run": tmp_path / "run"}, tmp_path, tmp_path / "log.txt")
    subprocess.run(["chmod", "-R", "u+w", str(tmp_path / "run")], check=True)
    check(code, said, 0)
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.skipif(not campaign.FULL, reason="some minutes")
@pytest.mark.parametrize("verb", [*WRITERS, *READERS])
def test_a_home_that_cannot_be_written(verb: str, words: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    seen = Counter[int]()
    for cache, temporary in (("locked", "."), ("log.txt", "."), ("cache", "locked"), ("cache", "absent")):
        place = tmp_path / "place"
        place.mkdir()
        code, said = run({**WRITERS, **READERS}[verb], words, place, tmp_path / "log.txt",
                         cache=str(tmp_path / cache), temporary=str(tmp_path / temporary))  # fmt: skip
        check(code, said, 0, 2)
        seen[code] += 1
        shutil.rmtree(place)
        (tmp_path / "log.txt").unlink()
    assert seen[0] >= 2
