"""COCO: one caption an image by seed, and what is wrong with a file."""
import json

import numpy as np
import pytest

import data
from config import Config, ModelConfig, UserError
from sources import coco
from test_shards import png


def write_coco(root, n=5, **changes):
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    names = {10 * k: f"COCO_{k}.jpg" for k in range(n)}
    for k, name in enumerate(names.values()):
        (root / "val2014" / name).write_bytes(png(k))
    rows = [{"id": 7 * number + j, "image_id": number, "caption": f"image {number}  text {j}\n"}
            for j in (2, 0, 1) for number in names]
    images = [{"id": number, "file_name": name} for number, name in names.items()][::-1]
    tree = {"images": images, "annotations": rows}
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps({**tree, **changes}), encoding="utf-8")
    return root


def test_coco_gives_an_image_one_caption_by_seed(tmp_path):
    root = write_coco(tmp_path / "coco", 40)
    (root / "annotations" / "captions_train2014.json").write_text("{}")
    file = root / "annotations" / "captions_val2014.json"
    picks = {seed: [source.load(k, 0)[1]["caption"] for k in range(40)]
             for seed in (0, 1) for source in [data.CocoCaptions(root, 8, seed)]}
    again = [source.load(k, 5)[1]["caption"] for source in [data.CocoCaptions(file, 8, 0)] for k in range(40)]
    assert picks[0] == again != picks[1]
    assert [c.split(" text ")[0] for c in picks[0]] == [f"image {10 * k}" for k in range(40)]
    counts = np.bincount([int(c[-1]) for c in picks[0] + picks[1]], minlength=3)
    assert ((counts - 80 / 3) ** 2 / (80 / 3)).sum() < 14                       # chi2 with 2 degrees, p = 0.001
    source = data.open_source(Config(data=f"coco:{root}", model=ModelConfig(resolution=8)))
    assert source.names[3] == "COCO_3.jpg" and data.cyclic_batch(source, [42, 2])["caption"] == [picks[0][2]] * 2


def test_what_is_wrong_with_coco_is_said(tmp_path):
    root = write_coco(tmp_path / "coco", 6)
    (root / "val2014" / "COCO_2.jpg").unlink()
    source = data.CocoCaptions(root, 8, max_bad=0.2)
    assert len(source) == 5 and list(source.bad) == ["COCO_2.jpg"]
    with pytest.raises(UserError, match="FileNotFoundError.* or a folder with annotations/captions_val2014.json"):
        data.CocoCaptions(tmp_path, 8)
    image = [{"id": 1, "file_name": "x.jpg"}]
    for number, (changes, match) in enumerate((
            ({"images": 3}, "not a COCO"), ({"annotations": [{"id": 1}]}, "not a COCO"),
            ({"images": [{"id": 1, "file_name": "../x.jpg"}]}, "leads out"), ({"images": image * 2}, "not|none"),
            ({"images": [{"id": "1", "file_name": "x.jpg"}]}, "none of the 1"), ({"images": []}, "none of the 0"))):
        with pytest.raises(UserError, match=match):
            data.CocoCaptions(write_coco(tmp_path / str(number), **changes), 8)
    for content in (b"", b"\xff\xfe", b"[" * 100_000, b"[]"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match="not a COCO"):
            coco.read(tmp_path / "x.json")
