"""A recipe: one TOML file, one frozen table per stage, and the gates apart from the work.

Every section must be there, so that nothing is decided by a table that somebody forgot. Mistakes are reported all at
once, each with the nearest key that exists.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mpdeploy.errors import RecipeError

Scalar = str | int | float | bool
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "fp16", "int8"]


class Table(BaseModel):
    """A part of a recipe: frozen, strict, and without room for a key that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PreprocessingTable(Table):
    """What to override of the model's own preprocessing; a field left out keeps the model's value."""

    input_size: tuple[int, int, int] | None = Field(None, description="Channels, height, width.")
    mean: tuple[float, ...] | None = Field(None, description="Per channel, of pixels scaled to [0, 1].")
    std: tuple[float, ...] | None = Field(None, description="Per channel, of pixels scaled to [0, 1].")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    color: Literal["rgb", "gray"] | None = None


class Source(Table):
    """Which network, and with which weights."""

    kind: Literal["timm", "torchvision", "python"] = Field(description="Where the architecture comes from.")
    model: str = Field(description="timm or torchvision name, or package.module:function returning an nn.Module.")
    weights: str = Field(description='"pretrained", "random", or a .safetensors / .pth / .pt / .bin state dict.')
    args: dict[str, Scalar | list[Scalar]] = Field({}, description="Passed to the constructor; './x' is a path.")
    strict: bool = Field(True, description="Refuse a checkpoint whose keys differ from the model's.")
    seed: int = Field(0, description="Seed of random weights.")
    preprocessing: PreprocessingTable | None = None


class Data(Table):
    """Which images; calibration and certification samples come from the training split only."""

    kind: Literal["npz", "folder", "packaged"] = Field(description="An .npz file, an ImageNet-style folder, a package.")
    path: str = Field("", description="The .npz file or the folder with train/ and val/.")
    name: str = Field("", description='Packaged set: "elpv", "imagenet-samples" or "fashion-mnist".')
    calibration: Count = Field(256, description="Training images that pruning and int8 see; shuffled, class-balanced.")
    certification: Count = Field(512, description="Training images held out from calibration and tuning.")
    seed: int = Field(0, description="Seed of both draws.")

    @model_validator(mode="after")
    def _named(self) -> "Data":
        if self.kind == "packaged" and not self.name:
            raise ValueError('kind = "packaged" needs name')
        if self.kind != "packaged" and not self.path:
            raise ValueError(f'kind = "{self.kind}" needs path')
        return self


def _is_pattern(text: str) -> bool:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return match is not None and 0 < int(match[1]) < int(match[2])


