"""Train, evaluate and time ELSA.

    python run.py train swin_t --attn elsa                          rendered scenes, no download, minutes on a laptop
    python run.py train swin_t --attn elsa --data DIR               DIR/train and DIR/val, ImageNet recipe of the paper
    python run.py train volo_d1 --attn elsa                         another architecture
    python run.py train upernet_swin_t --attn elsa                  segmentation; --data DIR takes ADE20K's folders
    python run.py train mask_rcnn_swin_t --attn elsa                detection and masks; --data DIR takes COCO's folders
    torchrun --nproc-per-node 8 run.py train swin_t --attn elsa --data DIR
    python run.py train swin_t --attn elsa --resume                 continue the newest run of this name
    python run.py eval swin_t --attn elsa --weights FILE --data DIR
    python run.py predict upernet_swin_t --weights FILE IMAGE...    what the model sees, drawn into the images
    python run.py info swin_t --attn elsa                           parameters, multiply-adds and memory, layer by layer
    python run.py compare swin_t --attn window,dwconv,elsa          kinds of attention, trained alike, in one table
    python run.py bench                                             operator, layer and model timings of this machine

`python run.py train MODEL --help` shows the options of a model; `--batch-size 64` overrides the recipe's batch_size.
"""
import contextlib
import difflib
import os
import re
import sys

from train import cores

cores.settle_threads()  # before torch is imported


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
    main(argv)


def info(argv):
    from eval.info import main
    main(argv)


def compare(argv):
    from eval.compare import main
    main(argv)


def bench(argv):
    from eval.bench import main
    main(argv)


COMMANDS = {"train": train, "eval": evaluate, "predict": predict, "info": info, "compare": compare, "bench": bench}


def main(argv):
    """Runs one command -> exit status: 0, or 2 after a mistake of the user's or of the machine, said in one line, or
    130 after Ctrl-C."""
    try:
        with ranks():
            run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output wants no more of it, as `| head` does
        # What is still buffered must not fail at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, OverflowError) as error:
        if os.environ.get("ELSA_TRACEBACK"):
            raise
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; `--resume` continues a training run from its last finished epoch", file=sys.stderr)
        return 130
    return 0


def ranks():
    """Under torchrun the context in which all ranks end together."""
    if not several_ranks():
        return contextlib.nullcontext()
    from train.watch import Watch
    return Watch(message_of)


def several_ranks():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def run(argv):
    """Runs one command. Raises ValueError for one that there is not."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return
    if argv[0] not in COMMANDS:
        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"unknown command {argv[0]!r}{hint} There is: {', '.join(COMMANDS)}")
    COMMANDS[argv[0]](argv[1:])


def message_of(error):
    """One line for the user, without where in the code it happened."""
    text = str(error)
    if text.startswith("Caught "):  # from a worker of the data loader: its traceback, then the error
        text = re.split(r"^\w+Error: ", text, flags=re.MULTILINE)[-1]
    if isinstance(error, OSError) and error.strerror:  # "[Errno 28] No space left on device: 'runs/x/last.pt.tmp'"
        text = f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    return text.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
