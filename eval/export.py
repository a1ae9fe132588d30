"""`run.py export`: a model as a file for other programs: torch.export's .pt2 and ONNX, which run without this project,
and safetensors.

Of detectors it is the backbone with its feature pyramid: what comes after it, proposals and the choice among boxes,
has no fixed sizes. A file is compared with the model before it gets its name.
"""
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.fx.experimental._config as symbolic_shapes
import torch.nn as nn

from eval.class_names import published_classes
from eval.options import MODEL_OPTIONS, TRAINED, checkpoint_facts, load_model, settle, weights_file
from kernels import decomposed
from train.command_line import Parser
from train.config import family_of, task_of, to_dict
from train.photographs import MEAN, STD
from train.run_folder import replace_atomically
from train.runs import refuse_inputs

FORMATS = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}  # packages
TOLERANCE = 1e-4  # of the largest output, or of 1 where all are smaller
# Runs a .pt2 where this project cannot be imported: python -I looks neither into the current folder nor at PYTHONPATH.
ALONE = """
import sys, torch
module = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    results = [module(images) for images in torch.load(sys.argv[2])]
torch.save([[x] if isinstance(x, torch.Tensor) else list(x) for x in results], sys.argv[3])
"""


def main(argv):
    config, classes, weights, kind, out, dynamic = parse(argv)
    task = task_of(config.model)
    classes = classes or published_classes(task, config.num_classes)
    config.num_classes = config.num_classes or len(classes)
    model = load_model(config, weights).float().eval()
    part = "weights" if kind == "safetensors" else "backbone and feature pyramid, for images of " \
        if task == "detection" else "whole, for images of "
    size = f"1 x 3 x {config.img_size} x {config.img_size}"
    if kind != "safetensors":
        part += f"any number and size from {2 * stride_of(config)} pixels on" if dynamic else size
        model = Pyramid(model) if task == "detection" else model
    time = "a few minutes" if dynamic else "up to a minute"
    print(f"export {config.model}, attn {config.attn or 'default'}, {weights or 'UNTRAINED: no --weights were given'}\n"
          f"  {part}, as {kind}, float32, to {out}; takes {time} on the CPU", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        file = Path(folder) / f"model.{kind}"
        batches = example_images(config, dynamic)
        facts = metadata(config, classes, weights)
        if kind == "safetensors":
            found = run_safetensors(model, config, batches, facts, file)
        else:
            program = exported(model, batches[0], 2 * stride_of(config) if dynamic else None)
            found = {"pt2": run_pt2, "onnx": run_onnx}[kind](program, batches, names(task), facts, file)
        difference, largest = compared(found, run(model, batches))
        said = f"the results differ from the model's by at most {difference:.1e}, of values up to {largest:.3g}"
        if difference > TOLERANCE * max(1, largest):
            raise ValueError(f"--out {out}: {said}, which is more than rounding; nothing was written")
        with open(file, "rb") as source:
            replace_atomically(out, lambda target: shutil.copyfileobj(source, target))
    shapes = ", ".join("x".join(map(str, images.shape)) for images in batches)
    print(f"written: {out}, {out.stat().st_size / 2 ** 20:.1f} MB. Checked with images of {shapes}: {said}")


def parse(argv):
    """(Config, names of the classes or None, file of the weights or None, format, Path, whether sizes are open)."""
    parser = Parser(prog="run.py export", description="Write a model as a file for other programs.")
    parser.add_argument("model", nargs="?", default=None,
                        help="architecture; default: the one in the checkpoint, else swin_t")
    parser.add_argument("--weights", help="checkpoint of this project, folder of a run, or published weights; "
                                          "default: none, an untrained model")
    parser.add_argument("--format", choices=list(FORMATS), default=None, help="default: what --out ends in")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--dynamic", action="store_true", help="pt2, onnx: for any number of images of any size, "
                                                               "instead of one image of --img-size")
    parser.add_keys(MODEL_OPTIONS)
    given = vars(parser.parse(argv))
    weights, kind, out, dynamic = (given.pop(name) for name in ("weights", "format", "out", "dynamic"))
    weights, out = weights and weights_file(weights), Path(out)
    kind = kind or out.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"--out {out} ends in none of {', '.join(FORMATS)}; rename it, or name the format by --format")
    missing = [package for package in FORMATS[kind] if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"--format {kind} needs packages that are not installed: `pip install {' '.join(missing)}`")
    if dynamic and kind == "safetensors":
        raise ValueError("--dynamic is for pt2 and onnx; safetensors are weights alone, for images of any size")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; expected a file, as {out / f'model.{kind}'}")
    refuse_inputs("--out", out, files=[weights])
    return *settle(given, weights, photographs=True), weights, kind, out, dynamic


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> the five maps (B, channels, H / s, W / s) of a detector's feature pyramid, s = 4 to 64."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.neck = detector.backbone, detector.neck

    def forward(self, images):
        return tuple(self.neck(self.backbone(images)))


def names(task):
    """Of what a file gives."""
    return [f"p{level}" for level in range(2, 7)] if task == "detection" else ["logits"]


