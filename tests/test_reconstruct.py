"""Reconstruction lowers held-out block errors and leaves masks and the dense network alone."""

import copy

import pytest
import timm
import torch

from mpdeploy.errors import StageFailed
from mpdeploy.pruning.layers import choose
from mpdeploy.pruning.patterns import Pattern, as_rows, from_rows, project
from mpdeploy.pruning.reconstruct import reconstruct


def network():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, patch_size=8, num_classes=5
    ).eval()


def run(images):
    model = network()
    dense = copy.deepcopy(model.state_dict())
    masks = {}
    for layer in choose(model, "2:4", [], (3, 32, 32)):
        if layer.pattern:
            weight = model.get_submodule(layer.name).weight.data
            masks[layer.name] = from_rows(project(as_rows(weight.abs()), Pattern(2, 4)), weight.shape)
            weight.mul_(masks[layer.name])
    results = reconstruct(
        model, dense, images.split(8), masks, input_size=(3, 32, 32), steps=20, lr=1e-2, seed=0, progress=lambda *_: None
    )
    return model, masks, results


def test_errors_never_rise_masks_hold_and_reruns_agree():
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (model, masks, results), (again, _, _) = run(images), run(images)
    assert len(results) == 4
    assert all(r.error_after <= r.error_before for r in results)
    assert any(r.error_after < r.error_before for r in results)
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_nan_images_are_refused():
    with pytest.raises(StageFailed, match="NaN"):
        run(torch.full((8, 3, 32, 32), float("nan")))
