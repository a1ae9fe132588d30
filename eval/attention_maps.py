"""`run.py predict --show attention`: what one pixel attends to, drawn over the photograph.

Of ELSA the softmax of a head, the ghost filters of a few of its channels, and what both make together, the filter that
weighs the values of that channel. Beside it lies the window in which plain Swin's attention would stay. Of window
attention it is the attention in that window.
"""
import io
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from models.attention import WindowAttention
from models.elsa import ELSA
from models.volo import VOLO
from train import detection, segmentation
from train.augment import validation_transform
from train.config import task_of
from train.device import to_device
from train.photographs import MEAN, STD

CHANNELS = 3  # of a head, that are shown
ORANGE, CYAN = "#ff9f1c", "#2ec4ff"  # the layer's own neighbourhood; plain Swin's window


class Asked(NamedTuple):
    stage: int  # from 1
    head: int  # from 1
    at: tuple | None  # x, y in pixels of the photograph; None: its centre


def add_options(parser):
    parser.add_argument("--show", choices=["attention"], default=None,
                        help="draw what a pixel attends to instead of what the model predicts")
    parser.add_argument("--stage", type=int, default=1, help="of --show attention, from 1; its last block is shown")
    parser.add_argument("--head", type=int, default=1, help="of --show attention, from 1")
    parser.add_argument("--at", default=None, metavar="X,Y",
                        help="the pixel of --show attention, in the photograph; default: its centre")


def asked(given):
    """Takes these options out of a dict -> Asked, or None without --show. Raises ValueError."""
    show, stage, head, at = (given.pop(name) for name in ("show", "stage", "head", "at"))
    if at is not None:
        try:
            x, y = map(int, at.split(","))
        except ValueError:
            raise ValueError(f"--at {at}: expected X,Y, two whole numbers, as 120,80") from None
        at = x, y
    if show is None:
        if (stage, head, at) != (1, 1, None):
            raise ValueError("--stage, --head and --at are for --show attention")
        return None
    return Asked(stage, head, at)


