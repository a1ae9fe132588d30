"""Mask R-CNN and Cascade Mask R-CNN on Swin and ELSA-Swin: detection and instance segmentation.

Sources: He et al., "Mask R-CNN", arXiv 1703.06870; Lin et al., "Feature Pyramid Networks", arXiv 1612.03144; Cai and Vasconcelos,
"Cascade R-CNN", arXiv 1906.09756; the published ELSA configurations (arXiv 2112.12786, section 4, on mmdetection 2.11), whose
semantics, parameter names and shapes these are, so that the weights load.

Boxes are (n, 4) float32, x0 y0 x1 y1 in pixels, x1 and y1 exclusive.
"""
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss, roi_align

from models import swin
from models.upernet import ConvBNReLU

CONFIGS = {f"mask_rcnn_{name}": config for name, config in swin.CONFIGS.items()}
CASCADE_CONFIGS = {f"cascade_{name}": config for name, config in CONFIGS.items()}
BOX, MASK = 7, 14  # side of what RoIAlign gives the heads
LONGEST = math.log(1000 / 16)  # a box grows, and shrinks, by no more than the exponential of this


class Stage(NamedTuple):
    """One box head, with its mask head, of the cascade; Mask R-CNN has one."""
    stds: tuple  # what deltas are measured in
    iou: float  # from which on a proposal belongs to an object
    weight: float  # of its losses


class FPN(nn.Module):
    """Maps of four strides -> five of `channels` channels, the coarsest being every other pixel of the one before."""

    def __init__(self, dims, channels):
        super().__init__()
        self.lateral_convs = nn.ModuleList(_convolution(dim, channels, 1) for dim in dims)
        self.fpn_convs = nn.ModuleList(_convolution(channels, channels, 3) for _ in dims)

    def forward(self, maps):
        maps = [lateral(x) for lateral, x in zip(self.lateral_convs, maps)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], maps[i - 1].shape[2:], mode="nearest")
        maps = [convolution(x) for convolution, x in zip(self.fpn_convs, maps)]
        return [*maps, maps[-1][:, :, ::2, ::2]]


