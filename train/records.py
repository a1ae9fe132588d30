"""Photographs that are records of larger files, with their labels: what hub_data.py and shards.py share."""
from torch.utils.data import Dataset

from train.photographs import decode_image


class Records(Dataset):
    """What PhotographFolder is for a folder: item i is (photograph i, its label), changed by transform and
    target_transform. A record that cannot be read raises ValueError or OSError, with its name().

    root: what holds them, for errors. classes: names. targets: the label of every record. notes: see train.run_folder.
    A subclass has content(index), the bytes of an image file, and name(index).
    """
    target_transform = None

    def __init__(self, root, classes, targets, transform, notes=()):
        self.root, self.classes, self.targets, self.transform = root, classes, targets, transform
        self.notes = list(notes)
        if not targets:
            raise ValueError(f"{root} holds no photographs with labels")
        for index, label in enumerate(targets):
            if not 0 <= label < len(classes):
                raise ValueError(f"{self.name(index)} has the label {label}; expected 0 to {len(classes) - 1} of "
                                 f"{len(classes)} classes")

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image, label = decode_image(self.content(index), self.name(index)), self.targets[index]
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(label) if self.target_transform else label
