"""models/mask_rcnn.py: against the published numbers, and the behaviour of the whole detectors."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import create_model, load_weights
from models.mask_rcnn import FPN
from published import GOLDEN, assert_close, published_state

BACKBONE = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, patch_size=2, kernel_size=3)
TINY = dict(**BACKBONE, channels=8, hidden=16, anchor_scale=4, rpn_samples=16, roi_samples=8, num_classes=3)
NAMES = ["mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"]
LOSSES = {"rpn_cls": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox", "cls": "loss_cls", "box": "loss_bbox",
          "mask": "loss_mask"}  # our names and the published ones


def tiny(name="mask_rcnn_swin_t", attn="elsa", **overrides):
    torch.manual_seed(0)
    return create_model(name, attn=attn, **{**TINY, **overrides}).eval()


# Published numbers

@pytest.fixture(scope="module", params=["mask", "cascade"])
def published(request):
    name = {"mask": "mask_rcnn_swin_t", "cascade": "cascade_mask_rcnn_swin_t"}[request.param]
    model = load_weights(create_model(name, attn="elsa"), published_state(f"{request.param}_elsa_tiny_1x")).eval()
    model.roi_head.to(memory_format=torch.channels_last)  # of the same numbers: faster on a CPU
    return request.param, model


def golden_of(kind, image):
    """What an image's stages gave, by name, and its pixels and sizes."""
    with np.load(GOLDEN / "det_inputs.npz") as inputs, np.load(GOLDEN / f"det_{kind}_elsa_tiny_1x.npz") as golden:
        pixels = torch.tensor(inputs[f"{image}_img"])
        size, original_size = (tuple(inputs[f"{image}_{key}"][:2].tolist()) for key in ("img_shape", "ori_shape"))
        golden = {key[2:]: golden[key] for key in golden.files if key.startswith(f"{image}_")}
    return golden, pixels, size, original_size