class RPNHead(nn.Module):
    """Maps -> of each level objectness (N, H * W * 3), a logit, and deltas (N, H * W * 3, 4), for three anchors a pixel."""

    def __init__(self, channels):
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, 3, 1)
        self.rpn_reg = nn.Conv2d(channels, 12, 1)

    def forward(self, maps):
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        return ([self.rpn_cls(x).permute(0, 2, 3, 1).flatten(1).float() for x in hidden],
                [self.rpn_reg(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float() for x in hidden])


class BoxHead(nn.Module):
    """(n, channels, 7, 7) -> logits (n, classes + 1), the background last, and deltas of every class (n, classes, 4)."""

    def __init__(self, channels, hidden, num_classes, convolutions):
        super().__init__()
        self.shared_convs = nn.ModuleList(ConvBNReLU(channels, channels, 3) for _ in range(4 * convolutions))
        widths = [channels * BOX * BOX, hidden] if convolutions else [channels * BOX * BOX, hidden, hidden]
        self.shared_fcs = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:]))
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 * num_classes)

    def forward(self, x):
        for convolution in self.shared_convs:
            x = convolution(x)
        x = x.flatten(1)
        for linear in self.shared_fcs:
            x = F.relu(linear(x))
        return self.fc_cls(x).float(), self.fc_reg(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """(n, channels, 14, 14) -> logits (n, classes, 28, 28)."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(_convolution(channels, channels, 3) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x, labels):
        """Also labels (n,) -> the logits of these classes alone, (n, 28, 28) float32."""
        for convolution in self.convs:
            x = F.relu(convolution(x))
        logits = self.conv_logits(F.relu(self.upsample(x)))
        return logits[torch.arange(len(x), device=x.device), labels].float()


class RoIHead(nn.Module):
    """The heads of all stages. Published names: those of a single stage are not numbered."""

    def __init__(self, stages, channels, hidden, num_classes):
        super().__init__()
        cascade = len(stages) > 1
        boxes = [BoxHead(channels, hidden, num_classes, cascade) for _ in stages]
        masks = [MaskHead(channels, num_classes) for _ in stages]
        self.bbox_head = nn.ModuleList(boxes) if cascade else boxes[0]
        self.mask_head = nn.ModuleList(masks) if cascade else masks[0]

    def heads(self):
        """[(BoxHead, MaskHead), ...]"""
        cascade = isinstance(self.bbox_head, nn.ModuleList)
        return [*zip(self.bbox_head, self.mask_head)] if cascade else [(self.bbox_head, self.mask_head)]


class MaskRCNN(nn.Module):
    """Detection and instance segmentation with one stage of heads.

    Args:
        attn: of the backbone, "window" or "elsa".
        num_classes: how many, without the background.
        channels, hidden: width of the feature pyramid and its heads, and of the box heads' linear layers.
        anchor_scale: side of the square anchors in strides of their level; they are `patch_size * 2 ** level` pixels.
        rpn_samples, roi_samples: anchors, and proposals, of each image that are trained on, drawn at random.
        backbone: any other argument of models.swin.Backbone, e.g. drop_path_rate=0.2, frozen_stages=2.

    Source of all defaults: the published configurations.
    """
    attentions = swin.Swin.attentions
    backbone_class = swin.Backbone
    stages = (Stage((0.1, 0.1, 0.2, 0.2), 0.5, 1.0),)
    training_proposals = 1000

    def __init__(self, attn="window", num_classes=80, channels=256, hidden=1024, anchor_scale=8, rpn_samples=256, roi_samples=512, **backbone):
        super().__init__()
        self.num_classes, self.anchor_scale, self.rpn_samples, self.roi_samples = num_classes, anchor_scale, rpn_samples, roi_samples
        self.cascade = len(self.stages) > 1
        self.backbone = swin.Backbone(attn=attn, **backbone)
        self.strides = [self.backbone.patch_embed.proj.kernel_size[0] * 2 ** level for level in range(len(self.backbone.dims) + 1)]
        self.neck = FPN(self.backbone.dims, channels)
        self.rpn_head = RPNHead(channels)
        self.roi_head = RoIHead(self.stages, channels, hidden, num_classes)
        for name, module in self.named_modules():
            if name.startswith(("neck.", "rpn_head.", "roi_head.")) and isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                _initialise(name, module)

    def forward(self, images, sizes, original_sizes=None, targets=None):
        """Detections, or in training mode the losses.

        Args:
            images: (N, 3, H, W), normalised, padded right and bottom with zeros; published weights expect multiples of 32.
            sizes: (h, w) of each image before it was padded.
            original_sizes: (h, w) of each photograph before it was resized; None: as `sizes`.
            targets: training, one dict an image: boxes (n, 4) in the pixels of `images`, labels (n,) int64 from 0, masks (n, H, W) bool.

        Returns: one dict an image, at most 100 detections, the best first, in pixels of the photograph: boxes (n, 4), scores (n,), labels
        (n,) int64 from 0, masks (n, h, w) bool. In training mode {name: loss, a scalar}, which are meant to be added.
        Raises ValueError when lists differ in length, or training has no targets.
        """
        for name, given in (("sizes", sizes), ("original_sizes", original_sizes), ("targets", targets)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{name} has {len(given)} entries for {len(images)} images; give one an image")
        if self.training and targets is None:
            raise ValueError("targets = None in training mode; give boxes, labels and masks of each image, or call model.eval()")
        sizes = [tuple(int(side) for side in size) for size in sizes]
        maps = self.neck(self.backbone(images))
        objectness, deltas = self.rpn_head(maps)
        anchors = [self.anchors(level, *x.shape[2:], x.device) for level, x in enumerate(maps)]
        if self.training:
            losses = self.rpn_losses(objectness, deltas, anchors, maps, sizes, targets)
            proposals = self.proposals(objectness, deltas, anchors, sizes, 2000, self.training_proposals)
            return {**losses, **self.roi_losses(maps[:-1], [boxes for boxes, _ in proposals], sizes, targets)}
        proposals = self.proposals(objectness, deltas, anchors, sizes, 1000, 1000)
        originals = sizes if original_sizes is None else [tuple(int(side) for side in size) for size in original_sizes]
        return self.detections(maps[:-1], [boxes for boxes, _ in proposals], sizes, originals)

    # Proposals

    def anchors(self, level, H, W, device):
        """(H * W * 3, 4): around the corner of each pixel of a map, of ratios height to width 0.5, 1 and 2 and of the same area."""
        stride = self.strides[level]
        root = torch.tensor([0.5, 1.0, 2.0], device=device).sqrt()
        half = torch.stack([1 / root, root], 1) * (self.anchor_scale * stride / 2)  # (3, 2)
        y, x = torch.meshgrid(torch.arange(H, device=device) * stride, torch.arange(W, device=device) * stride, indexing="ij")
        at = torch.stack([x, y], -1).reshape(-1, 1, 2)
        return torch.cat([at - half, at + half], -1).reshape(-1, 4)

    @torch.no_grad()
    def proposals(self, objectness, deltas, anchors, sizes, before, after):
        """[(boxes, scores) of each image]: of each level the `before` best, without overlaps, then of all levels the `after` best."""
        found = []
        for i, size in enumerate(sizes):
            boxes, scores, levels = [], [], []
            for level, (logits, moves, here) in enumerate(zip(objectness, deltas, anchors)):
                best, index = logits[i].sigmoid().topk(min(before, len(here)))
                boxes.append(decode(here[index], moves[i][index], (1, 1, 1, 1), size))
                scores.append(best)
                levels.append(torch.full_like(index, level))
            boxes, scores = torch.cat(boxes), torch.cat(scores)
            kept = batched_nms(boxes, scores, torch.cat(levels), 0.7)[:after]
            found.append((boxes[kept], scores[kept]))
        return found

    def rpn_losses(self, objectness, deltas, anchors, maps, sizes, targets):
        """Cross-entropy of objectness and distance of the objects' deltas, both over the number of sampled anchors."""
        usable = [self.usable(anchors, maps, size) for size in sizes]
        objectness, deltas, anchors = torch.cat(objectness, 1), torch.cat(deltas, 1), torch.cat(anchors)
        logits, objects, moves, wanted = [], [], [], []
        for i, target in enumerate(targets):
            index = usable[i].nonzero()[:, 0]
            matched = assign(anchors[index], target["boxes"], 0.7, 0.3, lowest=0.3)
            positive, negative = sample(matched, self.rpn_samples, 0.5)
            logits += [objectness[i, index[positive]], objectness[i, index[negative]]]
            objects += [torch.ones_like(logits[-2]), torch.zeros_like(logits[-1])]
            moves.append(deltas[i, index[positive]])
            wanted.append(encode(anchors[index[positive]], target["boxes"][matched[positive]], (1, 1, 1, 1)))
        logits, objects, moves, wanted = (torch.cat(parts) for parts in (logits, objects, moves, wanted))
        count = max(1, len(logits))
        distance = F.smooth_l1_loss(moves, wanted, reduction="sum", beta=1 / 9) if self.cascade else F.l1_loss(moves, wanted, reduction="sum")
        return {"rpn_cls": F.binary_cross_entropy_with_logits(logits, objects, reduction="sum") / count, "rpn_box": distance / count}

    def usable(self, anchors, maps, size):
        """Which anchors an image is trained with (A,): those of its own pixels, rounded up to 32; in the cascade only those inside of it."""
        h, w = size
        flags = []
        for level, x in enumerate(maps):
            rows, columns = (math.ceil(math.ceil(side / 32) * 32 / self.strides[level]) for side in size)
            flag = torch.zeros(*x.shape[2:], 3, dtype=torch.bool, device=x.device)
            flag[:rows, :columns] = True
            flags.append(flag.flatten())
        flags = torch.cat(flags)
        if not self.cascade:
            return flags
        x0, y0, x1, y1 = torch.cat(anchors).unbind(1)
        return flags & (x0 >= 0) & (y0 >= 0) & (x1 < w) & (y1 < h)

    # Heads

    def pool(self, maps, boxes, side):
        """RoIAlign of boxes [(n_i, 4) of each image] from the level that suits their area -> (sum of n_i, channels, side, side)."""
        image = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        boxes = torch.cat(boxes)
        rois = torch.cat([image, boxes], 1)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        levels = torch.floor(torch.log2(area.sqrt() / (14 * self.strides[0]) + 1e-6)).clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side)
        for level, x in enumerate(maps):
            index = (levels == level).nonzero()[:, 0]
            pooled[index] = roi_align(x, rois[index], side, 1 / self.strides[level], aligned=True)
        return pooled

    def roi_losses(self, maps, proposals, sizes, targets):
        losses = {}
        for s, (stage, (box_head, mask_head)) in enumerate(zip(self.stages, self.roi_head.heads())):
            boxes, labels, wanted, positives, masks, own = [], [], [], [], [], []
            for candidates, target in zip(proposals, targets):
                candidates = torch.cat([target["boxes"], candidates])
                matched = assign(candidates, target["boxes"], stage.iou, stage.iou, lowest=None if self.cascade else stage.iou)
                positive, negative = sample(matched, self.roi_samples, 0.25)
                boxes.append(candidates[torch.cat([positive, negative])])
                labels += [target["labels"][matched[positive]], torch.full_like(negative, self.num_classes)]
                own.append(torch.cat([positive, negative]) >= len(target["boxes"]))  # not the appended ground truth
                wanted.append(target["boxes"][matched[positive]])
                positives.append(candidates[positive])
                masks.append(mask_targets(target["masks"], matched[positive], candidates[positive]))
            labels, wanted, masks = torch.cat(labels), torch.cat(wanted), torch.cat(masks)
            logits, deltas = box_head(self.pool(maps, boxes, BOX))
            of_objects = (labels < self.num_classes).nonzero()[:, 0]
            objects, moves = torch.cat(positives), deltas[of_objects, labels[of_objects]]
            if self.cascade:
                distance = 10 * generalized_box_iou_loss(decode(objects, moves, stage.stds), wanted, reduction="sum")
            else:
                distance = F.l1_loss(moves, encode(objects, wanted, stage.stds), reduction="sum")
            mask_logits = mask_head(self.pool(maps, positives, MASK), labels[of_objects])
            of_masks = F.binary_cross_entropy_with_logits(mask_logits, masks, reduction="sum") / max(1, masks.numel())
            number = s if self.cascade else ""
            losses |= {f"cls{number}": stage.weight * F.cross_entropy(logits, labels), f"box{number}": stage.weight * distance / len(labels),
                       f"mask{number}": stage.weight * of_masks}
            if s + 1 < len(self.stages):
                with torch.no_grad():
                    classes = torch.where(labels < self.num_classes, labels, logits[:, :-1].argmax(1))
                    refined = self.refine(boxes, deltas, classes, stage, sizes)
                    proposals = [moved[kept] for moved, kept in zip(refined, own)]
        return losses

    def refine(self, boxes, deltas, classes, stage, sizes):
        """Boxes of each image moved by the deltas of one class each."""
        moves = deltas[torch.arange(len(deltas), device=deltas.device), classes].split([len(b) for b in boxes])
        return [decode(b, m, stage.stds, size) for b, m, size in zip(boxes, moves, sizes)]

    @torch.no_grad()
    def detections(self, maps, proposals, sizes, originals):
        total, heads = 0, self.roi_head.heads()
        for s, (stage, (box_head, _)) in enumerate(zip(self.stages, heads)):
            logits, deltas = box_head(self.pool(maps, proposals, BOX))
            total = total + logits
            if s + 1 < len(self.stages):
                proposals = self.refine(proposals, deltas, logits[:, :-1].argmax(1), stage, sizes)
        scores = (total / len(self.stages)).softmax(1)[:, :-1]
        counts = [len(boxes) for boxes in proposals]
        found = []
        for boxes, moves, likely, size, original in zip(proposals, deltas.split(counts), scores.split(counts), sizes, originals):
            if not self.cascade:  # as published: what ends at the upper border is nothing
                likely = likely * (boxes[:, 3:] != 0)
            boxes = decode(boxes[:, None], moves, self.stages[-1].stds, size)  # (n, classes, 4)
            index, labels = (likely > 0.05).nonzero(as_tuple=True)
            boxes, likely = boxes[index, labels] / scale_of(size, original, boxes.device), likely[index, labels]
            kept = batched_nms(boxes, likely, labels, 0.5)[:100]
            found.append({"boxes": boxes[kept], "scores": likely[kept], "labels": labels[kept]})
        rois = [image["boxes"] * scale_of(size, original, image["boxes"].device) for image, size, original in zip(found, sizes, originals)]
        labels = torch.cat([image["labels"] for image in found])
        pooled = self.pool(maps, rois, MASK)
        probabilities = sum(mask_head(pooled, labels).sigmoid() for _, mask_head in heads) / len(heads)
        for image, part, original in zip(found, probabilities.split([len(boxes) for boxes in rois]), originals):
            image["masks"] = paste(part, image["boxes"], original)
        return found


