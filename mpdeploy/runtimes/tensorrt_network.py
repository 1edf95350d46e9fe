"""Reads a parsed TensorRT network: layer types, element types, and the precision of everything that has weights."""

from collections import Counter
from typing import Any

from mpdeploy.errors import StageFailed
from mpdeploy.runtimes import EngineRequest

_TRANSPARENT = frozenset({"SHUFFLE", "IDENTITY", "CAST", "QUANTIZE", "DEQUANTIZE", "SQUEEZE", "UNSQUEEZE", "CONSTANT"})
_CONVOLUTIONS = frozenset({"CONVOLUTION", "DECONVOLUTION"})
_ELEMENT = {"fp32": "FLOAT", "fp16": "HALF"}
_NAMED = 5


def network_facts(library: Any, network: Any) -> dict[str, Any]:
    """What was parsed.

    Args:
        library: The module `tensorrt` or `tensorrt_rtx`.
        network: Its INetworkDefinition.

    Returns:
        "inputs" and "outputs" (name, dtype, shape), "layers" (count), "layer_types" (histogram), "weighted_layers"
        (count of convolutions and of matrix products with a constant operand), "weights_computed" and "weights_stored"
        (histograms of element types: what the layer multiplies, and what the constant holds before dequantisation),
        "layers_computed" (layer name -> element type, of the weighted layers), "strongly_typed".
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    computed: dict[str, str] = {}
    stored: Counter[str] = Counter()
    for layer in layers:
        found = _weight_types(layer, producers)
        if found is not None:
            computed[layer.name], kept = found
            stored[kept] += 1
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return {
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "layers": len(layers),
        "layer_types": dict(sorted(Counter(layer.type.name for layer in layers).items())),
        "weighted_layers": len(computed),
        "weights_computed": dict(sorted(Counter(computed.values()).items())),
        "weights_stored": dict(sorted(stored.items())),
        "layers_computed": computed,
        "strongly_typed": flag is None or bool(network.get_flag(flag)),
    }


def check_precision(facts: dict[str, Any], request: EngineRequest) -> None:
    """Refuses a network whose weighted layers have another precision than asked.

    fp32 and fp16: every weighted layer computes in it. int8: at least one layer's weights are int8 behind a
    DequantizeLinear, which TensorRT fuses into an int8 kernel; how many is in the facts.

    Raises:
        StageFailed: Another precision, no weighted layer at all, or a network that isn't strongly typed.
    """
    name = request.onnx.name
    if not facts["strongly_typed"]:
        raise StageFailed(f"The network of {name} is not strongly typed: the library may change its precision.")
    if not facts["weighted_layers"]:
        raise StageFailed(f"{name} has no convolution or matrix product with constant weights to deploy.")
    if request.precision == "int8":
        if not facts["weights_stored"].get("INT8"):
            raise StageFailed(f"An int8 engine was asked for, but {name} has weights in {facts['weights_stored']}.")
        return
    expected = _ELEMENT[request.precision]
    wrong = [f"{layer} ({dtype})" for layer, dtype in facts["layers_computed"].items() if dtype != expected]
    wrong += [] if set(facts["weights_stored"]) == {expected} else [f"stored weights {facts['weights_stored']}"]
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise StageFailed(
            f"A {request.precision} engine was asked for, but {name} has {', '.join(wrong[:_NAMED])}{more}; "
            f"expected {expected}."
        )


def _weight_types(layer: Any, producers: dict[str, Any]) -> tuple[str, str] | None:
    """(computed, stored) element types of a layer that multiplies by constants; None for every other layer."""
    kind = layer.type.name
    if kind in _CONVOLUTIONS:
        computed = layer.get_input(0).dtype.name
        # A kernel from a Q/DQ chain is the second input; otherwise it is an attribute, in a strongly typed network of
        # the same type as the first input.
        kernel = layer.get_input(1) if layer.num_inputs > 1 else None
        stored = _constant_type(kernel, producers) if kernel is not None else computed
        return computed, stored or computed
    if kind != "MATRIX_MULTIPLY":
        return None
    for index in range(layer.num_inputs):
        stored = _constant_type(layer.get_input(index), producers)
        if stored:
            return layer.get_input(index).dtype.name, stored
    return None


def _constant_type(tensor: Any, producers: dict[str, Any]) -> str:
    """Element type of the constant behind a tensor: the narrowest on the way, "" where there is no constant."""
    narrowest = tensor.dtype
    while (layer := producers.get(tensor.name)) is not None and layer.type.name in _TRANSPARENT:
        narrowest = min(narrowest, tensor.dtype, key=lambda dtype: dtype.itemsize)
        if layer.type.name == "CONSTANT":
            return str(narrowest.name)
        tensor = layer.get_input(0)
    return ""


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
