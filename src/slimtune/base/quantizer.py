"""The 4-bit policy: which weights of a model lie in 4 bits, and the quantiser that packs each as it is read.

Transformers' own quantiser for bitsandbytes packs ``nn.Linear`` and nothing else. In a mixture of experts that is a
tenth of the weights: the experts are one parameter for all of them, and stay in 16 bits without a word. This one packs
them too (:mod:`slimtune.base.packed`), and what it can't pack it names with its size before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, Transpose, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from slimtune.base.finite import is_finite
from slimtune.base.packed import (
    NF4_BLOCK,
    Mxfp4Tensor,
    Nf4Tensor,
    PackedTensor,
    bulk_bytes,
    misreads_partial_blocks,
)
from slimtune.base.shelves import Shelves
from slimtune.base.source import PassedThrough
from slimtune.engine.stored import places_of
from slimtune.engine.streamed import move_to_ram
from slimtune.errors import SlimtuneError, UserError
from slimtune.families import read_family

__all__ = ["FourBitConfig", "FourBitQuantizer", "Policy", "four_bit_config", "policy_of"]

_METHOD = "slimtune_4bit"
LEAST_SHARE = 0.8
"""Of the weights besides embeddings and head. With less in 4 bits, most of the bytes would be of the other weights."""
WHOLE_SHARE = 0.97
"""What stays in 16 bits is named if the share is smaller."""
_LEAST_SIDE = 16
"""Rows and columns of a matrix worth packing: smaller ones are scales, biases, decays and coefficients, and Gemma 3n
clamps such a layer's weight, which in 4 bits would be its codes."""
_ROUTER = re.compile(r"(^|[._])router([._]|$)")
_GATE = re.compile(r"(^|[._])(gate|wg)([._]|$)")
"""A gate chooses experts if it has an output for each."""
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True)
class Policy:
    """What becomes of a model's parameters, by their names."""

    linears: frozenset[str]
    """Weights of linear layers that bitsandbytes packs."""
    packed: frozenset[str]
    """Weights that slimtune packs: expert stacks, linear layers with a forward of their own, and those whose weight the
    model's code hands to a kernel itself."""
    left: frozenset[str]
    """Modules left as they are: those that choose experts, and matrices of a few rows or columns."""
    sizes: dict[str, int]
    """Weights of every parameter besides embeddings and head."""

    @property
    def share(self) -> float:
        """Of the weights besides embeddings and head: how many lie in 4 bits."""
        four_bit = sum(size for name, size in self.sizes.items() if name in self.linears or name in self.packed)
        return four_bit / max(1, sum(self.sizes.values()))

    def without_partial_rows(self, model: nn.Module) -> Policy:
        """Weights whose rows aren't whole blocks packed by slimtune: bitsandbytes would misread them on some CPUs."""
        partial = {name for name in self.linears if model.get_parameter(name).shape[-1] % NF4_BLOCK}
        return replace(self, linears=self.linears - partial, packed=self.packed | partial)

    @property
    def rest(self) -> list[tuple[str, int]]:
        """What stays in 16 bits, as (name without layer numbers, weights), the largest first."""
        sums: dict[str, int] = {}
        for name, size in self.sizes.items():
            if name not in self.linears and name not in self.packed:
                plain = re.sub(r"\.\d+\.", ".*.", name)
                sums[plain] = sums.get(plain, 0) + size
        return sorted(sums.items(), key=lambda item: -item[1])


def _on_one_device(device_map: Any) -> bool:
    return torch.cuda.device_count() <= 1 or (isinstance(device_map, dict) and len(set(device_map.values())) == 1)


def _on_cpu(device_map: Any) -> bool:
    return isinstance(device_map, dict) and "cpu" in {str(device) for device in device_map.values()}


