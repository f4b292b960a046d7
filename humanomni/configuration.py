"""HumanOmniConfig: the fields of a released `config.json`, and the sizes that follow from them."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, Qwen2Config, SiglipVisionConfig, WhisperConfig

from humanomni.errors import CheckpointError

# RegStage depth and Conv3d padding (time, height, width) of the two video projectors.
PROJECTOR_TYPES = {"all_in_one_small": (2, (1, 0, 0)), "all_in_one": (4, (1, 1, 1))}
AUDIO_POOLING = 3  # Whisper encoder frames averaged into one audio token
GATE_HIDDEN_SIZE = 3584  # a constant of the architecture, whatever the language model's width


@strict
class HumanOmniConfig(Qwen2Config):
    """Qwen2's configuration and what HumanOmni adds to it.

    The towers live in folders of their own: `mm_vision_tower`, `mm_audio_tower` and `mm_bert` are paths or hub ids
    (see `humanomni.towers.resolve_folder`). Their configurations are attached when the towers are found and are not
    written to `config.json`; `model_type` and every field name are those of the R1-Omni release, `mm_bert` and the
    three placeholder ids apart, which are new.
    """

    model_type = "HumanOmni_qwen2"

    mm_vision_tower: str | None = None
    mm_audio_tower: str | None = None
    mm_bert: str = "google-bert/bert-base-uncased"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_hidden_size: int = 768
    audio_hidden_size: int = 1280
    mm_projector_type: str = "all_in_one_small"
    mm_audio_projector_type: str = "mlp2x_gelu"
    mm_use_x_start_end: bool = True
    num_frames: int | None = 8
    image_aspect_ratio: str | None = "pad"
    tokenizer_model_max_length: int | None = 2048
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None

    vision_config: Any = None  # SiglipVisionConfig of the folder `mm_vision_tower`, or None before it is resolved
    audio_config: Any = None  # WhisperConfig of the folder `mm_audio_tower`, or None
    bert_config: Any = None  # BertConfig of the folder `mm_bert`; BERT base where nothing else is known

    def __post_init__(self, **kwargs):
        for name, config_class in (
            ("vision_config", SiglipVisionConfig),
            ("audio_config", WhisperConfig),
            ("bert_config", BertConfig),
        ):
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, config_class(**value))
        if self.bert_config is None:
            self.bert_config = BertConfig()
        super().__post_init__(**kwargs)
        self.auto_map = {}  # TRL reads it as a dict
        for name, known in (
            ("mm_projector_type", tuple(PROJECTOR_TYPES)),
            ("mm_audio_projector_type", ("mlp2x_gelu",)),
            ("mm_vision_select_feature", ("patch",)),
        ):
            if getattr(self, name) not in known:
                raise CheckpointError(
                    f"{name} in config.json is {getattr(self, name)!r}; this code knows {', '.join(known)}"
                )

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a frame, e.g. 14 for SigLIP base patch16-224."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Tokens one frame takes in the prompt: the patch grid at half its side, rounded up."""
        return ((self.patch_grid + 1) // 2) ** 2

    @property
    def tokens_per_audio(self) -> int:
        """Tokens one audio window takes in the prompt, e.g. 1500 // 3 = 500."""
        return self.audio_config.max_source_positions // AUDIO_POOLING

    def check_towers(self) -> None:
        """Raises CheckpointError where an attached tower does not fit this configuration."""
        if self.vision_config is not None:
            states = self.vision_config.num_hidden_layers + 1
            if not -states <= self.mm_vision_select_layer < states:
                raise CheckpointError(
                    f"mm_vision_select_layer in config.json is {self.mm_vision_select_layer}, but mm_vision_tower "
                    f"{self.mm_vision_tower} has {states} hidden states; set it to -2 as released"
                )
            width = self.vision_config.hidden_size
            if width != self.mm_hidden_size:
                raise CheckpointError(
                    f"mm_vision_tower {self.mm_vision_tower} is {width} wide, but mm_hidden_size in config.json says "
                    f"{self.mm_hidden_size}; pass --vision_tower with the SigLIP model this checkpoint was trained on"
                )
            odd_grid = self.patch_grid % 2 == 1
            if odd_grid != (self.mm_projector_type == "all_in_one"):
                raise CheckpointError(
                    f"mm_vision_tower {self.mm_vision_tower} has a {self.patch_grid}x{self.patch_grid} patch grid, "
                    f"but mm_projector_type {self.mm_projector_type} aligns only on "
                    f"{'even' if odd_grid else 'odd'} grids; pass --vision_tower with another SigLIP model"
                )
        if self.audio_config is not None and self.audio_config.d_model != self.audio_hidden_size:
            raise CheckpointError(
                f"mm_audio_tower {self.mm_audio_tower} is {self.audio_config.d_model} wide, but audio_hidden_size in "
                f"config.json says {self.audio_hidden_size}; pass --audio_tower with the Whisper model this "
                f"checkpoint was trained on"
            )

    def to_dict(self) -> dict:
        """The serialised form: the towers' own configurations stay in their folders, and RoPE is also written under
        the names that the released code reads."""
        fields = super().to_dict()
        for name in ("vision_config", "audio_config", "bert_config", "auto_map"):
            fields.pop(name, None)
        rope = dict(self.rope_parameters)
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        return fields