def near(x, step, golden):
    H, W = x.shape[2:]
    return np.abs(x[0, ::step, ::max(1, H // 8), ::max(1, W // 8)].numpy() - golden).max() < 3e-5


@pytest.mark.parametrize("image", ["a", "b"])
def test_every_stage_equals_the_published_one(published, image, monkeypatch):
    kind, model = published
    if kind == "cascade" and image == "b":
        pytest.skip("a minute of convolutions on two cores that adds nothing to image a and Mask R-CNN on b")
    golden, pixels, size, original_size = golden_of(kind, image)
    outputs, rpn_proposals = {}, model.rpn_head.proposals
    parts = {"backbone": model.backbone, "neck": model.neck, "rpn": model.rpn_head}
    hooks = [part.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))
             for name, part in parts.items()]
    monkeypatch.setattr(model.rpn_head, "proposals", lambda *args: outputs.setdefault("rois", rpn_proposals(*args)))
    with torch.no_grad():
        detections, = model(pixels, [size], [original_size])
    for hook in hooks:
        hook.remove()
    for i, x in enumerate(outputs["backbone"]):
        assert near(x, x.shape[1] // 8, golden[f"backbone{i}_grid"])
    check_proposals(outputs, golden)
    for s, (box_head, _) in enumerate(model.roi_head.heads()):
        rois = torch.tensor(golden[f"rcnn{s}_rois"][:50])
        with torch.no_grad():
            pooled = model.roi_head.pool(outputs["neck"][:-1], [rois], 7)
            logits, deltas = box_head(pooled)
        assert np.abs(pooled[:20, ::32].numpy() - golden[f"rcnn{s}_roifeat_grid"]).max() < 3e-5
        assert_close("logits", torch.tensor(golden[f"rcnn{s}_cls_top50"]), logits, 1e-4)
        assert_close("deltas", torch.tensor(golden[f"rcnn{s}_reg_top50"]), deltas.flatten(1), 1e-4)
    check_detections(detections, golden)


def check_proposals(outputs, golden):
    logits, deltas = outputs["rpn"]
    for i, x in enumerate(outputs["neck"]):
        H, W = x.shape[2:]
        assert near(x, 32, golden[f"fpn{i}_grid"]) and x.shape == tuple(golden[f"fpn{i}_shape"])
        assert near(logits[i].reshape(1, H, W, 3).permute(0, 3, 1, 2), 1, golden[f"rpn_cls{i}_grid"])
        assert near(deltas[i].reshape(1, H, W, 12).permute(0, 3, 1, 2), 1, golden[f"rpn_reg{i}_grid"])
    (boxes, scores), = outputs["rois"]
    distances = (boxes[:, None] - torch.tensor(golden["proposals"][:, :4])).abs().amax(2)  # as sets
    assert len(boxes) == 1000
    assert all((distances.amin(dim) < 0.02).float().mean() >= 0.995 for dim in (0, 1))
    assert np.abs(np.sort(scores.numpy()) - np.sort(golden["proposals"][:, 4])).max() < 1e-5


def check_detections(detections, golden):
    assert np.array_equal(detections["labels"].numpy(), golden["det_labels"])
    assert np.abs(detections["boxes"].numpy() - golden["det_bboxes"][:, :4]).max() < 0.05
    assert np.abs(detections["scores"].numpy() - golden["det_bboxes"][:, 4]).max() < 1e-4
    n, H, W = golden["masks_shape"]
    expected = np.unpackbits(golden["masks_packed"], axis=1)[:, :H * W].reshape(n, H, W).astype(bool)
    masks = detections["masks"].numpy()
    assert masks.shape == expected.shape and (masks != expected).mean() <= 1e-4
    assert min((a & b).sum() / max(1, (a | b).sum()) for a, b in zip(masks, expected) if b.any()) >= 0.95


def loss_inputs():
    """Two images padded to one size, their sizes and their targets."""
    with np.load(GOLDEN / "loss_det_inputs.npz") as inputs:
        images, targets = torch.tensor(inputs["img"]), []
        for i in range(2):
            n, h, w = inputs[f"gt_masks_shape_{i}"]
            packed = np.unpackbits(inputs[f"gt_masks_packed_{i}"], axis=1)[:, :h * w].reshape(n, h, w)
            masks = torch.zeros(n, *images.shape[2:], dtype=torch.bool)
            masks[:, :h, :w] = torch.tensor(packed)
            boxes, labels = (torch.tensor(inputs[f"gt_{key}_{i}"]) for key in ("bboxes", "labels"))
            targets.append({"boxes": boxes, "labels": labels, "masks": masks})
        return images, [tuple(inputs[f"img_shape_{i}"][:2]) for i in range(2)], targets


@pytest.mark.parametrize("published", ["mask", pytest.param("cascade", marks=pytest.mark.slow)], indirect=True)
def test_losses_and_gradients_equal_the_published_ones(published):
    """Of the cascade most of the time are the twelve 3 x 3 convolutions of its box heads, on all 4,043 proposals."""
    kind, model = published
    expected = json.loads((GOLDEN / f"loss_det_{kind}_elsa_tiny_1x.json").read_text())
    norms = {name.replace("attn.rb", "attn.relative_position_bias_table"): numbers["l2"]
             for name, numbers in expected["grad"].items()}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in norms)  # the others' gradients take a quarter of the time
    model.rpn_head.num_samples = model.roi_head.num_samples = 10 ** 7  # all, so that nothing is drawn
    model.training = True  # of the model alone: everything in it goes on evaluating
    images, sizes, targets = loss_inputs()
    losses = model(images, sizes, targets=targets)
    model.training = False
    for name, loss in losses.items():
        stage = f"s{name[-1]}." if name[-1].isdigit() else ""
        number = expected["losses"][stage + LOSSES[name.rstrip("012")]]
        assert loss.item() == pytest.approx(sum(number) if isinstance(number, list) else number, rel=1e-5), name
    assert len(losses) == {"mask": 5, "cascade": 11}[kind]
    sum(losses.values()).backward()
    for name, norm in norms.items():
        assert parameters[name].grad.double().norm().item() == pytest.approx(norm, rel=1e-3), name
    assert len(norms) == {"mask": 17, "cascade": 29}[kind]
    model.zero_grad()
    model.requires_grad_(True)


@pytest.mark.parametrize("name, count", [
    ("mask_rcnn_swin_t", 48_647_226),
    ("mask_rcnn_swin_s", 72_380_874),
    ("cascade_mask_rcnn_swin_t", 86_482_428),
    ("cascade_mask_rcnn_swin_s", 110_216_076),
])
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, attn="elsa").parameters()) == count


