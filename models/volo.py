"""VOLO, Vision Outlooker, with outlook attention as published or with enhanced local self-attention (ELSA) instead.

Sources: Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", arXiv 2106.13112, and the published
configurations; Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv
2104.10858, for mix-token.
Parameter names and shapes are the published ones, so that the weights load as they are.

attn="elsa" is a RECONSTRUCTION. Of ELSA-VOLO, Zhou et al. (arXiv 2112.12786) published neither code nor weights; known
is that D1 to D5 improve on VOLO and that D5 reaches 87.2 top-1. The choices are ours: every outlook attention becomes
an ELSA layer of the same width and heads, with the defaults of the published ELSA class (kernel 5, lam 1, gamma 1,
groups of 8 channels), scale 1 as in the published ELSA-Swin and no bias in the projection to q, k, v, as VOLO has none;
MLPs, down-sampling, transformers and heads stay VOLO's.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import ATTENTIONS, local_attention
from models.precision import LayerNorm
from models.swin import Block, check_drop_path_rate, fresh_linear, init_linear_layers

CONFIGS = {
    "volo_d1": dict(embed_dim=192, depths=(4, 4, 8, 2), num_heads=(6, 12)),
    "volo_d2": dict(embed_dim=256, depths=(6, 4, 10, 4), num_heads=(8, 16)),
    "volo_d3": dict(embed_dim=256, depths=(8, 8, 16, 4), num_heads=(8, 16)),
    "volo_d4": dict(embed_dim=384, depths=(8, 8, 16, 4), num_heads=(12, 16)),
    "volo_d5": dict(embed_dim=384, depths=(12, 12, 20, 4), num_heads=(12, 16), mlp_ratio=4.0, stem_dim=128),
}


class SelfAttention(nn.Module):
    """Every pixel attends to all pixels: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C))


