"""UPerNet: semantic segmentation on Swin and ELSA-Swin.

Sources: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221; the published ELSA
configurations (arXiv 2112.12786, section 4, on mmsegmentation 0.11). Parameter names and shapes are the published ones,
so that the weights load.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from models import swin
from models.precision import widened

CONFIGS = {f"upernet_{name}": config for name, config in swin.CONFIGS.items()}
POOL_SCALES = (1, 2, 3, 6)


class ConvBNReLU(nn.Module):
    def __init__(self, dim_in, dim_out, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(dim_out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class PyramidHead(nn.Module):
    """Feature maps of four strides, (B, C_i, H_i, W_i) -> logits (B, num_classes, H_0, W_0).

    Pyramid pooling on the coarsest, then a feature pyramid, then all levels fused at the size of the finest.
    """

    def __init__(self, dims, channels, num_classes, dropout):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBNReLU(dims[-1], channels, 1)) for scale in POOL_SCALES)
        self.bottleneck = ConvBNReLU(dims[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBNReLU(dim, channels, 1) for dim in dims[:-1])
        self.fpn_convs = nn.ModuleList(ConvBNReLU(channels, channels, 3) for _ in dims[:-1])
        self.fpn_bottleneck = ConvBNReLU(len(dims) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps):
        coarsest = maps[-1]
        pooled = [resize(module(coarsest), coarsest.shape[2:]) for module in self.psp_modules]
        top = self.bottleneck(torch.cat([coarsest, *pooled], 1))
        levels = [top]  # coarsest first
        for conv, x in zip(reversed(self.lateral_convs), reversed(maps[:-1])):
            levels.append(conv(x) + resize(levels[-1], x.shape[2:]))
        fine = [conv(x) for conv, x in zip(self.fpn_convs, reversed(levels[1:]))]  # finest first
        fused = torch.cat([resize(x, fine[0].shape[2:]) for x in (*fine, top)], 1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))


class AuxiliaryHead(nn.Module):
    """One more classifier of the third stage's pixels, for training: (B, dim, H, W) -> (B, num_classes, H, W)."""

    def __init__(self, dim, channels, num_classes, dropout):
        super().__init__()
        self.convs = nn.ModuleList([ConvBNReLU(dim, channels, 3)])
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        return self.conv_seg(self.dropout(self.convs[0](x)))


class UPerNet(nn.Module):
    """Semantic segmentation: images (B, 3, H, W), any H and W -> logits (B, num_classes, H, W).

    In training mode the logits are followed by those of the auxiliary head, of the same shape.

    Args:
        attn: of the backbone, "window" or "elsa".
        num_classes: width of the logits.
        channels, auxiliary_channels: width of the heads.
        dropout: rate of the channels dropped before the classifiers in training.
        backbone: any other argument of models.swin.Backbone, e.g. drop_path_rate=0.3.

    num_features: channels before the classifier. Source of all defaults: the published configurations.
    """
    task = "segmentation"
    attentions = swin.Swin.attentions
    backbone_class = swin.Backbone

    def __init__(self, attn="window", num_classes=150, channels=512, auxiliary_channels=256, dropout=0.1, **backbone):
        super().__init__()
        self.backbone = swin.Backbone(attn=attn, **backbone)
        self.num_features = channels
        dims = self.backbone.dims
        self.decode_head = PyramidHead(dims, channels, num_classes, dropout)
        self.auxiliary_head = AuxiliaryHead(dims[-2], auxiliary_channels, num_classes, dropout)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
                init_convolution(module)

    def reset_classifier(self, num_classes):
        """Fresh classifiers of so many classes."""
        for head in (self.decode_head, self.auxiliary_head):
            weight = head.conv_seg.weight
            head.conv_seg = nn.Conv2d(weight.shape[1], num_classes, 1, device=weight.device, dtype=weight.dtype)
            init_convolution(head.conv_seg)

    def forward(self, images, coarse=False):
        """coarse: leave the logits at the size of the finest map, (B, num_classes, H / 4, W / 4), rounded up. The
        logits of all pixels take 600 MB a megapixel; resize_rows() makes as many of them as are wanted."""
        maps = self.backbone(images)
        logits = self.decode_head(maps)
        if coarse:
            return logits
        logits = resize(logits, images.shape[2:])
        if not self.training:
            return logits
        return logits, resize(self.auxiliary_head(maps[-2]), images.shape[2:])


def init_convolution(module):
    if module.bias is None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:  # a classifier
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def resize(x, size):
    """(B, C, H, W) -> (B, C, *size), bilinear between pixel centres."""
    return F.interpolate(x, tuple(size), mode="bilinear")


def resize_rows(x, size, start, stop, above=0, height=None):
    """Rows `start` to `stop` of resize(x, size), without the others; on a CPU equal to the last bit, but for tiny maps.

    x: (B, C, h, w), of a map of `height` rows (default: all) those from `above` on; source_rows() says which.
    """
    upper, lower, share = source_rows(height or x.shape[2], size[0], start, stop)
    first, last = int(upper[0]), int(lower[-1]) + 1
    wide = resize(widened(x[:, :, first - above:last - above]), (last - first, size[1]))
    share = share.to(wide)[:, None]
    upper, lower = (wide[:, :, row.to(x.device) - first] for row in (upper, lower))
    return torch.addcmul(lower * share, upper, 1 - share).to(x.dtype)


def source_rows(rows, resized, start, stop):
    """Between which of `rows` the rows `start` to `stop` of `resized` lie -> (upper, lower: (stop - start,) int64, the
    lower's share: float32), rounded as F.interpolate does."""
    scale = (torch.tensor(rows, dtype=torch.float32) / resized).double()
    place = (scale * (torch.arange(start, stop) + 0.5) - 0.5).float()
    upper = place.long().clamp_max(rows - 1)
    return upper, (upper + 1).clamp_max(rows - 1), (place - upper).clamp(0, 1)