# The models

def target(*objects, H=64, W=96):
    """Of (label, x0, y0, x1, y1) each, the mask filling the box."""
    masks = torch.zeros(len(objects), H, W, dtype=torch.bool)
    for i, (_, x0, y0, x1, y1) in enumerate(objects):
        masks[i, y0:y1, x0:x1] = True
    boxes = torch.tensor([box for _, *box in objects], dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor([label for label, *_ in objects], dtype=torch.int64), "masks": masks}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [
    [target(), target()],
    [target((0, 3, 4, 40, 30), (2, 50, 10, 90, 60)), target()],
    [target((1, 0, 0, 96, 64)), target((2, 10, 10, 12, 11))],
], ids=["empty", "one empty", "large and tiny"])
def test_training_on_any_number_of_objects(name, targets):
    model = tiny(name).train()
    losses = model(torch.randn(2, 3, 64, 96), [(64, 96), (50, 90)], targets=targets)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for p in model.parameters():  # all: ranks wait for each one's
        assert p.grad is not None and p.grad.isfinite().all()


@pytest.mark.parametrize("name, pre_nms, post_nms", [(NAMES[0], 2000, 1000), (NAMES[1], 2000, 2000)])
def test_training_proposals_are_as_many_as_published(name, pre_nms, post_nms, monkeypatch):
    model, limits = tiny(name), []
    rpn_proposals = model.rpn_head.proposals

    def spy(*args):
        limits.append(args[-2:])
        return rpn_proposals(*args)

    monkeypatch.setattr(model.rpn_head, "proposals", spy)
    model.train()(torch.randn(1, 3, 64, 96), [(64, 96)], targets=[target((1, 0, 0, 96, 64))])
    model.eval()(torch.randn(1, 3, 64, 96), [(64, 96)])
    assert limits == [(pre_nms, post_nms), (1000, 1000)]


def test_every_loss_of_the_cascade_reaches_the_backbone():
    model = tiny(NAMES[1]).train()
    losses = model(torch.randn(1, 3, 64, 96), [(64, 96)], targets=[target((0, 3, 4, 40, 30), (2, 50, 10, 90, 60))])
    assert list(losses) == ["rpn_cls", "rpn_box", *(f"{kind}{i}" for i in range(3) for kind in ("cls", "box", "mask"))]
    weight = model.backbone.patch_embed.proj.weight
    for name, loss in losses.items():
        gradient, = torch.autograd.grad(loss, weight, retain_graph=True)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("name", NAMES)
def test_one_at_a_time_equals_a_batch(name):
    model, images = tiny(name), torch.randn(2, 3, 64, 96)
    sizes, original_sizes = [(64, 96), (50, 90)], [(128, 192), (33, 61)]
    for i, size in enumerate(sizes):  # padding is zeros
        images[i, :, size[0]:], images[i, :, :, size[1]:] = 0, 0
    with torch.no_grad():
        together = model(images, sizes, original_sizes)
        for i in range(2):
            alone, = model(images[i:i + 1], sizes[i:i + 1], original_sizes[i:i + 1])
            assert len(alone["boxes"]) == len(together[i]["boxes"]) == 100  # untrained, it sees everything everywhere
            assert torch.allclose(alone["scores"], together[i]["scores"], atol=1e-5)
            assert alone["masks"].shape == (100, *original_sizes[i])


@settings(deadline=None, max_examples=10)
@given(H=st.integers(1, 70), W=st.integers(1, 70), attn=st.sampled_from(["window", "elsa"]))
def test_images_of_any_size(H, W, attn):
    detections, = tiny(attn=attn)(torch.randn(1, 3, H, W), [(H, W)])
    boxes, masks = detections["boxes"], detections["masks"]
    assert boxes.shape == (len(detections["scores"]), 4) and masks.shape == (len(boxes), H, W)
    assert (boxes >= 0).all() and (boxes <= torch.tensor([W, H, W, H])).all() and masks.dtype == torch.bool


