"""`run.py compare`: one architecture with several kinds of attention, trained alike, side by side in one table."""
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure

from models.info import info
from train.config import KEYS, Parser, model_overrides, resolve, to_dict
from train.loop import TASKS
from train.run_folder import replace_atomically

DOOR = Path(__file__).parents[1] / "run.py"


def main(argv):
    parser = Parser(prog="run.py compare", description="Train one architecture with several kinds of attention and compare them.")
    parser.add_argument("model", nargs="?", default="swin_t", help=KEYS["model"].metadata["help"])
    parser.add_argument("--attn", default="window,dwconv,ddf,neighborhood,elsa", help="kinds of attention, with commas between them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, with seeds 0, 1, ...")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any options of `run.py train`, the same for all runs")
    parser.add_argument("--recipe", default=None, help="as for `run.py train`")
    parser.add_argument("--out", default=None, help="folder of the runs and of the table; default: runs/compare-<model>-<data>")
    parser.add_keys(["data"])
    options = vars(parser.parse(argv))
    model, attns, seeds, recipe, out = options["model"], options.pop("attn").split(","), options.pop("seeds"), options.pop("recipe"), options.pop("out")
    for setting in options.pop("set"):
        key, equals, value = setting.partition("=")
        if not equals or key.replace("-", "_") not in KEYS or key in ("attn", "seed", "out", "model", "data"):
            raise ValueError(f"--set {setting!r} does not fit; expected KEY=VALUE with an option of `run.py train` other than model, data, attn, "
                             "seed and out")
        options[key.replace("-", "_")] = value
    if seeds < 1 or len(set(attns)) < len(attns):
        raise ValueError(f"--seeds {seeds} --attn {','.join(attns)}: expected 1 seed or more, and every kind of attention once")
    config, _ = resolve(options, recipe)
    data = Path(config.data).resolve().name if config.data else "scenes"
    comparison = Comparison(config, attns, seeds, Path(out or f"runs/compare-{model}-{data}"), options, recipe, "run.py compare " + shlex.join(argv))
    return comparison.run()


