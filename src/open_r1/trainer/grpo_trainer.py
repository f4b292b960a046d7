"""TRL's GRPOTrainer for clips: each is decoded, encoded and projected once, and its prompt passes the model once.

What is overridden, and why (TRL 1.16; `tests/test_trl_hooks.py` fails when one of these changes):

- `_generate_and_score_completions`: notes the samples of the batch, and lets each row carry the number of its prompt
  through TRL's shuffling, splitting and buffering.
- `_tokenize_prompts`: prepares each distinct prompt and its media once, as a `PromptBank`.
- `_calculate_rewards`: a clip that could not be read gives no reward.
- `_compute_loss` and `_get_per_token_logps_and_entropies`: score with the media. Stock TRL knows images only; video
  and sound would silently be missing from the policy's and the reference's log-probabilities.

Shapes: B rows (completions), U distinct prompts, P prompt length, C completion length.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from humanomni.errors import HumanOmniError, MediaError
from humanomni.processing import HumanOmniProcessor, stack_media
from open_r1.data import (
    BadSamples,
    EncodedPrompt,
    Sample,
    blank_media,
    encode_prompt,
    load_sample_media,
    sample_of,
)
from open_r1.training import TrainsParts, WholeCheckpoints

logger = logging.getLogger(__name__)


class TrainingError(HumanOmniError):
    """Training cannot go on: names the clips in hand."""


@dataclass
class Efficiency:
    """What is done once instead of once a completion; each changes nothing but time.

    Attributes:
        encode_once: the towers run once a distinct clip; otherwise in each scoring pass, for each row.
        project_once: in each pass, projectors, gate and BERT run once a distinct prompt; otherwise for each row.
        prefill_once: in the rollout, a prompt passes the language model once; otherwise for each row.
        share_prompt_cache: in scoring too, its keys and values (with gradients) serving all rows; needs
            `project_once`. Gradient checkpointing cannot keep a cache: the policy's pass is then the plain one.
        decode_ahead: threads decode the clips of the next batch while this one trains.
    """

    encode_once: bool = True
    project_once: bool = True
    prefill_once: bool = True
    share_prompt_cache: bool = True
    decode_ahead: bool = True


class PromptBank:
    """The distinct prompts of one generation batch and their media, raw or already encoded."""

    def __init__(self, prompts: list[EncodedPrompt], samples: list[Sample], clips: list, stack, bad: list[bool]):
        """
        Args:
            clips: a prompt's media each, in whatever form `stack` joins to the model's inputs.
            stack: list of clips -> dict of tensors.
            bad: whether a prompt's clip could not be read and stands in blank.
        """
        self.prompts, self.samples, self.clips, self.stack, self.bad = prompts, samples, clips, stack, bad


class HumanOmniGRPOTrainer(WholeCheckpoints, TrainsParts, GRPOTrainer):
    """
    Args:
        prompt_style: `inference` or `release`, see `open_r1.data.encode_prompt`.
        data_folder: where relative clip paths start.
        efficiency: what is shared among the completions of a prompt.
        feature_cache: an `open_r1.cache_features.FeatureCache`; no tower is then run.
        on_bad_sample: a clip that does not read: `error` stops with its name; `skip` trains its prompt with no effect.
        bad_samples: where skipped samples are noted.
        projector_learning_rate: of the projectors and the gate; None for the common one.
        decode_workers: threads that read clips.
        completions_every: with `log_completions`, the table of completions is shown and stored every so many steps.
    """

    def __init__(
        self,
        *args,
        prompt_style: str = "inference",
        data_folder: str = "",
        efficiency: Efficiency | None = None,
        feature_cache=None,
        on_bad_sample: str = "error",
        bad_samples: BadSamples | None = None,
        projector_learning_rate: float | None = None,
        decode_workers: int = 4,
        completions_every: int = 1,
        **kwargs,
    ):
        self.prompt_style, self.data_folder = prompt_style, data_folder
        self.efficiency = efficiency or Efficiency()
        self.feature_cache, self.on_bad_sample, self.bad_samples = feature_cache, on_bad_sample, bad_samples
        self.projector_learning_rate = projector_learning_rate
        self.completions_every = completions_every
        self._threads = ThreadPoolExecutor(decode_workers, "clip")
        self._decoding: dict[Sample, Future] = {}
        self._banks: dict[str, PromptBank] = {}
        self._samples: list[Sample] = []
        self._rows = torch.empty(0, dtype=torch.long)  # (B,) for each row in hand, its prompt in the bank
        self.tower_clips = 0
        self._logged_tokens, self._logged_at = 0, time.monotonic()
        super().__init__(*args, **kwargs)
        for model in filter(None, (self.model, self.ref_model)):
            self._count_tower_clips(model)
        if self.efficiency.decode_ahead and feature_cache is None:
            self.data_collator = self._decode_ahead

    @property
    def processor(self) -> HumanOmniProcessor:
        return self.processing_class

    def _count_tower_clips(self, model: torch.nn.Module) -> None:
        """Adds the clips that pass a vision tower, or an audio tower alone, to `tower_clips`."""
        for name, module in self.accelerator.unwrap_model(model).named_modules():
            if name.endswith("model.vision_tower"):
                module.register_forward_pre_hook(self._note_tower_clips)

    def _note_tower_clips(self, module, inputs) -> None:
        self.tower_clips += len(inputs[0])

    # --- clips ---

    def _decode_ahead(self, rows: list[dict]) -> list[dict]:
        """The data loader's collator: it runs one batch ahead of training, so the clips it starts are read in time."""
        for sample in {sample_of(row): None for row in rows}:
            self._start_decoding(sample)
        return rows

    def _start_decoding(self, sample: Sample) -> Future:
        if sample not in self._decoding:
            prompt = encode_prompt(self.processor, sample, self.prompt_style)
            self._decoding[sample] = self._threads.submit(
                load_sample_media, self.processor, sample, prompt.modal, self.data_folder, prompt.num_frames
            )
        return self._decoding[sample]

    def _read_clip(self, sample: Sample, prompt: EncodedPrompt) -> tuple[object, bool]:
        """The media of a sample, and whether they are a blank in place of a clip that does not read."""
        try:
            if self.feature_cache is not None:
                return self.feature_cache.get(sample, prompt.modal), False
            return self._start_decoding(sample).result(), False
        except MediaError as error:
            if self.on_bad_sample == "error":
                raise MediaError(f"{sample.origin}: {error}; pass --on_bad_sample skip to go on without it") from error
            logger.warning("%s is skipped: %s", sample.origin, error)
            if self.bad_samples is not None:
                self.bad_samples.add(sample, str(error))
            if self.feature_cache is not None:
                return self.feature_cache.blank(prompt.modal), True
            return blank_media(self.processor, prompt.modal, prompt.num_frames), True
        finally:
            self._decoding.pop(sample, None)

    def _fill_bank(self, samples: list[Sample]) -> PromptBank:
        """Prepares distinct samples: token ids, and media in the form that the scoring passes start from."""
        prompts = [encode_prompt(self.processor, sample, self.prompt_style) for sample in samples]
        if self.feature_cache is None:
            for sample in samples:
                self._start_decoding(sample)
        read = [self._read_clip(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        clips, bad = [clip for clip, _ in read], [is_bad for _, is_bad in read]
        stack = stack_media if self.feature_cache is None else self.feature_cache.stack
        if self.feature_cache is None and self.efficiency.encode_once:
            clips, stack = self._encode(clips), _join_features
        return PromptBank(prompts, samples, clips, stack, bad)

    @torch.no_grad()
    def _encode(self, clips: list) -> list[dict[str, torch.Tensor]]:
        """One pass of each tower over all clips; their features, a dict each."""
        backbone = self._backbone()
        raw = {name: tensor.to(self.accelerator.device) for name, tensor in stack_media(clips).items()}
        features = backbone.encode(**raw, run_absent=is_deepspeed_zero3_enabled())
        rows = {
            name: iter(features[name].split(1))
            for name in ("video_features", "image_features", "audio_features")
            if name in features
        }
        holds = {"video_features": "frames", "image_features": "image", "audio_features": "audio"}
        return [
            {name: next(rows[name]) for name, part in holds.items() if getattr(clip, part) is not None}
            for clip in clips
        ]

    def _backbone(self):
        model = self.accelerator.unwrap_model(self.model)
        return (model.get_base_model() if hasattr(model, "get_base_model") else model).model

    def _media_of(self, bank: PromptBank, prompts: list[int]) -> dict[str, torch.Tensor]:
        """The model's media inputs, and BERT's, for a list of the bank's prompts."""
        inputs = bank.stack([bank.clips[prompt] for prompt in prompts])
        inputs |= self.processor.tokenize_queries([bank.prompts[prompt].query for prompt in prompts])
        return {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}

    # --- rollout ---

    def _generate_and_score_completions(self, inputs):
        self._samples = [sample_of(row) for row in inputs]
        self._log_completion_extra("clip", [sample.clip for sample in self._samples])
        before = self.tower_clips
        output = super()._generate_and_score_completions(inputs)
        rows, bank = self._rows, self._bank
        output["prompt_rows"] = rows
        skipped = torch.tensor(bank.bad, device=rows.device)[rows]
        output["completion_mask"] = output["completion_mask"] * (~skipped)[:, None]
        self._metrics[self._mode]["tower_clips"].append(float(self.tower_clips - before))
        return output

    def _tokenize_prompts(self, prompts: list):
        distinct = list(dict.fromkeys(self._samples))
        bank = self._banks[self._mode] = self._fill_bank(distinct)
        numbers = {sample: number for number, sample in enumerate(distinct)}
        rows = [numbers[sample] for sample in self._samples]
        self._rows = torch.tensor(rows, device=self.accelerator.device)
        fields = self._media_of(bank, list(range(len(distinct))))
        # TRL passes tensors on to `generate`, which takes a batch of few prompts by this index
        fields["prompt_index"] = self._rows
        if not self.efficiency.prefill_once:
            fields["prefill_prompts_once"] = torch.tensor(False)
        return [bank.prompts[number].input_ids for number in rows], None, fields

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        bad = torch.tensor(self._bank.bad, device=self._rows.device)[self._rows]
        rewards[self.accelerator.gather(bad)] = torch.nan  # TRL leaves such rows out of the statistics
        return rewards

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _bank(self) -> PromptBank:
        """Of the generation batch in hand; training's outlives an evaluation in the middle of its cycle."""
        return self._banks[self._mode]

    # --- scoring ---

    def _compute_loss(self, model, inputs):
        self._rows = inputs["prompt_rows"]
        loss = super()._compute_loss(model, inputs)
        if not torch.isfinite(loss):
            clips = ", ".join(sorted({str(self._bank.samples[row].clip) for row in self._rows.tolist()}))
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step}, on {clips}; lower the learning rate or "
                f"max_grad_norm, or look at these clips"
            )
        return loss

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        size = batch_size or len(input_ids)
        logps, entropies = [], []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            output = self._score(model, input_ids[rows], attention_mask[rows], logits_to_keep, self._rows[rows])
            logps.append(output.log_probs)
            entropies.append(output.entropy)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _score(self, model, input_ids, attention_mask, completion_length: int, prompt_rows: torch.Tensor):
        """Log-probabilities (B, C) of the completions in `input_ids` (B, P + C), and their entropies."""
        prompt_length = input_ids.shape[1] - completion_length
        if self.efficiency.project_once:
            prompts, index = torch.unique(prompt_rows, return_inverse=True)  # (U,), (B,)
            first = torch.stack([(index == number).nonzero()[0, 0] for number in range(len(prompts))])
        else:
            prompts, index = prompt_rows, torch.arange(len(prompt_rows), device=prompt_rows.device)
            first = index
        checkpointing = self.args.gradient_checkpointing and model is not self.ref_model
        completion_ids, completion_mask = input_ids[:, prompt_length:], attention_mask[:, prompt_length:]
        labels = completion_ids.masked_fill(completion_mask == 0, -100)
        with self.accelerator.autocast():
            return model(
                input_ids=completion_ids,
                attention_mask=attention_mask,
                labels=torch.cat([labels.new_full((len(labels), 1), -100), labels], dim=1),  # (B, 1 + C)
                fused_lm_head=True,
                prompt_ids=input_ids[first, :prompt_length],
                prompt_mask=attention_mask[first, :prompt_length],
                prompt_index=index,
                share_prompt_cache=self.efficiency.share_prompt_cache and not checkpointing,
                **self._media_of(self._bank, prompts.tolist()),
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now, tokens = time.monotonic(), self.state.num_input_tokens_seen
            logs["tokens_per_second"] = (tokens - self._logged_tokens) / (now - self._logged_at)
            self._logged_tokens, self._logged_at = tokens, now
        self.log_completions = self.args.log_completions and self.state.global_step % self.completions_every == 0
        super().log(logs, start_time)


def _join_features(clips: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The features of several clips, each kind joined in their order."""
    names = {name: None for clip in clips for name in clip}
    return {name: torch.cat([clip[name] for clip in clips if name in clip]) for name in names}
