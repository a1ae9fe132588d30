"""`run.py eval`: one model on one data set, its scores printed."""
import math
import tempfile
from pathlib import Path

from eval import printed_as_json
from eval.options import load_model, make_parser, settle, weights_file
from eval.tasks import TASKS, task_of
from train.data import num_workers
from train.distributed import join_ranks, leave_ranks
from train.progress import Watched
from train.run_folder import naming, notes_of
from train.runs import refuse_inputs

# Photographs that a segmenter or detector is shown at a time, without --batch-size: on a CPU more take more memory.
PER_RANK = {"cuda": 4, "cpu": 1}


def main(argv):
    """Evaluates what the command line says, and returns the result of the task's evaluate()."""
    parser = make_parser("run.py eval", "Evaluate a classifier, a segmenter or a detector.")
    parser.add_argument("--multi-scale", action="store_true",
                        help="segmenters: mean over six scales, each mirrored too")
    parser.add_argument("--dump", metavar="PATH",
                        help="segmenters: folder for the predictions, PNGs where 1 is the first class; detectors: file "
                             "for the detections, COCO's results JSON")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    given = vars(parser.parse(argv))
    weights, multi_scale, dump, as_json = (given.pop(name) for name in ("weights", "multi_scale", "dump", "json"))
    weights = weights and weights_file(weights)
    config, classes = settle(given, weights)
    for option, wanted, offered in (("--multi-scale", multi_scale, "MULTI_SCALE"), ("--dump", dump, "DUMPS")):
        able = [f"{task.model}s" for task in TASKS.values() if getattr(task.evaluation, offered)]
        task = task_of(config.model)
        if wanted and f"{task.model}s" not in able:
            raise ValueError(f"{option} is for {' and '.join(able)}; {config.model} is a {task.model}")
    if not as_json:
        return run(config, weights, classes, multi_scale, dump)
    return printed_as_json(lambda: {"model": config.model, "attn": config.attn, "weights": weights, "data": config.data,
                                    **run(config, weights, classes, multi_scale, dump)})


def run(config, weights, classes, multi_scale=False, dump=None):
    """Prints the scores of a model, and returns the result of its task's evaluate().

    config: Config. weights: file or None. classes: names of the checkpoint's classes, or None. multi_scale, dump: see
    the task's module.
    """
    rank, world, device = join_ranks(config.device)
    try:
        task = task_of(config.model)
        evaluation, named = task.evaluation, classes
        dataset, classes = evaluation.dataset(config, classes, **({"multi_scale": True} if multi_scale else {}))
        check_classes(config.num_classes, classes, named, weights)
        config.num_classes = config.num_classes or len(classes)
        if dump:
            check_dump(dump, evaluation.DUMPS, config.data, weights)
            if evaluation.DUMPS == "folder" and config.num_classes > 255:
                raise ValueError(f"--dump: {config.num_classes} classes; expected at most 255, which fit into PNGs of "
                                 "8 bits from 1 on")
        if rank == 0:
            size = "at" if task.model == "classifier" else "short side"
            views = ", 6 scales, each mirrored too" if multi_scale else ""
            print(f"eval {config.model}, attn {config.attn or 'default'}, "
                  f"{weights or 'UNTRAINED: no --weights were given'}\n  {len(dataset)} images of "
                  f"{config.data or 'held-out rendered scenes'}, {size} {config.img_size} px{views}, "
                  f"{config.num_classes} classes, {world} x {device}", flush=True)
            for note in notes_of("validation", dataset):
                print("  " + note, flush=True)
        model = load_model(config, weights).to(device)
        per_rank = math.ceil(config.batch_size / world) if config.batch_size else PER_RANK[device.type]
        loader = evaluation.loader(dataset, per_rank, rank, world, num_workers(config))
        loader = Watched(loader, len(dataset), rank)
        result = evaluation.evaluate(model, loader, device, config.amp, dump)
        if rank == 0:
            print(evaluation.table(result, classes))
        return result
    finally:
        leave_ranks()


def check_classes(num_classes, classes, named, weights):
    """Raises ValueError when a model has other classes than the data.

    num_classes: as configured, or None. classes: names of the data's, or of the model's where it knows them. named: the
    names in the checkpoint, or None. A model may have more than it names: then it was trained so.
    """
    if num_classes is not None and num_classes < len(classes):
        raise ValueError(f"num_classes = {num_classes}, but the data has {len(classes)}; expected at least as many")
    if weights and named is None and num_classes not in (None, len(classes)):
        raise ValueError(f"num_classes = {num_classes}, but the data has {len(classes)}, and {weights} does not say "
                         "which are which; expected as many")


def check_dump(dump, kind, data, weights):
    """Makes the folder of --dump. Raises ValueError or OSError where it would write over an input, or cannot write.

    kind: "folder" or "file", which it is for this task.
    """
    refuse_inputs("--dump", dump, data, [weights])
    path = Path(dump)
    if kind == "folder" and path.exists() and not path.is_dir():
        raise ValueError(f"--dump {path} is a file; expected a folder for the predictions")
    if kind == "file" and path.is_dir():
        raise ValueError(f"--dump {path} is a folder; expected a file, as {path / 'found.json'}")
    folder = path if kind == "folder" else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder):
        pass
