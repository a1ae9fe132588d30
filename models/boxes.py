"""Box arithmetic of the detectors: coding, matching to ground truth, sampling.

Boxes are (n, 4) floats, x0 y0 x1 y1 in pixels, x1 and y1 exclusive. The semantics are those of mmdetection 2.11
(DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler), which the published ELSA detectors were trained with.
"""
import math

import torch

MAX_LOG_RATIO = math.log(1000 / 16)  # decoding scales a side by at most the exponential of this, up or down
MAX_PAIRS = 1 << 21  # of boxes and ground truth that are compared at a time: 100 MB


def encode(boxes, gt_boxes, stds):
    """Deltas (n, 4) that move boxes (n, 4) to gt_boxes (n, 4): dx, dy in sides of the box, dw, dh logarithmic.

    They are divided by `stds`, their four standard deviations.
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    gt_sizes = gt_boxes[:, 2:] - gt_boxes[:, :2]
    shifts = (gt_boxes[:, 2:] + gt_boxes[:, :2] - boxes[:, 2:] - boxes[:, :2]) / 2 / sizes
    return torch.cat([shifts, (gt_sizes / sizes).log()], 1) / boxes.new_tensor(stds)


def decode(boxes, deltas, stds, size=None):
    """The reverse of encode, over (..., 4), which broadcast; clipped to an image of `size`, (h, w), if it is given."""
    deltas = deltas * boxes.new_tensor(stds)
    sizes = boxes[..., 2:] - boxes[..., :2]
    centers = (boxes[..., 2:] + boxes[..., :2]) / 2 + deltas[..., :2] * sizes
    halves = sizes * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    decoded = torch.cat([centers - halves, centers + halves], -1)
    if size is None:
        return decoded
    h, w = size
    return torch.minimum(decoded.clamp_min(0), decoded.new_tensor([w, h, w, h]))


def assign(boxes, gt_boxes, pos_iou, neg_iou, min_pos_iou=None):
    """Index of the ground truth that each box is matched to, (n,) int64; -1: background, -2: ignored.

    A box is matched to the ground truth of its highest IoU from `pos_iou` on, and is background below `neg_iou`.
    With `min_pos_iou`, the boxes of highest IoU with a ground truth are matched to it, too, all ties, if that IoU is
    at least `min_pos_iou`. Shapes: boxes (n, 4), gt_boxes (m, 4), either may be empty.
    """
    from torchvision.ops import box_iou

    if not len(gt_boxes) or not len(boxes):
        return torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    matched, gt_max, closest = [], [], []
    chunk = max(1, MAX_PAIRS // len(gt_boxes))
    for start in range(0, len(boxes), chunk):
        iou = box_iou(gt_boxes, boxes[start:start + chunk])  # (m, chunk)
        max_iou, indices = iou.max(0)
        indices[max_iou < pos_iou] = -2
        indices[max_iou < neg_iou] = -1
        matched.append(indices)
        if min_pos_iou is not None:
            gt_max.append(iou.amax(1))
            # The closest in this chunk, by ground truth and box, and how close: perhaps the closest of all.
            gt, box = ((iou == gt_max[-1][:, None]) & (gt_max[-1][:, None] >= min_pos_iou)).nonzero(as_tuple=True)
            closest.append((gt, box + start, iou[gt, box]))
    matched = torch.cat(matched)
    if min_pos_iou is not None:
        gt, box, iou = (torch.cat(parts) for parts in zip(*closest))
        low_quality = iou == torch.stack(gt_max).amax(0)[gt]
        gt, box = gt[low_quality], box[low_quality]
        last = torch.full_like(matched, -1).scatter_reduce(0, box, gt, "amax")  # the later one wins, as published
        matched = torch.where(last >= 0, last, matched)
    return matched


def sample(matched, num, pos_fraction):
    """Random (positive, negative) indices into `matched`, as assign() gives it: at most `num` in all.

    At most `pos_fraction` of `num` are positive; negatives fill the rest, as far as there are any.
    """
    def draw(indices, count):
        if len(indices) <= count:
            return indices
        return indices[torch.randperm(len(indices), device=indices.device)[:count]]

    pos = draw((matched >= 0).nonzero()[:, 0], int(num * pos_fraction))
    neg = draw((matched == -1).nonzero()[:, 0], num - len(pos))
    return pos, neg


def scale_factor(size, original_size, device):
    """Pixels of the resized image, `size` (h, w), in each of the original's, along x, y, x, y: (4,) float32."""
    y, x = size[0] / original_size[0], size[1] / original_size[1]
    return torch.tensor([x, y, x, y], device=device)