def drawer(model, maps):
    """A function of (model, photograph, classes, config, device) -> (picture, {"attention": ...}), as predict's others.

    maps: Asked. Raises ValueError where the model has no such stage or head, or no attention there.
    """
    layer, block = attention_layer(model, maps.stage)
    if not 1 <= maps.head <= layer.num_heads:
        raise ValueError(f"--head {maps.head}: stage {maps.stage} has {layer.num_heads} heads; expected 1 to "
                         f"{layer.num_heads}")

    def draw(model, photograph, classes, config, device):
        at = maps.at or (photograph.width // 2, photograph.height // 2)
        images, x, y = as_seen(photograph, config, at)
        inputs, logits, sides = watched(model, layer, images.to(device))
        tap = sides[0] / inputs.shape[0], sides[1] / inputs.shape[1]  # pixels of the image from one of the map to next
        place = int(y / tap[0]), int(x / tap[1])
        found = window_weights(layer, inputs, maps.head - 1, *place) if isinstance(layer, WindowAttention) \
            else elsa_weights(layer, logits, maps.head - 1, *place)
        window = None if isinstance(layer, WindowAttention) or isinstance(model, VOLO) \
            else swin_window(model, block, inputs.shape[:2], place)
        title = (f"What the pixel at {at[0]}, {at[1]} attends to: {config.model}, attn {config.attn or 'default'}, "
                 f"stage {maps.stage}, block {block} of {block}, head {maps.head} of {layer.num_heads}")
        drawn = picture(images[0], tap, place, found, window, title)
        return drawn, {"attention": {
            "stage": maps.stage, "block": block, "head": maps.head, "at": list(at), "pixel": list(place),
            "rows": found["rows"].tolist(), "columns": found["columns"].tolist(),
            "softmax": found["softmax"].round(5).tolist()}}

    return draw


def attention_layer(model, stage):
    """(attention, number of its block from 1) of the last block of a stage; raises ValueError."""
    if isinstance(model, VOLO):
        stages = [model.network[0]]
    else:
        stages = [layer.blocks for layer in getattr(model, "backbone", model).layers]
    if not 1 <= stage <= len(stages):
        raise ValueError(f"--stage {stage}: this model has local attention in {len(stages)} stages; expected 1 to "
                         f"{len(stages)}")
    layer = stages[stage - 1][-1].attn
    if not isinstance(layer, WindowAttention) and not (isinstance(layer, ELSA) and layer.softmax):
        raise ValueError(f"--show attention: {type(layer).__name__} in stage {stage} has no softmax over a "
                         "neighbourhood; expected a model with attn elsa or window")
    return layer, len(stages[stage - 1])


def as_seen(photograph, config, at):
    """(images (1, 3, H, W) as the model sees them, and where in them the pixel `at`, x and y, lies). Raises ValueError
    where it does not."""
    task = task_of(config.model)
    if task == "classification":
        photographs = validation_transform(config.img_size, config.crop_pct)(photograph)[None]
        image = to_device([photographs], torch.device("cpu"))[0][0]
        scale = config.img_size / config.crop_pct / min(photograph.size)
        left, top = ((side * scale - config.img_size) / 2 for side in photograph.size)
    else:
        pixels = np.asarray(photograph)
        image = detection.resize_and_pad(pixels, config.img_size)[0] if task == "detection" \
            else segmentation.views(pixels, config.img_size)[0][0]
        scale = config.img_size / min(photograph.size)
        left = top = 0
    x, y = ((place + 0.5) * scale - edge for place, edge in zip(at, (left, top)))
    if not (0 <= x < image.shape[2] and 0 <= y < image.shape[1]):
        raise ValueError(f"--at {at[0]},{at[1]}: the model does not see this pixel of the photograph, of "
                         f"{photograph.width} x {photograph.height} pixels; a classifier sees the square in its middle")
    return image[None], x, y


@torch.no_grad()
def watched(model, layer, images):
    """(input (H, W, C) of a layer, logits (G * K, H, W) if it is ELSA, (height, width) in pixels of what its map
    covers), of the first of these images."""
    seen = {}
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))]
    if isinstance(layer, ELSA):
        def keep(module, args, result):
            seen["logits"] = result.permute(0, 3, 1, 2) if isinstance(module, nn.Linear) else result
        hooks.append(layer.attn[-1].register_forward_hook(keep))
    features = getattr(model, "backbone", model)
    try:
        getattr(features, "forward_features", features)(images)
    finally:
        for hook in hooks:
            hook.remove()
    inputs = seen["inputs"][0]
    if isinstance(model, VOLO):
        step = model.patch_size
    else:
        step = features.patch_embed.proj.kernel_size[0] * inputs.shape[2] // features.dims[0]
    logits = seen["logits"][0].float().cpu() if "logits" in seen else None
    return inputs, logits, (step * inputs.shape[0], step * inputs.shape[1])


