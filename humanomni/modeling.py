"""The model: media and a question become one sequence of embeddings, which Qwen2 continues.

Shapes: B rows (conversations), L sequence, H width of the language model, N videos, I images, S sounds (all three in
the order in which their placeholders stand in the batch, row by row), T frames, P patches, D tower width, A audio
tokens, Q words of the BERT query.
"""

import copy
import json
import logging
import os
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertModel,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from humanomni.configuration import HumanOmniConfig
from humanomni.errors import CheckpointError
from humanomni.fusion import VideoProjector, audio_projector, fuse, query_gate
from humanomni.towers import (
    AudioTower,
    VisionTower,
    attach_tower_configs,
    cached_snapshot,
    first_line,
    load_audio_tower,
    load_vision_tower,
    save_tower_folders,
)

logger = logging.getLogger(__name__)

RAW_MEDIA = ("pixel_values_videos", "pixel_values", "input_features", "bert_input_ids", "bert_attention_mask")
TOWER_PREFIXES = ("model.vision_tower.", "model.audio_tower.")
FEATURES = ("video_features", "image_features", "audio_features", "query_features")


class HumanOmniModel(Qwen2Model):
    """The backbone: towers, projectors, gate and Qwen2's layers; returns the last hidden state.

    A tower is built where its configuration is attached to `config`, and otherwise left out: a model that only sees
    encoded features needs none.
    """

    config_class = HumanOmniConfig
    input_modalities = ("video", "image", "audio", "text")

    def __init__(self, config: HumanOmniConfig):
        super().__init__(config)
        self.vision_tower = None if config.vision_config is None else VisionTower(config).requires_grad_(False)
        self.audio_tower = None if config.audio_config is None else AudioTower(config).requires_grad_(False)
        self.mm_projector = VideoProjector(config)
        self.audio_projector = audio_projector(config)
        self.bert_model = BertModel(config.bert_config).requires_grad_(False)
        self.bert_gate = query_gate(config)
        self.post_init()

    def train(self, mode: bool = True) -> "HumanOmniModel":
        """As usual, except that encoders without a trainable weight stay in eval mode: BERT's dropout would make the
        gate, and with it every log-probability, random."""
        super().train(mode)
        for encoder in (self.vision_tower, self.audio_tower, self.bert_model):
            if encoder is not None and not any(weight.requires_grad for weight in encoder.parameters()):
                encoder.eval()
        return self

    def encode(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        bert_input_ids: torch.Tensor | None = None,
        bert_attention_mask: torch.Tensor | None = None,
        *,
        run_absent: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Runs the encoders, once per clip; what comes out is what the trained parts start from.

        Args:
            pixel_values_videos: (N, T, 3, height, width) normalised frames.
            pixel_values: (I, 3, height, width) normalised images.
            input_features: (S, M, 3000) log-mel windows.
            bert_input_ids, bert_attention_mask: (B, Q) the questions.
            run_absent: run a tower on a blank where its media are absent, so that every process of ZeRO-3, which
                gathers weights module by module, runs the same towers; the blank's output is thrown away.

        Returns:
            Of `video_features` (N, T, P, D), `image_features` (I, 1, P, D), `audio_features` (S, A, D) and
            `query_features` (B, D) those whose input was given.
        """
        features = {}
        if pixel_values_videos is not None:
            features["video_features"] = _encoded(self._tower("vision_tower"), pixel_values_videos)
        elif run_absent and self.vision_tower is not None:
            _encoded(self.vision_tower, self.vision_tower.blank())
        if pixel_values is not None:
            features["image_features"] = _encoded(self._tower("vision_tower"), pixel_values[:, None])
        elif run_absent and self.vision_tower is not None:
            _encoded(self.vision_tower, self.vision_tower.blank())
        if input_features is not None:
            features["audio_features"] = _encoded(self._tower("audio_tower"), input_features)
        elif run_absent and self.audio_tower is not None:
            _encoded(self.audio_tower, self.audio_tower.blank())
        if bert_input_ids is not None:
            output = _encoded(self.bert_model, input_ids=bert_input_ids, attention_mask=bert_attention_mask)
            features["query_features"] = output.last_hidden_state[:, 0]
        return features

    def _tower(self, name: str) -> nn.Module:
        tower = getattr(self, name)
        if tower is None:
            raise CheckpointError(f"the model was loaded without its {name}, but the batch holds raw media for it")
        return tower

    def project_video(self, features: torch.Tensor, query_features: torch.Tensor) -> torch.Tensor:
        """Patch features (N, T, P, D) and a question for each (N, Dq) -> video tokens (N, V, H)."""
        branches = self.mm_projector(features.to(_dtype(self.mm_projector)))
        return fuse(branches, self.bert_gate(query_features.to(_dtype(self.bert_gate))))

    def project_audio(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled audio features (S, A, D) -> audio tokens (S, A, H)."""
        return self.audio_projector(features.to(_dtype(self.audio_projector)))

    def embed(
        self,
        input_ids: torch.Tensor,
        video_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        query_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sequence of embeddings (B, L, H): text from the embedding table, media tokens at their placeholders.

        Among several training processes each runs every projector, in one order, on a blank where the batch lacks the
        medium: sharded training reduces gradients in the order in which they come, and would mix up or hang.
        """
        placeholders = {
            "video": self.config.video_token_id,
            "image": self.config.image_token_id,
            "audio": self.config.audio_token_id,
        }
        text_ids = input_ids
        for token_id in placeholders.values():
            if token_id is not None:  # a placeholder's own row of the table, if it has one, is never read
                text_ids = text_ids.masked_fill(input_ids == token_id, 0)
        embeds = self.embed_tokens(text_ids)

        for kind, features in (("video", video_features), ("image", image_features)):
            if features is not None:
                here = input_ids == placeholders[kind]  # (B, L)
                tokens_each = features.shape[1] * self.config.tokens_per_frame
                queries = query_features.repeat_interleave(here.sum(dim=1) // tokens_each, dim=0)  # (N, Dq)
                _check_count(kind, here, len(features) * tokens_each)
                embeds = _put(embeds, here, self.project_video(features, queries))
            elif self._in_lockstep():
                blank = embeds.new_zeros(1, 1, self.config.patch_grid**2, self.config.mm_hidden_size)
                query = embeds.new_zeros(1, self.config.bert_config.hidden_size)
                query = query if query_features is None else query_features[:1]  # a BERT that trains is needed too
                embeds = embeds + 0 * self.project_video(blank, query).sum()
        if audio_features is not None:
            here = input_ids == placeholders["audio"]
            _check_count("audio", here, audio_features.shape[0] * audio_features.shape[1])
            embeds = _put(embeds, here, self.project_audio(audio_features))
        elif self._in_lockstep():
            blank = embeds.new_zeros(1, self.config.tokens_per_audio, self.config.audio_hidden_size)
            embeds = embeds + 0 * self.project_audio(blank).sum()
        return embeds

    def _in_lockstep(self) -> bool:
        """Whether other processes train beside this one, or hold a part of its weights."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return several and torch.distributed.get_world_size() > 1 and (self.training or is_deepspeed_zero3_enabled())

    def _continue_prompts(
        self,
        prompt_embeds: torch.Tensor,
        prompt_mask: torch.Tensor,
        prompt_index: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        share_cache: bool,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The hidden states (B, 1 + C, H) of continuations (B, C) of embedded prompts (U, P, H); see `forward`."""
        prompt_positions = positions_of(prompt_mask)  # (U, P)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = prompt_mask.sum(dim=1)[prompt_index, None] + steps  # (B, C)
        embeds = self.embed_tokens(input_ids)
        if share_cache:
            prompt = super().forward(
                inputs_embeds=prompt_embeds,
                attention_mask=prompt_mask,
                position_ids=prompt_positions,
                use_cache=True,
                **kwargs,
            )
            cache = prompt.past_key_values
            cache.batch_select_indices(prompt_index)
            continued = super().forward(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **kwargs,
            )
            last = prompt.last_hidden_state[prompt_index, -1:]  # (B, 1, H)
            return BaseModelOutputWithPast(last_hidden_state=torch.cat([last, continued.last_hidden_state], dim=1))
        whole = super().forward(
            inputs_embeds=torch.cat([prompt_embeds[prompt_index], embeds], dim=1),
            attention_mask=attention_mask,
            position_ids=torch.cat([prompt_positions[prompt_index], positions], dim=1),
            use_cache=False,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=whole.last_hidden_state[:, prompt_embeds.shape[1] - 1 :])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        bert_input_ids: torch.Tensor | None = None,
        bert_attention_mask: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        query_features: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        prompt_index: torch.Tensor | None = None,
        share_prompt_cache: bool = True,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, L) with raw media or encoded features (shapes: `encode`) -> last hidden state (B, L, H).

        Several continuations of few prompts: with `prompt_ids` and `prompt_mask` (U, P), padded on the left and the
        media theirs, `input_ids` (B, C) holds the continuations alone, `prompt_index` (B,) says of which prompt, and
        `attention_mask` (B, P + C) covers both. Media are projected once a prompt, and with `share_prompt_cache` the
        prompt passes the layers once too, its keys and values (gradients included) serving all its continuations. The
        result is (B, 1 + C, H): the prompt's last position, which predicts the first token, comes first.
        """
        if inputs_embeds is None:
            cache = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length() > 0:  # the media came with the prompt
                inputs_embeds = self.embed_tokens(input_ids)
            else:
                raw = (pixel_values_videos, pixel_values, input_features)
                towers_run = prompt_ids is None or any(tensor is not None for tensor in raw)
                encoded = self.encode(
                    *raw,
                    bert_input_ids,
                    bert_attention_mask,
                    run_absent=is_deepspeed_zero3_enabled() and towers_run,
                )
                given = {
                    "video_features": video_features,
                    "image_features": image_features,
                    "audio_features": audio_features,
                    "query_features": query_features,
                }
                inputs_embeds = self.embed(input_ids if prompt_ids is None else prompt_ids, **{**given, **encoded})
            if prompt_ids is not None:
                kwargs.pop("use_cache", None)
                return self._continue_prompts(
                    inputs_embeds, prompt_mask, prompt_index, input_ids, attention_mask, share_prompt_cache, **kwargs
                )
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, L) of rows padded on the left: 0 at the first token, and on the padding."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _encoded(encoder: nn.Module, *inputs, **named_inputs):
    """What `encoder` makes of its inputs, with gradients only if one of its weights trains.

    Gradient checkpointing lets the output of every embedding ask for gradients; the backward pass would run through
    the frozen encoders too, for nothing, and under ZeRO-3 in another order on each process.
    """
    trains = any(weight.requires_grad for weight in encoder.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        return encoder(*inputs, **named_inputs)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _check_count(kind: str, here: torch.Tensor, tokens: int) -> None:
    places = int(here.sum())
    if places != tokens:
        raise ValueError(f"the batch has {places} {kind} placeholders for {tokens} {kind} tokens")


def _put(embeds: torch.Tensor, here: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """embeds (B, L, H) with `tokens` (.., .., H), in order, at the true places of `here` (B, L)."""
    return embeds.masked_scatter(here[..., None], tokens.to(embeds.dtype))


class HumanOmniQwen2ForCausalLM(Qwen2ForCausalLM):
    """HumanOmni and its language-model head: `model(**batch)` and `model.generate(**batch)` on a processor's batch."""

    config_class = HumanOmniConfig
    input_modalities = ("video", "image", "audio", "text")
    # The towers' weights are read from folders of their own, as the release does; a checkpoint may repeat them.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^model\.(vision|audio)_tower\."]

    def __init__(self, config: HumanOmniConfig):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = HumanOmniModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        config: HumanOmniConfig | None = None,
        vision_tower: str | None = None,
        audio_tower: str | None = None,
        bert_model: str | None = None,
        load_towers: bool = True,
        **kwargs,
    ) -> "HumanOmniQwen2ForCausalLM":
        """Loads a checkpoint folder (or cached hub id) of the release's format, and its towers.

        Args:
            config: read from the checkpoint where not given.
            vision_tower, audio_tower, bert_model: folders or cached hub ids that replace those in `config.json`.
            load_towers: False leaves SigLIP and Whisper out, for work on encoded features.
            kwargs: as for any transformers model, e.g. `dtype`, `attn_implementation`.

        Raises:
            CheckpointError: a file, weight or tower is missing or does not fit.
        """
        folder = find_checkpoint(pretrained_model_name_or_path)
        config = read_config(folder) if config is None else copy.deepcopy(config)
        attach_tower_configs(
            config, folder, {"mm_vision_tower": vision_tower, "mm_audio_tower": audio_tower, "mm_bert": bert_model}
        )
        if config.video_token_id is None:
            from humanomni.processing import (
                load_tokenizer,
                placeholder_ids,
            )  # processing imports this package's towers

            set_placeholder_ids(config, placeholder_ids(load_tokenizer(folder)))
        vision_config, audio_config = config.vision_config, config.audio_config
        config.vision_config = config.audio_config = None  # the towers' weights are not the checkpoint's: added below
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except Exception as error:
            raise CheckpointError(
                f"{folder} does not load: {first_line(error)}; mend its config.json or download it again"
            ) from error
        _check_weights(folder, config, info)
        config = model.config
        config.vision_config, config.audio_config = vision_config, audio_config
        if load_towers:
            model.model.vision_tower = load_vision_tower(config, model.dtype).to(model.device)
            model.model.audio_tower = load_audio_tower(config, model.dtype).to(model.device)
        model.eval()
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory,
        *,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        save_towers: bool = False,
        **kwargs,
    ) -> None:
        """Writes the checkpoint with the release's key names, without the towers, which `config.json` points to.

        Args:
            save_towers: write the two towers and BERT's small files too, as folders inside `save_directory`, and let
                `config.json` point to those: for a checkpoint that travels. Where a tower trains this is always done,
                and the checkpoint repeats its weights, as the release's do.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        trained = any(
            weight.requires_grad
            for tower in (self.model.vision_tower, self.model.audio_tower)
            if tower is not None
            for weight in tower.parameters()
        )
        own = {key: value for key, value in state_dict.items() if trained or not key.startswith(TOWER_PREFIXES)}
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=own, **kwargs)
        if (save_towers or trained) and is_main_process:
            save_tower_folders(self.config, state_dict, Path(save_directory))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        bert_input_ids: torch.Tensor | None = None,
        bert_attention_mask: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        query_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """A processor's batch (media as in `HumanOmniModel.encode`) -> logits (B, L or `logits_to_keep`, vocabulary).

        With `labels` (B, L; -100 where nothing is to be learnt) also the mean next-token cross-entropy, `loss`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            pixel_values=pixel_values,
            input_features=input_features,
            bert_input_ids=bert_input_ids,
            bert_attention_mask=bert_attention_mask,
            video_features=video_features,
            image_features=image_features,
            audio_features=audio_features,
            query_features=query_features,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(self, inputs=None, *, prompt_index=None, prefill_prompts_once: bool = True, **kwargs):
        """As `GenerationMixin.generate`; each clip is encoded once, and a placeholder is never generated.

        Args:
            prompt_index: (B,) for rows that repeat few prompts: which prompt each row holds. The media are then those
                of the distinct prompts, in their order, and are encoded and projected once a prompt.
            prefill_prompts_once: let each of those prompts pass the language model once too, not once a row.
        """
        if inputs is not None:
            kwargs["input_ids"] = inputs
        raw = {name: kwargs.pop(name) for name in RAW_MEDIA if kwargs.get(name) is not None}
        features = self.model.encode(**raw)
        features |= {name: kwargs.pop(name) for name in FEATURES if kwargs.get(name) is not None}
        if prompt_index is not None:
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            first = [int((prompt_index == prompt).nonzero()[0]) for prompt in range(int(prompt_index.max()) + 1)]
            embeds = self.model.embed(ids[first], **features)  # (U, L, H)
            if prefill_prompts_once:
                kwargs["past_key_values"] = self._prefill_prompts(embeds[:, :-1], mask[first, :-1], prompt_index)
            else:
                kwargs["inputs_embeds"] = embeds[prompt_index]
            features = {}
        settings = kwargs.get("generation_config") or self.generation_config
        suppressed = kwargs.get("suppress_tokens") or settings.suppress_tokens or []
        kwargs["suppress_tokens"] = sorted({*suppressed, *self._placeholder_ids()}) or None
        return super().generate(**kwargs, **features)

    def _placeholder_ids(self) -> list[int]:
        """The placeholders' ids, those that the language model's head could produce."""
        ids = (self.config.image_token_id, self.config.video_token_id, self.config.audio_token_id)
        return [token_id for token_id in ids if token_id is not None and token_id < self.config.vocab_size]

    def _prefill_prompts(self, embeds: torch.Tensor, attention_mask: torch.Tensor, prompt_index: torch.Tensor):
        """The cache of distinct prompts (U, L, H), repeated for the rows (B,) that hold them."""
        output = self.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask),
            use_cache=True,
        )
        output.past_key_values.batch_select_indices(prompt_index)
        return output.past_key_values

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        """The features enter with the prompt and live on in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in FEATURES:
                inputs.pop(name, None)
        return inputs


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The folder of a checkpoint given by path or cached hub id.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{path} holds no config.json; pass the folder of a HumanOmni or R1-Omni checkpoint")
    cached = cached_snapshot(str(path))
    if cached is None:
        raise CheckpointError(
            f"{path} is neither a folder nor a cached hub model; run scripts/download_models.sh or mend --model_path"
        )
    return Path(cached)


def read_config(folder: Path) -> HumanOmniConfig:
    """The configuration of a checkpoint folder; CheckpointError where it is not one of HumanOmni's."""
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} does not read: {first_line(error)}; download the checkpoint again") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type != HumanOmniConfig.model_type:
        raise CheckpointError(
            f"model_type in {file} is {model_type!r}, not {HumanOmniConfig.model_type!r}; "
            f"pass a HumanOmni or R1-Omni checkpoint"
        )
    try:
        config = HumanOmniConfig.from_dict(fields)
    except CheckpointError:
        raise
    except Exception as error:  # transformers' checks of types and of fields against each other
        told = " ".join(str(error).split())
        raise CheckpointError(f"{file} is not a valid configuration: {told}; mend the field") from error
    config._name_or_path = str(folder)
    return config


def set_placeholder_ids(config: HumanOmniConfig, ids: dict[str, int]) -> None:
    """Notes which token ids stand for media: `ids` maps `<image>`, `<video>` and `<audio>` to theirs."""
    config.image_token_id, config.video_token_id, config.audio_token_id = (
        ids["<image>"],
        ids["<video>"],
        ids["<audio>"],
    )


def _check_weights(folder: Path, config: HumanOmniConfig, info: dict) -> None:
    """Complains of weights that are missing or misshapen (CheckpointError) or unknown (a warning)."""
    for key, found, wanted in sorted(info["mismatched_keys"]):
        meant = f"; mm_bert is {config.mm_bert}, pass --bert_model with another" if ".bert_" in key else ""
        raise CheckpointError(
            f"{key} in {folder} has shape {tuple(found)}, config.json asks for {tuple(wanted)}{meant}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's weights, {missing[0]} first; download or save it again"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        logger.warning("%s holds %d weights the model does not know, %s first", folder, len(unexpected), unexpected[0])


AutoConfig.register(HumanOmniConfig.model_type, HumanOmniConfig)
AutoModelForCausalLM.register(HumanOmniConfig, HumanOmniQwen2ForCausalLM)
