"""eval/export.py and kernels/decomposed.py: files compute what the model computes, elsewhere."""
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from cases import Case, hypothesis_settings, problems
from eval import export, options
from kernels import decomposed
from models import create_model, load_weights
from models.attention import WindowAttention
from run import main

TINY = ["--img-size", "16", "--patch-size", "2", "--window-size", "2", "--num-classes", "3"]
SIZES = "embed_dim: 4, depths: [1, 2], num_heads: [1, 2], kernel_size: 3"


def command(out, *words, model="swin_t", attn="elsa", sizes=SIZES):
    return main(["export", model, "--attn", attn, "--out", str(out), *TINY, "--model-args", f"{{{sizes}}}", *words])


# The aggregation of plain operators

@hypothesis_settings(40)
@given(problems())
def test_decomposed_aggregation_equals_the_operator(problem):
    problem |= dict(dtype=torch.float64, v_layout="contiguous", logits_layout="nchw", lam=1, gamma=1)
    case = Case(**problem)
    tensors = list(case.tensors.values())
    if tensors[1] is None and tensors[3] is None:
        return
    numbers = [case.options[name] for name in ("kernel_size", "dilation", "stride", "normalize")]
    out, lse = decomposed.attention(*tensors, *numbers)
    expected = torch.ops.elsa.local_attention(*tensors, *numbers)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)
    assert out.is_contiguous() and lse.shape == expected[1].shape


def test_means_of_open_sizes_are_those_of_adaptive_pooling():
    for H, W in ((7, 5), (6, 6), (2, 9), (1, 1)):
        x = torch.randn(2, 3, H, W)
        for size in ((1, 1), (2, 2), (3, 3), (6, 6)):
            torch.testing.assert_close(export.adaptive_mean(x, size), F.adaptive_avg_pool2d(x, size))


def test_rolling_by_indices():
    x = torch.arange(24).reshape(1, 4, 6)
    for shifts in ((1, -2), (-3, 5), (0, 0)):
        assert torch.equal(export.rolled(x, shifts, (1, 2)), x.roll(shifts, (1, 2)))


def test_axes_of_one_window_are_not_shifted():
    layer = WindowAttention(4, 1, 3, shift=1).eval()
    still = WindowAttention(4, 1, 3, shift=0).eval()
    still.load_state_dict(layer.state_dict())
    for H, W, same in ((3, 2, True), (3, 4, False), (4, 3, False)):
        x = torch.randn(1, H, W, 4)
        assert torch.equal(layer(x), still(x)) == same


# Files