class Allocate(Table):
    """A pattern per layer, chosen by measurement within a budget; dense is always a choice."""

    patterns: tuple[str, ...] = Field(("12:16", "2:4"), min_length=1, description="N:M patterns to choose from.")
    budget: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="Share of what the prunable layers need when dense that may be left."
    )
    unit: Literal["macs", "weights"] = Field("macs", description="What the budget counts.")
    ranking: Literal["error", "edge", "slack", "adjoint"] = Field(
        "error",
        description="Measured error, Marchenko-Pastur edge, share of the margins, or what the margins lose to first "
        "order by the adjoints of one backward pass; all four are compared.",
    )
    images: Count = Field(32, description="Held-out calibration images on which logits and margins are compared.")

    @field_validator("patterns")
    @classmethod
    def _patterns(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [value for value in values if not _is_pattern(value)]:
            raise ValueError(f"must be N:M with 0 < N < M, for example 2:4, not {wrong[0]}")
        if len(set(values)) < len(values):
            raise ValueError("names a pattern twice")
        return values


class Prune(Table):
    """Which weights become zero, and how the rest is refitted."""

    pattern: str = Field(
        description='N:M, at most N of M consecutive input channels kept: "2:4", "8:16", ...; '
        '"mixed" (see allocate), or "unstructured" (see sparsity).'
    )
    method: Literal["admm", "sparsegpt", "activation", "magnitude", "seb"] = Field(
        "admm",
        description="How masks are chosen: ADMM, SparseGPT, |w| times the rms of its input, or |w|; "
        'unstructured ones by |w| over the whole network ("magnitude"), or weighted by layer ("seb").',
    )
    allocate: Allocate | None = Field(None, description='For pattern = "mixed", and only for that.')
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description='Share of the prunable weights to drop; for pattern = "unstructured", and only for that.'
    )
    refit: bool = Field(True, description="Least squares of kept weights and biases to the dense network's outputs.")
    damping: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        (0.03, 0.1), min_length=1, description="Ridges to choose from per layer, times the Hessian's mean diagonal."
    )
    precision: Literal["float32", "float64"] = Field("float32", description="Of the linear algebra.")
    permute: Annotated[int, Field(ge=0)] = Field(
        12, description="Iterations of the search for the best channel order, folded into the weights; 0 is off."
    )
    zero_budget: bool = Field(
        False, description="First remove inputs that are proved to cost nothing: dead, constant, dependent ones."
    )
    reconstruct: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps per block of block-wise reconstruction after the refit, without labels; 0 is off."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of the searches and of reconstruction's mini-batches.")
    skip: tuple[str, ...] = Field((), description="Layers left dense, as name patterns with * and ?.")
    keep_stem_dense: bool = True
    keep_head_dense: bool = True
    batch: Count = Field(32, description="Images per forward pass.")
    device: Literal["cpu", "cuda"] = "cpu"

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        if value not in ("mixed", "unstructured") and not _is_pattern(value):
            raise ValueError("must be N:M with 0 < N < M, for example 2:4")
        return value

    @model_validator(mode="after")
    def _pattern_has_its_keys(self) -> "Prune":
        if (self.pattern == "mixed") != (self.allocate is not None):
            raise ValueError('pattern = "mixed" and the table prune.allocate need each other: give both or neither')
        if (self.pattern == "unstructured") != (self.sparsity is not None):
            raise ValueError('pattern = "unstructured" and prune.sparsity need each other: give both or neither')
        own = ("seb", "magnitude")
        if self.pattern == "unstructured" and self.method not in own:
            raise ValueError(f'unstructured masks are chosen by method = "seb" or "magnitude", not "{self.method}"')
        if self.pattern != "unstructured" and self.method == "seb":
            raise ValueError('method = "seb" chooses unstructured masks only; set pattern = "unstructured"')
        return self


class Tune(Table):
    """Distillation from the dense network; the pattern holds at every step."""

    epochs: Annotated[int, Field(ge=0, le=3)]
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    batch: Count = 64
    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    hard_weight: Share = Field(0.5, description="Weight of cross-entropy with the labels; the rest is distillation.")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    feature_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Weight of the blocks' squared error, relative to the dense features' mean square; 0 is off."
    )
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Decay of the averaged weights; 0 is off.")
    refresh: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps between searches for better masks, in the first epoch only; 0 keeps the masks."
    )
    # Off: in measurements so far a cycle gains nothing over tuning a good mask for as many steps.
    restore: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Share of the kept weights put at stake before tuning, inside the N:M groups; 0 is off."
    )
    restore_steps: Count = Field(50, description="Steps in which only what may come back is trained.")
    flip: bool = Field(False, description="Flip images left to right at random.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 mixed precision on a GPU that has it, else fp32."
    )
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _restored_is_tuned(self) -> "Tune":
        if self.restore and not self.epochs:
            raise ValueError("restore needs epochs of at least 1, because restored weights have yet to be tuned")
        if self.restore and self.refresh:
            raise ValueError("restore and refresh both change the masks: set one of them to 0")
        return self


