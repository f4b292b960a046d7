"""GRPO: the released code's numbers, a plain reference of the loss, sharing without effect, and rows in place."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset
from trl import GRPOConfig

import humanomni
from open_r1.data import DataError, Sample
from open_r1.grpo import DataArguments, as_dataset, load_prompts
from open_r1.rewards import accuracy_reward, format_reward
from open_r1.trainer.grpo_trainer import Efficiency, HumanOmniGRPOTrainer, TrainingError
from open_r1.training import set_trainable

EXAMPLE = REPOSITORY / "assets" / "example.mp4"
REWARDS = [accuracy_reward, format_reward]


class FixedCompletions(HumanOmniGRPOTrainer):
    """The trainer with its sampling replaced by given completions; everything else is the real thing."""

    completions: list[list[int]] = ()

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        return [self.completions[row % len(self.completions)] for row in range(len(prompt_ids))], None


def make_trainer(
    model, processor, samples, folder, trainer_class=HumanOmniGRPOTrainer, *, init=None, own=None, **options
):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "beta": 0.04,
        "loss_type": "grpo",
        "use_bias_correction_kl": False,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "model_init_kwargs": {"dtype": "float32", **(init or {})},
        "disable_tqdm": True,
    }
    rows = as_dataset(samples)
    return trainer_class(
        model=model,
        reward_funcs=REWARDS,
        args=GRPOConfig(**{**settings, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        **(own or {}),
    )


def rows_of(trainer, copies: int) -> list[dict]:
    return [row for row in trainer.train_dataset for _ in range(copies)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with four clips of different pictures, sounds and lengths."""
    import imageio.v3 as iio

    folder = tmp_path_factory.mktemp("clips")
    (folder / "face.mp4").write_bytes(EXAMPLE.read_bytes())
    for number, colour in enumerate((60, 200)):
        frames = np.full((12 + number, 64, 80, 3), colour, np.uint8)
        frames[:, 8 * number : 8 * number + 16, :40] = 255 - colour
        iio.imwrite(folder / f"plain{number}.mp4", frames, fps=8)
    return folder


def sample(clip, label="happy", question="Which emotion?", tags="<video>\n<audio>\n") -> Sample:
    turns = [{"from": "human", "value": tags + question}, {"from": "gpt", "value": label}]
    return Sample.parse({"video": str(clip), "conversations": turns})


# --- the golden record ---


@pytest.mark.parametrize("name", ["mixed", "all_zero_reward", "eos_first_and_double"])
def test_a_golden_group(name, golden, tmp_path):
    record = json.loads((golden / "golden" / "grpo.json").read_text())
    arrays = np.load(golden / "golden" / "grpo.npz")
    group = record[name]
    model, processor = humanomni.load_pretrained(
        golden / "humanomni-tiny", bert_model=golden / "bert-tiny", device="cpu"
    )
    set_trainable(model, ["mm_projector", "audio_projector", "bert_gate", "language_model", "bert"])
    example = record["dataset_example_0"]
    asked = sample(golden / example["video"], example["solution"], example["problem"])
    trainer = make_trainer(
        model,
        processor,
        [asked],
        tmp_path,
        FixedCompletions,
        own={"prompt_style": "release"},
        init={"bert_model": str(golden / "bert-tiny")},
        max_completion_length=40,
    )
    with torch.no_grad():  # record["reference_recipe"]
        weights = dict(trainer.ref_model.named_parameters())
        weights["model.norm.weight"] *= 0.95
        weights["model.layers.0.self_attn.q_proj.bias"] += 0.05
        weights["model.bert_gate.2.bias"] += torch.tensor([0.2, 0.0, -0.2])
        weights["model.audio_projector.2.bias"] += 0.02
    mask = arrays[f"{name}.completion_mask"]
    trainer.completions = [ids[: row.sum()] for ids, row in zip(group["completion_ids"], mask, strict=True)]

    model.train()
    model.model.bert_model.eval()  # the record's figures are those without BERT's dropout
    output = trainer._generate_and_score_completions(rows_of(trainer, 4))
    media = set(processor.token_ids.values())
    ids = output["prompt_ids"][0].tolist()
    tags = {-200: "<image>", -201: "<video>", -202: "<audio>"}
    collapsed = [token for place, token in enumerate(ids) if token not in media or ids[place - 1] != token]
    assert collapsed == [processor.token_ids[tags[i]] if i < 0 else i for i in record["inputs"]["prompt_ids"]]
    assert (output["completion_mask"].numpy() == mask).all()
    np.testing.assert_allclose(output["advantages"], group["advantages"], atol=1e-5)
    shown = mask.astype(bool)
    np.testing.assert_allclose(
        output["ref_per_token_logps"].numpy()[shown], arrays[f"{name}.ref_logps"][shown], rtol=0, atol=2e-4
    )
    metrics = trainer._metrics["train"]
    assert metrics["rewards/accuracy_reward/mean"][0] == pytest.approx(np.mean(group["accuracy"]))
    assert metrics["rewards/format_reward/mean"][0] == pytest.approx(np.mean(group["format"]))

    trainer._rows = output["prompt_rows"]
    whole = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    seen = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, whole, seen, mask.shape[1])
    np.testing.assert_allclose(logps.detach().numpy()[shown], arrays[f"{name}.policy_logps"][shown], rtol=0, atol=2e-4)
    gap = output["ref_per_token_logps"] - logps.detach()
    kl = (gap.exp() - gap - 1).numpy()
    np.testing.assert_allclose(kl[shown], arrays[f"{name}.kl"][shown], rtol=1e-3, atol=2e-5)

    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, output)
    loss.backward()
    assert loss.item() == pytest.approx(group["loss"], abs=2e-4)
    gradients = {key: weight.grad for key, weight in model.named_parameters()}
    for key, norm in group["grad_norms"].items():
        assert gradients[key].double().norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), key
    if name == "mixed":
        corners = [key for key in arrays if key.startswith("grad.")]
        assert len(corners) == 8
        for stored in corners:
            gradient = gradients[stored.removeprefix("grad.").removesuffix("[:6,:8]")]
            corner = gradient.reshape(gradient.shape[0], -1)[:6, :8].numpy()
            np.testing.assert_allclose(corner, arrays[stored], rtol=1e-3, atol=2e-6)


