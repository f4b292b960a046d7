"""The released code's numbers, in float32 on a CPU, come out again: prompts, pixels, features, logits, greedy text."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden_folder

import humanomni
from humanomni.fusion import VideoProjector, halve_grid
from humanomni.processing import Media

VARIANTS = ("humanomni-tiny", "humanomni-tiny-with-towers")
# A tied or missing record means an empty list of cases, and the tests below are reported as skipped.
RECORD = golden_folder() / "setA" / "golden"
RUNS = (
    [name for name in json.loads((RECORD / "forward.json").read_text()) if name[0] != "_"] if RECORD.is_dir() else []
)
TAG_IDS = {-200: "<image>", -201: "<video>", -202: "<audio>"}

pytestmark = pytest.mark.skipif(not RUNS, reason=f"no golden record at {golden_folder()}; set R1_OMNI_GOLDEN")


@pytest.fixture(scope="module", params=VARIANTS)
def loaded(golden, request):
    return humanomni.load_pretrained(golden / request.param, bert_model=golden / "bert-tiny", device="cpu")


@pytest.fixture(scope="module")
def record(golden):
    return json.loads((golden / "golden" / "forward.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "golden" / "forward.npz")


def batch_of(processor, golden, run):
    clip = None if run["file"] is None else golden / run["file"]
    return processor(run["instruct"], clip, run["modal"])


def recorded_ids(processor, ids: list[int]) -> list[int]:
    """The record's ids, one negative id a medium, as this processor numbers them."""
    return [processor.token_ids[TAG_IDS[i]] if i < 0 else i for i in ids]


