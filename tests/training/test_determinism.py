"""--deterministic sets what makes CUDA repeat, for one run only; on a CPU there is nothing to set."""

from __future__ import annotations

import pytest
import torch

from slimtune.config import Config
from slimtune.errors import UserError
from slimtune.training.determinism import deterministic, fix_workspace

ASKED = Config(deterministic=True)


def switches() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.usefixtures("workspace")
def test_on_cuda_it_is_set_in_the_body_and_undone_after_it() -> None:
    before = switches()
    with deterministic(ASKED, "cuda") as repeats:
        assert repeats
        assert switches() == (True, False, True, False, False)
    assert switches() == before
    with pytest.raises(ZeroDivisionError), deterministic(ASKED, "cuda"):
        raise ZeroDivisionError
    assert switches() == before


@pytest.mark.usefixtures("workspace")
def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    before = switches()
    with pytest.raises(UserError, match="put_ does not have") as refused, deterministic(ASKED, "cuda"):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set …")
    assert "without --deterministic" in str(refused.value)
    with pytest.raises(RuntimeError, match="shape"), deterministic(ASKED, "cuda"):
        raise RuntimeError("a shape is wrong")
    assert switches() == before


@pytest.mark.parametrize(("config", "device", "expected"), [(ASKED, "cpu", True), (Config(), "cuda", False)])
def test_where_nothing_is_to_be_set_nothing_is(config: Config, device: str, expected: bool) -> None:
    before = switches()
    with deterministic(config, device) as repeats:
        assert repeats is expected
        assert switches() == before


def test_a_python_program_without_fixed_workspaces_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is not set"), deterministic(ASKED, "cuda"):
        pass


def test_the_command_fixes_them_for_its_own_process_when_asked() -> None:
    environment: dict[str, str] = {}
    fix_workspace(Config(), environment)
    assert environment == {}
    fix_workspace(ASKED, environment)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    chosen = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    fix_workspace(ASKED, chosen)
    assert chosen == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
