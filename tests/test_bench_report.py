"""eval/bench_report.py: a row of the table and its bar show what was measured."""
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from eval import bench_report

ROW = {
    "level": "operator", "shape": "swin_t stage 1", "input": [128, 56, 56, 96], "kernel_size": 7, "pass": "forward",
    "row": "ours", "ms": 1.2345, "min": 1.1, "max": 250.4, "times": 20, "speedup": 12.34, "peak_bytes": 3 << 20,
    "bytes": 10 ** 9, "gb_per_s": 810.4, "images_per_s": None, "share_of_copy": 0.4567, "note": "",
}


def test_a_row_of_the_table():
    cells = ("swin_t stage 1", "128x56x56x96", "7", "forward", "ours", "1.23", "1.1-250", "810", "45.7 %", "3", "12.3",
             "", "")
    assert bench_report.cells(ROW) == cells
    shown = [cell.strip() for cell in bench_report.line(cells).split("|")[1:-1]]
    assert shown == list(cells) and len(bench_report.line(cells)) == len(bench_report.RULE)
    nothing = dict.fromkeys(("ms", "min", "max", "speedup", "peak_bytes", "bytes", "gb_per_s", "share_of_copy"))
    assert bench_report.cells({**ROW, **nothing, "note": "wrong"})[5:] == ("",) * 7 + ("wrong",)


def test_bars_of_the_plot():
    axes = Figure().subplots()
    rows = [ROW, {**ROW, "row": "naive", "ms": 15.0, "speedup": None}, {**ROW, "row": "window", "ms": 2.0},
            {**ROW, "row": "unfold", "ms": None, "max": None, "speedup": None, "note": "wrong"}]
    bench_report.bars(axes, rows, (0.5, 300))
    centres = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.patches]
    assert centres == [(0, 1.2345), (1, 15), (2, 2)]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [to_hex(color) for color in ("C1", "C0", "0.7")]
    assert [text.get_text().strip() for text in axes.texts] == ["1.23 ms, 12.3x", "15 ms", "2 ms, 12.3x", "wrong"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1.1, 250.4]] * 3 and axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "naive", "window", "unfold"]
    assert axes.get_xlim() == (0.5, 300) and axes.get_ylim() == (3.6, -0.6)


def test_panels_of_the_plot(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = [{**ROW, "shape": shape, "pass": kind, "row": f"{shape} {kind}"}
            for shape in ("small", "large") for kind in ("forward", "forward+backward")]
    machine = dict(device="a device", date="2026-01-01", torch="2", dtype="float32")
    bench_report.plot({**machine, "rows": rows}, None)
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == [
        f"operator, {row['shape']}, 128x56x56x96: {row['pass']}" for row in rows]
    labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert labels == [[row["row"]] for row in rows]
    assert figure.axes[0].get_xlim() == pytest.approx((1.2345 / 2, 1.2345 * 20))
