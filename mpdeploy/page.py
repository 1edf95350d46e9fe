"""What every HTML page of mpdeploy is rendered with: its escaping, and the filters that write numbers."""

from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined

from mpdeploy.formats import FORMATS, NOT_MEASURED, interval


def environment() -> Environment:
    """Return jinja2's environment: everything is escaped, and a value that is missing prints as not measured."""
    made = Environment(
        loader=PackageLoader("mpdeploy", ""),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: NOT_MEASURED if value is None or isinstance(value, Undefined) else value,
    )
    made.filters.update(FORMATS, interval=lambda row, unit: interval(row.get("low"), row.get("high"), unit))
    return made
