"""The exact text the model is asked: question, media tags, chat template, and what BERT reads, in three styles.

A style is one of `PROMPT_STYLES`: `inference` as the released inference asks, `release_sft` and `release_grpo` as the
released training asked (strings recorded from it).
"""

from humanomni.errors import PromptError

EMOTION_QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is the most "
    "obvious to you?"
)
THINK_SENTENCE = "Output the thinking process in <think> </think> and final emotion in <answer> </answer> tags."
DEFAULT_INSTRUCT = f"{EMOTION_QUESTION}  {THINK_SENTENCE}"

PROMPT_STYLES = ("inference", "release_sft", "release_grpo")
MODAL_TAGS = {
    "video_audio": ("<video>", "<audio>"),
    "video": ("<video>",),
    "audio": ("<audio>",),
    "image": ("<image>",),
    "text": (),
}
MEDIA_TAGS = ("<image>", "<video>", "<audio>")
START_END = {
    "<video>": ("<vi_start>", "<vi_end>"),
    "<audio>": ("<au_start>", "<au_end>"),
    "<image>": ("<im_start>", "<im_end>"),
}

# Qwen2-VL's special tokens, which the released GRPO prompt uses, in the order of their ids in Qwen2.5's tokenizer.
QWEN2_VL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end",
        "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
    )
)  # fmt: skip
_QWEN2_VL_MEDIA = {
    "<video>": "<|vision_start|><|video_pad|><|vision_end|>",
    "<image>": "<|vision_start|><|image_pad|><|vision_end|>",
}
_QWEN2_VL_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def check_question(instruct: str, modal: str) -> None:
    """Raises PromptError where `modal` is unknown or the question is empty or holds a media tag."""
    if modal not in MODAL_TAGS:
        raise PromptError(f"modal {modal!r} is unknown; pass one of {', '.join(MODAL_TAGS)}")
    if not isinstance(instruct, str) or not instruct.strip():
        raise PromptError(f"the instruction is {instruct!r}; pass the question to ask, e.g. with --instruct")
    for tag in MEDIA_TAGS:
        if tag in instruct:
            raise PromptError(
                f"the instruction {instruct!r} holds the tag {tag}, which stands for media; remove it, modal "
                f"{modal!r} puts the tags in their place"
            )


def wrap_tags(text: str, use_start_end: bool) -> str:
    """`text` with every media tag between its plain-text start and end marks, where the checkpoint uses them."""
    if use_start_end:
        for tag, (start, end) in START_END.items():
            text = text.replace(tag, f"{start}{tag}{end}")
    return text


def release_sft_turn(text: str) -> str:
    """A human turn as the released SFT rewrote it: tags to the front one by one, `<audio>` before `<video>`.

    Line breaks between the tags stay where they were, which is why three of them come before the question of
    `<video>\\n<audio>\\nquestion`, and two where the tags stood in the other order.
    """
    for tag in ("<image>", "<audio>", "<video>"):
        if tag in text:
            text = f"{tag}\n{text.replace(tag, '').strip()}"
    return text.strip()


def release_sft_query(turn: str) -> str:
    """What the released SFT gave BERT for a rewritten and wrapped turn: no `<video>`, `<image>` or line break."""
    return turn.replace("<video>", "").replace("<image>", "").replace("\n", "")


def build_prompt(
    instruct: str, modal: str, prompt_style: str, use_start_end: bool, apply_chat_template
) -> tuple[str, str]:
    """The prompt up to and including the assistant's header, and the text for BERT.

    Args:
        instruct: the whole question, without media tags.
        modal: a key of `MODAL_TAGS`.
        use_start_end: the checkpoint's `mm_use_x_start_end`.
        apply_chat_template: user text -> prompt, by the checkpoint's own template.
    """
    check_question(instruct, modal)
    if prompt_style not in PROMPT_STYLES:
        raise PromptError(f"prompt_style {prompt_style!r} is unknown; pass one of {', '.join(PROMPT_STYLES)}")
    tags = MODAL_TAGS[modal]
    turn = "".join(f"{tag}\n" for tag in tags) + instruct
    if prompt_style == "release_sft":
        turn = wrap_tags(release_sft_turn(turn), use_start_end)
        return apply_chat_template(turn), release_sft_query(turn)
    if prompt_style == "release_grpo":
        front = "".join(_QWEN2_VL_MEDIA.get(tag, "") for tag in tags)
        return _QWEN2_VL_PROMPT.format(front + wrap_tags(turn, use_start_end)), instruct
    return apply_chat_template(inference_turn(instruct, modal, use_start_end)), instruct


def inference_turn(instruct: str, modal: str, use_start_end: bool) -> str:
    """The user's turn as the released inference asks: each tag on a line of its own, then the question.

    Without a tag, the line break that would follow one stays.
    """
    tags = "".join(f"{tag}\n" for tag in MODAL_TAGS[modal]) or "\n"
    return wrap_tags(tags, use_start_end) + instruct
