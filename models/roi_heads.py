"""The second stage of the detectors: class, box and mask of every proposal.

Sources: He et al., "Mask R-CNN", arXiv 1703.06870; Cai and Vasconcelos, "Cascade R-CNN", arXiv 1906.09756; as in
mmdetection 2.11 with the heads of the published ELSA configurations, whose parameter names and shapes these are.
"""
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.boxes import assign, decode, encode, sample, scale_factor
from models.precision import widened
from models.upernet import ConvBNReLU

BOX_SIZE, MASK_SIZE = 7, 14  # side of what RoIAlign gives the heads
SCORE_THRESHOLD, NMS_IOU, MAX_DETECTIONS = 0.05, 0.5, 100


class Stage(NamedTuple):
    """A box head with its mask head: one in Mask R-CNN, three in the cascade."""
    stds: tuple  # of the deltas
    iou_threshold: float  # from which on a proposal is positive
    weight: float  # of its losses


class Samples(NamedTuple):
    """RoIs of one image that are trained on, the p positives first."""
    rois: torch.Tensor  # (n, 4)
    labels: torch.Tensor  # (n,) int64; num_classes: background
    is_gt: torch.Tensor  # (n,) bool: a ground-truth box that was added to the proposals
    gt_boxes: torch.Tensor  # (p, 4)
    gt_masks: torch.Tensor  # (p, 28, 28) float32, 0 or 1
    has_mask: torch.Tensor  # (p,) bool: others are boxes alone, of no weight in the loss of the masks


def conv_module(dim_in, dim_out, kernel_size):
    """A convolution under mmdetection's name for it, `conv`."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(dim_in, dim_out, kernel_size, padding=kernel_size // 2)))


class BoxHead(nn.Module):
    """(n, channels, 7, 7) -> logits (n, num_classes + 1), the background last, and deltas (n, num_classes, 4)."""

    def __init__(self, channels, hidden, num_classes, num_convs, num_fcs):
        super().__init__()
        self.shared_convs = nn.ModuleList(ConvBNReLU(channels, channels, 3) for _ in range(num_convs))
        widths = [channels * BOX_SIZE ** 2] + num_fcs * [hidden]
        self.shared_fcs = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:]))
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 * num_classes)

    def forward(self, x):
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x))
        return widened(self.fc_cls(x)), widened(self.fc_reg(x)).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """(n, channels, 14, 14) and labels (n,) -> logits of these classes, (n, 28, 28), at least float32."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.convs = nn.ModuleList(conv_module(channels, channels, 3) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x, labels):
        for conv in self.convs:
            x = F.relu(conv(x))
        logits = self.conv_logits(F.relu(self.upsample(x)))  # (n, num_classes, 28, 28)
        return widened(logits[torch.arange(len(x), device=x.device), labels])


