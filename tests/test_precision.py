"""What is computed in how many bits: nothing below float32 that sums up, nothing below float64 in a float64 model."""
import numpy as np
import pytest
import torch
import torch.nn as nn

from eval.tasks import task_of
from models import create_model
from models.precision import LayerNorm, widened
from models.swin import StochasticDepth
from test_mask_rcnn import TINY as DETECTOR
from test_mask_rcnn import target
from train.config import Config

BACKBONE = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 4), window_size=2, patch_size=2, num_classes=5)
MODELS = {
    "swin_t": BACKBONE,
    "volo_d1": dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(2, 4), patch_size=4, img_size=32, num_classes=5),
    "upernet_swin_t": dict(**BACKBONE, channels=8, auxiliary_channels=8),
    "mask_rcnn_swin_t": DETECTOR,
    "cascade_mask_rcnn_swin_t": DETECTOR,
}


def test_sixteen_bits_are_widened_alone():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert widened(torch.ones(2, dtype=dtype)).dtype == torch.float32
    x = torch.ones(2, dtype=torch.float64)
    assert widened(x) is x


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_of_the_models_precision_and_at_least_float32(name, amp, monkeypatch):
    torch.manual_seed(0)
    dtype = torch.float32 if amp else torch.float64
    model = create_model(name, attn="elsa", **MODELS[name]).train().to(dtype)
    task, images = task_of(name).training, torch.randn(4, 3, 32, 32, dtype=dtype)
    given, losses = [], []
    for function in ("cross_entropy", "binary_cross_entropy_with_logits", "smooth_l1_loss", "l1_loss"):
        plain = getattr(nn.functional, function)
        monkeypatch.setattr(nn.functional, function, lambda x, *rest, plain=plain, **options: given.append(x.dtype)
                            or losses.append(plain(x, *rest, **options)) or losses[-1])
    batch = {"classification": (images, torch.arange(4)),
             "segmentation": (images, torch.randint(5, (4, 32, 32)), [(32, 32)] * 4),
             "detection": (images, [(32, 32)] * 4, [target((0, 3, 4, 20, 30), (2, 5, 10, 30, 31), H=32, W=32)] * 4)}
    if task.__name__ == "train.detection":
        for part in batch["detection"][2]:
            part["boxes"] = part["boxes"].to(dtype)
    loss = task.loss(model, batch[task.__name__.split(".")[1]], Config(model=name, amp="bf16" if amp else "none"),
                     np.random.default_rng(0))
    assert loss.dtype == dtype and loss.isfinite()
    assert given and set(given) == {loss.dtype for loss in losses} == {dtype}


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.7])
def test_stochastic_depth_divides_in_bfloat16_without_a_bias(rate):
    torch.manual_seed(0)
    x = torch.randn(4_000, 2, dtype=torch.bfloat16)
    kept = StochasticDepth(rate).train()(x)
    there = kept.any(1)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept[there], (x[there].float() / (1 - rate)).bfloat16())  # rounded once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_norms_are_summed_in_float32_under_autocast(dtype):
    torch.manual_seed(0)
    norm, x, upstream = LayerNorm(4), torch.randn(2, 64, 64, 4, dtype=dtype), torch.rand(2, 64, 64, 4)
    with torch.autocast("cpu", dtype):
        out = norm(x)
        assert out.dtype == torch.float32 and torch.equal(out, nn.functional.layer_norm(x.float(), (4,)))
    out.backward(upstream)
    assert torch.allclose(norm.bias.grad.double(), upstream.double().sum((0, 1, 2)), rtol=1e-5)
    assert torch.allclose(norm.weight.grad.double(), (upstream.double() * out.double()).sum((0, 1, 2)), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_norm_of_other_weights_computes_as_they_are(dtype):
    norm, x = LayerNorm(4).to(dtype), torch.randn(3, 4, dtype=dtype)
    assert norm(x).dtype == dtype


def test_every_norm_of_the_models_is_such_a_one():
    for name, arguments in MODELS.items():
        norms = [module for module in create_model(name, attn="elsa", **arguments).modules()
                 if isinstance(module, nn.LayerNorm)]
        assert norms and all(isinstance(norm, LayerNorm) for norm in norms), name
