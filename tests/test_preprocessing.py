"""Preprocessing against timm's own evaluation transform."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mpdeploy.errors import CorruptArtifact, RecipeError
from mpdeploy.preprocessing import CROP_MODES, FILTERS, Preprocessing

RGB = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "color": "rgb"}
GRAY = {"mean": (0.2860,), "std": (0.3530,), "color": "gray"}
# Half of the smallest step between two pixel values after normalisation: an image off by one level anywhere fails.
STEP = {"rgb": 0.5 / 255 / 0.229, "gray": 0.5 / 255 / 0.3530}


def make(input_size=(3, 32, 32), **changes):
    fields = {
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        **(RGB if input_size[0] == 3 else GRAY),
    }
    return Preprocessing(**{**fields, "input_size": input_size, **changes})


def smooth(height, width, channels, seed=0):
    """An image with structure at several scales, so that a shift of a pixel or another filter shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    image = np.clip(image + rng.integers(-40, 41, image.shape), 0, 255).astype(np.uint8)
    return image if channels == 3 else image[..., 0]


def timm_transform(prep):
    from timm.data import create_transform

    return create_transform(
        input_size=prep.input_size,
        interpolation=prep.interpolation,
        mean=prep.mean,
        std=prep.std,
        crop_pct=prep.crop_pct,
        crop_mode=prep.crop_mode,
    )


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("target", [(3, 32, 32), (3, 24, 40), (1, 28, 28), (1, 33, 20)])
def test_equals_timm(target, interpolation, crop_mode):
    shapes = [(32, 32), (300, 300), (28, 28), (47, 131), (131, 47), (20, 33), (1, 9), (65, 64)]
    for crop_pct in (1.0, 0.95, 0.875):
        prep = make(target, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
        theirs_of = timm_transform(prep)
        for number, (height, width) in enumerate(shapes):
            image = smooth(height, width, channels=1 if number % 2 else 3, seed=number)
            ours = prep.apply([image])[0]
            theirs = theirs_of(Image.fromarray(image).convert("L" if prep.color == "gray" else "RGB")).numpy()
            assert ours.shape == theirs.shape == target
            worst = np.abs(ours - theirs).max()
            assert worst <= STEP[prep.color] / 100, (height, width, crop_pct, worst)


def test_the_comparison_with_timm_sees_one_level_in_one_pixel():
    prep = make((3, 32, 32))
    image = smooth(32, 32, 3)
    image[7, 9, 1] = 100
    changed = image.copy()
    changed[7, 9, 1] += 1
    assert np.abs(prep.apply([changed])[0] - timm_transform(prep)(Image.fromarray(image)).numpy()).max() > STEP["rgb"]


@pytest.mark.parametrize("interpolation", FILTERS)
def test_image_of_input_size_is_only_normalised(interpolation):
    image = smooth(32, 32, 3)
    prep = make(interpolation=interpolation)
    expected = (image.transpose(2, 0, 1) / 255 - np.array(prep.mean)[:, None, None]) / np.array(prep.std)[:, None, None]
    np.testing.assert_allclose(prep.apply([image])[0], expected, atol=1e-6)


def test_gray_images_for_an_rgb_network_are_repeated_and_rgb_images_for_a_gray_one_become_luma():
    gray = smooth(32, 32, 1)
    out = make(mean=(0.5,) * 3, std=(0.5,) * 3).apply([gray])[0]
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], out[2])
    red = np.zeros((28, 28, 3), dtype=np.uint8)
    red[..., 0] = 255
    luma = make((1, 28, 28), mean=(0.0,), std=(1.0,)).apply([red])
    np.testing.assert_allclose(luma, 0.299, atol=1 / 255)


def test_a_batch_is_its_images_one_by_one():
    images = [smooth(40, 30, 3, 1), smooth(64, 64, 1, 2), smooth(33, 90, 3, 3)]
    prep = make(crop_pct=0.9)
    batch = prep.apply(images)
    assert batch.dtype == np.float32
    assert np.array_equal(batch, np.concatenate([prep.apply([image]) for image in images]))
    assert prep.apply([]).shape == (0, 3, 32, 32)


def test_border_of_an_extreme_shape_keeps_at_least_one_pixel():
    assert np.isfinite(make(crop_mode="border").apply([smooth(1, 500, 3)])).all()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((8, 8), np.float32), "float32"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((0, 8), np.uint8), r"\(0, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros(8, np.uint8), r"\(8,\)"),
    ],
)
def test_other_arrays_are_refused_by_number(image, said):
    with pytest.raises(RecipeError, match=f"Image 1: expected uint8 .*{said}"):
        make().apply([np.zeros((8, 8), np.uint8), image])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_size": (3, 0, 32)}, "input_size"),
        ({"input_size": (3, 32)}, "input_size"),
        ({"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}, "color 'rgb' has 3 channels"),
        ({"input_size": (4, 32, 32), "mean": (0.5,) * 4, "std": (0.5,) * 4}, "color 'rgb' has 3 channels"),
        ({"mean": (0.5, 0.5)}, "mean: expected 3"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean: expected 3 finite"),
        ({"std": (0.5, 0.5, 0.0)}, "std: expected 3 positive"),
        ({"std": (0.5, 0.5, float("nan"))}, "std: expected 3 positive"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": float("nan")}, "crop_pct"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"interpolation": "cubic"}, "interpolation: expected one of nearest"),
        ({"crop_mode": "middle"}, "crop_mode"),
        ({"color": "bgr"}, "color"),
    ],
)
def test_values_out_of_range_are_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        make(**{"input_size": (3, 32, 32), "color": "rgb", "mean": RGB["mean"], "std": RGB["std"], **changes})


def test_json_round_trip_and_refusals():
    prep = make((1, 28, 28), crop_pct=224 / 256, crop_mode="border")
    data = json.loads(json.dumps(prep.to_json(), allow_nan=False))
    assert Preprocessing.from_json(data) == prep
    with pytest.raises(CorruptArtifact, match="mean, std missing"):
        Preprocessing.from_json({k: v for k, v in data.items() if k not in ("mean", "std")})
    with pytest.raises(CorruptArtifact, match="unknown gamma"):
        Preprocessing.from_json({**data, "gamma": 1})
    with pytest.raises(CorruptArtifact, match="crop_pct"):
        Preprocessing.from_json({**data, "crop_pct": 0})
    with pytest.raises(CorruptArtifact, match="can't be read"):
        Preprocessing.from_json({**data, "mean": 0.5})
    with pytest.raises(CorruptArtifact, match="JSON object, not list"):
        Preprocessing.from_json([])


def test_light_packages_do_not_import_torch():
    code = (
        "import sys, mpdeploy.preprocessing, mpdeploy.data, mpdeploy.models;"
        "print([m for m in ('torch', 'timm', 'torchvision', 'onnx', 'foolbox') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