class CascadeMaskRCNN(MaskRCNN):
    """Three stages of heads, each on the boxes of the one before. Arguments and results as MaskRCNN; `cls0`, `cls1`, ... are its losses."""
    stages = (Stage((0.1, 0.1, 0.2, 0.2), 0.5, 1.0), Stage((0.05, 0.05, 0.1, 0.1), 0.6, 0.5), Stage((0.033, 0.033, 0.067, 0.067), 0.7, 0.25))
    training_proposals = 2000


def encode(boxes, wanted, stds):
    """Deltas (n, 4) that move boxes to the wanted ones: of the centres in sides, of the sides in logarithms, both in `stds`."""
    size, wanted_size = boxes[:, 2:] - boxes[:, :2], wanted[:, 2:] - wanted[:, :2]
    moved = (wanted[:, 2:] + wanted[:, :2] - boxes[:, 2:] - boxes[:, :2]) / 2 / size
    return torch.cat([moved, (wanted_size / size).log()], 1) / boxes.new_tensor(stds)


def decode(boxes, deltas, stds, size=None):
    """The reverse of encode, over (..., 4); clipped to `size`, (h, w), if it is given."""
    deltas = deltas * boxes.new_tensor(stds)
    sides = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., 2:] + boxes[..., :2]) / 2 + deltas[..., :2] * sides
    half = sides * deltas[..., 2:].clamp(-LONGEST, LONGEST).exp() / 2
    moved = torch.cat([centre - half, centre + half], -1)
    if size is None:
        return moved
    h, w = size
    return torch.minimum(moved.clamp_min(0), moved.new_tensor([w, h, w, h]))


