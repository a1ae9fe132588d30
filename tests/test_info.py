"""models/info.py: costs against the published ones and against counts by hand."""
import pytest

from models.info import info, stages, table
from run import main

SMALL = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@pytest.mark.parametrize("name, attn, parameters, macs", [
    ("swin_t", "window", 28_288_354, 4.5),
    ("swin_t", "elsa", 29_140_978, 4.71),
    ("swin_s", "elsa", 52_874_626, 9.44),
    ("swin_b", "elsa", 92_682_464, 16.52),
    ("volo_d1", "outlook", 26_632_040, 6.94),
])
def test_costs_are_the_published_ones(name, attn, parameters, macs):
    total, *_ = info(name, (224, 224), attn=attn)
    assert total["parameters"] == parameters and total["macs"] / 1e9 == pytest.approx(macs, rel=5e-3)


@pytest.mark.parametrize("name", [
    "swin_t", "volo_d1", "upernet_swin_t", "mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"])
def test_the_stages_are_the_whole_model(name):
    *parts, total = stages(info(name, (64, 96)))
    for key in ("parameters", "macs", "memory"):
        outside = total[key] - sum(row[key] for row in parts)  # position embeddings, sums between the parts
        assert 0 <= outside <= (0.02 if key == "parameters" else 0.1) * total[key], key


def test_memory_is_what_autograd_keeps():
    rows = {row["layer"]: row for row in info("swin_t", (64, 64), **SMALL, num_classes=3)}
    fc1 = rows["layers.0.blocks.0.mlp.fc1"]
    assert fc1["output"] == (16, 16, 48) and fc1["macs"] == 16 * 16 * 12 * 48
    assert fc1["memory"] == 4 * 16 * 16 * 12  # its input
    assert rows["head"]["memory"] == 4 * 96
    assert rows[""]["memory"] > sum(rows[f"layers.{i}"]["memory"] for i in range(4))


def test_memory_of_a_layer_is_not_that_of_its_namesakes():
    rows = info("swin_t", (32, 32), **{**SMALL, "depths": (12, 1, 1, 1)})
    memory = {row["layer"]: row["memory"] for row in rows}
    assert memory["layers.0.blocks.1"] == memory["layers.0.blocks.3"]  # without that of blocks.10 and blocks.11


@pytest.mark.parametrize("attn", ["neighborhood", "dwconv", "ddf"])
def test_multiply_adds_count_every_tap(attn):
    rows = {row["layer"]: row for row in info("swin_t", (32, 32), attn=attn, **SMALL)}
    layer, pixels, C, K = rows["layers.0.blocks.0.attn"], 64, 12, 49
    linear = {"neighborhood": 4 * C * C, "dwconv": 2 * C * C, "ddf": 2 * C * C + C * K}[attn] * pixels
    channel = C * 2 + 2 * C * K if attn == "ddf" else 0
    assert layer["macs"] == linear + channel + pixels * C * K * (2 if attn == "neighborhood" else 1)


def test_detectors_cost_as_many_boxes_as_they_may_have():
    options = dict(SMALL, channels=8, hidden=16, num_classes=3)
    rows = {row["layer"]: row["macs"] for row in info("mask_rcnn_swin_t", (64, 96), attn="elsa", **options)}
    assert rows["roi_head.bbox_head.shared_fcs.0"] == 1000 * 7 * 7 * 8 * 16
    assert rows["roi_head.mask_head.convs.0.conv"] == 100 * 14 * 14 * 9 * 8 * 8
    assert rows["roi_head.mask_head.conv_logits"] == 100 * 28 * 28 * 8 * 3
    cells = sum(-(-64 // stride) * -(-96 // stride) for stride in (4, 8, 16, 32, 64))
    assert rows["rpn_head.rpn_conv"] == cells * 9 * 8 * 8


def test_table_gives_the_units():
    row = {"layer": "", "kind": "Swin", "output": (2, 3), "parameters": 1234, "macs": 5_000_000, "memory": 3 << 20}
    assert table([row]).splitlines()[1].split() == "total Swin 2 x 3 1,234 0.005 G 3.0 MB".split()


def test_info_prints_a_table(capsys):
    assert main(["info", "swin_t", "--attn", "elsa"]) == 0
    printed = capsys.readouterr().out
    assert "29,140,978" in printed and "4.704 G" in printed and "56 x 56 x 96" in printed and "blocks" not in printed
    assert main(["info", "volo_d1", "--layers", "--img-size", "64"]) == 0
    assert "network.0.1.attn" in capsys.readouterr().out
    assert main(["info", "swin_t", "--attn", "dwconf"]) == 2
    assert "Did you mean 'dwconv'?" in capsys.readouterr().err
