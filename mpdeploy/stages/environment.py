"""What of this machine shapes a result: package versions, read without importing the packages."""

from importlib import metadata

from mpdeploy.errors import Unavailable


def versions(*names: str) -> dict[str, str]:
    """Return the installed version of each package, or "not installed"."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def needs(stage: str, *names: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        Unavailable: naming all that are missing.
    """
    missing = [name for name, version in versions(*names).items() if version == "not installed"]
    if missing:
        raise Unavailable(
            f"The stage {stage} needs {', '.join(missing)}, which this environment lacks.",
            hint="pip install 'mpdeploy[cpu]' (or [gpu]) brings all that compiling a network needs.",
        )
