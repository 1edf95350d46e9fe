"""Deployment targets: what their data sheets say, which layers may use 2:4 there, and what that can bring.

Everything here is prediction for `plan`; nothing is measured, and a report never prints it as a result. Peaks are dense
tensor-core figures with fp32 accumulation where a card has both; a figure that isn't certain is left out (None).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from mpdeploy.errors import RecipeError

_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
SPARSE_PRECISIONS = ("fp16", "bf16", "int8")


@dataclass(frozen=True)
class Target:
    """One device.

    Args:
        key: As written in a recipe: "a100".
        name: As NVIDIA writes it.
        compute_capability: "8.0" for an A100; None for a CPU.
        memory_gb: Device memory, GB (10^9 bytes as sold).
        bandwidth_gbs: Memory bandwidth, GB/s.
        dense_tflops: Peak TFLOPS (TOPS for int8) per precision, dense tensor cores; fp32 is outside the tensor cores.
        sparse_tflops: The same with 2:4 weights.
        power_w: Board power limit, W.
        source: Where the figures come from.
    """

    key: str
    name: str
    compute_capability: str | None
    memory_gb: float | None
    bandwidth_gbs: float | None
    dense_tflops: dict[str, float]
    sparse_tflops: dict[str, float]
    power_w: float | None
    source: str

    @property
    def sm(self) -> str:
        """Architecture in an engine's spelling: "sm80"; "cpu" for a CPU."""
        return "cpu" if self.compute_capability is None else f"sm{self.compute_capability.replace('.', '')}"

    @property
    def has_sparse_kernels(self) -> bool:
        """Whether it has sparse tensor cores: every NVIDIA GPU from compute capability 8.0 on."""
        return self.compute_capability is not None and float(self.compute_capability) >= 8.0  # 12.0 comes after 8.9


@dataclass(frozen=True)
class Eligibility:
    """Whether a layer may run on sparse tensor cores; if not, the failed rule and what would mend it."""

    eligible: bool
    rule: str
    mend: str


@dataclass(frozen=True)
class Gain:
    """Predicted effect of 2:4 weights on one layer: a range, never a promise.

    Args:
        dense_us: Roofline time of the dense layer, microseconds; None where the target has no figures for it.
        sparse_us_low: Shortest time expected with 2:4, microseconds.
        sparse_us_high: Longest.
        low: Smallest dense/sparse time ratio expected.
        high: Largest.
        reason: One sentence.
    """

    dense_us: float | None
    sparse_us_low: float | None
    sparse_us_high: float | None
    low: float
    high: float
    reason: str


def _gpu(
    key: str,
    name: str,
    capability: str,
    memory: float,
    bandwidth: float | None,
    power: float | None,
    dense: dict[str, float],
    source: str,
    rounded: dict[str, float] | None = None,
) -> Target:
    """A GPU. Data sheets double each tensor-core peak for 2:4, from compute capability 8.0 on.

    `rounded` holds the sparse peaks where the sheet's rounding isn't exactly the double.
    """
    sparse = {} if float(capability) < 8.0 else {key: 2 * value for key, value in dense.items() if key != "fp32"}
    return Target(key, name, capability, memory, bandwidth, dense, sparse | (rounded or {}), power, source)


