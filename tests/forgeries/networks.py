"""Lies about weights, the ONNX graphs and their sparsity manifests."""

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from forgeries.bundle import DENSE_REASON, Draft, in_order, two_of_four
from forgeries.registry import fill_group, layer, lie, weights

# -------------------------------------------------------------------------------------------------------------- weights


@lie("weights", r"mix in weights/tuned has 1 groups along input channels that are not 2:4")
def a_pattern_lost_in_tuning(draft):
    weights(draft, "tuned")["mix.weight"] = fill_group(weights(draft, "tuned")["mix.weight"])


@lie("weights", r"fc in weights/pruned has 1 groups")
def a_pattern_that_pruning_never_made(draft):
    weights(draft, "pruned")["fc.weight"] = fill_group(weights(draft, "pruned")["fc.weight"])


@lie("weights", "groups along input channels")
def a_mask_on_the_wrong_axis(draft):
    for stage in ("pruned", "tuned"):
        dense = weights(draft, "dense")["mix.weight"]
        weights(draft, stage)["mix.weight"] = np.ascontiguousarray(two_of_four(dense.swapaxes(0, 1)).swapaxes(0, 1))


@lie("weights", "groups along input channels")
def a_mask_on_the_flattened_kernel(draft):
    for stage in ("pruned", "tuned"):
        dense = weights(draft, "dense")["mix.weight"]
        weights(draft, stage)["mix.weight"] = two_of_four(dense.reshape(8, -1)).reshape(dense.shape)


@lie("weights", "fc.weight is not finite everywhere")
def nan_in_a_pruned_weight(draft):
    w = weights(draft, "tuned")["fc.weight"]
    w[np.nonzero(w)[0][0], np.nonzero(w)[1][0]] = np.nan


@lie("weights", "head.bias is not finite everywhere")
def infinity_in_a_bias(draft):
    weights(draft, "pruned")["head.bias"][0] = np.inf


@lie("weights", "other tensors or shapes")
def a_tensor_that_appears_in_tuning(draft):
    weights(draft, "tuned")["fc.scale"] = np.ones(16, np.float32)


@lie("weights", "lists a layer twice")
def a_layer_twice(draft):
    draft.json["layers.json"].append(layer(draft, "fc"))


@lie("weights", "holds no gone.weight")
def a_layer_without_weights(draft):
    draft.json["layers.json"].append({**layer(draft, "fc"), "name": "gone"})


@lie("weights", r"stated is \[8, 16\]")
def a_layer_of_another_shape(draft):
    layer(draft, "fc")["shape"] = [8, 16]


@lie("weights", "claims the density 0.5")
def a_dense_layer_that_claims_to_be_half_empty(draft):
    layer(draft, "head")["density"] = 0.5


@lie("weights", "does not say why")
def a_dense_layer_without_a_reason(draft):
    layer(draft, "head")["reason"] = ""


@lie("weights", "states groups that break a pattern")
def a_dense_layer_with_bad_groups(draft):
    layer(draft, "head")["bad_groups"] = 3


@lie("weights", "keeps everything")
def a_pattern_that_keeps_everything(draft):
    layer(draft, "fc")["pattern"] = "4:4"


@lie("weights", "is no N:M pattern")
def a_pattern_that_is_none(draft):
    layer(draft, "fc")["pattern"] = "2:4:8"


@lie("weights", "don't fit along axis 1")
def a_pattern_that_does_not_fit(draft):
    layer(draft, "fc")["pattern"] = "2:3"


@lie("weights", "groups of 4 don't fit along axis 1")
def a_pattern_of_a_row(draft):
    draft.json["layers.json"].append({**layer(draft, "fc"), "name": "ln", "shape": [8], "macs": 8})


@lie("weights", "groups of 4 don't fit along axis 1")
def a_pattern_of_nothing(draft):
    for stage in ("dense", "pruned", "tuned"):
        weights(draft, stage)["none.weight"] = np.zeros((0, 8), np.float32)
    draft.json["layers.json"].append({**layer(draft, "fc"), "name": "none", "shape": [0, 8], "macs": 0})


