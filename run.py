"""Train, evaluate and time ELSA.

    python run.py train swin_t --attn elsa                          rendered scenes, no download, minutes on a laptop
    python run.py train swin_t --attn elsa --data DIR               your own photographs, or ImageNet as published
    python run.py train volo_d1 --attn elsa                         another architecture
    python run.py train upernet_swin_t --attn elsa                  segmentation; --data DIR takes ADE20K's folders
    python run.py train mask_rcnn_swin_t --attn elsa                detection and masks; --data DIR takes COCO's folders
    torchrun --nproc-per-node 8 run.py train swin_t --attn elsa --data DIR
    python run.py train swin_t --attn elsa --resume                 continue the newest run of this name
    python run.py eval swin_t --attn elsa --weights FILE --data DIR
    python run.py predict upernet_swin_t --weights FILE IMAGE...    what the model sees, drawn into the images
    python run.py predict swin_t --weights FILE --show attention --at 120,80 IMAGE     what this pixel attends to
    python run.py export swin_t --weights FILE --out model.onnx     a file that runs without this project; .pt2 too
    python run.py info swin_t --attn elsa                           parameters, multiply-adds and memory, layer by layer
    python run.py compare swin_t --attn window,dwconv,elsa          kinds of attention, trained alike, in one table
    python run.py plot RUN...                                       losses and scores of several runs in one picture
    python run.py bench                                             operator, layer and model timings of this machine

`python run.py train MODEL --help` shows the options of a model; `--batch-size 64` overrides the recipe's batch_size.
"""
import contextlib
import difflib
import importlib.metadata
import os
import platform
import re
import sys
import traceback
from pathlib import Path

from train import cores

VERSION = "0.1.0"

cores.settle_threads()  # before torch is imported

START = """ELSA, enhanced local self-attention (arXiv 2112.12786): train, evaluate, look at, export models.

Try first, without any data: rendered scenes, minutes on a laptop
    python run.py train swin_t --attn elsa
    python run.py eval --weights runs/swin_t-elsa-scenes
    python run.py info swin_t --attn elsa
Then your own photographs: DIR with a folder for each class
    python run.py train swin_t --attn elsa --data DIR
    python run.py predict --weights runs/swin_t-elsa-DIR IMAGE...
    python run.py predict --weights runs/swin_t-elsa-DIR --show attention --at 120,80 IMAGE

Models                                                   --attn
    classify    swin_t, swin_s, swin_b                   window, elsa, dwconv, ddf, ...
                volo_d1 to volo_d5                       outlook, elsa, ...
    segment     upernet_swin_t, _s, _b                   as swin
    detect      mask_rcnn_swin_t, _s, _b                 as swin
                cascade_mask_rcnn_swin_t, _s, _b         as swin

Commands: train, eval, predict, export (pt2, ONNX, safetensors), info, compare (kinds of attention),
plot (several runs), bench (this machine). `python run.py help` shows examples, `python run.py
COMMAND --help` the options, `python run.py train MODEL --help` those of a model with their values."""


def train(argv):
    from train.command_line import parse_train
    if several_ranks():
        from train import watch
        options = parse_train(argv, watch.current.from_rank_0)
    else:
        options = parse_train(argv)  # before torch is imported: a mistake is answered at once
    if options is None:  # it asked for help
        return
    config, resume, notes = options
    from eval.tasks import task_of
    from train import loop
    task = task_of(config.model)
    loop.train(config, task.training, task.evaluation, resume, notes)


def evaluate(argv):
    from eval.evaluate import main
    main(argv)


def predict(argv):
    from eval.predict import main
    return main(argv)


def export(argv):
    from eval.export import main
    main(argv)


def info(argv):
    from eval.info import main
    main(argv)


def compare(argv):
    from eval.compare import main
    main(argv)


def plot(argv):
    from eval.plot import main
    main(argv)


def bench(argv):
    from eval.bench import main
    main(argv)


COMMANDS = {"train": train, "eval": evaluate, "predict": predict, "export": export, "info": info, "compare": compare,
            "plot": plot, "bench": bench}
MISTAKES = (ValueError, OSError, FloatingPointError, OverflowError)  # what is raised for a user's or the machine's


def main(argv):
    """Runs one command -> exit status: 0; 1 where a part could not be done, which is said, or after an error of the
    program itself; 2 after a mistake of the user's or of the machine, said in one line; 130 after Ctrl-C. Of a training
    run that a signal stopped it is that of train/interruption.py."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show must not end what has been computed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with ranks():
            status = run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output wants no more of it, as `| head` does
        # What is still buffered must not fail at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("ELSA_TRACEBACK"):
            raise
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2 if foreseen(error) else 1
    except KeyboardInterrupt:
        print("stopped; `--resume` continues a training run from its last checkpoint", file=sys.stderr)
        return 130
    except SystemExit as stop:  # training, saved after a signal
        return stop.code
    return status or 0


def ranks():
    """Under torchrun the context in which all ranks end together."""
    if not several_ranks():
        return contextlib.nullcontext()
    from train.watch import Watch
    return Watch(message_of)


def several_ranks():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def run(argv):
    """Runs one command -> exit status, None: 0. Raises ValueError for one that there is not."""
    if not argv:
        print(START)
        return None
    if argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return None
    if argv[0] == "--version":
        print(version())
        return None
    if argv[0] not in COMMANDS:
        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"unknown command {argv[0]!r}{hint} There is: {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


def version():
    """Of this project, and of what its results depend on most."""
    found = [f"elsa {VERSION}"]
    for package in ("torch", "triton"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package}: none")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def message_of(error):
    """One line for the user: what is wrong, without where in the code it was noticed; of an error that nobody foresaw,
    which is the program's own, also its type and where it was raised."""
    text = str(error)
    if text.startswith("Caught "):  # from a worker of the data loader: its traceback, then the error
        text = re.split(r"^\w+(?:Error|Exception): ", text, flags=re.MULTILINE)[-1]
    text = text.strip()
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; `pip install -r requirements.txt` installs what is needed"
    if out_of_memory(error):
        first = text.split("\n")[0] or "no memory is left"
        return f"{first}. A smaller --batch-size or --img-size, or fewer --workers, need less memory"
    if isinstance(error, OSError) and error.strerror:  # "[Errno 28] No space left on device: 'runs/x/last.pt.tmp'"
        return f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    if foreseen(error):
        return text
    first = (text.split("\n") or [""])[0]
    return (f"unexpected {type(error).__name__}{place_of(error)}: {first}. Nobody foresaw this; it may be a fault of "
            "the program. ELSA_TRACEBACK=1 before the command shows where it comes from")


def foreseen(error):
    """Whether it was raised for what a user can mend, and says so."""
    return isinstance(error, (*MISTAKES, ModuleNotFoundError)) or out_of_memory(error)


def out_of_memory(error):
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" \
        or isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def place_of(error):
    """" in FILE, line N" of the innermost of our own functions that the error came through, or nothing."""
    root = Path(__file__).parent
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if root in Path(frame.filename).parents
            and "site-packages" not in frame.filename]
    return f" in {Path(ours[-1].filename).relative_to(root)}, line {ours[-1].lineno}" if ours else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
