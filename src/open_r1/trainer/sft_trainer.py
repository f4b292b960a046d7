"""TRL's SFTTrainer with a learning rate of its own for the projectors, and tokens per second in the logs."""

import time

import torch
from trl import SFTTrainer

from open_r1.training import WholeCheckpoints, split_projector_groups


class HumanOmniSFTTrainer(WholeCheckpoints, SFTTrainer):
    """Takes batches from `open_r1.data.SupervisedCollator`.

    Args:
        projector_learning_rate: of the projectors and the gate; None for the common one.
    """

    def __init__(self, *args, projector_learning_rate: float | None = None, **kwargs):
        self.projector_learning_rate = projector_learning_rate
        self._tokens_logged, self._time_logged = 0, time.monotonic()
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_learning_rate is not None:
            split_projector_groups(optimizer, self.model, self.projector_learning_rate)
        return optimizer

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        # A batch without sound leaves the audio projector without a gradient, and its momentum would rest; sharded
        # training counts that as zero. So does this, or the number of processes would change the result.
        for weight in self.model.parameters():
            if weight.requires_grad and weight.grad is None and not self.is_deepspeed_enabled:
                weight.grad = torch.zeros_like(weight)
        return loss

    def train(self, *args, **kwargs):
        self._time_logged = time.monotonic()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = (self._total_train_tokens - self._tokens_logged) / (now - self._time_logged)
            self._tokens_logged, self._time_logged = self._total_train_tokens, now
        super().log(logs, start_time)
