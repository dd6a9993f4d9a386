"Data: the three places, decoding, fingerprints and every way to be missing"

import io
import os
import subprocess
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from yokolab.lab import data, sources
from yokolab.lab.data import DataNotFound, csr, datasets, dense, fingerprint, load


def png(a):
    out = io.BytesIO()
    Image.fromarray(a).save(out, "png")
    return out.getvalue()


def images(arrays):
    return pa.array([dict(bytes=png(a), path=None) for a in arrays],
                    pa.struct(dict(bytes=pa.binary(), path=pa.string())))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("YOKOLAB_DATA", str(tmp_path/"data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    (tmp_path/"data").mkdir()
    return tmp_path/"data"


def write(root, name, split, **columns):
    (root/name).mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), root/name/f"{split}.parquet")


# bundled

@pytest.mark.parametrize("name, n, d", [("digits", 1797, 64), ("breast_cancer", 569, 30),
                                        ("iris", 150, 4), ("wine", 178, 13), ("diabetes", 442, 10)])
def test_tabular_sets_split_without_loss(name, n, d):
    whole, parts = load(name, "all"), [load(name, s) for s in ("train", "test")]
    assert whole["x"].shape == (n, d) and whole["x"].dtype == np.float64
    joined = np.concatenate([p["x"] for p in parts])
    assert len(joined) == n and len(parts[1]["x"]) == n//5
    assert np.array_equal(np.sort(joined, axis=0), np.sort(whole["x"], axis=0))
    y = "target" if name == "diabetes" else "label"
    expected = whole[y]*2 - 1 if name == "breast_cancer" else whole[y]
    assert np.array_equal(dense(name, "all")[1], expected)


def test_every_class_is_in_both_splits():
    for name in ("digits", "breast_cancer", "iris", "wine"):
        assert set(load(name, "test")["label"]) == set(load(name, "train")["label"])


def test_pictures_are_photographs():
    d = load("pictures")
    assert len(d["name"]) >= 10
    assert all(a.dtype == np.uint8 and min(a.shape[:2]) > 200 for a in d["image"])
    raw = load("pictures", decode=False, columns="image")["image"]
    assert np.array_equal(data.pixels(raw)[0], d["image"][0])


def test_python_source_is_code():
    import ast
    d = load("python_source", "validation")
    assert len(d["text"]) > 30 and not any("test" in p.split("/") for p in d["path"])
    for text in d["text"][:20]: ast.parse(text)


def test_bundled_as_table():
    t = load("digits", "test", columns=["x", "label"], as_table=True)
    assert t.column_names == ["x", "label"] and len(t["x"][0]) == 64


# parquet

def test_images_of_one_size_are_stacked_others_are_not(root):
    same = [np.full((4, 5, 3), i, np.uint8) for i in range(3)]
    other = [np.zeros((4, 5), np.uint8), np.ones((3, 2), np.uint8)]
    write(root, "same", "train", image=images(same))
    write(root, "other", "train", image=images(other))
    assert np.array_equal(load("same")["image"], np.stack(same))
    assert [a.shape for a in load("other")["image"]] == [(4, 5), (3, 2)]
    assert load("same", decode=False)["image"][0] == png(same[0])


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.integers(-2**62, 2**62), st.text(),
                          st.lists(st.floats(allow_nan=False), max_size=3)),
                min_size=1, max_size=8))