class Certify(Table):
    """The margin ledger."""

    reserve: Share = Field(0.01, description="Slack set aside for export and engine: share of a sample's logit range.")
    keep: Annotated[int, Field(ge=2)] = Field(
        16, description="Classes kept of each sample; of the others the ledger keeps the largest logit."
    )
    reference: Count = Field(
        8, description="Samples run in float64 too, to measure what float32 costs the dense reference."
    )
    proofs: Annotated[int, Field(ge=0)] = Field(
        0, description="Samples on which proofs are tried (real arithmetic, data path, fp32 envelope); seconds each."
    )
    lambda2: Annotated[float, Field(ge=0.0)] = Field(
        1e-4, description="Weight of the squared Frobenius norm in the objective that the proofs speak about."
    )
    lambda1: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Weight of the sum of absolute values in it.")
    batch: Count = 64


class Export(Table):
    """Precision is decided here, in the graph."""

    precision: tuple[Literal["fp32", "fp16"], ...] = Field(("fp32",), min_length=1)
    opset: Annotated[int, Field(ge=18, le=23)] = 20


class Engine(Table):
    """One engine to build."""

    runtime: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    target: str = Field("cpu", description='"cpu" or "cuda" (onnxruntime), "sm80" for A100, "sm86" for A40, "current".')
    precision: Precision = "fp32"
    batch: tuple[Count, Count, Count] = Field((1, 8, 64), description="Smallest, usual and largest batch.")
    threads: Count = 1

    @property
    def id(self) -> str:
        """Name of the engine's folder and of its rows in every table."""
        return f"{self.runtime}-{self.target}-{self.precision}"


class Build(Table):
    """Which engines."""

    engines: tuple[Engine, ...]

    @field_validator("engines")
    @classmethod
    def _distinct(cls, engines: tuple[Engine, ...]) -> tuple[Engine, ...]:
        if not engines:
            raise ValueError("at least one engine is needed")
        ids = [engine.id for engine in engines]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"asks for {', '.join(twice)} more than once")
        return engines


class Validate(Table):
    """What is measured on the validation split, and which engine is the one to release."""

    deploy: str = Field(description="Id of the engine that the gates judge: runtime-target-precision.")
    samples: Annotated[int, Field(ge=0)] = Field(0, description="Validation images, class-balanced; 0 is all.")
    batch: Count = Field(1, description="Batch of the latency measurement.")
    blocks: Annotated[int, Field(ge=4)] = Field(20, description="Interleaved ABBA blocks.")
    calls: Count = Field(5, description="Calls per half block.")
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    noise: Annotated[int, Field(ge=0)] = Field(
        64, description="Images on which each engine's error is held against its precision's noise floor; 0 is none."
    )
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.01, description="Share of unseen images on which the engine may answer and yet not give the dense label."
    )
    cluster: str = Field(
        "", description="A regular expression whose first group, found in an id, names the image's cluster; '' is none."
    )

    @field_validator("cluster")
    @classmethod
    def _has_a_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        if value and not groups:
            raise ValueError("needs a group in round brackets: what it finds is the cluster")
        return value


class Gates(Table):
    """What counts as good enough. A gate left out is not asked; no gate at all is `unchecked`, never a pass."""

    max_accuracy_drop: float | None = Field(None, description="Dense minus engine top-1, percentage points.")
    min_agreement: Share | None = Field(None, description="Share of validation labels equal to the dense network's.")
    max_violations: Annotated[int, Field(ge=0)] | None = Field(None, description="Certified labels the engine lost.")
    min_certified: Share | None = Field(None, description="Share of certification samples certified.")
    max_noise: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Engine error over what its declared precision explains (rms); sound engines stay below 1.5."
    )
    min_speedup: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Against the dense twin; the lower end of the interval counts."
    )


