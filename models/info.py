"""What a model costs, layer by layer, without running it: `run.py info`."""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count

from models import create_model
from models.attention import NeighborhoodAttention

BATCH = 2  # images, because batch norm refuses a single pixel of a single image
PROPOSALS, DETECTIONS = 1000, 100  # of a detector and an image


@register_flop_formula(torch.ops.elsa.attention)
def _aggregation(v, logits, mul, add, kernel_size, dilation, stride, normalize, *, out_shape=None, **_):
    """A product and a sum a pixel, channel and tap, as for a convolution; the filters' own making is not counted, as published."""
    B, H, W, C = v
    return 2 * B * (H // stride) * (W // stride) * C * kernel_size ** 2


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if FLASH not in flop_registry:  # before torch 2.12 or so
    register_flop_formula(FLASH)(lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v))


def info(name, size, **options):
    """[{"layer", "kind", "output", "parameters", "macs", "memory"}, ...] of every module of a model; the model itself, called "", is first.

    name, options: as create_model takes them. size: (H, W) of one image. output: shape of what the module returned, without the batch, or
    None. macs: multiply-adds of matrix products, convolutions and aggregations of the forward pass. memory: bytes, in float32, of what
    training keeps of it for the backward pass. Raises ValueError as create_model does.
    """
    outputs, macs, memory, stack, kept, by_taps = {}, {}, {}, [], [], []
    with torch.device("meta"):
        model = create_model(name, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors of shapes alone: nothing is computed
        model.to_empty(device="cpu")  # "meta" knows no autocast
        images = torch.empty(BATCH, 3, *size)
        names = {module: layer for layer, module in model.named_modules()}
        seen = {tensor.untyped_storage()._cdata for tensor in model.state_dict(keep_vars=True).values()}

        def total():
            return counter.get_total_flops() // 2 + sum(by_taps)

        def enter(module, _):
            stack.append((names[module], total()))

        def leave(module, _, out):
            if isinstance(module, NeighborhoodAttention):  # q . k, tap by tap
                by_taps.append(out.numel() * module.kernel_size ** 2)
            layer, before = stack.pop()
            macs[layer] = macs.get(layer, 0) + (total() - before) // BATCH
            outputs[layer] = tuple(out.shape[1:]) if isinstance(out, torch.Tensor) else None

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                kept.append(tensor)  # so that no other takes its place
                memory[stack[-1][0]] = memory.get(stack[-1][0], 0) + storage.nbytes() // BATCH
            return tensor

        for module in names:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stack.append(("", 0))
            _detect(model, images) if hasattr(model, "roi_head") else model(images)
            macs[""] = total() // BATCH

    def counted(layer, module):
        if layer not in macs:  # a list of modules, which nobody calls
            macs[layer] = sum(counted(f"{layer}.{part}", child) for part, child in module.named_children())
        return macs[layer]

    return [{"layer": layer, "kind": type(module).__name__, "output": outputs.get(layer), "macs": counted(layer, module),
             "parameters": sum(parameter.numel() for parameter in module.parameters()),
             "memory": sum(size for other, size in memory.items() if not layer or other == layer or other.startswith(layer + "."))}
            for module, layer in names.items()]


def _detect(model, images):
    """A detector's layers on as many boxes as it may have: which, needs numbers."""
    maps = model.neck(model.backbone(images))
    model.rpn_head(maps)
    for box_head, mask_head in model.roi_head.heads():
        box_head(images.new_empty(BATCH * PROPOSALS, maps[0].shape[1], 7, 7))
        mask_head(images.new_empty(BATCH * DETECTIONS, maps[0].shape[1], 14, 14), torch.zeros(BATCH * DETECTIONS, dtype=torch.int64))


LISTS = ("ModuleList", "Backbone")  # opened up


def stages(rows):
    """Of the rows of info() those that a short table shows: the parts of the model, lists of parts and backbones opened up, and the total."""
    kinds = {row["layer"]: row["kind"] for row in rows[1:]}
    shown = [row for row in rows[1:] if kinds[row["layer"]] not in LISTS
             and all(kind in LISTS for layer, kind in kinds.items() if row["layer"].startswith(layer + "."))]
    return shown + rows[:1]


def table(rows):
    """Rows of info(), the last being the total, as text."""
    width = max(len(row["layer"] or "total") for row in rows)
    lines = [f"{'layer':<{width}}  {'kind':<22} {'output':>16} {'parameters':>13} {'multiply-adds':>14} {'memory':>9}"]
    for row in rows:
        output = " x ".join(map(str, row["output"])) if row["output"] else ""
        lines.append(f"{row['layer'] or 'total':<{width}}  {row['kind']:<22} {output:>16} {row['parameters']:>13,} {row['macs'] / 1e9:>12.3f} G "
                     f"{row['memory'] / 2 ** 20:>6.1f} MB")
    return "\n".join(lines)