@lie("weights", "stem is stated as linear, its weight is that of a conv2d")
def a_convolution_called_linear(draft):
    layer(draft, "stem")["kind"] = "linear"


@lie("weights", "mix: macs")
def fewer_operations(draft):
    layer(draft, "mix")["macs"] -= 1


@lie("graph:model.onnx", "is multiplied in 1 groups, layers.json has 2")
def groups_that_are_not_there(draft):
    layer(draft, "stem")["groups"] = 2


@lie("graph:model.onnx", "dense.onnx has opset 20, export.json says 21")
def another_opset_of_the_twin(draft):
    draft.json["export.json"]["files"]["dense.onnx"]["opset"] = 21


@lie("weights", "gives a reason why it is not")
def a_pruned_layer_with_a_reason(draft):
    layer(draft, "fc")["reason"] = DENSE_REASON


@lie("weights", "states 5 bad groups")
def a_pruned_layer_with_bad_groups_stated(draft):
    layer(draft, "fc")["bad_groups"] = 5


@lie("weights", "states the density 0.25")
def a_density_that_is_too_good(draft):
    layer(draft, "fc")["density"] = 0.25


@lie("weights", "field is missing")
def a_layer_without_a_pattern_field(draft):
    del layer(draft, "fc")["pattern"]


@lie("weights", "none of the 4 layers claims a pattern", "unchecked")
def nothing_pruned_at_all(draft):
    for name in ("mix", "fc"):
        layer(draft, name).update({"pattern": "", "reason": "too hard", "density": None})
    for file in ("model.onnx", "model.fp16.onnx"):
        draft.restate(everything_dense, file)


def everything_dense(manifest: dict[str, Any]) -> None:
    manifest["dense"] += [{**row, "reason": "too hard"} for row in manifest["weights"]]
    manifest["weights"] = []


# --------------------------------------------------------------------------------------------------- what was asked


@lie("layers", "fc stays dense, though the recipe asks to prune it and a pattern fits")
def a_layer_left_dense_for_no_reason(draft):
    layer(draft, "fc").update(pattern="", reason="It is too hard.", density=None)
    draft.restate(lambda m: m["dense"].append({**m["weights"].pop(), "reason": "too hard"}))


@lie("layers", "mix stays dense")
def a_folded_layer_left_dense_for_no_reason(draft):
    layer(draft, "mix").update(pattern="", reason="It is too hard.", density=None)


@lie("layers", "mix stays dense")
def the_second_layer_passed_off_as_the_stem(draft):
    layer(draft, "stem").update(positions=0, macs=0)
    layer(draft, "mix").update(pattern="", reason="It is the stem.", density=None)


@lie("layers", "fc stays dense")
def a_layer_said_to_be_never_called(draft):
    layer(draft, "fc").update(pattern="", reason="It is never called.", density=None, positions=0)


@lie("layers", "head stays dense")
def a_head_that_the_recipe_wants_pruned(draft):
    draft.ask("prune", keep_head_dense=False)


@lie("layers", "mix stays dense")
def a_second_stem(draft):
    layer(draft, "mix").update(pattern="", reason="It is the stem.", density=None)
    draft.ask("prune", keep_stem_dense=False, skip=["stem"])


@lie("layers", "fc stays dense, .* multiplies by something else|fc is dense and the graph multiplies", "unchecked")
def a_layer_whose_weight_is_computed(draft):
    layer(draft, "fc").update(pattern="", reason="Its weight is computed.", density=None)
    draft.set_constant("val_0", 2 * weights(draft, "tuned")["fc.weight"].T)
    draft.set_constant("val_0", 2 * weights(draft, "tuned")["fc.weight"].T.astype(np.float16), "model.fp16.onnx")


@lie("layers", r"fc has shape \(16, 8\) in weights/dense, stated is \[16, 6\]")
def a_shape_that_no_pattern_fits(draft):
    layer(draft, "fc").update(pattern="", reason="Its 6 inputs don't fit.", density=None, shape=[16, 6])


@lie("layers", "fc has another pattern than the recipe's 2:4")
def another_pattern_than_asked(draft):
    layer(draft, "fc")["pattern"] = "4:8"


