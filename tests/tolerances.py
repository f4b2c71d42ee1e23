"""How far a kernel may be from its float64 reference, by the dtype of its inputs and outputs, and why.

An error is measured relative to the largest magnitude in the expected tensor, so that a bound means "units of the
result's own scale" and elements near zero don't decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GRADIENT", "GRADIENT_16_BIT", "TOLERANCES", "assert_close", "relative_error"]

TOLERANCES: dict[torch.dtype, float] = {
    # 24 bits of mantissa: one rounding is 6e-8; sums of a few thousand terms in another order and approximate
    # exp and division cost a few dozen of those.
    torch.float32: 4e-6,
    # 11 bits: rounding the result once costs 2^-11 = 4.9e-4 of an element at most; everything before is float32.
    torch.float16: 5.5e-4,
    # 8 bits: 2^-8 / 2 = 3.9e-3 at most, likewise.
    torch.bfloat16: 4.2e-3,
}

GRADIENT = 1e-4
"""A LoRA gradient in float32 against the documents' one by one, relative in norm: sums in another order through a few
layers cost some 1e-6; a document that sees another costs 1e-2 and more."""
GRADIENT_16_BIT = 0.15
"""The same under autocast to bfloat16: each product is rounded to 8 bits, and the smallest matrices' gradients are
sums of few terms."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected; infinite if ``actual`` has a value that isn't finite."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def assert_close(actual: Tensor, expected: Tensor, *, dtype: torch.dtype, factor: float = 1.0) -> None:
    """``actual`` is within ``factor`` tolerances of ``dtype`` of the float64 reference ``expected``.

    A factor over 1 stands beside the test with its reason: a result that was rounded more than once.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, bound = relative_error(actual, expected), TOLERANCES[dtype] * factor
    assert error <= bound, f"relative error {error:.3g} over {bound:.3g} for {dtype}"


FAMILY_GRADIENT = 1e-4
"""A LoRA gradient of a tiny model in fp32, packed against document by document. Rounding alone gives up to 1e-5; a
router that takes its experts by a near tie, or a state that is summed in another order, ten times that."""
FAMILY_LOGITS = 1e-5
"""A logit of the same adapter on the same base in fp32, read by slimtune and by plain PEFT."""
SUM_OF_RANKS = 1e-6
"""A step's gradient in fp32 summed by three ranks against one process, of the largest of it: six terms in another
order."""
