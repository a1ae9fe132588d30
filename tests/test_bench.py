"""The benchmark's own honesty: what it checks, counts and leaves out. On a CPU, at a tiny size, without what torch.compile makes."""
import json

import pytest
import torch

import kernels
import models.elsa
from eval import bench, contenders
from run import main


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(contenders, "SHAPES", {"tiny stage 1": contenders.Shape(9, 8, 2, 3, 1, 8), "swin_t stage 1": contenders.Shape(7, 7, 1, 3, 0, 4)})
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(bench, "matrix_rate", lambda device, dtype: 1.0)


def run(folder, *arguments, level="operator", shapes="tiny"):
    """{(level, shape, pass, row): result} of a run with more images than rows are checked on."""
    bench.main(["--device", "cpu", "--level", *level.split(), "--shapes", *shapes.split(), "--batch-size", "5", "--repeats", "2",
                "--out", str(folder / "bench.json"), *arguments])
    return {tuple(row[key] for key in ("level", "shape", "pass", "row")): row for row in json.loads((folder / "bench.json").read_text())["rows"]}


def of(rows, name):
    return [row for key, row in rows.items() if key[3] == name]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_table_plot_and_numbers_agree(tmp_path, capsys, dtype):
    rows = run(tmp_path, "--dtype", dtype, level="operator layer", shapes="tiny swin_t")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    table, printed = (tmp_path / "bench.md").read_text(), capsys.readouterr().out
    lines = [bench.line(bench.cells(row)) for row in rows.values()]
    assert len(lines) == 2 * 2 * (5 + 4) and all(line in table and line in printed for line in lines)
    assert "copies 10 GB/s" in table and dtype in table and torch.__version__ in table
    for (*case, _), row in rows.items():
        assert not row["note"] and 0 < row["min"] <= row["ms"] <= row["max"] and row["times"] == 2
        assert row["speedup"] == rows[*case, "naive"]["ms"] / row["ms"]
        if row["level"] == "operator":
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6) and row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 10)
        else:
            assert row["bytes"] is row["gb_per_s"] is None
    assert {shape for _, shape, *_ in rows} == {"tiny stage 1", "swin_t/s stage 1", "swin_t stage 1"}


def test_wrong_result_gets_no_time(tmp_path, monkeypatch):
    ours = kernels.elsa_attention
    monkeypatch.setattr(contenders, "elsa_attention", lambda v, *rest, **options: ours(v, *rest, **options) + 1e-2 * torch.randn_like(v))
    rows = run(tmp_path)
    for row in of(rows, "ours"):
        assert row["note"] == "wrong" and row["ms"] is row["speedup"] is row["gb_per_s"] is None
    assert all(row["ms"] and row["speedup"] for row in rows.values() if row["row"] != "ours")


def test_wrong_gradient_of_a_filter_gets_no_time(tmp_path, monkeypatch):
    ours = kernels.elsa_attention
    monkeypatch.setattr(contenders, "elsa_attention", lambda v, x, mul, add, **options: ours(v, x, mul, 1.01 * add - 0.01 * add.detach(), **options))
    assert [row["note"] for row in of(run(tmp_path), "ours")] == ["", "wrong"]


def test_wrong_layer_is_seen_and_the_naive_one_does_not_use_it(tmp_path, monkeypatch):
    noisy = lambda v, *rest, **options: kernels.elsa_attention(v, *rest, **options) + 1e-2 * torch.randn_like(v)
    monkeypatch.setattr(models.elsa, "elsa_attention", noisy)
    rows = run(tmp_path, level="layer")
    assert all(row["note"] == "wrong" for row in of(rows, "ours")) and all(row["ms"] for row in of(rows, "naive"))
    assert models.elsa.elsa_attention is noisy


def test_failure_costs_one_row(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel for this device. Please buy another\nTraceback")

    def fill(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(contenders, "window", fail)
    monkeypatch.setattr(contenders, "unfold", fill)
    rows = run(tmp_path)
    assert all(row["note"] == "failed: no kernel for this device" and row["ms"] is None for row in of(rows, "window"))
    assert all(row["note"] == "out of memory" for row in of(rows, "unfold"))
    assert all(row["ms"] for name in ("ours", "naive", "depthwise") for row in of(rows, name))
    assert "failed: no kernel for this device" in (tmp_path / "bench.md").read_text()


def test_without_naive_nothing_is_called_right(tmp_path, monkeypatch):
    def fill(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(contenders, "elsa_attention_reference", fill)
    rows = run(tmp_path)
    assert all("naive did not run" in row["note"] for name in ("ours", "unfold") for row in of(rows, name))
    assert all(row["note"] == "out of memory" for row in of(rows, "naive"))
    assert all(row["ms"] and row["speedup"] is None for row in of(rows, "depthwise"))


def test_compulsory_bytes(tmp_path):
    rows = run(tmp_path)
    v, logits, filters = 5 * 9 * 8 * 64 * 4, 5 * 2 * 9 * 9 * 8 * 4, 2 * 64 * 9 * 4  # out is as large as v
    assert rows["operator", "tiny stage 1", "forward", "ours"]["bytes"] == v + logits + filters + v
    both = (v + logits + filters + v) + (v + v + logits + filters) + (v + logits + filters)
    assert rows["operator", "tiny stage 1", "forward+backward", "unfold"]["bytes"] == both
    assert rows["operator", "tiny stage 1", "forward", "window"]["bytes"] == 4 * v


def test_slow_rows_are_repeated_less(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SLOW", 1e-9)
    assert all(row["times"] == 1 for row in run(tmp_path).values())


def test_models(tmp_path, monkeypatch):
    create = contenders.create_model
    small = dict(embed_dim=4, depths=(1, 1), num_heads=(1, 2), patch_size=16)
    monkeypatch.setattr(contenders, "create_model", lambda name, attn: create(name, attn=attn, **small))
    rows = run(tmp_path, level="model", shapes="swin_t")
    assert list(rows) == [("model", "swin_t", kind, row) for kind in ("forward", "forward+backward") for row in ("elsa", "window", "elsa naive")]
    assert all(row["images_per_s"] == pytest.approx(5e3 / row["ms"]) and row["input"] == [5, 3, 224, 224] for row in rows.values())


@pytest.mark.parametrize("arguments, message", [
    (["--level", "kernel"], "argument --level: invalid choice: 'kernel'"),
    (["--shapes", "swin_x"], "argument --shapes: invalid choice: 'swin_x'"),
    (["--level", "model", "--shapes", "tiny"], "--shapes: got tiny, expected some of swin_t"),
    (["--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
    (["--repeats", "-1"], "--repeats: got -1, expected at least 1"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--device", "tpu"], "--device: got 'tpu', expected cpu"),
    (["--out", "bench"], "--out: got bench, expected a name that ends in .json"),
    (["--tune", "--device", "cpu"], "--tune: got device cpu, expected a GPU"),
    (["--compile-only", "--arch", "sm_91"], "--arch: got 'sm_91', expected one of sm_80"),
    (["--repaets", "2"], "did you mean --repeats"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
