"""What the training entry points share: the model's arguments, which parts train, resuming, and the progress bar."""

import importlib.util
import json
import logging
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import BertModel, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging

from humanomni import CheckpointError, HumanOmniError, HumanOmniProcessor, HumanOmniQwen2ForCausalLM
from humanomni.loading import resolve_dtype

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
        unknown = [part for part in self.trainable_parts if part not in PARTS]
        if unknown:
            raise CheckpointError(f"trainable_parts holds {unknown[0]!r}; it takes {', '.join(PARTS)}")


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
    trained_towers = [part for part in ("vision_tower", "audio_tower") if part in arguments.trainable_parts]
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
    if arguments.reinit_gate:
        reinit_gate(model)
    set_trainable(model, arguments.trainable_parts)
    return model, processor


def reinit_gate(model: HumanOmniQwen2ForCausalLM) -> None:
    """BERT as its folder has it, and torch's default initialisation for the gate: how the released SFT started."""
    folder = model.config.mm_bert
    model.model.bert_model = BertModel.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    for layer in model.model.bert_gate:
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()


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
    """Writes the model with its adapters merged in, in the release's format."""
    model.merge_and_unload().save_pretrained(folder)
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


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuses, before anything is loaded, what could only fail later."""
    eight_bit = "bnb" in str(arguments.optim) or "8bit" in str(arguments.optim)
    if eight_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(f"optim is {arguments.optim}, which needs bitsandbytes; pip install bitsandbytes")


def init_distributed(arguments: TrainingArguments) -> None:
    """On CPUs DeepSpeed must know its backend before the model loads, or ZeRO-3 believes in a world of one."""
    if arguments.deepspeed and arguments.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, else the newest whole one in the output folder.

    `resume_from_checkpoint` is a folder, `true` (or nothing) for the newest, or `false` to start anew.

    Raises:
        CheckpointError: the one asked for is not whole, or training would start anew in a used folder.
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
    for _, folder in reversed(numbered):
        reason = what_is_missing(folder)
        if reason is None:
            logger.warning("resuming from %s", folder)
            return str(folder)
        logger.warning("%s is passed over, it was not written to its end: %s", folder, reason)
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
            figures = {short: f"{logs[key]:.4g}" for key, short in self.shown.items() if key in logs}
            if figures:
                self.training_bar.set_postfix(figures)


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; a user's mistake is one line on stderr and exit status 2, without a traceback."""
    transformers_logging.disable_progress_bar()  # of reading and writing shards, which would tear the training bar
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=os.environ.get("LOG_LEVEL", "WARNING"))
    try:
        main()
    except HumanOmniError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
