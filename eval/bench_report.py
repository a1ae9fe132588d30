"""What `python run.py bench` leaves: a table as it goes, JSON, and beside it Markdown and a plot."""
import contextlib
import json
import tempfile

from matplotlib.figure import Figure

from train.run_folder import replace_atomically

# Headers as wide as their cells.
COLUMNS = (
    "shape           ", "input       ", "k", "pass            ", "row          ", "ms   ", "min-max    ",
    "GB/s  ", "of copy ", "peak MB", "x naive", "images/s", "note",
)
RULE = "|" + "|".join("-" * (len(column) + 2) for column in COLUMNS) + "|"

COLORS = {
    **dict.fromkeys(("ours", "elsa", "elsa compiled"), "C1"),
    **dict.fromkeys(("naive", "unfold", "torch.compile", "elsa naive"), "C0"),
}


# Files

def check_out(out):
    """Makes the folder of `out`, the JSON; raises ValueError if that or a file beside it cannot be written."""
    try:
        with contextlib.suppress(FileExistsError):  # a file where the folder should be: the trial says so
            out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=out.name):
            pass
        for path in (out, out.with_suffix(".md"), out.with_suffix(".png")):
            if path.is_dir():
                raise ValueError(f"--out: got {out}, but {path} is a folder; name another file")
    except OSError as error:
        raise ValueError(f"--out: got {out}, where no file can be written ({error.strerror}); "
                         "name a file in a folder that you may write to") from error


def write(report, out):
    """JSON and Markdown; OSError names the file."""
    replace(out, lambda file: file.write(json.dumps(report, indent=1).encode()))
    replace(out.with_suffix(".md"), lambda file: file.write(markdown(report).encode()))


def write_plot(report, out):
    replace(out.with_suffix(".png"), lambda file: plot(report, file))


def replace(path, write):
    try:
        replace_atomically(path, write)
    except OSError as error:  # a full disk names no file, and the others the temporary one
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


# Table

def heading(report):
    return (f"bench on {report['device']}, {report['date']}, {report['threads']} threads, "
            f"torch {report['torch']}, triton {report['triton']}, Python {report['python']}; {report['dtype']}; "
            f"ms is the median of up to {report['repeats']} calls; "
            f"this device copies {number(report['copy_gb_per_s'])} GB/s "
            f"and multiplies matrices at {number(report['matrix_tflops'])} TFLOP/s")


def markdown(report):
    tables = []
    for level in dict.fromkeys(row["level"] for row in report["rows"]):
        lines = [line(cells(row)) for row in report["rows"] if row["level"] == level]
        tables += [f"\n## {level}\n", line(COLUMNS), RULE, *lines]
    return "\n".join([heading(report), *tables, ""])


def line(cells):
    return "| " + " | ".join(cell.ljust(len(column)) for cell, column in zip(cells, COLUMNS)) + " |"


def cells(row):
    shown = lambda value, scale=1, unit="": "" if value is None else number(value * scale) + unit
    return (
        row["shape"],
        "x".join(map(str, row["input"])),
        shown(row["kernel_size"]),
        row["pass"],
        row["row"],
        shown(row["ms"]),
        f"{number(row['min'])}-{number(row['max'])}" if row["ms"] else "",
        shown(row["gb_per_s"]),
        shown(row["share_of_copy"], 100, " %"),
        shown(row["peak_bytes"], 2 ** -20),
        shown(row["speedup"]),
        shown(row["images_per_s"]),
        row["note"],
    )


def number(x):
    """Three digits, or more before the point."""
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


# Plot

def plot(report, file):
    """Bars of milliseconds, a line of panels a shape: forward left, forward+backward right."""
    groups = {}  # title -> pass -> rows
    for row in report["rows"]:
        title = f"{row['level']}, {row['shape']}, {'x'.join(map(str, row['input']))}"
        groups.setdefault(title, {}).setdefault(row["pass"], []).append(row)
    times = [row["ms"] for row in report["rows"] if row["ms"]] or [1]
    limits = min(times) / 2, max(times) * 20

    counts = [len(passes["forward"]) for passes in groups.values()]
    figure = Figure(figsize=(13, 1.2 + sum(0.25 * n + 0.6 for n in counts)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=[n + 1 for n in counts])
    for (title, passes), pair in zip(groups.items(), panels):
        for (kind, rows), axes in zip(passes.items(), pair):
            bars(axes, rows, limits)
            axes.set_title(f"{title}: {kind}", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("ms: median, least to most")
    figure.suptitle(
        f"{report['device']}, {report['date']}, torch {report['torch']}, {report['dtype']}\n"
        "orange: ours, blue: the same computed otherwise, grey: something else, for scale; 2x: twice as fast as naive")
    figure.savefig(file, format="png", dpi=80)


def bars(axes, rows, limits):
    for y, row in enumerate(rows):
        if row["ms"]:
            axes.barh(y, row["ms"], color=COLORS.get(row["row"], "0.7"))
            axes.plot([row["min"], row["max"]], [y, y], "k-", linewidth=1)
        gain = f", {number(row['speedup'])}x" if row["speedup"] else ""
        label = f" {number(row['ms'])} ms{gain}" if row["ms"] else f" {row['note']}"
        axes.text(row["max"] or limits[0], y, label, va="center", fontsize=8)
    axes.set(xscale="log", xlim=limits, ylim=(len(rows) - 0.4, -0.6),
             yticks=range(len(rows)), yticklabels=[row["row"] for row in rows])
    axes.grid(axis="x", alpha=0.3)
