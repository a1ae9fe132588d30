"""models/weights.py: files of ours and of others, and files that do not fit."""
import argparse
import os

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from models import create_model, load_weights
from published import assert_close, published_state
from test_mask_rcnn import BACKBONE
from test_mask_rcnn import tiny as tiny_detector
from test_swin import tiny
from test_volo import tiny as tiny_volo


def to_microsoft(timm_state):
    """A state dict with timm's names in those of Microsoft's files: down-sampling ends a stage, head, buffers saved."""
    state = {}
    for key, value in timm_state.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        state[key.replace("head.fc.", "head.")] = value
        if key.endswith("relative_position_bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return state


def shallow(state):
    """Two blocks in each stage and no classifier, which is all that a conversion of names needs."""
    return {key: value for key, value in state.items()
            if not key.startswith("head") and not (".blocks." in key and int(key.split(".")[3]) > 1)}


def shallow_model(attn):
    return create_model("swin_t", attn=attn, depths=(2, 2, 2, 2), num_classes=0)


def test_microsoft_names_and_older_timm_names():
    timm_state = published_state("swin_tiny")
    expected = load_weights(shallow_model("window"), shallow(timm_state)).state_dict()
    result = load_weights(shallow_model("window"), {"model": shallow(to_microsoft(timm_state))}).state_dict()
    assert result.keys() == expected.keys() and all(torch.equal(result[key], expected[key]) for key in expected)
    older = {key.replace("head.fc.", "head."): value for key, value in timm_state.items()}
    assert torch.equal(load_weights(create_model("swin_t"), older).head.weight, timm_state["head.fc.weight"])


def test_published_elsa_checkpoint_file(tmp_path):
    state = shallow(published_state("elsa_swin_tiny"))
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": wrapped}, tmp_path / "elsa.pth")
    expected = load_weights(shallow_model("elsa"), state).state_dict()
    result = load_weights(shallow_model("elsa"), tmp_path / "elsa.pth").state_dict()
    assert all(torch.equal(result[key], expected[key]) for key in expected)
    # the order q, k, v and the sign of the bias are covered by the golden logits
    key = "layers.1.blocks.1.attn.pre_proj.weight"
    assert torch.equal(result[key], state[key])


@pytest.mark.parametrize("attn", ["window", "elsa"])
def test_own_checkpoints(attn, tmp_path):
    weights = tiny(attn).state_dict()
    average = {key: value + 1 for key, value in weights.items()}
    config = {"name": "swin_t", "epochs": 300}
    for checkpoint, expected in (
            (weights, weights),
            ({"model": weights, "ema": None, "config": config}, weights),
            ({"model": weights, "config": config, "step": 7}, weights),
            ({"model": weights, "ema": average, "config": config}, average)):
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        model = tiny(attn)
        assert load_weights(model, str(tmp_path / "checkpoint.pt")) is model
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    state = {key: value + 1 for key, value in tiny("elsa").state_dict().items()}
    del state["norm.bias"], state["layers.1.blocks.0.attn.ghost_head"]
    state["head.weight"] = torch.zeros(7, 96)
    state["stray"] = torch.zeros(3)
    model = tiny("elsa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, state)
    for line in ("missing: norm.bias (96,)",
                 "missing: layers.1.blocks.0.attn.ghost_head (1, 24, 3, 3)",
                 "unexpected: stray (3,)",
                 "wrong shape: head.weight is (7, 96), the model has (5, 96)"):
        assert line in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="relative_position_bias_table is .* the model has"):
        load_weights(tiny("neighborhood", kernel_size=5), tiny("neighborhood").state_dict())
    table = {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(9, 9)}  # of nine heads, not a window's
    with pytest.raises(ValueError, match=r"bias_table is \(9, 9\), the model has \(1, 9\)"):
        load_weights(tiny("neighborhood"), tiny("neighborhood").state_dict() | table)


def test_bias_tables_of_another_window_are_interpolated_and_that_is_said(capsys):
    trained = tiny("window", window_size=3)
    for parameter in trained.parameters():
        parameter.data += torch.randn_like(parameter)
    model = load_weights(tiny("window"), trained.state_dict())
    key = "layers.1.blocks.0.attn.relative_position_bias_table"
    old, new = trained.state_dict()[key], model.state_dict()[key]
    assert old.shape == (25, 2) and new.shape == (49, 2)
    for head in (0, 1):
        want = F.interpolate(old[:, head].reshape(1, 1, 5, 5), (7, 7), mode="bicubic")
        assert torch.equal(new[:, head], want.flatten())
    assert torch.equal(model.norm.weight, trained.norm.weight)
    printed = capsys.readouterr().err
    assert "8 relative position bias tables" in printed and "a window of 3 x 3 to 4 x 4" in printed
    load_weights(tiny("window"), model.state_dict())
    assert not capsys.readouterr().err


WEIGHTS, AVERAGE = {"w": torch.zeros(2)}, {"w": torch.ones(2)}


@pytest.mark.parametrize("checkpoint, expected", [
    *(({"model": WEIGHTS, entry: AVERAGE}, 1)
      for entry in ("model_ema", "ema_state_dict", "state_dict_ema", "ema")),
    ({"state_dict": WEIGHTS, "model": "swin_t", "ema": 0.9999}, 0),
    ({"state_dict": WEIGHTS, "model": None, "model_ema": {}, "ema": {"decay": 0.99}}, 0),
    ({"state_dict": AVERAGE, "ema_state_dict": {"steps": torch.tensor(3), "module.w": torch.zeros(2)}}, 1),  # mmengine
    ({"model": WEIGHTS, "model_ema": {"n_averaged": torch.tensor(3), "module.w": torch.ones(2)}}, 1),
    ({"module._orig_mod.w": torch.ones(2)}, 1),
    ({"_orig_mod.module.model.module.w": torch.ones(2), "_orig_mod.n_averaged": torch.tensor(1)}, 1),
])
def test_where_weights_are_in_a_checkpoint(checkpoint, expected):
    model = nn.ParameterDict({"w": torch.full((2,), 7.0)})
    assert load_weights(model, checkpoint)["w"].tolist() == [expected] * 2


def test_prefixes_that_are_not_before_all_keys_stay():
    model = nn.ModuleDict({"model": nn.Linear(2, 1), "head": nn.Linear(1, 1)})
    state = {key: value + 1 for key, value in model.state_dict().items()}
    assert torch.equal(load_weights(model, state)["model"].weight, state["model.weight"])


def test_newer_mmdetection_names_and_order_of_patches():
    """Its down-sampling is computed here as it does: by nn.Unfold."""
    torch.manual_seed(0)
    names = {"patch_embed.proj": "patch_embed.projection", "layers.": "stages.", "attn.": "attn.w_msa.",
             "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    detector = tiny_detector(attn="window")
    theirs = {}
    for key, value in detector.state_dict().items():
        if key.startswith("backbone."):
            for ours, name in names.items():
                key = key.replace(ours, name)
            value = torch.randn_like(value)
            if key.endswith("bias_table"):
                theirs[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
        theirs[key] = value
    load_weights(detector, {"state_dict": theirs})
    loaded, prefix = detector.state_dict(), "backbone.stages.1"
    for ours, name in (("patch_embed.proj.bias", "patch_embed.projection.bias"), ("norm2.weight", "norm2.weight"),
                       ("layers.1.blocks.0.mlp.fc1.weight", "stages.1.blocks.0.ffn.layers.0.0.weight"),
                       ("layers.1.blocks.0.mlp.fc2.weight", "stages.1.blocks.0.ffn.layers.1.weight"),
                       ("layers.1.blocks.0.attn.qkv.weight", "stages.1.blocks.0.attn.w_msa.qkv.weight")):
        assert torch.equal(loaded[f"backbone.{ours}"], theirs[f"backbone.{name}"]), ours
    x = torch.randn(2, 6, 4, theirs[f"{prefix}.downsample.norm.weight"].numel() // 4)
    patches = nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # (B, 6, 4C)
    norm = [theirs[f"{prefix}.downsample.norm.{name}"] for name in ("weight", "bias")]
    want = F.layer_norm(patches, patches.shape[-1:], *norm) @ theirs[f"{prefix}.downsample.reduction.weight"].T
    result = detector.backbone.layers[1].downsample(x)
    assert_close("down-sampling", want.view(result.shape), result, 1e-5)


def test_classifiers_of_mmpretrain():
    classifier = tiny("window")
    theirs = {}
    for key, value in classifier.state_dict().items():
        name = key.replace("norm.", "norm3.") if key.startswith("norm.") else key.replace("head.", "head.fc.")
        theirs[name if name.startswith("head.") else f"backbone.{name}"] = torch.randn_like(value)
    load_weights(classifier, {"state_dict": theirs})
    assert torch.equal(classifier.norm.weight, theirs["backbone.norm3.weight"])
    assert torch.equal(classifier.head.weight, theirs["head.fc.weight"])


def test_numpys_numbers_are_data(tmp_path):
    weights = tiny("elsa").state_dict()
    extra = {"best": np.float64(81.2), "epoch": np.int64(3), "done": np.bool_(True), "lr": np.float32(0.1),
             "rng": np.arange(5, dtype=np.uint32)}
    torch.save({"model": weights, **extra}, tmp_path / "scalars.pt")
    load_weights(tiny("elsa"), tmp_path / "scalars.pt")
    torch.save({"model": weights, "objects": np.array([RunsCode(str(tmp_path / "ran"))])}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="objects.pt"):
        load_weights(tiny("elsa"), tmp_path / "objects.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("make", [
    lambda **options: tiny("window", **options), lambda **options: tiny("elsa", **options),
    lambda **options: tiny_volo("window", **options), lambda **options: tiny_detector().backbone])
def test_models_made_without_memory(make):
    trained = make().eval()
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    load_weights(model, trained.state_dict()).eval()
    images = torch.randn(1, 3, 32, 32)
    for ours, want in zip(model(images), trained(images)):
        assert torch.equal(ours, want)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_that_cannot_be_read(tmp_path):
    model = tiny("elsa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({"model": before, "extra": RunsCode(str(tmp_path / "ran"))}, tmp_path / "malicious.pt")
    with pytest.raises(ValueError, match="malicious.pt was refused: reading it would run code"):
        load_weights(model, tmp_path / "malicious.pt")
    assert not (tmp_path / "ran").exists()
    torch.save(before, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for damage in (b"", whole[:len(whole) // 2], whole[:-300], b"hello world, these are no weights"):
        (tmp_path / "damaged.pt").write_bytes(damage)
        with pytest.raises(ValueError, match="damaged.pt cannot be read"):
            load_weights(model, tmp_path / "damaged.pt")
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_weights(model, tmp_path / "nowhere.pt")
    for nothing in ({}, {"epoch": 3}, {"model": [1, 2]}):
        with pytest.raises(ValueError, match="no weights"):
            load_weights(model, nothing)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_another_image_size_are_interpolated_as_in_the_forward_pass():
    small = tiny_volo()
    large = load_weights(tiny_volo(img_size=48), small.state_dict())
    images = torch.randn(2, 3, 48, 48)
    assert large.pos_embed.shape == (1, 6, 6, 24)
    assert_close("logits", small(images), large(images), 1e-5)


def test_fine_tuning_leaves_the_classifiers_as_they_are():
    trained, model = tiny_volo(), tiny_volo(num_classes=7)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    with pytest.raises(ValueError, match="wrong shape: head.weight"):
        load_weights(model, trained.state_dict())
    load_weights(model, trained.state_dict(), classifier=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if "head" in name else trained.state_dict()[name]), name


def test_a_classifiers_file_fills_the_backbone_and_other_classes_keep_their_heads():
    model, classifier = tiny_detector(), create_model("swin_t", attn="elsa", **BACKBONE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, classifier.state_dict())
    trained = classifier.state_dict()
    for key, value in model.state_dict().items():
        name = key.removeprefix("backbone.")
        assert torch.equal(value, trained[name] if name in trained else before[key]), key
    for name in ("mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"):
        other, detector = tiny_detector(name, num_classes=5), tiny_detector(name).state_dict()
        detector = {key: value + 1 for key, value in detector.items()}
        with pytest.raises(ValueError, match="wrong shape: roi_head.bbox_head"):
            load_weights(other, detector)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        load_weights(other, detector, classifier=False)
        for key, value in other.state_dict().items():
            kept = any(part in key for part in ("fc_cls", "fc_reg", "conv_logits"))
            assert torch.equal(value, before[key] if kept else detector[key]), key
