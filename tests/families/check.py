"""What is proven of a family, on a tiny model of it: one folder made, trained on, read back, merged and asked.

The oracle is plain Transformers and PEFT: each document alone, unpadded, its loss by torch, its gradients by autograd.
For a base in 4 bits it is that on the numbers that bitsandbytes makes of each matrix when it packs and unpacks it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from slimtune.adapter.lora import lora_config
from slimtune.adapter.targets import default_targets, find_targets
from slimtune.base.quantize import four_bit_share
from slimtune.base.quantizer import policy_of
from slimtune.cli import slimtune_command
from slimtune.config import Config
from slimtune.data.preflight import prove
from slimtune.errors import UserError
from slimtune.recipes import finetune
from slimtune.run.folder import RunFolder
from slimtune.use.export import check_exportable
from slimtune.use.load import find, open_model
from tests.families.tiny import save, tokenizer

__all__ = ["Proof", "check"]

CHATS = (
    ("Where is the key?", "Under the pot, as ever."),
    ("And the lamp?", "It stands behind the green door."),
    ("Is there tea?", "No."),
    ("Who was here last?", "Nobody that I know of."),
)
ROOM = 128
"""Tokens of a pack: these chats fill two."""
RATE = 64.0
"""What an adapter changes by is read off its files, whose numbers are rounded to 2^-24 of themselves: a step of this
many gradients leaves a 64th of that in a gradient. A power of two, by which dividing is exact."""
MERGED = 2**-22
"""Of a tensor's largest number: a merged one is summed in fp32 and rounded once, which costs 2^-24 each time."""
LOGITS = 1e-2
"""Of the largest: merged against unmerged. After so large a step some models make a thousand times as much of a
rounding (olmo3: plain PEFT's own are 7e-4 off in fp32); what is exact is asked of the parameters."""
BLOCK = 64
"""Weights to a scale in NF4 (QLoRA, section 3)."""
GRADIENT: dict[str, Any] = {
    "quantization": "none", "compute_dtype": "fp32", "targets": "all-linear", "lora_r": 2, "lora_dropout": 0.0,
    "optim": "sgd", "learning_rate": RATE, "lr_scheduler": "constant", "warmup": 0.0, "max_grad_norm": 1e9,
    "epochs": 1.0, "gradient_accumulation": len(CHATS), "max_length": ROOM, "micro_batch": 1,
}  # fmt: skip
"""An epoch is one step, packed or not, of plain SGD: what the adapter changes by is its gradient."""


