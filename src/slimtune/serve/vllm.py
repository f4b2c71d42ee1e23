"""``slimtune serve --engine vllm``: the same models and addresses by vLLM, for fleets and many clients on GPUs.

The flags are those of vLLM's documentation: "vllm serve" (CLI reference), "LoRA adapters" and "BitsAndBytes".
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from typing import NoReturn

from slimtune.adapter.change import why_not_mergeable
from slimtune.adapter.settings import adapter_config
from slimtune.errors import UserError
from slimtune.serve.models import Named, base_name

__all__ = ["replace_process", "vllm_command"]

# vLLM takes these as --max-lora-rank and no others (vllm/config/lora.py).
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# PEFT's options beyond that, and the rule, as of vllm/lora/peft_helper.py of several versions.
_BEYOND = ("use_dora", "lora_bias", "bias", "rank_pattern", "alpha_pattern")
_RULE = "vLLM adds s B A to each weight; all else some of its versions leave out without a word."
# What a model's generation_config.json proposes is not taken over, by any verb (decisions/0030).
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


def vllm_command(models: Sequence[Named], host: str, port: int, batch: int) -> list[str]:
    """The words of the command that serves ``models`` as :mod:`slimtune.serve.server` would.

    Args:
        models: All of one base.
        host: The address to listen on.
        port: Its port.
        batch: Most requests computed together.

    Raises:
        UserError: A rank is larger than vLLM takes, an adapter is on experts or no low-rank sum of one scale,
            or the chat templates differ.
    """
    first = models[0].found
    tuned = [model for model in models if model.found.adapter is not None]
    words = ["vllm", "serve", str(first.base), "--served-model-name", base_name(first)]
    words += ["--host", host, "--port", str(port), "--max-num-seqs", str(batch)]
    words += ["--override-generation-config", json.dumps(_GREEDY)]
    # vLLM lets the page of any site ask, unless told otherwise.
    words += ["--allowed-origins", "[]"]
    if tuned:
        words += [
            "--enable-lora",
            "--max-loras",
            str(len(tuned)),
            "--max-lora-rank",
            str(_rank(tuned)),
            "--lora-modules",
        ]
        words += [_module(model) for model in tuned]
        words += _rendering(tuned)
    if first.passport is not None and first.passport.quantization.get("method") == "nf4":
        words += ["--quantization", "bitsandbytes"]
    if first.trust_remote_code:
        words.append("--trust-remote-code")
    return words


def replace_process(words: Sequence[str], key: str | None) -> NoReturn:
    """Become vLLM. The key goes by the environment, where other users of the machine don't see it.

    Raises:
        UserError: vLLM isn't installed.
    """
    program = shutil.which(words[0])
    if program is None:
        raise UserError(
            "vLLM is not installed here",
            rule="It has versions of torch of its own: give it an environment of its own.",
            way_out=f"Install it (pip install vllm) and run: {shlex.join(words)}",
        )
    environment = dict(os.environ) if key is None else {**os.environ, "VLLM_API_KEY": key}
    os.execve(program, list(words), environment)


def _module(model: Named) -> str:
    """The adapter as ``--lora-modules`` takes it; as JSON where vLLM would misread NAME=PATH."""
    path = str(model.found.adapter)
    if any(mark in model.name + path for mark in "=,"):
        return json.dumps({"name": model.name, "path": path})
    return f"{model.name}={path}"


def _rank(tuned: Sequence[Named]) -> int:
    ranks = []
    for model in tuned:
        assert model.found.adapter is not None
        config = adapter_config(model.found.adapter)
        if config.get("target_parameters"):
            raise UserError(
                f"the adapter {model.name} has target_parameters: {', '.join(config['target_parameters'])}",
                rule="Experts are adapted so, and vLLM leaves such adapters out or refuses them.",
                way_out="Merge it (slimtune merge) and serve the merged model.",
            )
        if config.get("trainable_token_indices") or config.get("modules_to_save"):
            raise UserError(
                f"{model.name} trains rows of tokens or whole modules beside its adapter",
                rule="vLLM loads the low-rank part of an adapter alone.",
                way_out="Merge it (slimtune merge) and serve the merged model.",
            )
        if reason := why_not_mergeable(config):
            raise UserError(
                f"the adapter {model.name} can't be served by vLLM: {reason}",
                rule=_RULE,
                way_out="Serve it by slimtune's own engine: leave --engine vllm.",
            )
        if beyond := [key for key in _BEYOND if config.get(key) not in (None, False, {}, "none")]:
            raise UserError(
                f"the adapter {model.name} has {', '.join(beyond)}",
                rule=_RULE,
                way_out="Merge it (slimtune merge) and serve the merged model.",
            )
        ranks.append(int(config["r"]))
    highest = max(ranks)
    fitting = [rank for rank in _RANKS if rank >= highest]
    if not fitting:
        raise UserError(
            f"an adapter has rank {highest}",
            rule=f"vLLM takes {_RANKS[-1]} at most.",
            way_out="Merge it (slimtune merge) and serve the merged model.",
        )
    return fitting[0]


def _rendering(tuned: Sequence[Named]) -> list[str]:
    """The training's tokenizer and chat template, where they lie beside the adapter."""
    templates = {model.found.template and model.found.template.read_text("utf-8") for model in tuned}
    if len(templates) > 1:
        raise UserError(
            "the adapters were trained with different chat templates",
            rule="vLLM has one template for a server.",
            way_out="Start a server for each.",
        )
    found = tuned[0].found
    assert found.adapter is not None
    words = ["--tokenizer", str(found.adapter)] if (found.adapter / "tokenizer_config.json").is_file() else []
    return words + (["--chat-template", str(found.template)] if found.template else [])
