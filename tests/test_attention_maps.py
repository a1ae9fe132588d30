"""eval/attention_maps.py: the weights that are drawn are those that the layers use."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval import attention_maps
from models import create_model
from models.attention import WindowAttention
from models.elsa import ELSA
from run import main

SMALL = dict(embed_dim=8, depths=[1, 2], num_heads=[2, 2])


@pytest.mark.parametrize("H, W, shift, always_shift", [
    (7, 9, 1, False), (4, 4, 2, False), (8, 8, 2, False), (5, 3, 1, True), (3, 9, 1, False)])
def test_window_weights_make_the_layers_result(H, W, shift, always_shift):
    torch.manual_seed(0)
    layer = WindowAttention(6, 2, 4, shift, always_shift).eval()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x, seen = torch.randn(1, H, W, 6), []
    layer.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    layer(x)
    v = layer.qkv(F.pad(x[0], (0, 0, 0, -W % 4, 0, -H % 4)))[..., 12:]
    for row, column in ((0, 0), (H - 1, W - 1), (2, 1)):
        for head in (0, 1):
            own = slice(3 * head, 3 * head + 3)
            found = attention_maps.window_weights(layer, x[0], head, row, column)
            taken = v[found["rows"]][:, found["columns"]][..., own]
            made = (torch.from_numpy(found["softmax"])[..., None] * taken).sum((0, 1))
            torch.testing.assert_close(made, seen[0][row, column, own])


@pytest.mark.parametrize("lam, gamma, dilation", [(0, 1, 1), (1, 0.5, 2), (2, 0, 1)])
def test_elsa_filters_make_the_layers_result(lam, gamma, dilation):
    torch.manual_seed(0)
    layer = ELSA(8, 2, kernel_size=3, lam=lam, gamma=gamma, dilation=dilation).eval()
    x, seen = torch.randn(1, 6, 7, 8), []
    layer.post_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    _, logits, _ = attention_maps.watched(Stem(layer), layer, x.permute(0, 3, 1, 2))
    v = layer.pre_proj(x)[0, ..., -8:]
    for row, column in ((2, 3), (0, 6)):
        for head in (0, 1):
            found = attention_maps.elsa_weights(layer, logits, head, row, column)
            assert len(found["channels"]) == 3 and {channel // 4 for channel in found["channels"]} == {head}
            padded = F.pad(v, (0, 0, 2, 2, 2, 2))[found["rows"] + 2][:, found["columns"] + 2]
            for channel, filters in zip(found["channels"], found["filters"]):
                torch.testing.assert_close((torch.from_numpy(filters) * padded[..., channel]).sum(),
                                           seen[0][row, column, channel])


class Stem(torch.nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.patch_embed, self.dims = SimpleNamespace(proj=SimpleNamespace(kernel_size=(1, 1))), [8]

    def forward(self, images):
        return self.layer(images.permute(0, 2, 3, 1))


def test_a_pixel_of_the_photograph_is_found_in_what_the_model_sees():
    config = SimpleNamespace(model="swin_t", img_size=32, crop_pct=1.0)
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[40:60, 160:180] = 255
    images, x, y = attention_maps.as_seen(Image.fromarray(pixels), config, (170, 50))
    assert images.shape == (1, 3, 32, 32) and images[0, 0, int(y), int(x)] > 2 > images[0, 0, int(y), int(x) - 6]
    with pytest.raises(ValueError, match="--at 20,50: the model does not see this pixel"):
        attention_maps.as_seen(Image.fromarray(pixels), config, (20, 50))
    images, x, y = attention_maps.as_seen(
        Image.fromarray(pixels), SimpleNamespace(model="upernet_swin_t", img_size=32), (170, 50))
    assert images.shape == (1, 3, 32, 96) and images[0, 0, int(y), int(x)] > 2 > images[0, 0, int(y), int(x) - 6]


def test_plain_swins_window():
    model = create_model("swin_t", window_size=4, **SMALL)
    assert attention_maps.swin_window(model, 1, (8, 8), (5, 3)) == (4, 0, 4)
    assert attention_maps.swin_window(model, 2, (8, 8), (5, 1)) == (2, -2, 4)  # shifted by two
    assert attention_maps.swin_window(model, 2, (4, 8), (3, 1)) == (0, -2, 4)  # one window is not


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save("a.png")
    options = ["--num-classes", "3", "--img-size", "32", "--device", "cpu", "--out", "seen"]

    def run(model, attn, *words, small=SMALL, **sizes):
        torch.save(create_model(model, attn=attn, num_classes=3, img_size=32, **small, **sizes).state_dict(), "w.pt")
        sizes = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return main(["predict", model, "--attn", attn, "--weights", "w.pt", *options, *sizes, "--model-args",
                     json.dumps(small), "--show", "attention", *words, "a.png"])
    return run


def test_pictures_of_both_kinds(command, monkeypatch):
    assert command("swin_t", "elsa", "--head", "2", "--at", "33,12", patch_size=4, window_size=4) == 0
    found = json.loads(Path("seen/a.json").read_text())["attention"]
    assert (found["stage"], found["block"], found["head"], found["at"]) == (1, 1, 2, [33, 12])
    assert np.shape(found["softmax"]) == (7, 7) and np.sum(found["softmax"]) == pytest.approx(1, abs=1e-3)
    assert found["rows"] == [found["pixel"][0] + i for i in range(-3, 4)]
    with Image.open("seen/a.png") as drawn:
        assert drawn.width > 1000
    monkeypatch.setattr(attention_maps, "picture", lambda image, *rest: Image.new("RGB", (30, 30)))
    assert command("swin_t", "window", "--stage", "2", patch_size=4, window_size=4) == 0
    found = json.loads(Path("seen/a.json").read_text())["attention"]
    assert np.shape(found["softmax"]) == (4, 4) and found["block"] == 2


def test_of_volo_and_of_a_segmenter(command, monkeypatch):
    monkeypatch.setattr(attention_maps, "picture", lambda image, *rest: Image.new("RGB", (30, 30)))
    volo = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2], stem_dim=4)
    assert command("volo_d1", "elsa", small=volo, patch_size=4) == 0
    assert json.loads(Path("seen/a.json").read_text())["attention"]["pixel"] == [4, 4]  # of 8 x 8
    upernet = {**SMALL, "channels": 4, "auxiliary_channels": 4}
    assert command("upernet_swin_t", "elsa", "--at", "59,0", small=upernet, patch_size=4, window_size=4) == 0
    assert json.loads(Path("seen/a.json").read_text())["attention"]["pixel"] == [0, 11]


@pytest.mark.parametrize("attn, words, said", [
    ("elsa", ["--stage", "3"], "--stage 3: this model has local attention in 2 stages"),
    ("elsa", ["--head", "3"], "--head 3: stage 1 has 2 heads"), ("elsa", ["--at", "3"], "--at 3: expected X,Y"),
    ("elsa", ["--at", "1,1"], "--at 1,1: the model does not see"),
    ("dwconv", [], "DepthwiseConvolution in stage 1 has no softmax")])
def test_what_cannot_be_shown_is_said(command, capsys, attn, words, said):
    assert command("swin_t", attn, *words, patch_size=4, window_size=4) == 2
    assert said in capsys.readouterr().err
