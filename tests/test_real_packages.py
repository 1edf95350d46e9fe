"""Real weights and real images from the packages of the extra `real`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpdeploy.data import draw, open_dataset
from mpdeploy.errors import RecipeError
from mpdeploy.models import describe, load, rebuild
from mpdeploy.recipe import PreprocessingTable

pytestmark = pytest.mark.real


def data(name):
    return open_dataset(SimpleNamespace(kind="packaged", path="", name=name))


def source(model, **changes):
    fields = {"weights": "pretrained", "args": {}, "strict": True, "seed": 0, "preprocessing": None}
    return SimpleNamespace(kind="python", model=model, **{**fields, **changes})


def lite0(**changes):
    return source("mpdeploy.models.efficientnet_lite:lite0", **changes)


@pytest.fixture
def vit(quickstart):
    head = str(quickstart.parent / "elpv_head.safetensors")
    return source("mpdeploy.models.imgfocus:vit_small_dinov2", args={"img_size": 98, "head": head})


def run(loaded, split, indices):
    with torch.inference_mode():
        return loaded.module(torch.from_numpy(loaded.preprocessing.apply(split.load(indices))))


def hits(loaded, split):
    return int((run(loaded, split, range(len(split))).argmax(1).numpy() == split.labels).sum())


def test_lite0_knows_the_photos_and_a_wrong_preprocessing_shows():
    photos = data("imagenet-samples")
    assert (len(photos.train), len(photos.val), len(photos.classes)) == (10, 10, 1000)
    assert not set(photos.train.ids) & set(photos.val.ids)
    loaded = load(lite0())
    assert loaded.preprocessing.mean == loaded.preprocessing.std == (0.5, 0.5, 0.5)
    assert (loaded.preprocessing.interpolation, loaded.preprocessing.crop_pct) == ("bicubic", 0.875)
    right = hits(loaded, photos.train) + hits(loaded, photos.val)
    assert right >= 17
    table = PreprocessingTable(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="nearest", crop_pct=0.3
    )
    wrong = load(lite0(preprocessing=table))
    assert hits(wrong, photos.train) + hits(wrong, photos.val) < right


def test_lite0_round_trip_needs_no_package(tmp_path, monkeypatch):
    loaded = load(lite0())
    save_file(loaded.module.state_dict(), tmp_path / "dense.safetensors")

    def opened(*_):
        raise AssertionError("rebuild must not look for the package")

    monkeypatch.setattr("mpdeploy.models.efficientnet_lite.distribution", opened)
    again = rebuild(loaded.architecture, load_file(tmp_path / "dense.safetensors"))
    photos = data("imagenet-samples").val
    x = torch.from_numpy(loaded.preprocessing.apply(photos.load([0, 1])))
    with torch.inference_mode():
        assert torch.equal(again(x), loaded.module(x))


def test_elpv_split_is_stratified_and_disjoint():
    cells = data("elpv")
    assert (len(cells.train), len(cells.val)) == (1970, 654)
    assert not set(cells.train.ids) & set(cells.val.ids)
    # By probability: 1,508 images of 0, 295 of 1/3, 106 of 2/3, 715 of 1 (the set's own description).
    assert int(cells.train.labels.sum() + cells.val.labels.sum()) == 106 + 715
    assert abs(cells.train.labels.mean() - cells.val.labels.mean()) < 0.01
    (image,) = cells.train.load([0])
    assert (image.shape, image.dtype) == ((300, 300), np.uint8)
    assert cells.identity() == data("elpv").identity()


def test_trunk_equals_the_onnx_graph():
    """The whole trunk, at the size it was exported for, against ONNX Runtime."""
    import onnx
    import onnxruntime

    from mpdeploy.models.imgfocus import onnx_file, read_trunk, vit_small_dinov2

    model = onnx.load(str(onnx_file()))
    (last,) = (node.output[0] for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([last], {session.get_inputs()[0].name: x})
    ours = vit_small_dinov2(224, pretrained=False).eval()
    left = ours.load_state_dict(read_trunk(224), strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["head.weight", "head.bias"], [])
    with torch.inference_mode():
        found = ours.forward_features(torch.from_numpy(x)).numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < 1e-4


def test_vit_on_held_out_solar_cells(vit):
    """Two hundred held-out images, half of each class: chance is 50 %."""
    cells = data("elpv")
    loaded = load(vit)
    assert loaded.preprocessing.input_size == (3, 98, 98)
    assert loaded.architecture["args"] == {"img_size": 98, "head": "elpv_head.safetensors"}
    chosen = draw(cells.val, 200, seed=0)
    found = torch.cat([run(loaded, cells.val, chosen[i : i + 20]) for i in range(0, 200, 20)])
    share = float((found.argmax(1).numpy() == cells.val.labels[chosen]).mean())
    assert share > 0.77
    assert describe(vit).architecture == loaded.architecture
    again = rebuild(loaded.architecture, loaded.module.state_dict())
    x = torch.from_numpy(loaded.preprocessing.apply(cells.val.load([0, 1])))
    with torch.inference_mode():
        assert torch.equal(again(x), loaded.module(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"img_size": 100}, "100 is not a positive multiple of 14"),
        ({"img_size": 112}, "img_size: 112 asked, but .* was fitted for img_size 98"),
        ({"pool": "avg"}, "pool: avg asked, but .* was fitted for pool token"),
        ({"num_classes": 3}, r"expected weight \[3, 384\]"),
        ({"head": ""}, "no classifier of its own"),
        ({"head": "/nowhere/head.safetensors"}, "can't be read as safetensors"),
    ],
)
def test_vit_arguments_that_do_not_fit(vit, change, said):
    vit.args = {**vit.args, **change}
    with pytest.raises(RecipeError, match=said):
        load(vit)
