"""models/boxes.py: against the published numbers and against naive loops."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from models.boxes import MAX_LOG_RATIO, assign, decode, encode, sample, scale_factor
from published import assert_close, published_units

RCNN_STDS = (0.1, 0.1, 0.2, 0.2)
drawn_box = st.tuples(st.floats(0, 40), st.floats(0, 40), st.floats(0.5, 40), st.floats(0.5, 40))  # x, y, w, h


def as_boxes(drawn):
    return torch.tensor([(x, y, x + w, y + h) for x, y, w, h in drawn]).reshape(-1, 4)


# Coding

@pytest.mark.parametrize("stds, name", [
    ((1, 1, 1, 1), "rpn"),
    (RCNN_STDS, "rcnn"),
    ((0.05, 0.05, 0.1, 0.1), "c2"),
    ((0.033, 0.033, 0.067, 0.067), "c3"),
])
def test_box_coding_equals_the_published(stds, name):
    units = published_units()
    boxes, deltas = units["coder_rois"][:, None], units["coder_deltas"].reshape(-1, 3, 4)
    for size, key in ((units["coder_max_shape"].tolist(), "decode"), (None, "decode_noclip")):
        assert_close(key, units[f"coder_{key}_{name}"], decode(boxes, deltas, stds, size).flatten(1), 1e-6)
    if name == "rcnn":
        assert_close("encode", units["coder_encode_rcnn"], encode(boxes[:, 0], units["coder_gt"], stds), 1e-5)


@settings(deadline=None, max_examples=60)
@given(boxes=st.lists(st.tuples(drawn_box, drawn_box), min_size=1, max_size=6))
def test_decoding_reverses_encoding(boxes):
    boxes, gt_boxes = (as_boxes([pair[i] for pair in boxes]).double() for i in range(2))
    ratios = (gt_boxes[:, 2:] - gt_boxes[:, :2]) / (boxes[:, 2:] - boxes[:, :2])
    within = (ratios.log().abs() < MAX_LOG_RATIO).all(1)
    decoded = decode(boxes, encode(boxes, gt_boxes, RCNN_STDS), RCNN_STDS)
    assert torch.allclose(decoded[within], gt_boxes[within], atol=1e-6)


# Matching

def test_assignment_equals_the_published():
    units = published_units()
    thresholds = {"rpn": (0.7, 0.3, 0.3), "rcnn": (0.5, 0.5, 0.5), "casc1": (0.5, 0.5), "casc2": (0.6, 0.6),
                  "casc3": (0.7, 0.7)}
    for name, given_thresholds in thresholds.items():
        matched = assign(units["assign_boxes"], units["assign_gts"], *given_thresholds)
        assert torch.equal(matched, units[f"assign_inds_{name}"] - 1), name  # published: 0 background, -1 ignored


def test_thresholds_themselves_are_within():
    gt_boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    boxes = torch.tensor([[0.0, 0.0, 8.0, 4.0], [0.0, 0.0, 8.0, 2.0], [0.0, 0.0, 8.0, 1.0]])  # IoU 1/2, 1/4, 1/8
    assert assign(boxes, gt_boxes, 0.5, 0.25).tolist() == [0, -2, -1]
    assert assign(boxes, gt_boxes, 0.75, 0.75).tolist() == [-1, -1, -1]
    assert assign(boxes, gt_boxes, 0.75, 0.75, min_pos_iou=0.5).tolist() == [0, -1, -1]
    assert assign(boxes, gt_boxes, 0.75, 0.75, min_pos_iou=0.51).tolist() == [-1, -1, -1]


def naive_iou(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@settings(deadline=None, max_examples=60)
@given(boxes=st.lists(drawn_box, max_size=8), gt_boxes=st.lists(drawn_box, max_size=4), low_quality=st.booleans())
def test_assignment_of_a_naive_loop(boxes, gt_boxes, low_quality):
    boxes, gt_boxes = as_boxes(boxes), as_boxes(gt_boxes)
    matched = assign(boxes, gt_boxes, 0.5, 0.25, min_pos_iou=0.1 if low_quality else None).tolist()
    iou = [[naive_iou(box, gt_box) for gt_box in gt_boxes.tolist()] for box in boxes.tolist()]
    for i, row in enumerate(iou):
        best, closest = max(row, default=0), []
        for t in range(len(gt_boxes)):
            if low_quality and row[t] >= max(other[t] for other in iou) - 1e-5 and row[t] >= 0.1 - 1e-5:
                closest.append(t)
        if matched[i] >= 0:
            assert row[matched[i]] >= best - 1e-5 and best >= 0.5 - 1e-5 or matched[i] in closest
        else:
            assert best < 0.5 + 1e-5
            assert best < 0.25 + 1e-5 if matched[i] == -1 else best >= 0.25 - 1e-5
            assert not any(row[t] >= max(other[t] for other in iou) and row[t] > 0.1 + 1e-5 for t in closest)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 16), n=st.integers(0, 40), m=st.integers(0, 5), pairs=st.integers(1, 60),
       min_pos_iou=st.sampled_from([None, 0.0, 0.1, 0.5]))
def test_assignment_in_chunks_is_that_of_all_at_once(seed, n, m, pairs, min_pos_iou):
    """Of boxes on a coarse grid, so that many are equally close."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 5, (n + m, 2, 2), generator=generator).sort(1).values.flatten(1).float()
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        whole = assign(boxes[:n], boxes[n:], 0.5, 0.25, min_pos_iou)
        patch.setattr("models.boxes.MAX_PAIRS", pairs)
        patch.setattr("torchvision.ops.box_iou", lambda *both: sizes.append([*map(len, both)]) or box_iou(*both))
        assert torch.equal(assign(boxes[:n], boxes[n:], 0.5, 0.25, min_pos_iou), whole)
    assert all(gt * chunk <= pairs or chunk == 1 for gt, chunk in sizes)