@lie("layers", "head.weight is not the dense one, and belongs to no layer that is pruned")
def a_dense_layer_that_was_changed(draft):
    weights(draft, "pruned")["head.weight"][0, 0] += 1


@lie("layers", "norm.bias is not the dense one")
def a_norm_that_was_changed(draft):
    weights(draft, "pruned")["norm.bias"][0] += 1


@lie("layers", "far.running_mean is not the dense one")
def statistics_of_a_norm_behind_no_pruned_layer(draft):
    for at, stage in enumerate(("dense", "pruned", "tuned")):
        weights(draft, stage)["far.running_mean"] = np.full(5, float(at), np.float32)


@lie("layers", "extra.weight is not the dense one")
def a_weight_that_no_layer_lists_was_changed(draft):
    for at, stage in enumerate(("dense", "pruned", "tuned")):
        weights(draft, stage)["extra.weight"] = np.full((4, 8), float(at), np.float32)
    draft.ask("prune", reconstruct=10)


@lie("layers", "has or lacks extra.weight")
def a_tensor_that_appears_in_pruning(draft):
    weights(draft, "pruned")["extra.weight"] = np.zeros((4, 8), np.float32)


@lie("layers", "the graph multiplies by fc.weight, which layers.json leaves out", "unchecked")
def a_layer_that_layers_json_leaves_out(draft):
    draft.json["layers.json"] = [row for row in draft.json["layers.json"] if row["name"] != "fc"]
    dense = in_order(weights(draft, "dense"))
    weights(draft, "pruned").update({name: dense[name] for name in ("fc.weight", "fc.bias")})


@lie("layers", "fc.(weight|bias) is not the dense one")
def a_pruned_layer_that_layers_json_leaves_out(draft):
    draft.json["layers.json"] = [row for row in draft.json["layers.json"] if row["name"] != "fc"]


@lie("layers", "nothing was tuned, and fc.bias is not the pruned one")
def tuning_that_is_kept_quiet(draft):
    draft.ask("tune", epochs=0)


@lie("layers", "the layers have 352 zeros, the recipe's sparsity 0.9 asks for")
def fewer_zeros_than_asked(draft):
    anywhere(draft, 0.9)


def anywhere(draft: Draft, sparsity: float) -> None:
    """Call the pruned layers' zeros unstructured, in recipe, layers and graphs."""
    draft.ask("prune", pattern="unstructured", sparsity=sparsity)
    for name in ("mix", "fc"):
        zeros = int((weights(draft, "pruned")[f"{name}.weight"] == 0).sum())
        layer(draft, name).update(pattern="unstructured", zeros=zeros)
    for file in ("model.onnx", "model.fp16.onnx"):
        draft.restate(everything_dense, file)


@lie("weights", "mix in weights/pruned has 288 zeros, stated are 289")
def a_zero_that_is_not_there(draft):
    anywhere(draft, 0.5)
    layer(draft, "mix")["zeros"] += 1


@lie("graph:model.onnx", "has 63 zeros, stated are 64")
def a_zero_lost_in_the_export(draft):
    anywhere(draft, 0.5)
    array = weights(draft, "tuned")["fc.weight"].T.copy()
    array[tuple(np.argwhere(array == 0)[0])] = 1.0
    draft.set_constant("val_0", array)


# ------------------------------------------------------------------------------------------------------------- orders


def folded(draft: Draft, at: int) -> dict[str, Any]:
    return draft.json["orders.json"]["folded"][at]


@lie("orders", "the order for stem -> mix is no permutation of its 8 channels")
def an_order_that_is_no_permutation(draft):
    folded(draft, 0)["order"][0] = 0


@lie("orders", "no permutation of its 8 channels")
def an_order_of_fractions(draft):
    folded(draft, 0)["order"] = [float(i) for i in folded(draft, 0)["order"]]


@lie("orders", "no permutation of its 8 channels")
def an_order_cut_short(draft):
    folded(draft, 0)["order"].pop()


@lie("orders", "don't divide into 0 blocks")
def no_blocks(draft):
    folded(draft, 0)["coupling"]["blocks"] = 0