# --- the loss ---


@pytest.fixture
def tiny(tiny_checkpoint):
    model, processor = humanomni.load_pretrained(tiny_checkpoint, device="cpu")
    set_trainable(model, ["mm_projector", "audio_projector", "bert_gate", "language_model"])
    return model, processor


def groups(clips) -> list[Sample]:
    """Prompts of three lengths and kinds."""
    return [
        sample(clips / "face.mp4", "happy"),
        sample(clips / "plain0.mp4", "sad", "What does the person feel, in one word, please?"),
        sample(clips / "plain1.mp4", "angry", "Feeling?", tags="<video>\n"),
    ]


def completions_of(processor, count: int) -> list[list[int]]:
    texts = ["<think>a</think><answer>happy</answer>", "sad", "<think>b", "<answer>angry</answer>", "no", "happy"]
    return [[*processor.tokenizer(text)["input_ids"], processor.tokenizer.eos_token_id] for text in texts][:count]


def scored(trainer, copies: int, efficiency: Efficiency | None = None):
    """Loss, log-probabilities and gradients of a batch of fixed completions."""
    if efficiency is not None:
        trainer.efficiency = efficiency
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions(rows_of(trainer, copies))
    loss = trainer._compute_loss(trainer.model, output)
    loss.backward()
    gradients = {name: w.grad.clone() for name, w in trainer.model.named_parameters() if w.grad is not None}
    trainer._rows = output["prompt_rows"]
    whole = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    seen = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, whole, seen, output["completion_ids"].shape[1]
        )
    return output, loss.item(), logps * output["completion_mask"], gradients


def test_loss_and_gradients_are_the_formula(tiny, clips, tmp_path):
    model, processor = tiny
    trainer = make_trainer(model, processor, groups(clips), tmp_path, FixedCompletions, per_device_train_batch_size=12)
    trainer.completions = completions_of(processor, 4)
    with torch.no_grad():
        trainer.ref_model.model.norm.weight *= 0.9
    _, loss, _, gradients = scored(trainer, 4)
    with_towers(trainer.ref_model, model)
    rewards = torch.tensor([[2.0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]])  # accuracy and format
    terms = []
    for asked, reward in zip(groups(clips), rewards, strict=True):
        advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
        for ids, advantage in zip(trainer.completions, advantages, strict=True):
            batch = asked_alone(processor, asked, ids)
            net_logps = []
            for net in (trainer.ref_model, model):
                logits = net(**batch).logits[0, -len(ids) - 1 : -1]
                net_logps.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
            r, p = net_logps[0].detach(), net_logps[1]
            ratio, kl = (p - p.detach()).exp(), (r - p).exp() - (r - p) - 1
            terms.append(-(ratio * advantage - 0.04 * kl).mean())
    expected = torch.stack(terms).mean()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    model.zero_grad()
    expected.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-5)


