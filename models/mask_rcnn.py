"""Mask R-CNN and Cascade Mask R-CNN on Swin and ELSA-Swin: detection and instance segmentation.

Sources: He et al., "Mask R-CNN", arXiv 1703.06870; Lin et al., "Feature Pyramid Networks", arXiv 1612.03144; Cai and
Vasconcelos, "Cascade R-CNN", arXiv 1906.09756; the published ELSA configurations (arXiv 2112.12786, section 4, on
mmdetection 2.11), whose semantics, parameter names and shapes these are, so that the weights load.

Here are the feature pyramid and the two models; models/rpn.py proposes boxes, models/roi_heads.py detects in them.
Boxes are (n, 4) float32, x0 y0 x1 y1 in pixels, x1 and y1 exclusive.
"""
import functools

import torch.nn as nn
import torch.nn.functional as F

from models import swin
from models.roi_heads import RoIHead, Stage, conv_module
from models.rpn import NUM_PROPOSALS, PRE_NMS_TRAIN, RPNHead

CONFIGS = {f"mask_rcnn_{name}": config for name, config in swin.CONFIGS.items()}
CASCADE_CONFIGS = {f"cascade_{name}": config for name, config in CONFIGS.items()}


class FPN(nn.Module):
    """Feature maps of four strides -> five of `channels`, the coarsest being every other pixel of the one before."""

    def __init__(self, dims, channels):
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv_module(dim, channels, 1) for dim in dims)
        self.fpn_convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in dims)

    def forward(self, maps):
        maps = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[2:], mode="nearest")
        maps = [conv(x) for conv, x in zip(self.fpn_convs, maps)]
        return [*maps, maps[-1][:, :, ::2, ::2]]


