"""Which layers are pruned, in the order in which the network runs them, and why the others are not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import Pattern

UNSTRUCTURED = "unstructured"  # the pattern of a layer whose zeros lie anywhere
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Layer:
    """One Linear or Conv2d of a network and what pruning does with it.

    Args:
        name: the module's dotted name.
        kind: "linear" or "conv2d".
        shape: the weight's shape, [O, I] or [O, I/groups, kh, kw].
        groups: convolution groups (1 for a linear).
        positions: output positions per image: tokens, or H*W; 0 when the module itself is never called.
        macs: multiply-accumulates per image of the dense layer.
        pattern: "2:4" and the like, UNSTRUCTURED, or "" when the layer stays dense.
        reason: one sentence that says why it stays dense; "" when it is pruned.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    positions: int
    macs: int
    pattern: str
    reason: str


@dataclass
class Use:
    """How one traced forward pass of one image used a Linear or Conv2d module.

    Args:
        calls: how often the module was called.
        as_stored: how often its stored weight itself was an operand of a linear or conv2d operation.
        positions: output positions, summed over the calls.
    """

    calls: int = 0
    as_stored: int = 0
    positions: int = 0


@dataclass
class Trace:
    """What one forward pass showed.

    Args:
        uses: by module name, called modules first, in execution order.
        modules: the modules by the same names.
    """

    uses: dict[str, Use] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def macs(self, name: str) -> int:
        """Multiply-accumulates per image of one layer, when dense: every weight works once per output position."""
        return weight_of(self.modules[name]).numel() * self.uses[name].positions


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a Linear or Conv2d."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise StageFailed(f"A {type(module).__name__} module holds no weight tensor.")
    return weight


def linears_and_convs(module: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and nn.Conv2d (and subclass) by name, in registration order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, KINDS) and name}


class WatchedOperations(TorchFunctionMode):
    """Calls `seen` before each linear and conv2d operation.

    The operation, not the module's call, is watched: so the inputs are those the weight really meets (after a subclass
    has padded them), and a module that computes other weights from its stored ones (weight standardisation) is noticed.
    """

    def seen(self, operation: str, arguments: dict[str, Any]) -> None:
        """Take note of one operation: "linear" or "conv2d" with its arguments by name."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self.seen("linear", _named(("input", "weight", "bias"), args, kwargs))
        elif func is F.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self.seen("conv2d", _named(names, args, kwargs))
        return func(*args, **kwargs)


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


class _StoredWeights(WatchedOperations):
    """Counts the operations that use a module's stored weight itself."""

    def __init__(self, uses_of_weight: dict[int, list[Use]]) -> None:
        super().__init__()
        self.uses_of_weight = uses_of_weight

    def seen(self, operation: str, arguments: dict[str, Any]) -> None:
        for use in self.uses_of_weight.get(id(arguments["weight"]), ()):
            use.as_stored += 1


@contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of nn.MultiheadAttention, which hides its operations from a trace."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def trace(module: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Run one image of zeros through the network, on the meta device or on its own, and note how its layers are used.

    Args:
        module: the network, in eval mode.
        input_size: channels, height, width.

    Raises:
        StageFailed: the network has no parameters, or refuses the image.
    """
    found = linears_and_convs(module)
    uses = {name: Use() for name in found}
    order: list[str] = []
    uses_of_weight: dict[int, list[Use]] = {}
    for name, child in found.items():
        uses_of_weight.setdefault(id(weight_of(child)), []).append(uses[name])

    def note(name: str, output: object) -> None:
        if not uses[name].calls:
            order.append(name)
        uses[name].calls += 1
        if isinstance(output, Tensor):
            uses[name].positions += output.numel() // weight_of(found[name]).shape[0]

    hooks = [
        child.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, child in found.items()
    ]
    try:
        with torch.no_grad(), plain_attention(), _StoredWeights(uses_of_weight):
            module(blank_image(module, input_size))
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise StageFailed(
            f"The network could not be traced with one image of {'x'.join(map(str, input_size))}: {error}",
            hint="check the input size in the recipe's preprocessing.",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    ordered = order + [name for name in found if not uses[name].calls]
    return Trace({name: uses[name] for name in ordered}, {name: found[name] for name in ordered})


def blank_image(module: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """One image of zeros, [1, C, H, W], with the device and type of the network's parameters."""
    first = next(module.parameters(), None)
    if first is None:
        raise StageFailed("The network has no parameters: there is nothing to prune.")
    return torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)


