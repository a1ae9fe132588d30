"""models/mask_rcnn.py against the published numbers, its parts against naive loops."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import create_model, load_weights
from models.mask_rcnn import LONGEST, assign, decode, encode, mask_targets, paste, sample, scale_of
from published import GOLDEN, assert_close, published_state

BACKBONE = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, patch_size=2, kernel_size=3)
TINY = dict(**BACKBONE, channels=8, hidden=16, anchor_scale=4, rpn_samples=16, roi_samples=8, num_classes=3)


def tiny(name="mask_rcnn_swin_t", attn="elsa", **overrides):
    torch.manual_seed(0)
    return create_model(name, attn=attn, **{**TINY, **overrides}).eval()


# Published numbers

@pytest.fixture(scope="module", params=["mask", "cascade"])
def published(request):
    name = {"mask": "mask_rcnn_swin_t", "cascade": "cascade_mask_rcnn_swin_t"}[request.param]
    model = load_weights(create_model(name, attn="elsa"), published_state(f"{request.param}_elsa_tiny_1x")).eval()
    with np.load(GOLDEN / "det_inputs.npz") as inputs, np.load(GOLDEN / f"det_{request.param}_elsa_tiny_1x.npz") as golden:
        return request.param, model, dict(inputs), dict(golden)


def near(x, step, golden):
    H, W = x.shape[2:]
    return np.abs(x[0, ::step, ::max(1, H // 8), ::max(1, W // 8)].numpy() - golden).max() < 3e-5


@pytest.mark.parametrize("image", ["a", "b"])
def test_every_stage_equals_the_published_one(published, image):
    kind, model, inputs, golden = published
    if kind == "cascade" and image == "b":
        pytest.skip("a minute of convolutions on two cores that adds nothing to image a and Mask R-CNN on b")
    golden = {key[2:]: value for key, value in golden.items() if key.startswith(image)}
    x, size, original = (torch.tensor(inputs[f"{image}_{key}"]) for key in ("img", "img_shape", "ori_shape"))
    size, original = tuple(size[:2].tolist()), tuple(original[:2].tolist())
    with torch.no_grad():
        maps = model.backbone(x)
        assert all(near(y, y.shape[1] // 8, golden[f"backbone{i}_grid"]) for i, y in enumerate(maps))
        pyramid = model.neck(maps)
        assert all(near(y, 32, golden[f"fpn{i}_grid"]) and y.shape == tuple(golden[f"fpn{i}_shape"]) for i, y in enumerate(pyramid))
        objectness, deltas = model.rpn_head(pyramid)
        for i, y in enumerate(pyramid):
            H, W = y.shape[2:]
            assert near(objectness[i].reshape(1, H, W, 3).permute(0, 3, 1, 2), 1, golden[f"rpn_cls{i}_grid"])
            assert near(deltas[i].reshape(1, H, W, 12).permute(0, 3, 1, 2), 1, golden[f"rpn_reg{i}_grid"])
        anchors = [model.anchors(level, *y.shape[2:], y.device) for level, y in enumerate(pyramid)]
        boxes, scores = model.proposals(objectness, deltas, anchors, [size], 1000, 1000)[0]
        distance = (boxes[:, None] - torch.tensor(golden["proposals"][:, :4])).abs().amax(2)  # as sets
        assert len(boxes) == 1000 and (distance.amin(1) < 0.02).float().mean() >= 0.995 and (distance.amin(0) < 0.02).float().mean() >= 0.995
        assert np.abs(np.sort(scores.numpy()) - np.sort(golden["proposals"][:, 4])).max() < 1e-5

        for s, (box_head, _) in enumerate(model.roi_head.heads()):
            pooled = model.pool(pyramid[:-1], [torch.tensor(golden[f"rcnn{s}_rois"][:50])], 7)
            assert np.abs(pooled[:20, ::32].numpy() - golden[f"rcnn{s}_roifeat_grid"]).max() < 3e-5
            logits, moves = box_head(pooled)
            assert_close("logits", torch.tensor(golden[f"rcnn{s}_cls_top50"]), logits, 1e-4)
            assert_close("deltas", torch.tensor(golden[f"rcnn{s}_reg_top50"]), moves.flatten(1), 1e-4)

        found = model(x, [size], [original])[0]
    assert np.array_equal(found["labels"].numpy(), golden["det_labels"])
    assert np.abs(found["boxes"].numpy() - golden["det_bboxes"][:, :4]).max() < 0.05
    assert np.abs(found["scores"].numpy() - golden["det_bboxes"][:, 4]).max() < 1e-4
    n, H, W = golden["masks_shape"]
    masks = np.unpackbits(golden["masks_packed"], axis=1)[:, :H * W].reshape(n, H, W).astype(bool)
    ours = found["masks"].numpy()
    assert ours.shape == masks.shape and (ours != masks).mean() <= 1e-4
    assert min((a & b).sum() / max(1, (a | b).sum()) for a, b in zip(ours, masks) if b.any()) >= 0.95


def test_losses_and_gradients_equal_the_published_ones(published):
    kind, model, _, _ = published
    expected = json.loads((GOLDEN / f"loss_det_{kind}_elsa_tiny_1x.json").read_text())
    with np.load(GOLDEN / "loss_det_inputs.npz") as inputs:
        images = torch.tensor(inputs["img"])
        sizes = [tuple(inputs[f"img_shape_{i}"][:2]) for i in range(2)]
        targets = []
        for i in range(2):
            n, h, w = inputs[f"gt_masks_shape_{i}"]
            masks = torch.zeros(n, *images.shape[2:], dtype=torch.bool)
            masks[:, :h, :w] = torch.tensor(np.unpackbits(inputs[f"gt_masks_packed_{i}"], axis=1)[:, :h * w].reshape(n, h, w))
            targets.append({"boxes": torch.tensor(inputs[f"gt_bboxes_{i}"]), "labels": torch.tensor(inputs[f"gt_labels_{i}"]), "masks": masks})
    compared = {name.replace("attn.rb", "attn.relative_position_bias_table"): numbers for name, numbers in expected["grad"].items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in compared)  # the others' gradients take a quarter of the time
    model.rpn_samples = model.roi_samples = 10 ** 7  # all, so that nothing is drawn
    model.training = True  # of the model alone: everything in it goes on evaluating
    losses = model(images, sizes, targets=targets)
    model.training = False
    for name, loss in losses.items():
        stage = f"s{name[-1]}." if name[-1].isdigit() else ""
        published_name = {"rpn_cls": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox", "cls": "loss_cls", "box": "loss_bbox", "mask": "loss_mask"}
        number = expected["losses"][stage + published_name[name.rstrip("012")]]
        assert loss.item() == pytest.approx(sum(number) if isinstance(number, list) else number, rel=1e-5), name
    assert len(losses) == {"mask": 5, "cascade": 11}[kind]
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, numbers in compared.items():
        assert gradients[name].double().norm().item() == pytest.approx(numbers["l2"], rel=1e-3), name
    assert len(compared) == {"mask": 17, "cascade": 29}[kind]
    model.zero_grad()
    model.requires_grad_(True)


@pytest.mark.parametrize("name, count", [("mask_rcnn_swin_t", 48_647_226), ("mask_rcnn_swin_s", 72_380_874),
                                         ("cascade_mask_rcnn_swin_t", 86_482_428), ("cascade_mask_rcnn_swin_s", 110_216_076)])
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, attn="elsa").parameters()) == count


@pytest.fixture(scope="module")
def units():
    with np.load(GOLDEN / "det_units.npz") as file:
        return {key: torch.tensor(value) for key, value in file.items()}


def test_anchors_equal_the_published_ones(units):
    model = tiny(patch_size=4, anchor_scale=8)
    for level, (H, W) in enumerate(units["anchor_sizes"].tolist()):
        assert_close("anchors", units[f"anchor_lvl{level}"], model.anchors(level, H, W, "cpu"), 1e-6)


@pytest.mark.parametrize("stds, name", [((1, 1, 1, 1), "rpn"), ((0.1, 0.1, 0.2, 0.2), "rcnn"), ((0.05, 0.05, 0.1, 0.1), "c2"),
                                        ((0.033, 0.033, 0.067, 0.067), "c3")])
def test_box_coding_equals_the_published(units, stds, name):
    boxes, deltas = units["coder_rois"][:, None], units["coder_deltas"].reshape(-1, 3, 4)
    for size, key in ((units["coder_max_shape"].tolist(), "decode"), (None, "decode_noclip")):
        assert_close(key, units[f"coder_{key}_{name}"], decode(boxes, deltas, stds, size).flatten(1), 1e-6)
    if name == "rcnn":
        assert_close("encode", units["coder_encode_rcnn"], encode(boxes[:, 0], units["coder_gt"], stds), 1e-5)


def test_pooling_equals_the_published(units):
    model, maps = tiny(patch_size=4), [units[f"roi_feat{i}"] for i in range(4)]
    rois = units["roi_rois"]
    order = torch.cat([(rois[:, 0] == i).nonzero()[:, 0] for i in range(2)])
    for side in (7, 14):
        pooled = model.pool(maps, [rois[rois[:, 0] == i, 1:] for i in range(2)], side)
        assert_close(f"side {side}", units[f"roi_out{side}"][order], pooled, 1e-5)


def test_assignment_equals_the_published(units):
    boxes, truth = units["assign_boxes"], units["assign_gts"]
    for name, limits in (("rpn", (0.7, 0.3, 0.3)), ("rcnn", (0.5, 0.5, 0.5)), ("casc1", (0.5, 0.5)), ("casc2", (0.6, 0.6)), ("casc3", (0.7, 0.7))):
        assert torch.equal(assign(boxes, truth, *limits), units[f"assign_inds_{name}"] - 1), name  # published: 0 background, -1 neither


def test_pasting_equals_the_published(units):
    size = units["paste_hw"].tolist()
    assert torch.equal(paste(units["paste_masks"], units["paste_boxes"], size), units["paste_bool_cpu"])


def test_mask_targets_equal_the_published(units):
    ours = mask_targets(units["mt_gt_masks"].bool(), units["mt_inds"], units["mt_boxes"])
    assert torch.equal(ours.byte(), units["mt_out28"])


# Parts against naive loops

corners = st.tuples(st.floats(0, 40), st.floats(0, 40), st.floats(0.5, 40), st.floats(0.5, 40))


def as_boxes(drawn):
    return torch.tensor([(x, y, x + w, y + h) for x, y, w, h in drawn]).reshape(-1, 4)


def naive_iou(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@settings(deadline=None, max_examples=60)
@given(boxes=st.lists(corners, max_size=8), truth=st.lists(corners, max_size=4), low_quality=st.booleans())
def test_assignment_of_a_naive_loop(boxes, truth, low_quality):
    boxes, truth = as_boxes(boxes), as_boxes(truth)
    matched = assign(boxes, truth, 0.5, 0.25, lowest=0.1 if low_quality else None).tolist()
    iou = [[naive_iou(b, t) for t in truth.tolist()] for b in boxes.tolist()]
    for i, row in enumerate(iou):
        best = max(row, default=0)
        closest = [t for t in range(len(truth)) if low_quality and row[t] >= max(other[t] for other in iou) - 1e-5 and row[t] >= 0.1 - 1e-5]
        if matched[i] >= 0:
            assert row[matched[i]] >= best - 1e-5 and best >= 0.5 - 1e-5 or matched[i] in closest
        else:
            assert best < 0.5 + 1e-5 and (best < 0.25 + 1e-5 if matched[i] == -1 else best >= 0.25 - 1e-5)


@settings(deadline=None, max_examples=60)
@given(boxes=st.lists(st.tuples(corners, corners), min_size=1, max_size=6))
def test_decoding_reverses_encoding(boxes):
    start, wanted = (as_boxes([pair[i] for pair in boxes]).double() for i in range(2))
    stds = (0.1, 0.1, 0.2, 0.2)
    ratio = ((wanted[:, 2:] - wanted[:, :2]) / (start[:, 2:] - start[:, :2])).log().abs()
    within = (ratio < LONGEST).all(1)
    assert torch.allclose(decode(start, encode(start, wanted, stds), stds)[within], wanted[within], atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(box=st.tuples(st.floats(-20, 30), st.floats(-20, 30), st.floats(0.3, 60), st.floats(0.3, 60)), H=st.integers(1, 40), W=st.integers(1, 40),
       seed=st.integers(0, 99))
def test_pasting_is_bilinear_sampling(box, H, W, seed):
    boxes, mask = as_boxes([box]), torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(seed))
    x0, y0, x1, y1 = boxes[0]
    v, u = torch.meshgrid((torch.arange(H) + 0.5 - y0) / (y1 - y0) * 2 - 1, (torch.arange(W) + 0.5 - x0) / (x1 - x0) * 2 - 1, indexing="ij")
    sampled = F.grid_sample(mask[None], torch.stack([u, v], -1)[None], align_corners=False)[0, 0]
    sure = (sampled - 0.5).abs() > 1e-4
    assert torch.equal(paste(mask, boxes, (H, W))[0][sure], (sampled >= 0.5)[sure])


def test_samples_are_those_asked_for():
    matched = torch.tensor([0] * 30 + [-1] * 50 + [-2] * 20)
    positive, negative = sample(matched, 40, 0.25)
    assert len(positive) == 10 and len(negative) == 30 and (matched[positive] == 0).all() and (matched[negative] == -1).all()
    positive, negative = sample(matched[28:], 40, 0.25)
    assert len(positive) == 2 and len(negative) == 38 and len(negative.unique()) == 38


def test_scales_are_those_along_each_axis():
    assert scale_of((360, 240), (720, 240), "cpu").tolist() == [1, 0.5, 1, 0.5]


# The models

def target(*objects, H=64, W=96):
    """Of (label, x0, y0, x1, y1) each, the mask filling the box."""
    masks = torch.zeros(len(objects), H, W, dtype=torch.bool)
    for i, (_, x0, y0, x1, y1) in enumerate(objects):
        masks[i, y0:y1, x0:x1] = True
    return {"boxes": torch.tensor([box for _, *box in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for label, *_ in objects], dtype=torch.int64), "masks": masks}


@pytest.mark.parametrize("name", ["mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"])
@pytest.mark.parametrize("targets", [[target(), target()], [target((0, 3, 4, 40, 30), (2, 50, 10, 90, 60)), target()],
                                     [target((1, 0, 0, 96, 64)), target((2, 10, 10, 12, 11))]], ids=["empty", "one empty", "large and tiny"])
def test_training_on_any_number_of_objects(name, targets):
    model = tiny(name).train()
    losses = model(torch.randn(2, 3, 64, 96), [(64, 96), (50, 90)], targets=targets)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())  # all: ranks wait for each one's


@pytest.mark.parametrize("name", ["mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"])
def test_one_at_a_time_equals_a_batch(name):
    model, images = tiny(name), torch.randn(2, 3, 64, 96)
    sizes = [(64, 96), (50, 90)]
    for i, size in enumerate(sizes):  # padding is zeros
        images[i, :, size[0]:], images[i, :, :, size[1]:] = 0, 0
    with torch.no_grad():
        together = model(images, sizes, [(128, 192), (33, 61)])
        for i in range(2):
            alone = model(images[i:i + 1], sizes[i:i + 1], [[(128, 192), (33, 61)][i]])[0]
            assert len(alone["boxes"]) == len(together[i]["boxes"]) == 100  # an untrained model finds everything everywhere
            assert torch.allclose(alone["scores"], together[i]["scores"], atol=1e-5)
            assert alone["masks"].shape == (100, *[(128, 192), (33, 61)][i])


@settings(deadline=None, max_examples=10)
@given(H=st.integers(1, 70), W=st.integers(1, 70), attn=st.sampled_from(["window", "elsa"]))
def test_images_of_any_size(H, W, attn):
    found, = tiny(attn=attn)(torch.randn(1, 3, H, W), [(H, W)])
    assert found["boxes"].shape == (len(found["scores"]), 4) and found["masks"].shape == (len(found["scores"]), H, W)
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([W, H, W, H])).all() and found["masks"].dtype == torch.bool


def test_nothing_found():
    model = tiny()
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.bias[-1] = 20
        found, = model(torch.randn(1, 3, 64, 64), [(64, 64)], [(100, 90)])
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 100, 90) and found["labels"].dtype == torch.int64


def test_mistakes_are_named():
    model = tiny()
    with pytest.raises(ValueError, match="sizes has 2 entries for 1 images"):
        model(torch.randn(1, 3, 64, 64), [(64, 64), (64, 64)])
    with pytest.raises(ValueError, match="targets = None in training mode"):
        model.train()(torch.randn(1, 3, 64, 64), [(64, 64)])


def test_frozen_stages_are_not_trained():
    model = tiny(frozen_stages=2, drop_path_rate=0.5).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(("backbone.patch_embed", "backbone.layers.0", "backbone.layers.1")) for name in frozen)
    assert not model.backbone.layers[1].training and model.backbone.layers[2].training


def test_a_classifiers_file_fills_the_backbone_and_other_classes_keep_their_heads():
    model, classifier = tiny(), create_model("swin_t", attn="elsa", **BACKBONE)
    load_weights(model, classifier.state_dict())
    assert torch.equal(model.backbone.layers[1].blocks[0].mlp.fc1.weight, classifier.layers[1].blocks[0].mlp.fc1.weight)
    for name in ("mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"):
        other = tiny(name, num_classes=5)
        with pytest.raises(ValueError, match="wrong shape: roi_head.bbox_head"):
            load_weights(other, tiny(name).state_dict())
        load_weights(other, tiny(name).state_dict(), classifier=False)


def test_box_losses_of_units(units):
    from torchvision.ops import generalized_box_iou_loss
    each = generalized_box_iou_loss(units["l_giou_pred"], units["l_giou_target"])
    assert_close("GIoU", units["l_giou_each"], each, 1e-5)
    assert math.isclose(10 * each.sum().item() / 60, units["l_giou_w10_avg60"].item(), rel_tol=1e-5)
