"""The fast engine: one model instance made fast, reversibly.

Two ways in:

``fuse(model) -> Fusion`` for anybody's own script, one line after the trainer is made::

    fusion = fuse(trainer.model)       # a PEFT-wrapped causal LM; raises CannotFuse with the reason
    print(fusion)                      # fused 24 of 24 decoder layers and the head
    trainer.train()
    fusion.undo()

``Engine`` for slimtune's own trainer: no autograd, no host synchronisation, CUDA graphs::

    engine = Engine(
        model, dtype=torch.bfloat16, tokens=config.batch_tokens, longest=config.max_length, memory=bytes_or_None,
        seed=config.seed,
    )
    optimizer = FusedAdamW8bit(engine.flat, lr=..., betas=..., eps=..., weight_decay=...)

    engine.choose_channels(batch)                           # once, with fp8=True: what it multiplies nearly exactly
    loss = engine.forward_backward(batch, num_supervised)   # 0-d float32 tensor on the device; adds to param.grad
    norm = optimizer.clip_(max_grad_norm)                   # 0-d float32 tensor on the device
    optimizer.nonfinite                                     # 0-d bool tensor on the device; such a step is skipped
    optimizer.step()
    optimizer.zero_grad()

    loss_sum, n = engine.evaluate(batch)                    # 0-d tensor on the device, int
    engine.plan                                             # MemoryPlan: what is kept, predicted bytes
    engine.state_dict(), engine.load_state_dict(...)        # the dropout's place, those channels; not the optimizer

``batch`` holds ``input_ids`` and ``labels`` int64 [B, S] with ``position_ids`` (packed) or ``attention_mask`` (padded
on the right) **on the CPU**, and the documents' ``lengths`` if they are known (:mod:`slimtune.batch`);
``num_supervised`` is the number of supervised tokens in the whole gradient accumulation window, an int or a tensor. The
LoRA parameters must be float32 before the engine is made.
"""

from slimtune.engine.engine import Engine
from slimtune.engine.fuse import Fusion, fuse
from slimtune.engine.optimizer import FlatParameters, FusedAdamW8bit
from slimtune.engine.structure import CannotFuse

__all__ = ["CannotFuse", "Engine", "FlatParameters", "FusedAdamW8bit", "Fusion", "fuse"]
