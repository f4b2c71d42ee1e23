"""What the cluster's files tell each rank, with the cluster stood in for."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "cluster"
STANDING_IN = {
    "scontrol": 'echo "$3" | tr , "\\n"',
    # Two tasks on each of two nodes.
    "srun": """
shift
for rank in 0 1 2 3; do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@"
done
""",
    "slimtune": 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*"',
}


@pytest.mark.parametrize("has_begun", [False, True])
def test_slurms_tasks_are_told_which_they_are(has_begun: bool, tmp_path: Path) -> None:
    for name, body in STANDING_IN.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    script = tmp_path / "slurm.sh"
    script.write_text((EXAMPLES / "slurm.sh").read_text().replace("/SHARED", str(tmp_path)))
    if has_begun:
        (tmp_path / "my-run").mkdir()
        (tmp_path / "my-run" / "config.yaml").touch()
    slurm = {
        "SLURM_JOB_NODELIST": "node7,node9",
        "SLURM_JOB_ID": "123",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    told = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True).stdout
    command = f"resume {tmp_path}/my-run" if has_begun else f"train MODEL {tmp_path}/chats.jsonl -o {tmp_path}/my-run"
    ranks = [f"{rank} 4 {rank % 2} 2 node7 20123: {command}" for rank in range(4)]
    assert told.splitlines() == ranks
