"""models/__init__.py: architectures by name, and errors that help."""
import pytest
import torch

from models import create_model, list_models
from models.elsa import ELSA
from test_swin import tiny


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
