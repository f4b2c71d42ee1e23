from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from slimtune.adapter.passport import Passport, read_passport, template_hash, tokenizer_hash
from slimtune.base.embedded import EMBEDDED
from slimtune.base.quantize import keep_trainable_layout
from slimtune.base.tokenizer import save_tokenizer
from slimtune.errors import UserError
from slimtune.use.load import Found, Opened, find, turn_ends
from tests.data.tokenizers import BUILT
from tests.families.tiny import made
from tests.families.tiny import tokenizer as byte_tokenizer


@pytest.fixture
def moved(model_folder: Path, tmp_path: Path) -> Path:
    """The base, at another place."""
    return Path(shutil.copytree(model_folder, tmp_path / "elsewhere"))


def test_bare_model_run_and_adapter_are_found(adapter: Path, model_folder: Path) -> None:
    bare = find(EMBEDDED)
    assert (bare.base, bare.adapter, bare.passport) == (model_folder, None, None)
    for target in (adapter, adapter.parent):
        found = find(str(target))
        assert (found.base, found.adapter) == (model_folder, adapter)
        assert found.passport == read_passport(adapter)


def test_a_moved_base_is_accepted_by_its_fingerprint(adapter: Path, moved: Path) -> None:
    assert find(str(adapter), base=str(moved)).base == moved


def test_another_base_is_refused_and_the_right_one_named(adapter: Path, moved: Path) -> None:
    tensors = load_file(moved / "model.safetensors")
    name = "model.layers.7.mlp.up_proj.weight"
    tensors[name].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the base") as error:
        find(str(adapter), base=str(moved))
    assert EMBEDDED in error.value.rule
    assert "--base" in error.value.way_out


def test_a_base_that_is_gone_is_named_with_the_way_out(plain_adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain_adapter, tmp_path / "adapter"))
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gone does not exist") as error:
        find(str(copy))
    assert "--base PATH" in error.value.way_out


def test_a_run_without_an_adapter_is_sent_to_resume(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: smollm2-135m\n")
    with pytest.raises(UserError, match="no adapter yet") as error:
        find(str(tmp_path))
    assert "slimtune resume" in error.value.way_out


def test_a_swapped_template_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "helpless"))
    with pytest.raises(UserError, match=r"chat template .* is not the one"):
        find(str(copy)).tokenizer()


def test_a_passport_from_another_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    passport = json.loads((copy / "passport.json").read_text())
    (copy / "passport.json").write_text(json.dumps({**passport, "base": "other/model"}))
    with pytest.raises(UserError, match="does not belong to the weights"):
        find(str(copy))


def test_stamping_keeps_every_value(adapter: Path, plain_adapter: Path) -> None:
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (plain_adapter, adapter))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_opened_answers_as_plain_peft_does_on_the_4_bit_base(opened: Opened, adapter: Path, model_folder: Path) -> None:
    """Plain PEFT loads the stamped adapter; unpacking the 4-bit values once changes no number."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    keep_trainable_layout(base)  # on some CPUs bitsandbytes would round the scales to bf16 for its own kernel
    plain = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([opened.prompt_ids([{"role": "user", "content": "What is 2 + 2?"}])])
    with torch.inference_mode():
        mine, theirs = opened.model(ids.to(opened.device)).logits.cpu(), plain(ids.to(plain.device)).logits.cpu()
        assert torch.equal(mine, theirs)
        with opened.as_base(), plain.disable_adapter():
            bare = opened.model(ids.to(opened.device)).logits.cpu()
            assert torch.equal(bare, plain(ids.to(plain.device)).logits.cpu())
    assert not torch.allclose(mine, bare, atol=0.1)


def test_an_adapter_with_the_bases_own_biases_isnt_switched_off() -> None:
    model = get_peft_model(made("qwen2"), LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj").bias.add_(1.0)
    opened = Opened(Found("run", Path("base"), Path("adapter"), None), model, byte_tokenizer(), (2,))
    with pytest.raises(UserError, match="holds biases of the base itself"), opened.as_base():
        pass


def test_the_turns_end_stops_a_model_whose_config_does_not_know_it(
    opened: Opened, tokenizer: PreTrainedTokenizerBase
) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_ends(tokenizer)[0] == end
    assert end in opened.stop_ids


def test_where_an_old_passport_cant_see_what_saving_lost_the_bases_own_tokenizer_is_taken(tmp_path: Path) -> None:
    trained = BUILT["llama, legacy"].make()
    save_tokenizer(trained, tmp_path / "base")
    trained.save_pretrained(tmp_path / "adapter")  # as slimtune once did: without `legacy`
    copy = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    text = "<s>it"
    assert copy(text).input_ids != trained(text).input_ids
    old = tokenizer_hash(trained, like="")
    passport = Passport("base", None, "f" * 64, {}, old, template_hash(trained), {})
    found = Found("run", tmp_path / "base", tmp_path / "adapter", passport)
    assert found.tokenizer()(text).input_ids == trained(text).input_ids