def test_nothing_detected():
    model = tiny()
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.bias[-1] = 20
        detections, = model(torch.randn(1, 3, 64, 64), [(64, 64)], [(100, 90)])
    assert detections["boxes"].shape == (0, 4) and detections["masks"].shape == (0, 100, 90)
    assert detections["labels"].dtype == torch.int64


def test_detections_are_in_pixels_of_the_image_before_it_was_padded():
    model, images = tiny(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        detections, = model(images, [(50, 90)])
        doubled, = model(images, torch.tensor([[50, 90]]), torch.tensor([[100, 180]]))
    assert detections["masks"].shape[1:] == (50, 90) and doubled["masks"].shape[1:] == (100, 180)
    assert (detections["boxes"].amax(0) <= torch.tensor([90, 50, 90, 50])).all()
    assert torch.allclose(2 * detections["boxes"], doubled["boxes"], atol=1e-3)


def test_feature_pyramid_equals_its_definition():
    torch.manual_seed(0)
    neck = FPN((4, 6, 8), 5)
    maps = [torch.randn(2, dim, H, W) for dim, H, W in ((4, 9, 14), (6, 5, 7), (8, 3, 4))]
    levels = [torch.nn.functional.conv2d(x, conv.conv.weight, conv.conv.bias)
              for conv, x in zip(neck.lateral_convs, maps)]
    for fine, coarse in ((1, 2), (0, 1)):
        H, W = levels[fine].shape[2:]
        h, w = levels[coarse].shape[2:]
        rows, columns = torch.arange(H) * h // H, torch.arange(W) * w // W  # the nearest
        levels[fine] = levels[fine] + levels[coarse][:, :, rows][..., columns]
    levels = [torch.nn.functional.conv2d(x, conv.conv.weight, conv.conv.bias, padding=1)
              for conv, x in zip(neck.fpn_convs, levels)]
    levels.append(levels[-1][:, :, ::2, ::2])
    result = neck(maps)
    assert len(result) == 4
    for i, level in enumerate(levels):
        assert_close(f"level {i}", level, result[i], 1e-5)


def test_layers_start_as_published():
    model = tiny(NAMES[1], channels=64, hidden=128)
    rpn, box, mask = model.rpn_head, model.roi_head.bbox_head[1], model.roi_head.mask_head[2]
    fpn, fc, conv = model.neck.fpn_convs[0].conv.weight, box.shared_fcs[0].weight, mask.convs[0].conv.weight
    for name, weight, std in (
            ("rpn_conv", rpn.rpn_conv.weight, 0.01),
            ("rpn_reg", rpn.rpn_reg.weight, 0.01),
            ("fc_cls", box.fc_cls.weight, 0.01),
            ("fc_reg", box.fc_reg.weight, 0.001),
            ("fpn", fpn, (2 / (64 * 9 * 2)) ** 0.5),  # xavier
            ("fc", fc, (2 / (64 * 49 + 128)) ** 0.5),
            ("mask conv", conv, (2 / (64 * 9)) ** 0.5),  # kaiming, fan out
            ("upsample", mask.upsample.weight, (2 / (64 * 4)) ** 0.5)):
        assert abs(weight.std().item() / std - 1) < 5 / (2 * weight.numel()) ** 0.5, name  # five standard errors
    layers = (rpn.rpn_conv, box.fc_cls, box.fc_reg, box.shared_fcs[0], mask.upsample, model.neck.fpn_convs[0].conv)
    assert not any(layer.bias.any() for layer in layers)


def test_mistakes_are_named():
    model = tiny()
    with pytest.raises(ValueError, match="sizes has 2 entries for 1 images"):
        model(torch.randn(1, 3, 64, 64), [(64, 64), (64, 64)])
    with pytest.raises(ValueError, match="targets = None in training mode"):
        model.train()(torch.randn(1, 3, 64, 64), [(64, 64)])


def test_frozen_stages_are_not_trained():
    model = tiny(frozen_stages=2, drop_path_rate=0.5).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    stages = ("backbone.patch_embed", "backbone.layers.0", "backbone.layers.1")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(stages)}
    assert not model.backbone.layers[1].training and model.backbone.layers[2].training