def test_columns_come_back(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("d")
    write(root, "set", "train", i=[r[0] for r in rows], s=[r[1] for r in rows],
          f=pa.array([r[2] for r in rows], pa.list_(pa.float64())))
    with pytest.MonkeyPatch.context() as m:
        m.setenv("YOKOLAB_DATA", str(root))
        d = load("set")
    assert d["i"].tolist() == [r[0] for r in rows] and d["s"].tolist() == [r[1] for r in rows]
    assert [list(v) for v in d["f"]] == [r[2] for r in rows]
    assert all(a.flags.writeable for a in d.values())


def test_only_the_columns_asked_for_are_read(root):
    write(root, "set", "train", a=[1], b=[2])
    assert set(load("set", columns=["b"])) == {"b"}
    assert load("set", columns="a", as_table=True).column_names == ["a"]


# sparse

def test_csr_is_what_was_written(root):
    rng = np.random.default_rng(0)
    x = rng.random((20, 9))*(rng.random((20, 9)) < 0.3)
    sign = np.where(x[:, 0] > 0, 1, -1)
    for name, label in (("sp", sign), ("zero_one", (sign + 1)//2)):
        write(root, name, "train", indices=[np.flatnonzero(r).tolist() for r in x],
              values=[r[r != 0].tolist() for r in x], label=pa.array(label, pa.int8()))
        got, y = csr(name, n_features=9)
        assert np.array_equal(got.toarray(), x) and np.array_equal(y, sign)
    assert got.dtype == np.float64 and dense("sp", n_features=11)[0].shape == (20, 11)


def test_a_sparse_set_too_wide_or_not_sparse(root):
    write(root, "sp", "train", indices=[[7]], values=[[1.0]], label=[1])
    write(root, "text", "train", text=["a"])
    with pytest.raises(ValueError, match=r"n_features=5.*at least 8"): csr("sp", n_features=5)
    with pytest.raises(ValueError, match="indices"): csr("text")


# fingerprints

def test_fingerprint_follows_the_contents_not_the_time(root):
    write(root, "set", "train", a=[1, 2])
    path, first = root/"set"/"train.parquet", fingerprint("set")
    os.utime(path, (1, 1))
    assert fingerprint("set") == first
    write(root, "set", "train", a=[1, 3])
    assert fingerprint("set") != first
    write(root, "set", "train", a=[1, 2])
    assert fingerprint("set") == first
    write(root, "set", "test", a=[1])
    assert fingerprint("set") != first


def test_fingerprint_is_remembered_and_survives_a_broken_cache(root, tmp_path, monkeypatch):
    write(root, "set", "train", a=[1])
    first, (note,) = fingerprint("set"), (tmp_path/"cache").rglob("*.json")
    with monkeypatch.context() as m:
        m.setattr(data.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert fingerprint("set") == first
    for junk in ("", "[]", '{"stamp": 3}', "\0"):
        note.write_text(junk)
        assert fingerprint("set") == first


def test_fingerprint_without_a_cache_folder(root, tmp_path, monkeypatch):
    write(root, "set", "train", a=[1])
    first = fingerprint("set")
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"file"))
    assert fingerprint("set") == first


def test_every_bundled_set_has_one():
    for name in sources.BUNDLED: assert fingerprint(name).startswith(f"{name}:")


# missing

@pytest.mark.parametrize("call, words", [
    (lambda: load("cifra10"), ["cifra10", "Did you mean 'cifar10'"]),
    (lambda: load("nothing"), ["$YOKOLAB_DATA/nothing/train.parquet", "sources.HUB"]),
    (lambda: load("../set"), ["'../set'"]),
    (lambda: load("set", "test"), ["only the splits train", "set/test.parquet"]),
    (lambda: fingerprint("nothing"), ["nothing"]),
])
def test_a_missing_set_says_both_ways(root, call, words):
    write(root, "set", "train", a=[1])
    with pytest.raises(DataNotFound) as e: call()
    assert all(w in str(e.value) for w in words), e.value


@pytest.mark.parametrize("call, words", [
    (lambda: load("digits", "valid"), ["split='valid'", "train, test, all"]),
    (lambda: load("iris", columns=["lable"]), ["lable", "did you mean 'label'"]),
    (lambda: load("set", columns=["b"]), ["no column 'b'", "it has a"]),
    (lambda: load("broken"), ["broken/train.parquet", "replace it"]),
])
def test_what_is_wrong_is_named(root, call, words):
    write(root, "set", "train", a=[1])
    write(root, "broken", "train", a=[1])
    (root/"broken"/"train.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(ValueError) as e: call()
    assert all(w in str(e.value) for w in words), e.value


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(DataNotFound, match=r'sklearn.*pip install "yokolab\[data\]"'):
        load("digits")


# the hub, without a network: what is asked for, and what is made of the answer

@pytest.fixture
def hub(root, monkeypatch):
    asked = []

    class Answer:
        def with_format(self, kind):
            assert kind == "arrow"
            return self

        def __getitem__(self, _):
            return pa.table(dict(img=images([np.zeros((2, 2, 3), np.uint8)]*3), label=[0, 1, 2]))

    def load_dataset(name, revision, split):
        asked.append((name, revision, split))
        if split == "offline": raise ConnectionError("no network")
        return Answer()

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(data, "find_spec", lambda name: object())
    return asked


def test_the_hub_is_asked_at_the_pinned_revision(hub):
    d = load("cifar10", "test")
    assert hub == [("uoft-cs/cifar10", sources.HUB["cifar10"][1], "test")]
    assert d["img"].shape == (3, 2, 2, 3) and d["label"].tolist() == [0, 1, 2]
    assert set(load("cifar10", "test", columns=["label"])) == {"label"}


def test_an_unreachable_hub_is_a_missing_set(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = r"no network.*cifar10/offline\.parquet.*unset HF_HUB_OFFLINE"
    with pytest.raises(DataNotFound, match=words): load("cifar10", "offline")


def test_your_own_copy_comes_before_the_hub(hub, root):
    write(root, "cifar10", "train", img=images([np.ones((2, 2, 3), np.uint8)]), label=[5])
    assert load("cifar10")["label"].tolist() == [5] and hub == []
    assert fingerprint("cifar10").startswith("cifar10:sha256-")


def test_revisions_are_commits():
    assert all(len(r) == 40 and set(r) <= set("0123456789abcdef") for _, r in sources.HUB.values())


# the list

def test_the_list_says_what_is_found(root):
    write(root, "set", "train", a=[1, 2])
    (root/"bad").mkdir(); (root/"bad"/"x.parquet").write_bytes(b"no")
    (root/"notes.txt").write_text("")
    have = {d.name: d for d in datasets()}
    assert have["set"].splits == {"train": 2} and have["set"].source == "parquet"
    assert have["bad"].splits == {"x": None} and "notes.txt" not in have
    assert have["digits"].source == "bundled" and not have["cifar10"].found


def test_a_folder_that_is_gone(monkeypatch, tmp_path):
    monkeypatch.setenv("YOKOLAB_DATA", str(tmp_path/"gone"))
    assert {d.name for d in datasets()} == {*sources.BUNDLED, *sources.HUB}
    with pytest.raises(DataNotFound, match="gone"): load("set")


def test_importing_data_is_light():
    code = ("import sys, yokolab.lab.data; heavy = {'torch', 'pandas', 'pyarrow', 'sklearn', "
            "'PIL', 'datasets', 'scipy'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.data
@pytest.mark.parametrize("name, split, rows", [
    ("cifar10", "test", 10_000), ("camvid", "val", 101), ("a9a", "train", 32_560)])
def test_real_sets(name, split, rows):
    if split not in sources.files(name): pytest.skip(f"{name} is not in $YOKOLAB_DATA")
    d = load(name, split)
    assert all(len(v) == rows for v in d.values())
    if name == "a9a":
        x, y = csr(name, split)
        assert x.shape == (rows, 123) and set(y) == {-1, 1} and x.nnz == sum(map(len, d["indices"]))
    if name == "cifar10":
        assert d["img"].shape == (rows, 32, 32, 3) and (np.bincount(d["label"]) == 1000).all()
    if name == "camvid":
        assert d["label"].max() == 11 and d["image"].shape[1:] == (180, 240, 3)
