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

from eval.tasks import task_of
from models.info import info
from train.command_line import Parser
from train.config import KEYS, family_of, model_overrides, recipe_path, resolve, to_dict
from train.progress import Remaining, rate_of
from train.run_folder import read_log, replace_atomically
from train.runs import name_of_data, refuse_inputs

ENTRY_POINT = Path(__file__).parents[1] / "run.py"


def main(argv):
    parser = Parser(prog="run.py compare",
                    description="Train one architecture with several kinds of attention and compare them.")
    parser.add_argument("model", nargs="?", default="swin_t", help=KEYS["model"].metadata["help"])
    parser.add_argument("--attn", default="window,dwconv,ddf,neighborhood,elsa",
                        help="kinds of attention, with commas between them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, with seeds 0, 1, ...")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="any options of `run.py train`, the same for all runs")
    parser.add_argument("--recipe", default=None, help="as for `run.py train`")
    parser.add_argument("--out", default=None,
                        help="folder of the runs and of the table; default: runs/compare-<model>-<data>")
    parser.add_keys(["data"])
    options = vars(parser.parse(argv))
    attns, seeds = options.pop("attn").split(","), options.pop("seeds")
    recipe, out, settings = options.pop("recipe"), options.pop("out"), options.pop("set")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key.replace("-", "_") not in KEYS or key in ("attn", "seed", "out", "model", "data"):
            raise ValueError(f"--set {setting!r} does not fit; expected KEY=VALUE with an option of `run.py train` "
                             "other than model, data, attn, seed and out")
        options[key.replace("-", "_")] = value
    if seeds < 1 or len(set(attns)) < len(attns):
        raise ValueError(f"--seeds {seeds} --attn {','.join(attns)}: expected 1 seed or more, and every kind of "
                         "attention once")
    if not recipe and options.get("data"):  # plain Swin's own recipe would make two kinds of training
        shared = recipe_path(options["model"], options["data"], attn="elsa")
        recipe = str(shared) if shared.exists() else None
    config, _ = resolve(options, recipe)
    folder = Path(out or f"runs/compare-{config.model}-{name_of_data(config.data)}")
    refuse_inputs("--out", folder, config.data)
    return Comparison(config, attns, seeds, folder, options, recipe, "run.py compare " + shlex.join(argv)).run()


