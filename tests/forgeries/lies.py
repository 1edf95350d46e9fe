"""Every lie there is. Importing a module registers its lies."""

from forgeries import files, networks, numbers, release
from forgeries.registry import LIES, Lie

__all__ = ["LIES", "Lie", "files", "networks", "numbers", "release"]
