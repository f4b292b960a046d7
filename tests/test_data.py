"""Samples: the format's checks, mixtures, lengths, bad clips, and the released style against the golden record."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

import humanomni
from open_r1.data import (
    IGNORED,
    BadSamples,
    DataError,
    Sample,
    SampleEncoder,
    SupervisedCollator,
    prepare_samples,
    read_samples,
)
from open_r1.training import PARTS, set_trainable

EXAMPLE = REPOSITORY / "assets" / "example.mp4"
TAG_IDS = {-200: "<image>", -201: "<video>", -202: "<audio>"}


def entry(question="<video>\n<audio>\nWhat?", answer="happy", **media) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **(media or {"video": "clip.mp4"})}


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return humanomni.HumanOmniProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def record(golden):
    return json.loads((golden / "golden" / "sft.json").read_text())


@pytest.fixture(scope="module")
def loaded(golden):
    return humanomni.load_pretrained(golden / "humanomni-tiny", bert_model=golden / "bert-tiny", device="cpu")


def test_release_style_ids_labels_and_bert_query_of_each_sample(loaded, record):
    _, processor = loaded
    encode = SampleEncoder(processor, "release")
    media = set(processor.token_ids.values())
    for fields, stored in zip(record["conversations"], record["samples"], strict=True):
        ours = encode(Sample.parse(fields))
        kept = [i for i, token in enumerate(ours.input_ids) if token not in media or ours.input_ids[i - 1] != token]
        wanted = [processor.token_ids[TAG_IDS[i]] if i < 0 else i for i in stored["input_ids"]]
        assert [ours.input_ids[i] for i in kept] == wanted
        assert [ours.labels[i] for i in kept] == stored["labels"]
        assert ours.query == stored["bert_prompts"][0]


def test_release_style_batch_loss_and_gradients(loaded, record, golden):
    model, processor = loaded
    arrays = np.load(golden / "golden" / "sft.npz")
    trained = json.loads((golden / "golden" / "trainable_params.json").read_text())["sft"]
    batch = SupervisedCollator(processor, "release", golden / "media")(record["conversations"][:2])
    assert batch["bert_input_ids"].tolist() == record["batch"]["bert"]["input_ids"]
    assert batch["bert_attention_mask"].tolist() == record["batch"]["bert"]["attention_mask"]
    assert (batch["labels"].numpy() == arrays["batch2.expanded_labels"]).all()
    assert (batch["attention_mask"].numpy() == arrays["batch2.expanded_attention_mask"]).all()

    set_trainable(model, ["mm_projector", "audio_projector", "bert_gate", "language_model"])
    left_behind = ("classifier", "audio_tower.projector", "vision_tower", "audio_tower")
    ours = {name: weight.requires_grad for name, weight in model.named_parameters() if "_tower" not in name}
    assert ours == {name: trains for name, trains in trained.items() if not any(x in name for x in left_behind)}
    assert not any(w.requires_grad for n, w in model.named_parameters() if "_tower" in n)

    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(record["loss_eval_batch2"], abs=1e-4)
    gradients = dict(model.named_parameters())
    for name, norm in record["grad_norms_eval_batch2"].items():
        assert gradients[name].grad.double().norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    corners = [name for name in arrays if name.startswith("grad.") and name.endswith("[:6,:8]")]
    assert len(corners) >= 10
    for stored in corners:
        gradient = gradients[stored.removeprefix("grad.").removesuffix("[:6,:8]")].grad
        corner = gradient.reshape(gradient.shape[0], -1)[:6, :8].numpy()
        np.testing.assert_allclose(corner, arrays[stored], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_release_style_loss_of_one_sample(index, loaded, record, golden):
    model, processor = loaded
    batch = SupervisedCollator(processor, "release", golden / "media")([record["conversations"][index]])
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(record[f"loss_eval_sample{index}"], abs=1e-4)


def test_release_style_tags_move_to_the_front_as_recorded(record):
    from humanomni.prompts import release_sft_query, release_sft_turn, wrap_tags
    from open_r1.data import _with_sound

    for name, case in record["preprocess_multimodal_cases"].items():
        if name.startswith("twice"):
            continue  # one clip a sample: refused on reading
        turn = wrap_tags(release_sft_turn(_with_sound(case["raw"])), name.endswith("True"))
        assert turn == case["out"], name
        assert release_sft_query(turn) == case["bert"], name


def test_a_leading_answer_is_left_out_and_an_odd_turn_refused(loaded, record):
    turns = [{"from": "gpt", "value": "x"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    ours = SampleEncoder(loaded[1], "release")(Sample.parse({"conversations": turns}))
    assert ours.input_ids == record["first_turn_from_gpt"]["input_ids"]
    assert ours.labels == record["first_turn_from_gpt"]["labels"]
    with pytest.raises(DataError, match="1 turns"):
        Sample.parse({"conversations": turns[1:2]})


def test_inference_style_asks_exactly_as_inference_does(processor):
    for tags, modal in (("<video>\n<audio>\n", "video_audio"), ("<audio>\n", "audio"), ("", "text")):
        media = {"video_audio": {"video": "c.mp4"}, "audio": {"audio": "c.wav"}, "text": {"image": None}}[modal]
        ours = SampleEncoder(processor)(Sample.parse(entry(f"{tags}What is felt?", "calm", **media)))
        prompt, query = processor.build_prompt("What is felt?", modal)
        asked = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        counts = processor.placeholder_counts()
        expanded = [token for i in asked for token in [i] * counts.get(i, 1)]
        assert ours.input_ids[: len(expanded)] == expanded
        assert ours.query == query
        answered = [label for label in ours.labels if label != IGNORED]
        assert processor.tokenizer.decode(answered) == "calm<|im_end|>\n"
        assert set(ours.labels[: len(expanded)]) == {IGNORED}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ([], "is a list"),
        ({"video": "a.mp4"}, "field conversations"),
        (entry(video=3), "field video: is 3"),
        (entry("What?", video="a.mp4"), "no media tag for the video"),
        (entry("<video>\n<video>\nWhat?"), "<video> more than once"),
        (entry("<audio>\nWhat?", image="a.png"), "field audio: is missing"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\].from"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\].value"),
        (entry(start="1s", video="a.mp4"), "field start"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "alternate"),
    ],
)
def test_an_invalid_sample_is_named_by_file_index_and_field(fields, told, tmp_path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps([entry(), fields]))
    with pytest.raises(DataError, match=told) as error:
        read_samples(file)
    assert f"{file}, sample 1" in str(error.value)
    assert "\n" not in str(error.value)


def test_lists_and_mixtures(tmp_path):
    numbered = [entry(answer=str(number)) for number in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(numbered))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in numbered) + "\n")
    assert [s.answer for s in read_samples(tmp_path / "a.json")] == [str(n) for n in range(10)]
    assert read_samples(tmp_path / "b.jsonl")[3].origin.endswith("b.jsonl, sample 3")

    def mixture(*strategies):
        rows = "\n".join(f"  - {{json_path: a.json, sampling_strategy: '{name}'}}" for name in strategies)
        (tmp_path / "mix.yaml").write_text(f"datasets:\n{rows}\n")
        return [int(sample.answer) for sample in read_samples(tmp_path / "mix.yaml", seed=3)]

    assert mixture("all", "first:2", "end:3") == [*range(10), 0, 1, 7, 8, 9]
    assert mixture("first:25%") == [0, 1, 2]
    assert mixture("end:20%") == [8, 9]
    drawn = mixture("random:4")
    assert drawn == mixture("random:4") and len(set(drawn)) == 4
    assert len(mixture("random:50%")) == 5
    for wrong in ("some:3", "first:x", "first"):
        with pytest.raises(DataError, match="sampling_strategy"):
            mixture(wrong)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.json", "{", "not JSON"),
        ("x.json", "{}", "not a list"),
        ("x.yaml", "a: [", "not YAML"),
        ("x.yaml", "a: 1", "mixture"),
        ("x.json", "[]", "no sample"),
    ],
)
def test_a_file_that_is_no_list_is_named(name, text, told, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        read_samples(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        read_samples(tmp_path / "absent.json")


def test_long_samples_are_cut_in_their_text_or_dropped_and_counted(processor):
    encode = SampleEncoder(processor)
    long = Sample.parse(entry(answer="word " * 200, video=str(EXAMPLE)), "long")
    short = Sample.parse(entry(video=str(EXAMPLE)), "short")
    media_end, whole = encode(long).media_end, len(encode(long).input_ids)
    room = whole - 50
    cut = prepare_samples([short, long], encode, max_length=room)
    assert cut.lengths[1] == room and len(cut.truncated) == 1 and "long" in str(cut)
    batch = SupervisedCollator(processor, max_length=room)(cut.samples)
    assert batch["input_ids"].shape[1] == room
    media = torch.tensor(list(processor.token_ids.values()))
    assert torch.isin(batch["input_ids"][1], media).sum() == torch.isin(batch["input_ids"][0], media).sum()

    dropped = prepare_samples([short, long], encode, max_length=room, too_long="drop")
    assert [sample.origin for sample in dropped.samples] == ["short"] and len(dropped.dropped) == 1
    with pytest.raises(DataError, match="none of 1 samples is left"):
        prepare_samples([long], encode, max_length=media_end - 1)


def test_a_missing_clip_is_named_or_left_out(processor):
    there, gone = Sample.parse(entry(video=str(EXAMPLE))), Sample.parse(entry(video="gone.mp4"), "list, sample 7")
    with pytest.raises(DataError, match=r"list, sample 7.*gone\.mp4"):
        prepare_samples([there, gone], SampleEncoder(processor))
    report = prepare_samples([there, gone], SampleEncoder(processor), on_bad_sample="skip")
    assert report.missing == ["gone.mp4"] and len(report.samples) == 1
    assert "1 clips missing" in str(report) and "happy 1" in str(report)


def test_a_clip_that_does_not_read_is_named_or_blanked_and_listed(processor, tiny_checkpoint, tmp_path):
    corrupt = tmp_path / "corrupt.mp4"
    corrupt.write_bytes(EXAMPLE.read_bytes()[:2000])
    rows = [entry(video=str(EXAMPLE)), entry(video=str(corrupt))]
    with pytest.raises(humanomni.MediaError, match=r"corrupt\.mp4"):
        SupervisedCollator(processor)(rows)
    noted = BadSamples(tmp_path)
    batch = SupervisedCollator(processor, on_bad_sample="skip", bad_samples=noted)(rows)
    assert (batch["labels"][1] == IGNORED).all() and (batch["labels"][0] != IGNORED).any()
    assert [Path(row["clip"]).name for row in noted.read()] == ["corrupt.mp4"]
    model, _ = humanomni.load_pretrained(tiny_checkpoint, device="cpu")
    with torch.no_grad():
        alone = SupervisedCollator(processor)(rows[:1])
        assert model(**batch).loss.item() == pytest.approx(model(**alone).loss.item(), abs=1e-5)


def test_text_image_audio_and_several_turns_share_a_batch(processor, tiny_checkpoint, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    several = entry(video=str(EXAMPLE))
    several["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    rows = [
        several,
        entry("Hello", "hi", image=None),
        entry("<image>\nWhat?", "red", image=str(tmp_path / "a.png")),
        entry("<audio>\nWhat?", "loud", audio=str(EXAMPLE)),
    ]
    collator = SupervisedCollator(processor)
    batch = collator(rows)
    model, _ = humanomni.load_pretrained(tiny_checkpoint, device="cpu")
    with torch.no_grad():
        together = model(**batch).logits
        for row, fields in enumerate(rows):
            alone = collator([fields])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(together[row, :length], model(**alone).logits[0], rtol=0, atol=2e-4)
    supervised = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORED])
    assert supervised == "happy<|im_end|>\nyes<|im_end|>\n"


def test_every_parameter_belongs_to_one_part(tiny_checkpoint):
    model, _ = humanomni.load_pretrained(tiny_checkpoint, device="cpu")
    for name, _ in model.named_parameters():
        assert sum(name.startswith(prefixes) for prefixes in PARTS.values()) == 1, name