class Comparison:
    """Runs of train() in processes of their own, so that what ends one of them ends no other, and the results of those
    that finished."""

    def __init__(self, config, attns, seeds, folder, options, recipe, command):
        self.config, self.attns, self.seeds, self.folder, self.command = config, attns, seeds, folder, command
        self.task = task_of(config.model)
        self.metric, self.metric_name = next(iter(self.task.evaluation.METRICS.items()))
        settings = [(key, value) for key, value in options.items() if key != "model"]
        self.arguments = [config.model]
        for key, value in [*settings, *([("recipe", recipe)] if recipe else [])]:
            self.arguments += ["--" + key.replace("_", "-"), str(value)]
        if config.num_classes is None:
            config.num_classes = len(self.task.training.datasets(config)[2])
        size = {"img_size": config.img_size} if family_of(config.model) == "volo" else {}
        self.costs = {}
        for attn in attns:  # a name that is not known is answered here, before anything is trained
            rows = info(config.model, (config.img_size, config.img_size), attn=attn, num_classes=config.num_classes,
                        **size, **model_overrides(config))
            self.costs[attn] = {"parameters": rows[0]["parameters"], "macs": rows[0]["macs"]}

    def run(self):
        """Trains what is missing, seed after seed, and writes the table after each run.

        Returns the result, the content of results.json.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        runs = [(attn, seed) for seed in range(self.seeds) for attn in self.attns]
        print(f"compare {', '.join(self.attns)} in {self.config.model}, {self.seeds} seeds, {self.config.epochs} "
              f"epochs on {self.config.data or 'rendered scenes'}: {len(runs)} runs in {self.folder}/", flush=True)
        failed, missing = [], [run for run in runs if len(self.history(*run)) < self.config.epochs]
        remaining, trained = Remaining(len(missing), unit=None), 0
        for number, (attn, seed) in enumerate(runs, 1):
            start, history = time.perf_counter(), self.history(attn, seed)
            if len(history) < self.config.epochs:
                trained += 1
                if self.train(attn, seed):
                    failed.append((attn, seed))
                history = self.history(attn, seed)
            reached = "no epoch finished"
            if history:
                reached = f"{self.metric_name} {history[-1][self.metric]:.2f} after {len(history)} epochs"
            failure = f"  FAILED, see {self.path(attn, seed)}.txt" if (attn, seed) in failed else ""
            seconds = time.perf_counter() - start
            print(f"run {number}/{len(runs)}  {attn}, seed {seed}: {reached}, {seconds:.0f} s{failure}"
                  f"{remaining.after(trained)}", flush=True)
            result = self.write()
        print(self.table(result))
        if failed:
            texts = ", ".join(f"{self.path(*run)}.txt" for run in failed)
            raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the same command starts them again and keeps "
                             f"the others. Their last words are in {texts}")
        return result

    def path(self, attn, seed):
        return self.folder / f"{attn}-{seed}"

    def train(self, attn, seed):
        """One run, continued where it stopped -> exit status."""
        path = self.path(attn, seed)
        resume = ["--resume", str(path)] if (path / "last.pt").exists() else ["--out", str(path)]
        if not (path / "last.pt").exists() and (path / "log.jsonl").exists():
            (path / "log.jsonl").unlink()  # of a run that did not finish an epoch
        arguments = [*self.arguments, "--attn", attn, "--seed", str(seed), *resume]
        command = [sys.executable, str(ENTRY_POINT), "train", *arguments]
        with open(f"{path}.txt", "a") as output:
            return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode

    def history(self, attn, seed):
        """Rows of the finished epochs."""
        return [row for row in read_log(self.path(attn, seed)) if "step" not in row]

    def write(self):
        """results.json, table.md and plot.png, of what has finished so far."""
        rows = [self.row(attn) for attn in self.attns]
        gpu = torch.cuda.is_available() and self.config.device != "cpu"
        device = torch.cuda.get_device_name() if gpu else f"CPU ({os.cpu_count()} cores, {platform.machine()})"
        result = {"command": self.command, "date": date.today().isoformat(), "device": device,
                  "torch": torch.__version__, "metric": self.metric_name, "rows": rows, "config": to_dict(self.config)}
        for name, text in (("results.json", json.dumps(result, indent=1)), ("table.md", self.table(result))):
            replace_atomically(self.folder / name, lambda file: file.write(text.encode(errors="backslashreplace")))
        self.plot(rows)
        return result

    def row(self, attn):
        """What is known of one kind of attention."""
        histories = [self.history(attn, seed) for seed in range(self.seeds)]
        done = [history for history in histories if len(history) >= self.config.epochs]
        last = [history[-1][self.metric] for history in done]
        epochs = [row for history in done for row in history]
        return {"attn": attn, **self.costs[attn], "runs": len(done), self.metric: last,
                "mean": statistics.fmean(last) if last else None,
                "spread": statistics.stdev(last) if len(last) > 1 else None,
                "images_per_s": statistics.median(row["images_per_s"] for row in epochs) if epochs else None,
                "memory": max((row["memory"] or 0 for row in epochs), default=None), "histories": done}

    def table(self, result):
        """Markdown: the table, and what it takes to repeat it."""
        def shown(value, form):
            return "" if value is None else form.format(value)

        lines = [f"| attention | {self.metric_name}, mean | spread | runs | parameters | multiply-adds | training, "
                 "images/s | peak memory |",
                 "|---|--:|--:|--:|--:|--:|--:|--:|"]
        for row in result["rows"]:
            cells = (row["attn"], shown(row["mean"], "{:.2f}"), shown(row["spread"], "{:.2f}"), row["runs"],
                     f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f} M",
                     rate_of(row["images_per_s"]) if row["images_per_s"] else "",
                     shown(row["memory"] and row["memory"] / 2 ** 30, "{:.2f} GB"))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += ["", "After the last epoch, on the validation images; spread is the standard deviation over seeds. "
                  f"{result['device']}, {result['date']}, torch {result['torch']}, amp {self.config.amp}. Repeat with:",
                  "", f"    python {result['command']}", ""]
        return "\n".join(lines)

    def plot(self, rows):
        figure = Figure(figsize=(11, 4), layout="constrained")
        curves, ends = figure.subplots(1, 2)
        for i, row in enumerate(rows):
            for n, history in enumerate(row["histories"]):
                curves.plot([r["epoch"] for r in history], [r[self.metric] for r in history], color=f"C{i}", alpha=0.8,
                            label=None if n else row["attn"])
            if row["mean"] is not None:
                macs = row["macs"] / 1e6
                ends.errorbar([macs], [row["mean"]], [row["spread"] or 0], fmt="o", color=f"C{i}", capsize=4)
                ends.annotate(f" {row['attn']}", (macs, row["mean"]))
        curves.set(xlabel="epoch", ylabel=f"validation {self.metric_name}", title="every run")
        ends.set(xlabel="multiply-adds, M", ylabel=self.metric_name, title="mean and standard deviation over seeds")
        for axes in (curves, ends):
            axes.grid(alpha=0.3)
        if any(row["histories"] for row in rows):
            curves.legend()
        replace_atomically(self.folder / "plot.png", lambda file: figure.savefig(file, format="png", dpi=100))
