"""TRL's SFTTrainer with a learning rate of its own for the projectors, and tokens per second in the logs."""

import time

from trl import SFTTrainer

from open_r1.training import TrainsParts, WholeCheckpoints


class HumanOmniSFTTrainer(WholeCheckpoints, TrainsParts, SFTTrainer):
    """Takes batches from `open_r1.data.SupervisedCollator`.

    Args:
        projector_learning_rate: of the projectors and the gate; None for the common one.
    """

    def __init__(self, *args, projector_learning_rate: float | None = None, **kwargs):
        self.projector_learning_rate = projector_learning_rate
        self._tokens_logged, self._time_logged = 0, time.monotonic()
        super().__init__(*args, **kwargs)

    def train(self, *args, **kwargs):
        self._time_logged = time.monotonic()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            logs["tokens_per_second"] = (self._total_train_tokens - self._tokens_logged) / (now - self._time_logged)
            self._tokens_logged, self._time_logged = self._total_train_tokens, now
        super().log(logs, start_time)
