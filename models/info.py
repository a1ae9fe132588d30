"""What a model costs, layer by layer, without running it: `run.py info`."""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count

from models import create_model
from models.attention import NeighborhoodAttention
from models.roi_heads import BOX_SIZE, MASK_SIZE, MAX_DETECTIONS
from models.rpn import NUM_PROPOSALS

BATCH = 2  # images, because batch norm refuses a single pixel of a single image
CONTAINERS = ("ModuleList", "Backbone")  # which a short table opens up


@register_flop_formula(torch.ops.elsa.local_attention)
def _attention_flops(v, logits, mul, add, kernel_size, dilation, stride, normalize, *, out_shape=None, **_):
    """A product and a sum a pixel, channel and tap, as for a convolution.

    The making of the filters is not counted, as published.
    """
    B, H, W, C = v
    return 2 * B * (H // stride) * (W // stride) * C * kernel_size ** 2


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if FLASH not in flop_registry:  # before torch 2.12 or so
    register_flop_formula(FLASH)(lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v))


def info(name, size, **options):
    """A row {"layer", "kind", "output", "parameters", "macs", "memory"} for every module, the whole model first.

    Args:
        name, options: as create_model takes them.
        size: (H, W) of one image.

    layer: name of the module, of the model "". output: shape of what the module returned, without the batch, or None.
    macs: multiply-adds of matrix products, convolutions and aggregations of the forward pass. memory: bytes, in
    float32, of what training keeps of it for the backward pass. Both of one image.
    Raises ValueError as create_model does.
    """
    with torch.device("meta"):
        model = create_model(name, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors of shapes alone: nothing is computed
        model.to_empty(device="cpu")  # "meta" knows no autocast
        costs = _Costs(model)
        with costs.counter, torch.autograd.graph.saved_tensors_hooks(costs.save, lambda tensor: tensor):
            costs.run(torch.empty(BATCH, 3, *size))
    rows = []
    for layer, module in model.named_modules():
        inside = [memory for other, memory in costs.memory.items()
                  if not layer or other == layer or other.startswith(layer + ".")]
        rows.append({
            "layer": layer,
            "kind": type(module).__name__,
            "output": costs.outputs.get(layer),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "macs": costs.macs_of(layer, module),
            "memory": sum(inside)})
    return rows


class _Costs:
    """What each module of a model returns, computes and keeps for the backward pass in one forward pass."""

    def __init__(self, model):
        self.model, self.counter = model, FlopCounterMode(display=False)
        self.outputs, self.macs, self.memory = {}, {}, {}  # by layer
        self.names = {module: layer for layer, module in model.named_modules()}
        self.running = [("", 0)]  # modules in each other: (layer, multiply-adds before it)
        self.qk_macs = 0  # of neighborhood attention, whose products no counter sees
        weights = model.state_dict(keep_vars=True).values()
        self.seen = {tensor.untyped_storage()._cdata for tensor in weights}
        self.saved = []  # kept alive, so that no other tensor takes its storage
        for module in self.names:
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave)

    def run(self, images):
        if hasattr(self.model, "roi_head"):
            run_detector(self.model, images)
        else:
            self.model(images)
        self.macs[""] = self.total() // BATCH

    def total(self):
        return self.counter.get_total_flops() // 2 + self.qk_macs

    def enter(self, module, _):
        self.running.append((self.names[module], self.total()))

    def leave(self, module, _, output):
        if isinstance(module, NeighborhoodAttention):  # q . k, tap by tap
            self.qk_macs += output.numel() * module.kernel_size ** 2
        layer, before = self.running.pop()
        self.macs[layer] = self.macs.get(layer, 0) + (self.total() - before) // BATCH
        self.outputs[layer] = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else None

    def save(self, tensor):
        storage, (layer, _) = tensor.untyped_storage(), self.running[-1]
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.saved.append(tensor)
            self.memory[layer] = self.memory.get(layer, 0) + storage.nbytes() // BATCH
        return tensor

    def macs_of(self, layer, module):
        if layer not in self.macs:  # a list of modules, which nobody calls
            self.macs[layer] = sum(
                self.macs_of(f"{layer}.{name}", child) for name, child in module.named_children())
        return self.macs[layer]


def run_detector(model, images):
    """A detector's layers on as many boxes as it may have; which boxes those are, only numbers could tell."""
    maps = model.neck(model.backbone(images))
    model.rpn_head(maps)
    proposals, detections, channels = len(images) * NUM_PROPOSALS, len(images) * MAX_DETECTIONS, maps[0].shape[1]
    for box_head, mask_head in model.roi_head.heads():
        box_head(images.new_empty(proposals, channels, BOX_SIZE, BOX_SIZE))
        labels = torch.zeros(detections, dtype=torch.int64)
        mask_head(images.new_empty(detections, channels, MASK_SIZE, MASK_SIZE), labels)


def stages(rows):
    """Of the rows of info() those of a short table: the parts of the model, containers opened up, and the total."""
    kinds = {row["layer"]: row["kind"] for row in rows[1:]}
    shown = []
    for row in rows[1:]:
        parents = [kind for layer, kind in kinds.items() if row["layer"].startswith(layer + ".")]
        if row["kind"] not in CONTAINERS and all(kind in CONTAINERS for kind in parents):
            shown.append(row)
    return shown + rows[:1]


def table(rows):
    """Rows of info(), the last being the total, as text."""
    width = max(len(row["layer"] or "total") for row in rows)
    titles = f"{'kind':<22} {'output':>16} {'parameters':>13} {'multiply-adds':>14} {'memory':>9}"
    lines = [f"{'layer':<{width}}  {titles}"]
    for row in rows:
        output = " x ".join(map(str, row["output"])) if row["output"] else ""
        costs = f"{row['parameters']:>13,} {row['macs'] / 1e9:>12.3f} G {row['memory'] / 2 ** 20:>6.1f} MB"
        lines.append(f"{row['layer'] or 'total':<{width}}  {row['kind']:<22} {output:>16} {costs}")
    return "\n".join(lines)
