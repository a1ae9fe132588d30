"""Region proposal network: which boxes may hold an object.

Source: Ren et al., "Faster R-CNN", arXiv 1506.01497, over the levels of a feature pyramid (arXiv 1612.03144), as in
mmdetection 2.11, whose parameter names and shapes these are.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.boxes import assign, decode, encode, sample
from models.precision import widened

ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height to width
STDS = (1, 1, 1, 1)  # of the deltas
NMS_IOU = 0.7
NUM_PROPOSALS = 1000  # of an image, and before suppression of each level, when evaluating
PRE_NMS_TRAIN = 2000  # of each level in training
PAD_DIVISOR = 32  # published weights expect images padded to multiples of this


class RPNHead(nn.Module):
    """Objectness and deltas of the anchors, the loss of both, and the proposals made of them.

    Args:
        channels: width of the feature maps.
        strides: of each level, in pixels.
        anchor_scale: side of the square anchors, in strides of their level.
        num_samples: anchors of each image that are trained on, drawn at random, at most half of them positive.
        smooth_l1_beta: where the loss of the deltas turns from quadratic to linear; 0: L1.
        inside_only: train on no anchor that crosses the border of its image.
    """

    def __init__(self, channels, strides, anchor_scale, num_samples, smooth_l1_beta, inside_only):
        super().__init__()
        self.strides, self.anchor_scale, self.num_samples = strides, anchor_scale, num_samples
        self.smooth_l1_beta, self.inside_only = smooth_l1_beta, inside_only
        num_anchors = len(ASPECT_RATIOS)
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, num_anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * num_anchors, 1)

    def forward(self, maps):
        """Feature maps (N, C, H, W) -> of each level logits (N, H * W * 3) and deltas (N, H * W * 3, 4),
        at least float32."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        logits = [widened(self.rpn_cls(x)).permute(0, 2, 3, 1).flatten(1) for x in hidden]
        deltas = [widened(self.rpn_reg(x)).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in hidden]
        return logits, deltas

    def anchors(self, level, H, W, device):
        """(H * W * 3, 4), by row, column, ratio: around the top left corner of each cell, all of the same area."""
        stride = self.strides[level]
        root = torch.tensor(ASPECT_RATIOS, device=device).sqrt()
        halves = torch.stack([1 / root, root], 1) * (self.anchor_scale * stride / 2)  # (3, 2)
        y, x = torch.meshgrid(
            torch.arange(H, device=device) * stride, torch.arange(W, device=device) * stride, indexing="ij")
        centers = torch.stack([x, y], -1).reshape(-1, 1, 2)
        return torch.cat([centers - halves, centers + halves], -1).reshape(-1, 4)

    @torch.no_grad()
    def proposals(self, logits, deltas, anchors, sizes, pre_nms, post_nms):
        """[(boxes (n, 4), scores (n,)), ...] of each image, the best first.

        Of each level the `pre_nms` best, of these without overlaps the `post_nms` best of all levels.
        logits, deltas: as forward gives them; anchors: [(A, 4), ...] of each level; sizes: [(h, w), ...] to clip to.
        """
        from torchvision.ops import batched_nms

        proposals = []
        for i, size in enumerate(sizes):
            boxes, scores, levels = [], [], []
            for level, level_anchors in enumerate(anchors):
                top_scores, top = logits[level][i].sigmoid().topk(min(pre_nms, len(level_anchors)))
                boxes.append(decode(level_anchors[top], deltas[level][i][top], STDS, size))
                scores.append(top_scores)
                levels.append(torch.full_like(top, level))
            boxes, scores = torch.cat(boxes), torch.cat(scores)
            keep = batched_nms(boxes, scores, torch.cat(levels), NMS_IOU)[:post_nms]
            proposals.append((boxes[keep], scores[keep]))
        return proposals

    def losses(self, logits, deltas, anchors, map_sizes, sizes, targets):
        """Cross-entropy of objectness and distance of the positives' deltas, both over the number of sampled anchors.

        map_sizes: [(H, W), ...] of each level; the others as proposals() and MaskRCNN.forward take them.
        """
        valid = [self.valid(anchors, map_sizes, size) for size in sizes]
        logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        sampled_logits, labels, pos_deltas, target_deltas = [], [], [], []
        for i, target in enumerate(targets):
            indices = valid[i].nonzero()[:, 0]
            matched = assign(anchors[indices], target["boxes"], 0.7, 0.3, min_pos_iou=0.3)
            pos, neg = sample(matched, self.num_samples, 0.5)
            sampled_logits += [logits[i, indices[pos]], logits[i, indices[neg]]]
            labels += [torch.ones_like(sampled_logits[-2]), torch.zeros_like(sampled_logits[-1])]
            pos_deltas.append(deltas[i, indices[pos]])
            target_deltas.append(encode(anchors[indices[pos]], target["boxes"][matched[pos]], STDS))
        sampled_logits, labels = torch.cat(sampled_logits), torch.cat(labels)
        pos_deltas, target_deltas = torch.cat(pos_deltas), torch.cat(target_deltas)
        num_sampled = max(1, len(labels))
        cls_loss = F.binary_cross_entropy_with_logits(sampled_logits, labels, reduction="sum")
        box_loss = F.smooth_l1_loss(pos_deltas, target_deltas, reduction="sum", beta=self.smooth_l1_beta)
        return {"rpn_cls": cls_loss / num_sampled, "rpn_box": box_loss / num_sampled}

    def valid(self, anchors, map_sizes, size):
        """Which anchors of all levels an image of `size` (h, w) is trained with, (A,) bool.

        Those of its own cells, not of the batch's padding beyond multiples of 32.
        """
        h, w = size
        flags = []
        for (H, W), stride in zip(map_sizes, self.strides):
            rows, columns = (math.ceil(math.ceil(side / PAD_DIVISOR) * PAD_DIVISOR / stride) for side in size)
            flag = torch.zeros(H, W, len(ASPECT_RATIOS), dtype=torch.bool, device=anchors[0].device)
            flag[:rows, :columns] = True
            flags.append(flag.flatten())
        flags = torch.cat(flags)
        if not self.inside_only:
            return flags
        x0, y0, x1, y1 = torch.cat(anchors).unbind(1)
        return flags & (x0 >= 0) & (y0 >= 0) & (x1 < w) & (y1 < h)