def choose(
    module: nn.Module,
    pattern: str,
    skip: Sequence[str],
    input_size: tuple[int, int, int],
    *,
    keep_stem_dense: bool = True,
    keep_head_dense: bool = True,
) -> list[Layer]:
    """List every Linear and Conv2d in execution order and say which are pruned.

    Args:
        module: the network in eval mode, on any device; the meta device is enough.
        pattern: "2:4" and the like, or UNSTRUCTURED, which fits any number of inputs.
        skip: globs on layer names (case-sensitive, "*" also crosses dots); what they match stays dense.
        input_size: channels, height, width of one image.
        keep_stem_dense: leave the first layer that sees the image dense.
        keep_head_dense: leave the classifier dense: what `get_classifier()` names, else the last layer to run.

    Returns:
        One entry per layer; modules that are never called come last.

    Raises:
        RecipeError: the pattern can't be read, or a glob matches no layer.
        StageFailed: the network can't be traced.
    """
    wanted = None if pattern == UNSTRUCTURED else Pattern.parse(pattern)
    traced = trace(module, input_size)
    _check_globs(skip, list(traced.uses))
    stem = _stem(traced) if keep_stem_dense else None
    heads = _heads(module, traced) if keep_head_dense else set()
    layers = []
    for name, child in traced.modules.items():
        reason = _skipped(name, skip) or _unusable(traced, name)
        if not reason and name == stem:
            reason = "It is the stem (patch embedding): the first layer that sees the image stays dense."
        if not reason and name in heads:
            reason = "It is the classifier head, which stays dense."
        reason = reason or _unfit(child, wanted)
        layers.append(
            Layer(
                name=name,
                kind="linear" if isinstance(child, nn.Linear) else "conv2d",
                shape=tuple(weight_of(child).shape),
                groups=child.groups if isinstance(child, nn.Conv2d) else 1,
                positions=traced.uses[name].positions,
                macs=traced.macs(name),
                pattern="" if reason else str(wanted or UNSTRUCTURED),
                reason=reason,
            )
        )
    return layers


def _check_globs(skip: Sequence[str], names: Sequence[str]) -> None:
    for glob in skip:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join([*names[:3], *names[3:][-1:]])
            raise RecipeError(
                f"The skip glob {glob!r} matches none of the network's {len(names)} linear and convolution layers.",
                hint=f"the names look like: {shown}.",
            )


def _skipped(name: str, skip: Sequence[str]) -> str:
    glob = next((glob for glob in skip if fnmatchcase(name, glob)), None)
    return "" if glob is None else f"The recipe's skip list names it ({glob!r})."


def _unusable(traced: Trace, name: str) -> str:
    """Why the way in which the network uses the layer forbids pruning it, or ""."""
    use, child = traced.uses[name], traced.modules[name]
    if not use.calls:
        return "The module is never called in the traced forward pass, so no calibration inputs reach it."
    weight = weight_of(child)
    sharers = [other for other, module in traced.modules.items() if other != name and weight_of(module) is weight]
    if sharers:
        return f"Its weight is shared with {', '.join(sharers)}, and one mask would have to serve both."
    if use.calls > 1:
        return f"The module is called {use.calls} times per image, so its weight is shared between different inputs."
    if "weight" not in child._parameters:
        return "Its weight is computed from other parameters (a parametrisation), so zeros would not stay zero."
    if use.as_stored != 1:
        return f"{type(child).__name__} does not use its stored weight as it is, so zeros would not stay zero."
    return ""


def _unfit(child: nn.Module, pattern: Pattern | None) -> str:
    """Why the layer's shape forbids the pattern, or ""."""
    if isinstance(child, nn.Conv2d) and child.groups != 1:
        depthwise = "depthwise" if child.groups == child.in_channels else "grouped"
        return f"It is a {depthwise} convolution ({child.groups} groups), which sparse kernels don't cover."
    inputs = weight_of(child).shape[1]
    if pattern is not None and inputs % pattern.group:
        return f"Its {inputs} inputs are not a multiple of {pattern.group}, so groups of {pattern} don't fit."
    return ""


def _stem(traced: Trace) -> str | None:
    return next((name for name, use in traced.uses.items() if use.calls), None)


def _heads(module: nn.Module, traced: Trace) -> set[str]:
    """Names of the classifier layers."""
    get_classifier = getattr(module, "get_classifier", None)
    answer = get_classifier() if callable(get_classifier) else None
    roots = [part for part in (answer if isinstance(answer, tuple | list) else [answer]) if isinstance(part, nn.Module)]
    inside = {id(child) for root in roots for child in root.modules()}
    named = {name for name, child in traced.modules.items() if id(child) in inside}
    called = [name for name, use in traced.uses.items() if use.calls]
    return named or set(called[-1:])
