"""Training images that cannot be read: replaced by the next one, counted, named.

Workers are processes of their own: what they could not read travels with the batch that lacks it.
"""
from pathlib import Path

from torch.utils.data import Dataset, default_collate

from train.distributed import gather
from train.run_folder import naming

SHARE, LEAST = 0.001, 10  # of the training images, how many may be unreadable where --bad-images does not say


class Replacing(Dataset):
    """A training data set in which an image that raises ValueError or OSError is replaced by the next index's, which is
    augmented as it is in its own place: by (seed, epoch, index), whatever the ranks and workers.

    collate() makes of samples (their batch, [what was wrong, a line for each unreadable image]).
    """

    def __init__(self, images, allowed):
        self.images, self.allowed = images, allowed
        self.groups = getattr(images, "groups", None)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        reasons = []
        while True:
            try:
                return self.images[epoch, index], reasons
            except (ValueError, OSError) as error:
                reasons.append(" ".join(str(error).split()))
                if len(reasons) == len(self):
                    raise ValueError(f"none of the {len(self)} training images can be read; the last: {reasons[-1]}"
                                     ) from error
                if len(reasons) > self.allowed:
                    raise ValueError(_too_many(reasons, self.allowed)) from error
                index = (index + 1) % len(self)

    def collate(self, samples):
        batch, reasons = zip(*samples)
        collate = getattr(self.images, "collate", default_collate)
        return collate(list(batch)), [reason for part in reasons for reason in part]


class BadImages:
    """The count of a run's unreadable training images; rank 0 keeps their names in bad_images.txt in the run's folder.

    loader: of a Replacing. Stands for it: yields its batches, and takes note of what they lack. Raises ValueError when
    more than `allowed` images could not be read: as soon as one rank alone has met so many, at the end of an epoch for
    all ranks together.
    """

    def __init__(self, loader, folder, rank):
        self.loader, self.batch_sampler = loader, loader.batch_sampler
        self.dataset, self.allowed = loader.dataset.images, loader.dataset.allowed
        self.file, self.writes = Path(folder) / "bad_images.txt", rank == 0
        text = self.file.read_text(encoding="utf-8") if self.writes and self.file.exists() else ""
        self.reasons = text.splitlines()  # of the part of the run before --resume

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch, reasons in self.loader:
            self.note(reasons)
            yield batch

    def note(self, reasons):
        new = [reason for reason in dict.fromkeys(reasons) if reason not in self.reasons]
        self.reasons += new
        if new and self.writes:
            with naming(self.file), open(self.file, "a", encoding="utf-8") as file:
                file.writelines(reason + "\n" for reason in new)
        if len(self.reasons) > self.allowed:
            raise ValueError(_too_many(self.reasons, self.allowed))

    def share(self):
        """All ranks learn of all."""
        self.note(gather(self.reasons))

    def report(self):
        """What to print at the end of a run: a list of lines."""
        if not self.reasons:
            return []
        return [f"{len(self.reasons)} training images could not be read and were replaced by the next one, "
                f"{self.file} names them all:", *("  " + reason for reason in self.reasons[:10])]


def allowed(bad_images, images):
    """How many of so many training images may be unreadable. bad_images: of a Config."""
    return max(LEAST, int(SHARE * images)) if bad_images is None else bad_images


def _too_many(reasons, allowed):
    return f"{len(reasons)} training images could not be read; --bad-images allows {allowed}. The last: {reasons[-1]}"
