"""ELSA-Swin and ELSA-VOLO as models of timm, for those who are there already: importing this file registers them.

    import models.timm_models
    model = timm.create_model("elsa_swin_tiny", features_only=True, out_indices=(1, 2, 3))

Names are those of the published ELSA code. timm's scripts run with the models by

    python -m models.timm_models train.py DIR --model elsa_swin_tiny --img-size 224 ...

under torchrun, too: `torchrun --nproc-per-node 8 -m models.timm_models train.py ...`.

timm's interface: forward_features gives (B, H, W, C) of Swin and (B, 1 + h * w, C), the class token first, of VOLO,
both normalised; forward_head the logits; forward_intermediates, and so features_only, (B, C_i, H_i, W_i) of the
stages, not normalised; num_classes=0 pooled features; global_pool "avg" (Swin) or "token" (VOLO) pools, "" does not. In
training mode, too, VOLO gives logits alone, those of the class token plus half the largest of the pixels'.
pretrained=True takes what models.published names; pretrained_cfg_overlay={"file": PATH} any file of load_weights.
"""
import runpy
import sys

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices

from models import MODELS, published, swin, volo
from models.weights import load_weights, read

SWIN = {"elsa_swin_tiny": "swin_t", "elsa_swin_small": "swin_s", "elsa_swin_base": "swin_b"}
VOLO = {f"elsa_{name}": name for name in volo.CONFIGS}


class TimmModel(nn.Module):
    """What timm asks of a model, beside Swin or VOLO."""
    pooling: str  # what global_pool is called here

    def __init__(self, *, num_classes=1000, global_pool=None, drop_rate=0.0, **options):
        super().__init__(num_classes=num_classes, **options)
        self.num_classes, self.head_hidden_size = num_classes, self.num_features
        self.head_drop = nn.Dropout(drop_rate)
        self.set_pooling(self.pooling if global_pool is None else global_pool)

    def set_pooling(self, global_pool):
        if global_pool not in (self.pooling, ""):
            raise ValueError(f"global_pool = {global_pool!r}; there is {self.pooling!r}, and '' for no pooling")
        self.global_pool = global_pool

    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        super().reset_classifier(num_classes)
        self.num_classes = num_classes
        if global_pool is not None:
            self.set_pooling(global_pool)

    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable

    def load_pretrained(self, path):
        """Called by timm with the file of a pretrained_cfg."""
        load_weights(self, path, classifier="fitting")

    def forward_intermediates(self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW",
                              intermediates_only=False):
        """(last features, [(B, C_i, H_i, W_i) of the stages in indices]), or the list alone; norm: of the last one."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt = {output_fmt!r}; there is 'NCHW'")
        last, maps = self.all_features(x)
        taken, _ = feature_take_indices(len(maps), indices)
        found = [maps[i] for i in taken]
        if norm and len(maps) - 1 in taken:
            found[taken.index(len(maps) - 1)] = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return found if intermediates_only else (last, found)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Takes the classifier off; the stages stay, as what they give is taken from one pass through all."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


class ELSASwin(TimmModel, swin.Swin):
    pooling = "avg"

    def __init__(self, **options):
        super().__init__(**options)
        patch = self.patch_embed.proj.stride[0]
        self.feature_info = [dict(num_chs=dim, reduction=patch * 2 ** i, module=f"layers.{i}")
                             for i, dim in enumerate(self.dims)]

    def no_weight_decay(self):
        return {name for name, _ in self.named_parameters() if "relative_position_bias_table" in name}

    def group_matcher(self, coarse=False):
        """Parameters from the first layer to the last, for rates of their own."""
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else [
            (r"^layers\.(\d+).downsample", (0,)), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))])

    def all_features(self, images):
        maps = swin.Swin.forward_features(self, images)
        return self.norm(maps[-1].permute(0, 2, 3, 1)), maps

    def forward_features(self, images):
        return self.all_features(images)[0]

    def forward_head(self, x, pre_logits=False):
        x = self.head_drop(x.mean((1, 2)) if self.global_pool else x)
        return x if pre_logits else self.head(x)


class ELSAVOLO(TimmModel, volo.VOLO):
    pooling = "token"

    def __init__(self, **options):
        super().__init__(**options)
        dim, patch = self.num_features, self.patch_size
        self.feature_info = [dict(num_chs=dim // 2 if i == 0 else dim, reduction=patch if i == 0 else 2 * patch,
                                  module=f"network.{stage}") for i, stage in enumerate((0, 2, 3, 4))]

    def no_weight_decay(self):
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse=False):
        """Parameters from the first layer to the last, for rates of their own."""
        return dict(stem=r"^patch_embed", blocks=[
            (r"^network\.(\d+)\.(\d+)", None), (r"^network\.(\d+)", (0,)), (r"^pos_embed", (2, 0))],
            blocks2=[(r"^cls_token", (0,)), (r"^post_network\.(\d+)", None), (r"^norm", (99999,))])

    def all_features(self, images):
        return volo.VOLO.forward_features(self, images)

    def forward_features(self, images):
        return self.all_features(images)[0]

    def forward_head(self, x, pre_logits=False):
        token = self.head_drop(x[:, 0] if self.global_pool else x)
        if pre_logits or self.head is None:
            return token
        if not self.global_pool:
            return self.head(token)
        return self.head(token) + 0.5 * self.aux_head(x[:, 1:]).amax(1)


def _cfg(first_conv, classifier, crop_pct):
    return {"num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "crop_pct": crop_pct,
            "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": first_conv, "classifier": classifier}


default_cfgs = generate_default_cfgs({
    **{name: _cfg("patch_embed.proj", "head", 0.9) for name in SWIN},
    **{name: _cfg("patch_embed.conv.0", ("head", "aux_head"), 0.96) for name in VOLO},
})


def _register(name, ours, model_class):
    """Tells timm of one model: a function of its name, which makes it."""
    def create(pretrained=False, img_size=224, **options):
        config = {**MODELS[ours][1], "attn": "elsa"}
        if model_class is ELSAVOLO:
            config["img_size"] = img_size
        if pretrained:
            overlay = dict(options.get("pretrained_cfg_overlay") or {})
            if not overlay.get("file"):
                wanted = (ours, "elsa", img_size, options.get("window_size"))
                overlay["file"] = str(published.fetch(published.NAME, wanted, read))
            # timm hands the file to load_pretrained; with a file of its own it forgets to.
            options["pretrained_cfg_overlay"] = {**overlay, "custom_load": True}
        feature_cfg = dict(out_indices=options.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter")
        return build_model_with_cfg(model_class, name, pretrained, feature_cfg=feature_cfg, **{**config, **options})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{ours} with ELSA, as models.create_model makes it; see the head of this file."
    return register_model(create)


for _name, _ours in SWIN.items():
    _register(_name, _ours, ELSASwin)
for _name, _ours in VOLO.items():
    _register(_name, _ours, ELSAVOLO)


def run_script():
    """Runs the script that the command line names, with the arguments after it."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m models.timm_models SCRIPT [ARGUMENT ...]")
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run_script()
