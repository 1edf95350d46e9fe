"""Lies about engines, gates and the verdict, and one forgery of the whole chain."""

import numpy as np

from forgeries.bundle import CPU, GPU, INT8, Draft, annotate, embedded, make_onnx
from forgeries.registry import certificate, drop_gates, engine_json, fail_a_gate, latency, lie, lock, samples, weights

# -------------------------------------------------------------------------------------------------------------- engines


@lie("engines", "gives another sha256", rebind=False)
def an_engine_file_swapped(draft):
    draft.raw[f"engines/{GPU}/model.engine"] = b"another engine"
    engine_json(draft, GPU)["size"] = 14


@lie("engines", "gives another size", rebind=False)
def an_engine_of_another_size(draft):
    engine_json(draft, GPU)["size"] = 1


@lie("engines", "names the file ../../model.onnx, which is not there")
def an_engine_outside_of_its_folder(draft):
    engine_json(draft)["file"] = "../../model.onnx"


@lie("engines", "is of schema 2")
def an_engine_of_another_schema(draft):
    engine_json(draft)["schema"] = 2


@lie("engines", "was asked for int8 and is fp32")
def a_silent_fallback(draft):
    engine_json(draft)["asked"]["precision"] = "int8"


@lie("engines", "holds the engine")
def an_engine_under_another_name(draft):
    engine_json(draft)["id"] = "onnxruntime-cpu-int8"


@lie("engines", "holds the engine")
def a_precision_that_is_not_in_the_name(draft):
    engine_json(draft, GPU)["precision"] = "int8"


@lie("engines", "has the weights dense")
def a_dense_engine_sold_as_sparse(draft):
    engine_json(draft)["weights"] = "dense"


@lie("engines", "differ in batch")
def a_twin_built_for_another_batch(draft):
    engine_json(draft, f"{CPU}.dense")["batch"] = [1, 1, 1]


@lie("engines", "differ in threads")
def a_twin_with_fewer_threads(draft):
    engine_json(draft)["threads"] = 4
    latency(draft)["threads"] = 4


@lie("engines", "its dense twin are not both there")
def an_engine_without_a_twin(draft):
    del draft.json[f"engines/{GPU}.dense/engine.json"], draft.raw[f"engines/{GPU}.dense/model.engine"]


@lie("engines", "is only in one of engines/ and results.json")
def an_engine_nobody_asked_for(draft):
    draft.json["engines/extra-cpu-fp32/engine.json"] = engine_json(draft)


@lie("engines", "stores its matrices as float16")
def another_precision_than_asked(draft):
    draft.onnx[f"engines/{CPU}/model.onnx"] = draft.onnx["model.fp16.onnx"]


@lie("engines", "does not know")
def a_precision_nobody_knows(draft):
    for name in (CPU, f"{CPU}.dense"):
        old, new = f"engines/{name}", f"engines/{name.replace('fp32', 'fp8')}"
        manifest = draft.json.pop(f"{old}/engine.json")
        manifest |= {"id": manifest["id"].replace("fp32", "fp8"), "precision": "fp8", "asked": {"precision": "fp8"}}
        draft.json[f"{new}/engine.json"] = manifest
        draft.onnx[f"{new}/model.onnx"] = draft.onnx.pop(f"{old}/model.onnx")
    draft.engine()["id"] = CPU.replace("fp32", "fp8")


@lie("engines", "stores its matrices as float32")
def integers_that_are_floats(draft):
    draft.onnx[f"engines/{INT8}/model.onnx"] = draft.onnx["model.onnx"]


@lie("engines", f"{CPU} was built from dense.onnx, not from model.onnx")
def an_engine_of_the_dense_network(draft):
    engine_json(draft)["source"]["file"] = "dense.onnx"


@lie("engines", "built from another model.fp16.onnx than the bundle's", rebind=False)
def an_engine_of_another_export(draft):
    engine_json(draft, GPU)["source"]["onnx"] = "0" * 64


@lie("engines", "was not built from engines/.*/quantised.onnx", rebind=False)
def an_engine_of_another_quantisation(draft):
    engine_json(draft, INT8)["source"]["quantised"] = "0" * 64