def policy_of(model: Any) -> Policy:
    """The policy for a model as Transformers makes it; on the meta device too.

    4 bits: linear layers, expert stacks, and subclasses of ``nn.Linear``. As they are: embeddings, head, routers,
    norms, convolutions, matrices of a few rows or columns, what the class itself keeps out of 16 bits, and whatever is
    no matrix.
    """
    owned = _owners(model)
    outside = {id(parameter) for parameter in _embeddings_and_head(model)}
    linears: set[str] = set()
    packed: set[str] = set()
    left: set[str] = set()
    counts = _expert_counts(model)
    uncalled = read_family(model).uncalled
    for name, (module, parameter) in owned.items():
        path, _, kind = name.rpartition(".")
        if id(parameter) in outside or not parameter.is_floating_point():
            continue
        linear = isinstance(module, nn.Linear | Conv1D)
        if not should_convert_module(path, model._keep_in_fp32_modules) or (
            parameter.dim() == 2
            and (
                _ROUTER.search(path)
                or (parameter.shape[0] in counts and _GATE.search(path))
                or (linear and _is_small(parameter))
            )
        ):
            left.add(path)
        elif linear:
            if kind == "weight":
                plain = (type(module) is nn.Linear or isinstance(module, Conv1D)) and path not in uncalled
                (linears if plain else packed).add(name)
        elif _is_stack(module, parameter):
            packed.add(name)
    sizes = {name: parameter.numel() for name, (_, parameter) in owned.items() if id(parameter) not in outside}
    return Policy(frozenset(linears), frozenset(packed), frozenset(left), sizes)


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    return {
        f"{path}.{name}" if path else name: (module, parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _embeddings_and_head(model: Any) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)
    head = model.get_output_embeddings()
    if head is not None:
        yield from head.parameters()


def _expert_counts(model: Any) -> frozenset[int]:
    """Outputs that a router may have: one for each expert, or one for the shared expert's gate."""
    config = model.config.get_text_config()
    return frozenset({1, *(count for key in _EXPERT_COUNTS if isinstance(count := getattr(config, key, None), int))})


def _is_stack(module: nn.Module, parameter: Tensor) -> bool:
    """Several matrices in one parameter. A convolution's weight has three dimensions too."""
    if isinstance(module, nn.modules.conv._ConvNd) or parameter.dim() != 3:
        return False
    return parameter.shape[0] > 1 and not _is_small(parameter[0])


def _is_small(matrix: Tensor) -> bool:
    return min(matrix.shape) < _LEAST_SIDE


class FourBitConfig(BitsAndBytesConfig):
    """bitsandbytes' configuration, by which Transformers finds slimtune's quantiser.

    Args:
        mxfp4: The files hold expert stacks in MXFP4, which stay what they are.
        linears: Pack the linear layers; off, only stacks that are packed in the files stay so.
        in_ram: Names of parameters whose bytes go to locked RAM as each is read: the device never holds them together.
        kept: What is read are the model's own tensors, packed already.
        options: As ``BitsAndBytesConfig`` takes them.
    """

    def __init__(
        self,
        *,
        mxfp4: bool = False,
        linears: bool = True,
        in_ram: Collection[str] = (),
        kept: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.mxfp4, self.linears, self.in_ram, self.kept = mxfp4, linears, sorted(in_ram), kept
        self.quant_method = _METHOD  # type: ignore[assignment]  # a string is what the registry takes


def four_bit_config(
    *,
    double_quant: bool,
    compute_dtype: torch.dtype,
    mxfp4: bool = False,
    linears: bool = True,
    in_ram: Collection[str] = (),
    kept: bool = False,
) -> FourBitConfig:
    """NF4 as QLoRA has it (arXiv:2305.14314): 4-bit NormalFloat, scales quantised again if ``double_quant``.

    What is given to Transformers' ``from_pretrained`` as ``quantization_config``.
    """
    # Transformers' own registry of quantisers; an entry of its own name changes nothing for other models.
    AUTO_QUANTIZER_MAPPING.setdefault(_METHOD, FourBitQuantizer)
    return FourBitConfig(
        mxfp4=mxfp4,
        linears=linears,
        in_ram=in_ram,
        kept=kept,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


class FourBitQuantizer(Bnb4BitHfQuantizer):
    """Transformers' hooks for the policy: on the skeleton, on each tensor as it is read, and at the end."""

    quantization_config: FourBitConfig
    policy: Policy
    in_ram: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    """Of these, embeddings: they go there without being on the device."""
    device: torch.device
    """That reads what is in RAM."""
    shelves: Shelves | None = None
    not_finite: list[str]
    """What held a NaN or an infinity when it was read; an error raised there would be the loader's own."""

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:  # type: ignore[override]
        self.policy, self.not_finite = policy_of(model), []
        self.in_ram = frozenset(self.quantization_config.in_ram)
        embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        self.tables = self.in_ram & embeddings
        self.device = torch.device("cpu" if _on_cpu(options.get("device_map")) else "cuda")
        self.shelves = self._make_shelves(model) if _on_one_device(options.get("device_map")) else None
        if not self.quantization_config.linears:
            self.policy = replace(self.policy, linears=frozenset())
            return
        _check_share(model, self.policy)
        if _on_cpu(options.get("device_map")) and misreads_partial_blocks():
            self.policy = self.policy.without_partial_rows(model)
        mine = (name.removesuffix(".weight") for name in self.policy.packed if name.endswith(".weight"))
        self.quantization_config.llm_int8_skip_modules = [
            *_output_names(model), *sorted(self.policy.left), *sorted(mine),
        ]  # fmt: skip
        super()._process_model_before_weight_loading(model, **options)

    def _make_shelves(self, model: Any) -> Shelves:
        config, parameters = self.quantization_config, dict(model.named_parameters())
        packed = {name for name in self.policy.packed if config.linears or parameters[name].dim() == 3}
        names = ((self.policy.linears if config.linears else frozenset()) | packed) - self.in_ram
        double = config.bnb_4bit_use_double_quant
        return Shelves({
            name: bulk_bytes(
                parameters[name].shape, double_quant=double, mxfp4=config.mxfp4 and parameters[name].dim() == 3
            )
            for name in names
        })  # fmt: skip

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        # To PEFT, TRL and the Trainer it is a model of bitsandbytes'.
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        self.quantization_config.in_ram, self.quantization_config.kept = [], False  # of this load, not of the model
        self.shelves = None  # which would hold the memory of layers that leave the device later
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **options)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Whether ``param_name`` is to be packed once it is read."""
        mine = param_name in self.policy.packed or param_name in self.in_ram
        return mine or bool(super().param_needs_quantization(model, param_name, **options))

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes a weight for which Transformers makes room on the device beforehand."""
        return 0.0 if param_name in self.in_ram else float(super().param_element_size(model, param_name, param))

    def get_quantize_ops(self) -> ConversionOps:
        """What packs a tensor that was read."""
        return _Pack(self)  # type: ignore[no-untyped-call]

    def update_weight_conversions(self, weight_conversions: list[Any], *of_model: Any) -> list[Any]:
        """Transformers' conversions from the files' tensors to the model's, and MXFP4's if the files hold such."""
        tables: list[Any] = [_by_way_of_the_host(name) for name in self.tables]
        if self.quantization_config.kept:
            return tables
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *of_model)  # type: ignore[no-untyped-call]
        for conversion in conversions:
            if _goes_one_by_one(conversion):
                conversion.operations = [_PackOneByOne(conversion.operations, self)]
        conversions += tables
        if not self.quantization_config.mxfp4:
            return conversions
        stacks = ("gate_up_proj", "down_proj")
        return [*conversions, *(_mxfp4_conversion(stack) for stack in stacks)]


def _by_way_of_the_host(name: str) -> WeightConverter:
    """Transformers reads what has a conversion of this kind to RAM, not to the device; what is there may stay."""
    ending = ".".join(name.split(".")[-2:])
    return WeightConverter(
        source_patterns=[re.escape(ending)], target_patterns=ending, operations=[_AsItIs()], force_cpu=True
    )


def _mxfp4_conversion(stack: str) -> WeightConverter:
    return WeightConverter(
        source_patterns=[f"{stack}_blocks", f"{stack}_scales"], target_patterns=stack, operations=[_TakeMxfp4(stack)]
    )


class _Pack(Bnb4bitQuantize):
    """NF4 for what the policy names; bitsandbytes' linear layers as Transformers packs them."""

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:  # type: ignore[override]
        policy, config = self.hf_quantizer.policy, self.hf_quantizer.quantization_config
        made: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if isinstance(tensor, Params4bit):  # kept from an earlier start
                made[name] = self._fitted(tensor, name, options)
            elif not isinstance(tensor, PackedTensor):
                if not is_finite(tensor):
                    self.hf_quantizer.not_finite.append(name)
                if name in policy.packed:
                    tensor = Nf4Tensor.quantize(tensor, double_quant=config.bnb_4bit_use_double_quant)
                elif not self._stays(name, options):
                    made |= super().convert({name: tensor}, **options)
            if name not in made:
                made[name] = nn.Parameter(tensor, requires_grad=False)
            if name in self.hf_quantizer.in_ram:
                try:
                    move_to_ram(places_of(made[name]), self.hf_quantizer.device, "base's weights")
                except SlimtuneError as error:
                    raise PassedThrough(error) from error
            elif self.hf_quantizer.shelves is not None:
                self.hf_quantizer.shelves.place(name, made[name])
        return made

    @staticmethod
    def _fitted(weight: Any, name: str, options: dict[str, Any]) -> Any:
        """A packed weight, known to its layer as bitsandbytes does it when it packs one."""
        layer = options["model"].get_submodule(name.rpartition(".")[0])
        weight.module, layer.quant_state, layer._is_hf_initialized = layer, weight.quant_state, True
        return weight

    def _stays(self, name: str, options: dict[str, Any]) -> bool:
        """Whether a parameter is no linear layer's: it is here to go to RAM as it is."""
        return name in self.hf_quantizer.in_ram and not isinstance(
            options["model"].get_submodule(name.rpartition(".")[0]), Linear4bit
        )


def _goes_one_by_one(conversion: Any) -> bool:
    """Whether a conversion stacks a layer's experts, and does nothing across them after that."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return False
    first, *others = conversion.operations
    if not isinstance(first, MergeModulelist) or first.dim != 0:
        return False
    return all(
        (isinstance(operation, Concatenate) and operation.dim > 0)
        or (isinstance(operation, Transpose) and min(operation.dim0, operation.dim1) > 0)
        for operation in others
    )


class _PackOneByOne(ConversionOps):
    """What Transformers makes of a layer's experts, for one expert after the other, each packed before the next.

    Stacked first, the experts of a layer would lie in 16 bits twice: as they were read, and as one tensor.
    """

    def __init__(self, operations: list[Any], quantizer: FourBitQuantizer) -> None:
        self.operations, self.quantizer = operations, quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackOneByOne:
        return self  # Transformers copies a conversion for each parameter; this one keeps nothing of any

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:  # type: ignore[override]
        counts = {len(tensors) for tensors in input_dict.values()}
        if options["full_layer_name"] not in self.quantizer.policy.packed or len(counts) != 1:
            return self._converted(input_dict, options)
        made: dict[str, list[Nf4Tensor]] = {}
        for at in range(counts.pop()):
            one = {pattern: [tensors[at]] for pattern, tensors in input_dict.items()}
            for tensors in input_dict.values():
                tensors[at] = None  # read, and let go once it is packed
            for name, stack in self._converted(one, options).items():
                if not is_finite(stack):
                    self.quantizer.not_finite.append(name)
                double_quant = self.quantizer.quantization_config.bnb_4bit_use_double_quant
                made.setdefault(name, []).append(Nf4Tensor.quantize(stack, double_quant=double_quant))
        return {name: Nf4Tensor.stacked(stacks) for name, stacks in made.items()}

    def _converted(self, tensors: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, **options)
        return tensors


class _TakeMxfp4(ConversionOps):
    """One stack's blocks and scales as they are in the files."""

    def __init__(self, stack: str) -> None:
        self.stack = stack

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:  # type: ignore[override]
        blocks, scales = (input_dict[f"{self.stack}_{part}"] for part in ("blocks", "scales"))
        name: str = options["full_layer_name"]
        dtype = options["model"].get_parameter(name).dtype
        # The loader casts what it reads to the compute dtype, in which a byte's numbers up to 255 are exact.
        blocks, scales = ((part[0] if isinstance(part, list) else part).to(torch.uint8) for part in (blocks, scales))
        return {name: Mxfp4Tensor.of_files(blocks, scales, dtype)}


class _AsItIs(ConversionOps):
    """A tensor as it is in the files."""

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:  # type: ignore[override]
        (tensor,) = input_dict.values()
        return {options["full_layer_name"]: tensor[0] if isinstance(tensor, list) else tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


def _output_names(model: Any) -> list[str]:
    """The head's name, which bitsandbytes leaves as it is."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if head is not None and module is head]


def _check_share(model: Any, policy: Policy) -> None:
    if policy.share >= LEAST_SHARE:
        return
    rest = ", ".join(f"{name} ({2 * size / 2**20:,.0f} MiB)" for name, size in policy.rest[:4])
    raise UserError(
        f"only {policy.share:.0%} of {type(model).__name__}'s weights can lie in 4 bits",
        rule=f"What stays in 16 bits: {rest}.",
        way_out="Train it as it is: --quantization none.",
    )
