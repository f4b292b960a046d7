"""`generate` and `generate_many`: one call or a stream of clips, the same texts either way."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

import humanomni
from humanomni.generation import Request, StdoutStreamer, generate, generate_many, split_answer

CLIP = str(Path(__file__).resolve().parent.parent / "assets" / "example.mp4")


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return humanomni.load_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def golden_model(golden):
    return humanomni.load_pretrained(golden / "humanomni-tiny", bert_model=golden / "bert-tiny", device="cpu")


@pytest.fixture(scope="module")
def runs(golden):
    record = json.loads((golden / "golden" / "forward.json").read_text())
    return [run for name, run in record.items() if name[0] != "_"]


def until_close_call(run: dict) -> int:
    """How many steps of a recorded greedy text are certain."""
    close_calls = (step for step, margin in enumerate(run["top1_top2_margin"]) if margin < 5e-3)
    return next(close_calls, len(run["generated_ids"]))


def test_every_recorded_text_alone_and_in_one_mixed_batch(golden_model, golden, runs):
    model, processor = golden_model
    requests = [
        Request(None if run["file"] is None else str(golden / run["file"]), run["modal"], run["instruct"])
        for run in runs
    ]
    assert {request.modal for request in requests} == {"video_audio", "video", "audio", "image", "text"}
    alone = [
        generate(model, processor, request.instruct, request.path, request.modal, max_new_tokens=24)
        for request in requests
    ]
    for text, run in zip(alone, runs, strict=True):
        certain = until_close_call(run)
        if certain == len(run["generated_ids"]):
            assert text == run["text"].strip()
        else:
            assert text.startswith(processor.decode(run["generated_ids"][:certain]).strip("\ufffd").strip())
    together = generate(
        model,
        processor,
        [request.instruct for request in requests],
        [request.path for request in requests],
        [request.modal for request in requests],
        max_new_tokens=24,
    )
    assert together == alone
    for batch_size in (3, len(requests)):
        results = list(generate_many(model, processor, requests, batch_size=batch_size, max_new_tokens=24))
        assert [result.request for result in results] == requests
        assert [result.text for result in results] == alone


def test_a_single_clip_gives_a_string_and_lists_give_a_list(loaded):
    model, processor = loaded
    text = generate(model, processor, "What is it?", CLIP, max_new_tokens=4)
    assert isinstance(text, str) and text
    assert generate(model, processor, "What is it?", [CLIP], max_new_tokens=4) == [text]
    assert generate(model, processor, ["What is it?"] * 2, CLIP, max_new_tokens=4) == [text, text]
    frames = list(torch.zeros(3, 32, 32, 3, dtype=torch.uint8).numpy())
    assert isinstance(generate(model, processor, "What is it?", frames, "video", max_new_tokens=4), str)
    several = generate(
        model, processor, "Hm?", modal="text", max_new_tokens=8, do_sample=True, num_return_sequences=3, seed=1
    )
    assert len(set(several)) == 3


def test_a_part_of_a_clip_is_what_is_seen(loaded):
    model, processor = loaded
    whole, early, late = (
        generate(model, processor, video=CLIP, start=start, end=end, max_new_tokens=24)
        for start, end in ((None, None), (0.0, 1.0), (2.0, 3.5))
    )
    assert len({whole, early, late}) == 3
    parts = [Request(CLIP, start=0.0, end=1.0), Request(CLIP, start=2.0, end=3.5)]
    assert [result.text for result in generate_many(model, processor, parts, max_new_tokens=24)] == [early, late]


def test_sampling_is_repeatable_with_a_seed_and_otherwise_not(loaded):
    model, processor = loaded

    def sample(seed):
        return generate(model, processor, video=CLIP, max_new_tokens=24, do_sample=True, temperature=1.5, seed=seed)

    assert sample(3) == sample(3)
    assert len({sample(3), sample(4), sample(None), sample(None)}) == 4
    requests = [Request(CLIP), Request(CLIP, "audio"), Request(CLIP, "video")]
    texts = [
        [result.text for result in generate_many(
            model, processor, requests, batch_size=2, max_new_tokens=12, do_sample=True, seed=seed
        )]
        for seed in (5, 5, 6)
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


def test_no_warning_about_sampling_flags(loaded, monkeypatch, caplog):
    model, processor = loaded
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name, value in (("temperature", 0.7), ("top_p", 0.8), ("top_k", 20), ("do_sample", True)):
        monkeypatch.setattr(model.generation_config, name, value)  # as Qwen2's generation_config.json has them
    with caplog.at_level(logging.WARNING):
        greedy = [
            generate(model, processor, "Hm?", modal="text", max_new_tokens=8, temperature=t, top_p=p)
            for t, p in ((None, None), (0.5, 0.5))
        ]
    assert caplog.records == []
    assert greedy[0] == greedy[1]


def test_a_length_beyond_the_context_is_told_with_the_numbers(loaded, monkeypatch):
    model, processor = loaded
    length = processor("Hm?", None, "text")["input_ids"].shape[1]
    monkeypatch.setattr(model.config, "max_position_embeddings", length + 5)
    assert generate(model, processor, "Hm?", modal="text", max_new_tokens=5) is not None
    with pytest.raises(
        humanomni.PromptError, match=rf"{length} tokens .*max_new_tokens=6 .* of {length + 5}; .* to 5"
    ):
        generate(model, processor, "Hm?", modal="text", max_new_tokens=6)
    with pytest.raises(humanomni.PromptError, match=rf"context .* holds {length + 5}; shorten"):
        generate(model, processor, "Hm?", CLIP, max_new_tokens=1)
    requests = [
        Request(modal="text", instruct="Hm?"),
        Request(CLIP, instruct="Hm?"),
        Request(modal="text", instruct="H"),
    ]
    first, second, third = generate_many(model, processor, requests, max_new_tokens=5)
    assert first.text is not None and third.text is not None
    assert "max_position_embeddings" in second.error and second.text is None


def test_failed_clips_are_told_in_place_and_leave_batches_full(loaded, tmp_path):
    model, processor = loaded
    (tmp_path / "empty.mp4").touch()
    bad = [Request(str(tmp_path / "empty.mp4")), Request(CLIP, "smell"), Request(CLIP, instruct="<video>?")]
    good = [Request(CLIP, modal) for modal in ("video_audio", "video", "audio")] + [Request(modal="text")]
    requests = [bad[0], good[0], bad[1], good[1], bad[2], good[2], good[3], bad[0]]
    sizes = []
    hook = model.model.bert_model.register_forward_hook(lambda _, __, output: sizes.append(len(output[0])))
    results = list(generate_many(model, processor, requests, batch_size=2, max_new_tokens=4))
    hook.remove()
    assert [result.request for result in results] == requests
    assert [result.request for result in results if result.error] == [bad[0], bad[1], bad[2], bad[0]]
    assert all((result.text is None) == (result.error is not None) for result in results)
    assert all(result.seconds > 0 for result in results if result.error is None)
    assert sizes == [2, 2]  # BERT reads the questions of a batch at once
    for result in results:
        if result.text is not None:
            request = result.request
            assert result.text == generate(
                model, processor, request.instruct, request.path, request.modal, max_new_tokens=4
            )


def test_clips_are_read_ahead_but_no_further_than_two_batches(loaded):
    model, processor = loaded
    taken = []
    requests = (taken.append(i) or Request(modal="text", instruct=f"{i}?") for i in itertools.count())
    results = generate_many(model, processor, requests, batch_size=2, max_new_tokens=1)
    assert taken == []
    assert next(results).request.instruct == "0?"
    assert 4 <= len(taken) <= 6
    results.close()


def test_streamed_text_is_the_returned_one(loaded, capsys):
    model, processor = loaded
    for modal, clip in (("video_audio", CLIP), ("text", None)):
        for question in ("Who?", "Why so sad?"):
            streamer = StdoutStreamer(processor)
            text = generate(model, processor, question, clip, modal, max_new_tokens=80, streamer=streamer)
            assert len(text) > 80
            assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("written", ["  \n a b\n\nc  \n", "\n\n", "", " x", "你 好\n\n "])
def test_streamer_strips_as_generate_does(written, loaded, capsys):
    _, processor = loaded
    streamer = StdoutStreamer(processor)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in processor.tokenizer(written)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == written.strip() + "\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>He frowns.\nAngry.</think>\n<answer>angry</answer>", ("He frowns.\nAngry.", "angry")),
        ("<answer> sad </answer><answer>happy</answer>", (None, "sad")),
        ("<think>a</think><think>b</think>", ("a", None)),
        ("<think>cut", (None, None)),
        ("<answer></answer>", (None, "")),
        ("angry", (None, None)),
    ],
)
def test_split_answer(text, parts):
    assert split_answer(text) == parts
