"""Networks at their true size, with random weights and random images, through every stage without special cases."""

import json

import numpy as np
import pytest

import mpdeploy
from mpdeploy.verify import overall

RECIPE = """
schema = 1
name = "{name}"
[source]
kind = "timm"
model = "{name}"
weights = "random"
[data]
kind = "npz"
path = "random.npz"
calibration = 16
certification = 8
[prune]
pattern = "2:4"
damping = [0.1]
[tune]
epochs = 0
[certify]
[export]
precision = ["fp32", "fp16"]
[build]
engines = [
    {{ runtime = "onnxruntime", batch = [1, 8, 8] }},
    {{ runtime = "tensorrt_rtx", target = "sm80", precision = "fp16" }},
    {{ runtime = "tensorrt_rtx", target = "sm86", precision = "fp16" }},
]
[validate]
deploy = "onnxruntime-cpu-fp32"
blocks = 4
calls = 1
[gates]
max_violations = 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pruned"), [("resnet50", 52), ("vit_base_patch16_224", 48), ("convnextv2_base", 75)])
def test_source_to_validate(tmp_path, name, pruned):
    rng = np.random.default_rng(0)
    shape = (224, 224, 3)
    np.savez(
        tmp_path / "random.npz",
        train_images=rng.integers(0, 256, (24, *shape), np.uint8),
        train_labels=rng.permutation(1000)[:24],
        val_images=rng.integers(0, 256, (8, *shape), np.uint8),
        val_labels=rng.permutation(1000)[:8],
        class_names=np.array([f"class {i}" for i in range(1000)]),
    )
    (tmp_path / "r.toml").write_text(RECIPE.format(name=name))
    run = mpdeploy.run(tmp_path / "r.toml", store=tmp_path / "store", out=tmp_path / "bundle")
    layers = json.loads((run.bundle / "layers.json").read_text())
    assert sum(bool(layer["pattern"]) for layer in layers) == pruned
    assert all(layer["error_after_refit"] <= layer["error_before_refit"] for layer in layers if layer["pattern"])
    for engine in ("tensorrt_rtx-sm80-fp16", "tensorrt_rtx-sm86-fp16"):
        manifest = json.loads((run.bundle / "engines" / engine / "engine.json").read_text())
        assert manifest["size"] > 10_000_000
    assert str(overall(mpdeploy.verify_bundle(run.bundle))) in ("holds", "unchecked")