def metadata(config, classes, weights):
    """{key: text}, what a program has to know to use the file: model, attn, the classes, and for images, which are RGB
    from 0 to 1, mean and std, as JSON. "config", where the weights are a checkpoint of this project: how it was made.
    """
    facts = {"model": config.model, "attn": config.attn or "", "classes": json.dumps(classes), "mean": json.dumps(MEAN),
             "std": json.dumps(STD), "img_size": str(config.img_size), "crop_pct": str(config.crop_pct)}
    saved = checkpoint_facts(weights)[0] if weights else {}
    if saved:
        values = to_dict(config)
        kept = {name: values[name] for name in ("model", *TRAINED) if name in values}
        facts["config"] = json.dumps({**kept, "data": saved.get("data")})
    return facts


def example_images(config, dynamic):
    """[images, ...]: those to trace with, then those to compare with; the same where the size is fixed.

    Where it is not, the first have two windows or more in every stage along both sides, each side another number: what
    is one, or equal, by chance would be taken for being so always.
    """
    if not dynamic:
        sizes = [(1, config.img_size, config.img_size)]
    else:
        stride, windows = stride_of(config), (config.window_size or 7) + 3
        least = 2 * stride
        sizes = [(2, stride * windows, stride * (windows + 1)),
                 (1, max(least, config.img_size), max(least, config.img_size)),
                 (3, max(least, config.img_size) + stride + 1, least + 3)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, 3, H, W, generator=generator) for B, H, W in sizes]


def stride_of(config):
    """Pixels between those of the coarsest map of a Swin, or of VOLO."""
    return 2 * (config.patch_size or 8) if family_of(config.model) == "volo" else 8 * (config.patch_size or 4)


@torch.no_grad()
def exported(model, images, least=None):
    """The torch.export.ExportedProgram of a model, of nothing but torch's own operators.

    least: pixels, sides are open from there on, and so is the number of images; None: all is as it is here.
    """
    shapes, open_sizes = None, {}
    if least:
        side = lambda name: torch.export.Dim(name, min=least)
        shapes = ({0: torch.export.Dim("batch"), 2: side("height"), 3: side("width")},)
        open_sizes = {torch.ops.aten.adaptive_avg_pool2d.default: adaptive_mean, torch.ops.aten.roll.default: rolled}
    with symbolic_shapes.patch(backed_size_oblivious=True):  # one image or one window is no case of its own
        program = torch.export.export(model, (images,), dynamic_shapes=shapes,
                                      prefer_deferred_runtime_asserts_over_guards=True)
        plain = {torch.ops.elsa.local_attention.default: decomposed.attention}
        program = program.run_decompositions({**plain, **open_sizes})
    # Such as "more than one image": of how strides were chosen, which changes no result.
    for node in reversed(program.graph.nodes):
        if node.target == torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def adaptive_mean(x, size):
    """F.adaptive_avg_pool2d by two products with matrices, for maps whose size is open: (B, C, H, W) -> (B, C, *size).

    Row i of the result is the mean of rows floor(i * H / size) to ceil((i + 1) * H / size).
    """
    def means(length, count):
        i, place = torch.arange(count)[:, None], torch.arange(length)
        first, last = i * length // count, ((i + 1) * length + count - 1) // count
        inside = ((place >= first) & (place < last)).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)  # (count, length)

    return means(x.shape[2], size[0]) @ x @ means(x.shape[3], size[1]).T


def rolled(x, shifts, dims):
    """x.roll(shifts, dims) by indices, for shifts by less than a side: ONNX has none whose shifts or sides are open."""
    for shift, dim in zip(shifts, dims):
        n = x.shape[dim]
        source = torch.arange(n) - shift
        source = torch.where(source < 0, source + n, source)
        x = x.index_select(dim, torch.where(source >= n, source - n, source))
    return x


def run_pt2(program, batches, outputs, facts, file):
    """Writes a .pt2 -> what it gives for the images, in a process that knows torch alone."""
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(facts)})
    given, found = file.with_name("given.pt"), file.with_name("found.pt")
    torch.save(batches, given)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, file, given, found], capture_output=True, text=True)
    if done.returncode:
        raise ValueError("the file cannot be used without this project: " + done.stderr.strip().split("\n")[-1])
    return torch.load(found)


def run_onnx(program, batches, outputs, facts, file):
    """Writes an ONNX file -> what onnxruntime makes of the images with it."""
    import onnx
    import onnxruntime
    written = torch.onnx.export(program, (batches[0],), dynamo=True, verbose=False, input_names=["images"],
                                output_names=outputs)
    written.model.metadata_props.update(facts)
    written.save(file)
    model = onnx.load(file)
    foreign = {node.domain for node in [*model.graph.node, *model.functions]} - {"", "ai.onnx"}
    if foreign:
        raise ValueError(f"the file would have other than standard operators, of {', '.join(foreign)}")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [[torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})] for images in batches]


def run_safetensors(model, config, batches, facts, file):
    """Writes weights -> what a fresh model gives with them."""
    from safetensors.torch import save_file
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, file, facts)
    return run(load_model(config, file).eval(), batches)


@torch.no_grad()
def run(model, batches):
    """[[result, ...] of each images, ...]"""
    results = [model(images) for images in batches]
    return [[found] if isinstance(found, torch.Tensor) else list(found) for found in results]


def compared(found, expected):
    """(largest difference, largest of what was expected), NaN and different shapes differ by infinity."""
    difference = largest = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            fits = x.shape == y.shape and bool(y.isfinite().all())
            difference = max(difference, (x - y).abs().max().item() if fits else float("inf"))
            largest = max(largest, x.abs().max().item())
    return difference, largest
