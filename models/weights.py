"""Weights of our own and of the published models, told apart by their keys."""
import argparse
import importlib.util
import math
import re
import sys
import zipfile

import numpy as np
import torch
import torch.nn.functional as F

from models import published
from models.attention import WindowAttention
from models.volo import interpolate_pos_embed

# What holds the weights inside a checkpoint file, the moving average first: it is what the published numbers were
# measured with.
ENTRIES = ("model_ema", "ema_state_dict", "state_dict_ema", "ema", "model", "state_dict")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # before all keys: of DistributedDataParallel, torch.compile, Lightning
BUFFERS = ("relative_position_index", "relative_id", "attn_mask")  # computed from the shapes, never learnt
# Of newer mmdetection, mmsegmentation and mmpretrain: Swin's names there, and ours.
MMDETECTION = {r"\bpatch_embed\.projection\.": "patch_embed.proj.", r"\bstages\.": "layers.", r"\.w_msa\.": ".",
               r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.", r"\.ffn\.layers\.1\.": ".mlp.fc2."}
FIRST_CONVOLUTION = re.compile(r"(backbone\.)?patch_embed\.(proj|conv\.0)\.weight")
BYTEARRAY = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")  # torch would make one of any length, and fill it
CLASSIFIER = re.compile(
    r"(head|aux_head"
    r"|(decode|auxiliary)_head\.conv_seg"
    r"|roi_head\.(bbox_head(\.\d)?\.fc_(cls|reg)|mask_head(\.\d)?\.conv_logits))\.")


def load_weights(model, source, classifier=True):
    """Loads weights into a model and returns it. All or nothing: after an error the model is as it was.

    Args:
        model: as create_model gives it.
        source: a file of torch.save or, with that ending, of safetensors, or what such a file contains, or "published":
            what the authors published for this model and attention, see models.published. Either a state dict or a
            checkpoint holding one as "model_ema", "ema_state_dict", "state_dict_ema", "ema", "model" or "state_dict":
            the first of these that holds tensors, so a moving average goes before the weights it averages. (mmengine
            exchanges the two when it saves; its files are known by their count of steps.) "module.", "_orig_mod." and
            "model." before all keys are taken off. Known by their keys are our own, the published ELSA-Swin,
            Microsoft's Swin, timm's Swin, VOLO, sail-sg's or timm's, and the published ELSA and Swin segmenters and
            detectors, with the names of older and newer mmdetection. A position embedding of another grid and the bias
            tables of another window are interpolated, bicubic as published; of the latter a line on stderr tells. So it
            does of a first convolution for three channels in a model of others: for one channel it is summed, for more
            repeated and scaled, as timm does. Segmenters and detectors take a classifier's file, too: for the backbone,
            their heads stay as they are.
        classifier: False leaves the classifier as it is, for fine-tuning on other classes; "fitting" does where it is
            of another number of classes, and says so.

    Raises:
        FileNotFoundError, ConnectionError: there is no such file; it cannot be fetched.
        ValueError: the file is damaged, or it would run code when read (it is refused, nothing runs), or its weights
            are not those of the model: all keys that are missing, unexpected or of another shape are listed.
    """
    if published.is_name(source):
        source = published.fetch(source, _created(model), read)
    return load_checkpoint(model, source if isinstance(source, dict) else read(source),
                           "the given state dict" if isinstance(source, dict) else source, classifier)


def load_checkpoint(model, checkpoint, where, classifier=True):
    """load_weights of what a file contains; where: what to call it."""
    state = _convert_keys(_state_dict(checkpoint))
    expected = model.state_dict()
    strict = classifier
    if hasattr(model, "backbone") and not any(key.startswith("backbone.") for key in state):  # a classifier's file
        state = {f"backbone.{key}": value for key, value in state.items()
                 if not CLASSIFIER.match(key) and not key.startswith("norm.")}
        expected = {key: value for key, value in expected.items() if re.match(r"backbone\.(?!norm\d)", key)}
        strict = False
    elif not hasattr(model, "backbone"):  # mmpretrain's classifiers have one
        state = {key.replace("backbone.norm3.", "norm.").removeprefix("backbone."): value
                 for key, value in state.items()}
    if classifier == "fitting":
        heads = [{key: value.shape for key, value in weights.items() if CLASSIFIER.match(key)}
                 for weights in (state, expected)]
        classifier = heads[0] == heads[1]
        strict = strict and classifier
        if not classifier and all(heads):
            print(f"the classifier of {where} is of other classes: this one starts fresh", file=sys.stderr)
    if not classifier:
        state = {key: value for key, value in state.items() if not CLASSIFIER.match(key)}
        expected = {key: value for key, value in expected.items() if not CLASSIFIER.match(key)}
    embedding = state.get("pos_embed")
    if "pos_embed" in expected and embedding is not None and embedding.ndim == 4 and embedding.numel():
        state["pos_embed"] = interpolate_pos_embed(embedding.float(), *expected["pos_embed"].shape[1:3])
    interpolated = _interpolate_tables(model, state, expected)
    _adapt_channels(state, expected)
    problems = _differences(state, expected)
    if problems:
        raise ValueError(
            f"{where} does not fit this {type(model).__name__}; nothing was loaded. Create the model with the name, "
            "attn, num_classes and overrides the weights were trained with.\n  " + "\n  ".join(problems))
    model.load_state_dict(state, strict=strict)
    if interpolated:
        print(f"{len(interpolated)} relative position bias tables interpolated: {', '.join(sorted(set(interpolated)))}",
              file=sys.stderr)
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


def _interpolate_tables(model, state, expected):
    """Fits bias tables of another window in `state` to the model -> what was done to each, in words."""
    done = []
    for key in expected:
        block, _, name = key.rpartition(".")
        if name != "relative_position_bias_table" or key not in state or state[key].shape == expected[key].shape:
            continue
        table, (length, heads) = state[key], expected[key].shape  # (offsets ** 2, heads)
        side, new = round(len(table) ** 0.5) if table.ndim else 0, round(length ** 0.5)
        windows = isinstance(model.get_submodule(block), WindowAttention)
        if windows and table.shape == (side ** 2, heads) and side % 2:
            image = table.float().T.reshape(1, heads, side, side)
            state[key] = F.interpolate(image, (new, new), mode="bicubic").flatten(2)[0].T.to(table.dtype)
            done.append(f"a window of {side // 2 + 1} x {side // 2 + 1} to {new // 2 + 1} x {new // 2 + 1}")
    return done


def _adapt_channels(state, expected):
    """Fits the first convolution in `state`, of three channels, to a model of others."""
    for key in filter(FIRST_CONVOLUTION.fullmatch, expected.keys() & state.keys()):
        weight, channels = state[key], expected[key].shape[1]
        if weight.ndim == 4 and weight.shape[1] == 3 != channels:
            if channels == 1:
                weight = weight.sum(1, keepdim=True)
            else:
                weight = weight.repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)
            state[key] = weight
            print(f"the first convolution, of 3 channels, is fitted to {channels}", file=sys.stderr)