def collapsed(processor, ids: list[int]) -> list[int]:
    """Each run of one placeholder as a single one."""
    media = set(processor.token_ids.values())
    return [token for place, token in enumerate(ids) if token not in media or ids[place - 1] != token]


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(ours.detach().numpy().reshape(theirs.shape), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_forward_and_greedy_text(name, loaded, golden, record, arrays):
    model, processor = loaded
    run = record[name]
    batch = batch_of(processor, golden, run)
    ids = batch["input_ids"][0].tolist()
    assert collapsed(processor, ids) == recorded_ids(processor, run["input_ids"])
    assert len(ids) == run["seq_len"]
    assert batch["bert_input_ids"][0].tolist() == run["bert_input_ids"]

    with torch.no_grad():
        logits = model(**batch).logits[0]
    close(logits[-5:], arrays[f"{name}.logits_last5"], 1e-4)
    close(logits.logsumexp(-1), arrays[f"{name}.logsumexp_all"], 1e-4)

    produced = model.generate(**batch, max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    for step, (ours, theirs) in enumerate(zip(produced, run["generated_ids"], strict=True)):
        if run["top1_top2_margin"][step] < 5e-3:
            break
        assert ours == theirs, f"step {step}"


@pytest.mark.parametrize("name", RUNS)
def test_intermediate_features(name, loaded, golden, record, arrays):
    model, processor = loaded
    backbone, run = model.model, record[name]
    batch = batch_of(processor, golden, run)
    media = {key: batch[key] for key in ("pixel_values_videos", "pixel_values", "input_features") if key in batch}
    seen = {}
    with torch.no_grad():
        encoded = backbone.encode(
            **media, bert_input_ids=batch["bert_input_ids"], bert_attention_mask=batch["bert_attention_mask"]
        )
        seen["bert_cls"] = encoded["query_features"]
        seen["gate_logits"] = backbone.bert_gate(encoded["query_features"])
        seen["branch_probs"] = seen["gate_logits"].softmax(-1)
        patches = encoded.get("video_features", encoded.get("image_features"))
        if patches is not None:
            video, body, _ = backbone.mm_projector(patches)
            fused = backbone.project_video(patches, encoded["query_features"])[0]
            seen |= {
                "vision_features_f0": patches[0, 0],
                "vision_features_flast": patches[0, -1],
                "proj_video": video[0],
                "proj_body": body[0],
                "proj_face_f0": backbone.mm_projector.mlp_2xgelu_face(patches)[0, 0],
                "fused_video_tokens": fused,
                "fused_video_tokens_s16": fused[::16],
            }
        if "audio_features" in encoded:
            hidden = backbone.audio_tower.encoder(batch["input_features"]).last_hidden_state[0]
            projected = backbone.project_audio(encoded["audio_features"])[0]
            seen |= {
                "audio_last_hidden_s10": hidden[::10],
                "audio_pooled_s5": encoded["audio_features"][0, ::5],
                "audio_projected_s5": projected[::5],
                "audio_projected_s50": projected[::50],
            }
        embeds = backbone.embed(batch["input_ids"], **encoded)[0]
        seen["inputs_embeds_s23"] = embeds[::23]
        if f"{name}.inputs_embeds_rows" in arrays:
            seen["inputs_embeds_first24_last24"] = embeds[arrays[f"{name}.inputs_embeds_rows"]]
    compared = 0
    for key, ours in seen.items():
        stored = f"{name}.{key}"
        if stored in arrays and (key != "proj_face_f0" or ours.numel() == arrays[stored].size):
            close(ours, arrays[stored], 1e-4)
            compared += 1
    assert compared >= 4
    total = run["stats"]["inputs_embeds"]
    assert embeds.double().sum().item() == pytest.approx(total["sum"], abs=1e-3 * total["l2"])


def test_each_style_of_prompt(loaded, golden):
    _, processor = loaded
    styles = json.loads((golden / "golden" / "prompts.json").read_text())
    question = styles["inference"]["bert_text"].split("  Output")[0]
    asked = {
        "inference": styles["inference"]["bert_text"],
        "release_grpo": styles["grpo"]["bert_text"],
        "release_sft": styles["sft"]["bert_text"].split("<au_end>")[1],
    }
    assert all(text.startswith(question) for text in asked.values())
    for style, instruct in asked.items():
        stored = styles[style.removeprefix("release_")]
        prompt, query = processor.build_prompt(instruct, "video_audio", style)
        assert stored["prompt"].startswith(prompt)
        assert stored["bert_text"] == query
        if style != "release_sft":  # the SFT record goes on with the answer
            assert stored["prompt"] == prompt
        batch = processor(instruct, golden / "media/m1_chirp.mp4", prompt_style=style)
        ids = collapsed(processor, batch["input_ids"][0].tolist())
        assert ids == recorded_ids(processor, stored["input_ids"])[: len(ids)]
        assert batch["bert_input_ids"][0].tolist() == stored["bert_input_ids"]


def test_strings_tokenise_as_recorded(loaded, golden):
    _, processor = loaded
    tokens = json.loads((golden / "golden" / "tokens.json").read_text())
    for row in tokens["strings"]:
        if "<video>" in row["s"] or "<|vision_start|>" in row["s"]:
            continue  # placeholders and Qwen2-VL's marks are single tokens here, by design (docs/fidelity.md)
        assert processor.tokenizer(row["s"], add_special_tokens=False)["input_ids"] == row["slow"], row["s"]
        assert processor.bert_tokenizer(row["s"])["input_ids"] == row["bert"], row["s"]
    for row in tokens["multimodal"]:
        if row["mt"] in ("<video>", "<image>") and "<" in row["s"] and any(i < 0 for i in row["ids"]):
            ids = processor.tokenizer(row["s"], add_special_tokens=False)["input_ids"]
            assert ids == recorded_ids(processor, row["ids"]), row["s"]


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("clip", ["m1_chirp", "m2_short", "m3_speech", "m4_noaudio"])
def test_pixels(clip, aspect, loaded, golden):
    _, processor = loaded
    stored = np.load(golden / "golden" / "media_video.npz")
    key = f"{clip}.{'None' if aspect == 'square' else 'pad'}.8.u8"
    if key not in stored:
        pytest.skip(f"{key} is not in the record: the clip is square")
    frames = processor.load_media(golden / f"media/{clip}.mp4", "video", image_aspect_ratio=aspect).frames
    close(frames, decoded(stored[key]), 1e-5)


def test_pixels_of_part_of_a_clip_of_arrays_and_of_an_image(loaded, golden):
    _, processor = loaded
    stored = np.load(golden / "golden" / "media_video.npz")
    part = processor.load_media(
        golden / "media/m1_chirp.mp4", "video", start=0.5, end=1.5, image_aspect_ratio="pad"
    ).frames
    close(part, decoded(stored["m1_chirp.s0.5e1.5.pad.u8"]), 1e-5)
    for aspect, key in (("square", "None"), ("pad", "pad")):
        array = processor.load_media(stored["ndarray3.input"], "video", image_aspect_ratio=aspect).frames
        close(array, decoded(stored[f"ndarray3.{key}.u8"]), 1e-5)
        image = processor.load_media(golden / "media/m6_image.png", "image", image_aspect_ratio=aspect).image
        close(image, decoded(stored[f"image.{key}.u8"]), 1e-5)


def decoded(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)


@pytest.mark.parametrize(
    "clip", ["m1_chirp.mp4", "m2_short.mp4", "m3_speech.mp4", "m4_noaudio.mp4", "m5_audio_only.wav"]
)
def test_log_mel_features(clip, loaded, golden):
    _, processor = loaded
    name = Path(clip).stem
    facts = json.loads((golden / "golden" / "media.json").read_text())["audio"][name]
    stored = np.load(golden / "golden" / "media_audio.npz")
    ours = processor.load_media(golden / "media" / clip, "audio").audio
    assert list(ours.shape) == facts["feat_shape"][1:]
    columns, stride = facts["stored_frames"], facts.get("feat_stride", 1)
    if f"{name}.feat" in stored:
        close(ours[:, :columns:stride], stored[f"{name}.feat"], 1e-4)
    np.testing.assert_allclose(ours[:, columns:], facts["tail_constant"], rtol=0, atol=1e-4)


def test_sound_beyond_thirty_seconds_is_cut(loaded, golden):
    _, processor = loaded
    stored = np.load(golden / "golden" / "media_audio.npz")["sin31s.feat_strided"]
    wave = (np.sin(np.arange(31 * 16000) / 7) * 0.3).astype(np.float32)
    close(processor.load_media(wave, "audio").audio[::8, ::50], stored, 1e-4)


@pytest.mark.parametrize("name", ["aio_5x5", "small_4x4", "small_t1"])
def test_projectors_alone(name, golden, loaded):
    stored = np.load(golden / "golden" / "components.npz")
    facts = json.loads((golden / "golden" / "components.json").read_text())[name]
    config = humanomni.HumanOmniConfig(
        mm_projector_type=facts["type"], mm_hidden_size=facts["mm_hidden_size"], hidden_size=facts["hidden_size"]
    )
    projector = VideoProjector(config)
    weights = {key.removeprefix(f"{name}.sd."): torch.tensor(stored[key]) for key in stored if f"{name}.sd." in key}
    projector.load_state_dict(weights, strict=True)
    features = torch.tensor(stored[f"{name}.x"])
    with torch.no_grad():
        video, body, face = projector(features)
        close(projector.mlp_2xgelu_face(features), stored[f"{name}.face"], 1e-5)
        close(halve_grid(projector.mlp_2xgelu_face(features)), stored[f"{name}.face_pooled"], 1e-5)
    close(video, stored[f"{name}.video"], 1e-5)
    close(body, stored[f"{name}.body"], 1e-5)
    close(face, stored[f"{name}.face_pooled"], 1e-5)


def test_which_patch_grids_each_projector_fuses(golden):
    fusable = json.loads((golden / "golden" / "components.json").read_text())["fusable"]
    for grid, types in fusable.items():
        for projector, fits in types.items():
            config = humanomni.HumanOmniConfig(
                mm_projector_type=projector,
                mm_hidden_size=768,
                vision_config={"hidden_size": 768, "image_size": int(grid) * 8, "patch_size": 8},
            )
            if fits:
                config.check_towers()
            else:
                with pytest.raises(humanomni.CheckpointError, match="patch grid"):
                    config.check_towers()


def test_a_batch_gives_each_clip_what_it_gets_alone(loaded, golden, record):
    model, processor = loaded
    runs = [record[name] for name in ("va0", "text", "a5_wav", "img", "v3", "va1")]
    clips = [None if run["file"] is None else golden / run["file"] for run in runs]
    batch = processor([run["instruct"] for run in runs], clips, [run["modal"] for run in runs])
    together = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, run in zip(together.tolist(), runs, strict=True):
        expected = run["generated_ids"][:12]
        close_calls = [step for step, margin in enumerate(run["top1_top2_margin"][:12]) if margin < 5e-3]
        steps = min([len(expected), *close_calls])
        assert row[:steps] == expected[:steps]


def test_both_variants_load_quietly_and_an_unknown_weight_is_told(golden, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    towers = {"vision_tower": golden / "siglip-tiny", "audio_tower": golden / "whisper-tiny-random"}
    with caplog.at_level(logging.WARNING):
        for variant in VARIANTS:
            humanomni.load_pretrained(golden / variant, bert_model=golden / "bert-tiny", **towers)
    assert caplog.records == []

    for file in (golden / "humanomni-tiny").iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(golden / "humanomni-tiny" / "model.safetensors")
    save_file({**weights, "model.stray.weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        humanomni.load_pretrained(tmp_path, bert_model=golden / "bert-tiny", **towers)
    assert "model.stray.weight" in caplog.text


def full_size_config(**changes) -> humanomni.HumanOmniConfig:
    """The 0.5B release with its towers."""
    fields = {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vision_config": {},  # transformers' defaults are SigLIP base patch16-224
        "audio_config": {
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "num_mel_bins": 128,
        },
    }
    return humanomni.HumanOmniConfig(**{**fields, **changes})


@pytest.mark.parametrize("tied", [True, False])
def test_keys_and_shapes_at_full_size(tied, golden_root):
    stored = json.loads((golden_root / "keys_full.json").read_text())
    config = full_size_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = humanomni.HumanOmniQwen2ForCausalLM(config)
    ours = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    left_behind = stored["whisper_unused_head"]
    expected = {k: v for k, v in {**stored["keys_a"], **stored["keys_only_in_b"]}.items() if k not in left_behind}
    assert ours == expected
    counts = stored["parameter_counts_tied" if tied else "parameter_counts_untied"]
    unused = sum(int(np.prod(shape)) for shape in left_behind.values())
    assert sum(weight.numel() for weight in model.parameters()) == counts["total"] - unused


def test_a_clip_is_encoded_once_however_many_texts_it_gets(loaded, golden):
    model, processor = loaded
    clip = processor.load_media(golden / "media/m1_chirp.mp4")
    assert isinstance(clip, Media)
    batch = processor("What?", clip)
    calls = []
    hooks = [
        tower.register_forward_hook(lambda *_: calls.append(1))
        for tower in (model.model.vision_tower, model.model.audio_tower)
    ]
    produced = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=4)
    for hook in hooks:
        hook.remove()
    assert produced.shape[0] == 4
    assert len(calls) == 2
