"""`run.py plot`: the losses and scores of several training runs in one picture."""
import os
from pathlib import Path

from eval.tasks import task_of
from train.command_line import Parser
from train.curves import Points, comparison_of
from train.run_folder import read_log, replace_atomically
from train.runs import refuse_inputs, saved_configuration

KINDS = (".png", ".pdf", ".svg")


def main(argv):
    parser = Parser(prog="run.py plot", description="Draw the loss and the chosen score of several runs together.")
    parser.add_argument("runs", nargs="+", help="folders of runs, or files in them")
    parser.add_argument("--out", default="runs/plot.png", help=f"the picture: {', '.join(KINDS)}")
    options = vars(parser.parse(argv))
    out, folders = Path(options["out"]), [_folder(run) for run in dict.fromkeys(options["runs"])]
    if out.suffix.lower() not in KINDS:
        raise ValueError(f"--out {out}: a picture of this kind cannot be written; expected {', '.join(KINDS)}")
    logs = {folder: Points(read_log(folder)) for folder in folders}
    metric, name = _metric(folders)
    for folder, points in logs.items():
        if not points.epochs:
            raise ValueError(f"{folder}: no epoch of this run is finished; there is nothing to draw yet")
    names = [folder.resolve().name for folder in folders]
    runs = {name if names.count(name) == 1 else str(folder): logs[folder] for name, folder in zip(names, folders)}
    runs = {os.fsencode(label).decode("utf-8", "replace"): points for label, points in runs.items()}
    refuse_inputs("--out", out, files=[folder / "curves.png" for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = comparison_of(runs, metric, name)
    replace_atomically(out, lambda file: figure.savefig(file, format=out.suffix[1:].lower(), dpi=100))
    for label, points in runs.items():
        scores = [row[metric] for row in points.epochs]
        print(f"{label}: {len(scores)} epochs, {name} {max(scores):.2f} at best, {scores[-1]:.2f} at the end")
    print(f"{out}: {len(runs)} runs")


def _folder(run):
    path = Path(run)
    path = path.parent if path.is_file() else path
    if not (path / "log.jsonl").is_file():
        raise FileNotFoundError(f"{run}: no log.jsonl there; expected the folder of a run")
    return path


def _metric(folders):
    """(key, name) of the score that chooses best.pt; raises ValueError where the runs have different ones."""
    models = {folder: (saved_configuration(folder) or {}).get("model", "swin_t") for folder in folders}
    metrics = {next(iter(task_of(model).evaluation.METRICS.items())): folder for folder, model in models.items()}
    if len(metrics) > 1:
        told = ", ".join(f"{folder} has {name}" for (_, name), folder in metrics.items())
        raise ValueError(f"the runs are of different tasks and have no score in common: {told}; draw them apart")
    return next(iter(metrics))