@lie("engines", "was not built from engines/.*/quantised.onnx", rebind=False)
def a_quantised_graph_that_is_not_there(draft):
    del draft.onnx[f"engines/{INT8}/quantised.onnx"]
    engine_json(draft, INT8)["source"]["quantised"] = None


@lie("engines", "there is no engine", "unchecked")
def no_engine_at_all(draft):
    for files in (draft.json, draft.onnx, draft.raw):
        for name in [name for name in files if name.startswith("engines/")]:
            del files[name]


# ---------------------------------------------------------------------------------------------------------------- gates


@lie("verdict", "the gate min_speedup is missing in verdict.json")
def a_dropped_gate(draft):
    rows = draft.json["verdict.json"]["gates"]
    draft.json["verdict.json"]["gates"] = [row for row in rows if row["name"] != "min_speedup"]


@lie("verdict", "the gate min_agreement: limit")
def a_gate_relaxed_in_the_verdict(draft):
    draft.gate("min_agreement")["limit"] = 0.1


@lie("policy", "gates.min_agreement is 0.5 in recipe.toml, 0.1 in recipe.lock.json")
def a_gate_relaxed_in_the_lock(draft):
    lock(draft)["gates"]["min_agreement"] = 0.1
    draft.rederive()


@lie("policy", "gates.min_agreement is 0.5 in recipe.toml, None in recipe.lock.json")
def a_gate_lost_on_the_way(draft):
    lock(draft)["gates"]["min_agreement"] = None
    draft.rederive()


@lie("policy", "gates.max_violations is None in recipe.toml, 0 in recipe.lock.json")
def a_gate_the_user_never_asked_for(draft):
    draft.raw["recipe.toml"] = draft.raw["recipe.toml"].replace(b"max_violations = 0", b"")


@lie("policy", r"prune.skip is \[\] in recipe.toml, \['fc'\] in recipe.lock.json")
def a_layer_skipped_in_the_lock_only(draft):
    lock(draft)["prune"]["skip"] = ["fc"]


@lie("policy", "prune.keep_stem_dense is True in recipe.toml, 1 in recipe.lock.json")
def a_number_for_a_truth_value(draft):
    lock(draft)["prune"]["keep_stem_dense"] = 1


@lie("policy", r"build.engines\[1\].precision is int8 in recipe.toml, fp32 in recipe.lock.json")
def another_engine_than_asked(draft):
    lock(draft)["build"]["engines"][1]["precision"] = "fp32"


@lie("policy", "build.engines is .* in recipe.toml")
def an_engine_more_than_asked(draft):
    lock(draft)["build"]["engines"].append({})


@lie("policy", "name is small in recipe.toml, tiny in recipe.lock.json")
def an_override_that_was_not_applied(draft):
    lock(draft)["sets"] = ["name=small"]


@lie("policy", "there is no recipe.toml", "unchecked")
def no_recipe(draft):
    del draft.raw["recipe.toml"]


@lie("policy", "wrong kind")
def a_recipe_that_is_no_toml(draft):
    draft.raw["recipe.toml"] = b"[gates"


@lie("verdict", "the gate extra is not in the recipe")
def a_gate_invented(draft):
    draft.json["verdict.json"]["gates"].append({**draft.gate("min_agreement"), "name": "extra"})


@lie("verdict", "lists a gate twice")
def a_gate_twice(draft):
    draft.json["verdict.json"]["gates"].append(draft.gate("min_agreement"))


@lie("verdict", "the gate max_accuracy_drop: measured")
def a_smaller_drop(draft):
    draft.gate("max_accuracy_drop")["measured"] = 0.0


@lie("verdict", "the gate min_certified: low")
def a_gate_with_another_interval(draft):
    draft.gate("min_certified")["low"] += 0.05


@lie("verdict", "stated without an interval")
def a_ratio_without_an_interval(draft):
    latency(draft)["ratio"]["low"] = None


@lie("verdict", "stated without an interval")
def a_ratio_without_an_upper_end(draft):
    latency(draft)["ratio"]["high"] = None


@lie("verdict", "is stated as holds, it is refuted")
def a_failed_gate_that_is_said_to_hold(draft):
    fail_a_gate(draft)
    draft.gate("min_agreement")["verdict"] = "holds"


