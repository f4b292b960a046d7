"""Supervised fine-tuning: the cold start on reasoning samples, and the label-only baseline.

    torchrun --nproc_per_node 8 -m open_r1.sft --config configs/cold_start.yaml --model_path ... --data ...

From a list of samples to a checkpoint that `inference.py` takes. Every option may stand in the YAML file and on the
command line, where it wins; `--help` lists them all.
"""

import logging
from dataclasses import asdict, dataclass, field

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig

from humanomni import CheckpointError
from open_r1.cache_features import FeatureCache
from open_r1.data import (
    BadSamples,
    DataError,
    LoadedData,
    Sample,
    SampleEncoder,
    SupervisedCollator,
    prepare_samples,
    read_samples,
)
from open_r1.run_record import write_run_record
from open_r1.trainer.evaluation_callback import EvaluationArguments, evaluate_within
from open_r1.trainer.sft_trainer import HumanOmniSFTTrainer
from open_r1.training import (
    ENCODERS,
    ModelArguments,
    check_arguments,
    checkpoint_to_resume,
    init_distributed,
    library_checks,
    load_for_training,
    lora_config,
    parse_arguments,
    run,
    train_and_save,
    use_bar,
)

logger = logging.getLogger(__name__)

BAR = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr", "tokens_per_second": "tok/s"}
PANELS = {
    "Loss": ["loss", "eval_loss"],
    "Learning rate": ["learning_rate"],
    "Gradient norm": ["grad_norm"],
    "Token accuracy": ["mean_token_accuracy", "eval_mean_token_accuracy"],
    "Held-out WAR and UAR": ["eval_war", "eval_uar"],
}


@dataclass
class DataArguments:
    """The samples to learn from and how they are shown."""

    data: str = field(metadata={"help": "List of samples: a JSON list, a JSONL file or a YAML mixture."})
    data_folder: str = field(default="", metadata={"help": "Where the samples' relative clip paths start."})
    eval_data: str | None = field(default=None, metadata={"help": "List of samples to compute the loss on."})
    prompt_style: str = field(
        default="inference", metadata={"help": "inference: asked as inference asks; release: as the released SFT did."}
    )
    too_long: str = field(
        default="truncate_text",
        metadata={"help": "Samples over max_length: truncate_text (media tokens are never cut) or drop."},
    )
    on_bad_sample: str = field(
        default="error", metadata={"help": "A clip that is missing or does not read: error, or skip and go on."}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder made by open_r1.cache_features; the towers are then never loaded."}
    )


def main(argv: list[str] | None = None) -> None:
    classes = (DataArguments, ModelArguments, EvaluationArguments, SFTConfig)
    data, model_arguments, evaluation, arguments = parse_arguments(classes, argv)
    check_arguments(arguments)
    init_distributed(arguments)
    main_process = arguments.process_index == 0

    set_seed(arguments.seed)  # for a gate that starts at random
    model, processor = load_for_training(model_arguments, load_towers=data.feature_cache is None)
    context = model.config.max_position_embeddings
    if arguments.max_length is not None and arguments.max_length > context:
        raise CheckpointError(f"max_length {arguments.max_length} is over the model's context of {context} tokens")
    cache = None
    if data.feature_cache is not None:
        cache = FeatureCache(data.feature_cache, processor, data.data_folder)
    train = load_data(data.data, data, arguments, processor, cache)
    held_out = load_data(data.eval_data, data, arguments, processor, cache) if data.eval_data else None
    check_trained_towers(model_arguments, arguments, train.samples)
    checkpoint = checkpoint_to_resume(arguments)
    if main_process:
        print(f"{data.data}: {train}", flush=True)
        if held_out is not None:
            print(f"{data.eval_data}: {held_out}", flush=True)
        write_run_record(
            arguments.output_dir, asdict(data) | asdict(model_arguments) | asdict(evaluation) | arguments.to_dict()
        )

    # The collator reads the samples itself; TRL must leave its columns and rows alone.
    arguments.remove_unused_columns = False
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    if arguments.ddp_find_unused_parameters is None:
        # The model gives every other part a gradient in each step; the encoders' last layers are not read.
        arguments.ddp_find_unused_parameters = any(part in ENCODERS for part in model_arguments.trainable_parts)
    bad_samples = BadSamples(arguments.output_dir, arguments.process_index)
    if checkpoint is None:
        bad_samples.file.unlink(missing_ok=True)
    with library_checks():
        trainer = HumanOmniSFTTrainer(
            model=model,
            args=arguments,
            data_collator=SupervisedCollator(
                processor,
                data.prompt_style,
                data.data_folder,
                max_length=arguments.max_length,
                on_bad_sample=data.on_bad_sample,
                feature_cache=cache,
                bad_samples=bad_samples,
            ),
            train_dataset=as_dataset(train),
            eval_dataset=None if held_out is None else as_dataset(held_out),
            processing_class=processor,
            peft_config=lora_config(model_arguments),
            projector_learning_rate=model_arguments.projector_learning_rate,
        )
    use_bar(trainer, BAR)
    evaluate_within(trainer, evaluation, data_folder=data.data_folder, feature_cache=cache, think=False)

    output = train_and_save(trainer, model_arguments, checkpoint, PANELS, bad_samples)
    if main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        told = f", loss {losses[0]:.4g} at first and {losses[-1]:.4g} at last" if losses else ""
        print(f"{trainer.state.global_step} steps{told}: {output}")


def load_data(path: str, data: DataArguments, arguments: SFTConfig, processor, cache=None) -> LoadedData:
    """The samples of a list that training can use."""
    return prepare_samples(
        read_samples(path, seed=arguments.seed),
        SampleEncoder(processor, data.prompt_style),
        data_folder=data.data_folder,
        max_length=arguments.max_length,
        too_long=data.too_long,
        on_bad_sample=data.on_bad_sample,
        feature_cache=cache,
        count_seconds=arguments.process_index == 0,
    )


def check_trained_towers(model_arguments: ModelArguments, arguments: SFTConfig, samples: list[Sample]) -> None:
    """DeepSpeed waits for every process's gradient of every weight, but a tower runs where its media are only.

    Raises:
        DataError: a tower trains on samples of which some lack its media.
    """
    if not arguments.deepspeed or arguments.world_size == 1:
        return
    for part, tags in (("vision_tower", ("<video>", "<image>")), ("audio_tower", ("<audio>",))):
        if part in model_arguments.trainable_parts:
            lacking = [sample for sample in samples if not any(tag in sample.turns[0] for tag in tags)]
            if lacking:
                raise DataError(
                    f"{part} trains, but {len(lacking)} samples hold none of {' and '.join(tags)}, "
                    f"{lacking[0].origin} first; leave them out, or train without deepspeed"
                )


def as_dataset(loaded: LoadedData) -> Dataset:
    """One row a sample; clips stay paths until a batch needs them."""
    return Dataset.from_list([{"sample": asdict(sample)} for sample in loaded.samples])


if __name__ == "__main__":
    run(main)
