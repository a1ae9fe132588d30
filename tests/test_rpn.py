"""models/rpn.py: anchors against the published ones, proposals and losses against loops over boxes."""
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from models.boxes import decode, encode
from models.rpn import RPNHead
from published import assert_close, published_units

STRIDES = (4, 8)
MAP_SIZES = ((24, 16), (12, 8))  # of a batch padded to 96 x 64 pixels
ONES = (1, 1, 1, 1)


def make(smooth_l1_beta=0.0, inside_only=False, num_samples=10 ** 6):
    torch.manual_seed(0)
    return RPNHead(6, STRIDES, anchor_scale=3, num_samples=num_samples, smooth_l1_beta=smooth_l1_beta,
                   inside_only=inside_only)


def outputs(head, batch=2):
    """Random logits and deltas of a batch, and the anchors."""
    generator = torch.Generator().manual_seed(1)
    counts = [3 * H * W for H, W in MAP_SIZES]
    logits = [torch.randn(batch, count, generator=generator) for count in counts]
    deltas = [torch.randn(batch, count, 4, generator=generator) / 4 for count in counts]
    return logits, deltas, [head.anchors(level, *size, "cpu") for level, size in enumerate(MAP_SIZES)]


def test_anchors_equal_the_published_ones():
    units = published_units()
    head = RPNHead(1, (4, 8, 16, 32, 64), 8, 256, 0.0, False)
    for level, (H, W) in enumerate(units["anchor_sizes"].tolist()):
        assert_close("anchors", units[f"anchor_lvl{level}"], head.anchors(level, H, W, "cpu"), 1e-6)


def test_outputs_are_in_the_order_of_the_anchors():
    head = make()
    x = torch.randn(2, 6, 3, 5)
    (logits,), (deltas,) = head([x])
    hidden = F.relu(F.conv2d(x, head.rpn_conv.weight, head.rpn_conv.bias, padding=1))
    row, column, ratio = 2, 3, 1
    index = (row * 5 + column) * 3 + ratio
    cell = hidden[1, :, row, column]
    channels = slice(4 * ratio, 4 * ratio + 4)
    expected_deltas = head.rpn_reg.weight[channels].flatten(1) @ cell + head.rpn_reg.bias[channels]
    expected_logit = head.rpn_cls.weight[ratio].flatten() @ cell + head.rpn_cls.bias[ratio]
    assert torch.allclose(deltas[1, index], expected_deltas, atol=1e-5)
    assert torch.allclose(logits[1, index], expected_logit, atol=1e-5)


def naive_proposals(logits, deltas, anchors, size, pre_nms, post_nms):
    """One image, one box at a time."""
    kept = []
    for level in range(len(anchors)):
        order = logits[level].argsort(descending=True)[:pre_nms]
        boxes = decode(anchors[level][order], deltas[level][order], ONES, size)
        overlaps, chosen = (box_iou(boxes, boxes) > 0.7).tolist(), []  # without area the IoU is NaN: no overlap
        for i in range(len(order)):
            if not any(overlaps[i][j] for j in chosen):
                chosen.append(i)
        kept += [(boxes[i], logits[level][order[i]].sigmoid()) for i in chosen]
    kept.sort(key=lambda pair: -pair[1])
    return torch.stack([box for box, _ in kept[:post_nms]]), torch.stack([score for _, score in kept[:post_nms]])


@pytest.mark.parametrize("pre_nms, post_nms", [(60, 1000), (1000, 40)])
def test_proposals_of_a_naive_loop(pre_nms, post_nms):
    head, sizes = make(), [(96, 64), (70, 50)]
    logits, deltas, anchors = outputs(head)
    proposals = head.proposals(logits, deltas, anchors, sizes, pre_nms, post_nms)
    for i, (boxes, scores) in enumerate(proposals):
        expected = naive_proposals([x[i] for x in logits], [x[i] for x in deltas], anchors, sizes[i], pre_nms, post_nms)
        assert torch.equal(boxes, expected[0]) and torch.allclose(scores, expected[1])


def test_levels_do_not_suppress_each_other():
    head, box = make(), torch.tensor([[8.0, 8.0, 24.0, 24.0]]).repeat(3, 1)
    logits, deltas = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[6.0, 5.0, 4.0]])], [torch.zeros(1, 3, 4)] * 2
    (boxes, scores), = head.proposals(logits, deltas, [box, box], [(64, 64)], 10, 10)
    assert torch.equal(boxes, box[:2]) and torch.allclose(scores, torch.tensor([6.0, 3.0]).sigmoid())