@lie("verdict", "says holds, its gates give refuted")
def a_good_end_to_a_failed_gate(draft):
    fail_a_gate(draft)
    draft.json["verdict.json"]["verdict"] = "holds"


@lie("gate:min_agreement", "the limit is 0.999")
def an_honest_failure_is_a_failure(draft):
    fail_a_gate(draft)


@lie("gate:min_speedup", "the limit is 1.5")
def an_honest_slow_engine(draft):
    draft.ask("gates", min_speedup=1.5)
    draft.rederive()


@lie("gate:min_speedup", "the limit is 1.2", "unchecked")
def an_honest_doubt(draft):
    draft.ask("gates", min_speedup=1.2)
    draft.rederive()


@lie("gate:min_speedup", "nothing was measured", "unchecked")
def a_speedup_nobody_measured(draft):
    draft.engine()["latency"] = None
    del samples(draft)[f"latency.{CPU}"], samples(draft)[f"latency.{CPU}.dense"]
    draft.gate("min_speedup").update(measured=None, low=None, high=None, verdict="unchecked")
    draft.json["verdict.json"]["verdict"] = "unchecked"


@lie("gate:max_violations", "nothing was measured", "unchecked")
def nothing_certified_so_nothing_violated(draft):
    for name in ("pruned", "tuned"):
        draft.full["ledger"][name] = -draft.full["ledger"]["dense"]
    draft.ask("gates", min_certified=0.0)
    draft.rederive()


@lie("gate:batch_consistent", "is not batch_consistent")
def an_inconsistent_engine_that_holds(draft):
    draft.engine()["batch_consistent"] = False


@lie("verdict", "the gate finite is missing")
def a_broken_engine_that_holds(draft):
    draft.full["samples"][f"engine.{CPU}"][0] = np.nan
    draft.rederive()
    draft.json["verdict.json"]["gates"] = [
        row for row in draft.json["verdict.json"]["gates"] if row["name"] != "finite"
    ]


@lie("verdict", "releases tensorrt_rtx-sm80-fp16, the recipe judges")
def another_engine_released(draft):
    draft.json["verdict.json"]["deploy"] = GPU


@lie("verdict", "which results.json does not know")
def an_unknown_engine_released(draft):
    draft.ask("validate", deploy="ghost")


@lie("gate:min_agreement", "was not run: There is no GPU here", "unchecked")
def an_engine_released_unseen(draft):
    draft.ask("validate", deploy=GPU)
    draft.rederive()


@lie("gate:min_beauty", "does not know the gate", "unchecked")
def an_unknown_gate(draft):
    draft.ask("gates", min_beauty=1.0)
    draft.json["verdict.json"]["gates"].append({**draft.gate("min_agreement"), "name": "min_beauty", "limit": 1.0})


@lie("verdict", "the recipe asks for no gate", "unchecked")
def no_gate_at_all(draft):
    drop_gates(draft, *lock(draft)["gates"])


@lie("verdict", "there is no verdict.json", "unchecked")
def no_verdict(draft):
    del draft.json["verdict.json"]


# ------------------------------------------------------------------------------------------------------ the whole chain


@lie("digest", "expected was", expected=True)
def a_chain_hashed_anew(draft: Draft) -> None:
    """Change the tuned weights and every file that follows from them, hash all of it again; nothing disagrees.

    Only somebody who knows the digest from elsewhere can tell.
    """
    state = weights(draft, "tuned")
    state["fc.bias"] = state["fc.bias"] + np.float32(1)
    for file, kind in (("model.onnx", np.float32), ("model.fp16.onnx", np.float16)):
        draft.onnx[file] = make_onnx(state, kind)
        annotate(draft.onnx[file])
    draft.onnx[f"engines/{CPU}/model.onnx"] = draft.onnx["model.onnx"]
    draft.json["sparsity.json"] = embedded(draft.onnx["model.onnx"])
    draft.rederive()


@lie("verdict", "41 of 40 at confidence 0.95 has no interval")
def more_certified_than_there_are(draft):
    certificate(draft)["counts"]["certified"] = 41


@lie("verdict", "a gate is unknown to this checker", "unchecked")
def a_verdict_on_an_unknown_gate(draft):
    an_unknown_gate(draft)