def _created(model):
    if not hasattr(model, "created"):
        raise ValueError(f"published weights are found by the name of a model, and this {type(model).__name__} was not "
                         "made by create_model; give a file")
    return model.created


def read(path):
    """What a file written by torch.save contains, on the CPU; raises as load_weights says."""
    safetensors = str(path).endswith(".safetensors")
    if safetensors and importlib.util.find_spec("safetensors") is None:
        raise ValueError(f"{path}: reading it needs a package that is not installed: `pip install safetensors`")
    try:
        if safetensors:
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        check_archive(path)
        with torch.serialization.safe_globals(_data_types()):
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
        raise ValueError(f"{path} cannot be read: it is damaged, or neither torch.save nor safetensors wrote it. "
                         "Copy or download it again.") from error


def check_archive(path):
    """Raises ValueError, or what zipfile raises, for an archive, as torch.save writes it, whose parts are not as they
    were written, which torch.load does not look at, and for what would take memory without end."""
    if not zipfile.is_zipfile(path):
        return  # torch.save of long ago
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("compressed, which torch.save never does")  # a kilobyte can hold a terabyte of zeros
        if not any(part.CRC for part in parts):
            for part in parts:
                part.CRC = None  # torch.serialization.set_crc32_options(False): nothing to compare with
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} does not fit")
        for part in parts:
            if part.external_attr & 16:  # torch takes what is marked as a folder for zeros, or whatever is in memory
                raise ValueError(f"the mark of {part.filename} does not fit")
            if part.filename.endswith("data.pkl") and BYTEARRAY.search(archive.read(part)):
                raise ValueError("GLOBAL builtins.bytearray")


