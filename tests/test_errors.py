"""What a disk refuses is the person's to mend, whoever says it; all else stays a fault."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import zeros

from slimtune.config import Config
from slimtune.data.files import find_files
from slimtune.errors import UserError, by_the_system, check_utf8, is_panic


@pytest.mark.parametrize(
    ("error", "what", "way_out"),
    [
        (OSError(errno.ENOSPC, "No space left", "a.txt"), "a.txt: No space left", "Make room"),
        (OSError(errno.ENOSPC, "No space left"), "a file can't be written: No space left", "Make room"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "a.txt: Permission denied", "whose it is"),
        (OSError(errno.EROFS, "Read-only", "a.txt"), "a.txt: Read-only", "whose it is"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "a: File name too long", "Check the path"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files", "ulimit"),
        (Exception("No space left on device (os error 28)"), "No space left on device", "Make room"),
    ],
)
def test_a_refusal_of_the_system_is_told_with_its_way_out(error: Exception, what: str, way_out: str) -> None:
    told = by_the_system(error)
    assert told is not None
    assert what in told.what
    assert way_out in told.way_out


@pytest.mark.parametrize(
    "error",
    [ValueError("28"), KeyError("errno"), FileNotFoundError(errno.ENOENT, "No such file", "a"),
     ConnectionRefusedError(errno.ECONNREFUSED, "refused"), PermissionError(errno.EPERM, "not permitted")],
)  # fmt: skip
def test_what_is_no_refusal_stays_a_fault(error: Exception) -> None:
    assert by_the_system(error) is None


def test_what_rust_says_of_a_disk_is_understood(tmp_path: Path) -> None:
    too_long = str(tmp_path / ("x" * 300))
    with pytest.raises(Exception, match="too long") as safetensors:
        save_file({"a": zeros(3)}, too_long)
    with pytest.raises(Exception, match="too long") as tokenizers:
        Tokenizer(models.BPE({"a": 0}, [])).save(too_long)
    for raised in (safetensors.value, tokenizers.value):
        assert by_the_system(raised) is not None, repr(raised)


def test_a_panic_is_known() -> None:
    slow = Tokenizer(models.BPE({"a": 0}, []))
    slow.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(BaseException, match="retry-limit") as caught:
        slow.encode("a" * 40 + "!")
    assert is_panic(caught.value)
    assert not is_panic(KeyboardInterrupt())


def test_a_name_that_is_no_utf8_is_refused_in_words_that_can_be_printed(tmp_path: Path) -> None:
    check_utf8("the argument", "/données/café.jsonl")
    odd = os.fsdecode(b"caf\xe9.jsonl")
    with pytest.raises(UserError, match="is no UTF-8") as refused:
        check_utf8("the argument", odd)
    assert str(refused.value).encode()
    with pytest.raises(UserError, match=r"output .* is no UTF-8"):
        Config.make(output=tmp_path / odd)
    (tmp_path / odd).write_text("{}")
    with pytest.raises(UserError, match=r"the data file .* is no UTF-8"):
        find_files(str(tmp_path))
