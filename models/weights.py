"""Weights of our own and of the published models, told apart by their keys."""
import argparse
import re

import torch

from models.volo import interpolate_pos_embed

# What holds the weights inside a checkpoint file, the moving average first: it is what the published numbers were
# measured with.
ENTRIES = ("ema", "state_dict_ema", "model", "state_dict")
BUFFERS = ("relative_position_index", "relative_id", "attn_mask")  # computed from the shapes, never learnt
CLASSIFIER = re.compile(
    r"(head|aux_head"
    r"|(decode|auxiliary)_head\.conv_seg"
    r"|roi_head\.(bbox_head(\.\d)?\.fc_(cls|reg)|mask_head(\.\d)?\.conv_logits))\.")


def load_weights(model, source, classifier=True):
    """Loads weights into a model and returns it. All or nothing: after an error the model is as it was.

    Args:
        model: as create_model gives it.
        source: a file written by torch.save, or what such a file contains. Either a state dict or a checkpoint holding
            one as "ema", "state_dict_ema", "model" or "state_dict": the first of these that is there and not None, so
            a moving average goes before the weights it averages. Known by their keys are our own, the published
            ELSA-Swin, Microsoft's Swin, timm's Swin, VOLO, sail-sg's or timm's, and the published ELSA and Swin
            segmenters and detectors. A position embedding of another grid is interpolated, as published. Segmenters
            and detectors take a classifier's file, too: for the backbone, their heads stay as they are.
        classifier: False leaves the classifier as it is, for fine-tuning on other classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or it would run code when read (it is refused, nothing runs), or its weights
            are not those of the model: all keys that are missing, unexpected or of another shape are listed.
    """
    checkpoint = source if isinstance(source, dict) else _read(source)
    state = _convert_keys(_state_dict(checkpoint))
    expected = model.state_dict()
    strict = classifier
    if hasattr(model, "backbone") and not any(key.startswith("backbone.") for key in state):  # a classifier's file
        state = {f"backbone.{key}": value for key, value in state.items()
                 if not CLASSIFIER.match(key) and not key.startswith("norm.")}
        expected = {key: value for key, value in expected.items() if re.match(r"backbone\.(?!norm\d)", key)}
        strict = False
    if not classifier:
        state = {key: value for key, value in state.items() if not CLASSIFIER.match(key)}
        expected = {key: value for key, value in expected.items() if not CLASSIFIER.match(key)}
    if "pos_embed" in expected and "pos_embed" in state and state["pos_embed"].ndim == 4:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], *expected["pos_embed"].shape[1:3])
    problems = _differences(state, expected)
    if problems:
        where = "the given state dict" if isinstance(source, dict) else source
        raise ValueError(
            f"{where} does not fit this {type(model).__name__}; nothing was loaded. Create the model with the name, "
            "attn, num_classes and overrides the weights were trained with.\n  " + "\n  ".join(problems))
    model.load_state_dict(state, strict=strict)
    return model


def _differences(state, expected):
    """A line for every key of two state dicts that is missing, unexpected or of another shape."""
    lines = [f"missing: {key} {tuple(value.shape)}" for key, value in expected.items() if key not in state]
    lines += [f"unexpected: {key} {tuple(value.shape)}" for key, value in state.items() if key not in expected]
    for key, value in state.items():
        if key in expected and value.shape != expected[key].shape:
            shape = tuple(expected[key].shape)
            lines.append(f"wrong shape: {key} is {tuple(value.shape)}, the model has {shape}")
    return lines


def _read(path):
    try:
        # Checkpoints of timm's trainer, the published ELSA among them, carry their command line in a Namespace, which
        # is only data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no checkpoint at {path}") from error
    except Exception as error:  # damaged bytes make the unpickler raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path} was refused: reading it would run code ({code[1]}). A checkpoint may hold only tensors, "
                "numbers, strings and containers of these. If you trust its origin, load it yourself and save its "
                "state dict alone.") from error
        raise ValueError(f"{path} cannot be read: it is damaged, or torch.save did not write it. Copy or download it "
                         "again.") from error


def _state_dict(checkpoint):
    """The weights inside a checkpoint, without the "module." that DistributedDataParallel puts before every key."""
    state = checkpoint
    if isinstance(checkpoint, dict):
        state = next((checkpoint[entry] for entry in ENTRIES if checkpoint.get(entry) is not None), checkpoint)
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError("the checkpoint holds no weights: expected a dict of tensors, or one under "
                         f"{', '.join(ENTRIES)}; found {found}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _convert_keys(published):
    """Published state dicts of Swin and ELSA-Swin in our names and layouts; ours, and VOLO's, pass unchanged.

    timm keeps a down-sampling at the start of the stage after it and calls the classifier head.fc. The windowed last
    stage of ELSA-Swin projects to v, q, k instead of q, k, v, and its bias table `rb`, (heads, offsets), counts
    offsets as key minus query: (offsets, heads) reversed is ours.
    """
    from_timm = "layers.1.downsample.norm.weight" in published and "layers.0.downsample.norm.weight" not in published
    state = {}
    for key, value in published.items():
        block, _, name = key.rpartition("attn.")
        if name in BUFFERS or key.rpartition(".")[2] in BUFFERS:
            continue
        if from_timm:
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key)
        if f"{block}attn.rb" in published:
            if name == "rb":
                key, value = f"{block}attn.relative_position_bias_table", value.flip(-1).transpose(0, -1)
            elif name.startswith("pre_proj"):
                key, value = key.replace("pre_proj", "qkv"), value.roll(-(len(value) // 3), 0)
            elif name.startswith("post_proj"):
                key = key.replace("post_proj", "proj")
        state[key.replace("head.fc.", "head.")] = value
    return state
