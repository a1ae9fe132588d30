"""models/roi_heads.py: its parts against the published numbers, the stages against loops over boxes."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, generalized_box_iou_loss, roi_align

from models.boxes import decode, encode, scale_factor
from models.mask_rcnn import CascadeMaskRCNN, MaskRCNN
from models.roi_heads import MaskHead, RoIHead, mask_targets, paste_masks
from published import assert_close, published_units

STRIDES = (4, 8, 16, 32, 64)
CLASSES = 3
SIZES = [(64, 96), (50, 90)]


def make(cascade=False, num_samples=10 ** 6):
    torch.manual_seed(0)
    stages = (CascadeMaskRCNN if cascade else MaskRCNN).stages
    return RoIHead(stages, 4, 8, CLASSES, STRIDES, num_samples).eval()


def feature_maps(batch=2, H=64, W=96, channels=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, channels, H // s, W // s, generator=generator) for s in STRIDES[:4]]


# The parts against the published numbers

def test_pooling_equals_the_published():
    units, head = published_units(), make()
    maps, rois = [units[f"roi_feat{i}"] for i in range(4)], units["roi_rois"]
    order = torch.cat([(rois[:, 0] == i).nonzero()[:, 0] for i in range(2)])
    for side in (7, 14):
        pooled = head.pool(maps, [rois[rois[:, 0] == i, 1:] for i in range(2)], side)
        assert_close(f"side {side}", units[f"roi_out{side}"][order], pooled, 1e-5)


def test_the_largest_and_smallest_are_pooled_from_the_last_and_first_level():
    head, maps = make(), feature_maps(batch=1, H=1024, W=1024, channels=1)
    for level, box in ((3, [0.0, 0.0, 1000.0, 1020.0]), (0, [3.0, 4.0, 5.0, 6.0]), (0, [3.0, 4.0, 3.0, 4.0])):
        box = torch.tensor([box])
        expected = roi_align(maps[level], [box], 7, 1 / STRIDES[level], aligned=True)
        assert torch.equal(head.pool(maps, [box], 7), expected)


def test_pasting_equals_the_published():
    units = published_units()
    size = units["paste_hw"].tolist()
    assert torch.equal(paste_masks(units["paste_masks"], units["paste_boxes"], size), units["paste_bool_cpu"])


def test_mask_targets_equal_the_published():
    units = published_units()
    targets = mask_targets(units["mt_gt_masks"].bool(), units["mt_inds"], units["mt_boxes"])
    assert torch.equal(targets.byte(), units["mt_out28"])


def test_box_losses_of_units():
    units = published_units()
    losses = generalized_box_iou_loss(units["l_giou_pred"], units["l_giou_target"])
    assert_close("GIoU", units["l_giou_each"], losses, 1e-5)
    assert math.isclose(10 * losses.sum().item() / 60, units["l_giou_w10_avg60"].item(), rel_tol=1e-5)


@settings(deadline=None, max_examples=30)
@given(x0=st.floats(-20, 30), y0=st.floats(-20, 30), w=st.floats(0.3, 60), h=st.floats(0.3, 60),
       H=st.integers(1, 40), W=st.integers(1, 40), seed=st.integers(0, 99))
def test_pasting_is_bilinear_sampling(x0, y0, w, h, H, W, seed):
    boxes = torch.tensor([[x0, y0, x0 + w, y0 + h]])
    mask = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(seed))
    x0, y0, x1, y1 = boxes[0]
    rows = (torch.arange(H) + 0.5 - y0) / (y1 - y0) * 2 - 1
    columns = (torch.arange(W) + 0.5 - x0) / (x1 - x0) * 2 - 1
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    sampled = F.grid_sample(mask[None], torch.stack([u, v], -1)[None], align_corners=False)[0, 0]
    sure = (sampled - 0.5).abs() > 1e-4
    assert torch.equal(paste_masks(mask, boxes, (H, W))[0][sure], (sampled >= 0.5)[sure])


def test_masks_too_many_for_one_chunk_are_pasted_alike():
    masks, size = torch.rand(6, 28, 28), (1500, 1800)  # six chunks
    boxes = torch.tensor([[30.0, 40.0, 700.0, 300.0], [0.0, 0.0, 9.0, 5.0]]).repeat(3, 1)
    together = paste_masks(masks, boxes, size)
    alone = torch.cat([paste_masks(masks[i:i + 1], boxes[i:i + 1], size) for i in range(6)])
    assert torch.equal(together, alone) and together.any((1, 2)).all()


def test_mask_head_gives_the_logits_of_the_labels():
    torch.manual_seed(0)
    head, x = MaskHead(4, CLASSES), torch.randn(CLASSES, 4, 14, 14)
    maps = x
    for conv in head.convs:
        maps = F.conv2d(maps, conv.conv.weight, conv.conv.bias, padding=1).relu()
    maps = head.conv_logits(head.upsample(maps).relu())
    labels = torch.tensor([2, 0, 1])
    assert_close("logits", torch.stack([maps[0, 2], maps[1, 0], maps[2, 1]]), head(x, labels), 1e-6)


# Stages whose heads are played by tables

class BoxTable(torch.nn.Module):
    """Random logits and deltas for so many RoIs as it is asked."""

    def __init__(self, seed):
        super().__init__()
        self.seed, self.count = seed, []

    def forward(self, x):
        generator = torch.Generator().manual_seed(self.seed)
        self.count.append(len(x))
        return (2 * torch.randn(len(x), CLASSES + 1, generator=generator),
                torch.randn(len(x), CLASSES, 4, generator=generator))


class MaskTable(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def forward(self, x, labels):
        return torch.randn(len(x), 28, 28, generator=torch.Generator().manual_seed(self.seed)) + labels[:, None, None]


def with_tables(cascade, num_samples=10 ** 6):
    head = make(cascade, num_samples)
    if cascade:
        head.bbox_head = torch.nn.ModuleList(BoxTable(i) for i in range(3))
        head.mask_head = torch.nn.ModuleList(MaskTable(i) for i in range(3))
    else:
        head.bbox_head, head.mask_head = BoxTable(0), MaskTable(0)
    return head


@pytest.mark.parametrize("cascade", [False, True])
def test_objects_without_a_mask_have_no_weight_in_the_loss_of_masks_alone(cascade):
    head, maps = with_tables(cascade), feature_maps()
    head.mask_head = torch.nn.ModuleList(MaskHead(4, CLASSES) for _ in range(3)) if cascade else MaskHead(4, CLASSES)
    proposals = [random_boxes(40, seed=i, size=size) for i, size in enumerate(SIZES)]

    def losses(has_mask, first_mask):
        given_targets = targets()
        for target, flags in zip(given_targets, has_mask):
            target["has_mask"] = torch.tensor(flags)
        given_targets[0]["masks"][0] = first_mask
        return head.losses(maps, proposals, SIZES, given_targets)

    known, unknown = ([losses([[flag, True], [True]], mask) for mask in (False, True)] for flag in (True, False))
    plain = head.losses(maps, proposals, SIZES, [{**target} for target in targets()])
    every = losses([[True, True], [True]], targets()[0]["masks"][0])
    for name in plain:
        assert torch.equal(plain[name], every[name])
        if name.startswith("mask"):
            assert known[0][name] != known[1][name] and unknown[0][name] == unknown[1][name] > 0
            nothing = losses([[False, False], [False]], False)[name]
            assert nothing == 0 and nothing.requires_grad
        else:
            assert unknown[0][name] == plain[name]


def test_mask_targets_in_chunks_are_those_of_all_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(20, 1000, 1200, generator=generator) < 0.5  # two chunks
    matched, boxes = torch.randint(20, (50,), generator=generator), random_boxes(50, seed=3, size=(1000, 1200))
    rois = torch.cat([matched[:, None].float(), boxes], 1)
    whole = roi_align(masks[:, None].float(), rois, 28, aligned=True)[:, 0] >= 0.5
    chunks = []

    def pool(masks, rois, *size, **options):
        assert masks.numel() <= 1 << 24 and rois[:, 0].max() < len(masks)
        chunks.append(len(masks))
        return roi_align(masks, rois, *size, **options)
    monkeypatch.setattr("torchvision.ops.roi_align", pool)
    assert torch.equal(mask_targets(masks, matched, boxes), whole.float()) and chunks == [13, 7]
    assert mask_targets(masks[:0], matched[:0], boxes[:0]).shape == (0, 28, 28)
    monkeypatch.undo()
    large = torch.ones(1, 4097, 4096, dtype=torch.bool)  # more than a chunk by itself
    assert mask_targets(large, matched[:1] * 0, boxes[:1]).all()


def random_boxes(count, seed, size=(64, 96)):
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return (corners * torch.tensor([size[1], size[0]])).flatten(1)


def targets():
    """Of two images with two objects and one, whose masks are half of their boxes."""
    boxes = [torch.tensor([[3.0, 4.0, 40.0, 30.0], [50.0, 10.0, 90.0, 50.0]]), torch.tensor([[20.0, 10.0, 60.0, 44.0]])]
    masks = [torch.zeros(len(b), 64, 96, dtype=torch.bool) for b in boxes]
    for image, image_boxes in zip(masks, boxes):
        for mask, (x0, y0, x1, y1) in zip(image, image_boxes.int().tolist()):
            mask[y0:(y0 + y1) // 2, x0:x1] = True
    labels = [torch.tensor([2, 0]), torch.tensor([1])]
    return [{"boxes": b, "labels": c, "masks": m} for b, c, m in zip(boxes, labels, masks)]


@pytest.mark.parametrize("cascade", [False, True])
def test_losses_of_a_loop_over_the_stages(cascade):
    head, maps = with_tables(cascade), feature_maps()
    proposals = [random_boxes(40, seed=i, size=size) for i, size in enumerate(SIZES)]
    losses = head.losses(maps, proposals, SIZES, targets())
    assert len(losses) == 3 * len(head.stages)
    for s, stage in enumerate(head.stages):
        count, rois, labels, matches = 0, [], [], []
        for boxes, target in zip(proposals, targets()):
            boxes = torch.cat([target["boxes"], boxes])
            iou = box_iou(boxes, target["boxes"])
            max_iou, matched = iou.max(1)
            matched = torch.where(max_iou >= stage.iou_threshold, matched, -1)
            order = torch.cat([(matched >= 0).nonzero()[:, 0], (matched < 0).nonzero()[:, 0]])  # positives first
            rois.append((boxes[order], order >= len(target["boxes"])))
            matches.append(matched[order])
            labels.append(torch.where(matches[-1] >= 0, target["labels"][matches[-1]], CLASSES))
            count += len(order)
        logits, deltas = BoxTable(s)(torch.zeros(count, 1))
        number = s if cascade else ""
        expected = stage.weight * F.cross_entropy(logits, torch.cat(labels))
        assert_close(f"cls{number}", expected, losses[f"cls{number}"], 1e-5)
        box_loss, masks, mask_labels = 0.0, [], []
        per_image = zip(rois, matches, labels, deltas.split([len(m) for m in matches]), targets())
        for (boxes, _), matched, classes, moved, target in per_image:
            for i in (matched >= 0).nonzero()[:, 0].tolist():
                gt_box, delta = target["boxes"][matched[i:i + 1]], moved[i:i + 1, classes[i]]
                if cascade:
                    box_loss += 10 * generalized_box_iou_loss(decode(boxes[i:i + 1], delta, stage.stds), gt_box).sum()
                else:
                    box_loss += (delta - encode(boxes[i:i + 1], gt_box, stage.stds)).abs().sum()
                masks.append(mask_targets(target["masks"], matched[i:i + 1], boxes[i:i + 1]))
                mask_labels.append(classes[i])
        assert_close(f"box{number}", stage.weight * box_loss / count, losses[f"box{number}"], 1e-5)
        logits_of_masks = MaskTable(s)(torch.zeros(len(masks), 1), torch.stack(mask_labels))
        expected = stage.weight * F.binary_cross_entropy_with_logits(logits_of_masks, torch.cat(masks))
        assert_close(f"mask{number}", expected, losses[f"mask{number}"], 1e-5)

        classes = torch.where(torch.cat(labels) < CLASSES, torch.cat(labels), logits[:, :CLASSES].argmax(1))
        moved = deltas[torch.arange(count), classes].split([len(m) for m in matches])
        proposals = [decode(boxes, d, stage.stds, size)[proposed]
                     for (boxes, proposed), d, size in zip(rois, moved, SIZES)]


def test_samples_keep_the_proportion_and_know_the_ground_truth():
    torch.manual_seed(0)
    head, target = make(num_samples=16), targets()[0]
    near = target["boxes"].repeat(10, 1) + torch.rand(20, 4)
    samples = head.sample(torch.cat([near, random_boxes(40, 0) / 10]), target, head.stages[0])
    assert len(samples.rois) == 16 and len(samples.gt_boxes) == len(samples.gt_masks) == 4  # a quarter
    assert (samples.labels[:4] < CLASSES).all() and (samples.labels[4:] == CLASSES).all()
    assert (box_iou(samples.rois[:4], samples.gt_boxes).diag() > 0.8).all()
    assert [label.item() for label in samples.labels[:4]] == [2 if box[0] == 3 else 0 for box in samples.gt_boxes]
    everything = make().sample(near, target, head.stages[0])
    assert torch.equal(everything.is_gt, torch.tensor([True] * 2 + [False] * 20))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
             "masks": torch.zeros(0, 64, 96, dtype=torch.bool)}
    samples = head.sample(near, empty, head.stages[0])
    assert (samples.labels == CLASSES).all() and len(samples.rois) == 16 and samples.gt_masks.shape == (0, 28, 28)


@pytest.mark.parametrize("cascade, labels", [(False, [0, 1, 0, 1]), (True, [0, 1, 1, 1])])
def test_proposals_are_matched_without_the_ground_truth_among_them(cascade, labels):
    """Two objects share most of their pixels. One proposal, the best of the first object, overlaps the second more."""
    target = {"boxes": torch.tensor([[0.0, 0, 40, 40], [0, 4, 40, 44]]), "labels": torch.tensor([0, 1]),
              "masks": torch.ones(2, 64, 96, dtype=torch.bool)}
    proposals = torch.tensor([[0.0, 3, 40, 43], [0, 4, 40, 44]])
    head = make(cascade)
    samples = head.sample(proposals, target, head.stages[0])
    assert samples.labels.tolist() == labels and samples.is_gt.tolist() == [True, True, False, False]
    assert torch.equal(samples.gt_boxes, target["boxes"][labels])
    assert torch.equal(samples.rois, torch.cat([target["boxes"], proposals]))
    none = head.sample(proposals[:0], target, head.stages[0])
    assert none.labels.tolist() == [0, 1] and none.is_gt.all()


@pytest.mark.parametrize("cascade", [False, True])
def test_detections_of_a_loop_over_boxes(cascade):
    head, maps, originals = with_tables(cascade), feature_maps(), [(128, 96), (33, 61)]
    proposals = [random_boxes(60, seed=i, size=size) for i, size in enumerate(SIZES)]
    proposals[0][:3, 3] = 0  # ends at the upper border
    detections = head.detections(maps, proposals, SIZES, originals)
    rois, total = proposals, 0
    for s, stage in enumerate(head.stages):
        logits, deltas = BoxTable(s)(torch.zeros(120, 1))
        total = total + logits
        if s + 1 < len(head.stages):
            moved = deltas[torch.arange(120), logits[:, :CLASSES].argmax(1)].split(60)
            rois = [decode(boxes, d, stage.stds, size) for boxes, d, size in zip(rois, moved, SIZES)]
    scores = (total / len(head.stages)).softmax(1)
    for i, image in enumerate(detections):
        ratio = scale_factor(SIZES[i], originals[i], "cpu")
        candidates = []
        for n in range(60):
            for label in range(CLASSES):
                score = scores[60 * i + n, label].item()
                box = decode(rois[i][n], deltas[60 * i + n, label], stage.stds, SIZES[i]) / ratio
                if score > 0.05 and (cascade or rois[i][n, 3] != 0):
                    candidates.append((score, label, box))
        kept = []
        for score, label, box in sorted(candidates, key=lambda candidate: -candidate[0]):
            if not any(label == other and box_iou(box[None], kept_box[None]) > 0.5 for _, other, kept_box in kept):
                kept.append((score, label, box))
        kept = kept[:100]
        assert image["labels"].tolist() == [label for _, label, _ in kept]
        assert torch.allclose(image["scores"], torch.tensor([score for score, _, _ in kept]))
        assert torch.allclose(image["boxes"], torch.stack([box for _, _, box in kept]), atol=1e-4)
    assert len(detections[0]["labels"]) == 100 or len(detections[1]["labels"]) == 100  # the limit is reached

    labels = torch.cat([image["labels"] for image in detections])
    probabilities = [MaskTable(s)(torch.zeros(len(labels), 1), labels).sigmoid() for s in range(len(head.stages))]
    probabilities = (sum(probabilities) / len(probabilities)).split([len(image["labels"]) for image in detections])
    for image, masks, size in zip(detections, probabilities, originals):
        assert torch.equal(image["masks"], paste_masks(masks, image["boxes"], size))


def test_masks_are_pooled_from_the_resized_image():
    head, maps, pooled = make(), feature_maps(), []
    head.mask_head.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    head.bbox_head = BoxTable(0)
    proposals = [random_boxes(5, seed=i, size=size) for i, size in enumerate(SIZES)]
    originals = [(128, 96), (33, 61)]
    detections = head.detections(maps, proposals, SIZES, originals)
    rois = [image["boxes"] * scale_factor(*sizes, "cpu") for image, *sizes in zip(detections, SIZES, originals)]
    assert len(pooled) == 1 and torch.equal(pooled[0], head.pool(maps, rois, 14))


def test_what_scores_the_threshold_itself_is_no_detection(monkeypatch):
    head, maps = with_tables(cascade=True), feature_maps()
    proposals = [random_boxes(5, seed=i, size=size) for i, size in enumerate(SIZES)]
    scores = head.detections(maps, proposals, SIZES, SIZES)[0]["scores"]
    monkeypatch.setattr("models.roi_heads.SCORE_THRESHOLD", scores[2].item())
    assert torch.equal(head.detections(maps, proposals, SIZES, SIZES)[0]["scores"], scores[:2])