@dataclass
class Proof:
    """What was found. ``None`` where a refusal or a fault came first; faults say which."""

    model_type: str
    class_name: str = ""
    four_bit_share: float | None = None
    draws: bool = False
    """While it trains the model draws, as for whom its routers choose: no gradient is one number then."""
    targets: str = ""
    packed: str = ""
    engine: str = ""
    gradient: float | None = None
    """Largest relative difference of a gradient (L2, each tensor to the oracle's, and the largest tensor's 1e-3)."""
    unused: int = 0
    """Adapter tensors that the oracle gives no gradient."""
    reload: float | None = None
    """Largest relative difference of a logit, plain PEFT to slimtune's own reading."""
    gradient_4bit: float | None = None
    """As the gradient, on the base in NF4."""
    reload_4bit: float | None = None
    """As reload, of that run."""
    trained_4bit: bool = False
    merge: str = ""
    merge_4bit: str = ""
    """Of the run on the base in NF4, into the base as it is published."""
    chat: str = ""
    gguf: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    """UserErrors by step."""
    faults: dict[str, str] = field(default_factory=dict)
    """Everything else that a step ended with."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check(model_type: str, folder: Path) -> Proof:
    """All of it; no step stops the next unless it needs its result."""
    proof = Proof(model_type)
    steps = _Steps(proof)
    base = folder / "base"
    if not steps.run("make", lambda: save(model_type, base)):
        return proof
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps({"prompt": ask, "completion": say}) + "\n" for ask, say in CHATS))
    steps.run("describe", lambda: _describe(proof, base))
    runs: dict[str, RunFolder] = {}
    start = folder / "start"
    if steps.run("gradient", lambda: runs.update(fp32=_gradient(proof, base, data, start, folder))):
        steps.run("reload", lambda: _reload(proof, base, runs["fp32"]))
        steps.run("merge", lambda: _merge(proof, base, runs["fp32"], folder / "merged"))
        steps.run("gguf", lambda: _gguf(proof, runs["fp32"]))
    rounded = folder / "rounded"
    if steps.run(
        "4-bit gradient", lambda: runs.update(nf4=_gradient_in_4_bits(proof, base, rounded, data, start, folder))
    ):
        steps.run("4-bit reload", lambda: _reload_in_4_bits(proof, rounded, runs["nf4"]))
        steps.run("4-bit merge", lambda: _merge_of_4_bits(proof, base, runs["nf4"], folder / "merged-nf4"))
    if steps.run("4 bits", lambda: runs.update(usual=_four_bits(proof, base, data, folder))):
        steps.run("chat", lambda: _chat(proof, runs["usual"]))
    return proof


class _Steps:
    def __init__(self, proof: Proof) -> None:
        self.proof = proof

    def run(self, name: str, step: Any) -> bool:
        """Whether it went through; if not, the proof says why."""
        try:
            step()
        except UserError as error:
            self.proof.refused[name] = f"{error.what}. {error.rule}".strip()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the proof is a record of what went wrong
            self.proof.faults[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        else:
            return True
        return False


def _load(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    [wanted] = config.architectures
    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) == wanted
    auto = AutoModelForCausalLM if text else AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _describe(proof: Proof, base: Path) -> None:
    model = _load(base)
    proof.class_name = type(model).__name__
    proof.four_bit_share = four_bit_share(model)
    proof.targets = ", ".join(default_targets(model)[0])
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            logits.append(_logits(model.train()))
    proof.draws = not torch.equal(*logits)


def _config(base: Path, data: Path, output: Path, **values: Any) -> Config:
    return Config.make(model=str(base), data=str(data), output=output, save_steps=1000, **values)


def _gradient(proof: Proof, base: Path, data: Path, start: Path, folder: Path) -> RunFolder:
    """One step of slimtune's trainer against the oracle's gradients, from the same adapter."""
    config = _config(base, data, folder / "run", start_from=_start(base, start), **GRADIENT)
    run = finetune(config)
    facts = run.read_json(run.facts_file)
    proof.packed = "yes" if facts["data"]["packed"] else f"no: {facts['data']['unpacked']}"
    expected = _oracle(base, start, config)
    proof.unused = sum(not bool(gradient.any()) for gradient in expected.values())
    proof.gradient = _difference(start, run, expected)
    return run


def _difference(start: Path, run: RunFolder, expected: dict[str, Tensor]) -> float:
    before, after = load_file(start / "adapter_model.safetensors"), load_file(run.adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    return max(
        float(((before[name] - after[name]) / RATE - gradient).norm()) / (float(gradient.norm()) + 1e-3 * largest)
        for name, gradient in expected.items()
    )


def _gradient_in_4_bits(proof: Proof, base: Path, rounded: Path, data: Path, start: Path, folder: Path) -> RunFolder:
    """The same step on the base in NF4, against the oracle on the numbers that this stands for."""
    config = _config(base, data, folder / "run-nf4", start_from=start, **GRADIENT | {"quantization": "nf4"})
    run = finetune(config)
    _round(base, rounded)
    proof.gradient_4bit = _difference(start, run, _oracle(rounded, start, config))
    return run


def _round(base: Path, folder: Path) -> None:
    """A copy of the base whose every matrix that lies in 4 bits has been there and back, by bitsandbytes."""
    model = _load(base)
    policy = policy_of(model)
    with torch.no_grad():
        # A tensor that two modules share has two names, and goes once.
        named = {id(one := model.get_parameter(name)): (name, one) for name in policy.linears | policy.packed}
        for name, parameter in named.values():
            linear = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)  # [in, out], and packed as linear
            parameter.copy_(_there_and_back(parameter.T).T if linear else _there_and_back(parameter))
    model.save_pretrained(folder)


def _there_and_back(numbers: Tensor) -> Tensor:
    """A matrix, or each of a stack by itself."""
    if numbers.dim() > 2:
        return torch.stack([_there_and_back(matrix) for matrix in numbers])
    flat = numbers.contiguous().view(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    codes, state = quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    made: Tensor = dequantize_4bit(codes, state).view(-1)[: len(flat)]
    return made.view(numbers.shape)


def _start(base: Path, folder: Path) -> Path:
    """An adapter whose both matrices are random: from B = 0 there would be no gradient for A."""
    config = Config.make(**GRADIENT)
    model = _load(base)
    wrapped = get_peft_model(model, lora_config(config, find_targets(config, model)))
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _oracle(base: Path, adapter: Path, config: Config) -> dict[str, Tensor]:
    """Gradients of the mean loss over all supervised tokens, by the names in the adapter's file."""
    model = PeftModel.from_pretrained(_load(base), adapter, is_trainable=True)
    documents = prove(config, tokenizer()).train
    supervised = sum(int(documents[at][1][1:].sum()) for at in range(len(documents)))
    for at in range(len(documents)):
        ids, trained = documents[at]
        tokens, counts = torch.from_numpy(ids).long()[None], torch.from_numpy(trained)[1:]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        # Divided before it goes back, as where it trains: a gradient divided afterwards was rounded elsewhere, which
        # shows in sums that nearly cancel (1.4e-4 in what Qwen4's decays are made of).
        (losses[counts].sum() / supervised).backward()
    return {
        name.replace(".default", ""): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def _reload(proof: Proof, base: Path, run: RunFolder) -> None:
    """The adapter in plain PEFT on the plain base, and in slimtune."""
    with torch.no_grad():
        bare, plain = _logits(_load(base)), _plain(base, run)
        own = _logits(open_model(str(run.path), dtype="fp32").model)
    if torch.equal(bare, plain):
        raise AssertionError("plain PEFT's logits are the bare base's")
    proof.reload = _apart(plain, own)


def _reload_in_4_bits(proof: Proof, rounded: Path, run: RunFolder) -> None:
    with torch.no_grad():
        own = _logits(open_model(str(run.path), dtype="fp32").model)
    proof.reload_4bit = _apart(_plain(rounded, run), own)


def _ids() -> Tensor:
    return torch.tensor([tokenizer().encode("Where is the lamp, and who was here?")])


def _logits(model: Any) -> Tensor:
    # Without a cache, for which a family's code may have faults of its own.
    logits: Tensor = model(input_ids=_ids(), use_cache=False).logits
    return logits


def _plain(base: Path, run: RunFolder) -> Tensor:
    """Plain PEFT's logits."""
    with torch.no_grad():
        return _logits(PeftModel.from_pretrained(_load(base), run.adapter).eval())


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))