@lie("orders", "don't divide into 3 blocks")
def blocks_of_no_size(draft):
    folded(draft, 0)["coupling"]["blocks"] = 3


@lie("orders", "moves a channel out of its block")
def an_order_across_heads(draft):
    folded(draft, 0)["coupling"]["blocks"] = 4


@lie("orders", "moves the same channels of a tensor twice")
def an_order_folded_twice(draft):
    folded(draft, 0)["coupling"]["consumers"] *= 2


@lie("orders", "moves the tensor gone.weight, which weights/dense does not hold")
def an_order_of_a_tensor_that_is_not_there(draft):
    folded(draft, 0)["coupling"]["consumers"][0]["tensor"] = "gone.weight"


@lie("orders", r"moves channels 4 to 12 on axis 1 of mix.weight, of shape \(8, 8, 3, 3\)")
def an_order_beyond_the_end(draft):
    folded(draft, 0)["coupling"]["consumers"][0]["start"] = 4


@lie("orders", "on axis 5 of mix.weight")
def an_order_of_an_axis_that_is_not_there(draft):
    folded(draft, 0)["coupling"]["consumers"][0]["axis"] = 5


@lie("orders", "says that 2 orders were folded and lists 1")
def an_order_left_out(draft):
    draft.json["orders.json"]["folded"].pop()


@lie("layers", "stem.bias is not the dense one")
def an_order_left_out_everywhere(draft):
    draft.json["orders.json"]["folded"].pop(0)
    draft.json["orders.json"]["tried"].pop(0)


@lie("layers", "stem.bias is not the dense one")
def another_order_than_the_one_folded(draft):
    folded(draft, 0)["order"].reverse()


@lie("orders", "there is no orders.json", "unchecked")
def no_orders(draft):
    del draft.json["orders.json"]


# --------------------------------------------------------------------------------------------------- mixed patterns


def mixed(draft: Draft) -> dict[str, Any]:
    """Make the recipe one of mixed patterns, of which the ranking chose what the layers have."""
    allocate = {"patterns": ["2:4", "3:4"], "ranking": "error", "unit": "weights", "budget": 0.6}
    draft.ask("prune", pattern="mixed", allocate=allocate)
    sizes = {"mix": 576, "fc": 128}
    layers = {
        name: [
            {"pattern": pattern, "cost": round(size * share), "error": error}
            for pattern, share, error in (("", 1.0, 0.0), ("2:4", 0.5, 0.2), ("3:4", 0.75, 0.1))
        ]
        for name, size in sizes.items()
    }
    chosen = {"mix": "2:4", "fc": "2:4"}
    rankings = [{"ranking": name, "chosen": dict(chosen), "cost": 352, "measured": 0.4} for name in ("error", "edge")]
    made = {"ranking": "error", "unit": "weights", "dense": 704, "budget": 422, "layers": layers, "rankings": rankings}
    draft.json["allocation.json"] = made
    return made


@lie("allocation", "of another recipe")
def another_ranking_than_asked(draft):
    mixed(draft)["ranking"] = "edge"


@lie("allocation", "of another recipe")
def another_unit_than_asked(draft):
    mixed(draft)["unit"] = "macs"


@lie("allocation", "the choices of fc leave out dense")
def dense_is_no_choice(draft):
    mixed(draft)["layers"]["fc"].pop(0)


@lie("allocation", "fc may be 1:4, which nobody asked for")
def a_choice_nobody_asked_for(draft):
    mixed(draft)["layers"]["fc"].append({"pattern": "1:4", "cost": 32, "error": 0.9})


@lie("allocation", "the cost of fc as 2:4")
def a_cheaper_choice(draft):
    mixed(draft)["layers"]["fc"][1]["cost"] -= 1


@lie("allocation", "the cost of the dense layers")
def a_cheaper_dense_network(draft):
    mixed(draft)["dense"] -= 1


@lie("allocation", "the budget is stated as 500")
def a_larger_budget(draft):
    mixed(draft)["budget"] = 500


@lie("allocation", "do not have the patterns that the ranking chose")
def another_choice(draft):
    mixed(draft)["rankings"][0]["chosen"]["fc"] = "3:4"


