"""models/__init__.py: architectures by name, and errors that help."""
import pytest
import torch
from timm.models import adapt_input_conv

from models import create_model, list_models, load_weights
from models.elsa import ELSA
from test_mask_rcnn import BACKBONE
from test_mask_rcnn import tiny as tiny_detector
from test_swin import tiny
from test_volo import TINY as VOLO
from test_volo import tiny as tiny_volo


@pytest.mark.parametrize("call, words", [
    (lambda: create_model("swin_tt"), ["'swin_tt'", "Did you mean 'swin_t'", "swin_b, swin_s, swin_t"]),
    (lambda: create_model("swin_t", attn="elza"), ["attn", "'elza'", "Did you mean 'elsa'", "window, elsa"]),
    (lambda: create_model("swin_t", droppath_rate=0.1),
     ["'droppath_rate'", "Did you mean 'drop_path_rate'", "patch_size"]),
    (lambda: ELSA(16, 3), ["num_heads = 3", "dim_v = 16"]),
    (lambda: ELSA(16, 2, kernel_size=4), ["kernel_size = 4", "odd"]),
    (lambda: ELSA(16, 2, stride=0), ["stride = 0", "positive"]),
    (lambda: ELSA(16, 2, groups=7), ["groups = 7", "divisor"]),
    (lambda: ELSA(16, 2, lam=0.5), ["lam = 0.5", "whole number"]),
    (lambda: ELSA(16, 2)(torch.zeros(1, 16, 4, 4)), ["x has shape (1, 16, 4, 4)", "(B, H, W, 16)", "permute"]),
    (lambda: tiny("elsa")(torch.zeros(1, 1, 32, 32)), ["images", "(1, 1, 32, 32)", "(B, 3, H, W)"]),
    (lambda: tiny("elsa", drop_path_rate=1.0), ["drop_path_rate = 1.0"]),
    (lambda: tiny("elsa", num_heads=(1, 2, 2)), ["num_heads", "depths"]),
    (lambda: tiny("window", num_heads=(5, 2, 2, 4)), ["num_heads = 5", "12"]),
])
def test_errors_name_the_argument_and_what_to_do(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_list_models():
    assert {"swin_t", "swin_s", "swin_b"} <= set(list_models())
    for name in list_models():
        with torch.device("meta"):
            create_model(name, num_classes=2)


def test_heads_of_segmenters_start_as_published():
    torch.manual_seed(0)
    model = create_model("upernet_swin_t", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), channels=64)
    classifier, conv = model.decode_head.conv_seg, model.decode_head.fpn_convs[0].conv
    for name, weight, std in (("conv_seg", classifier.weight, 0.01), ("conv", conv.weight, (2 / (64 * 9)) ** 0.5)):
        assert abs(weight.std().item() / std - 1) < 5 / (2 * weight.numel()) ** 0.5, name  # five standard errors
    assert not classifier.bias.any() and not model.auxiliary_head.conv_seg.bias.any()


def tiny_upernet(**options):
    small = dict(channels=8, auxiliary_channels=6, num_classes=5)
    return create_model("upernet_swin_t", **{**BACKBONE, **small, **options})


@pytest.mark.parametrize("make, num_features, heads", [
    (lambda **options: tiny("elsa", **options), 96, ("head",)),
    (lambda **options: create_model("volo_d1", **{**VOLO, **options}), 24, ("head", "aux_head")),
    (tiny_upernet, 8, ("decode_head.conv_seg", "auxiliary_head.conv_seg")),
    (tiny_detector, None, ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits")),
    (lambda **options: tiny_detector("cascade_mask_rcnn_swin_t", **options), None, (
        *(f"roi_head.bbox_head.{i}.{name}" for i in range(3) for name in ("fc_cls", "fc_reg")),
        *(f"roi_head.mask_head.{i}.conv_logits" for i in range(3))))])
def test_a_classifier_is_reset_and_nothing_else(make, num_features, heads):
    model, other = make(), make(num_classes=4)
    classifier = model.get_submodule(heads[0])
    assert model.num_features == (num_features or model.roi_head.heads()[0][0].fc_cls.in_features)
    assert classifier.weight.shape[1] == model.num_features
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.double()
    model.reset_classifier(4)
    assert not hasattr(model, "roi_head") or model.num_classes == model.roi_head.num_classes == 4
    after = model.state_dict()
    assert {key: value.shape for key, value in after.items()} == {key: v.shape for key, v in other.state_dict().items()}
    for key, value in after.items():
        new = key.rpartition(".")[0] in heads
        assert value.dtype == torch.float64 or not value.is_floating_point(), key
        assert new or torch.equal(value.to(before[key].dtype), before[key]), key
        if new and key.endswith("weight"):  # as a new model has it
            expected = other.state_dict()[key].std()
            assert abs(value.std() / expected - 1) < 0.4 and value.std() > 0, key
        elif new:
            assert not value.any()


def test_a_detector_of_other_classes_detects_these():
    model = tiny_detector().eval()
    model.reset_classifier(2)
    (found,) = model(torch.randn(1, 3, 64, 64), [(64, 64)])
    assert len(found["labels"]) and set(found["labels"].tolist()) <= {0, 1}


def test_without_a_classifier_a_model_gives_features():
    images = torch.randn(1, 3, 32, 32)
    for model in (tiny("elsa"), tiny_volo().eval()):
        model.reset_classifier(0)
        assert model(images).shape == (1, model.num_features)


@pytest.mark.parametrize("make", [lambda **options: tiny("elsa", **options), tiny_volo, tiny_detector])
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_weights_for_three_channels_fit_others_as_in_timm(make, channels, capsys):
    trained, model = make(), make(in_chans=channels)
    load_weights(model, trained.state_dict())
    assert f"of 3 channels, is fitted to {channels}" in capsys.readouterr().err
    adapted = 0
    for (key, ours), theirs in zip(model.state_dict().items(), trained.state_dict().values()):
        if ours.shape != theirs.shape:
            adapted += 1
            assert torch.allclose(ours, adapt_input_conv(channels, theirs), atol=1e-6), key
        else:
            assert torch.equal(ours, theirs), key
    assert adapted == 1
    if channels == 1 and not hasattr(model, "roi_head"):  # grey is grey
        grey = torch.randn(1, 1, 32, 32)
        assert torch.allclose(model.eval()(grey), trained.eval()(grey.expand(-1, 3, -1, -1)), atol=1e-4)


def test_backbone_for_detectors_elsewhere():
    """What the docstring of forward_features says of strides and channels."""
    model = tiny("elsa", in_chans=5)
    patch = model.patch_embed.proj.kernel_size[0]
    maps = model.forward_features(torch.randn(2, 5, 45, 64))
    H, W = -(-45 // patch), -(-64 // patch)
    for x, dim in zip(maps, model.dims):
        assert x.shape == (2, dim, H, W)
        H, W = -(-H // 2), -(-W // 2)
    assert model.dims == [model.dims[0] * factor for factor in (1, 2, 4, 8)]