class Comparison:
    """Runs of train() in processes of their own, so that what ends one of them ends no other, and the results of those that finished."""

    def __init__(self, config, attns, seeds, folder, options, recipe, command):
        self.config, self.attns, self.seeds, self.folder, self.command = config, attns, seeds, folder, command
        self.metric, self.metric_name = next(iter(TASKS[config.model.split("_")[0]].METRICS.items()))
        words = [word for key, value in options.items() if key != "model" for word in ("--" + key.replace("_", "-"), str(value))]
        self.arguments = [config.model, *words, *(["--recipe", recipe] if recipe else [])]
        self.costs = {}
        for attn in attns:  # a name that is not known is answered here, before anything is trained
            rows = info(config.model, (config.img_size, config.img_size), attn=attn, **self.classes(), **model_overrides(config))
            self.costs[attn] = {"parameters": rows[0]["parameters"], "macs": rows[0]["macs"]}

    def classes(self):
        """How many the runs will have, for the size of the classifier."""
        if self.config.num_classes is None:
            self.config.num_classes = len(TASKS[self.config.model.split("_")[0]].datasets(self.config)[2])
        sized = {"img_size": self.config.img_size} if self.config.model.startswith("volo") else {}
        return {"num_classes": self.config.num_classes, **sized}

    def run(self):
        """Trains what is missing, seed after seed, and writes the table after each run. Returns the result, the content of results.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        todo = [(attn, seed) for seed in range(self.seeds) for attn in self.attns]
        print(f"compare {', '.join(self.attns)} in {self.config.model}, {self.seeds} seeds, {self.config.epochs} epochs on "
              f"{self.config.data or 'rendered scenes'}: {len(todo)} runs in {self.folder}/", flush=True)
        failed = []
        for number, (attn, seed) in enumerate(todo, 1):
            start, history = time.perf_counter(), self.history(attn, seed)
            if len(history) < self.config.epochs:
                if self.train(attn, seed):
                    failed.append((attn, seed))
                history = self.history(attn, seed)
            reached = f"{self.metric_name} {history[-1][self.metric]:.2f} after {len(history)} epochs" if history else "no epoch finished"
            print(f"run {number}/{len(todo)}  {attn}, seed {seed}: {reached}, {time.perf_counter() - start:.0f} s"
                  + (f"  FAILED, see {self.path(attn, seed)}.txt" if (attn, seed) in failed else ""), flush=True)
            result = self.write()
        print(self.table(result))
        if failed:
            raise ValueError(f"{len(failed)} of {len(todo)} runs failed; the same command starts them again and keeps the others. Their last "
                             f"words are in {', '.join(str(self.path(*run)) + '.txt' for run in failed)}")
        return result

    def path(self, attn, seed):
        return self.folder / f"{attn}-{seed}"

    def train(self, attn, seed):
        """One run, continued where it stopped -> exit status."""
        path = self.path(attn, seed)
        resume = ["--resume", str(path)] if (path / "last.pt").exists() else ["--out", str(path)]
        if not (path / "last.pt").exists() and (path / "log.jsonl").exists():
            (path / "log.jsonl").unlink()  # of a run that did not finish an epoch
        with open(f"{path}.txt", "a") as words:
            return subprocess.run([sys.executable, str(DOOR), "train", *self.arguments, "--attn", attn, "--seed", str(seed), *resume],
                                  stdout=words, stderr=subprocess.STDOUT).returncode

    def history(self, attn, seed):
        """Rows of the finished epochs."""
        log = self.path(attn, seed) / "log.jsonl"
        return [row for row in map(json.loads, log.read_text().splitlines()) if "step" not in row] if log.exists() else []

    def write(self):
        """results.json, table.md and plot.png, of what has finished so far."""
        rows = []
        for attn in self.attns:
            histories = [self.history(attn, seed) for seed in range(self.seeds)]
            done = [history for history in histories if len(history) >= self.config.epochs]
            last = [history[-1][self.metric] for history in done]
            rows.append({"attn": attn, **self.costs[attn], "runs": len(done), self.metric: last, "mean": statistics.fmean(last) if last else None,
                         "spread": statistics.stdev(last) if len(last) > 1 else None,
                         "images_per_s": statistics.median(row["images_per_s"] for history in done for row in history) if done else None,
                         "memory": max((row["memory"] or 0 for history in done for row in history), default=None), "histories": done})
        gpu = torch.cuda.is_available() and self.config.device != "cpu"
        device = torch.cuda.get_device_name() if gpu else f"CPU ({os.cpu_count()} cores, {platform.machine()})"
        result = {"command": self.command, "date": date.today().isoformat(), "device": device, "torch": torch.__version__,
                  "metric": self.metric_name, "rows": rows, "config": to_dict(self.config)}
        replace_atomically(self.folder / "results.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
        replace_atomically(self.folder / "table.md", lambda file: file.write(self.table(result).encode()))
        self.plot(rows)
        return result

    def table(self, result):
        """Markdown: the table, and what it takes to repeat it."""
        def shown(value, form):
            return "" if value is None else form.format(value)

        lines = [f"| attention | {self.metric_name}, mean | spread | runs | parameters | multiply-adds | training, images/s | peak memory |",
                 "|---|--:|--:|--:|--:|--:|--:|--:|"]
        for row in result["rows"]:
            lines.append(f"| {row['attn']} | {shown(row['mean'], '{:.2f}')} | {shown(row['spread'], '{:.2f}')} | {row['runs']} | "
                         f"{row['parameters']:,} | {row['macs'] / 1e6:.1f} M | {shown(row['images_per_s'], '{:.0f}')} | "
                         f"{shown(row['memory'] and row['memory'] / 2 ** 30, '{:.2f} GB')} |")
        return "\n".join([*lines, "", f"After the last epoch, on the validation images; spread is the standard deviation over seeds. {result['device']}, "
                          f"{result['date']}, torch {result['torch']}, amp {self.config.amp}. Repeat with:", "", f"    python {result['command']}", ""])

    def plot(self, rows):
        figure = Figure(figsize=(11, 4), layout="constrained")
        curves, ends = figure.subplots(1, 2)
        for i, row in enumerate(rows):
            for history in row["histories"]:
                label = row["attn"] if history is row["histories"][0] else None
                curves.plot([r["epoch"] for r in history], [r[self.metric] for r in history], color=f"C{i}", alpha=0.8, label=label)
            if row["mean"] is not None:
                ends.errorbar([row["macs"] / 1e6], [row["mean"]], [row["spread"] or 0], fmt="o", color=f"C{i}", capsize=4)
                ends.annotate(f" {row['attn']}", (row["macs"] / 1e6, row["mean"]))
        curves.set(xlabel="epoch", ylabel=f"validation {self.metric_name}", title="every run")
        ends.set(xlabel="multiply-adds, M", ylabel=self.metric_name, title="mean and standard deviation over seeds")
        for axes in (curves, ends):
            axes.grid(alpha=0.3)
        if any(row["histories"] for row in rows):
            curves.legend()
        replace_atomically(self.folder / "plot.png", lambda file: figure.savefig(file, format="png", dpi=100))