def naive_valid(head, size, inside_only):
    """[(level, row, column, ratio)] of the anchors that an image is trained with, in their order."""
    h, w = (math.ceil(side / 32) * 32 for side in size)
    valid = []
    for level, (H, W) in enumerate(MAP_SIZES):
        stride = STRIDES[level]
        for row in range(H):
            for column in range(W):
                for ratio in (0.5, 1, 2):
                    side_x = 3 * stride / math.sqrt(ratio)
                    side_y = 3 * stride * math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    inside = (x - side_x / 2 >= 0 and y - side_y / 2 >= 0
                              and x + side_x / 2 < size[1] and y + side_y / 2 < size[0])
                    valid.append(y < h and x < w and (inside or not inside_only))
    return torch.tensor(valid)


@pytest.mark.parametrize("inside_only", [False, True])
@pytest.mark.parametrize("size", [(96, 64), (50, 33), (64, 32), (65, 20), (18, 64)])
def test_valid_anchors_of_a_naive_loop(size, inside_only):
    head = make(inside_only=inside_only)
    _, _, anchors = outputs(head)
    valid = head.valid(anchors, MAP_SIZES, size)
    assert torch.equal(valid, naive_valid(head, size, inside_only)) and valid.any()


@pytest.mark.parametrize("beta, inside_only", [(0.0, False), (1 / 9, True)])
def test_losses_of_a_naive_loop(beta, inside_only):
    head, sizes = make(beta, inside_only), [(96, 64), (60, 40)]
    logits, deltas, anchors = outputs(head)
    targets = [{"boxes": torch.tensor([[10.0, 20.0, 30.0, 45.0], [33.0, 3.0, 50.0, 28.0]])},
               {"boxes": torch.tensor([[4.0, 8.0, 22.0, 30.0]])}]
    losses = head.losses(logits, deltas, anchors, MAP_SIZES, sizes, targets)
    logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
    cls_loss, box_loss, count = 0.0, 0.0, 0
    for i, target in enumerate(targets):
        valid = naive_valid(head, sizes[i], inside_only).nonzero()[:, 0].tolist()
        iou = box_iou(anchors, target["boxes"])
        best = iou[valid].amax(0)
        for index in valid:
            closest = [g for g in range(len(best)) if iou[index, g] == best[g] and best[g] >= 0.3]
            max_iou, gt = iou[index].max(0)
            if not closest and 0.3 <= max_iou < 0.7:
                continue
            positive = closest or max_iou >= 0.7
            cls_loss += F.softplus(-logits[i, index] if positive else logits[i, index]).item()
            count += 1
            if positive:
                gt_box = target["boxes"][closest[-1] if closest else gt]
                wanted = encode(anchors[index:index + 1], gt_box[None], ONES)[0]
                for d in (deltas[i, index] - wanted).abs().tolist():
                    box_loss += d ** 2 / 2 / beta if d < beta else d - beta / 2
    assert losses["rpn_cls"].item() == pytest.approx(cls_loss / count, rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(box_loss / count, rel=1e-4) and box_loss > 0


def test_losses_are_means_over_the_sampled_anchors():
    head, gt_box = make(num_samples=8), torch.tensor([[10.0, 20.0, 30.0, 45.0]])
    logits, deltas, anchors = outputs(head, batch=1)
    zeros = [torch.zeros_like(x) for x in logits]
    losses = head.losses(zeros, deltas, anchors, MAP_SIZES, [(96, 64)], [{"boxes": torch.zeros(0, 4)}])
    assert losses["rpn_cls"].item() == pytest.approx(math.log(2)) and losses["rpn_box"].item() == 0
    separate = [torch.full_like(x, -50.0) for x in logits]
    for level, level_anchors in enumerate(anchors):  # confident where an object is: no loss
        separate[level][:, box_iou(level_anchors, gt_box)[:, 0] >= 0.3] = 50.0
    losses = head.losses(separate, deltas, anchors, MAP_SIZES, [(96, 64)], [{"boxes": gt_box}])
    assert losses["rpn_cls"].item() == pytest.approx(0, abs=1e-6) and losses["rpn_box"].item() > 0