class ClassAttention(nn.Module):
    """The class token attends to itself and all pixels: (B, 1 + N, C) -> (B, 1, C). Source: CaiT, arXiv 2103.17239."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.q = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        kv = self.kv(x).view(B, N, 2, self.num_heads, C // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D)
        q = self.q(x[:, :1]).view(B, 1, self.num_heads, C // self.num_heads).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, C))


class ClassBlock(Block):
    """(B, 1 + N, C) -> the same with a new class token, the first."""

    def forward(self, x):
        token = x[:, :1] + self.attn(self.norm1(x))
        return torch.cat([token + self.mlp(self.norm2(token)), x[:, 1:]], 1)


class PatchEmbed(nn.Module):
    """(B, in_chans, H, W) -> (B, H / patch_size, W / patch_size, dim): a convolutional stem at half the resolution."""

    def __init__(self, patch_size, stem_dim, dim, in_chans=3):
        super().__init__()
        layers = []
        for dim_in, kernel_size, stride in ((in_chans, 7, 2), (stem_dim, 3, 1), (stem_dim, 3, 1)):
            layers.append(nn.Conv2d(dim_in, stem_dim, kernel_size, stride, kernel_size // 2, bias=False))
            layers += [nn.BatchNorm2d(stem_dim), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(stem_dim, dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images):
        return self.proj(self.conv(images)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2C)."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(dim, 2 * dim, 2, stride=2)

    def forward(self, x):
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class VOLO(nn.Module):
    """Vision Outlooker: a stage of local attention, three of self-attention at half its resolution, class attention.

    Args:
        attn: "outlook", "elsa", the reconstruction described at the head of this file, or another of
            models.attention.ATTENTIONS.
        num_classes: width of the logits; 0: no classifiers, the model gives the class token.
        img_size: side of the images, which fixes the grid of the position embedding. Images of another size get it
            interpolated.
        patch_size: pixels along the side of a patch of stage 1, even; 8 for photographs, 4 suits 32x32 images.
        in_chans: channels of the images.
        embed_dim, depths, num_heads: channels of stage 1 (doubled afterwards), blocks of the four stages, heads of
            stage 1 and of the others.
        mlp_ratio: hidden width of the MLPs, in multiples of the stage's channels.
        stem_dim: channels of the patch embedding's convolutions.
        drop_path_rate: stochastic depth of the last block, rising linearly over all blocks; as published, stage 1 has
            none.
        kernel_size: side of the neighbourhoods of attn="elsa" and its like. window_size: of attn="window".
        group_width, lam, gamma: of the ELSA layers, see models.elsa.ELSA.
        checkpointing: recompute the blocks in the backward pass instead of keeping their activations.

    Shapes: images (B, in_chans, H, W); sides that are no multiple of 2 * patch_size are zero-padded right and bottom.
    Evaluating: logits (B, num_classes), those of the class token plus half the largest of the pixels'. Training: (class
    token's logits (B, num_classes), pixels' logits (B, h, w, num_classes)), with (h, w) = token_grid(H, W).
    num_features: channels before the classifiers.
    Raises ValueError for arguments that do not fit together and for images of another shape.
    Source of all defaults: arXiv 2106.13112, table 2, and the published models.
    """
    task = "classification"
    attentions = ("outlook", *(attn for attn in ATTENTIONS if attn != "outlook"))  # the architecture's own first

    def __init__(self, attn="outlook", num_classes=1000, img_size=224, patch_size=8, in_chans=3, embed_dim=192,
                 depths=(4, 4, 8, 2), num_heads=(6, 12), mlp_ratio=3.0, stem_dim=64, drop_path_rate=0.0, kernel_size=5,
                 window_size=7, group_width=8, lam=1, gamma=1, checkpointing=False):
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"patch_size = {patch_size} is odd, and the stem halves the image first; "
                             "give an even number")
        check_drop_path_rate(drop_path_rate)
        self.patch_size, self.checkpointing = patch_size, checkpointing
        self.num_features = dim = 2 * embed_dim
        drop_path_rates = (drop_path_rate * n / max(1, sum(depths) - 1) for n in range(depths[0], sum(depths)))

        def local_block(index):
            shift = window_size // 2 if index % 2 else 0
            attention = local_attention(
                attn, embed_dim, num_heads[0], kernel_size=kernel_size,
                window=dict(window_size=window_size, shift=shift),
                elsa=dict(qk_scale=1, group_width=group_width, lam=lam, gamma=gamma))
            return Block(embed_dim, attention, mlp_ratio, 0.0)

        def global_block():
            return Block(dim, SelfAttention(dim, num_heads[1]), mlp_ratio, next(drop_path_rates))

        self.patch_embed = PatchEmbed(patch_size, stem_dim, embed_dim, in_chans)
        self.pos_embed = nn.Parameter(torch.empty(1, *self.token_grid(img_size, img_size), dim))
        self.network = nn.ModuleList([nn.Sequential(*map(local_block, range(depths[0]))), Downsample(embed_dim)])
        for depth in depths[1:]:
            self.network.append(nn.Sequential(*(global_block() for _ in range(depth))))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.post_network = nn.ModuleList(
            ClassBlock(dim, ClassAttention(dim, num_heads[1]), mlp_ratio, 0.0) for _ in range(2))
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else None
        self.aux_head = nn.Linear(dim, num_classes) if num_classes else None
        for parameter in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        init_linear_layers(self)

    def token_grid(self, H, W):
        """Rows and columns of the last stages' map for images of H x W pixels."""
        side = 2 * self.patch_size
        return (H + side - 1) // side, (W + side - 1) // side

    def reset_classifier(self, num_classes):
        """Fresh classifiers of so many classes; 0: none, the model gives the class token."""
        self.head, self.aux_head = (fresh_linear(self.norm.weight, self.num_features, num_classes)
                                    if num_classes else None for _ in range(2))

    def forward_features(self, images, swap=None):
        """Images (B, in_chans, H, W) -> (the class token and those of the pixels, normalised: (B, 1 + h * w, C), maps).

        maps: what the four stages give, (B, C_i, H_i, W_i), the first at patch_size, the others at twice that; they
        are not normalised. `swap`, (h, w) bool, is for mix-token: the tokens there change places with those of the
        reversed batch before stage 1.
        """
        in_chans = self.patch_embed.conv[0].in_channels
        if images.ndim != 4 or images.shape[1] != in_chans:
            raise ValueError(f"images have shape {tuple(images.shape)}; VOLO expects (B, {in_chans}, H, W)")
        h, w = self.token_grid(*images.shape[2:])
        side = 2 * self.patch_size
        images = F.pad(images, (0, w * side - images.shape[3], 0, h * side - images.shape[2]))
        x = self.patch_embed(images)  # (B, 2h, 2w, C)
        if swap is not None:
            if tuple(swap.shape) != (h, w):
                raise ValueError(f"swap has shape {tuple(swap.shape)}; expected one flag a token, {(h, w)}")
            swap_patches = swap.repeat_interleave(2, 0).repeat_interleave(2, 1)  # (2h, 2w)
            x = torch.where(swap_patches[..., None], x.flip(0), x)

        maps = []
        for i, stage in enumerate(self.network):
            if i == 2:  # after the down-sampling
                x = x + interpolate_pos_embed(self.pos_embed, h, w)
            for block in stage if isinstance(stage, nn.Sequential) else [stage]:
                x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            if i != 1:  # the down-sampling
                maps.append(x.permute(0, 3, 1, 2))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)  # (B, 1 + h * w, C)
        for block in self.post_network:
            x = block(x)
        return self.norm(x), tuple(maps)

    def forward(self, images, swap=None):
        """Logits as the class says. `swap`: see forward_features; the pixels' logits change back, so that they are
        those of the image they came from."""
        x, _ = self.forward_features(images, swap)
        if self.head is None:
            return x[:, 0]
        logits, token_logits = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        if not self.training:
            return logits + 0.5 * token_logits.amax(1)
        token_logits = token_logits.unflatten(1, self.token_grid(*images.shape[2:]))
        if swap is not None:
            token_logits = torch.where(swap[..., None], token_logits.flip(0), token_logits)
        return logits, token_logits


def interpolate_pos_embed(pos_embed, h, w):
    """(1, h0, w0, C) -> (1, h, w, C), bicubic as published; itself when the grid is the same."""
    if isinstance(h, int) and isinstance(w, int) and pos_embed.shape[1:3] == (h, w):  # they may be open in export
        return pos_embed
    return F.interpolate(pos_embed.permute(0, 3, 1, 2), (h, w), mode="bicubic").permute(0, 2, 3, 1)
