"""slurm.sbatch with stand-ins for SLURM's commands: what is started, and when the job is queued again."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("bash") or os.name == "nt", reason="a job script needs bash")


def submit(folder, state, **changed):
    """Run the script; srun leaves status.json in this state. The calls, a line each, and the finished process."""
    for name, body in (("srun", f'mkdir -p run; echo \'{{"state": "{state}"}}\' > run/status.json'),
                       ("scontrol", 'if [ "$1" = show ]; then echo node7; echo node8; fi'), ("scancel", "")):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> calls\n{body}\n')
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": "run", "SLURM_JOB_ID": "42", "SLURM_NNODES": "2",
           "SLURM_JOB_NODELIST": "node[7-8]", **changed}
    done = subprocess.run(["bash", str(ROOT / "slurm.sbatch"), "--config=configs/imagenet256.py"], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=30)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return calls, done


def test_a_stopped_run_is_queued_again_and_a_finished_one_is_not(tmp_path):
    for state, again in (("stopped", True), ("done", False), ("failed:user", False)):
        folder = tmp_path / state.replace(":", "-")
        folder.mkdir()
        calls, _ = submit(folder, state)
        assert ("scontrol requeue 42" in calls) == again, state


def test_all_nodes_meet_at_the_first_and_the_flags_reach_train(tmp_path):
    (call,) = [c for c in submit(tmp_path, "done")[0] if c.startswith("srun")]
    assert "torchrun --nnodes=2 --nproc_per_node=8" in call and "--rdzv_endpoint=node7:29500" in call
    assert call.endswith("train.py --config=configs/imagenet256.py --out=run")


def test_a_job_without_a_run_folder_is_an_error(tmp_path):
    calls, done = submit(tmp_path, "done", OUT="")
    assert done.returncode != 0 and "OUT=out/name" in done.stderr and not calls
