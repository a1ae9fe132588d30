"""Swin Transformer, and Swin with enhanced local self-attention (ELSA), or another local attention, in all stages but
the last.

Sources: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030;
Zhou et al., "ELSA: Enhanced Local Self-Attention for Vision Transformer", arXiv 2112.12786, section 4.
"""
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import ATTENTIONS, local_attention
from models.elsa import Pointwise
from models.precision import LayerNorm

CONFIGS = {
    "swin_t": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), group_width=4),
    "swin_s": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_b": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class StochasticDepth(nn.Module):
    """While training, drops the residual branch of an image with probability `rate`, divides the kept by 1 - rate.

    Source: Huang et al., arXiv 1603.09382; timm calls it DropPath.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or not self.rate:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        # Not x * (keep / (1 - rate)): in 16 bits that quotient is off by up to 0.33%, for all of x alike.
        return x / (1 - self.rate) * keep


class Block(nn.Module):
    """Any attention over pixels and an MLP, each with a residual connection: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim, attn, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """(B, in_chans, H, W) -> (B, ceil(H / patch_size), ceil(W / patch_size), dim), zero-padded right and bottom."""

    def __init__(self, patch_size, dim, in_chans=3):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = LayerNorm(dim)

    def forward(self, images):
        p = self.proj.kernel_size[0]
        H, W = images.shape[2:]
        images = F.pad(images, (0, (W + p - 1) // p * p - W, 0, (H + p - 1) // p * p - H))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2C), zero-padded right and bottom."""

    def __init__(self, dim):
        super().__init__()
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        B, H, W, C = x.shape
        Ho, Wo = (H + 1) // 2, (W + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * Wo - W, 0, 2 * Ho - H)).reshape(B, Ho, 2, Wo, 2, C)
        # Published order of (row, column): (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, Ho, Wo, 4C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks and the down-sampling after them, None in the last stage. Swin.forward_features runs them."""

    def __init__(self, blocks, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Swin(nn.Module):
    """Swin Transformer with window attention (attn="window"), or another local attention in all stages but the last.

    Args:
        attn: one of models.attention.ATTENTIONS: "window", "elsa", ...
        num_classes: width of the logits; 0: no classifier, the model gives pooled features.
        patch_size: pixels along the side of a patch; 4 for photographs, 2 suits 32x32 images.
        in_chans: channels of the images.
        embed_dim, depths, num_heads: channels of stage 1 (doubled at each stage), blocks and heads of each stage.
        window_size: side of an attention window, in patches.
        mlp_ratio: hidden width of the MLPs, in multiples of the stage's channels.
        drop_path_rate: stochastic depth, from 0 at the first block linearly to this rate at the last.
        kernel_size: side of the neighbourhoods of attn="elsa" and its like.
        group_width, lam, gamma: of the ELSA layers, see models.elsa.ELSA.
        checkpointing: recompute the blocks in the backward pass instead of keeping their activations.
        always_shift: shift odd blocks along an axis that fits into one window, too, as the published detectors and
            segmenters do (Swin's and ELSA's alike); the published classifiers do not.

    Shapes: images (B, in_chans, H, W), any H and W -> logits (B, num_classes). num_features: channels before the
    classifier.
    Raises ValueError for arguments that do not fit together and for images of another shape.
    Source of all defaults: arXiv 2112.12786, section 4, and its published configuration (k=7, lam=0, gamma=1, scale 1,
    biases on; windows in the last stage).
    """
    task = "classification"
    attentions = ATTENTIONS

    def __init__(self, attn="window", num_classes=1000, patch_size=4, in_chans=3, embed_dim=96, depths=(2, 2, 6, 2),
                 num_heads=(3, 6, 12, 24), window_size=7, mlp_ratio=4.0, drop_path_rate=0.0, kernel_size=7,
                 group_width=8, lam=0, gamma=1, checkpointing=False, always_shift=False):
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"num_heads = {num_heads} and depths = {depths} differ in length; "
                             "give one entry per stage in each")
        check_drop_path_rate(drop_path_rate)
        self.checkpointing = checkpointing
        self.dims = [embed_dim * 2 ** i for i in range(len(depths))]
        drop_path_rates = (drop_path_rate * n / max(1, sum(depths) - 1) for n in range(sum(depths)))
        last = len(depths) - 1

        def block(stage, index):
            dim = self.dims[stage]
            shift = window_size // 2 if index % 2 else 0
            attention = local_attention(
                attn if stage < last else "window", dim, num_heads[stage], kernel_size=kernel_size,
                window=dict(window_size=window_size, shift=shift, always_shift=always_shift),
                elsa=dict(qkv_bias=True, qk_scale=1, group_width=group_width, lam=lam, gamma=gamma))
            return Block(dim, attention, mlp_ratio, next(drop_path_rates))

        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.layers = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(self.dims, depths)):
            blocks = [block(stage, index) for index in range(depth)]
            self.layers.append(Stage(blocks, PatchMerging(dim) if stage < last else None))
        self.num_features = self.dims[-1]
        self.norm = LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear_layers(self)

    def reset_classifier(self, num_classes):
        """A fresh classifier of so many classes; 0: none, the model gives pooled features."""
        self.head = fresh_linear(self.norm.weight, self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images):
        """Of every stage what it gives, before down-sampling and not normalised: a backbone for detectors elsewhere.

        Images (B, in_chans, H, W) of any size -> four (B, C_i, H_i, W_i), views with channels last in memory. C_i are
        self.dims: embed_dim times 1, 2, 4 and 8; strides patch_size times 1, 2, 4 and 8, by default 4, 8, 16 and 32;
        H_i is H over the stride, rounded up at every down-sampling. models.swin.Backbone puts a layer norm of its own
        behind each, as the published detectors and segmenters have it.
        """
        in_chans = self.patch_embed.proj.in_channels
        if images.ndim != 4 or images.shape[1] != in_chans:
            raise ValueError(f"images have shape {tuple(images.shape)}; Swin expects (B, {in_chans}, H, W)")
        x = self.patch_embed(images)  # (B, H, W, C)
        outputs = []
        for stage in self.layers:
            for block in stage.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            outputs.append(x.permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(outputs)

    def forward(self, images):
        x = self.forward_features(images)[-1].permute(0, 2, 3, 1)  # (B, H, W, C)
        return self.head(self.norm(x).mean((1, 2)))


class Backbone(Swin):
    """Feature maps of all stages for detectors and segmenters, each through a layer norm of its own.

    Arguments as Swin, without a classifier. frozen_stages: the patch embedding and so many stages after it are not
    trained; 0: all are. Shapes: images (B, in_chans, H, W) -> four (B, C_i, H_i, W_i), strides 4, 8, 16, 32.
    """

    def __init__(self, frozen_stages=0, **options):
        super().__init__(**{"always_shift": True, **options}, num_classes=0)
        del self.norm, self.head
        self.frozen = [self.patch_embed, *self.layers[:frozen_stages]] if frozen_stages else []
        for module in self.frozen:
            module.requires_grad_(False)
        for i, dim in enumerate(self.dims):
            self.add_module(f"norm{i}", LayerNorm(dim))

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen:  # their stochastic depth, too
            module.eval()
        return self

    def forward(self, images):
        maps = []
        for i, x in enumerate(self.forward_features(images)):
            norm = getattr(self, f"norm{i}")
            maps.append(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return tuple(maps)


def check_drop_path_rate(rate):
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate = {rate} is not a rate of stochastic depth; give a number in [0, 1)")


def fresh_linear(like, dim_in, dim_out):
    """A linear layer as init_linear_layers leaves one, on the device and of the dtype of the tensor `like`."""
    layer = nn.Linear(dim_in, dim_out, device=like.device, dtype=like.dtype)
    init_linear_layers(layer)
    return layer


def init_linear_layers(model):
    """Truncated normal weights, zero biases, as published. Convolutions, 1x1 or not, keep their own initialisation."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Pointwise):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
