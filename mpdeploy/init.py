"""`mpdeploy init`: a commented recipe for a given model."""

import json
import re
from pathlib import Path

from mpdeploy.errors import RecipeError

TEMPLATE = """\
# Recipe for {model}. `mpdeploy plan` says what it would do, `mpdeploy schema` lists every key.
schema = 1
name = "{name}"

[source]
kind = "{kind}"
model = {model_toml}
# "pretrained" asks the model hub, "random" makes weights up, anything else is a .safetensors/.pth/.bin state dict.
weights = "pretrained"

[data]
# folder: an ImageNet-style tree PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg. Also: npz, packaged.
kind = "folder"
path = "imagenet"
calibration = 256       # training images that pruning and int8 calibration see
certification = 512     # training images held out from both, and from tuning
seed = 0

[prune]
pattern = "2:4"         # the only pattern that sparse tensor cores run; others are accuracy patterns
method = "admm"         # or "sparsegpt", "activation", "magnitude"
refit = true            # least squares of kept weights and biases to the dense network's outputs
permute = 12            # iterations of the search for channel orders, folded into the weights; 0 is off
skip = []               # layers to leave dense, for example ["blocks.0.*"]; stem and head stay dense anyway

[tune]
epochs = 1              # 0 to 3 epochs of distillation from the dense network, mask frozen
lr = 1e-4
batch = 64

[certify]
reserve = 0.01          # slack kept for export and engine, as a share of each sample's logit range

[export]
precision = ["fp32", "fp16"]

[build]
engines = [
    {{ runtime = "onnxruntime", target = "cpu", precision = "fp32" }},
    {{ runtime = "tensorrt_rtx", target = "sm80", precision = "fp16" }},   # A100, built without a GPU
    {{ runtime = "tensorrt_rtx", target = "sm86", precision = "fp16" }},   # A40
]

[validate]
deploy = "onnxruntime-cpu-fp32"   # the engine that the gates judge
samples = 0                       # 0: all validation images

[gates]
max_accuracy_drop = 1.0   # percentage points below the dense network
max_violations = 0        # labels that were certified as kept and are not
# min_agreement = 0.98
# min_certified = 0.90
# min_speedup = 1.05      # against the dense twin: same graph, precision, runtime, batch, sitting
"""


def write_recipe(model: str, out: Path | None, force: bool) -> Path:
    """Write the recipe.

    Args:
        model: a timm model, "torchvision:NAME", or "package.module:function".
        out: the file; default MODEL.toml in the current folder.
        force: overwrite a file that is there.

    Raises:
        RecipeError: no such model, or the file is there already.
    """
    kind, name = kind_and_name(model)
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60]
    target = out or Path(f"{short}.toml")
    if target.exists() and not force:
        raise RecipeError(f"{target} exists; it is left as it is.", hint="pass --out FILE or --force.")
    text = TEMPLATE.format(model=name, name=short, kind=kind, model_toml=json.dumps(name))
    target.write_text(text, encoding="utf-8")
    return target


def kind_and_name(model: str) -> tuple[str, str]:
    """Tell where a model comes from, and refuse a name that its library doesn't know."""
    if model.startswith("torchvision:"):
        return "torchvision", _known(model.removeprefix("torchvision:"), "torchvision")
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model):
        return "python", model
    return "timm", _known(model, "timm")


def _known(name: str, kind: str) -> str:
    """Return the name if the library knows it."""
    from mpdeploy.models import check_name

    check_name(kind, name)
    return name
