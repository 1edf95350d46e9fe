"""mpdeploy: prune, certify, export, build and audit vision networks.

The public names are loaded when they are first used, so that importing mpdeploy stays quick and never imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mpdeploy.api import Run, certify_pair, layers, plan, run, spectrum, verify_bundle
    from mpdeploy.errors import CorruptArtifact, MpdeployError, RecipeError, StageFailed, Unavailable
    from mpdeploy.recipe import Recipe, RecipeFile, load_recipe

_HOME = {
    "CorruptArtifact": "mpdeploy.errors",
    "MpdeployError": "mpdeploy.errors",
    "Recipe": "mpdeploy.recipe",
    "RecipeError": "mpdeploy.errors",
    "RecipeFile": "mpdeploy.recipe",
    "Run": "mpdeploy.api",
    "StageFailed": "mpdeploy.errors",
    "Unavailable": "mpdeploy.errors",
    "certify_pair": "mpdeploy.api",
    "layers": "mpdeploy.api",
    "load_recipe": "mpdeploy.recipe",
    "plan": "mpdeploy.api",
    "run": "mpdeploy.api",
    "spectrum": "mpdeploy.api",
    "verify_bundle": "mpdeploy.api",
}

__all__ = [
    "CorruptArtifact",
    "MpdeployError",
    "Recipe",
    "RecipeError",
    "RecipeFile",
    "Run",
    "StageFailed",
    "Unavailable",
    "__version__",
    "certify_pair",
    "layers",
    "load_recipe",
    "plan",
    "run",
    "spectrum",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mpdeploy' has no attribute {name!r}")
