import pytest
import timm
import torch

from mpdeploy.pruning.layers import choose
from mpdeploy.pruning.macs import count


def on_meta(name, **args):
    with torch.device("meta"):
        return timm.create_model(name, **args).eval()


def test_vit_base_has_its_known_macs_and_its_known_share_left_after_2_4():
    model = on_meta("vit_base_patch16_224")
    macs = count(model, (3, 224, 224))
    t, d = 197, 768
    linears = 12 * t * (3 * d * d + d * d + 8 * d * d)
    attention = 12 * 2 * t * t * d
    assert macs.total == 196 * d * d + linears + attention + d * 1000
    assert macs.total == pytest.approx(17.56e9, rel=0.005)
    assert macs.other == attention
    layers = choose(model, "2:4", [], (3, 224, 224))
    assert 1 - macs.after(layers) / macs.total == pytest.approx(0.4763, abs=5e-5)
    quarter_less = choose(model, "12:16", [], (3, 224, 224))
    assert macs.total - macs.after(quarter_less) == linears // 4


def test_resnet50_has_its_known_macs():
    macs = count(on_meta("resnet50"), (3, 224, 224))
    assert macs.total == pytest.approx(4.09e9, rel=0.002)
    assert macs.other == 0
    assert macs.layers["conv1"] == 112 * 112 * 64 * 3 * 49


def test_grouped_convolutions_count_only_their_own_channels():
    macs = count(on_meta("mobilenetv2_100"), (3, 224, 224))
    assert macs.total == pytest.approx(0.30e9, rel=0.02)
    assert macs.layers["blocks.0.0.conv_dw"] == 112 * 112 * 32 * 9


def test_meta_and_real_modules_count_alike_whatever_attention_kernel_they_run():
    args = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
    real = count(timm.create_model("vit_tiny_patch16_224", **args).eval(), (3, 32, 32))
    assert real == count(on_meta("vit_tiny_patch16_224", **args), (3, 32, 32))
    assert real.total == sum(real.layers.values()) + real.other
    assert real.other == 2 * 2 * 17 * 17 * 192
