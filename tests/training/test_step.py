"""The real trainer's first step, family by family, held against plain Transformers and PEFT, document by document."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from slimtune.batch import MicroBatch
from slimtune.config import Config
from slimtune.data.packing import micro_batches
from slimtune.data.preflight import prove
from slimtune.engine import Engine
from slimtune.engine.attention import Documents
from slimtune.engine.inputs import Inputs, ShapeKey
from slimtune.errors import UserError
from slimtune.recipes import finetune
from slimtune.run.folder import RunFolder
from slimtune.training.resumable import Progress
from slimtune.words import in_chinese
from tests.families.tiny import save
from tests.tolerances import relative_error
from tests.training.tiny import saved

TARGETS = {"gpt2": ("c_attn", "c_proj"), "granitemoe": ("q_proj", "v_proj"), "llama4_text": ("q_proj", "o_proj")}
GRADIENT = 1e-4
"""fp32: sums of a few thousand terms in another order."""


@pytest.fixture(scope="module")
def words(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer and template with a few hundred tokens of its own: a head that takes no time."""
    texts = [f"Say word{number}. <|im_start|>user assistant system<|im_end|>" for number in range(31)]
    small: Any = tokenizer.train_new_from_iterator(texts, vocab_size=400)
    return small


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows whose replies have 1 to 60 words: micro-batches with very different numbers of supervised tokens."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [("one", 1), ("two", 60), ("three", 2), ("four", 40), ("five", 3), ("six", 9)]
    with file.open("w", encoding="utf-8") as lines:
        for name, words in rows:
            reply = " ".join(f"word{(7 * at + words) % 31}" for at in range(words))
            turns = [{"role": "user", "content": f"Say {name}."}, {"role": "assistant", "content": reply}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return file


def first_step(model: Path, chats: Path, output: Path, **settings: Any) -> tuple[RunFolder, Config]:
    """One step of plain gradient descent at rate 1, not clipped: a B that was zero is minus its gradient."""
    chosen: dict[str, Any] = {
        "model": str(model), "data": str(chats), "output": output, "quantization": "none", "compute_dtype": "fp32",
        "packing": False, "max_length": 256, "micro_batch": 2, "gradient_accumulation": 2, "max_steps": 1,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler": "constant", "warmup": 0.0, "max_grad_norm": 1e9,
        "lora_dropout": 0.0, "watchdog": 0.0,
    }  # fmt: skip
    config = Config.make(**{**chosen, **settings})
    return finetune(config), config


def expected(
    model: Path, run: RunFolder, config: Config, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Each B's gradient of the first window, by PEFT alone: every document by itself, the window's tokens alike."""
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    # Transformers 5.17 takes SDPA for Gemma 2, which leaves out the cap on its scores.
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    lora = LoraConfig.from_pretrained(str(run.adapter))
    lora.inference_mode = False
    wrapped: Any = get_peft_model(base, lora).eval()
    parameters = {name.replace(".default", ""): p for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_A" in name:
                parameter.copy_(adapter[name])
            elif "lora_B" in name:
                parameter.zero_()
    data = micro_batches(prove(config, tokenizer).train, config)
    window = [int(member) for at in range(config.gradient_accumulation) for member in data.members(at)]
    supervised = sum(int(data.documents[at][1][1:].sum()) for at in window)
    for at in window:
        ids, mask = (torch.tensor(part) for part in data.documents[at])
        logits = wrapped(input_ids=ids[None].long(), use_cache=False).logits[0, :-1]
        lost = functional.cross_entropy(logits.float(), ids[1:].long(), reduction="none")
        (lost[mask[1:].bool()].sum() / supervised).backward()
    return {name: parameter.grad for name, parameter in parameters.items() if "lora_B" in name}


@pytest.mark.parametrize(
    "family",
    [
        "llama", "granite", "granitemoe", "cohere2", "gemma2", "gemma4_text", "llama4_text", "qwen3_moe", "gpt2",
        "recurrent_gemma",  # whose soft cap TRL's head doesn't know: it hardly moves the loss of so small a model
    ],
)  # fmt: skip
def test_a_window_is_one_mean_over_its_tokens_by_the_models_own_logits(
    family: str, chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    model = saved(tmp_path / family, family, words)
    targets = TARGETS.get(family, ("q_proj", "k_proj", "v_proj", "o_proj"))
    run, config = first_step(model, chats, tmp_path / "run", targets=targets)
    trained = load_file(run.adapter / "adapter_model.safetensors")
    gradients = expected(model, run, config, words)
    assert gradients
    for name, gradient in gradients.items():
        assert relative_error(-trained[name], gradient) <= GRADIENT, name


def test_in_pieces_a_window_is_the_same_mean(
    chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults: Any = Progress.__init__.__defaults__
    monkeypatch.setattr(Progress.__init__, "__defaults__", (2, *defaults[1:]))  # as after memory ran out
    model = saved(tmp_path / "model", "gemma4_text", words)
    run, config = first_step(model, chats, tmp_path / "run")
    trained = load_file(run.adapter / "adapter_model.safetensors")
    for name, gradient in expected(model, run, config, words).items():
        assert relative_error(-trained[name], gradient) <= GRADIENT, name


@pytest.mark.parametrize("family", ["llama", "gemma4_text", "llama4_text"])
def test_the_evaluations_loss_is_one_mean_over_its_tokens(
    family: str, chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    model = saved(tmp_path / "model", family, words)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(chats.read_text().replace("Say", "word1"))
    still = {"eval": str(held_out), "learning_rate": 1e-6, "eval_steps": 1, "targets": ("q_proj",)}
    run, config = first_step(model, chats, tmp_path / "run", **still)
    told, after = (record["eval_loss"] for record in run.metrics() if "eval_loss" in record)
    assert after == pytest.approx(told, rel=1e-4)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lost, tokens = 0.0, 0
    for row in prove(config, words).eval or ():
        ids, mask = (torch.tensor(part) for part in row)
        with torch.no_grad():
            logits = base(input_ids=ids[None].long()).logits[0, :-1]
        each = functional.cross_entropy(logits, ids[1:].long(), reduction="none")[mask[1:].bool()]
        lost, tokens = lost + float(each.sum()), tokens + len(each)
    assert told == pytest.approx(lost / tokens, rel=1e-4)


def test_the_routers_loss_is_added_only_when_asked_for(
    chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    model = saved(tmp_path / "model", "qwen3_moe", words, router_aux_loss_coef=0.5, output_router_logits=True)
    losses = {}
    for weight in (None, 0.5):
        run, _ = first_step(model, chats, tmp_path / f"run-{weight}", router_aux_loss=weight, targets=("q_proj",))
        losses[weight] = first_loss(run)
    # Perfectly balanced, Switch Transformer's loss is the number of experts a token takes (2); 0.5 x at least that.
    assert losses[0.5] - losses[None] > 0.9
    with pytest.raises(UserError, match="router_aux_loss"):
        first_step(saved(tmp_path / "dense", "llama", words), chats, tmp_path / "run", router_aux_loss=0.1)


def first_loss(run: RunFolder) -> float:
    return float(next(record["loss"] for record in run.metrics() if "loss" in record))


def test_logits_that_trls_head_doesnt_know_of_train_by_the_models_own_head(
    chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlamaForCausalLM.forward

    @functools.wraps(own)
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 3.0
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    model = saved(tmp_path / "model", "llama", words)
    run, config = first_step(model, chats, tmp_path / "run")
    trained = load_file(run.adapter / "adapter_model.safetensors")
    for name, gradient in expected(model, run, config, words).items():
        assert relative_error(-trained[name], gradient) <= GRADIENT, name
    assert "TRL's gives a loss of" in run.read_json(run.facts_file)["training"]["own_head"]


def test_an_adapter_on_the_head_is_refused_and_a_copy_of_it_trains(
    chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    model = saved(tmp_path / "model", "llama", words)
    with pytest.raises(UserError, match="lm_head") as refused:
        first_step(model, chats, tmp_path / "run", targets=("q_proj", "lm_head"))
    assert "--modules-to-save lm_head" in refused.value.way_out
    run, config = first_step(model, chats, tmp_path / "run", targets=("q_proj",), modules_to_save=("lm_head",))
    trained = load_file(run.adapter / "adapter_model.safetensors")
    for name, gradient in expected(model, run, config, words).items():
        assert relative_error(-trained[name], gradient) <= GRADIENT, name


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ({"attention_dropout": 0.1}, {}, "dropout on attention weights"),
        ({}, {"targets": ("q_proj", "embed_tokens")}, "no adapter on model.embed_tokens"),
    ],
    ids=["attention dropout", "the embedding"],
)
def test_what_the_engine_doesnt_take_trains_on_the_plain_stack(
    architecture: dict[str, Any],
    settings: dict[str, Any],
    reason: str,
    chats: Path,
    tmp_path: Path,
    words: PreTrainedTokenizerBase,
) -> None:
    model = saved(tmp_path / "model", "llama", words, **architecture)
    adamw = {"optim": "adamw_8bit", "learning_rate": 1e-3, "max_steps": 2, **settings}
    run, _ = first_step(model, chats, tmp_path / "run", **adamw)
    training = run.read_json(run.facts_file)["training"]
    assert training["engine"].startswith("plain: ")
    assert reason in training["engine"]
    assert training["without_gradient"] == []
    if architecture:  # asked for, it is refused by the config alone, before the data is read
        with pytest.raises(UserError, match=reason):
            first_step(model, tmp_path / "no such file.jsonl", tmp_path / "none", engine="fused", **adamw)


def mixed(self: Inputs, micro: MicroBatch, key: ShapeKey) -> Documents:
    """All documents of a pack as one."""
    ends = torch.tensor([0, micro.tokens], dtype=torch.int32)
    return Documents((micro.tokens,), ends, micro.tokens)


right_gradients = Engine.upper_gradients


def too_small(self: Engine, batch: dict[str, Any]) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    return [(parameter, 0.97 * gradient) for parameter, gradient in right_gradients(self, batch)]


def broken(self: Engine, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("owner", "method", "replaced", "reason"),
    [
        (Inputs, "documents", mixed, "the engine's loss on a document in a pack"),
        (Engine, "upper_gradients", too_small, "the engine's gradient of model.layers"),
        (Engine, "evaluate", broken, r"can't compute a document in a pack \(RuntimeError: no such kernel\)"),
    ],
)
def test_an_engine_that_isnt_the_model_is_found_before_the_first_step_and_the_plain_stack_trains(
    owner: Any, method: str, replaced: Any, reason: str,
    chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = saved(tmp_path / "model", "llama", words)
    adamw = {"optim": "adamw_8bit", "packing": True, "micro_batch": 1, "learning_rate": 1e-3}
    run, _ = first_step(model, chats, tmp_path / "run", **adamw)
    assert run.read_json(run.facts_file)["training"]["engine"] == "fused"
    plain, _ = first_step(model, chats, tmp_path / "plain", engine="plain", **adamw)

    monkeypatch.setattr(owner, method, replaced)
    with pytest.raises(UserError, match=reason):
        first_step(model, chats, tmp_path / "asked for", engine="fused", **adamw)
    assert not (tmp_path / "asked for").exists()
    fallen, _ = first_step(model, chats, tmp_path / "fallen", **adamw)
    facts, config = fallen.read_json(fallen.facts_file), fallen.config()
    assert (config.engine, config.layout) == ("plain", "packed")
    assert re.match(f"plain: .*{reason}", facts["training"]["engine"])
    (choice,) = [choice for choice in facts["choices"] if choice["key"] == "engine"]
    assert choice["value"] == "plain"
    assert choice["reason"] == facts["training"]["engine"].removeprefix("plain: ")
    assert facts["verified"]["keys_match"]
    assert facts["verified"]["outputs_differ"]
    assert all(choice["reason"] != in_chinese(choice["reason"]) for choice in facts["choices"])
    ours, asked = (load_file(one.adapter / "adapter_model.safetensors") for one in (fallen, plain))
    assert all(torch.equal(ours[name], asked[name]) for name in asked)


@pytest.mark.parametrize(
    ("family", "settings", "way_out"),
    [
        ("xlstm", {"compute_dtype": "bf16"}, "--compute-dtype fp32"),  # its gates are in fp32
        ("rwkv", {"quantization": "nf4"}, "--quantization none"),  # it divides its weights as soon as it is asked
    ],
)
def test_a_base_that_trains_but_couldnt_be_used_is_refused_before_the_first_step(
    family: str, settings: dict[str, Any], way_out: str, tmp_path: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text('{"prompt": "Where is the key?", "completion": "Under the pot."}\n')
    with pytest.raises(UserError, match=f"can't compute a document(.|\n)*{way_out}"):
        first_step(save(family, tmp_path / "model"), data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_class_that_takes_no_loss_arguments_weighs_tokens_all_the_same(
    chats: Path, tmp_path: Path, words: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Gemma 4's class with images says of itself.
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    model = saved(tmp_path / "model", "llama", words)
    run, config = first_step(model, chats, tmp_path / "run")
    trained = load_file(run.adapter / "adapter_model.safetensors")
    for name, gradient in expected(model, run, config, words).items():
        assert relative_error(-trained[name], gradient) <= GRADIENT, name
