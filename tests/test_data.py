"""Data sets: what is read, what is refused by name, and the properties of a draw."""

import gzip
import struct
import zipfile
from collections import Counter
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpdeploy.data import Split, content_digest, draw, open_dataset
from mpdeploy.data.splits import stratified
from mpdeploy.errors import RecipeError, Unavailable


def spec(kind, path="", name=""):
    return SimpleNamespace(kind=kind, path=str(path), name=name)


def save(path, image, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(path)


def picture(value, height=6, width=5):
    return np.full((height, width, 3), value, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            for number, suffix in enumerate(("png", "bmp", "PNG")):
                save(root / part / name / f"{number}.{suffix}", picture(100 * label + number))
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / "cat" / ".hidden.png").write_text("not an image")
    return root


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {
        "train_images": rng.integers(0, 256, (12, 8, 8), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "val_images": rng.integers(0, 256, (6, 8, 8), dtype=np.uint8),
        "val_labels": np.arange(6) % 3,
    }
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}


def npz(tmp_path, **changes):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **arrays(**changes))
    return path


# ---- folders


def test_folder_gives_sorted_classes_relative_ids_and_pixels(folder):
    data = open_dataset(spec("folder", folder))
    assert data.classes == ("cat", "dog")
    expected = [f"val/{name}/{file}" for name in ("cat", "dog") for file in ("0.png", "1.bmp", "2.PNG")]
    assert list(data.val.ids) == expected
    assert data.val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.val.labels.dtype == np.int64
    assert len(data.train) == 6, "text and hidden files are no images"
    for index, image in zip((5, 0), data.val.load([5, 0]), strict=True):
        assert np.array_equal(image, picture(100 * data.val.labels[index] + index % 3))


def test_folder_images_are_decoded_on_demand_only(folder):
    (folder / "val" / "dog" / "1.bmp").write_bytes(b"BM but no picture")
    data = open_dataset(spec("folder", folder))
    assert data.val.load([0])[0].shape == (6, 5, 3)
    with pytest.raises(RecipeError, match=r"val/dog/1\.bmp can't be decoded"):
        data.val.load([0, 4])


@pytest.mark.parametrize("left", [0, 7, 200, 6000])
def test_truncated_image_is_named(folder, left):
    path = folder / "train" / "cat" / "0.png"
    save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert path.stat().st_size > 12_000
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(RecipeError, match=r"train/cat/0\.png can't be decoded"):
        open_dataset(spec("folder", folder)).train.load([0])


def test_gray_palette_transparent_and_cmyk_files(folder):
    root = folder / "train" / "cat"
    save(root / "0.png", picture(51)[..., 0])
    # 51 is a level of the web palette, so that only the conversion is tested, not the quantisation.
    save(root / "2.PNG", picture(51), "P")
    save(root / "3.png", np.full((6, 5, 4), 51, np.uint8))
    save(root / "4.jpg", picture(51), "CMYK")
    images = open_dataset(spec("folder", folder)).train.load([0, 2, 3, 4])
    assert [image.shape for image in images] == [(6, 5), (6, 5, 3), (6, 5, 3), (6, 5, 3)]
    assert all(image.dtype == np.uint8 and np.abs(image.astype(int) - 51).max() <= 2 for image in images)


def test_sixteen_bit_file_is_refused_by_name(folder):
    Image.fromarray(np.full((6, 5), 4000, np.uint16)).save(folder / "val" / "cat" / "0.png")
    with pytest.raises(RecipeError, match=r"val/cat/0\.png: pixel format .* 8 bits"):
        open_dataset(spec("folder", folder)).val.load([0])


def test_classes_of_the_two_parts_must_agree(folder):
    save(folder / "val" / "eel" / "0.png", picture(1))
    save(folder / "train" / "fox" / "0.png", picture(1))
    with pytest.raises(RecipeError, match="train only: fox; in val only: eel"):
        open_dataset(spec("folder", folder))


def test_missing_empty_and_imageless_folders(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere/train is not a folder"):
        open_dataset(spec("folder", tmp_path / "nowhere"))
    for part in ("train", "val"):
        (tmp_path / "bare" / part).mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"bare/train holds no class folder, so the data set is empty"):
        open_dataset(spec("folder", tmp_path / "bare"))
    for part in ("train", "val"):
        (folder / part / "ant").mkdir()
    with pytest.raises(RecipeError, match=r"train/ant: a class with no image"):
        open_dataset(spec("folder", folder))


