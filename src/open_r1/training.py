"""What the training entry points share: the model's arguments, which parts train, resuming, and the progress bar."""

import atexit
import importlib.util
import json
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NoReturn

import torch
import torch.distributed as dist
import yaml
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import BertModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames
from transformers.utils import logging as transformers_logging
from trl import TrlParser

from humanomni import CheckpointError, HumanOmniError, HumanOmniProcessor, HumanOmniQwen2ForCausalLM
from humanomni.loading import resolve_dtype
from humanomni.towers import first_line
from open_r1.data import BadSamples
from open_r1.run_record import plot_training_curves

logger = logging.getLogger(__name__)

# part -> prefixes of its parameters' names
PARTS = {
    "mm_projector": ("model.mm_projector.",),
    "audio_projector": ("model.audio_projector.",),
    "bert_gate": ("model.bert_gate.",),
    "language_model": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    "bert": ("model.bert_model.",),
    "vision_tower": ("model.vision_tower.",),
    "audio_tower": ("model.audio_tower.",),
}
PROJECTORS = ("mm_projector", "audio_projector", "bert_gate")
TOWERS = ("vision_tower", "audio_tower")
ENCODERS = ("bert", *TOWERS)
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass
class ModelArguments:
    """The checkpoint to start from, and which of its parts train."""

    model_path: str = field(metadata={"help": "Folder (or cached hub id) of the checkpoint to start from."})
    vision_tower: str | None = field(default=None, metadata={"help": "SigLIP's folder, in place of config.json's."})
    audio_tower: str | None = field(default=None, metadata={"help": "Whisper's folder, in place of config.json's."})
    bert_model: str | None = field(default=None, metadata={"help": "BERT's folder, in place of config.json's."})
    dtype: str = field(
        default="float32", metadata={"help": "Data type of the weights: float32 (master weights), bfloat16, float16."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2."})
    trainable_parts: list[str] = field(
        default_factory=lambda: [*PROJECTORS, "language_model"],
        metadata={"help": f"Parts that train, of {', '.join(PARTS)}; by default as released."},
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projectors and the gate, where it is not the common one."},
    )
    reinit_gate: bool = field(
        default=False,
        metadata={"help": "Start the BERT gate at random and BERT from its folder, as the released SFT did."},
    )
    use_lora: bool = field(default=False, metadata={"help": "Train the language model through LoRA adapters."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters' input."})

    def __post_init__(self):
        if isinstance(self.trainable_parts, str):  # a YAML file may name a single part without a list
            self.trainable_parts = [self.trainable_parts]
        unknown = [part for part in self.trainable_parts if part not in PARTS]
        if unknown:
            raise CheckpointError(f"trainable_parts holds {unknown[0]!r}; it takes {', '.join(PARTS)}")
        frozen = [part for part in self.trainable_parts if part in ENCODERS]
        if self.use_lora and frozen:
            raise CheckpointError(f"trainable_parts holds {frozen[0]}, which use_lora freezes; drop one of the two")
        if self.use_lora and "language_model" not in self.trainable_parts:
            raise CheckpointError(
                "use_lora trains the language model, which trainable_parts lacks; add language_model"
            )


def load_for_training(
    arguments: ModelArguments, *, load_towers: bool = True
) -> tuple[HumanOmniQwen2ForCausalLM, HumanOmniProcessor]:
    """The model with its chosen parts trainable, and its processor.

    Args:
        load_towers: False for training on cached features.
    """
    towers = {
        "vision_tower": arguments.vision_tower,
        "audio_tower": arguments.audio_tower,
        "bert_model": arguments.bert_model,
    }
    trained_towers = [part for part in TOWERS if part in arguments.trainable_parts]
    if trained_towers and not load_towers:
        raise CheckpointError(f"trainable_parts holds {trained_towers[0]}, but feature_cache leaves the towers out")
    processor = HumanOmniProcessor.from_pretrained(arguments.model_path, **towers)
    model = HumanOmniQwen2ForCausalLM.from_pretrained(
        arguments.model_path,
        config=processor.config,
        dtype=resolve_dtype(arguments.dtype, torch.device("cpu")),
        attn_implementation=arguments.attn_implementation,
        load_towers=load_towers,
        **towers,
    )
    # Under ZeRO-3 transformers remembers how it renames old keys (LayerNorm.gamma) and would save by those names.
    model._weight_conversions = None
    if arguments.reinit_gate:
        reinit_gate(model)
    set_trainable(model, arguments.trainable_parts)
    return model, processor


class _BertWeights(BertModel):
    """BERT out of a checkpoint for masked words: its head is meant to be left behind."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^cls\."]


def reinit_gate(model: HumanOmniQwen2ForCausalLM) -> None:
    """BERT as its folder has it, and torch's default initialisation for the gate: how the released SFT started.

    Raises:
        CheckpointError: the folder holds no BERT, or not all of its weights.
    """
    folder = model.config.mm_bert
    try:
        bert, info = _BertWeights.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    except Exception as error:
        raise CheckpointError(
            f"reinit_gate reads BERT anew, but {folder} does not load: {first_line(error)}; pass --bert_model"
        ) from error
    if info["missing_keys"]:
        raise CheckpointError(f"reinit_gate reads BERT anew, but {folder} lacks {min(info['missing_keys'])}")
    model.model.bert_model = bert.eval()
    with gathered(model.model.bert_gate.parameters(), modifier_rank=0):
        for layer in model.model.bert_gate:
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()


def gathered(weights: Iterable[torch.nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """Within, weights that ZeRO-3 spreads over the processes are whole on each; all processes must enter.

    Args:
        modifier_rank: the process whose changes stay; None where nothing is changed for good.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(weights), modifier_rank=modifier_rank)


def set_trainable(model: torch.nn.Module, parts: list[str]) -> None:
    """Lets exactly the named parts train."""
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(prefixes))


def lora_config(arguments: ModelArguments) -> LoraConfig | None:
    """The adapters to train, or None; the trainable projectors are trained whole beside them."""
    if not arguments.use_lora:
        return None
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=[part for part in PROJECTORS if part in arguments.trainable_parts] or None,
        task_type="CAUSAL_LM",
    )


def save_merged(model: PeftModel, processor: HumanOmniProcessor, folder: Path) -> None:
    """Writes the model with its adapters merged in, in the release's format.

    All processes call it, for ZeRO-3 gathers the weights from all; the main one writes. The model is of no use after.
    """
    with gathered(model.parameters()):
        merged = model.merge_and_unload()
        if PartialState().is_main_process:
            merged.save_pretrained(folder)
            processor.save_pretrained(folder)


def split_projector_groups(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """Moves the projectors' and the gate's weights to parameter groups of their own, with `learning_rate`."""
    names = tuple(f"{part}." for part in PROJECTORS)
    own = {id(weight) for name, weight in model.named_parameters() if any(part in name for part in names)}
    for group in list(optimizer.param_groups):
        moved = [weight for weight in group["params"] if id(weight) in own]
        if moved:
            group["params"] = [weight for weight in group["params"] if id(weight) not in own]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage of some two hundred options."""
        self.exit(2, f"error: {message}; --help lists the options\n")


def parse_arguments(classes: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """Reads the options of dataclasses from the YAML file of `--config` and from the command line, which wins.

    Raises:
        HumanOmniError: an option or a value is unknown, or the file does not read.
        SystemExit: as argparse does, for `--help`, a missing option or a value of another type.
    """
    words = [part for word in (sys.argv[1:] if argv is None else argv) for part in _split_config(word)]
    while words.count("--config") > 1:  # the last one counts, as with any option
        place = words.index("--config")
        del words[place : place + 2]
    try:
        with library_checks():
            *filled, unknown = _Parser(classes).parse_args_and_config(words, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise HumanOmniError(f"the file of --config is not YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise HumanOmniError(f"the file of --config does not read: {error}") from error
    if unknown:
        raise HumanOmniError(f"unknown options: {' '.join(unknown)}; --help lists the known ones")
    return tuple(filled)


def _split_config(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


@contextmanager
def library_checks() -> Iterator[None]:
    """Within, what transformers and TRL find wrong with the options is a user's mistake, told in one line."""
    try:
        yield
    except HumanOmniError:
        raise
    except ValueError as error:
        raise HumanOmniError(" ".join(str(error).split())) from error


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuses, before anything is loaded, what could only fail later."""
    name = OptimizerNames(arguments.optim).value
    if ("bnb" in name or "8bit" in name) and importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(f"optim is {name}, which needs bitsandbytes; pip install bitsandbytes")


def init_distributed(arguments: TrainingArguments) -> None:
    """On CPUs DeepSpeed must know its backend before the model loads, or ZeRO-3 believes in a world of one."""
    if not arguments.use_cpu:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.deepspeed:
        import deepspeed

        # gloo serves well enough; DeepSpeed's own reduction would first be compiled, for minutes and by a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")


class WholeCheckpoints:
    """Mixed into a Trainer, writes `trainer_state.json` of a checkpoint only when all processes have written theirs.

    Its presence then says that the checkpoint is whole; `checkpoint_to_resume` looks for it.
    """

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing that each process writes; the main one goes on to the trainer's state.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result) -> None:
        # Frozen towers are not in a checkpoint, and a tied head is not written: nothing to warn about.
        expected = tuple(prefix for part in TOWERS for prefix in PARTS[part])
        expected += ("lm_head.",) if self.model.config.tie_word_embeddings else ()
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if not key.startswith(expected)]
        super()._issue_warnings_after_load(load_result)


class TrainsParts:
    """Mixed into a Trainer: the projectors may have a learning rate of their own, and a part that a batch does not use
    gets a gradient of zero.

    Sharded training counts an absent gradient as zero; an optimizer that skipped the part would leave its momentum at
    rest, and the number of processes would change the result.
    """

    projector_learning_rate: float | None = None  # of the projectors and the gate; None for the common one

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_learning_rate is not None:
            split_projector_groups(optimizer, self.model, self.projector_learning_rate)
        return optimizer

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for weight in self.model.parameters():
            if weight.requires_grad and weight.grad is None and not self.is_deepspeed_enabled:
                weight.grad = torch.zeros_like(weight)
        return loss


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, else the newest whole one in the output folder, or None.

    `resume_from_checkpoint` is a folder, `true` (or nothing) for the newest, or `false` to start anew.

    Raises:
        CheckpointError: the one asked for is not whole.
    """
    asked = arguments.resume_from_checkpoint
    if str(asked).lower() == "false":
        return None
    if asked and str(asked).lower() != "true":
        reason = what_is_missing(Path(asked))
        if reason:
            raise CheckpointError(f"resume_from_checkpoint {asked} is not whole: {reason}; pass another or true")
        return str(asked)
    folders = Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = sorted((int(f.name.rsplit("-", 1)[1]), f) for f in folders if f.name.rsplit("-", 1)[1].isdigit())
    level = logging.WARNING if arguments.process_index == 0 else logging.DEBUG
    for _, folder in reversed(numbered):
        reason = what_is_missing(folder)
        if reason is None:
            logger.log(level, "resuming from %s", folder)
            return str(folder)
        logger.log(level, "%s is passed over, it was not written to its end: %s", folder, reason)
    return None


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a trainer's checkpoint cannot be resumed from, or None where it is whole.

    The trainer writes its state last, so a kill leaves no state, or a file cut short: torch's files are zip archives
    with their directory at the end, and safetensors state their length at the start.
    """
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text("utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut short"
    weights = [*checkpoint.glob("*.safetensors")]
    if not weights:
        return "it holds no weights"
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is cut short"
    for file in [*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")]:
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
    if not [*checkpoint.rglob("optimizer.pt"), *checkpoint.rglob("*optim_states.pt")]:
        return "it holds no optimizer state"
    return None


class Bar(ProgressCallback):
    """The trainer's progress bar, with the newest figures on it instead of a line for each log."""

    def __init__(self, shown: dict[str, str]):
        """
        Args:
            shown: name in the logs -> name on the bar.
        """
        super().__init__()
        self.shown = shown

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            figures = {short: _short(logs[key]) for key, short in self.shown.items() if key in logs}
            if figures:
                self.training_bar.set_postfix(figures)


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"


def train_and_save(
    trainer: Trainer, arguments: ModelArguments, checkpoint: str | None, panels: dict, bad_samples: BadSamples
) -> Path:
    """Trains, and leaves in the output folder the model, the trainer's state and the training curves.

    Args:
        checkpoint: of the trainer, to go on from; None to start.
        panels: of the curves, see `open_r1.run_record.plot_training_curves`.

    Returns:
        the folder of the checkpoint to use: `merged` in the output folder where adapters were trained.
    """
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    output = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        plot_training_curves(trainer.state.log_history, output / "training_curves.png", panels)
    skipped = bad_samples.read()
    if skipped:
        logger.warning(
            "%d samples were skipped on process %d; see %s", len(skipped), trainer.args.process_index, bad_samples.file
        )
    if not arguments.use_lora:
        return output
    save_merged(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, output / "merged")
    return output / "merged"


def use_bar(trainer: Trainer, shown: dict[str, str]) -> None:
    """Puts `Bar` in place of the trainer's own bar and printer."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar(shown))


# What libraries say about their own future, or about what is chosen here on purpose: start of the message, category
NOISE = (
    (r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    (r"`rope_scaling` is deprecated", FutureWarning),
    (r"This DataLoader will create \d+ worker processes", UserWarning),
    (r"Grad strides do not match bucket view strides", UserWarning),
)


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; a user's mistake is one line on stderr and exit status 2, without a traceback.

    The environment variable `LOG_LEVEL` says how much is logged; with `DEBUG` the traceback is shown too.
    """
    transformers_logging.disable_progress_bar()  # of reading and writing shards, which would tear the training bar
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=os.environ.get("LOG_LEVEL", "WARNING"))
    for message, category in NOISE:
        warnings.filterwarnings("ignore", message, category)
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not" not in str(record.msg))
    status = 0
    try:
        main()
    except HumanOmniError as error:
        logger.debug("the mistake in full", exc_info=error)
        start = "\n" if int(os.environ.get("RANK", 0)) > 0 else ""  # the first process's bar may stand on this line
        tqdm.write(f"{start}error: {_last_line(error)}", file=sys.stderr)
        status = 2
    if dist.is_initialized():
        leave(status)
    if status:
        sys.exit(status)


def leave(status: int = 0) -> NoReturn:
    """Ends a process of a distributed run: exit functions as ever, but no teardown of the interpreter.

    A thread of gloo's frees the tensors of the last exchange when it gets to it. Where the interpreter is being torn
    down by then, the thread cannot have its lock and aborts the process: a finished run, reported as failed.
    """
    if status == 0:  # after a mistake the group would wait for processes that do not know of it
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _last_line(error: HumanOmniError) -> str:
    """The message; one that crossed from a data-loader worker ends a traceback that was put in front of it."""
    last = str(error).rstrip().rpartition("\n")[2]
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