def _data_types():
    """What checkpoints hold beside tensors that is data, nothing that acts when it is read.

    Namespace is the command line, of timm's trainer and the published ELSA; the others are what numpy's numbers and
    arrays are made of, under the names of numpy 1 and 2.
    """
    codes = "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
    types = {type(np.dtype(code)) for code in codes}
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    functions = [(function, f"numpy.{core}.multiarray.{function.__name__}")
                 for core in ("core", "_core") for function in (scalar, array)]
    return [argparse.Namespace, np.dtype, np.ndarray, *types, *functions]


def _state_dict(checkpoint):
    """The weights inside a checkpoint, without what wrappers put before every key."""
    entries = {}
    if isinstance(checkpoint, dict):
        entries = {entry: checkpoint.get(entry) for entry in ENTRIES if _holds_tensors(checkpoint.get(entry))}
    if "steps" in entries.get("ema_state_dict", ()) and "state_dict" in entries:  # mmengine
        entries = {"state_dict": entries["state_dict"]}
    state = next(iter(entries.values()), checkpoint)
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError("the checkpoint holds no weights: expected a dict of tensors, or one under "
                         f"{', '.join(ENTRIES)}; found {found}")
    for key, value in state.items():
        # The numbers of a file that was tampered with: none, or one that stands for a billion.
        if (value.layout != torch.strided or value.is_meta
                or value.numel() * value.element_size() > value.untyped_storage().nbytes()):
            raise ValueError(f"the checkpoint is damaged: {key} has the shape {tuple(value.shape)} and fewer numbers")
    prefix = ""
    while prefix is not None:
        state = {str(key).removeprefix(prefix): value for key, value in state.items()}
        state.pop("n_averaged", None)  # of torch's AveragedModel
        prefix = next((prefix for prefix in WRAPPERS if state and all(key.startswith(prefix) for key in state)), None)
    return state


def _holds_tensors(entry):
    return isinstance(entry, dict) and any(isinstance(value, torch.Tensor) for value in entry.values())


def _convert_keys(published):
    """Published state dicts of Swin and ELSA-Swin in our names and layouts; ours, and VOLO's, pass unchanged.

    timm keeps a down-sampling at the start of the stage after it and calls the classifier head.fc. The windowed last
    stage of ELSA-Swin projects to v, q, k instead of q, k, v, and its bias table `rb`, (heads, offsets), counts
    offsets as key minus query: (offsets, heads) reversed is ours. Newer mmdetection takes the 2 x 2 pixels of a
    down-sampling by nn.Unfold, channel by channel and row by row; ours are pixel by pixel and column by column.
    """
    from_timm = "layers.1.downsample.norm.weight" in published and "layers.0.downsample.norm.weight" not in published
    from_mmdetection = any(".attn.w_msa." in key for key in published)
    state = {}
    for key, value in published.items():
        if from_mmdetection:
            for theirs, ours in MMDETECTION.items():
                key = re.sub(theirs, ours, key)
            downsampling = re.search(r"layers\.\d+\.downsample\.(norm|reduction)\.", key)
            if downsampling and value.ndim and value.shape[-1] % 4 == 0:
                value = value.unflatten(-1, (-1, 2, 2)).movedim((-1, -2), (-3, -2)).flatten(-3)  # (..., column, row, C)
        block, _, name = key.rpartition("attn.")
        if name in BUFFERS or key.rpartition(".")[2] in BUFFERS:
            continue
        if from_timm:
            key = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key)
        if f"{block}attn.rb" in published and value.ndim:
            if name == "rb":
                key, value = f"{block}attn.relative_position_bias_table", value.flip(-1).transpose(0, -1)
            elif name.startswith("pre_proj"):
                key, value = key.replace("pre_proj", "qkv"), value.roll(-(len(value) // 3), 0)
            elif name.startswith("post_proj"):
                key = key.replace("post_proj", "proj")
        state[key.replace("head.fc.", "head.")] = value
    return state
