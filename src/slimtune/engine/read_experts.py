"""Reads a mixture's router and experts, and PEFT's adapters around the experts, as the engine computes them; changes
nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimtune.engine.kernels.router import Choice
from slimtune.engine.read_linear import FLOATS, is_bare, read_activation, read_adapter
from slimtune.engine.structure import Activation, CannotFuse, Clamped, Experts, ExpertStack, Norm, Router
from slimtune.families.decoders import RouterForm

__all__ = ["read_experts"]

_STACKS = ("gate_up_proj", "down_proj")


def read_experts(layer: str, name: str, module: Any, mixture: Any, form: RouterForm, *, frozen: bool) -> Experts:
    """A mixture of experts.

    Args:
        layer: The layer's name, for messages.
        name: Its experts', inside the layer.
        module: The experts, wrapped by PEFT or not.
        mixture: The module that has the router.
        form: The family's.
        frozen: Nothing but adapters may train.

    Raises:
        CannotFuse: It has something that the engine doesn't compute.
    """
    wrappers: dict[str, Any] = {}
    while hasattr(module, "parameter_name"):  # PEFT's wrappers of single parameters, one around the other
        wrappers[module.parameter_name] = module
        module = module.base_layer
    if not is_bare(module):
        raise CannotFuse(f"{layer}.{name} is a {type(module).__name__}")
    known = {*_STACKS, *(f"{stack}_bias" for stack in _STACKS)}
    for other in (set(wrappers) - set(_STACKS)) | {own for own, _ in module.named_parameters()} - known:
        raise CannotFuse(f"{layer}.{name} has an adapter on {other}, or such a parameter, which the engine lacks")
    gate_up, down = (
        _read_stack(f"{layer}.{name}", module, stack, wrappers.get(stack), frozen=frozen) for stack in _STACKS
    )
    return Experts(
        router=_read_router(layer, mixture, form, frozen=frozen),
        gate_up=gate_up,
        down=down,
        activation=_activation(layer, module, form),
        # An attribute of Transformers' own, set by its decorator of experts.
        interleaved=not getattr(module, "is_concatenated", True),
    )


def _activation(layer: str, module: Any, form: RouterForm) -> Activation:
    if form.clamped:
        alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
        if alpha is None or limit is None:
            raise CannotFuse(f"{layer} has experts that don't tell where gates are clamped")
        return Clamped(float(alpha), float(limit))
    return read_activation(layer, module.act_fn)


def _read_router(layer: str, mixture: Any, form: RouterForm, *, frozen: bool) -> Router:
    module, bias = getattr(mixture, form.gate), _inside(mixture, form.bias)
    if not is_bare(module) or (frozen and any(p.requires_grad for p in module.parameters())):
        raise CannotFuse(f"{layer} trains its router, which the fused engine keeps frozen")
    own = module.proj if form.normalises else module
    if not is_bare(own) or own.weight.dtype not in FLOATS:
        raise CannotFuse(f"{layer} has an adapted or packed router, which the engine doesn't compute")
    choice = Choice(
        k=int(module.config.top_k_experts if form.normalises else module.top_k),
        score=form.score,
        renormalise=bool(getattr(module, "norm_topk_prob", True)),
        scaling=float(getattr(module, "routed_scaling_factor", 1.0)),
        groups=int(getattr(module, "num_group", 1)),
        kept_groups=int(getattr(module, "topk_group", 1)),
        epsilon=form.epsilon,
    )
    try:
        choice.group_size(len(own.weight))
    except ValueError as error:
        raise CannotFuse(f"{layer} chooses experts as the engine doesn't: {error}") from error
    return Router(
        weight=own.weight,
        choice=choice,
        wide=form.wide,
        bias=None if bias is None else bias.detach().flatten(),
        logits_bias=getattr(own, "bias", None),
        expert_scale=module.per_expert_scale if form.normalises else None,
        norm=Norm(module.scale, float(module.eps), scale=float(module.scalar_root_size)) if form.normalises else None,
    )


def _read_stack(name: str, owner: Any, parameter: str, wrapper: Any, *, frozen: bool) -> ExpertStack:
    weight, bias = getattr(owner, parameter, None), getattr(owner, f"{parameter}_bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 3:
        raise CannotFuse(f"{name} has no {parameter} for all experts")
    packed = getattr(weight, "format", None)
    if packed not in (None, "nf4", "mxfp4"):
        raise CannotFuse(f"{name}.{parameter} is packed as {packed}, which the engine doesn't unpack")
    if packed is None and weight.dtype not in FLOATS:
        raise CannotFuse(f"{name}.{parameter} is {weight.dtype}")
    if frozen and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise CannotFuse(f"{name} trains its experts themselves, which the fused engine keeps frozen")
    transposed = bool(getattr(owner, "is_transposed", False))
    experts, outputs, inputs = weight.shape
    if transposed:
        inputs, outputs = outputs, inputs
    if bias is not None and bias.shape != (experts, outputs):
        raise CannotFuse(f"{name} has biases of shape {tuple(bias.shape)} on {parameter}")
    adapter = None if wrapper is None else read_adapter(f"{name}.{parameter}", wrapper)
    # PEFT's own note of which side it took for the inputs: a square matrix doesn't tell it.
    if adapter is not None and (
        adapter.a.shape[1] != inputs or getattr(wrapper, "_did_swap_in_out_features", not transposed) == transposed
    ):
        raise CannotFuse(f"{name}.{parameter} is adapted as if it were stored the other way around")
    return ExpertStack(
        f"{name}.{parameter}",
        owner,
        parameter,
        experts,
        int(inputs),
        int(outputs),
        owner if wrapper is None else wrapper,
        adapter,
        bias,
        transposed,
    )


def _inside(module: Any, path: str) -> Any:
    """What lies at a dotted path inside a module; None if nothing does."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