@lie("allocation", "a layer that had no choice is pruned")
def a_layer_without_a_choice(draft):
    made = mixed(draft)
    del made["layers"]["fc"]
    made.update(dense=576, budget=346)
    for row in made["rankings"]:
        del row["chosen"]["fc"]


@lie("allocation", "the cost of the ranking edge")
def a_cheaper_ranking(draft):
    mixed(draft)["rankings"][1]["cost"] -= 1


@lie("allocation", "the error of the ranking edge")
def a_better_ranking(draft):
    mixed(draft)["rankings"][1]["measured"] *= 0.5


@lie("allocation", "over the budget")
def a_ranking_over_its_budget(draft):
    made = mixed(draft)
    made["rankings"][1].update(chosen={"mix": "3:4", "fc": "2:4"}, cost=496, measured=0.3)


@lie("allocation", "there is no allocation.json", "unchecked")
def no_allocation(draft):
    mixed(draft)
    del draft.json["allocation.json"]


@lie("layers", "stem stays dense")
def a_layer_without_a_choice_that_fits(draft):
    mixed(draft)
    draft.ask("prune", keep_stem_dense=False)


# -------------------------------------------------------------------------------------------------- manifest and graphs


@lie("sidecar", "is not the metadata")
def an_edited_sidecar(draft):
    draft.json["sparsity.json"]["weights"][0]["layer"] = "other"


@lie("sidecar", "carries no metadata")
def metadata_dropped(draft):
    helper.set_model_props(draft.onnx["model.onnx"], {})


@lie("graph:model.onnx", "metadata mpdeploy.sparsity of model.onnx is not strict JSON")
def metadata_that_is_no_json(draft):
    helper.set_model_props(draft.onnx["model.onnx"], {"mpdeploy.sparsity": "{"})


@lie("graph:model.onnx", "has its inputs along axis 0, listed is axis 1")
def an_edited_axis(draft):
    draft.restate(lambda m: m["weights"][1].update(axis=1))


@lie("graph:model.onnx", "node_head multiplies by head.weight, which the sparsity manifest does not list")
def a_dense_layer_hidden_from_the_manifest(draft):
    draft.restate(lambda m: m["dense"].pop())


@lie("graph:model.onnx", "node_head multiplies by head.weight")
def a_dense_layer_hidden_everywhere(draft):
    draft.json["layers.json"] = [row for row in draft.json["layers.json"] if row["name"] != "head"]
    draft.restate(lambda m: m["dense"].pop())


@lie("graph:model.onnx", "multiplies by head.weight")
def a_hidden_layer_behind_a_transpose(draft):
    graph = draft.onnx["model.onnx"].graph
    node = next(node for node in graph.node if node.name == "node_head")
    node.input[1] = "turned"
    node.attribute[0].i = 0
    place = list(graph.node).index(node)
    graph.node.insert(place, helper.make_node("Transpose", ["same"], ["turned"], name="turn", perm=[1, 0]))
    graph.node.insert(place, helper.make_node("Identity", ["head.weight"], ["same"], name="copy"))
    draft.restate(lambda m: m["dense"].pop())


@lie("graph:model.onnx", "layers.json claims a pattern")
def a_sparse_layer_passed_off_as_dense(draft):
    draft.restate(lambda m: m["dense"].append({**m["weights"].pop(), "reason": "too hard"}))


@lie("graph:model.onnx", "head.weight .* is listed as dense")
def a_dense_weight_without_a_reason(draft):
    draft.restate(lambda m: m["dense"][1].update(reason=""))


@lie("graph:model.onnx", "fc is missing from the manifest")
def a_sparse_layer_under_another_name(draft):
    draft.restate(lambda m: m["dense"].append({**m["weights"].pop(), "reason": "too hard", "layer": "other"}))


@lie("graph:model.onnx", "has the SHA-256")
def a_weight_with_another_hash(draft):
    draft.restate(lambda m: m["weights"][0].update(sha256="0" * 64))


