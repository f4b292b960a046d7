"""RLVR: GRPO with verifiable rewards on video and audio.

    torchrun --nproc_per_node 8 -m open_r1.grpo --config configs/grpo.yaml --model_path ... --data ...

For each clip G completions are sampled, rewarded by rules, and made more or less likely by their advantage within the
group, with a KL penalty towards the starting model. Every option may stand in the YAML file and on the command line,
where it wins; `--help` lists them all.
"""

import logging
from dataclasses import asdict, dataclass, field

from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig

from humanomni.errors import PromptError
from open_r1.cache_features import FeatureCache
from open_r1.data import BadSamples, DataError, Sample, clip_path, encode_prompt, question_of, read_samples
from open_r1.rewards import reward_functions
from open_r1.run_record import write_run_record
from open_r1.trainer.evaluation_callback import EvaluationArguments, evaluate_within
from open_r1.trainer.grpo_trainer import Efficiency, HumanOmniGRPOTrainer
from open_r1.training import (
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

BAR = {"reward": "reward", "kl": "kl", "completions/mean_length": "length", "tokens_per_second": "tok/s"}
PANELS = {
    "Reward": ["reward"],
    "Accuracy reward": ["rewards/accuracy_reward/mean"],
    "Format reward": ["rewards/format_reward/mean"],
    "Completion length": ["completions/mean_length"],
    "KL": ["kl"],
    "Entropy": ["entropy"],
    "Held-out WAR and UAR": ["eval_war", "eval_uar"],
}


@dataclass
class DataArguments:
    """The clips to answer about and how the answers are rewarded."""

    data: str = field(metadata={"help": "List of samples whose answer is the label: JSON, JSONL or a YAML mixture."})
    data_folder: str = field(default="", metadata={"help": "Where the samples' relative clip paths start."})
    eval_data: str | None = field(default=None, metadata={"help": "List of samples to evaluate the rewards on."})
    prompt_style: str = field(
        default="inference",
        metadata={"help": "inference: asked as inference asks; release: as the released GRPO."},
    )
    rewards: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": "Rewards to add up (weights: --reward_weights): accuracy, format, label_map_accuracy, "
            "over_length, repetition, or your own module:function."
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt allowed, in tokens with media; longer ones are refused."}
    )
    on_bad_sample: str = field(
        default="error", metadata={"help": "A clip that is missing or does not read: error, or skip and go on."}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder made by open_r1.cache_features; the towers are then never loaded."}
    )
    decode_workers: int = field(default=4, metadata={"help": "Threads that read clips."})
    completions_every: int = field(
        default=10, metadata={"help": "Steps between tables of completions (log_completions), shown and stored."}
    )


def main(argv: list[str] | None = None) -> None:
    classes = (DataArguments, ModelArguments, Efficiency, EvaluationArguments, GRPOConfig)
    data, model_arguments, efficiency, evaluation, arguments = parse_arguments(classes, argv)
    check_arguments(arguments)
    init_distributed(arguments)
    main_process = arguments.process_index == 0

    set_seed(arguments.seed)  # for a gate that starts at random
    rewards = reward_functions(data.rewards, arguments.max_completion_length)
    model, processor = load_for_training(model_arguments, load_towers=data.feature_cache is None)
    cache = None
    if data.feature_cache is not None:
        cache = FeatureCache(data.feature_cache, processor, data.data_folder)
    train = load_prompts(data.data, data, arguments, processor, cache)
    held_out = load_prompts(data.eval_data, data, arguments, processor, cache) if data.eval_data else None
    if main_process:
        print(f"{data.data}: {len(train)} prompts, {arguments.num_generations} completions each")
        record = asdict(data) | asdict(model_arguments) | asdict(efficiency) | asdict(evaluation) | arguments.to_dict()
        write_run_record(arguments.output_dir, record)

    arguments.dataloader_num_workers = 0  # rows are paths; threads of the trainer read the clips
    arguments.model_init_kwargs = reference_options(
        model_arguments, load_towers=data.feature_cache is None and not efficiency.encode_once
    )
    bad_samples = BadSamples(arguments.output_dir, arguments.process_index)
    checkpoint = checkpoint_to_resume(arguments)
    if checkpoint is None:
        bad_samples.file.unlink(missing_ok=True)
    with library_checks():
        trainer = HumanOmniGRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=as_dataset(train),
            eval_dataset=None if held_out is None else as_dataset(held_out),
            processing_class=processor,
            peft_config=lora_config(model_arguments),
            prompt_style=data.prompt_style,
            data_folder=data.data_folder,
            efficiency=efficiency,
            feature_cache=cache,
            on_bad_sample=data.on_bad_sample,
            bad_samples=bad_samples,
            projector_learning_rate=model_arguments.projector_learning_rate,
            decode_workers=data.decode_workers,
            completions_every=data.completions_every,
        )
    use_bar(trainer, BAR)
    evaluate_within(trainer, evaluation, data_folder=data.data_folder, feature_cache=cache, think=True)

    output = train_and_save(trainer, model_arguments, checkpoint, PANELS, bad_samples)
    if main_process:
        print(f"{trainer.state.global_step} steps: {output}")


def reference_options(arguments: ModelArguments, load_towers: bool) -> dict:
    """How TRL loads the reference model: as the policy was, without towers where features are shared."""
    return {
        "vision_tower": arguments.vision_tower,
        "audio_tower": arguments.audio_tower,
        "bert_model": arguments.bert_model,
        "load_towers": load_towers,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
    }


def load_prompts(path: str, data: DataArguments, arguments: GRPOConfig, processor, cache=None) -> list[Sample]:
    """The samples of a list, each checked: its clip (or its cached features) exists, and prompt and completion fit.

    Raises:
        CacheError, DataError, PromptError: names the sample and the numbers.
    """
    context = processor.config.max_position_embeddings
    kept, missing = [], []
    for sample in read_samples(path, seed=arguments.seed):
        clip = None if sample.clip is None else clip_path(sample.clip, data.data_folder)
        if clip is not None and cache is None and not clip.exists():
            if data.on_bad_sample == "error":
                raise DataError(
                    f"{sample.origin}: the clip {clip} does not exist; mend the path, set data_folder, or pass "
                    f"--on_bad_sample skip"
                )
            missing.append(str(clip))
            continue
        prompt = encode_prompt(processor, sample, data.prompt_style)
        if cache is not None:
            cache.check(sample, prompt.modal)
        length = len(prompt.input_ids)
        if data.max_prompt_length is not None and length > data.max_prompt_length:
            raise PromptError(
                f"{sample.origin}: the prompt takes {length} tokens, over max_prompt_length {data.max_prompt_length}; "
                f"raise it or shorten the question"
            )
        if length + arguments.max_completion_length > context:
            raise PromptError(
                f"{sample.origin}: {length} prompt tokens and {arguments.max_completion_length} completion tokens do "
                f"not fit the context of {context}; lower max_completion_length"
            )
        kept.append(sample)
    if missing:
        logger.warning("%d clips are missing and left out, %s first", len(missing), missing[0])
    if not kept:
        raise DataError(f"{path} holds no sample whose clip exists")
    return kept


def as_dataset(samples: list[Sample]) -> Dataset:
    """One row a prompt, with its label as `solution`; clips stay paths until a batch needs them."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question_of(sample)}],
                "solution": sample.answer,
                "sample": asdict(sample),
            }
            for sample in samples
        ]
    )


if __name__ == "__main__":
    run(main)