_A100 = {"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "bf16": 312.0, "int8": 624.0}
_HOPPER_SXM = {"fp32": 67.0, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5, "int8": 1979.0}
_HOPPER_PCIE = {"fp32": 51.0, "tf32": 378.0, "fp16": 756.5, "bf16": 756.5, "int8": 1513.0}
_A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet"
_ADA_PAPER = "NVIDIA Ada GPU architecture whitepaper, fp16 with fp32 accumulation"
_SPARSE_SHEET = "peaks there are with sparsity, halved here for dense"

TARGETS: tuple[Target, ...] = (
    Target("cpu", "CPU with ONNX Runtime", None, None, None, {}, {}, None, "no figures: CPUs differ too much"),
    _gpu("a100", "A100 80GB SXM", "8.0", 80, 2039, 400, _A100, _A100_SHEET),
    _gpu("a100-80gb-pcie", "A100 80GB PCIe", "8.0", 80, 1935, 300, _A100, _A100_SHEET),
    _gpu("a100-40gb-sxm", "A100 40GB SXM", "8.0", 40, 1555, 400, _A100, _A100_SHEET),
    _gpu("a100-40gb-pcie", "A100 40GB PCIe", "8.0", 40, 1555, 250, _A100, _A100_SHEET),
    _gpu(
        "a30",
        "A30",
        "8.0",
        24,
        933,
        165,
        {"fp32": 10.3, "tf32": 82.0, "fp16": 165.0, "bf16": 165.0, "int8": 330.0},
        "NVIDIA A30 Tensor Core GPU data sheet",
        rounded={"tf32": 165.0, "int8": 661.0},
    ),
    _gpu(
        "a40",
        "A40",
        "8.6",
        48,
        696,
        300,
        {"fp32": 37.4, "tf32": 74.8, "fp16": 149.7, "bf16": 149.7, "int8": 299.3},
        "NVIDIA A40 data sheet",
    ),
    _gpu(
        "a10",
        "A10",
        "8.6",
        24,
        600,
        150,
        {"fp32": 31.2, "tf32": 62.5, "fp16": 125.0, "bf16": 125.0, "int8": 250.0},
        "NVIDIA A10 Tensor Core GPU data sheet",
    ),
    _gpu(
        "l4",
        "L4",
        "8.9",
        24,
        300,
        72,
        {"fp32": 30.3, "tf32": 60.0, "fp16": 121.0, "bf16": 121.0, "int8": 242.5},
        f"NVIDIA L4 Tensor Core GPU data sheet; {_SPARSE_SHEET}",
    ),
    _gpu(
        "l40s",
        "L40S",
        "8.9",
        48,
        864,
        350,
        {"fp32": 91.6, "tf32": 183.0, "fp16": 362.05, "bf16": 362.05, "int8": 733.0},
        "NVIDIA L40S data sheet",
        rounded={"fp16": 733.0, "bf16": 733.0},
    ),
    _gpu(
        "rtx4090",
        "GeForce RTX 4090",
        "8.9",
        24,
        1008,
        450,
        {"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2, "int8": 660.6},
        _ADA_PAPER,
    ),
    _gpu(
        "h100",
        "H100 SXM",
        "9.0",
        80,
        3350,
        700,
        _HOPPER_SXM,
        f"NVIDIA H100 Tensor Core GPU data sheet; {_SPARSE_SHEET}",
    ),
    _gpu(
        "h100-pcie",
        "H100 PCIe",
        "9.0",
        80,
        2000,
        350,
        _HOPPER_PCIE,
        f"NVIDIA H100 Tensor Core GPU data sheet; {_SPARSE_SHEET}",
    ),
    _gpu(
        "h200",
        "H200 SXM",
        "9.0",
        141,
        4800,
        700,
        _HOPPER_SXM,
        f"NVIDIA H200 Tensor Core GPU data sheet; {_SPARSE_SHEET}",
    ),
    _gpu(
        "t4",
        "T4",
        "7.5",
        16,
        None,
        70,
        {"fp32": 8.1, "fp16": 65.0, "int8": 130.0},
        "NVIDIA T4 data sheet; the bandwidth differs between its editions",
    ),
)


# What a sparse kernel brings where arithmetic is the limit. Data sheets say 2; published measurements, dense twin on
# the same library and precision, say far less. The low end is 1: TensorRT keeps the dense kernel where it is as fast.
LOW_COMPUTE = 1.0
HIGH_COMPUTE = 1.5
"""Measured on whole layers: 1.24 and 1.27 for the MLP of ViT-L on an A100 (torchao's README), 1.20 to 1.27 for that of
ViT-B on Orin (onnxsim), 1.5 for BERT-Large in int8 on an A100 (NVIDIA). torchao's "up to 1.7" for one product is left
out: nobody saw it in a network."""
HIGH_COMPUTE_SM90 = 1.22
"""H100 and H200, sparse against dense matrix product, HPC-AI; often Ampere's kernels run there (cutlass issue 1335)."""
HIGH_POINTWISE = 1.15
"""1x1 convolutions are chosen late if at all (TensorRT issue 3849); NVIDIA expects at most 15 % (issue 2310)."""
FEWEST_CHANNELS = 256
"""Below this on either side sparse convolutions are eligible and not chosen (TensorRT issues 4065, 3849, 1403)."""
_INDEX_BITS = 2
"""Bits per kept value that say where in its group of four it stood."""


def find(name: str) -> Target:
    """The target of that name.

    Raises:
        RecipeError: There is none; the nearest name is given.
    """
    by_key = {target.key: target for target in TARGETS}
    if name in by_key:
        return by_key[name]
    near = get_close_matches(name.lower(), by_key, n=1)
    meant = f' Did you mean "{near[0]}"?' if near else ""
    raise RecipeError(f'There is no target "{name}".{meant}', hint=f"Targets: {', '.join(by_key)}.")


def eligibility(
    kind: str, shape: Sequence[int], groups: int, pattern: str, precision: str, target: Target
) -> Eligibility:
    """Whether TensorRT may run a layer on sparse tensor cores. Eligible isn't chosen: see `gain`.

    Args:
        kind: "linear" or "conv2d".
        shape: Weight shape: [out, in] or [out, in / groups, kh, kw].
        groups: Convolution groups; 1 for a linear layer.
        pattern: "2:4", or "" for a dense layer.
        precision: "fp32", "fp16", "bf16" or "int8".
        target: The device.

    Returns:
        The first rule that fails, in the order device, pattern, precision, groups, sizes.

    Raises:
        RecipeError: A kind, pattern or precision that doesn't exist.
    """
    _check_layer(kind, shape, precision)
    if target.compute_capability is None:
        return _no("CPUs have no sparse kernels: zeros save no time in ONNX Runtime.", "Ask for int8 on a CPU.")
    if not target.has_sparse_kernels:
        return _no(f"{target.name} ({target.sm}) has no sparse tensor cores; they begin with sm80.", "Choose sm80 up.")
    if not pattern:
        return _no("The layer stays dense.", "")
    if not _implies_2_4(pattern):
        return _no(f"Only 2:4 runs on sparse tensor cores; {pattern} is an accuracy pattern there.", "Prune to 2:4.")
    if precision not in SPARSE_PRECISIONS:
        return _no(f"There are no sparse {precision} kernels.", "Export fp16, or quantise to int8.")
    if groups != 1:
        return _no(
            f"TensorRT considers no group convolutions for sparsity (this one has {groups} groups).",
            "Leave it dense, or use a network with ordinary convolutions.",
        )
    return _sizes(shape[0], shape[1])


def gain(kind: str, shape: Sequence[int], positions: int, batch: int, precision: str, target: Target) -> Gain:
    """Roofline estimate of what 2:4 weights bring to one eligible layer.

    Dense time is max(2 MACs / peak, bytes / bandwidth). With 2:4 the weights' bytes fall to half of the values and two
    index bits for each kept one (fp16: 9/16), and arithmetic speeds up by 1 to the published factor, not by the data
    sheet's 2. Activations move once in each direction; a convolution's input is taken to have as many positions as its
    output, which is right for stride 1. Never above 2.

    Args:
        kind: "linear" or "conv2d".
        shape: Weight shape, [out, in] or [out, in / groups, kh, kw].
        positions: Output positions per image: tokens, or H * W.
        batch: Images.
        precision: "fp32", "fp16", "bf16" or "int8".
        target: The device.

    Returns:
        The range; 1 to 1 with the reason where nothing is to be had.

    Raises:
        RecipeError: A kind or precision that doesn't exist, or no positions or images.
    """
    _check_layer(kind, shape, precision)
    if positions < 1 or batch < 1:
        raise RecipeError(f"A gain needs at least one position and one image, not {positions} and {batch}.")
    times = _roofline(shape, positions * batch, precision, target)
    dense_us = max(times) if times else None
    if not target.has_sparse_kernels:
        return _nothing(dense_us, f"{target.name} has no sparse kernels.")
    if precision not in SPARSE_PRECISIONS:
        return _nothing(dense_us, f"There are no sparse {precision} kernels.")
    if min(shape[0], shape[1]) < FEWEST_CHANNELS:
        return _nothing(
            dense_us,
            f"About nothing: {shape[1]} to {shape[0]} channels, and below {FEWEST_CHANNELS} dense kernels win.",
        )
    if times is None or dense_us is None:
        return _nothing(None, f"The data sheet of {target.name} gives no figures for {precision}.")
    compute, memory = times
    cap, why = _arithmetic_cap(shape, target)
    sparse_memory = _roofline_memory(shape, positions * batch, precision, target, _sparse_share(precision))
    high = min(dense_us / max(compute / cap, sparse_memory), 2.0)
    if compute < memory:
        why = f"2:4 weights with their index are {_sparse_share(precision):.3g} of the bytes, activations stay"
    reason = f"Bound by {'arithmetic' if compute >= memory else 'memory traffic'}; {why}."
    return Gain(dense_us, dense_us / high, dense_us / LOW_COMPUTE, LOW_COMPUTE, high, reason)


def _check_layer(kind: str, shape: Sequence[int], precision: str) -> None:
    axes = {"linear": 2, "conv2d": 4}
    if kind not in axes:
        raise RecipeError(f'There is no layer kind "{kind}"; there are linear and conv2d.')
    if len(shape) != axes[kind] or min(shape) < 1:
        raise RecipeError(f"A {kind} weight has {axes[kind]} positive sizes, not {tuple(shape)}.")
    if precision not in _BYTES:
        raise RecipeError(f'There is no precision "{precision}"; there are {", ".join(_BYTES)}.')


def _implies_2_4(pattern: str) -> bool:
    """Whether every weight of this pattern also satisfies 2:4: each aligned group of four keeps at most two."""
    keep, _, group = pattern.partition(":")
    if not (keep.isdecimal() and group.isdecimal() and 1 <= int(keep) < int(group)):
        raise RecipeError(f'"{pattern}" is not a sparsity pattern; expected N:M with 1 <= N < M, as in "2:4".')
    if int(keep) == 1:
        return True  # four neighbours meet at most two groups, or two whole groups of two
    return int(keep) == 2 and int(group) % 4 == 0


def _sizes(outputs: int, inputs: int) -> Eligibility:
    """The size rule of NVIDIA's own pruners (apex ASP, Model-Optimizer): outputs % 8 and inputs % 16, else skipped."""
    if outputs % 8:
        return _no(f"{outputs} outputs are not a multiple of 8.", f"Pad to {_next(outputs, 8)} outputs.")
    if inputs % 16:
        return _no(f"{inputs} inputs are not a multiple of 16.", f"Pad to {_next(inputs, 16)} inputs.")
    return Eligibility(True, "", "")


def _next(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _no(rule: str, mend: str) -> Eligibility:
    return Eligibility(False, rule, mend)


def _nothing(dense_us: float | None, reason: str) -> Gain:
    return Gain(dense_us, dense_us, dense_us, 1.0, 1.0, reason)


def _arithmetic_cap(shape: Sequence[int], target: Target) -> tuple[float, str]:
    """Largest published factor for a layer that is bound by arithmetic, and where it is from."""
    if len(shape) == 4 and shape[2] == shape[3] == 1:
        return HIGH_POINTWISE, "1x1 convolutions rarely get a sparse kernel, at most 15 % (TensorRT issues 3849, 2310)"
    if target.sm == "sm90":
        return HIGH_COMPUTE_SM90, f"sparse products reached at most {HIGH_COMPUTE_SM90} on Hopper (HPC-AI)"
    return HIGH_COMPUTE, f"sparse layers reached at most {HIGH_COMPUTE} in published measurements"


def _sparse_share(precision: str) -> float:
    """Bytes of a 2:4 weight with its index over bytes of the dense one: 9/16 for 16-bit types, 5/8 for int8."""
    return 0.5 * (1 + _INDEX_BITS / (8 * _BYTES[precision]))


def _roofline(shape: Sequence[int], positions: int, precision: str, target: Target) -> tuple[float, float] | None:
    """(arithmetic, memory) time of the dense layer in microseconds; None without the target's figures."""
    peak = target.dense_tflops.get(precision)
    if peak is None or target.bandwidth_gbs is None:
        return None
    compute = 2 * math.prod(shape) * positions / (peak * 1e12) * 1e6
    return compute, _roofline_memory(shape, positions, precision, target, 1.0)


def _roofline_memory(
    shape: Sequence[int], positions: int, precision: str, target: Target, weight_share: float
) -> float:
    """Microseconds to move weights (times `weight_share`) and activations once."""
    if target.bandwidth_gbs is None:
        raise RecipeError(f"{target.name} has no bandwidth figure to estimate with.")
    values = weight_share * math.prod(shape) + positions * (shape[0] + shape[1])
    return values * _BYTES[precision] / (target.bandwidth_gbs * 1e9) * 1e6