@lie("graph:model.onnx", "is not what the Conv node node_stem multiplies by")
def a_weight_of_another_node(draft):
    draft.restate(lambda m: m["weights"][0].update(node="node_stem"))


@lie("graph:model.onnx", "has no constant ghost")
def a_weight_that_is_not_there(draft):
    draft.restate(lambda m: m["weights"][0].update(initializer="ghost"))


@lie("graph:model.onnx", r"listed is \[16, 8\]")
def a_weight_of_another_shape(draft):
    draft.restate(lambda m: m["weights"][1].update(shape=[16, 8]))


@lie("graph:model.onnx", "is float32, listed is float16")
def a_weight_of_another_type(draft):
    draft.restate(lambda m: m["weights"][0].update(dtype="float16"))


@lie("graph:model.onnx", "states the density 0.25")
def a_weight_of_another_density(draft):
    draft.restate(lambda m: m["weights"][0].update(density=0.25))


@lie("graph:model.onnx", "claims 1:4, layers.json '2:4'")
def a_weight_of_another_pattern(draft):
    draft.restate(lambda m: m["weights"][0].update(pattern="1:4"))


@lie("graph:model.onnx", "twice")
def a_weight_listed_twice(draft):
    draft.restate(lambda m: m["weights"].append(m["weights"][0]))


@lie("graph:model.onnx", "has 1 groups along axis 0 that are not 2:4")
def a_pattern_lost_in_the_export(draft):
    draft.set_constant("val_0", fill_group(weights(draft, "tuned")["fc.weight"]).T)


@lie("graph:model.fp16.onnx", "is not finite everywhere")
def an_overflow_in_half_precision(draft):
    array = weights(draft, "tuned")["head.weight"].astype(np.float16)
    array[0, 0] = np.inf
    draft.set_constant("head.weight", array, "model.fp16.onnx")


@lie("graph:model.onnx", "a sub-graph in the node branch", "unchecked")
def weights_in_a_sub_graph(draft):
    graph = draft.onnx["model.onnx"].graph
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])])
    graph.node.append(helper.make_node("If", ["c"], ["x2"], name="branch", then_branch=body, else_branch=body))


@lie("graph:model.onnx", "model-local functions", "unchecked")
def weights_in_a_function(draft):
    draft.onnx["model.onnx"].functions.add(name="f", domain="d")


@lie("graph:model.onnx", "LayerNormalization nodes, not 2")
def a_layer_norm_that_fell_apart(draft):
    draft.json["export.json"]["files"]["model.onnx"]["layer_norm_ops"] = 2


@lie("graph:model.onnx", "has opset 20, export.json says 21")
def another_opset(draft):
    draft.json["export.json"]["files"]["model.onnx"]["opset"] = 21


@lie("graph:model.onnx", "its name and export.json say fp32 and fp16")
def another_precision_in_the_export_s_facts(draft):
    draft.json["export.json"]["files"]["model.onnx"]["precision"] = "fp16"


@lie("export:model.onnx", "lists no sparse weight", "unchecked")
def nothing_sparse_to_export(draft):
    nothing_pruned_at_all(draft)


@lie("graph:model.fp16.onnx", "multiplies by weights of")
def single_precision_sold_as_half(draft):
    draft.onnx["model.fp16.onnx"] = draft.onnx["model.onnx"]


@lie("graph:model.onnx", "has other operators than")
def a_twin_with_more_work_to_do(draft):
    draft.onnx["dense.onnx"].graph.node.append(helper.make_node("Relu", ["logits"], ["more"], name="more"))


@lie("graph:model.onnx", "weights of other shapes")
def a_twin_with_wider_layers(draft):
    tensor = next(t for t in draft.onnx["dense.onnx"].graph.initializer if t.name == "val_0")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 64), np.float32), "val_0"))


@lie("graph:model.onnx", "there is no dense.onnx", "unchecked")
def a_twin_that_is_not_there(draft):
    del draft.onnx["dense.onnx"]


# --------------------------------------------------------------------------------------- exported and certified weights


