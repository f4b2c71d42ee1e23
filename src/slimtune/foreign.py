"""Other tools' configs, key by key: which tool a file is for, and slimtune's word for each of its keys.

Sources: axolotl's ``utils/schemas``, LLaMA-Factory's ``hparams``, mlx-lm's ``lora.py``, TRL's ``SFTConfig`` and
``ModelConfig`` with Transformers' ``TrainingArguments``, ms-swift's ``arguments``; read in November 2026. A rule takes
a key's value and all values, and gives slimtune's keys, perhaps with a sentence on what isn't the same, or a sentence
why there are none. A data set's options are told one by one. Where a tool's own default trains otherwise than
slimtune's, it is among the tool's ``defaults``, so that a translated file means what it meant there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Line", "Tool", "recognised", "translated"]

Rule = Callable[[Any, Mapping[str, Any]], "dict[str, Any] | tuple[dict[str, Any], str] | str"]
Names = Callable[[Any, Mapping[str, Any]], "dict[str, Any] | str"]


@dataclass(frozen=True)
class Line:
    """One key of another tool's file, and what becomes of it."""

    key: str
    value: Any
    becomes: Mapping[str, Any]
    """slimtune's keys with their values; none where there is no counterpart."""
    note: str = ""
    """Why there is none, or what isn't the same."""
    is_default: bool = False
    """Whether it doesn't stand in the file, but is that tool's default."""

    @property
    def word(self) -> str:
        """slimtune's word for it."""
        return ", ".join(self.becomes) or self.note


@dataclass(frozen=True)
class Tool:
    """Another tool's config."""

    name: str
    marks: frozenset[str]
    """Keys that tell it from the others."""
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]


def recognised(values: Mapping[str, Any]) -> Tool | None:
    """The tool whose config this is: it has one of the tool's marks, and more of its keys than of any other's."""
    scored = [(sum(_known(key, tool) for key in values), tool) for tool in _TOOLS if tool.marks & values.keys()]
    best = max(scored, key=lambda pair: pair[0], default=None)
    return best[1] if best is not None and best[0] > 1 else None


def translated(values: Mapping[str, Any], tool: Tool) -> list[Line]:
    """Each key of the file in its order, then the tool's defaults that it leaves alone."""
    lines = []
    for key, value in values.items():
        lines.append(_line(key, value, values, tool, is_default=False))
        if key in ("datasets", "test_datasets"):
            lines += _options(key, value)
    left = {key: value for key, value in tool.defaults.items() if values.get(key) is None}
    taken = {name for line in lines for name in line.becomes}
    everything = {**tool.defaults, **{key: value for key, value in values.items() if value is not None}}
    for key, value in left.items():
        line = _line(key, value, everything, tool, is_default=True)
        if line.becomes and not taken & line.becomes.keys():
            lines.append(line)
    return lines


def _line(key: str, value: Any, values: Mapping[str, Any], tool: Tool, *, is_default: bool) -> Line:
    rule = _rule(key, tool)
    if value is None:
        return Line(key, value, {}, "not set")
    try:
        found = rule(value, values) if rule is not None else "no counterpart"
    except (TypeError, ValueError, OverflowError):  # text for a number, a list for a name: it stays, beside its reason
        found = "this value, or one that it goes with, isn't of the kind that belongs there"
    made, note = ({}, found) if isinstance(found, str) else found if isinstance(found, tuple) else (found, "")
    return Line(key, value, made, note, is_default)


def _known(key: str, tool: Tool) -> bool:
    return _rule(key, tool) is not None


def _rule(key: str, tool: Tool) -> Rule | None:
    if key in tool.rules:
        return tool.rules[key]
    return next((says(note) for pattern, note in _PASSING if re.fullmatch(pattern, key)), None)


# -- rules ------------------------------------------------------------------------------------------------------------


def to(name: str) -> Rule:
    """The same value under another name."""
    return lambda value, _: {name: value}


def says(note: str) -> Rule:
    """No counterpart, and why."""
    return lambda *_: note