def assign(boxes, truth, positive, negative, lowest=None):
    """Which object each box belongs to (n,): its index, -1 for the background, -2 for neither.

    A box belongs to the object it overlaps most if that is by an IoU of at least `positive`, to the background below `negative`.
    With `lowest`, the boxes that overlap an object most of all belong to it, too, if that is by at least `lowest`.
    """
    if not len(truth) or not len(boxes):
        return torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    iou = box_iou(truth, boxes)  # (objects, n)
    best, matched = iou.max(0)
    matched[best < positive] = -2
    matched[best < negative] = -1
    if lowest is not None:
        highest = iou.amax(1, keepdim=True)
        closest = (iou == highest) & (highest >= lowest)
        number = torch.arange(1, len(truth) + 1, device=boxes.device)[:, None]
        last = (closest * number).amax(0)  # the later object wins, as published
        matched = torch.where(last > 0, last - 1, matched)
    return matched


def sample(matched, number, share):
    """Indices (positive, negative) of at most `number` boxes of assign(), at random, objects being at most `share` of them."""
    def some(index, count):
        return index if len(index) <= count else index[torch.randperm(len(index), device=index.device)[:count]]

    positive = some((matched >= 0).nonzero()[:, 0], int(number * share))
    return positive, some((matched == -1).nonzero()[:, 0], number - len(positive))