@lie("export:model.onnx", r"val_0 is not the certified fc.weight")
def a_weight_edited_in_the_graph_only(draft):
    array = weights(draft, "tuned")["fc.weight"].copy()
    array[np.nonzero(array)[0][3], np.nonzero(array)[1][3]] *= 1.5
    draft.set_constant("val_0", array.T)


@lie("export:model.onnx", "differs from head.weight|is not the certified head.weight")
def a_dense_weight_edited_in_the_graph_only(draft):
    array = weights(draft, "tuned")["head.weight"].copy()
    array[0, 0] += 0.5
    draft.set_constant("head.weight", array)


@lie("export:model.fp16.onnx", "is not the certified fc.weight")
def a_half_precision_weight_edited(draft):
    array = weights(draft, "tuned")["fc.weight"].T.astype(np.float16)
    array[np.nonzero(array)[0][0], np.nonzero(array)[1][0]] *= np.float16(1.5)
    draft.set_constant("val_0", array, "model.fp16.onnx")


@lie("export:model.onnx", "no BatchNorm of weights/tuned explains")
def a_channel_scaled_as_if_a_norm_had_done_it(draft):
    array = numpy_helper.to_array(draft.constant("mix.weight")).copy()
    array[3] *= 1.1
    draft.set_constant("mix.weight", array)


@lie("export:model.onnx", "no BatchNorm of weights/tuned explains")
def zeros_moved_within_the_pattern(draft):
    array = numpy_helper.to_array(draft.constant("mix.weight")).copy()
    array[0, :4, 0, 0] = array[0, [1, 2, 3, 0], 0, 0]
    draft.set_constant("mix.weight", array)


@lie("export:model.onnx", "the constant fc.bias is not the one in weights/tuned")
def a_bias_edited_in_the_graph_only(draft):
    draft.set_constant("fc.bias", weights(draft, "tuned")["fc.bias"] + np.float32(1))


@lie("export:model.onnx", "the bias of mix is not the one that norm folded in gives")
def a_folded_bias_edited(draft):
    array = numpy_helper.to_array(draft.constant("mix.weight_bias")) + np.float32(0.5)
    draft.set_constant("mix.weight_bias", array)


@lie("export:model.onnx", "there is no node node_gone")
def a_folded_weight_of_a_node_that_is_not_there(draft):
    draft.restate(lambda m: m["weights"][0].update(node="node_gone"))


@lie("export:model.onnx", "the bias of mix is not the one")
def a_folded_bias_left_out(draft):
    node = next(node for node in draft.onnx["model.onnx"].graph.node if node.name == "node_mix")
    node.input.pop()


@lie("export:model.onnx", "a permutation that is none")
def a_permutation_that_is_none(draft):
    draft.restate(lambda m: m["weights"][1].update(permutation=[0, 0, 2, 3, 4, 5, 6, 7]))


@lie("export:model.onnx", "is not the certified fc.weight")
def a_permutation_that_was_not_made(draft):
    draft.restate(lambda m: m["weights"][1].update(permutation=[1, 0, 2, 3, 4, 5, 6, 7]))


@lie("export:model.onnx", r"has shape \(12, 16\), the certified fc.weight \(16, 8\)")
def a_weight_of_another_layer(draft):
    draft.restate(lambda m: m["dense"][1].update(layer="fc"))
    layer(draft, "fc").update(pattern="", reason="x", density=None)


@lie("export:model.onnx", "belongs to no tensor", "unchecked")
def a_weight_out_of_nowhere(draft):
    array = numpy_helper.to_array(draft.constant("head.weight"))
    draft.set_constant("head.weight", array + 1)
    draft.restate(lambda m: m["dense"][1].update(layer="elsewhere", reason="x"))


@lie("export:model.onnx", "computed from it, or edited", "unchecked")
def a_dense_weight_edited_under_a_new_name(draft):
    array = numpy_helper.to_array(draft.constant("head.weight")) + 1
    draft.constant("head.weight").CopyFrom(numpy_helper.from_array(array, "val_9"))
    node = next(node for node in draft.onnx["model.onnx"].graph.node if node.name == "node_head")
    node.input[1] = "val_9"
    draft.restate(lambda m: m["dense"][1].update(initializer="val_9"))
    draft.set_constant("val_9", array)