def test_ties_between_chunks_are_all_matched_and_the_later_ground_truth_wins(monkeypatch):
    boxes = torch.tensor([[0.0, 0, 4, 2], [20, 20, 24, 24], [0, 2, 4, 4], [0, 0, 4, 1], [50, 50, 51, 51]])
    gt_boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [100, 100, 109, 109]])
    monkeypatch.setattr("models.boxes.MAX_PAIRS", 3)
    assert assign(boxes, gt_boxes, 0.7, 0.3, 0.3).tolist() == [1, -1, 1, -1, -1]


# Sampling

def test_samples_are_those_asked_for():
    matched = torch.tensor([0] * 30 + [-1] * 50 + [-2] * 20)
    pos, neg = sample(matched, 40, 0.25)
    assert len(pos) == 10 and len(neg) == 30 and (matched[pos] == 0).all() and (matched[neg] == -1).all()
    pos, neg = sample(matched[28:], 40, 0.25)
    assert len(pos) == 2 and len(neg) == 38 and len(neg.unique()) == 38


def test_samples_are_random_and_all_where_there_are_few():
    torch.manual_seed(0)
    matched = torch.tensor([0] * 30 + [-1] * 50 + [-2] * 20)
    drawn = torch.zeros(100)
    for _ in range(200):
        pos, neg = sample(matched, 40, 0.25)
        drawn[pos] += 1
        drawn[neg] += 1
    assert drawn[:30].min() > 30 and drawn[30:80].min() > 80 and not drawn[80:].any()  # of 67, 120 and 0 expected
    pos, neg = sample(matched, 1000, 0.5)
    assert pos.tolist() == list(range(30)) and neg.tolist() == list(range(30, 80))


def test_scales_are_those_along_each_axis():
    assert scale_factor((360, 240), (720, 240), "cpu").tolist() == [1, 0.5, 1, 0.5]
