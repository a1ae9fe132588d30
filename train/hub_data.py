"""Data sets of the package datasets, on disk or in its cache: `--data hf:imagenet-1k`, `--data hf:/saved/with/it`."""
import os
from pathlib import Path

from train.photographs import trying
from train.records import Records

SPLITS = {True: ("train",), False: ("validation", "valid", "val", "test")}  # of training or not; the first counts


class HubImages(Records):
    """The photographs of one split, and their labels.

    place: a folder that save_to_disk wrote, a folder of parquet files or images, or the name of a data set that was
    loaded before: nothing is downloaded. It needs one column of images and one ClassLabel, which names the classes.
    Raises ModuleNotFoundError, FileNotFoundError or ValueError.
    """

    def __init__(self, place, training, transform=None):
        splits = _load(place)
        split = next((name for name in SPLITS[training] if name in splits), None)
        if split is None:
            raise ValueError(f"--data hf:{place} has no split {' or '.join(SPLITS[training])}; it has "
                             f"{', '.join(splits)}")
        images, labels = _columns(splits[split], place)
        self.rows = splits[split].cast_column(images, type(splits[split].features[images])(decode=False))
        self.column, self.split = images, f"hf:{place}, {split}"
        super().__init__(self.split, splits[split].features[labels].names, splits[split].with_format(None)[labels][:],
                         transform)

    def name(self, index):
        path = self._row(index)["path"]
        return f"{self.split}, image {index}" + (f" ({path})" if path else "")

    def content(self, index):
        row = self._row(index)
        if row["bytes"] is not None:
            return row["bytes"]
        if row["path"] is None:
            raise ValueError(f"{self.name(index)} is empty")
        return trying(lambda: Path(row["path"]).read_bytes())

    def _row(self, index):
        try:
            return self.rows[index][self.column] or {"bytes": None, "path": None}
        except Exception as error:  # of pyarrow
            raise ValueError(f"{self.split}, image {index}: the file that holds it is damaged ({error})") from error


def _load(place):
    """{name of a split: datasets.Dataset}"""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # ranks would all download, and nobody asked for 150 GB
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--data hf:... needs the package datasets: `pip install datasets`") from None
    folder = Path(place)
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(place)
        if not (folder / "state.json").is_file():
            return datasets.load_dataset(place)
    except Exception as error:  # of many kinds
        where = "cannot be read" if folder.is_dir() else "is no folder, nor in the cache of the package datasets"
        raise FileNotFoundError(f"--data hf:{place} {where} ({' '.join(str(error).split())[:300]}). "
                                "datasets.load_dataset(NAME) downloads one; nothing else does") from error
    raise ValueError(f"--data hf:{place} is one split alone; expected a DatasetDict with {SPLITS[True][0]} and "
                     f"{SPLITS[False][0]}, as DatasetDict.save_to_disk writes it")


def _columns(rows, place):
    """(name of the column of images, of the labels)"""
    found = {kind: [name for name, feature in rows.features.items() if type(feature).__name__ == kind]
             for kind in ("Image", "ClassLabel")}
    for kind, names in found.items():
        if len(names) != 1:
            raise ValueError(f"--data hf:{place} has {len(names)} columns of the kind {kind} ({', '.join(names)}); "
                             f"expected one. Its columns are {', '.join(rows.features)}")
    return found["Image"][0], found["ClassLabel"][0]
