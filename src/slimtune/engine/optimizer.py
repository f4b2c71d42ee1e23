"""The trainable parameters as one flat tensor, and ``paged_adamw_8bit`` over it in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.engine.kernels import adamw8bit, gradient
from slimtune.engine.kernels.formats import BLOCK, AdamWState, aligned_offsets

__all__ = ["FlatParameters", "FusedAdamW8bit", "adapter_bytes", "state_bytes"]

_STATES = ("state1", "state2", "absmax1", "absmax2")
_WRAPPED = "__bnb_optimizer_quant_state__"


def adapter_bytes(sizes: Sequence[int]) -> int:
    """What parameters of these sizes take as one flat tensor, with gradients, a micro-batch's sums, and the state."""
    count = aligned_offsets(sizes)[1]
    return 3 * 4 * count + state_bytes(count)


def state_bytes(count: int) -> int:
    """What :class:`FusedAdamW8bit` takes for a flat tensor of so many numbers: two codes each, two scales a block."""
    return 2 * count + 2 * 4 * (count // BLOCK)


class FlatParameters:
    """Makes parameters views of one float32 tensor, and their gradients views of another.

    A parameter keeps its identity, name and shape; its ``data`` moves. Whatever saves or loads it by name goes on
    working.

    Attributes:
        parameters: The parameters, in the flat tensor's order.
        data: float32 [N].
        grad: float32 [N]; each parameter's ``grad`` is a view of it.
        offsets: Where each parameter starts, a multiple of 256: no block of the 8-bit optimizer holds two of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.offsets, total = aligned_offsets([parameter.numel() for parameter in self.parameters])
        device = self.parameters[0].device
        # float64 stays float64, so that the whole path can be checked in it.
        dtype = torch.promote_types(self.parameters[0].dtype, torch.float32)
        self.data = torch.zeros(total, dtype=dtype, device=device)
        self.grad = torch.zeros(total, dtype=dtype, device=device)
        with torch.no_grad():
            for parameter, view, grad in zip(
                self.parameters, self.views(self.data), self.views(self.grad), strict=True
            ):
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = grad

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of ``flat`` [N], in its shape."""
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]

    def intact(self) -> bool:
        """Whether the parameters still are views of :attr:`data` (nothing re-assigned their ``data``)."""
        start = self.data.data_ptr()
        size = self.data.element_size()
        return all(
            parameter.data_ptr() == start + offset * size
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        )


class FusedAdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit states over all parameters at once: bitsandbytes' ``paged_adamw_8bit`` in effect and state.

    Nothing waits for the device: learning rate, step, clipping and the guard's flag are read there. ``state_dict``
    has bitsandbytes' keys and bytes for each parameter, so that either can go on from the other's checkpoint. The
    state isn't paged: for an adapter it is a few megabytes.

    Args:
        flat: The parameters.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.

    Attributes:
        grad_scale: float32 scalar on the device that gradients are multiplied with in :meth:`step` (1 unless
            :meth:`clip_` set it).
        nonfinite: bool scalar on the device, from the last :meth:`clip_`: the gradient held a NaN or an infinity, and
            the next step changes nothing.
    """

    def __init__(
        self,
        flat: FlatParameters,
        *,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.flat = flat
        device = flat.data.device
        self._moments = AdamWState.zeros([parameter.numel() for parameter in flat.parameters], device)
        self._tensor_states = self._views()
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_scale = torch.ones((), dtype=torch.float32, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        super().__init__(flat.parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """The gradient's norm, float32 scalar on the device; the next step scales the gradient down to ``max_norm``.

        The gradients themselves stay as they are: the step's kernel multiplies them on its way.
        """
        norm = gradient.global_norm(self.flat.grad)
        factor, nonfinite = gradient.clip_factor(norm, max_norm)
        self.grad_scale.copy_(factor)
        self.nonfinite.copy_(nonfinite)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a step whose gradient :meth:`clip_` found non-finite changes nothing but is counted in no state."""
        loss = closure() if closure is not None else None
        group = self.param_groups[0]
        self._lr.fill_(group["lr"])
        self._step += ~self.nonfinite
        adamw8bit.adamw_step_(
            self.flat.data, self.flat.grad, self._moments, lr=self._lr, step=self._step, betas=tuple(group["betas"]),
            eps=group["eps"], weight_decay=group["weight_decay"], grad_scale=self.grad_scale, skip=self.nonfinite,
        )  # fmt: skip
        self.grad_scale.fill_(1.0)
        self.nonfinite.fill_(False)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the flat gradient in one launch. Gradients are never None: they are views that the engine adds to."""
        del set_to_none
        self.flat.grad.zero_()

    def float_state(self) -> list[Tensor]:
        """The state's floating-point tensors, not copies: the codes' scales and the moments of small parameters."""
        moments = self._moments
        return [moments.absmax1, moments.absmax2, moments.exact1, moments.exact2]

    def storage(self) -> list[Tensor]:
        """The few tensors that the parameters and all of the state are views of, not copies."""
        moments = self._moments
        return [self.flat.data, moments.codes1, moments.codes2, moments.map1, moments.map2, *self.float_state()]

    def state_dict(self) -> dict[str, Any]:
        """bitsandbytes' state of each parameter; waits for the device (the step count)."""
        packed = super().state_dict()
        step = int(self._step)
        if step:
            packed["state"] = {
                index: {"step": step, _WRAPPED: state} for index, state in enumerate(self._tensor_states)
            }
        return packed

    def _views(self) -> list[dict[str, Tensor]]:
        """Each parameter's part of the state, as bitsandbytes names it."""
        return [
            {
                name: value.view(parameter.shape) if name.startswith("state") else value
                for name, value in self._moments.of_tensor(offset, parameter.numel()).items()
            }
            for parameter, offset in zip(self.flat.parameters, self.flat.offsets, strict=True)
        ]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this class or of bitsandbytes' 8-bit AdamW over the same parameters.

        Raises:
            ValueError: The state is of other parameters.
        """
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        saved: dict[int, dict[str, Any]] = state_dict["state"]
        step = 0
        for index, mine in enumerate(self._tensor_states):
            if index not in saved:
                continue
            theirs = {**saved[index], **saved[index].get(_WRAPPED, {})}
            step = int(theirs["step"])
            for name in _STATES:
                if name in mine:
                    if name not in theirs or theirs[name].numel() != mine[name].numel():
                        raise ValueError(f"optimizer state {name} of parameter {index} does not fit its parameter")
                    mine[name].copy_(theirs[name].view(mine[name].shape))
        self._step.fill_(step)
