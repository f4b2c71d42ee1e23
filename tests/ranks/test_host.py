"""Weights in RAM are there once for the ranks of a host, and are what each rank would have there."""

from __future__ import annotations

import gc
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtune.base import kept
from slimtune.base.load import load_base
from slimtune.base.quantize import fingerprint
from slimtune.engine.per_layer import keep_in_ram
from slimtune.engine.stored import Place
from slimtune.engine.streamed import move_to_ram
from slimtune.errors import UserError
from slimtune.hardware import detect
from slimtune.ranks.group import Ranks, together
from slimtune.ranks.host import Host, here
from slimtune.ranks.place import Place as RankPlace
from tests.campaigns.campaign import CONTEXT, make_model
from tests.campaigns.ranks import as_rank
from tests.engine.test_streamed import engine_of, make, two_steps


def _rank(rank: int, count: int, port: int, body: str, values: tuple[Any, ...], results: Any) -> None:
    as_rank(rank, count, port)
    try:
        with together(detect, 60.0) as ranks:
            found = globals()[body](rank, *values)
            ranks.told(None)  # all are here until all have looked
    except UserError as error:
        found = "\n".join(error.said())
    results.put((rank, found))


def each_rank(body: str, *values: Any, count: int = 2) -> list[Any]:
    """What a function of this module gives in each of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, count, port, body, values, results)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    return [found[rank] for rank in range(count)]


def common_pages() -> dict[str, int]:
    """Bytes of this process's mappings of RAM that ranks have in common: all of them, and its part of them."""
    sums = {"Rss": 0, "Pss": 0}
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        if "memfd:slimtune" in mapping:
            for name in sums:
                (kib,) = re.findall(rf"^{name}: +(\d+) kB", mapping, flags=re.MULTILINE)
                sums[name] += 1024 * int(kib)
    return sums


def streamed(rank: int) -> dict[str, Any]:
    """Two steps of a model of three layers in RAM, each rank having made it by itself."""
    engine = engine_of(make("qwen2"), 1 << 30)
    gradients = two_steps(engine)
    found = common_pages()
    nbytes = engine.plan.streamed_bytes + engine.plan.embedding_bytes
    here()._ranks.told(None)  # nobody lets go before all have counted
    del engine
    gc.collect()  # modules and their engine hold each other
    return {
        "gradients": gradients.tolist(),
        "bytes": nbytes,
        "sharing": here().sharing,
        "after": common_pages(),
        **found,
    }


def tabled(rank: int) -> dict[str, Any]:
    """A table that no layer but the first reads, which stays in RAM."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(64, 256)
    expected = table(torch.arange(5)).detach().clone()
    keep_in_ram(table)
    found: dict[str, Any] = common_pages() | {"equal": torch.equal(table(torch.arange(5)), expected)}
    here()._ranks.told(None)
    return found | {"bytes": table.weight.nbytes}


def loaded(rank: int, base: str) -> dict[str, Any]:
    """A base that each rank reads from the disk, its linear layers into RAM that they have in common."""
    plain = load_base(base, detect(), compute_dtype="fp32").model
    names = {name for name, each in plain.named_parameters() if hasattr(each, "quant_state")}
    model = load_base(base, detect(), compute_dtype="fp32", in_ram=names).model
    found: dict[str, Any] = common_pages() | {"equal": fingerprint(model) == fingerprint(plain)}
    found["bytes"] = sum(each.nbytes for name, each in model.named_parameters() if name in names)
    here()._ranks.told(None)
    return found


def kept_once(rank: int, base: str, cache: str) -> dict[str, Any]:
    """A base whose 4-bit bytes are kept by whoever is the first on its host, and read by all; then by none, as one
    rank's are damaged."""
    os.environ["XDG_CACHE_HOME"] = cache
    kept.LEAST_BYTES, written, write, agrees = 0, [], kept.Kept.write, kept.Kept.agrees

    def noting(self: kept.Kept, model: Any) -> int:
        written.append(self.folder)
        return write(self, model)

    kept.Kept.write = noting  # type: ignore[method-assign]
    loads = [load_base(base, detect(), compute_dtype="fp32")]
    here()._ranks.told(None)  # it is written
    loads.append(load_base(base, detect(), compute_dtype="fp32"))
    kept.Kept.agrees = lambda self, model: agrees(self, model) and not rank  # type: ignore[method-assign]
    loads.append(load_base(base, detect(), compute_dtype="fp32"))
    return {
        "said": [load.kept for load in loads],
        "written": len(written),
        "equal": len({fingerprint(load.model) for load in loads}) == 1,
    }