def one_of(name: str, choices: Mapping[Any, Any], note: str) -> Rule:
    """A value for a value."""
    return lambda value, _: {name: choices[value]} if value in choices else f"{value}: {note}"


def if_true(made: Mapping[str, Any], note: str = "off there, off here") -> Rule:
    """What a switch turns on."""
    return lambda value, _: dict(made) if value is True or value == "true" else note


def _whole(name: str, least: int = 1) -> Rule:
    def rule(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
        is_count = isinstance(value, int | float) and value >= 1
        return {name: max(least, int(value))} if is_count else f"{value}: slimtune counts in whole optimizer steps"

    return rule


def _max_steps(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    return {"max_steps": value} if isinstance(value, int) and value > 0 else "epochs decide"


def _warmup_steps(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | str:
    """Transformers takes a number under 1 for a share; slimtune has nothing else."""
    total = values.get("max_steps")
    if isinstance(value, int | float) and 0 <= value < 1:
        return {"warmup": float(value)}
    if isinstance(total, int) and total > 0 and isinstance(value, int | float):
        return {"warmup": round(min(0.99, value / total), 4)}
    return f"warmup is a share of the steps: {value} steps over all of them"


def _quantization(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | str:
    bits = {True: 4, False: 16, "4": 4}.get(value, value)
    if bits == 4:
        return {"quantization": "nf4"}
    return {"quantization": "none"} if bits == 16 else f"{value} bits aren't there: quantization is nf4 or none"


def _names(name: str) -> Names:
    """Module names: one or several, by the end of their names; what stands for all linear layers."""

    def rule(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
        names = [str(part).strip() for part in (value if isinstance(value, list) else str(value).split(","))]
        if name == "targets" and {"all", "all-linear", "all_linear"} & set(names):
            return {name: "all-linear"}
        if any(not re.fullmatch(r"[\w.]+", part) for part in names):
            return f"{value}: {name} are module names, by their ends"
        return {name: list(dict.fromkeys(part.rsplit(".", 1)[-1] for part in names))}

    return rule


def _loggers(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    asked = value if isinstance(value, list) else str(value).split(",")
    known = [name for part in asked if (name := str(part).strip()) in ("tensorboard", "wandb", "trackio")]
    return {"report_to": known} if known else "no logger"


def _precision(dtype: str) -> Rule:
    return if_true({"compute_dtype": dtype}, "compute_dtype: auto takes what is fastest here")


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": "auto", "bf16": "bf16", "fp16": "fp16"}
_SCHEDULES = {
    name: name for name in ("linear", "cosine", "constant", "constant_with_warmup")
}  # fmt: skip
_schedule = one_of("lr_scheduler", _SCHEDULES, "lr_scheduler is linear, cosine, constant or constant_with_warmup")
_OWN_TEMPLATE = "the tokenizer's own chat template is taken, or template: FILE.jinja"
_MEMORY = "memory decides what is recomputed"
_FAST = "slimtune's engine has its own attention and kernels"
_ONE_GPU = "slimtune trains on one GPU"

_PASSING: tuple[tuple[str, str], ...] = (
    (r"(do_)?train|do_eval|do_predict|test", "the verb says it: slimtune train, slimtune eval"),
    (r"gradient_checkpointing.*|grad_checkpoint|.*activation_offloading|.*_offload(ing)?", _MEMORY),
    (r"(flash|sdp|xformers|flex|sage|eager)_attention|flash_attn.*|attn_impl.*|.*_kernel|.*liger.*|use_unsloth.*"
     r"|torch_compile.*|tf32|use_cache|padding_free|use_kernels|.*cross_entropy.*", _FAST),
    (r"deepspeed.*|fsdp.*|ddp.*|local_rank|.*parallel.*|device_map|world_size", _ONE_GPU),
    (r"data(loader|set)_(num_|prefetch|pin|drop|keep|persist|process).*|preprocessing_.*|.*streaming.*|overwrite_cache"
     r"|dataset_prepared_path|load_from_cache_file|shuffle_.*|dataset_shuffle|skip_prepare_dataset|remove_unused_columns"
     r"|buffer_size|mix_strategy|ignore_pad_token.*|tokenized_path", "slimtune prepares data in its own way"),
    (r"hub_.*|push_to_hub.*|push_dataset.*|hf_.*token|export_hub.*", "slimtune push RUN OWNER/NAME"),
    (r"wandb_(entity|name|watch|log_model|run_id|mode)|run_name|project_name|logging_dir|logging_first_step|plot_loss"
     r"|swanlab.*|mlflow.*|comet.*|use_swanlab", "the run's report.html has the curves"),
    (r"save_(strategy|only_model|safetensors|first_step)|load_best_model.*|safe_serialization|metric_for_best.*"
     r"|greater_is_better|saves_per_epoch|evals_per_epoch|eval_strategy|evaluation_strategy|eval_on_start",
     "save_steps and eval_steps: ten in a run unless set; early_stopping takes the best"),
    (r"(per_device_)?eval_batch_size|eval_sample_packing|eval_packing|val_batches|test_batches|group_by_length"
     r"|pad_to_.*|sample_packing_.*", "batches of evaluation and padding are slimtune's to choose"),
    (r"resume_from_checkpoint|auto_resume.*|resume_adapter_file|adapter_name_or_path|lora_model_dir",
     "slimtune resume RUN goes on; start_from: RUN begins anew from an adapter"),
    (r"bnb_4bit_(quant_storage|compute_dtype)|low_cpu_mem_usage|use_fast_tokenizer|tokenizer_type|model_type"
     r"|lora_task_type|task_type|strict|is_.*_derived_model|plugins|use_cpu|disable_tqdm|data_seed|adam_.*|max_memory",
     "slimtune decides it by itself"),
    (r"(special_|add_|new_special_|added_|eot_)?tokens.*|resize_.*|(eos|pad|bos|unk)_token",
     "the tokenizer's own tokens are taken"),
    (r"rl|rl_.*|dpo_.*|kto_.*|orpo_.*|pref_.*|simpo_.*|ref_model.*|reward_.*",
     "slimtune trains on replies; of preference data on the better ones (prefer: chosen)"),
    (r"loss_watchdog_.*", "divergence_factor and divergence_steps watch the loss"),
)  # fmt: skip
"""Keys that need no translation, by their names, with what stands in their place."""

_TRANSFORMERS: dict[str, Rule] = {
    "output_dir": to("output"), "overwrite_output_dir": to("overwrite"),
    "per_device_train_batch_size": to("micro_batch"), "gradient_accumulation_steps": to("gradient_accumulation"),
    "learning_rate": to("learning_rate"), "num_train_epochs": to("epochs"), "max_steps": _max_steps,
    "lr_scheduler_type": _schedule, "warmup_ratio": to("warmup"), "warmup_steps": _warmup_steps,
    "weight_decay": to("weight_decay"), "max_grad_norm": to("max_grad_norm"), "optim": to("optim"),
    "seed": to("seed"), "save_steps": _whole("save_steps"), "eval_steps": _whole("eval_steps"),
    "logging_steps": _whole("logging_steps"), "save_total_limit": _whole("keep_checkpoints", 2),
    "report_to": _loggers, "bf16": _precision("bf16"), "fp16": _precision("fp16"),
    "trust_remote_code": to("trust_remote_code"), "use_rslora": to("rslora"), "use_dora": to("dora"),
    "lora_dropout": to("lora_dropout"), "lora_alpha": to("lora_alpha"), "packing": to("packing"),
}  # fmt: skip
_TRAINER_DEFAULTS = {
    "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "packing": False,
}  # fmt: skip


# -- axolotl ----------------------------------------------------------------------------------------------------------


def _axolotl_adapter(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | str:
    if value not in ("lora", "qlora"):
        return f"{value}: slimtune trains LoRA"
    return {"quantization": "nf4" if value == "qlora" or values.get("load_in_4bit") else "none"}


def _axolotl_targets(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | str:
    return "all linear layers are taken" if values.get("lora_target_linear") else _names("targets")(value, values)


_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""What stands for a path where files are named beside it."""


def _data_sets(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    """axolotl's and TRL's lists of data sets, each a path with options."""
    made: dict[str, Any] = {"data": []}
    ways: list[dict[str, Any]] = []
    for entry in _entries(value):
        files, path, split = entry.get("data_files") or [], str(entry.get("path", "")), entry.get("split")
        inside = [str(file) for file in (files if isinstance(files, list) else [files])]
        if inside and _is_hub(path):
            return f"{path}: single files of a hub's data set aren't taken; download them, and name them here"
        folder = Path() if path in _BUILDERS else Path(path)
        named = f"{path}:{split}" if _is_hub(path) and split not in (None, "train") else path
        made["data"] += [str(folder / file) for file in inside] or [named]
        if (way := _way(entry)) not in ways:
            ways.append(way)
    if len(ways) > 1:
        return "the data sets are read in several ways (type, fields); format and map are one way for all"
    return {**made, **ways[0]} if ways else "no data set is named"


def _entries(value: Any) -> list[Mapping[str, Any]]:
    """The data sets of a list, each with its options."""
    named = [{"path": e} if isinstance(e, str) else e for e in (value if isinstance(value, list) else [value])]
    return [entry for entry in named if isinstance(entry, Mapping)]


def _is_hub(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()


def _way(entry: Mapping[str, Any]) -> dict[str, Any]:
    """How the rows of a data set are read: ``format`` and ``map``, where they have to be said."""
    kind = entry.get("type")
    columns: dict[str, str] = {}
    if isinstance(kind, Mapping):
        fields = {"field_instruction": "instruction", "field_input": "input", "field_output": "output",
                  "field_system": "system"}  # fmt: skip
        columns |= {ours: str(kind[theirs]) for theirs, ours in fields.items() if kind.get(theirs)}
    elif kind == "completion" and entry.get("field"):
        columns["text"] = str(entry["field"])
    if entry.get("field_messages") not in (None, "messages", "conversations"):
        columns["messages"] = str(entry["field_messages"])
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {**({"format": "text"} if kind == "completion" else {}), **({"map": columns} if columns else {})}


_BY_COLUMNS = "rows are told by their columns, turns by their keys"
_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "type": (("chat_template", "sharegpt", "alpaca", "completion"),
             "rows are told by their columns, and the chat template writes them"),
    "split": (("train",), "all rows of a file are taken; data: FILE#500 takes a sample"),
    "roles_to_train": ((["assistant"], ["gpt"], ["gpt", "assistant"], ["assistant", "gpt"]),
                       "replies alone are learnt; train_on: all learns every token"),
    "train_on_eos": (("turn",), "the mark that ends a reply is learnt with each reply"),
    "message_field_training": (("weight", "train", "training", "loss"),
                               "whether a reply is learnt stands in its weight, train, training or loss"),
    "message_field_training_detail": ((), "a reply is learnt whole"),
    "message_property_mappings": (({"role": "from", "content": "value"}, {"role": "role", "content": "content"}),
                                  _BY_COLUMNS),
    "message_field_role": (("role", "from"), _BY_COLUMNS), "message_field_content": (("content", "value"), _BY_COLUMNS),
    "roles": ((), "who speaks is told by the usual names"), "ds_type": (_BUILDERS, "a file is told by its ending"),
    "name": ((), "data has no configurations"), "chat_template": ((), _OWN_TEMPLATE),
    "shards": ((), "data: FILE#500 takes a sample"),
}  # fmt: skip
"""Options of a data set: the values that mean what slimtune does by itself, and what is said of others."""


def _options(key: str, value: Any) -> list[Line]:
    """The options of data sets that become nothing, and that mean something."""
    made = []
    for number, entry in enumerate(_entries(value)):
        at = f"{key}[{number}]"
        kind = entry.get("type")
        for name, option in entry.items():
            same, note = _OPTIONS.get(name, ((), "no counterpart"))
            is_read = {
                "field": kind == "completion", "type": isinstance(kind, Mapping),
                "split": _is_hub(str(entry.get("path"))),
            }.get(name, name in ("path", "data_files", "field_messages"))  # fmt: skip
            if not is_read and option is not None and option not in same:
                made.append(Line(f"{at}.{name}", option, {}, note))
        for name in ("format", "no_input_format", "system_prompt", "system_format"):
            if isinstance(kind, Mapping) and kind.get(name):
                note = "the chat template writes rows; a system prompt stands in them"
                made.append(Line(f"{at}.type.{name}", kind[name], {}, note))
    return made


def _share(name: str) -> Rule:
    def rule(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
        if isinstance(value, int | float) and 0 < value < 1:
            return {name: float(value)}
        return {name: 0.0} if not value else f"eval_share is a share of the rows: {value} over all of them"

    return rule


_PEFT_STARTS = {
    "pissa": "pissa", "olora": "olora", "gaussian": "gaussian", "loftq": "loftq", "orthogonal": "orthogonal",
    True: "default", "true": "default", "default": "default",
}  # fmt: skip
_start = one_of("lora_init", _PEFT_STARTS, "lora_init knows default, gaussian, orthogonal, olora, pissa, loftq")

_AXOLOTL = Tool(
    "axolotl",
    frozenset({"base_model", "sequence_len", "sample_packing", "lora_target_linear", "val_set_size"}),
    {
        **_TRANSFORMERS,
        "base_model": to("model"), "revision_of_model": to("revision"), "load_in_4bit": _quantization,
        "load_in_8bit": if_true({}, "4 bits: quantization"), "adapter": _axolotl_adapter,
        "bnb_config_kwargs": says("quantization and double_quant"), "lora_r": to("lora_r"),
        "lora_target_modules": _axolotl_targets, "lora_target_linear": if_true({"targets": "all-linear"}),
        "lora_modules_to_save": _names("modules_to_save"), "lora_rank_pattern": to("rank_pattern"),
        "lora_alpha_pattern": to("alpha_pattern"), "peft_layers_to_transform": to("layers"),
        "peft_use_dora": to("dora"), "peft_use_rslora": to("rslora"), "peft_init_lora_weights": _start,
        "datasets": _data_sets, "test_datasets": lambda value, all_: _renamed(_data_sets(value, all_), "data", "eval"),
        "val_set_size": _share("eval_share"), "sequence_len": to("max_length"), "sample_packing": to("packing"),
        "excess_length_strategy": one_of("overlong", {"drop": "drop", "raise": "error"}, "no reply is cut short"),
        "train_on_inputs": if_true({"train_on": "all"}, "train_on: assistant"),
        "chat_template": says(_OWN_TEMPLATE), "chat_template_jinja": says(_OWN_TEMPLATE),
        "micro_batch_size": to("micro_batch"), "num_epochs": to("epochs"), "optimizer": to("optim"),
        "lr_scheduler": _schedule, "early_stopping_patience": to("early_stopping"),
        "wandb_project": lambda *_: {"report_to": ["wandb"]}, "use_wandb": if_true({"report_to": ["wandb"]}),
        "use_tensorboard": if_true({"report_to": ["tensorboard"]}),
    },
    {"sequence_len": 512, "sample_packing": False, "micro_batch_size": 1, "gradient_accumulation_steps": 1,
     "num_epochs": 1.0, "lora_dropout": 0.0, "optimizer": "adamw_torch_fused", "adapter": "lora"},
)  # fmt: skip


def _renamed(made: dict[str, Any] | str, before: str, after: str) -> dict[str, Any] | str:
    return made if isinstance(made, str) else {after: made[before]}


# -- LLaMA-Factory ----------------------------------------------------------------------------------------------------


def _factory_data(name: str) -> Rule:
    def rule(value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        folder = str(values.get("dataset_dir") or "data")
        names = value if isinstance(value, list) else str(value).split(",")
        sample = f"#{values['max_samples']}" if isinstance(values.get("max_samples"), int) and name == "data" else ""
        return {name: [f"{folder}:{str(part).strip()}{sample}" for part in names]}

    return rule


def _lora(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    return "LoRA" if value == "lora" else {"dora": True} if value == "dora" else f"{value}: slimtune trains LoRA"


_FACTORY = Tool(
    "LLaMA-Factory",
    frozenset({"finetuning_type", "cutoff_len", "stage", "dataset_dir", "lora_target", "quantization_bit"}),
    {
        **_TRANSFORMERS,
        "model_name_or_path": to("model"), "model": to("model"), "model_revision": to("revision"),
        "micro_batch_size": to("micro_batch"), "quantization_bit": _quantization,
        "quantization_method": says("bitsandbytes"), "quantization_type": one_of("quantization", {"nf4": "nf4"}, "nf4"),
        "double_quantization": to("double_quant"), "finetuning_type": _lora,
        "stage": lambda value, _: {"format": "text"} if value == "pt" else {"prefer": "chosen"}
        if value in ("dpo", "kto", "rm", "ppo") else "slimtune trains on replies",
        "lora_rank": to("lora_r"), "lora_target": _names("targets"), "additional_target": _names("modules_to_save"),
        "pissa_init": if_true({"lora_init": "pissa"}), "dataset": _factory_data("data"),
        "eval_dataset": _factory_data("eval"), "dataset_dir": says("data: FOLDER:NAME"),
        "max_samples": says("data: NAME#500"), "val_size": _share("eval_share"), "cutoff_len": to("max_length"),
        "neat_packing": if_true({"packing": True}),
        "train_on_prompt": if_true({"train_on": "all"}, "train_on: assistant"),
        "mask_history": if_true({"train_on": "last"}, "train_on: assistant"), "template": says(_OWN_TEMPLATE),
        "early_stopping_steps": to("early_stopping"), "flash_attn": says(_FAST),
    },
    {**_TRAINER_DEFAULTS, "quantization_bit": 16, "lora_target": "all", "lora_dropout": 0.0, "cutoff_len": 2048,
     "per_device_train_batch_size": 8, "learning_rate": 5e-5, "num_train_epochs": 3.0, "optim": "adamw_torch_fused"},
)  # fmt: skip


# -- mlx-lm -----------------------------------------------------------------------------------------------------------


def _mlx_model(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    if str(value).startswith("mlx-community/"):
        return f"{value} is in MLX's format: give the model that it was made of (model: OWNER/NAME)"
    return {"model": value}


def _mlx_data(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    """A folder with train, valid and test; the middle one is evaluated on."""
    has_valid = (Path(str(value)).expanduser() / "valid.jsonl").is_file()
    return {"data": [str(value)], **({"eval": [f"{value}:valid"]} if has_valid else {})}


def _mlx_parameters(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    """``scale`` multiplies the adapter's product itself; alpha is divided by the rank."""
    if not isinstance(value, Mapping):
        return "no counterpart"
    rank, scale = value.get("rank", 8), value.get("scale", 20.0)
    made = {"lora_r": rank, "lora_alpha": round(scale * rank), "lora_dropout": value.get("dropout", 0.0)}
    keys = value.get("keys")
    return {**made, **(_dict(_names("targets")(keys, {})) if keys else {"targets": "all-linear"})}


def _dict(made: dict[str, Any] | str) -> dict[str, Any]:
    return {} if isinstance(made, str) else made


def _mlx_steps(name: str) -> Rule:
    """Its iterations are micro-batches; slimtune's steps are the optimizer's."""
    return lambda value, values: {name: max(1, int(value) // int(values.get("grad_accumulation_steps") or 1))}


def _mlx_schedule(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | str:
    names = {"cosine_decay": "cosine", "linear_schedule": "linear", "constant": "constant"}
    if not isinstance(value, Mapping) or value.get("name") not in names:
        return "lr_scheduler is linear, cosine, constant or constant_with_warmup"
    share = int(value.get("warmup") or 0) / max(1, int(values.get("iters") or 1000))
    return {"lr_scheduler": names[value["name"]], "warmup": round(share, 4)}


def _mlx_optimizer(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    """Its AdamW decays weights by 0.01 unless told otherwise."""
    known: dict[str, dict[str, Any]] = {
        "adam": {"optim": "adamw_torch"}, "adamw": {"optim": "adamw_torch", "weight_decay": 0.01},
        "adafactor": {"optim": "adafactor"},
    }  # fmt: skip
    return known.get(value, f"{value}: optim takes what Transformers knows")


_MLX = Tool(
    "mlx-lm",
    frozenset({"iters", "lora_parameters", "fine_tune_type", "mask_prompt", "adapter_path", "max_seq_length"}),
    {
        "model": _mlx_model, "data": _mlx_data, "fine_tune_type": _lora, "lora_parameters": _mlx_parameters,
        "iters": _mlx_steps("max_steps"), "batch_size": to("micro_batch"), "learning_rate": to("learning_rate"),
        "grad_accumulation_steps": to("gradient_accumulation"), "max_seq_length": to("max_length"),
        "mask_prompt": lambda value, _: {"train_on": "last" if value else "all"}, "seed": to("seed"),
        "optimizer": _mlx_optimizer, "packing": to("packing"),
        "optimizer_config": says("weight_decay, and Transformers' defaults"), "lr_schedule": _mlx_schedule,
        "steps_per_report": _mlx_steps("logging_steps"), "steps_per_eval": _mlx_steps("eval_steps"),
        "save_every": _mlx_steps("save_steps"), "adapter_path": to("output"), "report_to": _loggers,
        "num_layers": lambda value, _: "all layers" if value == -1 else
        f"the last {value} layers: layers takes their numbers, as in layers: [16, 17, 18]",
        "trust_remote_code": to("trust_remote_code"), "config": says("this file"),
        "hf_dataset": says("data: OWNER/NAME:SPLIT, and map for its columns"),
    },
    {"batch_size": 4, "iters": 1000, "grad_accumulation_steps": 1, "learning_rate": 1e-5, "seed": 0,
     "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "mask_prompt": False, "optimizer": "adam",
     "lr_schedule": {"name": "constant"}, "packing": False},
)  # fmt: skip


# -- TRL --------------------------------------------------------------------------------------------------------------


def _trl_data(value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    split = values.get("dataset_train_split") or "train"
    return {"data": [str(value) if split == "train" else f"{value}:{split}"]}


def _trl_replies(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | tuple[dict[str, Any], str] | str:
    """Unless told otherwise TRL learns every token of messages and texts, and of a prompt and its completion this."""
    if value:
        return {"train_on": "assistant"}
    if values.get("completion_only_loss") is not None:
        return "completion_only_loss says it"
    return {"train_on": "all"}, "of rows with a completion TRL learns that alone: train_on: completion"


def _trl_completions(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | str:
    if values.get("assistant_only_loss"):
        return "assistant_only_loss says it"
    return {"train_on": "completion" if value else "all"}


def _trl_epochs(value: Any, values: Mapping[str, Any]) -> dict[str, Any] | str:
    return {"epochs": value} if not int(values.get("max_steps") or 0) > 0 else "max_steps decides"


_TRL = Tool(
    "TRL",
    frozenset({"dataset_name", "use_peft", "assistant_only_loss", "completion_only_loss", "dataset_train_split"}),
    {
        **_TRANSFORMERS,
        "model_name_or_path": to("model"), "model_revision": to("revision"), "dataset_name": _trl_data,
        "dataset_train_split": says("data: OWNER/NAME:SPLIT"), "dataset_config": says("data has no configurations"),
        "dataset_test_split": says("eval: OWNER/NAME:SPLIT"), "datasets": _data_sets,
        "test_split_size": _share("eval_share"), "use_peft": says("slimtune trains LoRA"),
        "load_in_4bit": _quantization, "load_in_8bit": if_true({}, "4 bits: quantization"),
        "bnb_4bit_quant_type": one_of("quantization", {"nf4": "nf4"}, "nf4"),
        "use_bnb_nested_quant": to("double_quant"), "lora_r": to("lora_r"),
        "lora_target_modules": _names("targets"), "lora_modules_to_save": _names("modules_to_save"),
        "dtype": one_of("compute_dtype", _DTYPES, "compute_dtype is bf16, fp16 or fp32"),
        "torch_dtype": one_of("compute_dtype", _DTYPES, "compute_dtype is bf16, fp16 or fp32"),
        "max_length": to("max_length"), "max_seq_length": to("max_length"), "chat_template_path": says(_OWN_TEMPLATE),
        "assistant_only_loss": _trl_replies, "completion_only_loss": _trl_completions,
        "num_train_epochs": _trl_epochs,
        "dataset_text_field": lambda value, _: {"map": {"text": value}} if value != "text" else "the column text",
        "packing_strategy": says("whole documents are packed"),
        "truncation_mode": says("no reply is cut short: overlong"),
    },
    {**_TRAINER_DEFAULTS, "load_in_4bit": False, "use_bnb_nested_quant": False, "lora_r": 16, "lora_alpha": 32,
     "max_length": 1024, "per_device_train_batch_size": 8, "num_train_epochs": 3.0, "learning_rate": 2e-5,
     "optim": "adamw_torch_fused", "assistant_only_loss": False},
)  # fmt: skip


# -- ms-swift ---------------------------------------------------------------------------------------------------------


def _swift_columns(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | str:
    names = {"query": "instruction", "response": "output", "messages": "messages", "system": "system"}
    if not isinstance(value, Mapping) or not set(value.values()) <= names.keys():
        return "map takes FIELD: COLUMN"
    return {"map": {names[ours]: str(theirs) for theirs, ours in value.items()}}


def _listed(name: str) -> Rule:
    return lambda value, _: {name: [str(part) for part in (value if isinstance(value, list) else [value])]}


_SWIFT = Tool(
    "ms-swift",
    frozenset({"tuner_type", "train_type", "split_dataset_ratio", "quant_bits", "quant_method", "val_dataset",
               "loss_scale", "target_modules", "truncation_strategy"}),
    {
        **_TRANSFORMERS,
        "model": to("model"), "model_revision": to("revision"), "dataset": _listed("data"),
        "val_dataset": _listed("eval"), "split_dataset_ratio": _share("eval_share"), "columns": _swift_columns,
        "tuner_type": _lora, "train_type": _lora, "target_modules": _names("targets"), "lora_rank": to("lora_r"),
        "modules_to_save": _names("modules_to_save"), "lora_bias": to("lora_bias"), "init_weights": _start,
        "quant_bits": _quantization, "quant_method": says("bitsandbytes"),
        "bnb_4bit_quant_type": one_of("quantization", {"nf4": "nf4"}, "nf4"),
        "bnb_4bit_use_double_quant": to("double_quant"), "max_length": to("max_length"),
        "truncation_strategy": one_of("overlong", {"delete": "drop", "split": "split"}, "no reply is cut short"),
        "loss_scale": one_of("train_on", {"default": "assistant", "last_round": "last", "all": "all"}, "train_on"),
        "torch_dtype": one_of("compute_dtype", _DTYPES, "compute_dtype is bf16, fp16 or fp32"),
        "system": says("the rows' own system turns are taken"), "template": says(_OWN_TEMPLATE),
        "early_stop_interval": to("early_stopping"), "task_type": says("a causal language model"),
    },
    {"quant_bits": 16, "target_modules": "all-linear", "lora_alpha": 32, "learning_rate": 1e-4, "weight_decay": 0.1,
     "packing": False, "optim": "adamw_torch_fused"},
)  # fmt: skip

_TOOLS = (_AXOLOTL, _FACTORY, _MLX, _TRL, _SWIFT)
