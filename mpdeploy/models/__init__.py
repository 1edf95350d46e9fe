"""Networks: from a name and weights to an `nn.Module` with its preprocessing, and back from what a bundle stores.

The package itself is light: torch and timm are imported when `load`, `describe` or `rebuild` is first used.
"""

from typing import TYPE_CHECKING, Any

from mpdeploy.models.identity import identity

if TYPE_CHECKING:
    from mpdeploy.models.construct import check_name
    from mpdeploy.models.sources import Loaded, describe, load, rebuild

__all__ = ["Loaded", "check_name", "describe", "identity", "load", "rebuild"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mpdeploy.models import construct, sources

    return getattr(construct if name == "check_name" else sources, name)