def test_safetensors_are_read_back_with_their_model_and_classes(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors")
    config = {"model": "swin_t", "attn": "elsa", "img_size": 16, "patch_size": 2, "window_size": 2, "data": "photos",
              "model_args": dict(embed_dim=4, depths=[1, 2], num_heads=[1, 2], kernel_size=3)}
    model = create_model("swin_t", attn="elsa", num_classes=3, patch_size=2, window_size=2, **config["model_args"])
    (tmp_path / "run").mkdir()
    content = {"model": model.state_dict(), "classes": ["cat", "dog", "Kauz 🦉"], "config": config}
    torch.save(content, tmp_path / "run" / "best.pt")
    out = tmp_path / "new" / "m.safetensors"
    assert main(["export", "--weights", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert "run/best.pt" in capsys.readouterr().out
    saved, classes = options.checkpoint_facts(out)
    assert classes == content["classes"] and {name: saved[name] for name in config} == config
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["model"], metadata["attn"], json.loads(metadata["classes"])) == ("swin_t", "elsa", classes)
    fresh = create_model("swin_t", attn="elsa", num_classes=3, patch_size=2, window_size=2, **config["model_args"])
    load_weights(fresh, out)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(ValueError, match="m.safetensors cannot be read: it is damaged"):
        load_weights(fresh, out)
    assert [path.name for path in out.parent.iterdir()] == ["m.safetensors"]


@pytest.fixture(scope="module")
def program():
    """(a tiny ELSA-Swin, images, its program)."""
    torch.manual_seed(0)
    model = create_model("swin_t", attn="elsa", num_classes=3, patch_size=2, window_size=2, embed_dim=4, depths=(2,),
                         num_heads=(1,), kernel_size=3).eval()
    images = [torch.randn(1, 3, 8, 8)]
    return model, images, export.exported(model, images[0])


def test_programs_are_of_torchs_own_operators(program, tmp_path):
    """Read in this process, where the operator is known: test_pt2_runs_alone needs a new one."""
    model, images, made = program
    assert {str(node.target).split(".")[0] for node in made.graph.nodes if node.op == "call_function"} <= {
        "aten", "<built-in function getitem>"}
    difference, largest = export.compared([[made.module()(*images)]], export.run(model, images))
    assert difference < 1e-6 < largest


def test_onnx_of_standard_operators(program, tmp_path):
    for package in export.FORMATS["onnx"]:
        pytest.importorskip(package)
    model, images, made = program
    found = export.run_onnx(made, images, ["logits"], {"model": "swin_t"}, tmp_path / "m.onnx")
    assert export.compared(found, export.run(model, images))[0] < 1e-5
    import onnx
    written = onnx.load(tmp_path / "m.onnx")
    assert written.graph.input[0].name == "images" and written.graph.output[0].name == "logits"
    assert written.metadata_props[0].value == "swin_t"


@pytest.mark.slow
def test_pt2_runs_alone(tmp_path, capsys):
    assert command(tmp_path / "m.pt2") == 0
    assert "Checked with images of 1x3x16x16" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    read = ("import torch; files = {'metadata.json': ''}; torch.export.load('m.pt2', extra_files=files); "
            "print(files['metadata.json'])")
    done = subprocess.run([sys.executable, "-I", "-c", read], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)["classes"] == '["0", "1", "2"]'


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("model, attn, sizes", [
    ("swin_t", "window", SIZES), ("swin_t", "elsa", SIZES),
    ("volo_d1", "outlook", "embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [2, 2], stem_dim: 4"),
    ("volo_d1", "elsa", "embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [2, 2], stem_dim: 4, kernel_size: 3"),
    ("upernet_swin_t", "elsa", SIZES + ", channels: 4, auxiliary_channels: 4"),
    ("mask_rcnn_swin_t", "elsa", SIZES + ", channels: 4, hidden: 4")])
def test_files_for_any_size(tmp_path, capsys, kind, model, attn, sizes):
    for package in export.FORMATS[kind]:
        pytest.importorskip(package)
    volo = ["--patch-size", "4"] if model.startswith("volo") else []
    assert command(tmp_path / f"m.{kind}", "--dynamic", *volo, model=model, attn=attn, sizes=sizes) == 0
    assert "backbone and feature pyramid" in capsys.readouterr().out or "mask" not in model


# Mistakes

def test_nothing_is_left_of_a_file_that_computes_something_else(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    given = export.run_safetensors
    for change in (lambda x: x + 1e-3, lambda x: x * float("nan"), lambda x: x[:, :2]):
        with monkeypatch.context() as patch:
            patch.setattr(export, "run_safetensors", lambda *args: [[change(x) for x in xs] for xs in given(*args)])
            assert command(tmp_path / "m.safetensors") == 2
        assert "more than rounding; nothing was written" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, said", [
    (["--out", "m.pth"], "ends in none of pt2, onnx, safetensors"), (["--out", "."], "ends in none of"),
    (["--out", ".", "--format", "pt2"], "is a folder; expected a file, as model.pt2"),
    (["--out", "m.safetensors", "--dynamic"], "--dynamic is for pt2 and onnx"),
    (["--out", "m.pt2", "--weights", "empty"], "no best.pt in this folder"),
    (["--out", "w.pt2", "--weights", "w.pt2"], "would write over w.pt2"), ([], "--out")])
def test_mistakes_are_said_before_anything_is_made(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.pt2").touch()
    assert main(["export", *words]) == 2
    assert said in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 2


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert command(tmp_path / "m.onnx") == 2
    assert "`pip install onnx onnxscript onnxruntime`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`pip install safetensors`"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "x.safetensors")
