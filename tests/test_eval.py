"""Evaluation: counting, which class a folder means, what a checkpoint says about itself."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eval import imagenet
from eval.imagenet import class_indices, evaluate
from models import create_model
from run import evaluate as main
from train import data

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(training):
    model = Lookup(3).train(training)
    evaluate(model, loader(torch.randn(2, 3), torch.tensor([0, 1]), 2), CPU)
    assert model.training is training


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_images_without_padding(world):
    images = TensorDataset(torch.arange(7))
    shares = [[int(value) for (batch,) in data.validation_loader(images, 2, rank, world, 0) for value in batch] for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(7))


def test_folders_find_their_class():
    wnids = imagenet.WNIDS.read_text().split()
    assert len(set(wnids)) == 1000 and wnids == sorted(wnids)
    assert class_indices([wnids[3], wnids[700]], None, None) == ([3, 700], 1000)
    assert class_indices(wnids, None, 1000) == (list(range(1000)), 1000)
    assert class_indices(["cat", "dog"], None, None) == ([0, 1], 2)
    assert class_indices(["dog"], ["cat", "dog"], 2) == ([1], 2)
    assert class_indices([wnids[3], wnids[700]], None, 2) == ([0, 1], 2)
    with pytest.raises(ValueError, match="2 folders, the model 1000 classes"):
        class_indices(["cat", "dog"], None, 1000)
    with pytest.raises(ValueError, match="no classes of the model: .'wolf'"):
        class_indices(["wolf"], ["cat", "dog"], 2)


def test_subset_of_imagenet_is_scored_over_all_classes(tmp_path, capsys):
    for wnid in imagenet.WNIDS.read_text().split()[5:900:300]:
        (tmp_path / "val" / wnid).mkdir(parents=True)
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "val" / wnid / "a.png")
    tiny = "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}"
    model = create_model("swin_t", attn="elsa", num_classes=1000, embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    with torch.no_grad():
        model.head.bias[305] = 100.0  # answers class 305 whatever the image
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    result = main(["swin_t", "--attn", "elsa", "--weights", str(tmp_path / "weights.pt"), "--data", str(tmp_path), "--img-size", "32",
                   "--model-args", tiny, "--device", "cpu", "--workers", "0"])
    assert result["images"] == 3 and result["top1"] == pytest.approx(100 / 3)
    assert "1000 classes" in capsys.readouterr().out


def test_untrained_model_is_called_so(capsys):
    main(["swin_t", "--attn", "elsa", "--val-limit", "3", "--model-args", "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}",
          "--device", "cpu"])
    assert "UNTRAINED" in capsys.readouterr().out