class RoIHead(nn.Module):
    """Box and mask heads of all stages, their losses and detections.

    Args:
        stages: (Stage, ...); more than one: a cascade, each on the boxes of the one before. Its box heads have four
            convolutions and one linear layer instead of two linear layers, and their loss is the GIoU's, not L1.
        channels, hidden, num_classes: width of the feature maps, of the linear layers, and classes without background.
        strides: of each level, in pixels.
        num_samples: proposals of each image that are trained on, drawn at random, at most a quarter of them positive.

    maps: feature maps of all levels that RoIs are pooled from. sizes, targets: as MaskRCNN.forward takes them.
    """

    def __init__(self, stages, channels, hidden, num_classes, strides, num_samples):
        super().__init__()
        self.stages, self.num_classes, self.strides, self.num_samples = stages, num_classes, strides, num_samples
        self.cascade = len(stages) > 1
        num_convs, num_fcs = (4, 1) if self.cascade else (0, 2)
        box_heads = [BoxHead(channels, hidden, num_classes, num_convs, num_fcs) for _ in stages]
        mask_heads = [MaskHead(channels, num_classes) for _ in stages]
        # Published names: the heads of a single stage are not numbered.
        self.bbox_head = nn.ModuleList(box_heads) if self.cascade else box_heads[0]
        self.mask_head = nn.ModuleList(mask_heads) if self.cascade else mask_heads[0]

    def heads(self):
        """[(BoxHead, MaskHead), ...] of the stages."""
        return [*zip(self.bbox_head, self.mask_head)] if self.cascade else [(self.bbox_head, self.mask_head)]

    def pool(self, maps, rois, side):
        """RoIAlign of [(n_i, 4), ...] of each image, from the level that suits their area: (sum n_i, C, side, side)."""
        from torchvision.ops import roi_align

        batch_indices = torch.cat([boxes.new_full((len(boxes), 1), i) for i, boxes in enumerate(rois)])
        boxes = torch.cat(rois)
        rois = torch.cat([batch_indices, boxes], 1)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        levels = torch.floor(torch.log2(areas.sqrt() / (14 * self.strides[0]) + 1e-6)).clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side)
        for level, x in enumerate(maps):
            indices = (levels == level).nonzero()[:, 0]
            pooled[indices] = roi_align(x, rois[indices], side, 1 / self.strides[level], aligned=True)
        return pooled

    def refine(self, rois, deltas, classes, stage, sizes):
        """RoIs of each image moved by the deltas of one class each. deltas (sum n_i, C, 4), classes (sum n_i,)."""
        deltas = deltas[torch.arange(len(deltas), device=deltas.device), classes].split([len(boxes) for boxes in rois])
        return [decode(*pair, stage.stds, size) for *pair, size in zip(rois, deltas, sizes)]

    # Training

    def losses(self, maps, proposals, sizes, targets):
        """{"cls", "box", "mask": scalar}, in the cascade with the number of the stage behind: "cls0", ...

        Means: of cls and box over the sampled RoIs, of mask over the pixels of the positives that have a mask.
        """
        losses = {}
        for i, (stage, (box_head, mask_head)) in enumerate(zip(self.stages, self.heads())):
            samples = [self.sample(boxes, target, stage) for boxes, target in zip(proposals, targets)]
            rois, labels = [image.rois for image in samples], torch.cat([image.labels for image in samples])
            logits, deltas = box_head(self.pool(maps, rois, BOX_SIZE))
            number = i if self.cascade else ""
            losses[f"cls{number}"] = stage.weight * F.cross_entropy(logits, labels)
            losses[f"box{number}"] = stage.weight * self.box_loss(samples, labels, deltas, stage)
            losses[f"mask{number}"] = stage.weight * self.mask_loss(samples, labels, maps, mask_head)
            if stage is not self.stages[-1]:
                with torch.no_grad():
                    classes = torch.where(labels < self.num_classes, labels, logits[:, :-1].argmax(1))
                    refined = self.refine(rois, deltas, classes, stage, sizes)
                    proposals = [boxes[~image.is_gt] for boxes, image in zip(refined, samples)]
        return losses

    def sample(self, proposals, target, stage):
        """Samples of one image, from its proposals (n, 4) and its ground truth.

        As published, proposals are matched on their own: the best one of an object goes to it even where it overlaps
        another more, which it would not if the ground truth itself were among the candidates.
        """
        gt_boxes = target["boxes"]
        min_pos_iou = None if self.cascade else stage.iou_threshold
        matched = assign(proposals, gt_boxes, stage.iou_threshold, stage.iou_threshold, min_pos_iou)
        boxes = torch.cat([gt_boxes, proposals])
        matched = torch.cat([torch.arange(len(gt_boxes), device=matched.device), matched])
        pos, neg = sample(matched, self.num_samples, 0.25)
        indices, gt = torch.cat([pos, neg]), matched[pos]
        return Samples(
            rois=boxes[indices],
            labels=torch.cat([target["labels"][gt], torch.full_like(neg, self.num_classes)]),
            is_gt=indices < len(gt_boxes),
            gt_boxes=gt_boxes[gt],
            gt_masks=mask_targets(target["masks"], gt, boxes[pos]),
            has_mask=target["has_mask"][gt] if "has_mask" in target else torch.ones_like(gt, dtype=torch.bool))

    def box_loss(self, samples, labels, deltas, stage):
        from torchvision.ops import generalized_box_iou_loss

        pos = (labels < self.num_classes).nonzero()[:, 0]
        boxes, deltas = torch.cat([image.rois for image in samples])[pos], deltas[pos, labels[pos]]
        gt_boxes = torch.cat([image.gt_boxes for image in samples])
        if self.cascade:
            loss = 10 * generalized_box_iou_loss(decode(boxes, deltas, stage.stds), gt_boxes, reduction="sum")
        else:
            loss = F.l1_loss(deltas, encode(boxes, gt_boxes, stage.stds), reduction="sum")
        return loss / len(labels)

    def mask_loss(self, samples, labels, maps, mask_head):
        rois = [image.rois[:len(image.gt_boxes)][image.has_mask] for image in samples]
        gt_masks = torch.cat([image.gt_masks[image.has_mask] for image in samples])
        labels = labels[labels < self.num_classes][torch.cat([image.has_mask for image in samples])]
        logits = mask_head(self.pool(maps, rois, MASK_SIZE), labels)
        return F.binary_cross_entropy_with_logits(logits, gt_masks, reduction="sum") / max(1, gt_masks.numel())

    # Evaluation

    @torch.no_grad()
    def detections(self, maps, proposals, sizes, original_sizes):
        """One dict an image, as MaskRCNN.forward gives it."""
        rois, scores, deltas = self.classify(maps, proposals, sizes)
        detections = []
        for *image, size, original_size in zip(rois, scores, deltas, sizes, original_sizes):
            detections.append(self.select(*image, size, original_size))
        self.add_masks(detections, maps, sizes, original_sizes)
        return detections

    def classify(self, maps, rois, sizes):
        """Of each image: RoIs (n, 4) of the last stage, scores (n, num_classes), deltas (n, num_classes, 4)."""
        all_logits = []
        for stage, (box_head, _) in zip(self.stages, self.heads()):
            logits, deltas = box_head(self.pool(maps, rois, BOX_SIZE))
            all_logits.append(logits)
            if stage is not self.stages[-1]:
                rois = self.refine(rois, deltas, logits[:, :-1].argmax(1), stage, sizes)
        scores = (sum(all_logits) / len(all_logits)).softmax(1)[:, :-1]
        counts = [len(boxes) for boxes in rois]
        return rois, scores.split(counts), deltas.split(counts)

    def select(self, rois, scores, deltas, size, original_size):
        """Boxes, scores and labels of one image: what scores enough, without overlaps within a class."""
        from torchvision.ops import batched_nms

        if not self.cascade:  # as published: what ends at the upper border is nothing
            scores = scores * (rois[:, 3:] != 0)
        boxes = decode(rois[:, None], deltas, self.stages[-1].stds, size)  # (n, num_classes, 4)
        indices, labels = (scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
        boxes = boxes[indices, labels] / scale_factor(size, original_size, boxes.device)
        scores = scores[indices, labels]
        keep = batched_nms(boxes, scores, labels, NMS_IOU)[:MAX_DETECTIONS]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}

    def add_masks(self, detections, maps, sizes, original_sizes):
        """"masks" of all detections, from the mean probability of the stages."""
        rois = []
        for image, size, original_size in zip(detections, sizes, original_sizes):
            rois.append(image["boxes"] * scale_factor(size, original_size, image["boxes"].device))
        labels = torch.cat([image["labels"] for image in detections])
        pooled, heads = self.pool(maps, rois, MASK_SIZE), self.heads()
        probabilities = sum(mask_head(pooled, labels).sigmoid() for _, mask_head in heads) / len(heads)
        probabilities = probabilities.split([len(boxes) for boxes in rois])
        for image, masks, original_size in zip(detections, probabilities, original_sizes):
            image["masks"] = paste_masks(masks, image["boxes"], original_size)