def test_folder_identity_follows_names_and_sizes(folder, tmp_path):
    before = open_dataset(spec("folder", folder)).identity()
    assert before == open_dataset(spec("folder", folder)).identity()
    moved = folder.rename(tmp_path / "elsewhere")
    assert open_dataset(spec("folder", moved)).identity() == before, "the place of the folder does not matter"
    save(moved / "val" / "cat" / "3.png", picture(1))
    after = open_dataset(spec("folder", moved)).identity()
    assert after != before
    (moved / "val" / "cat" / "3.png").rename(moved / "val" / "cat" / "4.png")
    assert open_dataset(spec("folder", moved)).identity() not in (before, after)


def test_content_digest_sees_what_identity_does_not(folder):
    data = open_dataset(spec("folder", folder))
    identity, digest = data.identity(), content_digest(data.train, [1, 4])
    save(folder / "train" / "cat" / "1.bmp", picture(77))  # BMP: same size, other pixels
    data = open_dataset(spec("folder", folder))
    assert data.identity() == identity
    assert content_digest(data.train, [1, 4]) != digest
    assert content_digest(data.train, [4, 1]) != content_digest(data.train, [1, 4])


def test_content_digest_sees_the_shape():
    tall, wide = np.zeros((2, 8), np.uint8), np.zeros((8, 2), np.uint8)
    one, other = (Split("train", ["a"], np.zeros(1, np.int64), lambda _, image=image: image) for image in (tall, wide))
    assert content_digest(one, [0]) != content_digest(other, [0])


# ---- npz


def test_npz_round_trip(tmp_path):
    names, ids = np.array(["a", "b", "c"]), np.array([f"img{i}" for i in range(12)])
    made = arrays()
    data = open_dataset(spec("npz", npz(tmp_path, class_names=names, train_ids=ids)))
    assert (data.name, data.classes) == ("set", ("a", "b", "c"))
    assert data.train.ids[3] == "img3"
    assert data.val.ids[5] == "val/000005"
    assert all(np.array_equal(a, b) for a, b in zip(data.train.load(range(12)), made["train_images"], strict=True))
    assert np.array_equal(data.val.labels, made["val_labels"])