def asked_alone(processor, asked: Sample, ids: list[int]) -> dict:
    """One prompt and one completion as a plain batch, made without the trainer."""
    question = asked.turns[0].replace("<video>\n", "").replace("<audio>\n", "")
    question += "  Output the thinking process in <think> </think> and final emotion in <answer> </answer> tags."
    modal = "video_audio" if "<audio>" in asked.turns[0] else "video"
    batch = processor(question, asked.video, modal, image_aspect_ratio=processor.config.image_aspect_ratio)
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def with_towers(reference, policy):
    """The reference model with the policy's towers, for a pass from raw media."""
    reference.model.vision_tower, reference.model.audio_tower = policy.model.vision_tower, policy.model.audio_tower
    return reference


SWITCHES = ("encode_once", "project_once", "prefill_once", "share_prompt_cache", "decode_ahead")


def test_sharing_changes_nothing_but_the_work(tiny, clips, tmp_path):
    model, processor = tiny
    trainer = make_trainer(
        model,
        processor,
        groups(clips),
        tmp_path,
        FixedCompletions,
        per_device_train_batch_size=12,
        init={"load_towers": True},
    )
    trainer.completions = completions_of(processor, 4)
    trainer.tower_clips = 0
    _, loss, logps, gradients = scored(trainer, 4, Efficiency())
    assert trainer.tower_clips == 3  # one pass a distinct clip, for rollout, reference and policy together

    variants = [Efficiency(**dict.fromkeys(SWITCHES, False))]
    variants += [Efficiency(**{switch: False}) for switch in SWITCHES]
    for variant in variants:
        _, other_loss, other_logps, other_gradients = scored(trainer, 4, variant)
        assert other_loss == pytest.approx(loss, abs=1e-5), variant
        torch.testing.assert_close(other_logps, logps, rtol=0, atol=1e-5)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=0, atol=1e-5)


def test_policy_and_reference_see_the_media(tiny, clips, tmp_path):
    model, processor = tiny
    seen = {}
    for clip in ("face.mp4", "plain0.mp4"):
        trainer = make_trainer(model, processor, [sample(clips / clip)], tmp_path, FixedCompletions)
        trainer.completions = completions_of(processor, 4)
        output, _, logps, _ = scored(trainer, 4)
        seen[clip] = logps, output["ref_per_token_logps"] * output["completion_mask"]
    for ours, theirs in zip(*seen.values(), strict=True):
        assert (ours - theirs).abs().max() > 1e-3


