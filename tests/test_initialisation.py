"""Fresh weights are spread as those of the published models: mean and deviation of every tensor.

tests/golden/training/init.json has them of three seeds, as {model: {published name: [shape, standard deviation, mean,
smallest, largest]}}.
"""
import json
import re

import pytest
import torch

from models import create_model
from published import GOLDEN
from trajectory import places

SEEDS = 3  # of the published numbers
# The published numbers of this many tensors are compared: by chance one in 4e8 is off by six standard errors.
LIMIT = 6
MODELS = {
    "elsa_swin_tiny": dict(name="swin_t", attn="elsa"),
    "swin_tiny": dict(name="swin_t", attn="window"),
    "volo_d1": dict(name="volo_d1"),
    "upernet_elsa_tiny": dict(name="upernet_swin_t", attn="elsa"),
    "mask_elsa_tiny": dict(name="mask_rcnn_swin_t", attn="elsa"),
    "cascade_elsa_tiny": dict(name="cascade_mask_rcnn_swin_t", attn="elsa"),
}


def published(model):
    return json.loads((GOLDEN / "training" / "init.json").read_text())[model]


def compare(model, statistics):
    """Raises AssertionError for the tensors of a model whose mean or deviation is not that of `statistics`, a part of
    init.json with all of its parameters."""
    ours = {}
    for name, parameter in model.double().named_parameters():
        kept = parameter[parameter != -2]  # torch's truncated normal, before 2.12, slips once in a million entries
        ours[name] = kept.std(correction=0).item(), kept.mean().item(), parameter.numel()
    found = []
    for name, (counterpart, _) in places(model, {name: row[0] for name, row in statistics.items()}).items():
        std, mean, n = ours[name]
        _, expected_std, expected_mean, smallest, _ = statistics[counterpart]
        if smallest == -2 and expected_std < 0.1:  # a slip of timm's truncated normal, one entry of all
            expected_std = max(0.0, expected_std ** 2 - 4 / (SEEDS * n)) ** 0.5
            expected_mean += 2 / (SEEDS * n)
        share = (1 / n + 1 / (SEEDS * n)) ** 0.5  # of a standard deviation: error of the difference of two means
        if abs(mean - expected_mean) > LIMIT * share * expected_std:
            found.append(f"{counterpart}: mean {mean:.4g} instead of {expected_mean:.4g}")
        if abs(std - expected_std) > LIMIT * share * expected_std / 2 ** 0.5:
            found.append(f"{counterpart}: standard deviation {std:.4g} instead of {expected_std:.4g}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("model", ["elsa_swin_tiny", "swin_tiny", "volo_d1"])
def test_classifiers_start_as_published(model):
    torch.manual_seed(0)
    compare(create_model(**MODELS[model]), published(model))


def shallow(model):
    """(a model with one block a stage, which saves most of the time; what is published of it)"""
    torch.manual_seed(0)
    statistics = {name: row for name, row in published(model).items() if not re.search(r"blocks\.[1-9]\.", name)}
    return create_model(**MODELS[model], depths=(1, 1, 1, 1)), statistics


@pytest.mark.parametrize("model", ["upernet_elsa_tiny", "mask_elsa_tiny"])
def test_heads_start_as_published(model):
    compare(*shallow(model))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_all_models_start_as_published(model, seed):
    torch.manual_seed(seed)
    compare(create_model(**MODELS[model]), published(model))


def test_other_weights_are_noticed():
    model, statistics = shallow("swin_tiny")
    with torch.no_grad():
        for stage, change in enumerate((lambda weight: weight.mul_(1.05), lambda weight: weight.add_(0.002))):
            change(model.layers[stage].blocks[0].attn.qkv.weight)
    with pytest.raises(AssertionError) as error:
        compare(model, statistics)
    name = r"layers\.{}\.blocks\.0\.attn\.qkv\.weight"
    assert re.search(name.format(0) + r": standard deviation 0\.02[01]\d* instead of 0\.0", str(error.value))
    assert re.search(name.format(1) + r": mean 0\.00\d* instead of", str(error.value))
