"""models/timm_models.py: what timm asks of a model, with the numbers of ours."""
import sys

import pytest
import torch

timm = pytest.importorskip("timm")
create_optimizer_v2 = pytest.importorskip("timm.optim").create_optimizer_v2

from models import create_model, published, timm_models  # noqa: E402

SWIN = dict(embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=2, patch_size=2, kernel_size=3)
VOLO = dict(embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2), patch_size=4, stem_dim=8, kernel_size=3, img_size=32)
CASES = [("elsa_swin_tiny", "swin_t", SWIN), ("elsa_volo_d1", "volo_d1", VOLO)]
each_model = pytest.mark.parametrize("name, ours, small", CASES)
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def pair(name, ours, small, **options):
    """timm's model and ours, with the same weights, evaluating."""
    model = timm.create_model(name, num_classes=5, **small, **options).eval()
    plain = create_model(ours, attn="elsa", num_classes=5, **small)
    plain.load_state_dict(model.state_dict())
    return model, plain.eval()


def test_names():
    names = timm.list_models("elsa_*")
    assert names == sorted([*timm_models.SWIN, *timm_models.VOLO]) and "elsa_volo_d5" in names
    assert timm.create_model("elsa_swin_tiny", depths=(1, 1, 1, 1)).layers[0].blocks[0].attn.attn[0].groups == 16
    assert timm.get_pretrained_cfg("elsa_volo_d1").crop_pct == 0.96


@each_model
def test_logits_are_ours_in_either_mode(name, ours, small):
    model, plain = pair(name, ours, small)
    expected = plain(IMAGES)
    assert torch.equal(model(IMAGES), expected)
    features = model.forward_features(IMAGES)
    assert torch.equal(model.forward_head(features), expected)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.train()  # without stochastic depth and with running statistics as they are
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model(IMAGES).sum().backward()
    assert torch.equal(model(IMAGES), expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


@each_model
def test_features_of_stages(name, ours, small):
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, out_indices=(0, -1), **small).eval()
    plain = create_model(ours, attn="elsa", num_classes=0, **small).eval()
    plain.load_state_dict(backbone.model.state_dict())
    maps = plain.forward_features(IMAGES)
    maps = maps[1] if ours == "volo_d1" else maps
    info = backbone.feature_info
    for result, expected, channels, stride in zip(backbone(IMAGES), (maps[0], maps[3]), info.channels(),
                                                  info.reduction()):
        assert torch.equal(result, expected)
        assert result.shape == (2, channels, 32 // stride, 48 // stride)
    assert len(timm.create_model(name, features_only=True, **small)(IMAGES)) == 4
    last, (normed,) = backbone.model.forward_intermediates(IMAGES, indices=1, norm=True)
    assert torch.equal(normed, plain.norm(maps[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert torch.equal(last, backbone.model.forward_features(IMAGES))


@each_model
def test_classifiers_and_pooling(name, ours, small):
    model = timm.create_model(name, num_classes=0, in_chans=1, **small)
    pooled = model(IMAGES[:, :1])
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(7)
    assert model(IMAGES[:, :1]).shape == (2, 7) and model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0, "")
    assert model(IMAGES[:, :1]).ndim == (4 if ours == "swin_t" else 3)
    with pytest.raises(ValueError, match="global_pool = 'max'"):
        timm.create_model(name, global_pool="max", **small)


@each_model
def test_layers_have_an_order_for_rates_of_their_own(name, ours, small):
    model = timm.create_model(name, **small)
    groups = timm.models.group_parameters(model, model.group_matcher())
    order = {parameter: group for group, parameters in groups.items() for parameter in parameters}
    assert order.keys() == dict(model.named_parameters()).keys()
    first, *rest = ("patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "layers.1.blocks.1.norm1.weight",
                    "layers.3.blocks.0.norm1.weight", "head.weight") if ours == "swin_t" else (
        "patch_embed.proj.weight", "network.0.0.norm1.weight", "pos_embed", "network.3.1.norm1.weight",
        "post_network.1.norm1.weight", "head.weight")
    assert order[first] == 0 and [order[name] for name in rest] == sorted({order[name] for name in rest})
    create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)


@each_model
def test_files_of_weights(name, ours, small, tmp_path, capsys):
    model, _ = pair(name, ours, small)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    zeros = {key: 0 * value for key, value in model.state_dict().items()}
    torch.save({"model": zeros, "ema": model.state_dict()}, tmp_path / "best.pt")  # of a run of ours
    overlay = {"file": str(tmp_path / "best.pt")}
    other = timm.create_model(name, pretrained=True, num_classes=3, in_chans=4, pretrained_cfg_overlay=overlay, **small)
    assert torch.equal(other.norm.weight, model.norm.weight) and other(IMAGES[:, [0, 1, 2, 0]]).shape[-1] == 3
    resumed = timm.create_model(name, num_classes=5, checkpoint_path=str(tmp_path / "weights.pth"), **small).eval()
    assert torch.equal(resumed(IMAGES), model(IMAGES))


def test_pretrained_is_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="drive.google.com.*elsa_swin_tiny.pth"):
        timm.create_model("elsa_swin_tiny", pretrained=True)
    place = published.place(published.choose("published", "swin_t", "elsa", 224, None))
    place.parent.mkdir(parents=True)
    model = timm.create_model("elsa_swin_tiny", **SWIN)
    torch.save(model.state_dict(), place)
    found = timm.create_model("elsa_swin_tiny", pretrained=True, **{**SWIN, "window_size": 2})
    assert torch.equal(found.head.weight, model.head.weight)


def test_scripts_run_with_the_models(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("import sys, timm\nprint(sys.argv[1:], timm.is_model('elsa_swin_small'))")
    monkeypatch.setattr(sys, "argv", ["timm_models", str(tmp_path / "train.py"), "--model", "x"])
    timm_models.run_script()
    assert capsys.readouterr().out == "['--model', 'x'] True\n"