def mask_targets(gt_masks, matched, boxes):
    """The part of gt_masks[matched] inside each box, as (n, 28, 28) float32, 0 or 1.

    Shapes: gt_masks (m, H, W) bool, matched (n,) int64, boxes (n, 4).
    """
    from torchvision.ops import roi_align

    targets = boxes.new_zeros(len(boxes), 2 * MASK_SIZE, 2 * MASK_SIZE)
    chunk = max(1, (1 << 24) // max(1, gt_masks[:1].numel()))  # at most 64 MB of float32 at a time
    for start in range(0, len(gt_masks), chunk):
        chosen = ((matched >= start) & (matched < start + chunk)).nonzero()[:, 0]
        rois = torch.cat([(matched[chosen, None] - start).to(boxes.dtype), boxes[chosen]], 1)
        masks = gt_masks[start:start + chunk, None].to(boxes.dtype)
        aligned = roi_align(masks, rois, 2 * MASK_SIZE, aligned=True)[:, 0]
        targets[chosen] = (aligned >= 0.5).to(boxes.dtype)
    return targets


def paste_masks(masks, boxes, size):
    """Probabilities (n, 28, 28), sampled bilinearly inside boxes (n, 4), as (n, H, W) bool of `size`, true from 0.5 on.

    Bilinear sampling is separable: a product with the weights of the rows and one with those of the columns.
    """
    m = masks.shape[-1]

    def weights(start, end, length):
        """Of the mask's rows, or columns, for each pixel: (n, length, m)."""
        pixels = torch.arange(length, device=boxes.device)
        coords = (pixels + 0.5 - start[:, None]) / (end - start)[:, None] * m - 0.5
        coords = torch.where(coords.isfinite(), coords, (m - 1) / 2)  # of a box without width
        inside = (pixels >= start[:, None].floor() - 1) & (pixels < end[:, None].ceil() + 1)
        distances = (coords[..., None] - torch.arange(m, device=boxes.device)).abs()
        return (1 - distances).clamp_min(0) * inside[..., None]

    H, W = size
    chunk = max(1, (1 << 24) // (H * W))  # at most 64 MB of float32 at a time
    pasted = []
    for probabilities, (x0, y0, x1, y1) in zip(masks.split(chunk), (b.unbind(1) for b in boxes.split(chunk))):
        pasted.append(weights(y0, y1, H) @ probabilities @ weights(x0, x1, W).transpose(1, 2) >= 0.5)
    return torch.cat(pasted)
