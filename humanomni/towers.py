"""The three frozen encoders (SigLIP, Whisper's encoder, BERT) and where their weights come from.

Shapes: B clips, T frames, P patches of a frame, D width of a tower, M mel bins, A audio tokens.
"""

import json
import os
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, SiglipVisionConfig, SiglipVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from humanomni.configuration import AUDIO_POOLING, HumanOmniConfig
from humanomni.errors import CheckpointError

# field of config.json -> (command-line option, environment variable, the configuration's class and attribute)
TOWERS = {
    "mm_vision_tower": ("--vision_tower", "HUMANOMNI_VISION_TOWER", SiglipVisionConfig, "vision_config"),
    "mm_audio_tower": ("--audio_tower", "HUMANOMNI_AUDIO_TOWER", WhisperConfig, "audio_config"),
    "mm_bert": ("--bert_model", "HUMANOMNI_BERT_MODEL", BertConfig, "bert_config"),
}


class VisionTower(nn.Module):
    """SigLIP's vision half, read at the hidden state `mm_vision_select_layer`.

    Only the layers up to that state are run; the ones after it are kept so that a saved tower is whole.
    """

    def __init__(self, config: HumanOmniConfig, encoder: SiglipVisionModel | None = None):
        super().__init__()
        self.vision_tower = nn.Module()  # key names of the release: vision_tower.vision_tower.vision_model.*
        self.vision_tower.vision_model = SiglipVisionModel(config.vision_config) if encoder is None else encoder
        states = config.vision_config.num_hidden_layers + 1
        self.select_layer = range(states)[config.mm_vision_select_layer]

    @property
    def encoder(self) -> SiglipVisionModel:
        return self.vision_tower.vision_model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values (B, T, 3, height, width) -> patch features (B, T, P, D)."""
        clips, frames = pixel_values.shape[:2]
        hidden = self.encoder.embeddings(pixel_values.flatten(0, 1).to(self.encoder.dtype))  # (B*T, P, D)
        for layer in self.encoder.encoder.layers[: self.select_layer]:
            hidden = layer(hidden, attention_mask=None)
        return hidden.unflatten(0, (clips, frames))

    def blank(self) -> torch.Tensor:
        """One black frame of one clip, as `forward` takes it."""
        side = self.encoder.config.image_size
        return next(self.parameters()).new_zeros(1, 1, 3, side, side)


class AudioTower(nn.Module):
    """Whisper's encoder, its last hidden state averaged over `AUDIO_POOLING` consecutive frames."""

    def __init__(self, config: HumanOmniConfig, encoder: WhisperEncoder | None = None):
        super().__init__()
        self.audio_tower = nn.Module()  # key names of the release: audio_tower.audio_tower.encoder.*
        self.audio_tower.encoder = WhisperEncoder(config.audio_config) if encoder is None else encoder

    @property
    def encoder(self) -> WhisperEncoder:
        return self.audio_tower.encoder

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """input_features (B, M, 3000) log-mel -> pooled features (B, A, D), e.g. A = 1500 // 3 = 500."""
        hidden = self.encoder(input_features.to(self.encoder.dtype)).last_hidden_state  # (B, 1500, D)
        return nn.functional.avg_pool1d(hidden.transpose(1, 2), AUDIO_POOLING, AUDIO_POOLING).transpose(1, 2)

    def blank(self) -> torch.Tensor:
        """One silent window, as `forward` takes it."""
        config = self.encoder.config
        frames = 2 * config.max_source_positions  # the encoder's second convolution halves them
        return next(self.parameters()).new_zeros(1, config.num_mel_bins, frames)


class _SiglipVisionWeights(SiglipVisionModel):
    """SigLIP's vision half out of a whole SigLIP checkpoint: the text half is meant to be left behind."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^text_model\.", r"^logit_"]


class _WhisperEncoderWeights(WhisperEncoder):
    """Whisper's encoder out of a whole Whisper checkpoint: the decoder is meant to be left behind."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"decoder\.", r"^proj_out\."]


def load_vision_tower(config: HumanOmniConfig, dtype: torch.dtype) -> VisionTower:
    """The tower with the weights of the folder `config.mm_vision_tower`, frozen and in eval mode."""
    return VisionTower(config, _load_encoder(_SiglipVisionWeights, config.mm_vision_tower, dtype)).requires_grad_(
        False
    )


