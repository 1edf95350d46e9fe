import copy
import hashlib
import itertools
import json

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, version_converter
from torch import nn

from mpdeploy.errors import CorruptArtifact, StageFailed
from mpdeploy.graph import sparsity
from mpdeploy.graph.export import export_onnx

DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}


def brute_force(weight: np.ndarray, axis: int, keep: int, group: int) -> int:
    bad = 0
    rest = [range(size) for index, size in enumerate(weight.shape) if index != axis]
    for place in itertools.product(*rest):
        line = [weight[(*place[:axis], k, *place[axis:])] for k in range(weight.shape[axis])]
        for start in range(0, len(line), group):
            bad += sum(not value == 0 for value in line[start : start + group]) > keep  # noqa: SIM201  NaN != 0
    return bad


def sparse_tensor(shape: tuple[int, ...], axis: int, pattern: str = "2:4", seed: int = 0) -> np.ndarray:
    """Integers without 0, then exactly N of M kept along `axis`."""
    keep, group = sparsity.parse_pattern(pattern)
    rng = np.random.default_rng(seed)
    values = np.moveaxis(rng.integers(1, 100, shape) * rng.choice([-1, 1], shape), axis, -1).copy()
    groups = values.reshape(-1, group)
    for row in groups:
        row[rng.permutation(group)[keep:]] = 0
    return np.moveaxis(groups.reshape(values.shape), -1, axis)


