"""The stages, in order. Each is thin: it reads artefacts, calls the library parts, and writes files."""

from typing import Any

from mpdeploy.stage import Stage
from mpdeploy.stages import build, certify, export, prune, source, tune, validate

STAGES: tuple[Stage[Any], ...] = (
    source.STAGE,
    prune.STAGE,
    tune.STAGE,
    certify.STAGE,
    export.STAGE,
    build.STAGE,
    validate.STAGE,
)
