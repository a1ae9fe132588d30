"""The benchmark's own honesty: what it checks, counts and leaves out.

On a CPU, at a tiny size, without what torch.compile makes.
"""
import errno
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import kernels
import models.elsa
from eval import bench, bench_report, providers
from kernels import backend
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


def test_the_report_on_stdout_is_that_of_the_file(tmp_path, capsys):
    run(tmp_path, "--json")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "bench.json").read_text())
    assert "tiny stage 1" in printed.err


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
    (["--level", "input", "--json"], "--json is for the times"),
    (["--out", "bench"], "--out: got bench, expected a name that ends in .json"),
    (["--tune", "--device", "cpu"], "--tune: got device cpu, expected a GPU"),
    pytest.param(["--compile-only", "--arch", "sm_91"], "--arch: got 'sm_91', expected one of sm_80",
                 marks=pytest.mark.skipif(not backend.HAS_TRITON, reason="needs Triton")),
    (["--repaets", "2"], "did you mean --repeats"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_needs_triton_says_so(monkeypatch, capsys):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or name == "eval.bench_compiled"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    assert main(["bench", "--compile-only"]) == 2
    assert "--compile-only: triton, which compiles the kernels, is not installed" in capsys.readouterr().err
    monkeypatch.setenv("ELSA_BACKEND", "triton")
    assert main(["eval", "swin_t", "--attn", "elsa", "--val-limit", "2", "--device", "cpu"]) == 2
    assert "while ELSA_BACKEND=triton is set: install it" in capsys.readouterr().err


# Where the results go

@pytest.mark.parametrize("out, message", [
    ("file/bench.json", "got file/bench.json, where no file can be written (Not a directory)"),
    ("file/deeper/bench.json", "got file/deeper/bench.json, where no file can be written (Not a directory)"),
    ("/proc/nonexistent/bench.json", "got /proc/nonexistent/bench.json, where no file can be written ("),
    ("x" * 300 + ".json", ".json, where no file can be written (File name too long)"),
    ("x" * 245 + ".json", ".json, where no file can be written (File name too long)"),  # with what is added meanwhile
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


# What is measured

def script(monkeypatch, *times):
    """Makes bench.time_ms answer these milliseconds, one after the other."""
    answers = iter(times)
    monkeypatch.setattr(bench, "time_ms", lambda call, *_: (call(), next(answers))[1])


def doubled(v):
    return providers.Provider(lambda x: 2 * x, (v,))


def test_median_least_and_most_of_rows_that_take_turns(monkeypatch):
    v, called = torch.ones(2, 3), []
    named = lambda name: providers.Provider(lambda x: called.append(name) or 2 * x, (v,))
    script(monkeypatch, 30.0, 3.0, 10.0, 1.0, 50.0, 100.0)
    builders = {"naive": lambda: named("naive"), "other": lambda: named("other")}
    naive, other = bench.measure(builders, v, backward=False, device=torch.device("cpu"), repeats=3)
    assert called == ["naive", "other"] * 4  # once to warm up
    assert (naive["ms"], naive["min"], naive["max"], naive["times"], naive["speedup"]) == (30, 10, 50, 3, 1)
    assert (other["ms"], other["min"], other["max"], other["times"], other["speedup"]) == (3, 1, 100, 3, 10)
    assert naive["bytes"] == 2 * 6 * 4 and naive["peak_bytes"] is None


def test_a_row_is_repeated_no_more_after_ten_seconds(monkeypatch):
    script(monkeypatch, 4000.0, 4000.0, 2000.0, 1.0)
    v = torch.ones(2, 3)
    (naive,) = bench.measure({"naive": lambda: doubled(v)}, v, backward=False, device=torch.device("cpu"), repeats=20)
    assert naive["times"] == 3 and naive["note"] == ""


def test_a_row_that_fails_while_it_is_timed_has_no_time(monkeypatch):
    v, times = torch.ones(2, 3), iter([1.0, 2.0])
    monkeypatch.setattr(bench, "time_ms", lambda *_: next(times, None) or fail())

    def fail():
        raise torch.OutOfMemoryError("the device is full")

    (naive,) = bench.measure({"naive": lambda: doubled(v)}, v, backward=False, device=torch.device("cpu"), repeats=3)
    assert naive["note"] == "out of memory" and naive["ms"] is naive["speedup"] is naive["bytes"] is None
    assert naive["times"] == 0


@pytest.mark.parametrize("candidate, note", [
    (lambda x, weight: x * weight, ""),
    (lambda x, weight: 1.1 * x * weight, "wrong"),
    (lambda x, weight: x * (1.1 * weight - 0.1 * weight.detach()), "wrong"),
    (lambda x, weight: (1.1 * x - 0.1 * x.detach()) * weight, "wrong"),
])
def test_gradients_are_checked_too(monkeypatch, candidate, note):
    script(monkeypatch, *[1.0] * 2)
    x, weight = torch.rand(6, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    provider = lambda function: providers.Provider(lambda x: function(x, weight), (x,), (weight,))
    builders = {"naive": lambda: provider(lambda x, weight: x * weight), "ours": lambda: provider(candidate)}
    grad_out = torch.ones(6, 3)
    naive, ours = bench.measure(builders, grad_out, backward=True, device=torch.device("cpu"), repeats=1)
    assert naive["note"] == "" and ours["note"] == note and ours["ms"] == (None if note else 1)
    assert grad_out.all(), "what is timed has the gradients of all images"


def test_a_failure_of_naive_leaves_nothing_checked(monkeypatch):
    script(monkeypatch, *[1.0] * 2)
    v = torch.ones(2, 3)
    builders = {"naive": lambda: 1 / 0, "ours": lambda: doubled(v), "window": lambda: doubled(v)}
    naive, ours, window = bench.measure(builders, v, backward=False, device=torch.device("cpu"), repeats=1)
    assert (naive["note"], ours["note"]) == ("failed: division by zero", "failed: unchecked, as naive did not run")
    assert window["ms"] == 1 and window["speedup"] is None


def test_what_needs_the_compiler_is_left_out_unless_asked_for(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bench, "measure", lambda builders, *_: seen.append({*builders}) or [])
    monkeypatch.setattr(bench_report, "write_plot", lambda *_: None)
    for arguments in ((), ("--compile",), ("--no-compile",)):
        run(tmp_path, *arguments)
    assert seen[0] == seen[4] == {"ours", "naive", "unfold", "depthwise", "window"}
    assert seen[2] == seen[0] | {"torch.compile", "flex"}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2 ** -4)])
def test_results_are_equal_within_eight_roundings_of_the_largest(dtype, tolerance):
    reference = torch.tensor([100.0, 0.0])
    for error, close in ((0.9, True), (1.2, False)):
        result = reference.to(dtype).float() + torch.tensor([0, error * tolerance * 100])
        assert bench.allclose([reference, result], [reference.to(dtype)] * 2) == close
    assert not bench.allclose([torch.tensor([float("nan")])], [torch.ones(1)])


def test_figures_of_the_machine(monkeypatch):
    monkeypatch.undo()
    cpu = torch.device("cpu")
    script(monkeypatch, 100.0, 100.0, 1.0, 2.0, 3.0, 4.0, 50.0)
    assert bench.copy_bandwidth(cpu) == pytest.approx(2 * 2 ** 28 / 3e-3 / 1e9)
    script(monkeypatch, 100.0, 100.0, 1.0, 2.0, 3.0, 4.0, 50.0)
    assert bench.matmul_rate(cpu, torch.float32) == pytest.approx(2 * 1024 ** 3 / 3e-3 / 1e12)
    assert bench.environment(cpu)["threads"] == torch.get_num_threads()


def test_time_of_a_call(monkeypatch):
    clock = iter([5.0, 5.25])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.time_ms(lambda: None, torch.device("cpu")) == 250


def test_order_of_events_on_a_gpu(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 7.0

    class Cache:
        def zero_(self):
            log.append("cache")

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    assert bench.time_ms(lambda: log.append("call"), gpu, Cache()) == 7
    assert log == ["cache", "record", "call", "record", "synchronize"]
    log.clear()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: log.append("peak") or 100)
    assert bench.peak_memory(lambda: log.append("call"), gpu) == 70 and log == ["reset", "call", "peak"]


def test_figures_of_a_row(monkeypatch):
    measured = {"ms": 2.0, "bytes": 10 ** 7}
    monkeypatch.setattr(bench, "measure", lambda *_: [measured])
    args = SimpleNamespace(batch_size=5, compile=False, repeats=1)
    monkeypatch.setattr(bench, "LEVELS", dict.fromkeys(bench.LEVELS, lambda *_: ({}, torch.ones(5, 3))))
    figures = lambda level: next(bench.run(level, "x", None, False, args, torch.float32, torch.device("cpu"), 10.0))
    keys = ("bytes", "gb_per_s", "share_of_copy", "images_per_s")
    assert [figures("operator")[key] for key in keys] == [10 ** 7, 5, 0.5, None]
    assert [figures("layer")[key] for key in keys] == [None] * 4
    assert [figures("model")[key] for key in keys] == [None, None, None, 2500]
