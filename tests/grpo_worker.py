"""The GRPO entry point in a process of its own, with what tests need: fixed completions, and a kill at a step.

usage: grpo_worker.py [options of open_r1.grpo]; FIXED=1 replaces sampling, KILL_AT=N kills the process at step N.
"""

import os
import signal
import sys

from transformers import TrainerCallback

from open_r1 import grpo
from open_r1.training import run

TEXTS = ("<think>a</think><answer>happy</answer>", "sad", "<think>b", "<answer>angry</answer>")


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Trainer(grpo.HumanOmniGRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if "KILL_AT" in os.environ:
            self.add_callback(KillAt(int(os.environ["KILL_AT"])))

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if "FIXED" not in os.environ:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        tokenizer = self.processor.tokenizer
        rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
        return [rows[row % 4] for row in range(len(prompt_ids))], None


grpo.HumanOmniGRPOTrainer = Trainer
run(lambda: grpo.main(sys.argv[1:]))
