from __future__ import annotations

import torch

from slimtune.use.attention import any_length


def test_cudnn_is_out_for_the_time_and_back_afterwards() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with any_length():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
