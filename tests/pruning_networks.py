"""Tiny networks and images for the tests of pruning."""

import timm
import torch

from mpdeploy.pruning.capture import capture

GRAPHS = {}


def quiet(done, total):
    pass


def captured(model, size):
    """Its graph for square images; networks that print alike share one, as a graph holds names and no weights."""
    heads = tuple(getattr(child, "num_heads", None) for child in model.modules())  # attention does not print them
    key = (repr(model), heads, size)
    if key not in GRAPHS:
        GRAPHS[key] = capture(model, (3, size, size))
    return GRAPHS[key]


def correlated_images(count, size=32, seed=0):
    """Smooth random images: neighbouring pixels, hence features, are correlated as in photographs."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(-1).cumsum(-2) / size


def small_vit(**options):
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**tiny, **options}).eval()


def small_resnet(**options):
    torch.manual_seed(0)
    return timm.create_model("resnet10t", channels=(8, 16, 16, 16), stem_width=8, num_classes=5, **options).eval()


def small_convnext(**options):
    torch.manual_seed(0)
    tiny = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "num_classes": 5}
    return timm.create_model("convnext_atto", **tiny, **options).eval()


def small_swin():
    torch.manual_seed(0)
    tiny = {"img_size": 32, "window_size": 4, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 16}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **tiny).eval()


NETWORKS = {"vit": small_vit, "resnet": small_resnet, "convnext": small_convnext, "swin": small_swin}
