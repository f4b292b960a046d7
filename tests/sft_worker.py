"""open_r1.sft's own main in a process that dies by SIGKILL at a named moment, as if the machine had failed.

usage: KILL_AT=MOMENT sft_worker.py [options of open_r1.sft]; MOMENT is `step:N` (in the middle of step N, when its
gradients are about to be computed) or `file:PATH` (when half of a file whose path ends so is written). In a group of
processes only number KILL_RANK (default 0) dies.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import transformers.modeling_utils
from accelerate import Accelerator
from transformers import TrainerState

from open_r1 import sft
from open_r1.training import run

KIND, _, WHERE = os.environ.get("KILL_AT", "").partition(":")
DIES = int(os.environ.get("RANK", 0)) == int(os.environ.get("KILL_RANK", 0))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(write, path_at: int):
    """`write`, which gets the path as its argument number `path_at`, but dies in the middle of the doomed file."""

    def writing(*args, **kwargs):
        result = write(*args, **kwargs)
        path = Path(args[path_at])
        if str(path).endswith(WHERE):
            os.truncate(path, path.stat().st_size // 2)
            die()
        return result

    return writing


def dying_backward(backward, step: int):
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == step:
            die()
        return backward(*args, **kwargs)

    return counted


if KIND == "step" and DIES:
    Accelerator.backward = dying_backward(Accelerator.backward, int(WHERE))
if KIND == "file" and DIES:
    torch.save = half_written(torch.save, 1)
    TrainerState.save_to_json = half_written(TrainerState.save_to_json, 1)
    transformers.modeling_utils.safe_save_file = half_written(transformers.modeling_utils.safe_save_file, 1)

run(lambda: sft.main(sys.argv[1:]))