def load_audio_tower(config: HumanOmniConfig, dtype: torch.dtype) -> AudioTower:
    """The tower with the encoder weights of the folder `config.mm_audio_tower`, frozen and in eval mode."""
    renamed = {r"^(model\.)?encoder\.": ""}
    encoder = _load_encoder(_WhisperEncoderWeights, config.mm_audio_tower, dtype, key_mapping=renamed)
    return AudioTower(config, encoder).requires_grad_(False)


def _load_encoder(encoder_class, folder: str, dtype: torch.dtype, **options):
    try:
        encoder, info = encoder_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        raise CheckpointError(f"the tower in {folder} does not load: {first_line(error)}") from error
    wrong = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"the tower in {folder} lacks {len(wrong)} of its weights, {wrong[0]} first; download it again"
        )
    return encoder


def resolve_folder(field: str, config: HumanOmniConfig, checkpoint: Path, argument: str | None) -> str:
    """The local folder of a tower.

    The value comes from, in this order, `argument`, the tower's environment variable and `config.json`. A path may be
    absolute, or relative to the working directory, the checkpoint or the checkpoint's parent; anything else is taken
    as a hub id and looked up in the local hub cache, never downloaded.

    Raises:
        CheckpointError: nothing is found there; names the field, the value and the option to pass.
    """
    option, variable, _, _ = TOWERS[field]
    value, origin = argument, option
    if value is None and os.environ.get(variable):
        value, origin = os.environ[variable], f"the environment variable {variable}"
    if value is None:
        value, origin = getattr(config, field), f"{field} in {checkpoint / 'config.json'}"
    if not value:
        raise CheckpointError(f"{origin} is not set; pass {option} or run scripts/download_models.sh")
    for base in (Path(), checkpoint, checkpoint.parent):
        folder = base / Path(value).expanduser()
        if (folder / "config.json").is_file():
            return str(folder.resolve())
    cached = cached_snapshot(value)
    if cached is None:
        raise CheckpointError(
            f"{origin} is {value!r}, which is neither a folder with a config.json nor a cached hub model; "
            f"pass {option} or run scripts/download_models.sh"
        )
    return cached


def cached_snapshot(repo_id: str) -> str | None:
    """The folder of a hub model in the local cache, or None."""
    try:
        return snapshot_download(repo_id, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def attach_tower_configs(config: HumanOmniConfig, checkpoint: Path, arguments: dict[str, str | None]) -> None:
    """Resolves the three folders, writes them into `config` and attaches the configurations found there.

    Args:
        arguments: the caller's overrides by field of `TOWERS`, None where there is none.
    """
    for field, (_, _, config_class, attribute) in TOWERS.items():
        folder = resolve_folder(field, config, checkpoint, arguments[field])
        setattr(config, field, folder)
        try:
            setattr(config, attribute, config_class.from_pretrained(folder))
        except Exception as error:
            raise CheckpointError(f"{field}: {folder}/config.json does not read: {first_line(error)}") from error
    config.check_towers()


def save_tower_folders(config: HumanOmniConfig, state_dict: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Writes the towers' weights, and all three folders' small files, under `checkpoint`; its config.json then names
    them by paths relative to itself.

    Args:
        config: with the folders the towers were read from.
        state_dict: of the whole model; BERT's weights are the checkpoint's own and are not written again.
    """
    names = {}
    for field, prefix in (
        ("mm_vision_tower", "model.vision_tower.vision_tower."),
        ("mm_audio_tower", "model.audio_tower.audio_tower."),
        ("mm_bert", None),
    ):
        source, folder = Path(getattr(config, field)), checkpoint / field.removeprefix("mm_")
        folder.mkdir(exist_ok=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".txt") and not file.name.endswith(".index.json"):
                (folder / file.name).write_bytes(file.read_bytes())
        if prefix is not None:
            own = {
                key.removeprefix(prefix): weight.contiguous()
                for key, weight in state_dict.items()
                if key.startswith(prefix)
            }
            save_file(own, folder / "model.safetensors", {"format": "pt"})
        names[field] = folder.name
    config_file = checkpoint / "config.json"
    fields = {**json.loads(config_file.read_text("utf-8")), **names}
    config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")


def first_line(error: Exception) -> str:
    """What an error of a library says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
