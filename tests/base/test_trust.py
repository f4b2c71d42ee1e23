"""Forty-five hostile folders, checkpoints and templates: nothing of them runs, nothing outside of them is read or
written, each is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from slimtune.adapter.files import attach_adapter
from slimtune.adapter.settings import adapter_config
from slimtune.base.load import load_base
from slimtune.base.tokenizer import load_tokenizer
from slimtune.base.trust import check_model_folder
from slimtune.data.template import ChatTemplate, TemplateRefused
from slimtune.errors import UserError
from slimtune.hardware import Hardware
from slimtune.run.durable import DamagedError, atomic_folder, write_file
from slimtune.run.folder import RunFolder
from slimtune.training.checkpoint import Checkpoints, read_checkpoint
from tests.families.tiny import made


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that only hostile code would make."""
    return tmp_path / "it-ran"


@pytest.fixture
def model(tmp_path: Path, model_folder: Path) -> Path:
    """A copy of a good model folder to spoil; the weights are linked to inside the copy's own folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.suffix == ".safetensors":
            os.link(file, folder / file.name)
        else:
            shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


def module_in(folder: Path, mark: Path) -> None:
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: ...\n"
    (folder / "evil.py").write_text(code)


def pickled(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(mark)))


def only_pickles(name: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, mark: Path) -> None:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        pickled(folder / name, mark)

    return spoil


def link(name: str, target: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, mark: Path) -> None:
        (folder.parent / "secret").write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def field(file: str, **values: Any) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, mark: Path) -> None:
        module_in(folder, mark)
        edit(folder / file, **values)

    return spoil


def index(shard: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, mark: Path) -> None:
        (folder / "model.safetensors").unlink()
        pickled(folder / "evil.bin", mark)
        edit(folder / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": shard})

    return spoil


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "pickle pytorch_model.bin": only_pickles("pytorch_model.bin"),
    "pickle model.pt": only_pickles("model.pt"),
    "pickle consolidated.pth": only_pickles("consolidated.pth"),
    "auto_map in config": field(
        "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    ),
    "auto_map of another repository": field(
        "config.json", auto_map={"AutoModelForCausalLM": "someone/else--evil.Evil"}
    ),
    "auto_map in tokenizer config": field("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    "auto_map in processor config": field("processor_config.json", auto_map={"AutoProcessor": "evil.Evil"}),
    "auto_map deep inside": field("config.json", text_config={"auto_map": {"AutoConfig": "evil.Evil"}}),
    "custom pipeline": field("config.json", custom_pipelines={"x": {"impl": "evil.Evil", "pt": ["Evil"]}}),
    "attention from the hub": field("config.json", attn_implementation="someone/evil-attention"),
    "attention from the hub, internal": field("config.json", _attn_implementation="someone/evil@main:attend"),
    "attention by package": field("config.json", _attn_implementation_internal="flash_attention_2"),
    "experts from the hub": field("config.json", experts_implementation="someone/evil-experts"),
    "kernel config": field("config.json", kernel_config={"kernel_mapping": {"RMSNorm": "someone/evil:Norm"}}),
    "use kernels": field("config.json", use_kernels=True),
    "config links out": link("config.json", "../secret"),
    "tokenizer links out": link("tokenizer.json", "/etc/hostname"),
    "chat template links out": link("chat_template.jinja", "/etc/passwd"),
    "folder links out": link("additional_chat_templates", "/etc"),
    "dangling link": link("special_tokens_map.json", "nowhere"),
    "shard by ..": index("../secret"),
    "shard by absolute path": index("/etc/hostname"),
    "shard is a pickle": index("evil.bin"),
    "tokenizer file outside": field("tokenizer_config.json", vocab_file="../../../etc/passwd"),
    "tokenizer file absolute": field("tokenizer_config.json", tokenizer_file="/etc/passwd"),
    "a pipe": lambda folder, mark: os.mkfifo(folder / "generation_config.json.pipe"),
    "nested JSON": lambda folder, mark: (folder / "added.json").write_text("[" * 200_000) and None,
}
ADAPTERS: dict[str, Callable[[Path, Path], None]] = {
    "pickle adapter": only_pickles("adapter_model.bin"),
    "auto_mapping": field("adapter_config.json", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}),
    "auto_mapping of a model's code": field(
        "adapter_config.json", auto_mapping={"parent_library": "transformers_modules.evil"}
    ),
    "auto_mapping by a path": field("adapter_config.json", auto_mapping={"parent_library": "transformers.x/../evil"}),
    "megatron core": field("adapter_config.json", megatron_config={"x": 1}, megatron_core="evil"),
    "megatron core alone": field("adapter_config.json", megatron_core="evil"),
    "another adapter kind": field("adapter_config.json", peft_type="PROMPT_TUNING"),
    "weights link out": link("adapter_model.safetensors", "/etc/hostname"),
    "config links out": link("adapter_config.json", "../secret"),
}
TEMPLATES: dict[str, str] = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "huge product": "{{ 'x' * 10000000000 }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "recursive macro": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) }}{% endmacro %}{{ f(500) }}",
    "padding": "{{ '%1000000000d' % 1 }}",
    "escape by subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape by globals": "{{ cycler.__init__.__globals__.os.system('touch it-ran') }}",
    "escape by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_folder_is_refused(
    name: str, model: Path, mark: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(model))  # as a working folder with the model's files in it would be
    MODELS[name](model, mark)
    with pytest.raises(UserError) as refused:
        load_base(str(model), hardware, compute_dtype="fp32")
    assert str(model) in str(refused.value)
    assert not mark.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_folder_is_refused(
    name: str, adapter: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(adapter))
    ADAPTERS[name](adapter, mark)
    for use in (adapter_config, lambda folder: attach_adapter(torch.nn.Module(), folder)):
        with pytest.raises(UserError) as refused:
            use(adapter)
        assert str(adapter) in str(refused.value)
    assert not mark.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_bounded_in_time_and_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(TemplateRefused):
        ChatTemplate(TEMPLATES[name], {}).render(
            [{"role": "user", "content": "hello"}], None, add_generation_prompt=True
        )
    assert time.monotonic() - started < 60  # a bound, not a speed: without one none of these would end
    assert not (tmp_path / "it-ran").exists()


def test_a_checkpoint_with_a_link_or_a_pickle_is_not_taken(tmp_path: Path, mark: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with atomic_folder(checkpoints.path(1)) as folder:
        write_file(folder / "optimizer.pt", pickle.dumps(Bomb(mark)))
    assert checkpoints.newest_valid() == checkpoints.path(1)
    assert read_checkpoint(checkpoints.path(1)).tensors == {}  # it is no safetensors file, so it isn't read
    (checkpoints.path(1) / "state.json").symlink_to("/etc/hostname")
    assert checkpoints.newest_valid() is None
    assert not mark.exists()


def test_a_damaged_tensor_file_in_a_whole_checkpoint_is_refused(tmp_path: Path, mark: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with atomic_folder(checkpoints.path(1)) as folder:
        write_file(folder / "optimizer.safetensors", pickle.dumps(Bomb(mark)))
    with pytest.raises(DamagedError, match="optimizer"):
        read_checkpoint(checkpoints.path(1))
    assert not mark.exists()


def test_a_run_cannot_ask_for_remote_code(tmp_path: Path) -> None:
    from slimtune.recipes import resume

    run = RunFolder(tmp_path)
    run.write_config(run_config := __import__("slimtune").Config(trust_remote_code=True, data=("x.jsonl",)))
    assert run_config.trust_remote_code
    with pytest.raises(UserError, match="trust-remote-code"):
        resume(tmp_path)


def test_a_good_folder_is_taken(model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert load_tokenizer(str(model)).get_vocab() == tokenizer.get_vocab()


def test_an_adapter_that_peft_saves_without_a_task_is_taken(tmp_path: Path) -> None:
    """PEFT then names the base's class, as Unsloth's adapters do: Transformers' own, which comes with no adapter."""
    wrapped = get_peft_model(made("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["auto_mapping"]["parent_library"] == "transformers.models.llama.modeling_llama"
    attached = attach_adapter(made("llama"), tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(attached.eval()(ids).logits, wrapped.eval()(ids).logits)


def test_a_folder_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        check_model_folder(tmp_path / "checkpoint-5")


def test_the_hub_caches_links_are_no_way_out(tmp_path: Path, model: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in model.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    check_model_folder(snapshot)
