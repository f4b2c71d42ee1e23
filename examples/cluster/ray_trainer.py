"""python ray_trainer.py MODEL DATA RUN WORKERS: a run whose ranks are Ray's workers (ray[train]).

Ray gives each worker its GPU, and its host and port to meet at; slimtune needs no more. With CPU=1 in the environment
the workers take a CPU each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def rank(config: dict[str, Any]) -> None:
    """One of Ray's workers: the command, told which it is."""
    from ray import train

    context = train.get_context()
    told = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": int(os.environ["MASTER_PORT"]) + 1,  # Ray's own group has taken the first
    }
    environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
    command = [sys.executable, "-m", "slimtune", "train", *config["words"]]
    code = subprocess.call(command, env=environment)
    if code:
        raise SystemExit(code)


def main() -> None:
    """Train."""
    model, data, run, workers = sys.argv[1:5]
    trainer = TorchTrainer(
        rank,
        train_loop_config={"words": [model, data, "-o", run, *sys.argv[5:]]},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=os.environ.get("CPU") != "1"),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
