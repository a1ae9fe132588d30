"""The benchmark's own honesty: what it checks, counts and leaves out.

On a CPU, at a tiny size, without what torch.compile makes.
"""
import errno
import json

import pytest
import torch

import kernels
import models.elsa
from eval import bench, bench_report, providers
from run import main


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(providers, "SHAPES", {
        "tiny stage 1": providers.Shape(9, 8, 2, 3, 1, 8),
        "swin_t stage 1": providers.Shape(7, 7, 1, 3, 0, 4),
    })
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1.0)


def run(folder, *arguments, level="operator", shapes="tiny"):
    """{(level, shape, pass, row): result} of a run with more images than rows are checked on."""
    bench.main(["--device", "cpu", "--level", *level.split(), "--shapes", *shapes.split(), "--batch-size", "5",
                "--repeats", "2", "--out", str(folder / "bench.json"), *arguments])
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    return {tuple(row[key] for key in ("level", "shape", "pass", "row")): row for row in rows}


def of(rows, name):
    return [row for key, row in rows.items() if key[3] == name]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_table_plot_and_numbers_agree(tmp_path, capsys, dtype):
    rows = run(tmp_path, "--dtype", dtype, level="operator layer", shapes="tiny swin_t")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    table, printed = (tmp_path / "bench.md").read_text(), capsys.readouterr().out
    lines = [bench_report.line(bench_report.cells(row)) for row in rows.values()]
    assert len(lines) == 2 * 2 * (5 + 4) and all(line in table and line in printed for line in lines)
    assert "copies 10 GB/s" in table and dtype in table and torch.__version__ in table
    for (*case, _), row in rows.items():
        assert not row["note"] and 0 < row["min"] <= row["ms"] <= row["max"] and row["times"] == 2
        assert row["speedup"] == rows[*case, "naive"]["ms"] / row["ms"]
        if row["level"] == "operator":
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
            assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 10)
        else:
            assert row["bytes"] is row["gb_per_s"] is None
    assert {shape for _, shape, *_ in rows} == {"tiny stage 1", "swin_t/s stage 1", "swin_t stage 1"}


def test_wrong_result_gets_no_time(tmp_path, monkeypatch):
    noisy = lambda v, *rest, **options: kernels.elsa_attention(v, *rest, **options) + 1e-2 * torch.randn_like(v)
    monkeypatch.setattr(providers, "elsa_attention", noisy)
    rows = run(tmp_path)
    for row in of(rows, "ours"):
        assert row["note"] == "wrong" and row["ms"] is row["speedup"] is row["gb_per_s"] is None
    assert all(row["ms"] and row["speedup"] for row in rows.values() if row["row"] != "ours")


def test_wrong_gradient_of_a_filter_gets_no_time(tmp_path, monkeypatch):
    def wrong(v, logits, mul, add, **options):  # the value is right
        return kernels.elsa_attention(v, logits, mul, 1.01 * add - 0.01 * add.detach(), **options)

    monkeypatch.setattr(providers, "elsa_attention", wrong)
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

    monkeypatch.setattr(providers, "window", fail)
    monkeypatch.setattr(providers, "unfold", fill)
    rows = run(tmp_path)
    assert all(row["note"] == "failed: no kernel for this device" and row["ms"] is None for row in of(rows, "window"))
    assert all(row["note"] == "out of memory" for row in of(rows, "unfold"))
    assert all(row["ms"] for name in ("ours", "naive", "depthwise") for row in of(rows, name))
    assert "failed: no kernel for this device" in (tmp_path / "bench.md").read_text()


def test_without_naive_nothing_is_called_right(tmp_path, monkeypatch):
    def fill(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(providers, "elsa_attention_reference", fill)
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
    monkeypatch.setattr(bench, "MAX_RUN_TIME", 1e-9)
    assert all(row["times"] == 1 for row in run(tmp_path).values())


def test_models(tmp_path, monkeypatch):
    create = providers.create_model
    small = dict(embed_dim=4, depths=(1, 1), num_heads=(1, 2), patch_size=16)
    monkeypatch.setattr(providers, "create_model", lambda name, attn: create(name, attn=attn, **small))
    rows = run(tmp_path, level="model", shapes="swin_t")
    assert list(rows) == [("model", "swin_t", kind, name) for kind in ("forward", "forward+backward")
                          for name in ("elsa", "window", "elsa naive")]
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(5e3 / row["ms"]) and row["input"] == [5, 3, 224, 224]


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


# Where the results go

@pytest.mark.parametrize("out, message", [
    ("file/bench.json", "got file/bench.json, where no file can be written (Not a directory)"),
    ("file/deeper/bench.json", "got file/deeper/bench.json, where no file can be written (Not a directory)"),
    ("/proc/nonexistent/bench.json", "got /proc/nonexistent/bench.json, where no file can be written ("),
    ("x" * 300 + ".json", ".json, where no file can be written (File name too long)"),
    ("folder.json", "got folder.json, but folder.json is a folder"),
    ("table.json", "got table.json, but table.md is a folder"),
    ("plot.json", "got plot.json, but plot.png is a folder"),
])
def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path, monkeypatch, capsys, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("folder.json", "table.md", "plot.png"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: pytest.fail("it computes"))
    assert main(["bench", "--device", "cpu", "--out", out]) == 2
    printed, error = capsys.readouterr()
    assert error.startswith("error: --out: ") and message in error and error.count("\n") == 1 and not printed
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.json", "table.md", "plot.png"}


def test_a_folder_without_permission_is_said_at_once(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(bench_report.tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: pytest.fail("it computes"))
    with pytest.raises(ValueError, match=r"--out: got .*json, where no file can be written \(Permission denied\)"):
        run(tmp_path)


def test_folders_are_made_and_files_replaced(tmp_path):
    folder = tmp_path / "new" / "deeper"
    for _ in range(2):
        run(folder)
        assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.md", "bench.png"}


@pytest.mark.parametrize("name", ["bench.json", "bench.md", "bench.png"])
def test_a_disk_that_fills_up_is_an_error_of_that_file(tmp_path, monkeypatch, name):
    replace_atomically = bench_report.replace_atomically

    def full(path, write):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_atomically(path, write)

    monkeypatch.setattr(bench_report, "replace_atomically", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        run(tmp_path)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / name)
