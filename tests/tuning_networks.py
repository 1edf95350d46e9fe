"""Tiny networks and samples that the tests of tuning share; under torchrun also what each process runs."""

import copy
import json
import os
import signal
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import distributed, nn

from mpdeploy.pruning.patterns import Pattern, as_rows, from_rows, project
from mpdeploy.tuning import distil

PATTERN = Pattern(2, 4)
SAMPLES = 40
DEFAULTS = {"epochs": 2, "lr": 3e-3, "batch": 8, "seed": 3}


def networks(name="vit_tiny_patch16_224", **changes):
    """A student pruned to 2:4, its dense teacher, and the masks."""
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2, "proj_drop_rate": 0.1}
    if name == "resnet10t":
        args = {"channels": (8, 8, 8, 8), "stem_width": 8}
    teacher = timm.create_model(name, num_classes=5, **{**args, **changes}).eval()
    student, masks = copy.deepcopy(teacher), {}
    for layer, module in student.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[1] % 4 == 0:
            weight = module.weight.detach()
            masks[layer] = from_rows(project(as_rows(weight).abs(), PATTERN), weight.shape)
            weight.mul_(masks[layer])
    return student, teacher, masks


def chain():
    """A ViT of three blocks in which every weight matters and nothing is random: processes can be compared.

    Without dropout, whose draws depend on how samples are shared, and without the bias of keys, which softmax cancels:
    its gradient is rounding noise, which AdamW would blow up to steps of full length.
    """
    return networks(depth=3, proj_drop_rate=0.0, qkv_bias=False)


def samples(size=16):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(SAMPLES, 3, size, size, generator=generator)
    return pixels, torch.randint(0, 5, (SAMPLES,), generator=generator).numpy()


PIXELS, LABELS = samples()


def tune(
    student,
    teacher,
    masks,
    *,
    images=lambda some: PIXELS[some],
    labels=LABELS,
    progress=lambda done, total: None,
    **more,
):
    settings = {**DEFAULTS, "patterns": dict.fromkeys(masks, PATTERN), **more}
    return distil(student, teacher, masks, images, labels, progress=progress, **settings)


def same(left, right):
    return all(torch.equal(left.state_dict()[name], value) for name, value in right.state_dict().items())


class Killed(Exception):
    pass


def killer(after):
    """A progress function that stops the run after so many steps."""

    def progress(done, total):
        if done == after:
            raise Killed

    return progress


def main(out, cases):
    """Tune one student per case in a group of processes and write its weights, one file per process.

    A case is what `tune` takes, and `kill`: the step after which process 1 kills itself.
    """
    distributed.init_process_group("gloo")
    for name, case in cases.items():
        last = case.pop("kill", None)

        def progress(done, _total, last=last):
            if done == last and distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        student, teacher, masks = chain()
        tune(student, teacher, masks, progress=progress, **{**case, "checkpoint": out / f"{name}.checkpoint"})
        save_file(student.state_dict(), out / f"{name}.{distributed.get_rank()}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
