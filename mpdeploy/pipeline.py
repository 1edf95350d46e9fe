"""The loop over the stages, and the reason why each will or won't run."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from mpdeploy.artifact import Artifact
from mpdeploy.errors import MpdeployError, RecipeError, StageFailed
from mpdeploy.recipe import Recipe
from mpdeploy.stage import Given, Stage
from mpdeploy.stages import STAGES
from mpdeploy.store import Store, is_full_disk, key_of, space_errors_named

# What only reads results or talks to people can't change a result.
NOT_PART_OF_THE_KEY = {
    "__main__.py",
    "abstain.py",
    "api.py",
    "bundle.py",
    "bundle_reader.py",
    "cli.py",
    "doctor.py",
    "formats.py",
    "gates.py",
    "init.py",
    "page.py",
    "pairs.py",
    "planning.py",
    "plots.py",
    "report.py",
    "rule_files.py",
    "runnable.py",
    "show.py",
    "spectra.py",
    "spectra_page.py",
    "targets.py",
    "unseen.py",
    "verify.py",
}


class Watcher(Protocol):
    """Who wants to know how a run goes."""

    def stage(self, name: str, state: str, note: str) -> None:
        """A stage is `running`, `reused`, `done` or `waiting`."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Something inside the running stage moved on."""


class Silent:
    """A watcher that doesn't care."""

    def stage(self, name: str, state: str, note: str) -> None:
        """Ignore."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Step:
    """One line of a plan: `state` is "run" or "reuse", `reason` says why."""

    name: str
    summary: str
    state: str
    reason: str


@cache
def code_digest() -> str:
    """Return the hex SHA-256 of the code that shapes results: a new version of mpdeploy never reuses old bytes."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name not in NOT_PART_OF_THE_KEY:
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def asked_of(stage: Stage[Any], recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that shapes a stage's result.

    Args:
        stage: the stage.
        recipe: the recipe.
        inputs: digest of each artefact it takes.
    """
    params = stage.params(recipe)
    return {
        "stage": stage.name,
        "params": stage.asks(params),
        "inputs": dict(inputs),
        "environment": dict(stage.environment(params)),
        "code": code_digest(),
    }


def up_to(name: str) -> Sequence[Stage[Any]]:
    """Return the stages up to and including `name`.

    Raises:
        RecipeError: there is no such stage.
    """
    names = [stage.name for stage in STAGES]
    if name not in names:
        raise RecipeError(f"There is no stage {name}; the stages are {', '.join(names)}.")
    return STAGES[: names.index(name) + 1]


def plan(recipe: Recipe, store: Store, to: str = "validate") -> list[Step]:
    """Say for each stage whether it would run or be reused, and why, without doing any work."""
    steps: list[Step] = []
    digests: dict[str, str] = {}
    for stage in up_to(to):
        changed = [name for name in stage.takes if name not in digests]
        if changed:
            steps.append(Step(stage.name, stage.summary, "run", f"{' and '.join(changed)} will run"))
            continue
        asked = asked_of(stage, recipe, {name: digests[name] for name in stage.takes})
        found = store.lookup(key_of(asked))
        if found is not None:
            digests[stage.name] = found.digest
            steps.append(Step(stage.name, stage.summary, "reuse", f"made before ({found.digest[:12]})"))
        else:
            reason = why(asked, store.last_asked(recipe.name, stage.name))
            steps.append(Step(stage.name, stage.summary, "run", reason))
    return steps


def why(asked: Mapping[str, Any], last: Mapping[str, Any] | None) -> str:
    """Say what differs between what is asked now and what the same recipe asked last."""
    if last is None:
        return "never made"
    now, before = flatten(asked), flatten(last)
    names = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
    parts = []
    for name in names:
        short = name.removeprefix("params.")
        if name == "code":
            parts.append("mpdeploy itself changed")
        elif name.startswith("inputs."):
            parts.append(f"{name.removeprefix('inputs.')} changed")
        else:
            parts.append(f"{short} {shorten(before.get(name))} -> {shorten(now.get(name))}")
    return "; ".join(parts) or "its result is gone from the store"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as {dotted name: value}."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def shorten(value: Any) -> str:
    """Spell a value for a reason: a long digest by its first twelve digits."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def compile_recipe(
    recipe: Recipe, store: Store, to: str = "validate", watcher: Watcher | None = None
) -> dict[str, Artifact]:
    """Run what has to run and reuse the rest.

    Args:
        recipe: the recipe.
        store: where artefacts are kept; several processes may share it.
        to: the last stage to run.
        watcher: who wants to know how it goes.

    Returns:
        The artefact of each stage.

    Raises:
        MpdeployError: a stage failed; the artefacts of the stages before it are kept.
    """
    watcher = watcher or Silent()
    made: dict[str, Artifact] = {}
    keys: dict[str, str] = {}
    with space_errors_named(store.root):
        store.prepare()
        for stage in up_to(to):
            asked = asked_of(stage, recipe, {name: made[name].digest for name in stage.takes})
            key = keys[stage.name] = key_of(asked)
            with store.lock(key, waiting(watcher, stage.name)):
                made[stage.name] = _reuse_or_make(stage, recipe, store, key, asked, made, watcher)
        store.note_last(recipe.name, keys)
    return made


def waiting(watcher: Watcher, name: str) -> Callable[[], None]:
    """Return a callback that says that another run is making the same thing."""
    return lambda: watcher.stage(name, "waiting", "another run is making the same artefact")


def _reuse_or_make(
    stage: Stage[Any],
    recipe: Recipe,
    store: Store,
    key: str,
    asked: Mapping[str, Any],
    made: Mapping[str, Artifact],
    watcher: Watcher,
) -> Artifact:
    found = store.find(key)
    if found is not None:
        watcher.stage(stage.name, "reused", found.digest[:12])
        return found
    watcher.stage(stage.name, "running", why(asked, store.last_asked(recipe.name, stage.name)))
    given = Given({name: made[name] for name in stage.takes}, store.workspace(key), watcher.progress)
    with store.draft(key) as folder:
        facts = _guarded(stage, lambda: stage.run(stage.params(recipe), given, folder))
        artifact = store.freeze(folder, {"stage": stage.name, "key": key, "asked": asked, "facts": dict(facts)})
    try:
        # The promise is checked before the key is remembered: a broken one must never be reused.
        _guarded(stage, lambda: stage.ensures(artifact))
    except MpdeployError:
        store.discard(artifact)
        raise
    store.remember(key, asked, artifact)
    watcher.stage(stage.name, "done", artifact.digest[:12])
    return artifact


def _guarded(stage: Stage[Any], work: Callable[[], Any]) -> Any:
    """Let our own errors and the disk's pass; name the stage in front of any other."""
    try:
        return work()
    except (MpdeployError, OSError):
        raise
    except MemoryError as error:
        raise StageFailed(f"The stage {stage.name} ran out of memory.", hint="use a smaller batch.") from error
    except Exception as error:
        if is_full_disk(error):
            raise
        raise StageFailed(
            f"The stage {stage.name} failed: {type(error).__name__}: {error}.",
            hint="run again with --debug to see where; if the recipe is right, this is a bug in mpdeploy.",
        ) from error
