"""Every kernel on this CUDA machine: against its reference, and timed beside plain torch. A minute or two."""

import adamw8bit
import cross_entropy
import experts
import lora
import mlp
import nf4
import norm
import rope
from bench import main

MODULES = (nf4, norm, rope, mlp, lora, cross_entropy, adamw8bit, experts)

if __name__ == "__main__":
    main(lambda: (case for module in MODULES for case in module.cases()))
