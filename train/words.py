"""What was meant: the field's words for our options and models, else the word that is nearest in its letters."""
import difflib
import re

# Words of timm, torchvision, mmdetection, Lightning, Hugging Face, ... for our options, without the dashes.
OPTIONS = {
    "learning-rate": "lr", "base-lr": "lr", "max-lr": "lr", "lrate": "lr", "lr0": "lr", "bs": "batch-size",
    "b": "batch-size", "batch": "batch-size", "batchsize": "batch-size", "train-batch-size": "batch-size",
    "per-device-train-batch-size": "batch-size", "pretrained": "weights", "checkpoint": "weights", "ckpt": "weights",
    "initial-checkpoint": "weights", "load-from": "weights", "finetune": "weights", "resume-from": "resume",
    "resume-from-checkpoint": "resume", "auto-resume": "resume", "config": "recipe", "cfg": "recipe",
    "data-path": "data", "data-dir": "data", "dataset": "data", "root": "data", "imgsz": "img-size",
    "image-size": "img-size", "input-size": "img-size", "resolution": "img-size", "crop-size": "img-size",
    "num-epochs": "epochs", "max-epochs": "epochs", "num-train-epochs": "epochs", "num-workers": "workers",
    "j": "workers",
    "output": "out", "output-dir": "out", "work-dir": "out", "save-dir": "out", "wd": "weight-decay",
    "drop-path": "drop-path-rate", "sched": "schedule", "lr-scheduler": "schedule", "smoothing": "label-smoothing",
    "reprob": "erasing", "random-erasing": "erasing", "aa": "randaugment", "auto-augment": "randaugment",
    "clip-grad-norm": "clip-grad", "max-grad-norm": "clip-grad", "gradient-clip-val": "clip-grad", "model-ema": "ema",
    "precision": "amp", "fp16": "amp", "bf16": "amp", "use-amp": "amp", "grad-accum-steps": "accumulate",
    "gradient-accumulation-steps": "accumulate", "grad-checkpointing": "checkpointing", "torchcompile": "compile",
    "attention": "attn", "nb-classes": "num-classes", "window": "window-size", "warmup-epoch": "warmup-epochs",
    "log-tensorboard": "tensorboard", "max-iters": "max-steps", "use-checkpoint": "checkpointing",
}
# A word for one of our models: timm's, torchvision's, mmdetection's, with what they were trained on behind it.
MODEL = re.compile(r"(?P<elsa>elsa_)?(?P<head>(?:upernet_|(?:cascade_)?mask_rcnn_)?)"
                   r"(?:swin_?(?P<size>tiny|small|base|[tsb])|volo_?(?P<depth>d[1-5]))(?:[_.].*)?")


def of_option(option, value, prog, known, settable=()):
    """What to type for an unknown option, as "did you mean X? ", or nothing.

    value: what stands behind it, or "". prog: the command, "run.py train". known: its options, with their dashes.
    settable: those that its --set takes.
    """
    word = option.lstrip("-")
    if word in ("model", "arch"):
        return f"the model stands behind the command: {prog} {value or 'MODEL'}. "
    ours = f"--{OPTIONS.get(word, word)}"
    if ours not in (*known, *settable):
        ours = next(iter(difflib.get_close_matches(option, [*known, *settable], n=1, cutoff=0.5)), None)
    if ours in settable and ours not in known:
        return f"for all runs: --set {ours[2:]}={value or 'VALUE'}. "
    return f"did you mean {ours}? " if ours else ""


def of_model(name):
    """"did you mean X?" for the name that a model of ours has elsewhere, else nothing."""
    match = MODEL.fullmatch(str(name).lower().replace("-", "_"))
    if not match:
        return ""
    ours = f"{match['head']}swin_{match['size'][0]}" if match["size"] else f"volo_{match['depth']}"
    attn = " --attn elsa" if match["elsa"] else ""
    return f"did you mean {ours}{attn}?" if ours + attn != name else ""


def nearest(word, known):
    """"did you mean X? ", or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]}? " if match else ""
