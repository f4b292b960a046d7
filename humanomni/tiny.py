"""Builds small untrained checkpoints in the release's format, towers included, for tests and benchmarks.

    python -m humanomni.tiny OUTPUT [--seed 0] [--geometry tiny|medium]

Every weight follows from the seed and the weight's name alone, so the same numbers come back on every machine.
"""

import argparse
import dataclasses
import json
import math
import string
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertTokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    logging,
)

from humanomni.configuration import HumanOmniConfig
from humanomni.errors import CheckpointError, exit_status
from humanomni.modeling import HumanOmniQwen2ForCausalLM
from humanomni.prompts import EMOTION_QUESTION, START_END, THINK_SENTENCE

LABEL_FILE = "untrained.json"  # in every folder built here: what it is, its seed and its geometry


@dataclass(frozen=True)
class Geometry:
    """The sizes of a checkpoint; the defaults are those of `TINY`."""

    vision_hidden: int = 32
    vision_ffn: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    image_size: int = 48
    patch_size: int = 8
    audio_hidden: int = 32
    audio_ffn: int = 64
    audio_layers: int = 2
    audio_heads: int = 2
    mel_bins: int = 128
    audio_seconds: int = 30  # of Whisper's window
    bert_hidden: int = 32
    bert_ffn: int = 64
    bert_layers: int = 2
    bert_heads: int = 4
    bert_vocab_size: int = 256
    hidden: int = 64
    ffn: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab_size: int = 512
    tied: bool = True
    num_frames: int = 8
    projector_type: str = "all_in_one_small"
    start_end: bool = True


TINY = Geometry()
MEDIUM = Geometry(
    vision_hidden=768,
    vision_ffn=3072,
    vision_layers=12,
    vision_heads=12,
    image_size=224,
    patch_size=16,
    audio_hidden=768,
    audio_ffn=3072,
    audio_layers=12,
    audio_heads=12,
    bert_hidden=768,
    bert_ffn=3072,
    bert_layers=12,
    bert_heads=12,
    bert_vocab_size=30522,
    hidden=896,
    ffn=4864,
    layers=6,
    heads=14,
    vocab_size=32000,
)
GEOMETRIES = {"tiny": TINY, "medium": MEDIUM}