def model_of(op: str, weight: np.ndarray, chain: str = "initializer", layer: str = "layer", **attributes):
    """One node that reads `weight` through `chain`, as exporters and quantisers write it."""
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    nodes, tensors, name = [], [numpy_helper.from_array(weight, "w")], "w"
    if chain == "constant":
        nodes, tensors = [helper.make_node("Constant", [], ["w"], value=tensors[0])], []
    elif chain == "cast":
        nodes, name = [helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT)], "c"
    elif chain == "identity":
        nodes, name = [helper.make_node("Identity", ["w"], ["c"])], "c"
    elif chain.startswith("transpose"):
        perm = [int(index) for index in chain.removeprefix("transpose")]
        nodes, name = [helper.make_node("Transpose", ["w"], ["c"], **({"perm": perm} if perm else {}))], "c"
    elif chain.startswith(("qdq", "dq")):
        zero = np.array(3 if chain.endswith("asymmetric") else 0, np.int8)
        tensors += [numpy_helper.from_array(np.array(0.5, np.float32), "s"), numpy_helper.from_array(zero, "z")]
        steps = (
            [("QuantizeLinear", "w", "q"), ("DequantizeLinear", "q", "d")]
            if chain.startswith("q")
            else [("DequantizeLinear", "w", "d")]
        )
        nodes, name = [helper.make_node(kind, [a, "s", "z"], [b]) for kind, a, b in steps], "d"
    node = helper.make_node(op, ["x", name], ["y"], name="consumer", **attributes)
    node.metadata_props.add(key=sparsity.LAYER_KEY, value=layer)
    rank = 4 if op == "Conv" else 2
    graph = helper.make_graph(
        [*nodes, node],
        "g",
        [helper.make_tensor_value_info("x", dtype, [None] * rank)],
        [helper.make_tensor_value_info("y", dtype, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


class TestBadGroups:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(1, 3), max_size=3),
        st.lists(st.integers(1, 3), max_size=2),
        st.integers(1, 3),
        st.integers(1, 8).flatmap(lambda group: st.tuples(st.integers(1, group), st.just(group))),
        st.integers(0, 2**32 - 1),
    )
    def test_equals_brute_force(self, before, after, count, pattern, seed):
        keep, group = pattern
        rng = np.random.default_rng(seed)
        shape = (*before, count * group, *after)
        weight = rng.standard_normal(shape) * (rng.random(shape) < keep / group)
        weight[rng.random(shape) < 0.05] = np.nan
        axis = len(before)
        assert sparsity.bad_groups(weight != 0, axis, f"{keep}:{group}") == brute_force(weight, axis, keep, group)

    def test_axis_that_groups_do_not_fill_is_refused(self):
        with pytest.raises(ValueError, match="groups of 4 do not fit into an axis of 6"):
            sparsity.bad_groups(np.ones((2, 6), bool), 1, "2:4")

    @pytest.mark.parametrize("pattern", ["", "2", "4:2", "0:4", "2:4:8", "-2:4", "2:4 ", "02:4"])
    def test_other_patterns_are_refused(self, pattern):
        with pytest.raises(ValueError, match="is not an N:M pattern"):
            sparsity.parse_pattern(pattern)


class TestWeightUses:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("chain", ["initializer", "constant", "cast", "identity", "dq"])
    @pytest.mark.parametrize(
        ("op", "shape", "axis", "attributes"),
        [
            ("Conv", (3, 8, 2, 3), 1, {}),
            ("Conv", (4, 8, 1, 1), 1, {"group": 2}),
            ("Conv", (3, 8, 5), 1, {}),
            ("MatMul", (8, 3), 0, {}),
            ("MatMul", (2, 8, 3), 1, {}),
            ("Gemm", (8, 3), 0, {}),
            ("Gemm", (3, 8), 1, {"transB": 1}),
        ],
    )
    def test_axis_and_pattern(self, op, shape, axis, attributes, chain, dtype):
        weight = sparse_tensor(shape, axis).astype(DTYPES[dtype])
        (use,) = sparsity.weight_uses(model_of(op, weight, chain, **attributes))
        assert (use.initializer, use.node, use.op, use.layer) == ("w", "consumer", op, "layer")
        assert (use.axis, use.shape, use.dtype) == (axis, shape, dtype)
        assert use.groups == attributes.get("group", 1)
        assert use.density == 0.5
        assert use.bad_groups("2:4") == 0
        assert use.bad_groups("1:4") == weight.size // 4
        assert use.sha256 == hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()
        weight[(0,) * weight.ndim] = weight[tuple(1 if i == axis else 0 for i in range(weight.ndim))] = 7
        weight[tuple(2 if i == axis else 0 for i in range(weight.ndim))] = 7
        (use,) = sparsity.weight_uses(model_of(op, weight, chain, **attributes))
        assert use.bad_groups("2:4") == 1

    @pytest.mark.parametrize(
        ("op", "chain", "consumed_axis", "shape", "stored_axis"),
        [
            ("MatMul", "transpose", 0, (4, 8), 1),
            ("MatMul", "transpose10", 0, (4, 8), 1),
            ("MatMul", "transpose201", 1, (8, 4, 2), 0),
            ("Conv", "transpose3201", 1, (2, 1, 8, 4), 2),
        ],
    )
    def test_axis_through_a_transpose(self, op, chain, consumed_axis, shape, stored_axis):
        weight = sparse_tensor(shape, stored_axis).astype(np.float32)
        model = model_of(op, weight, chain)
        (use,) = sparsity.weight_uses(model)
        perm = next(node for node in model.graph.node if node.op_type == "Transpose").attribute
        seen = np.transpose(weight, perm[0].ints if perm else None)
        assert use.axis == stored_axis
        assert use.bad_groups("2:4") == brute_force(seen, consumed_axis, 2, 4) == 0
        others = [axis for axis in range(weight.ndim) if axis != stored_axis and weight.shape[axis] % 4 == 0]
        assert all(brute_force(weight, axis, 2, 4) > 0 for axis in others)

    @pytest.mark.parametrize("chain", ["qdq", "dq"])
    def test_zeros_count_only_where_the_zero_point_is_zero(self, chain):
        weight = sparse_tensor((8, 4), 0).astype(np.float32 if chain == "qdq" else np.int8)
        (use,) = sparsity.weight_uses(model_of("MatMul", weight, chain))
        assert (use.zero_is_zero, use.bad_groups("2:4")) == (True, 0)
        (use,) = sparsity.weight_uses(model_of("MatMul", weight, f"{chain}-asymmetric"))
        assert (use.zero_is_zero, use.bad_groups("2:4"), use.density) == (False, 8, 1.0)

    def test_product_of_activations_has_no_weight(self):
        model = model_of("MatMul", np.ones((4, 4), np.float32))
        model.graph.node[0].input[1] = "x"
        assert sparsity.weight_uses(model) == []

    def test_large_weight_is_quick_to_check(self):
        use = sparsity.WeightUse("w", "n", "MatMul", "", 0, 1, "float32", np.ones((4096, 1024), np.float32))
        assert use.bad_groups("2:4") == 2**20


LAYERS = [{"name": "layer", "pattern": "2:4", "reason": ""}]


class TestAnnotate:
    def test_manifest(self):
        weight = sparse_tensor((8, 3), 0).astype(np.float32)
        model = model_of("MatMul", weight)
        manifest = sparsity.annotate(model, LAYERS, {"layer": np.array([1, 0, 2, 3, 4, 5, 6, 7])})
        assert manifest == {
            "schema": 1,
            "weights": [
                {
                    "initializer": "w",
                    "layer": "layer",
                    "node": "consumer",
                    "op": "MatMul",
                    "axis": 0,
                    "shape": [8, 3],
                    "dtype": "float32",
                    "pattern": "2:4",
                    "density": 0.5,
                    "permutation": [1, 0, 2, 3, 4, 5, 6, 7],
                    "sha256": hashlib.sha256(weight.tobytes()).hexdigest(),
                }
            ],
            "dense": [],
        }
        sparsity.check(model)
        assert sparsity.read(model) == manifest
        stored = {entry.key: entry.value for entry in model.metadata_props}
        assert stored == {"mpdeploy.sparsity": sparsity.dumps(manifest)}
        hint = {entry.key: json.loads(entry.value) for entry in model.graph.initializer[0].metadata_props}
        assert hint == {"mpdeploy.sparsity": {"axis": 0, "layer": "layer", "pattern": "2:4"}}

    def test_dense_layers_keep_their_reason(self):
        model = model_of("Conv", np.ones((2, 3, 1, 1), np.float32))
        manifest = sparsity.annotate(model, [{"name": "layer", "pattern": "", "reason": "the stem stays dense"}])
        assert manifest["weights"] == []
        assert [(entry["layer"], entry["reason"]) for entry in manifest["dense"]] == [("layer", "the stem stays dense")]
        sparsity.check(model)

    def test_twice_gives_the_same(self):
        model = model_of("MatMul", sparse_tensor((8, 3), 0).astype(np.float32))
        sparsity.annotate(model, LAYERS)
        before = model.SerializeToString(deterministic=True)
        sparsity.annotate(model, LAYERS)
        assert model.SerializeToString(deterministic=True) == before

    def test_weight_that_lies_along_the_wrong_axis_is_refused(self):
        model = model_of("MatMul", sparse_tensor((8, 8), 1).astype(np.float32))
        with pytest.raises(StageFailed, match="The weight w of layer is not 2:4 on axis 0, where its MatMul reads it"):
            sparsity.annotate(model, LAYERS)

    def test_axis_that_the_pattern_does_not_fit_is_refused(self):
        with pytest.raises(StageFailed, match="groups of 4 do not fit into an axis of 6"):
            sparsity.annotate(model_of("MatMul", np.zeros((6, 4), np.float32)), LAYERS)

    def test_pruned_layer_without_a_weight_is_refused(self):
        model = model_of("MatMul", np.zeros((8, 4), np.float32), layer="other")
        with pytest.raises(StageFailed, match="pruned layer layer has no constant weight"):
            sparsity.annotate(model, LAYERS)


class TestCheck:
    def model(self) -> onnx.ModelProto:
        model = model_of("MatMul", sparse_tensor((8, 8), 0).astype(np.float32))
        sparsity.annotate(model, LAYERS)
        return model

    def rewrite(self, model: onnx.ModelProto, manifest: dict) -> None:
        helper.set_model_props(model, {sparsity.MANIFEST_KEY: json.dumps(manifest)})

    def test_without_manifest(self):
        with pytest.raises(CorruptArtifact, match="has no sparsity manifest"):
            sparsity.check(model_of("MatMul", np.zeros((8, 8), np.float32)))

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", "is not JSON"),
            ("[]", "malformed"),
            ('{"schema": 1, "weights": []}', "malformed"),
            ('{"schema": 1, "weights": [3], "dense": []}', "malformed"),
            ('{"schema": 9, "weights": [], "dense": []}', "schema 9"),
            ('{"schema": 1, "weights": [{"initializer": "w"}], "dense": []}', "gives 'w' no N:M pattern"),
        ],
    )
    def test_broken_manifest(self, text, words):
        model = self.model()
        helper.set_model_props(model, {sparsity.MANIFEST_KEY: text})
        with pytest.raises(CorruptArtifact, match=words):
            sparsity.check(model)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("axis", 1),
            ("shape", [8, 9]),
            ("dtype", "float16"),
            ("op", "Gemm"),
            ("layer", "other"),
            ("density", 0.25),
            ("density", None),
            ("sha256", "0" * 64),
        ],
    )
    def test_wrong_statement_is_named(self, field, value):
        model = self.model()
        manifest = sparsity.read(model)
        manifest["weights"][0][field] = value
        self.rewrite(model, manifest)
        with pytest.raises(CorruptArtifact, match=f"The weight w of layer is not what .*: its {field} is"):
            sparsity.check(model)

    def test_missing_field_is_named(self):
        for field in sparsity.read(self.model())["weights"][0]:
            if field == "permutation":
                continue
            model = self.model()
            manifest = sparsity.read(model)
            del manifest["weights"][0][field]
            self.rewrite(model, manifest)
            with pytest.raises(CorruptArtifact, match="manifest"):
                sparsity.check(model)

    def test_pattern_that_the_weight_does_not_have(self):
        model = self.model()
        manifest = sparsity.read(model)
        manifest["weights"][0]["pattern"] = "1:4"
        self.rewrite(model, manifest)
        with pytest.raises(CorruptArtifact, match="is not 1:4 on axis 0: 16 groups"):
            sparsity.check(model)

    def test_edited_weight(self):
        model = self.model()
        weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
        weight[3, 3] += 1
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
        with pytest.raises(CorruptArtifact, match="The weight w of layer is not what the manifest says: its sha256"):
            sparsity.check(model)

    def test_consumer_that_reads_another_axis(self):
        model = self.model()
        node = model.graph.node[0]
        node.op_type = "Gemm"
        node.attribute.append(helper.make_attribute("transB", 1))
        with pytest.raises(CorruptArtifact, match="its op is Gemm"):
            sparsity.check(model)

    def test_second_consumer_of_one_weight(self):
        model = self.model()
        model.graph.node.append(helper.make_node("MatMul", ["y", "w"], ["z"], name="second"))
        with pytest.raises(CorruptArtifact, match="w also feeds MatMul second, which the manifest does not list"):
            sparsity.check(model)
        model.graph.node[1].metadata_props.add(key=sparsity.LAYER_KEY, value="layer")
        manifest = sparsity.annotate(model, LAYERS)
        assert [(entry["initializer"], entry["node"]) for entry in manifest["weights"]] == [
            ("w", "consumer"),
            ("w", "second"),
        ]
        sparsity.check(model)

    def test_consumer_that_is_gone_and_entry_that_is_doubled(self):
        model = self.model()
        manifest = sparsity.read(model)
        manifest["weights"] *= 2
        self.rewrite(model, manifest)
        with pytest.raises(CorruptArtifact, match="lists the weight w of node consumer twice"):
            sparsity.check(model)
        model = self.model()
        model.graph.node[0].name = "renamed"
        with pytest.raises(CorruptArtifact, match="weight w of node consumer, which the graph lacks"):
            sparsity.check(model)

    @pytest.mark.parametrize("order", [[0] * 8, list(range(7)), "01234567", list(range(1, 9))])
    def test_permutation_that_is_none(self, order):
        model = self.model()
        manifest = sparsity.read(model)
        manifest["weights"][0]["permutation"] = order
        self.rewrite(model, manifest)
        with pytest.raises(CorruptArtifact, match="permutation of w is no order of its 8 input channels"):
            sparsity.check(model)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """An exported ViT, 2:4 in its blocks, with its manifest; and where it lies."""
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10).eval()
    layers = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            pruned = name.startswith("blocks")
            layers.append(
                {"name": name, "pattern": "2:4" if pruned else "", "reason": "" if pruned else "stem or head"}
            )
            if pruned:
                weight = layer.weight.data.view(-1, 4)
                weight[torch.arange(len(weight))[:, None], weight.abs().argsort(1)[:, :2]] = 0
    path = tmp_path_factory.mktemp("vit") / "model.onnx"
    export_onnx(module, (3, 32, 32), path)
    model = onnx.load(path)
    manifest = sparsity.annotate(model, layers)
    onnx.save(model, path)
    return path, manifest


