"""eval/imagenet.py: what is counted, and which class a folder means."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eval import imagenet
from eval.evaluate import main
from eval.imagenet import class_indices, evaluate
from models import create_model

CPU = torch.device("cpu")
TINY = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


class Lookup(nn.Module):
    """Answers with the logits that are stored in the first pixels of the image."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images[:, 0, 0, :self.classes]


def loader(logits, labels, batch_size):
    images = torch.zeros(len(labels), 3, 1, logits.shape[1])
    images[:, 0, 0] = logits
    return DataLoader(TensorDataset(images, labels), batch_size)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_counts_match_the_definition(batch_size):
    torch.manual_seed(0)
    logits, labels = torch.randn(37, 9), torch.randint(9, (37,))
    result = evaluate(Lookup(9), loader(logits, labels, batch_size), CPU)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result["images"] == 37
    assert result["top1"] == pytest.approx(100 * (rank < 1).float().mean().item())
    assert result["top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_top5_of_three_classes_counts_all():
    assert evaluate(Lookup(3), loader(torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), 2), CPU)["top5"] == 100


class Dropping(Lookup):
    """Answers nonsense in training mode."""

    def forward(self, images):
        assert not torch.is_grad_enabled()
        logits = super().forward(images)
        return logits * float("nan") if self.training else logits


@pytest.mark.parametrize("training", [True, False])
def test_evaluates_in_evaluation_mode_and_restores_the_mode(training):
    model, logits = Dropping(3).train(training), torch.eye(3).requires_grad_()
    result = evaluate(model, loader(logits, torch.tensor([0, 1, 2]), 2), CPU)
    assert result["top1"] == 100 and np.isfinite(result["loss"]) and model.training is training
    with pytest.raises(IndexError):
        evaluate(model, loader(logits, torch.tensor([0, 1, 7]), 2), CPU)
    assert model.training is training


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_images_without_padding(world):
    images = TensorDataset(torch.arange(7))
    seen = []
    for rank in range(world):
        for batch, in imagenet.loader(images, 2, rank, world, 0):
            seen += batch.tolist()
    assert sorted(seen) == list(range(7))


def test_folders_find_their_class():
    wnids = imagenet.WNIDS.read_text().split()
    assert len(set(wnids)) == 1000 and wnids == sorted(wnids)
    assert class_indices([wnids[3], wnids[700]], None, None) == ([3, 700], wnids)
    assert class_indices(wnids, None, 1000) == (list(range(1000)), wnids)
    assert class_indices(["cat", "dog"], None, None) == ([0, 1], ["cat", "dog"])
    assert class_indices(["dog"], ["cat", "dog"], 2) == ([1], ["cat", "dog"])
    assert class_indices([wnids[3], wnids[700]], None, 2) == ([0, 1], [wnids[3], wnids[700]])
    with pytest.raises(ValueError, match="2 folders, the model 1000 classes"):
        class_indices(["cat", "dog"], None, 1000)
    with pytest.raises(ValueError, match="no classes of the model: .'wolf'"):
        class_indices(["wolf"], ["cat", "dog"], 2)


def test_subset_of_imagenet_is_scored_over_all_classes(tmp_path, capsys):
    for wnid in imagenet.WNIDS.read_text().split()[5:900:300]:
        (tmp_path / "val" / wnid).mkdir(parents=True)
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "val" / wnid / "a.png")
    model = create_model("swin_t", attn="elsa", num_classes=1000, **TINY)
    with torch.no_grad():
        model.head.bias[305] = 100.0  # answers class 305 whatever the image
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    result = main(["swin_t", "--attn", "elsa", "--weights", str(tmp_path / "weights.pt"), "--data", str(tmp_path),
                   "--img-size", "32", "--model-args", json.dumps(TINY), "--device", "cpu", "--workers", "0"])
    assert result["images"] == 3 and result["top1"] == pytest.approx(100 / 3)
    assert "1000 classes" in capsys.readouterr().out


def test_untrained_model_is_called_so(capsys):
    main(["swin_t", "--attn", "elsa", "--val-limit", "3", "--model-args", json.dumps(TINY), "--device", "cpu"])
    assert "UNTRAINED" in capsys.readouterr().out