# What the tokenizers are trained on: the prompts' own sentences, and the kind of text that answers them.
CORPUS = [
    EMOTION_QUESTION,
    THINK_SENTENCE,
    *("".join(marks) for marks in START_END.values()),
    "system\nYou are a helpful assistant.\nuser\n\nassistant\n",
    "<think>The man in the video frowns and his voice is low and tense, which shows that he is worried.</think>\n",
    "<think>She smiles, her eyes are bright and her tone is warm, so the emotion is clear.</think>\n<answer>happy",
    "<answer>angry</answer> <answer>sad</answer> <answer>neutral</answer> <answer>surprise</answer>",
    "<answer>fear</answer> <answer>disgust</answer> <answer>contempt</answer> <answer>anxious</answer>",
]
TEXT_VOCABULARY = 480  # byte-level pieces, before the special tokens
TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_checkpoint(folder: str | Path, seed: int = 0, geometry: Geometry = TINY) -> Path:
    """Writes a checkpoint that `humanomni.load_pretrained(folder)` loads, in bfloat16; returns its folder.

    The folder appears whole or not at all, and replaces an earlier build.

    Raises:
        CheckpointError: the folder holds something else.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (folder / LABEL_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} holds something that was not built here; name a new folder or remove it")
    with whole_folder(folder) as draft:
        _write(draft, seed, geometry)
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft to write into, which takes the place of `folder` when the block ends well; else nothing stays of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.unfinished-", dir=folder.parent) as workshop:
        draft = Path(workshop) / "draft"
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rename(Path(workshop) / "replaced")
        draft.rename(folder)


def _write(folder: Path, seed: int, geometry: Geometry) -> None:
    config = write_small_files(folder, geometry, CORPUS, TEXT_VOCABULARY)
    label = {"note": "untrained: its answers are noise", "seed": seed, "geometry": dataclasses.asdict(geometry)}
    (folder / LABEL_FILE).write_text(json.dumps(label, indent=2) + "\n", "utf-8")
    seeded_model(config, seed).save_pretrained(folder, save_towers=True)


def write_small_files(folder: Path, geometry: Geometry, corpus: Sequence[str], pieces: int) -> HumanOmniConfig:
    """Writes everything of a checkpoint but its weights and config.json; returns the configuration to build it from.

    Args:
        corpus: texts that both tokenizers are trained on.
        pieces: size of the text tokenizer's vocabulary, before the special tokens.
    """
    special_ids = write_text_tokenizer(folder, corpus, pieces)
    config = configuration(geometry, special_ids)
    config.mm_vision_tower = str(folder / "vision_tower")
    config.mm_audio_tower = str(folder / "audio_tower")
    config.mm_bert = str(folder / "bert")
    config.vision_config.save_pretrained(config.mm_vision_tower)
    size = {"height": geometry.image_size, "width": geometry.image_size}
    SiglipImageProcessorPil(size=size).save_pretrained(config.mm_vision_tower)
    config.audio_config.save_pretrained(config.mm_audio_tower)
    mels = WhisperFeatureExtractor(feature_size=geometry.mel_bins, chunk_length=geometry.audio_seconds)
    mels.save_pretrained(config.mm_audio_tower)
    config.bert_config.save_pretrained(config.mm_bert)
    write_bert_tokenizer(Path(config.mm_bert), corpus)
    return config


def configuration(geometry: Geometry, special_ids: dict[str, int]) -> HumanOmniConfig:
    """The configuration of these sizes, towers attached but not placed; `special_ids` are those of `TEXT_SPECIALS`."""
    return HumanOmniConfig(
        architectures=[HumanOmniQwen2ForCausalLM.__name__],
        hidden_size=geometry.hidden,
        intermediate_size=geometry.ffn,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        vocab_size=geometry.vocab_size,
        tie_word_embeddings=geometry.tied,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=special_ids["<|endoftext|>"],
        pad_token_id=special_ids["<|endoftext|>"],
        eos_token_id=special_ids["<|im_end|>"],
        mm_hidden_size=geometry.vision_hidden,
        audio_hidden_size=geometry.audio_hidden,
        mm_projector_type=geometry.projector_type,
        mm_use_x_start_end=geometry.start_end,
        num_frames=geometry.num_frames,
        dtype="bfloat16",
        vision_config=SiglipVisionConfig(
            hidden_size=geometry.vision_hidden,
            intermediate_size=geometry.vision_ffn,
            num_hidden_layers=geometry.vision_layers,
            num_attention_heads=geometry.vision_heads,
            image_size=geometry.image_size,
            patch_size=geometry.patch_size,
        ),
        audio_config=WhisperConfig(
            d_model=geometry.audio_hidden,
            encoder_ffn_dim=geometry.audio_ffn,
            encoder_layers=geometry.audio_layers,
            encoder_attention_heads=geometry.audio_heads,
            num_mel_bins=geometry.mel_bins,
            max_source_positions=50 * geometry.audio_seconds,  # the encoder's second convolution halves 100 frames
        ),
        bert_config=BertConfig(
            hidden_size=geometry.bert_hidden,
            intermediate_size=geometry.bert_ffn,
            num_hidden_layers=geometry.bert_layers,
            num_attention_heads=geometry.bert_heads,
            vocab_size=geometry.bert_vocab_size,
        ),
    )


def seeded_model(config: HumanOmniConfig, seed: int) -> HumanOmniQwen2ForCausalLM:
    """The model with the weights of the rule, in bfloat16; only its `state_dict` is there, not its other buffers."""
    with torch.device("meta"):
        model = HumanOmniQwen2ForCausalLM(config)
    weights = {name: seeded_weight(name, weight.shape, seed) for name, weight in model.named_parameters()}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied lm_head is not among the parameters
    model.tie_weights()
    return model


def seeded_weight(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """The rule: normal numbers drawn by (seed, name), rounded to bfloat16.

    Their standard deviation is 2 / sqrt(inputs of one output) in matrices and kernels, which lets attention choose and
    gives generated text some variety; 1 / sqrt(width) in embedding tables; 0.1 in biases; 0.1 around 1 in norms.
    """
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    numbers = generator.standard_normal(shape, np.float32)
    if len(shape) > 1:
        numbers *= (1 if "embed" in name else 2) / math.sqrt(math.prod(shape[1:]))
    else:
        numbers *= 0.1
        if name.endswith("weight"):
            numbers += 1
    return torch.from_numpy(numbers).to(torch.bfloat16)


def write_text_tokenizer(
    folder: Path, corpus: Sequence[str] = CORPUS, pieces: int = TEXT_VOCABULARY
) -> dict[str, int]:
    """Trains a byte-level BPE on `corpus`, writes it as Qwen2's tokenizer is written, and returns the special ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.add_special_tokens(list(TEXT_SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": CHAT_TEMPLATE,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return {token: tokenizer.token_to_id(token) for token in TEXT_SPECIALS}


def write_bert_tokenizer(folder: Path, corpus: Sequence[str] = CORPUS) -> None:
    """Writes an uncased WordPiece vocabulary of `corpus`, its characters and its words, in the format of BERT's."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = {word for text in corpus for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    characters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation, *"".join(words)})
    pieces = [*BERT_SPECIALS, *characters, *(f"##{character}" for character in characters)]
    pieces += sorted(words - set(characters))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), "utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512).save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m humanomni.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write; an earlier build there is replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument(
        "--geometry",
        choices=GEOMETRIES,
        default="tiny",
        help="tiny: 0.6 million parameters, for tests; medium: 450 million, for benchmarks (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    logging.disable_progress_bar()

    def program() -> None:
        folder = build_checkpoint(options.output, options.seed, GEOMETRIES[options.geometry])
        print(f"wrote {folder}: untrained, its answers are noise", file=sys.stderr)

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