class Recipe(Table):
    """A whole recipe."""

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    source: Source
    data: Data
    prune: Prune
    tune: Tune
    certify: Certify
    export: Export
    build: Build
    validate_: Validate = Field(alias="validate")
    gates: Gates

    @model_validator(mode="after")
    def _engines_agree(self) -> "Recipe":
        ids = [engine.id for engine in self.build.engines]
        if self.validate_.deploy not in ids:
            near = difflib.get_close_matches(self.validate_.deploy, ids, 1, 0.0)
            raise ValueError(
                f"validate.deploy: {self.validate_.deploy} is none of the engines built ({', '.join(ids)}); "
                f"did you mean {near[0]}?"
            )
        for engine in self.build.engines:
            base = "fp32" if engine.precision == "int8" else engine.precision
            if base not in self.export.precision:
                raise ValueError(f"build.engines: {engine.id} needs export.precision to hold {base}")
        return self

    @model_validator(mode="after")
    def _masks_can_change(self) -> "Recipe":
        if self.tune.refresh and self.prune.pattern == "unstructured":
            raise ValueError("tune.refresh: masks are searched by N:M groups, which unstructured pruning has none of")
        if self.tune.restore and self.prune.pattern == "unstructured":
            raise ValueError("tune.restore: weights return inside N:M groups, which unstructured pruning has none of")
        return self

    def locked(self) -> dict[str, Any]:
        """Return every table with its defaults filled in, as JSON values."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was written and as it is run.

    Attributes:
        text: the file, unchanged.
        sets: overrides given beside it.
        written: every table with defaults and overrides, paths as they were written.
        recipe: the same with absolute paths.
    """

    text: str
    sets: tuple[str, ...]
    written: Recipe
    recipe: Recipe


def load_recipe(path: Path, sets: Sequence[str] = ()) -> RecipeFile:
    """Read a recipe file.

    Args:
        path: a TOML file; relative paths inside it are resolved against its folder.
        sets: overrides "table.key=value", the value as TOML spells it (a bare word is a string).

    Raises:
        RecipeError: the file can't be read, or anything in it is wrong; every mistake is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} can't be read: {error}.", hint="`mpdeploy init MODEL` writes a recipe.") from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    for item in sets:
        _override(tree, item)
    written = parse_recipe(tree, str(path))
    return RecipeFile(text, tuple(sets), written, resolve_paths(written, path.absolute().parent))


def parse_recipe(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Turn nested dicts into a Recipe; see `load_recipe`."""
    try:
        return Recipe.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = [f"{where}: {_sentence(problem)}" for problem in error.errors(include_url=False)]
        raise RecipeError("\n".join(dict.fromkeys(lines)), hint="`mpdeploy schema` prints every key.") from error


def _override(tree: dict[str, Any], item: str) -> None:
    """Apply one `--set table.key=value` to the tree."""
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"--set {item}: expected table.key=value, for example --set tune.epochs=0.")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = dotted.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {item}: {table} is not a table.")
    tree[key] = value


def _sentence(problem: Any) -> str:
    """Say one pydantic problem in words, with the nearest key where one was mistyped."""
    loc = [str(part) for part in problem["loc"]]
    where = ".".join(loc) or "recipe"
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(loc[-1], _keys_at(loc[:-1]), 1)
            return f"{where}: no such key" + (f" (did you mean {near[0]}?)" if near else "")
        case "missing":
            return f"{where}: missing"
        case "value_error":
            text = str(problem["msg"]).removeprefix("Value error, ")
            return text if not problem["loc"] else f"{where}: {text}"
        case _:
            message = str(problem["msg"])
            return f"{where}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def _keys_at(loc: Sequence[str]) -> list[str]:
    """Return the keys that the table at `loc` has."""
    model: type[BaseModel] = Recipe
    for part in loc:
        for name, field in model.model_fields.items():
            if part in (name, field.alias):
                inner = [a for a in (field.annotation, *get_args(field.annotation)) if _is_table(a)]
                model = inner[0] if inner else model
    return [field.alias or name for name, field in model.model_fields.items()]


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make every path absolute: weights, data, and args that begin with './'."""
    source, data = recipe.source, recipe.data
    weights = source.weights
    if weights not in ("pretrained", "random"):
        weights = str((folder / weights).resolve())
    args = {
        key: str((folder / value).resolve()) if isinstance(value, str) and value.startswith("./") else value
        for key, value in source.args.items()
    }
    path = str((folder / data.path).resolve()) if data.path else ""
    return recipe.model_copy(
        update={
            "source": source.model_copy(update={"weights": weights, "args": args}),
            "data": data.model_copy(update={"path": path}),
        }
    )