def _merge(proof: Proof, base: Path, run: RunFolder, output: Path) -> None:
    """The merged folder in plain Transformers, against plain PEFT."""
    _called("merge", run.path, "-o", output, "--no-parity")
    _check_merged(base, run, output)
    proof.merge = "yes"


def _merge_of_4_bits(proof: Proof, base: Path, run: RunFolder, output: Path) -> None:
    """With its certificate."""
    _called("merge", run.path, "-o", output)
    _check_merged(base, run, output)
    proof.merge_4bit = "yes"


def _check_merged(base: Path, run: RunFolder, output: Path) -> None:
    """Each parameter is what PEFT makes in float64 when it merges, and the folder computes as the base's class does."""
    merged, plain = _load(output).requires_grad_(False), _load(base)
    exact: Any = PeftModel.from_pretrained(_load(base).double(), run.adapter).requires_grad_(False)
    expected = dict(exact.merge_and_unload().named_parameters())
    parameters = dict(merged.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        if (off := _apart(expected[name], parameter.double())) > MERGED:
            raise AssertionError(f"the merged {name} is {off:.1e} off")
    with torch.no_grad():
        unmerged, logits = _plain(base, run), _logits(merged)
        plain.load_state_dict(merged.state_dict())
        if not torch.equal(logits, _logits(plain)):
            raise AssertionError("the merged folder computes otherwise than the base's class")
    if (off := _apart(unmerged, logits)) > LOGITS:
        raise AssertionError(f"the merged model's logits are {off:.1e} off")


def _called(*words: Any) -> None:
    """A verb of the command line."""
    result = CliRunner().invoke(slimtune_command, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception


def _gguf(proof: Proof, run: RunFolder) -> None:
    check_exportable(find(str(run.path)), ["f16"])
    proof.gguf = "yes"


def _four_bits(proof: Proof, base: Path, data: Path, folder: Path) -> RunFolder:
    """Three steps as people take them: NF4, default targets, dropout, 8-bit AdamW."""
    run = finetune(
        _config(base, data, folder / "run-usual", max_steps=3, max_length=ROOM, learning_rate=1e-2, warmup=0.0)
    )
    proof.trained_4bit = True
    proof.engine = run.read_json(run.facts_file)["training"]["engine"]
    return run


def _chat(proof: Proof, run: RunFolder) -> None:
    _called("chat", run.path, "--prompt", "Where is the key?", "--max-new-tokens", "4")
    proof.chat = "yes"
