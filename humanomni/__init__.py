"""HumanOmni, the video-and-audio language model of R1-Omni; importing it registers the model with transformers."""

from humanomni.configuration import HumanOmniConfig
from humanomni.errors import CheckpointError, HumanOmniError, MediaError, PromptError
from humanomni.generation import Request, Result, generate, generate_many
from humanomni.loading import load_pretrained
from humanomni.modeling import HumanOmniModel, HumanOmniQwen2ForCausalLM
from humanomni.processing import HumanOmniProcessor

__all__ = [
    "CheckpointError",
    "HumanOmniConfig",
    "HumanOmniError",
    "HumanOmniModel",
    "HumanOmniProcessor",
    "HumanOmniQwen2ForCausalLM",
    "MediaError",
    "PromptError",
    "Request",
    "Result",
    "generate",
    "generate_many",
    "load_pretrained",
]