def refused(rank: int, base: str) -> None:
    """The second rank's system gives no memory, in the middle of a loader that takes errors down."""
    if rank:
        torch.from_file = failing
    loaded(rank, base)


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("unable to mmap 4096 bytes: Cannot allocate memory (12)")


def odd(rank: int) -> None:
    """The second rank has another weight."""
    held = torch.nn.Linear(8, 8)
    held.weight.data.fill_(rank)
    move_to_ram([Place(held.weight, "data")], torch.device("cpu"), "layers' weights")


def astray(rank: int) -> None:
    """The ranks ask for different things."""
    with here().common(4096 + 4096 * rank, "layers' weights"):
        pass


def test_weights_in_ram_are_there_once_a_host() -> None:
    alone = two_steps(engine_of(make("qwen2"), 0)).tolist()
    found = each_rank("streamed")
    for each in found:
        assert each["gradients"] == alone, "the same to the bit as with resident weights"
        assert each["sharing"] == 2
        assert each["Rss"] >= each["bytes"] > 0
        assert each["Pss"] <= each["Rss"] / 2 + 4096 * 8, "half of it is this rank's"
        assert each["after"]["Rss"] == 0, "it goes with the last tensor over it"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("base")))


def test_a_base_that_is_read_into_ram_is_there_once_a_host(base: str) -> None:
    for each in (*each_rank("loaded", base), *each_rank("tabled")):
        assert not isinstance(each, str), each
        assert each["equal"]
        assert each["Rss"] >= each["bytes"] > 0
        assert each["Pss"] <= each["Rss"] / 2 + 4096 * 8


def test_a_base_is_kept_once_a_host_and_read_by_all_or_none(base: str, tmp_path: Path) -> None:
    first, other = each_rank("kept_once", base, str(tmp_path))
    assert first["equal"]
    assert other["equal"]
    assert (first["written"], other["written"]) == (2, 0), "the second time, as the other rank threw it away"
    assert [said.startswith("its 4-bit bytes were kept") for said in first["said"]] == [False, True, False]
    assert [said.startswith("its 4-bit bytes were kept") for said in other["said"]] == [False, True, False]


def test_what_the_system_refuses_a_rank_while_it_loads_is_said_by_all(base: str) -> None:
    first, other = each_rank("refused", base)
    assert re.fullmatch(r"0\.00GiB of RAM can't be had for the base's weights: unable to mmap .*", other.split("\n")[0])
    assert first == f"rank 1: {other}"


def test_a_rank_that_would_have_other_weights_there_is_refused() -> None:
    first, other = each_rank("odd")
    assert other.startswith("what this rank has for the layers' weights isn't what"), other
    assert first == f"rank 1: {other}"


def test_ranks_that_plan_otherwise_are_refused() -> None:
    for said in each_rank("astray"):
        what, _, row, _ = said.split("\n")
        assert what == "rank 1 isn't like rank 0"
        assert row == "  RAM  4096 bytes for the layers' weights  8192 bytes for the layers' weights"


def test_alone_a_process_has_ram_of_its_own() -> None:
    assert (here().count, here().sharing, here().least("RAM", 7)) == (1, 1, 7)
    with here().common(4096, "tests") as (memory, writes):
        assert memory is None
        assert writes


def test_ranks_of_unlike_hosts_plan_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks on one host and two on another: each counts its own, and all plan with two."""
    boots = ["a", "a", "a", "b", "b"]

    def told(ranks: Ranks, value: Any) -> list[Any]:
        if isinstance(value[0], str):  # the first question: where each is
            return [(boot, *value[1:]) for boot in boots]
        return [(boots.count(boot), True) for boot in boots]

    monkeypatch.setattr(Ranks, "told", told)
    monkeypatch.setattr(Ranks, "left", False)
    hosts = [Host.of(Ranks(RankPlace(rank, 5))) for rank in range(5)]
    assert [host.count for host in hosts] == [3, 3, 3, 2, 2]
    assert [host.sharing for host in hosts] == [2] * 5