def test_rows_keep_their_clip_through_cycles_and_evaluations(tiny, clips, tmp_path):
    model, processor = tiny
    gaps = []

    class Watching(HumanOmniGRPOTrainer):
        def _compute_loss(self, model, inputs):
            if self.model.training:
                self._rows = inputs["prompt_rows"]
                for row, number in enumerate(self._rows.tolist()):
                    bank = self._bank
                    mask = inputs["prompt_mask"][row].bool()
                    assert inputs["prompt_ids"][row][mask].tolist() == bank.prompts[number].input_ids
                    fresh = self._encode([self._read_clip(bank.samples[number], bank.prompts[number])[0]])[0]
                    gaps.append(max((fresh[k] - bank.clips[number][k]).abs().max().item() for k in fresh))
            return super()._compute_loss(model, inputs)

    asked = [*groups(clips), sample(clips / "face.mp4", "sad", "Is it sad?")]
    trainer = make_trainer(
        model,
        processor,
        asked,
        tmp_path,
        Watching,
        steps_per_generation=4,
        gradient_accumulation_steps=1,
        num_iterations=2,
        max_completion_length=4,
        max_steps=10,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    assert len(gaps) == 40 and max(gaps) < 1e-5
    logged = [row for row in trainer.state.log_history if "kl" in row]
    assert len(logged) == 10
    assert {"entropy", "tokens_per_second", "reward", "frac_reward_zero_std", "tower_clips"} <= logged[0].keys()
    assert any("eval_reward" in row for row in trainer.state.log_history)


def test_a_placeholder_is_never_sampled(tiny, clips, tmp_path):
    model, processor = tiny
    placeholders = list(processor.token_ids.values())
    with torch.no_grad():  # make them the likeliest tokens by far
        weight = model.lm_head.weight
        weight[placeholders] = weight.mean(0) + 50 * weight.std(0)
    trainer = make_trainer(model, processor, [sample(clips / "face.mp4")], tmp_path)
    output = trainer._generate_and_score_completions(rows_of(trainer, 8))
    assert not torch.isin(output["completion_ids"], torch.tensor(placeholders)).any()


def test_rollouts_with_and_without_shared_prefill_are_the_same_texts(tiny, clips, tmp_path):
    model, processor = tiny
    trainer = make_trainer(
        model,
        processor,
        groups(clips),
        tmp_path,
        generation_kwargs={"do_sample": False},
        per_device_train_batch_size=12,
    )
    texts = []
    for once in (True, False):
        trainer.efficiency = Efficiency(prefill_once=once)
        texts.append(trainer._generate_and_score_completions(rows_of(trainer, 4))["completion_ids"])
    assert torch.equal(*texts)


# --- faults ---


def test_a_bad_clip_is_named_or_left_without_effect(tiny, clips, tmp_path):
    model, processor = tiny
    corrupt = tmp_path / "corrupt.mp4"
    corrupt.write_bytes(EXAMPLE.read_bytes()[:3000])
    asked = [sample(clips / "face.mp4"), sample(corrupt)]
    own = {"on_bad_sample": "error"}
    trainer = make_trainer(model, processor, asked, tmp_path, FixedCompletions, own=own, per_device_train_batch_size=8)
    trainer.completions = completions_of(processor, 4)
    with pytest.raises(humanomni.MediaError, match=r"corrupt\.mp4"):
        scored(trainer, 4)
    trainer.on_bad_sample = "skip"
    output, loss, _, gradients = scored(trainer, 4)
    assert (output["completion_mask"][4:] == 0).all() and (output["advantages"][4:] == 0).all()
    assert trainer._metrics["train"]["reward"][-1] == pytest.approx(0.5)  # of the readable clip's group alone

    alone = make_trainer(model, processor, asked[:1], tmp_path, FixedCompletions)
    alone.completions = trainer.completions
    _, alone_loss, _, alone_gradients = scored(alone, 4)
    assert loss == pytest.approx(alone_loss / 2, abs=1e-6)  # half of the rows have no effect
    for name, gradient in alone_gradients.items():
        torch.testing.assert_close(gradients[name], gradient / 2, rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_no_number_stops_with_the_clips(tiny, clips, tmp_path):
    model, processor = tiny
    trainer = make_trainer(model, processor, [sample(clips / "face.mp4")], tmp_path, FixedCompletions)
    trainer.completions = completions_of(processor, 4)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingError, match=r"nan at step 0, on .*face\.mp4"):
        scored(trainer, 4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_prompt_length": 10}, "over max_prompt_length 10"),
        ({"max_completion_length": 10**6}, "do not fit the context"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(settings, told, tiny, clips, tmp_path):
    listed = tmp_path / "list.json"
    turns = [{"from": "human", "value": "<video>\n<audio>\nWhat?"}, {"from": "gpt", "value": "sad"}]
    listed.write_text(json.dumps([{"video": "face.mp4", "conversations": turns}]))
    limit = settings.pop("max_completion_length", 16)
    data = DataArguments(data=str(listed), data_folder=str(clips), **settings)
    arguments = GRPOConfig(output_dir=str(tmp_path), max_completion_length=limit, use_cpu=True, bf16=False)
    with pytest.raises(humanomni.PromptError, match=told) as error:
        load_prompts(str(listed), data, arguments, tiny[1])
    assert "sample 0" in str(error.value)
    data = DataArguments(data=str(listed), data_folder=str(tmp_path))
    with pytest.raises(DataError, match=r"face\.mp4 does not exist"):
        load_prompts(str(listed), data, arguments, tiny[1])


def test_a_batch_of_texts_alone_trains(tiny, tmp_path):
    model, processor = tiny
    turns = [{"from": "human", "value": "Say sad."}, {"from": "gpt", "value": "sad"}]
    trainer = make_trainer(model, processor, [Sample.parse({"conversations": turns})], tmp_path, max_steps=1)
    trainer.train()
    assert isinstance(trainer.train_dataset, Dataset)
