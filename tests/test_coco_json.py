"""train/coco_json.py: entries of a file that is read in pieces, what is no JSON, run-length codes."""
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as oracle

from train import coco_json


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_entries_are_read_alike_in_pieces_of_any_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(coco_json, "READ_AT_ONCE", size)
    content = {"info": {"a": [1, {"b": "}]"}]}, "images": [{"id": 1.25}, 1234567, "é\"\\"], "n": 123, "x": None,
               "annotations": [], "categories": [[]], "last": -1.5e-7}
    file = tmp_path / "x.json"
    for text in (json.dumps(content), json.dumps(content, indent=3, ensure_ascii=False)):
        for encoding in ("utf-8", "utf-8-sig"):
            file.write_text(text, encoding=encoding)
            found = [entry for entry in coco_json.entries(file)]
            assert found == [("images", 0, None), *(("images", i, content["images"][i - 1]) for i in (1, 2, 3)),
                             ("annotations", 0, None), ("categories", 0, None), ("categories", 1, [])]


@pytest.mark.parametrize("text", [
    "{", "[]", "1", "{}}", '{"images"', '{"images":', '{"images": [', '{"images": [1', '{"images": [1,',
    '{"images": [1]', '{"images": [1 2]}', '{"images": [1],}', '{"images": [1]} x', '{1: 2}', '{"images" [1]}',
    '{"x": 1 "y": 2}', '{"images": [1,]}', '{"images": [' + 5000 * "9" + "]}"])
def test_what_is_no_json_is_said(tmp_path, monkeypatch, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(json.JSONDecodeError) as error:
        [*coco_json.entries(file)]
    monkeypatch.setattr(coco_json, "READ_AT_ONCE", 3)
    with pytest.raises(json.JSONDecodeError, match=f"^{re.escape(str(error.value))}$"):  # with its place in the file
        [*coco_json.entries(file)]
    with pytest.raises(ValueError, match="x.json"):
        coco_json.read(file)


@pytest.mark.parametrize("text, words", [
    ("", "no images"), ('{"images": ' + 10 ** 5 * "[", "not JSON"), ('{"images": [], "images": []}', "there twice"),
    ('{"images": {"id": 1}}', "images is {'id'"), ('{"annotations": 5}', "annotations is 5; expected a list")])
def test_what_is_no_list_is_said(tmp_path, text, words):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"x.json.*{words}"):
        coco_json.read(file)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 16), H=st.integers(1, 40), W=st.integers(1, 40), share=st.floats(0, 1))
def test_runs_are_those_of_pycocotools(seed, H, W, share):
    mask = np.random.default_rng(seed).random((H, W)) < share
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.flatten()]))).tolist() + [H * W]
    code = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert coco_json.runs_of(code).tolist() == np.diff([0, *changes]).tolist()
    assert coco_json.runs_of(b"P" * 6 + b"0").tolist() == [0]
    with pytest.raises(ValueError, match="beyond all images"):
        coco_json.runs_of(b"P" * 7 + b"0")


def test_what_is_damaged_is_read_to_its_end_in_growing_pieces(tmp_path, monkeypatch):
    """And not tried again after every little piece: of a file of 400 MB that takes hours."""
    tries, decode = [], coco_json._Text.decode
    monkeypatch.setattr(coco_json._Text, "decode", staticmethod(lambda *text: tries.append(1) or decode(*text)))
    monkeypatch.setattr(coco_json, "READ_AT_ONCE", 1)
    (tmp_path / "x.json").write_text('{"images": [{"id": ?' + 1000 * " " + "}]}")
    with pytest.raises(json.JSONDecodeError):
        [*coco_json.entries(tmp_path / "x.json")]
    assert len(tries) < 40