class TestSurvival:
    def test_manifest_of_an_exported_network(self, vit):
        path, manifest = vit
        model = onnx.load(path)
        sparsity.check(model)
        onnx.checker.check_model(model)
        table = {entry["layer"]: entry for entry in manifest["weights"]}
        assert list(table) == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
        assert table["blocks.0.mlp.fc1"]["op"] == "MatMul"
        assert table["blocks.0.mlp.fc1"]["axis"] == 0
        assert table["blocks.0.mlp.fc1"]["shape"] == [192, 768]
        assert {entry["layer"]: entry["reason"] for entry in manifest["dense"]} == dict.fromkeys(
            ["patch_embed.proj", "head"], "stem or head"
        )

    def layers_of(self, manifest: dict) -> set:
        return {(entry["layer"], entry["pattern"]) for entry in manifest["weights"]}

    def test_shape_inference(self, vit):
        path, manifest = vit
        model = onnx.shape_inference.infer_shapes(onnx.load(path))
        sparsity.check(model)
        assert sparsity.reattach(model, manifest) == manifest

    @pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"])
    def test_onnxruntime_optimised_model(self, vit, level, tmp_path):
        path, manifest = vit
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        model = onnx.load(tmp_path / "o.onnx")
        again = sparsity.reattach(model, manifest)
        sparsity.check(model)
        assert self.layers_of(again) == self.layers_of(manifest)

    def test_version_converter(self, vit):
        path, manifest = vit
        model = version_converter.convert_version(onnx.load(path), 21)
        again = sparsity.reattach(model, manifest)
        sparsity.check(model)
        assert self.layers_of(again) == self.layers_of(manifest)

    def test_renamed_weights_are_found_by_content(self, vit):
        path, manifest = vit
        model = stripped(onnx.load(path))
        names = {tensor.name: f"t{index}" for index, tensor in enumerate(model.graph.initializer)}
        for tensor in model.graph.initializer:
            tensor.name = names[tensor.name]
        for node in model.graph.node:
            node.name = f"n_{node.name}"
            node.input[:] = [names.get(name, name) for name in node.input]
        again = sparsity.reattach(model, manifest)
        sparsity.check(model)
        assert self.layers_of(again) == self.layers_of(manifest)
        assert [entry["sha256"] for entry in again["weights"]] == [entry["sha256"] for entry in manifest["weights"]]

    def test_rounded_weights_are_found_by_name(self, vit):
        path, manifest = vit
        model = stripped(onnx.load(path))
        sparse = {entry["initializer"] for entry in manifest["weights"]}
        for tensor in model.graph.initializer:
            if tensor.name in sparse:
                rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
        assert self.layers_of(sparsity.reattach(model, manifest)) == self.layers_of(manifest)
        sparsity.check(model)

    def test_lost_zeros_are_refused(self, vit):
        path, manifest = vit
        model = onnx.load(path)
        tensor = next(t for t in model.graph.initializer if t.name == manifest["weights"][2]["initializer"])
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))
        with pytest.raises(StageFailed, match=r"of blocks\.0\.mlp\.fc1 is not 2:4 on axis 0"):
            sparsity.reattach(model, manifest)

    def test_lost_weight_is_refused(self, vit):
        path, manifest = vit
        model = onnx.load(path)
        node = next(node for node in model.graph.node if node.name == manifest["weights"][1]["node"])
        node.input[1] = node.input[0]
        with pytest.raises(StageFailed, match=r"pruned layer blocks\.0\.attn\.proj has no constant weight"):
            sparsity.reattach(model, manifest)


def stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """As a tool leaves it that drops every annotation."""
    model = copy.deepcopy(model)
    for item in (model, model.graph, *model.graph.node, *model.graph.initializer):
        del item.metadata_props[:]
    return model