def elsa_weights(layer, logits, head, row, column):
    """What ELSA makes of one pixel, a dict.

    rows, columns: (k,), where its taps lie, some outside the map. softmax: (k, k). channels: of this head those whose
    filters vary most. ghost_mul, ghost_add: (channels, k, k) or None. filters: (channels, k, k), which is softmax *
    ghost_mul ** lam + gamma * ghost_add.
    """
    k, width = layer.kernel_size, layer.dim_v // layer.num_heads
    softmax = logits[head * k * k:(head + 1) * k * k, row, column].softmax(0).reshape(k, k)
    mul, add = (None if ghost is None else ghost.detach().float().cpu() for ghost in layer.ghost_filters())
    filters = softmax.expand(layer.dim_v, k, k)
    filters = filters if mul is None else filters * mul ** layer.lam
    filters = filters if add is None else filters + layer.gamma * add
    own = filters[head * width:(head + 1) * width].flatten(1)
    channels = head * width + (own.amax(1) - own.amin(1)).topk(min(CHANNELS, width)).indices
    taps = (np.arange(k) - k // 2) * layer.dilation
    return {"rows": row + taps, "columns": column + taps, "softmax": softmax.numpy(), "channels": channels.tolist(),
            "ghost_mul": None if mul is None else mul[channels].numpy(),
            "ghost_add": None if add is None else add[channels].numpy(), "filters": filters[channels].numpy()}


def window_weights(layer, inputs, head, row, column):
    """What one pixel of (H, W, C) attends to in its window: "rows", "columns" (w,) and "softmax" (w, w)."""
    H, W, C = inputs.shape
    w, D = layer.window_size, C // layer.num_heads
    sides = [-(-size // w) * w for size in (H, W)]
    qkv = layer.qkv(F.pad(inputs, (0, 0, 0, sides[1] - W, 0, sides[0] - H))).float()
    q, k = (qkv[..., part * C + head * D:part * C + (head + 1) * D] for part in (0, 1))
    places, own, wrapped = [], [], []  # along each axis: pixels of the window, which is ours, which came round the edge
    for place, side, size in zip((row, column), sides, (H, W)):
        shift = layer.shift if layer.always_shift or size > w else 0
        moved = (place - shift) % side
        window = moved // w * w + torch.arange(w)
        places.append((window + shift) % side)
        own.append(moved % w)
        wrapped.append(window >= side - shift)
    keys = k[places[0]][:, places[1]]  # (w, w, D)
    bias = layer.relative_position_bias_table[layer.relative_position_index[own[0] * w + own[1]], head]
    apart = (wrapped[0] != wrapped[0][own[0]])[:, None] | (wrapped[1] != wrapped[1][own[1]])
    logits = (keys @ q[row, column] * D ** -0.5 + bias.reshape(w, w)).detach().cpu() - 100.0 * apart
    softmax = logits.flatten().softmax(0).reshape(w, w)
    return {"rows": places[0].numpy(), "columns": places[1].numpy(), "softmax": softmax.numpy()}


def swin_window(model, block, sizes, place):
    """(first row, first column, side) of the window of this pixel in plain Swin, whose even blocks shift theirs."""
    features = getattr(model, "backbone", model)
    layer = features.layers[-1].blocks[-1].attn
    w, corner = layer.window_size, []
    for at, size in zip(place, sizes):
        shift = w // 2 if block % 2 == 0 and (layer.always_shift or size > w) else 0
        corner.append((at - shift) // w * w + shift)
    return *corner, w


# The picture

def picture(image, tap, place, found, window, title):
    """A PIL image: the photograph with the pixel and its neighbourhood, the softmax over it, and of ELSA plain Swin's
    window, then the filters of a few channels.

    image: (3, H, W) normalised. tap: height and width of a pixel of the map. place: its row and column. found: what
    elsa_weights or window_weights gives. window: what swin_window gives, or None.
    """
    pixels = (image.permute(1, 2, 0).cpu() * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1).numpy()
    channels = found.get("channels", [])
    ghosts = [(name, found[name]) for name in ("ghost_mul", "ghost_add") if found.get(name) is not None]
    rows, columns = 1 + len(channels and ghosts) + bool(channels), 3 if channels else 2
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = figure.subplots(rows, columns, squeeze=False)
    view = extent(found, window, tap)
    whole, weights = axes[0, 0], axes[0, 1]
    whole.imshow(pixels)
    whole.set_title("the photograph, as the model sees it")
    whole.add_patch(Rectangle(view[:2], view[2] - view[0], view[3] - view[1], fill=False, color="white", lw=1, ls=":"))
    outside = 1 - inside(found, pixels.shape, tap)
    lost = f", {100 * outside:.0f}% of it outside" if outside > 0.005 else ""
    bars = {0: overlay(weights, pixels, view, tap, found, found["softmax"], "viridis", Normalize(0, None))}
    weights.set_title(f"softmax over {found['softmax'].shape[0]} x {found['softmax'].shape[1]} pixels{lost}")
    if channels:
        crop(axes[0, 2], pixels, view)
        axes[0, 2].set_title("beside plain Swin's window" if window else "the neighbourhood")
    own = f"{'ELSA' if channels else 'this window'}, {' x '.join(map(str, found['softmax'].shape))}"
    for each in axes[0]:
        outline(each, neighbourhood(found, tap), ORANGE, own)
    if window:
        box = window[1] * tap[1], window[0] * tap[0], window[2] * tap[1], window[2] * tap[0]
        for each in (whole, axes[0, 2]):
            outline(each, box, CYAN, f"plain Swin, {window[2]} x {window[2]}", "--")
    for each in axes[0]:
        mark(each, place, tap)
    axes[0, -1].legend(loc="lower right", fontsize=8)
    for column, channel in enumerate(channels):
        for row, (name, ghost) in enumerate(ghosts, 1):
            sign = "times" if name == "ghost_mul" else "plus"
            shown = axes[row, column].imshow(ghost[column], "coolwarm", even(ghost))
            centre = (ghost.shape[1] - 1) // 2
            mark(axes[row, column], (centre, centre), (1, 1))
            axes[row, column].set_title(f"{sign} the ghost filter of channel {channel}")
            bars[row] = shown
        last = axes[-1, column]
        shown = overlay(last, pixels, view, tap, found, found["filters"][column], "coolwarm", even(found["filters"]))
        last.set_title(f"= the filter of channel {channel}")
        mark(last, place, tap)
        bars[rows - 1] = shown
    for row, shown in bars.items():
        label = "softmax" if row == 0 else "filter" if row == rows - 1 else "ghost filter"
        figure.colorbar(shown, ax=axes[row], shrink=0.9, pad=0.01, label=label)
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Image.open(file)


def even(values):
    """Colours for values of both signs: white, or nearly, is 0."""
    return TwoSlopeNorm(0, -abs(values).max(), abs(values).max())


def neighbourhood(found, tap):
    """(left, top, width, height) in pixels of all that is attended to."""
    rows, columns = found["rows"], found["columns"]
    top, left = rows.min(), columns.min()
    return left * tap[1], top * tap[0], (columns.max() + 1 - left) * tap[1], (rows.max() + 1 - top) * tap[0]


def extent(found, window, tap):
    """(left, top, right, bottom) in pixels of what is shown enlarged: neighbourhood and window, and some around it."""
    left, top, width, height = neighbourhood(found, tap)
    right, bottom = left + width, top + height
    if window:
        left, top = min(left, window[1] * tap[1]), min(top, window[0] * tap[0])
        right, bottom = max(right, (window[1] + window[2]) * tap[1]), max(bottom, (window[0] + window[2]) * tap[0])
    return left - 3 * tap[1], top - 3 * tap[0], right + 3 * tap[1], bottom + 3 * tap[0]


def inside(found, shape, tap):
    """How much of the softmax lies in the image."""
    rows, columns = (((places >= 0) & (places * step < side))
                     for places, step, side in zip((found["rows"], found["columns"]), tap, shape))
    return float(found["softmax"][np.ix_(rows, columns)].sum())


def crop(axes, pixels, view, grey=False):
    if grey:
        pixels = np.repeat(pixels.mean(2, keepdims=True), 3, 2)
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xlim=(view[0] - 0.5, view[2] - 0.5), ylim=(view[3] - 0.5, view[1] - 0.5), facecolor="0.85")


def overlay(axes, pixels, view, tap, found, values, colours, norm):
    """Values of the taps as half transparent squares over the photograph in grey -> what a colour bar needs."""
    crop(axes, pixels, view, grey=True)
    left, top, width, height = neighbourhood(found, tap)
    grid = np.full((round(height / tap[0]), round(width / tap[1])), np.nan)
    grid[np.ix_(found["rows"] - found["rows"].min(), found["columns"] - found["columns"].min())] = values
    limits = left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5
    shown = axes.imshow(grid, colours, norm, alpha=0.75, extent=limits, interpolation="nearest")
    axes.set(xlim=(view[0] - 0.5, view[2] - 0.5), ylim=(view[3] - 0.5, view[1] - 0.5))
    return shown


def outline(axes, box, colour, label, style="-"):
    left, top, width, height = box
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=colour, lw=2, ls=style,
                             label=label))


def mark(axes, place, tap):
    """The pixel."""
    row, column = place
    axes.add_patch(Rectangle((column * tap[1] - 0.5, row * tap[0] - 0.5), tap[1], tap[0], fill=False, color="red", lw=2,
                             label="the pixel"))
