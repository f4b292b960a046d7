"""What turns tower outputs into tokens of the language model: three video branches, BERT gate, audio projector.

Shapes: N clips, T frames, P patches of a frame (g x g), D tower width, H width of the language model, V video tokens.
Key names are those of the release.
"""

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn
from torch.nn import functional as F

from humanomni.configuration import GATE_HIDDEN_SIZE, PROJECTOR_TYPES, HumanOmniConfig


def mlp(size_in: int, size_hidden: int, size_out: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(size_in, size_hidden), nn.GELU(), nn.Linear(size_hidden, size_out))


class VideoProjector(nn.Module):
    """Three readings of the same patch features: `video` and `body` mix time and space, `face` sees one patch."""

    def __init__(self, config: HumanOmniConfig):
        super().__init__()
        width, hidden = config.mm_hidden_size, config.hidden_size
        depth, padding = PROJECTOR_TYPES[config.mm_projector_type]

        def stage(size_in: int) -> RegStage:
            return RegStage(depth, size_in, hidden, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)

        def sampler() -> nn.Sequential:
            conv = nn.Conv3d(hidden, hidden, kernel_size=2, stride=(1, 2, 2), padding=padding, bias=True)
            return nn.Sequential(conv, nn.SiLU())

        self.s1_video, self.s1_body = stage(width), stage(width)
        self.sampler_video, self.sampler_body = sampler(), sampler()
        self.s2_video, self.s2_body = stage(hidden), stage(hidden)
        self.readout_video, self.readout_body = mlp(hidden, hidden, hidden), mlp(hidden, hidden, hidden)
        self.mlp_2xgelu_face = mlp(width, hidden, hidden)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patch features (N, T, P, D) -> video, body and face tokens, each (N, V, H) with V = T * ceil(g/2)**2."""
        video = _mix(features, self.s1_video, self.sampler_video, self.s2_video, self.readout_video)
        body = _mix(features, self.s1_body, self.sampler_body, self.s2_body, self.readout_body)
        face = halve_grid(self.mlp_2xgelu_face(features)).flatten(1, 2)
        return video, body, face


def _mix(features: torch.Tensor, stage1, sampler, stage2, readout) -> torch.Tensor:
    """One of the two spatio-temporal branches: (N, T, P, D) -> (N, V, H)."""
    clips, frames, patches, _ = features.shape
    grid = int(patches**0.5)
    maps = features.flatten(0, 1).unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (N*T, D, g, g)
    maps = stage1(maps).unflatten(0, (clips, frames)).transpose(1, 2)  # (N, H, T, g, g)
    maps = sampler(maps)[:, :, :frames]  # the padded convolution makes T + 1 steps: drop the last
    maps = stage2(maps.transpose(1, 2).flatten(0, 1))  # (N*T, H, g', g')
    return readout(maps.unflatten(0, (clips, frames)).permute(0, 1, 3, 4, 2).flatten(1, 3))  # (N, V, H)


def halve_grid(tokens: torch.Tensor) -> torch.Tensor:
    """Each frame's map at half its side, rounded up, bilinear: (N, T, P, H) -> (N, T, P', H)."""
    clips, frames, patches, _ = tokens.shape
    grid = int(patches**0.5)
    maps = tokens.flatten(0, 1).unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (N*T, H, g, g)
    maps = F.interpolate(maps, size=((grid + 1) // 2,) * 2, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2).unflatten(0, (clips, frames))


def query_gate(config: HumanOmniConfig) -> nn.Sequential:
    """BERT's [CLS] of the question (N, D) -> logits (N, 3) of the branches, in the order video, body, face."""
    return mlp(config.bert_config.hidden_size, GATE_HIDDEN_SIZE, 3)


def audio_projector(config: HumanOmniConfig) -> nn.Sequential:
    """Pooled audio features (N, A, D) -> audio tokens (N, A, H)."""
    return mlp(config.audio_hidden_size, config.hidden_size, config.hidden_size)


def fuse(branches: tuple[torch.Tensor, torch.Tensor, torch.Tensor], gate_logits: torch.Tensor) -> torch.Tensor:
    """The branches (each (N, V, H)) weighed by softmax of the gate's logits (N, 3) -> video tokens (N, V, H)."""
    weights = gate_logits.softmax(dim=-1)  # (N, 3)
    return torch.einsum("bnvh,nb->nvh", torch.stack(branches), weights)
