"""Evaluates inside training: every N steps the model answers held-out clips, and WAR and UAR join the logs."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from trl.models import unwrap_model_for_generation

from humanomni.errors import HumanOmniError
from open_r1.data import read_samples
from open_r1.labels import CLASSES
from open_r1.metrics import score
from open_r1.prediction import Prediction, Predictor, check_labels, classes_of

logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments:
    """The held-out clips answered during training."""

    held_out: str | None = field(
        default=None, metadata={"help": "List of samples to answer during training, for eval/war and eval/uar."}
    )
    held_out_every: int = field(default=100, metadata={"help": "Steps between those evaluations."})
    held_out_set: str | None = field(
        default=None, metadata={"help": "dfew, mafw or ravdess for that set's classes; else the labels that occur."}
    )
    held_out_new_tokens: int = field(default=256, metadata={"help": "Longest answer in those evaluations, in tokens."})


def evaluate_within(
    trainer: Trainer, arguments: EvaluationArguments, *, data_folder: str, feature_cache, think: bool
) -> None:
    """Adds the evaluation that `arguments` ask for to `trainer`, if any; `think` as for `Predictor`."""
    if arguments.held_out is None:
        return
    predictor = Predictor(
        trainer.processing_class,
        read_samples(arguments.held_out),
        data_folder=data_folder,
        feature_cache=feature_cache,
        think=think,
        batch_size=trainer.args.per_device_eval_batch_size,
        max_new_tokens=arguments.held_out_new_tokens,
    )
    trainer.add_callback(EvaluationCallback(trainer, predictor, arguments.held_out_every, arguments.held_out_set))


class EvaluationCallback(TrainerCallback):
    """Logs `eval_war`, `eval_uar` and `eval_format_rate`, in per cent, and `eval_failed`, the number of clips that do
    not read and count as wrong. TensorBoard and W&B show them as `eval/war`, and so on.

    The processes share the clips. Training is the same with it as without it: random numbers, train mode and what the
    trainer was about to log are left as they were.

    Args:
        trainer: the one this is added to, with `trainer.add_callback(EvaluationCallback(trainer, predictor, 50))`.
        predictor: holds the samples and how they are asked.
        every: steps between evaluations; there is one at the end as well.
        dataset: `dfew`, `mafw` or `ravdess` for the classes of that set; by default the labels that occur.
    """

    def __init__(self, trainer: Trainer, predictor: Predictor, every: int, dataset: str | None = None):
        if every < 1:
            raise HumanOmniError(f"an evaluation every {every} steps is asked for; pass a whole number of at least 1")
        if dataset is not None and dataset not in CLASSES:
            raise HumanOmniError(f"the set {dataset!r} is unknown; pass one of {', '.join(CLASSES)}")
        self.trainer = trainer
        self.predictor = predictor
        self.every = every
        samples = [question.sample for question in predictor.questions]
        self.labels = [sample.answer for sample in samples]
        self.classes = classes_of(self.labels) if dataset is None else CLASSES[dataset]
        check_labels(samples, self.classes)
        self.told: set[str] = set()  # what is wrong with clips, each to be said once

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        should_log = control.should_log
        with as_it_was(self.trainer.model):
            # In eval mode TRL's trainers do not mix these figures with those of training, nor use up the latter.
            self.trainer.model.eval()
            self.trainer.log(self.scores(self.answers()))
        control.should_log = should_log  # the trainer drops its own next log after any other

    def scores(self, predictions: list[Prediction]) -> dict[str, float]:
        responses = {prediction.index: prediction.response for prediction in predictions}
        responses = [responses[index] for index in range(len(self.labels))]
        metrics = score(self.labels, responses, self.classes, resamples=1)
        return {
            "eval_war": metrics["strict"]["war"],
            "eval_uar": metrics["strict"]["uar"],
            "eval_format_rate": metrics["format_rate"],
            "eval_failed": metrics["failed"],
        }

    def answers(self) -> list[Prediction]:
        """The predictions of all processes, some of them twice."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        batches = own_share(self.predictor.batches, accelerator.process_index, accelerator.num_processes)
        # ZeRO-3 gathers the weights once for all batches.
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            answered = [one for some in self.predictor.answer(model, batches) for one in some]
        for error in {prediction.error for prediction in answered if prediction.error} - self.told:
            logger.warning("a held-out clip counts as wrong: %s", error)
            self.told.add(error)
        return gather_object(answered)


def own_share(batches: list, rank: int, world_size: int) -> list:
    """This process's batches, as many as every other process has.

    Sharded weights hang training where one process generates and another does not, so the last round is filled with
    batches that another process answers too.
    """
    rounds = -(-len(batches) // world_size)
    return [batches[(rank + turn * world_size) % len(batches)] for turn in range(rounds)]


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Restores the train or eval mode of every module, and every state of random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, training in modes:
                module.training = training
