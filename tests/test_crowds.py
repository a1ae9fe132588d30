"""Photographs of nothing but a crowd are trained on, as published: all that is seen in them is background."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from test_mask_rcnn import NAMES, tiny
from train import detection
from train.config import Config
from train.device import to_device


@pytest.fixture
def folder(tmp_path):
    """COCO's layout: photographs with an object and a crowd, a crowd alone, nothing, and a crowd on too few pixels."""
    sizes = {1: (64, 80), 2: (72, 64), 3: (64, 64), 4: (20, 64)}
    box = {"category_id": 1, "bbox": [8, 4, 30, 12], "area": 360}
    crowd = lambda image: {**box, "image_id": image, "iscrowd": 1, "segmentation": {
        "size": list(sizes[image]), "counts": [0, sizes[image][0] * sizes[image][1]]}}
    polygon = {**box, "image_id": 1, "iscrowd": 0, "segmentation": [[8, 4, 38, 4, 38, 16, 8, 16]]}
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in sizes.items()]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for i, (h, w) in sizes.items():
            Image.fromarray(np.full((h, w, 3), 90, np.uint8)).save(tmp_path / f"{split}2017" / f"{i}.png")
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps({
            "images": images, "annotations": [polygon, crowd(1), crowd(2), crowd(4)],
            "categories": [{"id": 1, "name": "thing"}]}))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_photographs_of_crowds_alone_are_trained_on(folder, name):
    config = Config(model=name, data=str(folder), img_size=64, device="cpu")
    training, _, _ = detection.datasets(config)
    assert [json.loads(training.folder.image_ids[i]) for i in training.indices] == [1, 2]
    assert training.groups.tolist() == [1, 0]
    assert training.notes == ["left out: photographs: 1 without objects, 1 with a side below 32 pixels, as 4.png of "
                              "20 x 64", "left out: objects: 2 crowds",
                              "class thing has 3 photographs, too few to learn it well; expected 5 or more"]
    model = tiny(name).train()
    for indices in ((0, 1), (1, 1)):  # beside an object, and alone
        samples = [training[epoch, index] for epoch, index in enumerate(indices)]
        batch = to_device(detection.collate(samples), torch.device("cpu"))
        assert [len(target["boxes"]) for target in batch[2]][1] == 0
        model.zero_grad()
        loss = detection.loss(model, batch, config, None)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    deltas = [p.grad for name, p in model.named_parameters() if "fc_reg" in name or "conv_logits" in name]
    assert not any(grad.any() for grad in deltas)  # without an object there is no box and no mask to learn
    assert torch.stack([p.grad.norm() for name, p in model.named_parameters() if "fc_cls" in name]).all()
