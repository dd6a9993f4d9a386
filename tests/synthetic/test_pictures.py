"""Endless data, sheets, export."""
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from yokolab.synthetic.contours import RCDB
from yokolab.synthetic.controls import PerlinNoise
from yokolab.synthetic.pictures import Pictures, contact_sheet, export_dataset, fixed_set

GEN = RCDB(canvas=64)


def test_workers_and_ranks_share_one_sequence():
    data = Pictures(GEN, GEN.categories(5), 16, batch=7, seed=9, batches=6)
    alone = list(data)
    for workers in (1, 2):
        loaded = list(DataLoader(data, batch_size=None, num_workers=workers))
        assert len(loaded) == 6
        for (x, y), (u, v) in zip(alone, loaded, strict=True):
            assert (x == u).all() and (y == v).all()
    for rank in range(3):
        part = list(Pictures(GEN, GEN.categories(5), 16, 7, 9, batches=2, rank=rank, world=3))
        assert all((part[i][0] == alone[3*i + rank][0]).all() for i in range(2))
    other = Pictures(GEN, GEN.categories(5), 16, batch=7, seed=10).make(0)
    assert not (other[0] == alone[0][0]).all()


def test_bounded_instances_come_from_the_fixed_set():
    some = GEN.categories(2)
    x, y = fixed_set(GEN, some, 3, 16)
    seen = {a.numpy().tobytes() for a in x}
    images, labels = Pictures(GEN, some, 16, batch=40, instances=3).make(4)
    assert {a.numpy().tobytes() for a in images} <= seen and set(labels.tolist()) == {0, 1}
    assert y.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("change", [dict(categories=[]), dict(batch=0), dict(instances=0),
                                    dict(rank=2, world=2), dict(size=0)])
def test_endless_sets_that_make_no_sense(change):
    kw = dict(categories=GEN.categories(1), size=8) | change
    with pytest.raises(ValueError, match="argument"): Pictures(GEN, **kw)


def test_sheets_are_lossless(tmp_path):
    image = pytest.importorskip("PIL.Image")
    x = PerlinNoise().render_batch(PerlinNoise().categories(5), range(5), 20)
    for channels in (1, 3):
        sheet = contact_sheet(x.repeat(1, channels, 1, 1), 3, gap=1, zoom=2)
        (tmp_path/"a.png").write_bytes(sheet.png())
        back = np.asarray(image.open(tmp_path/"a.png"))
        assert (back == sheet.pixels).all() and back.shape[:2] == (81, 122)
        first = back[:40:2, :40:2] if channels == 1 else back[:40:2, :40:2, 0]
        assert (first == x[0, 0].numpy()).all()


def test_a_folder_that_datasets_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    export_dataset(GEN, 3, 2, 16, tmp_path/"out", seed=4)
    d = datasets.load_dataset(str(tmp_path/"out"), split="train", cache_dir=str(tmp_path/"cache"))
    assert d.features["label"].names == [f"RCDB-4-{i}" for i in range(3)] and len(d) == 6
    for row in d:
        want = GEN.render(GEN.categories(3, 4)[row["label"]], row["instance"], 16)[0]
        assert (torch.from_numpy(np.array(row["image"])) == want).all()
    card = (tmp_path/"out"/"README.md").read_text()
    assert card.startswith("---\n") and "Rings(vertices=" in card
    with pytest.raises(ValueError, match="it is not empty"):
        export_dataset(GEN, 1, 1, 16, tmp_path/"out")
