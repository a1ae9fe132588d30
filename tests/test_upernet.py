"""models/upernet.py: against the published numbers, and by itself."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import ade20k
from models import create_model, load_weights, upernet
from models.swin import Backbone
from published import GOLDEN, assert_close, published_state
from train import segmentation

BACKBONE = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, patch_size=2, kernel_size=3)


def tiny(attn="elsa"):
    torch.manual_seed(0)
    heads = dict(channels=8, auxiliary_channels=6, num_classes=5)
    return create_model("upernet_swin_t", attn=attn, **BACKBONE, **heads).eval()


# Published numbers

@pytest.fixture(scope="module")
def published():
    name = "upernet_elsa_tiny_160k"
    model = load_weights(create_model("upernet_swin_t", attn="elsa"), published_state(name)).eval()
    with np.load(GOLDEN / "seg_inputs.npz") as inputs, np.load(GOLDEN / f"seg_{name}.npz") as golden:
        return model, dict(inputs), dict(golden)


@pytest.fixture(scope="module")
def seen_once(published):
    """The published model, which looks at each image once and remembers its coarse logits."""
    model, seen = published[0], {}

    def forward(x, coarse=False):
        key = (x.shape, x.numpy().tobytes())
        if key not in seen:
            seen[key] = model(x, coarse=True)
        return seen[key] if coarse else upernet.resize(seen[key], x.shape[2:])
    return forward


def subsample(x, step):
    H, W = x.shape[2:]
    return x[0, ::step, ::max(1, H // 8), ::max(1, W // 8)].numpy()


def near(ours, golden, error=3e-5):
    return np.abs(ours - golden).max() < error


def differing(probabilities, golden, prefix):
    """Pixels whose class is another one than the published, where the published choice was no matter of rounding."""
    classes = golden[f"{prefix}_pred"]
    stable = np.unpackbits(golden[f"{prefix}_stable_packed"])[:classes.size].reshape(classes.shape).astype(bool)
    return int((probabilities.argmax(0).numpy() != classes)[stable].sum())


@pytest.mark.parametrize("image", ["a", "b"])
def test_maps_logits_and_classes_equal_the_published_ones(published, seen_once, image):
    model, inputs, golden = published
    x, size = torch.tensor(inputs[f"{image}_img"]), [int(n) for n in inputs[f"{image}_ori_shape"][:2]]
    stages = {}
    hooks = [part.register_forward_hook(lambda part, given, out, name=name: stages.update({name: out}))
             for name, part in (("maps", model.backbone), ("logits", model.decode_head))]
    with torch.no_grad():
        whole = seen_once(x)
        for hook in hooks:
            hook.remove()
        maps, logits = stages["maps"], stages["logits"]
        for i, y in enumerate(maps):
            assert near(subsample(y, y.shape[1] // 8), golden[f"{image}_backbone{i}_grid"])
        assert tuple(logits.shape) == tuple(golden[f"{image}_decode_shape"])
        assert near(subsample(logits, 10), golden[f"{image}_decode_grid"])
        assert near(subsample(model.auxiliary_head(maps[-2]), 10), golden[f"{image}_aux_grid"])
        full = F.interpolate(whole, size, mode="bilinear")
        assert near(full[0, ::10, ::32, ::32].numpy(), golden[f"{image}_full_grid"])
        probabilities = shown(seen_once, [(x[0], False)], size)
        assert torch.allclose(probabilities, full.softmax(1)[0])
    assert differing(probabilities, golden, image) == 0


def shown(*given):
    return torch.cat([strip for _, strip in ade20k.predict(*given)], 1)


@pytest.mark.parametrize("flip, prefix", [(False, "t_ms"), (True, "t_msflip")])
def test_multi_scale_predictions_equal_the_published_ones(published, seen_once, flip, prefix):
    _, inputs, golden = published
    views = [(torch.tensor(inputs[f"t_img{i}"])[0], False) for i in range(6)]
    if flip:
        views = [shown for image, _ in views for shown in ((image, False), (image.flip(2), True))]
    with torch.no_grad():
        probabilities = shown(seen_once, views, [int(n) for n in inputs["t_ori_shape"][:2]])
    assert near(probabilities[::10, ::32, ::32].numpy(), golden[f"{prefix}_prob_grid"])
    assert near(probabilities.mean((1, 2)).numpy(), golden[f"{prefix}_prob_class_mean"], 1e-5)
    assert differing(probabilities, golden, prefix) == 0


def ours(name):
    """The name of a published parameter."""
    name = name.replace("attn.rb", "attn.relative_position_bias_table")
    if "layers.3." in name:
        name = name.replace("pre_proj", "qkv").replace("post_proj", "proj")
    return name


def test_losses_and_gradients_equal_the_published_ones(published):
    model, inputs, _ = published
    expected = json.loads((GOLDEN / "loss_seg_upernet_elsa_tiny_160k.json").read_text())
    x, labels = torch.tensor(inputs["a_img"]), torch.tensor(inputs["a_label"]).long()[None]
    compared = {ours(name) for name in expected["grad"]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in compared)  # the others' gradients would be for nothing
    model.training = True  # of the model alone, so that it gives the auxiliary logits: all in it goes on evaluating
    logits, auxiliary = model(x)
    model.training = False
    loss = segmentation.pixel_cross_entropy(logits, labels)
    auxiliary_loss = 0.4 * segmentation.pixel_cross_entropy(auxiliary, labels)
    assert loss.item() == pytest.approx(expected["decode.loss_seg"], rel=1e-5)
    assert auxiliary_loss.item() == pytest.approx(expected["aux.loss_seg"], rel=1e-5)
    (loss + auxiliary_loss).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.requires_grad_(True)
    for name, numbers in expected["grad"].items():
        gradient, norm = gradients[ours(name)], numbers["l2"]
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
        # The last stage's weights are kept in another order, which leaves the norm.
        if ours(name) == name:
            assert gradient.flatten()[:4].tolist() == pytest.approx(numbers["first"], rel=1e-2, abs=1e-4 * norm), name
    assert len(expected["grad"]) >= 10


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1 << 16), sides=st.tuples(*[st.integers(1, 40)] * 4), dtype=st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16]))
def test_rows_of_a_resized_map_equal_those_of_the_whole(seed, sides, dtype):
    rng = np.random.default_rng(seed)
    h, w, H, W = sides
    x = torch.tensor(rng.normal(size=(1, 3, h, w)), dtype=dtype)
    start, stop = sorted(rng.choice(H + 1, 2, replace=False))
    whole = upernet.resize(x, (H, W))[:, :, start:stop]
    rows = upernet.resize_rows(x, (H, W), start, stop)
    upper, lower, _ = upernet.source_rows(h, H, start, stop)
    first, last = int(upper[0]), int(lower[-1]) + 1
    assert rows.dtype == dtype and torch.equal(upernet.resize_rows(x[:, :, first:last], (H, W), start, stop, first, h),
                                               rows)
    # In 64 bits torch takes the places in 64 bits, too.
    error = {torch.float32: 1e-5, torch.float64: 1e-4, torch.bfloat16: 0.02}[dtype]
    assert torch.allclose(rows, whole, rtol=error, atol=error)


def test_coarse_logits_are_those_before_the_last_resize():
    model, images = tiny(), torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        coarse = model(images, coarse=True)
        assert coarse.shape == (1, 5, 19, 25)  # the patches are of 2 pixels here
        assert torch.equal(model(images), upernet.resize(coarse, (37, 50)))


@pytest.mark.parametrize("attn, name, count", [("elsa", "upernet_swin_t", 60_794_486),
                                               ("elsa", "upernet_swin_s", 84_528_134)])
def test_published_parameter_counts(attn, name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, attn=attn).parameters()) == count


# The model

@settings(deadline=None, max_examples=15)
@given(H=st.integers(1, 40), W=st.integers(1, 40), attn=st.sampled_from(["window", "elsa"]))
def test_images_of_any_size(H, W, attn):
    model = tiny(attn)
    images = torch.randn(2, 3, H, W)
    logits = model(images)
    assert logits.shape == (2, 5, H, W) and logits.isfinite().all()
    assert_close("one at a time", logits, torch.cat([model(image[None]) for image in images]), 1e-4)


def test_a_classifiers_file_fills_the_backbone():
    classifier = create_model("swin_t", attn="elsa", **BACKBONE)
    model = tiny()
    heads = {name: value.clone() for name, value in model.state_dict().items()
             if not name.startswith("backbone.") or ".norm" in name[:14]}
    load_weights(model, classifier.state_dict())
    state, weight = model.state_dict(), "layers.2.blocks.0.mlp.fc1.weight"
    assert torch.equal(state[f"backbone.{weight}"], classifier.state_dict()[weight])
    for name in heads:
        if "backbone.layers" not in name and "patch_embed" not in name:
            assert torch.equal(state[name], heads[name]), name
    with pytest.raises(ValueError, match="missing: backbone.layers.0"):
        load_weights(model, create_model("swin_t", attn="window", **BACKBONE).state_dict())


def test_microsofts_segmenters_keep_their_buffers_to_themselves():
    model = tiny("window")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {"backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
               "backbone.layers.0.blocks.1.attn_mask": torch.zeros(1)}
    load_weights(tiny("window"), {"meta": {"epoch": 1}, "state_dict": {**state, **buffers}})


def test_backbone_shifts_windows_that_fit():
    assert all(block.attn.always_shift for block in Backbone(attn="window", **BACKBONE).layers[3].blocks)
