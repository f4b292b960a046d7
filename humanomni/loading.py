"""load_pretrained: a checkpoint folder to a model and its processor, with precision, device and paths settled."""

import torch

from humanomni.errors import CheckpointError
from humanomni.modeling import HumanOmniQwen2ForCausalLM
from humanomni.processing import HumanOmniProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("sdpa", "eager", "flash_attention_2")


def load_pretrained(
    model_path: str,
    *,
    vision_tower: str | None = None,
    audio_tower: str | None = None,
    bert_model: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attn_implementation: str = "sdpa",
) -> tuple[HumanOmniQwen2ForCausalLM, HumanOmniProcessor]:
    """Loads a checkpoint in the format of the R1-Omni release, ready for inference.

    Args:
        model_path: folder of the checkpoint, or the id of a model in the local hub cache.
        vision_tower, audio_tower, bert_model: folders (or cached hub ids) of SigLIP, Whisper and BERT, where those in
            the checkpoint's `config.json` and in the environment do not serve; see `humanomni.towers.resolve_folder`.
        dtype: `float32`, `bfloat16`, `float16` or a torch dtype; `auto` is bfloat16 (float16 on a GPU without it), and
            float32 on a CPU.
        device: `cuda`, `cuda:1`, `cpu`, ...; `auto` takes the first GPU where there is one.
        attn_implementation: of the language model, `sdpa`, `eager` or `flash_attention_2`.

    Raises:
        CheckpointError: one line that names what is missing or does not fit, and the mend.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    if attn_implementation not in ATTENTION:
        raise CheckpointError(f"attn_implementation is {attn_implementation!r}; pass one of {', '.join(ATTENTION)}")
    towers = {"vision_tower": vision_tower, "audio_tower": audio_tower, "bert_model": bert_model}
    processor = HumanOmniProcessor.from_pretrained(model_path, **towers)
    model = HumanOmniQwen2ForCausalLM.from_pretrained(
        model_path, config=processor.config, dtype=dtype, attn_implementation=attn_implementation, **towers
    )
    return model.to(device), processor


def resolve_device(device: str | torch.device) -> torch.device:
    """The device asked for; CheckpointError where it is unknown or absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(f"device {device!r} is unknown; pass auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(
            f"device {str(device)!r} is asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
            f"pass --device cpu or mend the driver"
        )
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The data type asked for, or the one that suits the device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; pass auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