class MaskRCNN(nn.Module):
    """Detection and instance segmentation with one stage of heads.

    Args:
        attn: of the backbone, "window" or "elsa".
        num_classes: how many, without the background.
        channels, hidden: width of the feature pyramid and its heads, and of the box heads' linear layers.
        anchor_scale: side of the square anchors in strides of their level; they are `patch_size * 2 ** level` pixels.
        rpn_samples, roi_samples: anchors, and proposals, of each image that are trained on, drawn at random.
        backbone: any other argument of models.swin.Backbone, e.g. drop_path_rate=0.2, frozen_stages=2.

    num_features: channels before the layer of the classes. Source of all defaults: the published configurations.
    """
    task = "detection"
    attentions = swin.Swin.attentions
    backbone_class = swin.Backbone
    stages = (Stage((0.1, 0.1, 0.2, 0.2), iou_threshold=0.5, weight=1.0),)
    num_train_proposals = 1000
    rpn_options = dict(smooth_l1_beta=0.0, inside_only=False)

    def __init__(self, attn="window", num_classes=80, channels=256, hidden=1024, anchor_scale=8, rpn_samples=256,
                 roi_samples=512, **backbone):
        super().__init__()
        self.num_classes, self.num_features = num_classes, hidden
        self.backbone = swin.Backbone(attn=attn, **backbone)
        dims, patch_size = self.backbone.dims, self.backbone.patch_embed.proj.kernel_size[0]
        strides = [patch_size * 2 ** level for level in range(len(dims) + 1)]
        self.neck = FPN(dims, channels)
        self.rpn_head = RPNHead(channels, strides, anchor_scale, rpn_samples, **self.rpn_options)
        self.roi_head = RoIHead(self.stages, channels, hidden, num_classes, strides, roi_samples)
        for name, module in self.named_modules():
            is_layer = isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
            if is_layer and name.startswith(("neck.", "rpn_head.", "roi_head.")):
                init_weights(name, module)

    def reset_classifier(self, num_classes):
        """Fresh layers of so many classes, without the background: logits, deltas and masks of all stages."""
        self.num_classes = self.roi_head.num_classes = num_classes
        widths = {"fc_cls": num_classes + 1, "fc_reg": 4 * num_classes, "conv_logits": num_classes}
        for head in (head for stage in self.roi_head.heads() for head in stage):
            for name in filter(lambda name: hasattr(head, name), widths):
                weight = getattr(head, name).weight  # (out, in) or (out, in, 1, 1)
                kind = nn.Linear if weight.ndim == 2 else functools.partial(nn.Conv2d, kernel_size=1)
                layer = kind(weight.shape[1], widths[name], device=weight.device, dtype=weight.dtype)
                init_weights(name, layer)
                setattr(head, name, layer)

    def forward(self, images, sizes, original_sizes=None, targets=None):
        """Detections, or in training mode the losses.

        Args:
            images: (N, 3, H, W), normalised, padded right and bottom with zeros; published weights expect multiples
                of 32.
            sizes: (h, w) of each image before it was padded.
            original_sizes: (h, w) of each photograph before it was resized; None: as `sizes`.
            targets: training, one dict an image: boxes (n, 4) in the pixels of `images`, labels (n,) int64 from 0,
                masks (n, H, W) bool, and where not all objects have one, has_mask (n,) bool.

        Returns: one dict an image, at most 100 detections, the best first, in pixels of the photograph: boxes (n, 4),
        scores (n,), labels (n,) int64 from 0, masks (n, h, w) bool. In training mode {name: loss, a scalar}, which
        are meant to be added.
        Raises ValueError when lists differ in length, or training has no targets.
        """
        for name, given in (("sizes", sizes), ("original_sizes", original_sizes), ("targets", targets)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{name} has {len(given)} entries for {len(images)} images; give one an image")
        if self.training and targets is None:
            raise ValueError("targets = None in training mode; give boxes, labels and masks of each image, "
                             "or call model.eval()")
        sizes = [tuple(int(side) for side in size) for size in sizes]
        maps = self.neck(self.backbone(images))
        map_sizes = [x.shape[2:] for x in maps]
        logits, deltas = self.rpn_head(maps)
        anchors = [self.rpn_head.anchors(level, H, W, images.device) for level, (H, W) in enumerate(map_sizes)]
        limits = (PRE_NMS_TRAIN, self.num_train_proposals) if self.training else (NUM_PROPOSALS, NUM_PROPOSALS)
        proposals = [boxes for boxes, _ in self.rpn_head.proposals(logits, deltas, anchors, sizes, *limits)]
        roi_maps = maps[:-1]
        if self.training:
            losses = self.rpn_head.losses(logits, deltas, anchors, map_sizes, sizes, targets)
            return {**losses, **self.roi_head.losses(roi_maps, proposals, sizes, targets)}
        if original_sizes is None:
            original_sizes = sizes
        original_sizes = [tuple(int(side) for side in size) for size in original_sizes]
        return self.roi_head.detections(roi_maps, proposals, sizes, original_sizes)


class CascadeMaskRCNN(MaskRCNN):
    """Three stages of heads, each on the boxes of the one before.

    Arguments and results as MaskRCNN; `cls0`, `cls1`, ... are its losses.
    """
    stages = (
        Stage((0.1, 0.1, 0.2, 0.2), iou_threshold=0.5, weight=1.0),
        Stage((0.05, 0.05, 0.1, 0.1), iou_threshold=0.6, weight=0.5),
        Stage((0.033, 0.033, 0.067, 0.067), iou_threshold=0.7, weight=0.25))
    num_train_proposals = 2000
    rpn_options = dict(smooth_l1_beta=1 / 9, inside_only=True)


def init_weights(name, module):
    """Initialises a layer of the neck or the heads as published, by its name in the model."""
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    if name.startswith("rpn_head.") or name.endswith("fc_cls"):
        nn.init.normal_(module.weight, std=0.01)
    elif name.endswith("fc_reg"):
        nn.init.normal_(module.weight, std=0.001)
    elif name.startswith("neck.") or isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    else:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