def test_npz_identity_is_the_content(tmp_path):
    path = npz(tmp_path)
    before = open_dataset(spec("npz", path)).identity()
    npz(tmp_path, val_labels=np.array([0, 1, 2, 0, 1, 1]))
    assert open_dataset(spec("npz", path)).identity() != before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_images": None}, "train_images missing"),
        ({"val_labels": None, "train_labels": None}, "train_labels, val_labels missing"),
        ({"test_images": np.zeros(3)}, "unknown array test_images"),
        ({"train_images": np.zeros((12, 8, 8), np.float32)}, "train_images is float32"),
        ({"val_images": np.zeros((6, 8, 8), np.uint16)}, "val_images is uint16"),
        ({"val_images": np.zeros((6, 64), np.uint8)}, r"val_images is uint8 \(6, 64\)"),
        ({"val_images": np.zeros((6, 3, 8, 8), np.uint8)}, r"val_images is uint8 \(6, 3, 8, 8\)"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)}, "train_images .*is empty"),
        ({"val_images": np.zeros((0, 8, 8), np.uint8), "val_labels": np.zeros(0, int)}, "val_images .*is empty"),
        ({"train_labels": np.arange(12) / 3}, "train_labels is float64"),
        ({"train_labels": np.arange(11) % 3}, r"train_labels is int64 \(11,\); expected integers of shape \(12,\)"),
        ({"val_labels": np.zeros((6, 1), int)}, r"val_labels is int64 \(6, 1\)"),
        ({"train_labels": np.arange(12) % 3 - 1}, "train_labels holds -1 at 0"),
        ({"val_labels": np.arange(6), "class_names": np.array(["a", "b", "c"])}, "val_labels holds 3 at 3; expected 0 to 2"),
        ({"val_labels": np.arange(6)}, "train_labels has no image of class 3, 4, 5"),
        ({"train_labels": np.arange(12) % 2 * 2}, "train_labels has no image of class 1"),
        ({"class_names": np.array([1, 2, 3])}, "class_names is int64"),
        ({"class_names": np.array([["a", "b", "c"]])}, r"class_names is <U1 \(1, 3\)"),
        ({"class_names": np.array(["a", "b", "a"])}, "class_names holds a name more than once"),
        ({"train_ids": np.array(["x"] * 12)}, "train_ids holds a name more than once"),
        ({"train_ids": np.array(["x"])}, "train_ids is <U1"),
        ({"class_names": np.array(["a", "b", None], dtype=object)}, "class_names .*(allow_pickle|Object arrays)"),
        ({"train_images": np.array([None] * 12, dtype=object)}, "train_images is object"),
    ],
)  # fmt: skip
def test_npz_mistakes_are_named(tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        open_dataset(spec("npz", npz(tmp_path, **changes)))


def test_npz_with_stated_classes_may_lack_images_of_some(tmp_path):
    names = np.array([f"class {k}" for k in range(1000)])
    data = open_dataset(spec("npz", npz(tmp_path, class_names=names)))
    assert len(data.classes) == 1000


def test_npz_missing_damaged_or_cut(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.npz does not exist"):
        open_dataset(spec("npz", tmp_path / "none.npz"))
    path = npz(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RecipeError, match=r"set\.npz can't be read as \.npz"):
        open_dataset(spec("npz", path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", b"no array")
    with pytest.raises(RecipeError, match=r"set\.npz can't be read as \.npz"):
        open_dataset(spec("npz", path))


def test_npz_with_one_flipped_pixel_byte_is_refused_when_read(tmp_path):
    path = tmp_path / "set.npz"
    made = arrays(train_images=np.full((12, 64, 64), 200, np.uint8))
    np.savez(path, **made)
    blob = bytearray(path.read_bytes())
    where = blob.find(b"\xc8" * 12 * 64 * 64)
    assert where > 0
    blob[where + 40_000] ^= 1  # far behind the header, which is all that opening reads
    path.write_bytes(blob)
    data = open_dataset(spec("npz", path))
    with pytest.raises(RecipeError, match="train_images can't be read: Bad CRC-32"):
        data.train.load([0])


def test_an_index_outside_the_split_is_an_error(tmp_path):
    data = open_dataset(spec("npz", npz(tmp_path)))
    for wrong in (12, -1):
        with pytest.raises(IndexError, match="train: index"):
            data.train.load([wrong])


# ---- packaged


@pytest.mark.parametrize(
    ("name", "pip"), [("elpv", "pip install elpv-dataset==1"), ("imagenet-samples", "pip install foolbox==3")]
)
def test_a_missing_package_says_how_to_get_it(monkeypatch, name, pip):
    def absent(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr("mpdeploy.data.packaged.distribution", absent)
    with pytest.raises(Unavailable, match=pip):
        open_dataset(spec("packaged", name=name))


def test_unknown_set_and_needless_path(tmp_path):
    with pytest.raises(RecipeError, match=r"no packaged set 'mnist'; there are elpv, imagenet-samples, fashion-mnist"):
        open_dataset(spec("packaged", name="mnist"))
    with pytest.raises(RecipeError, match=r"leave data\.path out"):
        open_dataset(spec("packaged", path=tmp_path, name="elpv"))


def idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for stem, count in (("train", 30), ("t10k", 20)):
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(
            idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        )
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return tmp_path


def test_fashion_mnist_from_its_idx_files(fashion):
    data = open_dataset(spec("packaged", path=fashion, name="fashion-mnist"))
    raw = gzip.decompress((fashion / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    expected = np.frombuffer(raw, np.uint8).reshape(30, 28, 28)
    assert np.array_equal(np.stack(data.train.load(range(30))), expected)
    assert (len(data.val), data.classes[9], data.train.labels[9]) == (20, "Ankle boot", 9)
    before = data.identity()
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(20, np.uint8)))
    assert open_dataset(spec("packaged", path=fashion, name="fashion-mnist")).identity() != before


@pytest.mark.parametrize(
    ("file", "blob", "said"),
    [
        ("train-labels-idx1-ubyte.gz", None, "train-labels-idx1-ubyte.gz is missing"),
        ("train-labels-idx1-ubyte.gz", b"plain", "can't be read as a gzipped idx"),
        ("train-labels-idx1-ubyte.gz", idx(np.zeros(30, np.uint8))[:-9], "can't be read as a gzipped idx"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(b"\0"), "can't be read as a gzipped idx"),
        ("train-labels-idx1-ubyte.gz", idx(np.full(30, 10, np.uint8)), "labels from 0 to 9"),
        ("train-labels-idx1-ubyte.gz", idx(np.zeros(0, np.uint8)), "labels from 0 to 9"),
        ("train-labels-idx1-ubyte.gz", idx(np.zeros(29, np.uint8)), "holds 30 images for 29 labels"),
        ("train-images-idx3-ubyte.gz", idx(np.zeros((30, 28), np.uint8)), "in 3 dimensions"),
        ("train-images-idx3-ubyte.gz", gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 30, 28, 28)), "all of them present"),
    ],
)  # fmt: skip
def test_fashion_mnist_damaged_files_are_named(fashion, file, blob, said):
    (fashion / file).unlink()
    if blob is not None:
        (fashion / file).write_bytes(blob)
    with pytest.raises(RecipeError, match=said):
        open_dataset(spec("packaged", path=fashion, name="fashion-mnist")).train.load([0])


def test_fashion_mnist_not_there(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="nothing is not a folder"):
        open_dataset(spec("packaged", path=tmp_path / "nothing", name="fashion-mnist"))
    monkeypatch.setattr("mpdeploy.data.packaged.FASHION_MNIST", tmp_path / "nothing")
    with pytest.raises(Unavailable, match="apt-get install dataset-fashion-mnist"):
        open_dataset(spec("packaged", name="fashion-mnist"))


# ---- draws


def unread(_):
    raise AssertionError("a draw must not decode images")


def split_of(labels):
    return Split("train", [str(i) for i in range(len(labels))], np.array(labels, dtype=np.int64), unread)


@st.composite
def draws(draw_):
    labels = draw_(st.lists(st.integers(0, 6), max_size=60))
    exclude = draw_(st.sets(st.integers(0, len(labels) - 1))) if labels else set()
    count = draw_(st.integers(0, len(labels) - len(exclude)))
    return labels, exclude, count, draw_(st.integers(0, 2**32))


@settings(max_examples=150, deadline=None)
@given(draws())
def test_draw_properties(case):
    labels, exclude, count, seed = case
    chosen = draw(split_of(labels), count, seed, exclude)
    assert chosen.dtype == np.int64
    assert chosen.shape == (count,)
    assert len(set(chosen.tolist())) == count, "no image twice"
    assert not set(chosen.tolist()) & exclude
    assert np.array_equal(chosen, draw(split_of(labels), count, seed, sorted(exclude))), "same seed, same draw"
    available = Counter(label for i, label in enumerate(labels) if i not in exclude)
    drawn = Counter(labels[i] for i in chosen)
    full = [label for label in available if drawn[label] == available[label]]
    rest = [drawn[label] for label in available if label not in full]
    if rest:  # classes with images left are level, and no exhausted class stands above them by more than one
        assert max(rest) - min(rest) <= 1
        assert max([drawn[label] for label in full], default=0) <= min(rest) + 1


def test_draw_is_shuffled_and_depends_on_the_seed():
    split = split_of(np.repeat(np.arange(10), 100))
    chosen = [draw(split, 200, seed) for seed in range(20)]
    assert len({tuple(c) for c in chosen}) == 20
    for sample in chosen:
        labels = split.labels[sample]
        assert np.bincount(labels, minlength=10).tolist() == [20] * 10
        # Sorted by class, neighbours differ 9 times of 199; shuffled, about 180 times.
        assert (np.diff(labels) != 0).sum() > 140


def test_every_image_is_drawn_about_equally_often():
    split = split_of([0] * 30 + [1] * 10)
    hits = np.zeros(40)
    for seed in range(1000):
        hits[draw(split, 11, seed)] += 1
    # 5.5 of 30 and 5.5 of 10, within five standard deviations of the binomial count.
    for part, share in ((hits[:30], 5.5 / 30), (hits[30:], 5.5 / 10)):
        assert np.abs(part / 1000 - share).max() < 5 * np.sqrt(share * (1 - share) / 1000)


def test_the_extra_image_is_not_always_the_first_class():
    split = split_of(np.repeat(np.arange(5), 10))
    extra = {int(np.argmax(np.bincount(split.labels[draw(split, 6, seed)]))) for seed in range(60)}
    assert extra == set(range(5))


def test_draw_is_pinned():
    """A change of the draw changes every artefact: it must be on purpose."""
    assert draw(split_of([0, 1] * 8), 6, seed=0).tolist() == [11, 3, 13, 2, 8, 6]


def test_small_classes_give_all_and_the_rest_is_filled():
    labels = [0] * 2 + [1] * 50 + [2] * 50
    drawn = Counter(labels[i] for i in draw(split_of(labels), 42, seed=3))
    assert drawn == {0: 2, 1: 20, 2: 20}


def test_too_many_says_both_numbers():
    with pytest.raises(
        RecipeError, match=r"9 images asked of the split 'train', 8 available \(10 in all, 2 set aside\)"
    ):
        draw(split_of([0] * 10), 9, 0, exclude=[1, 2])
    with pytest.raises(RecipeError, match="at least 0"):
        draw(split_of([0]), 1, seed=-1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=50), st.floats(0, 1), st.integers(0, 99))
def test_stratified_shares(strata, share, seed):
    chosen = stratified(strata, share, seed)
    for name in set(strata):
        members = [bool(c) for c, s in zip(chosen, strata, strict=True) if s == name]
        assert sum(members) == round(share * len(members))