def mask_targets(masks, index, boxes):
    """What masks (objects, H, W) bool [index] are inside boxes (n, 4), as (n, 28, 28) float32, 0 or 1."""
    rois = torch.cat([index[:, None].to(boxes.dtype), boxes], 1)
    return (roi_align(masks[:, None].to(boxes.dtype), rois, 2 * MASK, aligned=True)[:, 0] >= 0.5).to(boxes.dtype)


def paste(probabilities, boxes, size):
    """Masks (n, 28, 28), sampled bilinearly inside boxes, as (n, H, W) bool of `size`, true from 0.5 on."""
    m = probabilities.shape[-1]

    def weights(low, high, length):  # of the mask's rows, or columns, for each pixel: (n, length, m)
        pixel = torch.arange(length, device=boxes.device)
        at = (pixel + 0.5 - low[:, None]) / (high - low)[:, None] * m - 0.5
        at = torch.where(at.isfinite(), at, (m - 1) / 2)  # of a box without width
        near = (pixel >= low[:, None].floor() - 1) & (pixel < high[:, None].ceil() + 1)
        return (1 - (at[..., None] - torch.arange(m, device=boxes.device)).abs()).clamp_min(0) * near[..., None]

    chunk = max(1, (1 << 24) // (size[0] * size[1]))  # of floating point numbers 64 MB
    return torch.cat([weights(b[:, 1], b[:, 3], size[0]) @ p @ weights(b[:, 0], b[:, 2], size[1]).transpose(1, 2) >= 0.5
                      for p, b in zip(probabilities.split(chunk), boxes.split(chunk))])


def scale_of(size, original, device):
    """Pixels of the input for each of the photograph, along x, y, x, y: (4,)."""
    y, x = size[0] / original[0], size[1] / original[1]
    return torch.tensor([x, y, x, y], device=device)


def _convolution(dim_in, dim_out, kernel_size):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(dim_in, dim_out, kernel_size, padding=kernel_size // 2)))


def _initialise(name, module):
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
