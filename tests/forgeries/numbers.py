"""Lies about images, what the certificate is bound to, the ledger, the results and the latencies."""

import numpy as np

from forgeries.bundle import CLASSES, CPU, GPU, INT8, Draft
from forgeries.registry import certificate, drop_gates, latency, ledger, lie, lock, samples, weights

# ---------------------------------------------------------------------------------------------------------------- ids


@lie("ids", "1 images are calibration and validation samples, val/3 for one")
def a_calibration_image_from_validation(draft):
    draft.json["calibration.json"]["calibration_ids"][0] = "val/3"


@lie("ids", "images are certification and validation samples")
def a_certification_image_from_validation(draft):
    draft.json["calibration.json"]["certification_ids"][0] = "val/3"
    draft.rederive()


@lie("ids", "images are calibration and certification samples")
def a_certification_image_from_calibration(draft):
    draft.json["calibration.json"]["certification_ids"][0] = "train/3"
    draft.rederive()


@lie("ids", "twice among the validation ids")
def one_validation_image_many_times(draft):
    draft.json["calibration.json"]["validation_ids"][0] = "val/3"


@lie("ids", "no calibration image is named", "unchecked")
def no_calibration_ids(draft):
    draft.json["calibration.json"]["calibration_ids"] = []


@lie("ids", "not from train")
def calibration_on_the_validation_split(draft):
    draft.json["calibration.json"]["split"] = "val"


# -------------------------------------------------------------------------------------------------------------- binds


@lie("binds", "certificate is of other tuned weights", rebind=False)
def a_certificate_of_other_weights(draft):
    weights(draft, "tuned")["fc.bias"] = weights(draft, "tuned")["fc.bias"] + 1


@lie("binds", "another preprocessing", rebind=False)
def another_preprocessing(draft):
    draft.json["preprocessing.json"]["mean"] = [0.4]


@lie("binds", "digest of its ids", rebind=False)
def ids_put_into_another_order(draft):
    ids = draft.json["calibration.json"]["certification_ids"]
    ids[0], ids[1] = ids[1], ids[0]


@lie("binds", "names no version, or no device")
def a_certificate_of_no_device(draft):
    certificate(draft)["binds"]["device"] = ""


@lie("binds", "names no version, or no device")
def a_certificate_of_no_version(draft):
    certificate(draft)["binds"]["versions"] = {}


@lie("binds", "another version of numpy")
def a_certificate_of_another_version(draft):
    certificate(draft)["binds"]["versions"]["numpy"] = "1.26.4"


@lie("binds", "not what the recipe asks for")
def a_certificate_in_half_precision(draft):
    certificate(draft)["binds"]["precision"] = "float16"


@lie("binds", "not what the recipe asks for")
def a_certificate_of_another_batch(draft):
    certificate(draft)["binds"]["batch"] = 1


@lie("binds", "measured against another certificate", rebind=False)
def another_certificate(draft):
    certificate(draft)["zero_budget"] = {}


@lie("binds", "measured with other exports", rebind=False)
def an_export_nobody_measured(draft):
    draft.onnx["other.onnx"] = draft.onnx["model.onnx"]


@lie("binds", "^model.onnx was rebuilt since it was measured.*don't transfer", rebind=False)
def a_graph_rebuilt(draft):
    draft.onnx["model.onnx"].producer_name = "another exporter"


@lie("binds", "binds other engines than", rebind=False)
def a_twin_left_out_of_what_was_measured(draft):
    del draft.json["results.json"]["binds"]["engines"][f"{CPU}.dense"]


@lie(
    "binds",
    rf"engines/{GPU}/model.engine was rebuilt since it was measured.*\(L0\).*\(L5\) don't transfer",
    rebind=False,
)
def an_engine_rebuilt(draft):
    bound = draft.json["results.json"]["binds"]
    draft.raw[f"engines/{GPU}/model.engine"] = b"built again, with another tactic"
    draft.rebind()
    draft.json["results.json"]["binds"] = bound


# ------------------------------------------------------------------------------------------- the ledger's own columns


@lie("ledger", "eps of the stage pruned is not what the logits give")
def an_edited_dense_logit(draft):
    ledger(draft)["logits"][0, 0, 0] += 30


@lie("ledger", "1 verdicts are not what the logits give, first for the sample train/105")
def a_flip_sold_as_certified(draft):
    draft.full["ledger"]["tuned"][5] = -draft.full["ledger"]["dense"][5]
    draft.rederive()
    ledger(draft)["verdict"][5] = 2


@lie("ledger", "verdicts are not what the logits give")
def a_verdict_raised(draft):
    verdict = ledger(draft)["verdict"]
    verdict[np.flatnonzero(verdict != 2)[0]] = 2


@lie("ledger", "for 3 stages and 12 classes")
def a_column_cut_short(draft):
    ledger(draft)["eps"] = ledger(draft)["eps"][:-1]


@lie("ledger", "for 3 stages and 12 classes")
def logits_of_other_samples(draft):
    ledger(draft)["logits"] = ledger(draft)["logits"][1:]


@lie("ledger", "for 3 stages and 3 classes")
def more_classes_kept_than_there_are(draft):
    certificate(draft)["classes"] = 3


@lie("ledger", "columns of the kinds")
def labels_that_are_no_whole_numbers(draft):
    ledger(draft)["labels"] = ledger(draft)["labels"].astype(np.float64)


@lie("ledger", "not different classes of 12")
def one_class_kept_twice(draft):
    ledger(draft)["kept_classes"][3, 3] = ledger(draft)["kept_classes"][3, 2]


@lie("ledger", "not different classes of 12")
def a_class_that_is_none(draft):
    ledger(draft)["kept_classes"][3, 3] = CLASSES


@lie("ledger", "not different classes of 12")
def a_class_below_all(draft):
    ledger(draft)["kept_classes"][3, 3] = -1


@lie("ledger", "own label is not among its kept classes")
def a_true_label_left_out(draft):
    kept = ledger(draft)["kept_classes"][0]
    ledger(draft)["labels"][0] = next(j for j in range(CLASSES) if j not in kept)


@lie("ledger", "dense logits are not finite")
def nan_in_a_dense_logit(draft):
    ledger(draft)["logits"][0, 0, 0] = np.nan


@lie("ledger", "last column is not the largest logit")
def the_other_classes_wished_away(draft):
    ledger(draft)["logits"][:, :, -1] = -np.inf


@lie("ledger", "last column is not the largest logit", keep=16)
def other_classes_out_of_nowhere(draft):
    ledger(draft)["logits"][:, -1, -1] = -50.0


@lie("ledger", "do not begin with the dense label, or rise")
def two_kept_classes_swapped(draft):
    for name, axis in (("kept_classes", 1), ("logits", 2)):
        array = ledger(draft)[name]
        ledger(draft)[name] = np.take(array, [0, 2, 1, *range(3, array.shape[axis])], axis=axis)


@lie("ledger", "do not begin with the dense label, or rise")
def a_dense_label_that_is_not_the_best(draft):
    ledger(draft)["logits"][0, 0, -1] = 99.0


@lie("ledger", "the recipe asks for 4")
def fewer_classes_kept_than_asked(draft):
    draft.json["recipe.lock.json"]["certify"]["keep"] = 5
    draft.rederive()
    draft.json["recipe.lock.json"]["certify"]["keep"] = 4


@lie("ledger", "a winner is not among the kept classes")
def a_winner_left_out(draft):
    row = ledger(draft)["logits"][2]
    row[2, -1] = row[2, :-1].max() + 1


@lie("ledger", "neither special nor among the dense network's best")
def a_close_competitor_left_out(draft):
    row = ledger(draft)["logits"][int(np.flatnonzero(ledger(draft)["verdict"] == 2)[0])]
    row[0, -1] = row[0, 1] - 1e-3


@lie("ledger", "eps of the stage tuned is not what the logits give")
def a_smaller_change(draft):
    ledger(draft)["eps"][7, 1] *= 0.5


@lie("ledger", "eps of the stage tuned is not what the logits give", keep=16)
def a_larger_change_than_any_class_had(draft):
    ledger(draft)["eps"][7, 1] *= 1.01


@lie("ledger", "eps of the stage tuned is not what the logits give")
def nan_in_a_column(draft):
    ledger(draft)["eps"][7, 1] = np.nan


@lie("ledger", "eps of the stage tuned is not what the logits give")
def a_change_stated_where_there_was_nan(draft):
    draft.full["ledger"]["tuned"][0, :] = np.nan
    draft.rederive()
    ledger(draft)["eps"][0, 1] = 0.1


@lie("ledger", "share of the stage pruned is not what the logits give")
def a_smaller_share(draft):
    ledger(draft)["share"][7, 0] -= 0.5


@lie("ledger", "share of the stage pruned is not what the logits give", keep=16)
def a_larger_share(draft):
    ledger(draft)["share"][7, 0] += 0.5


@lie("ledger", "share of the stage pruned is not what the logits give")
def a_share_hidden_as_a_tie(draft):
    ledger(draft)["share"][7, 0] = np.inf


@lie("ledger", "where the dense label is tied or a logit is not finite")
def a_share_of_a_tied_label(draft):
    draft.full["ledger"]["dense"][0] = [1, 1, *[0] * (CLASSES - 2)]
    draft.rederive()
    ledger(draft)["share"][0, 0] = 0.5


@lie("ledger", "where the dense label is tied or a logit is not finite")
def a_share_of_nan(draft):
    draft.full["ledger"]["tuned"][0, :] = np.nan
    draft.rederive()
    ledger(draft)["share"][0, 1] = 0.5


@lie("ledger", "not one row per sample")
def a_range_for_fewer_samples(draft):
    ledger(draft)["range"] = ledger(draft)["range"][:-1]


@lie("ledger", "range is not what the logits give")
def a_smaller_range_asks_for_less_reserve(draft):
    ledger(draft)["range"][4] *= 0.5


@lie("ledger", "range is not what the logits give")
def an_endless_range(draft):
    ledger(draft)["range"][4] = np.inf


@lie("ledger", "displacement is not what the logits give")
def a_smaller_displacement(draft):
    ledger(draft)["displacement"][4] *= 0.5


@lie("ledger", "displacement is not what the logits give")
def a_displacement_of_nan(draft):
    draft.full["ledger"]["tuned"][0, :] = np.nan
    draft.rederive()
    ledger(draft)["displacement"][0] = 0.0


@lie("ledger", "larger than what the stages' eps allow")
def a_displacement_larger_than_its_parts(draft):
    ledger(draft)["displacement"][4] = 100.0


@lie("ledger", "larger than what the stages' eps allow")
def a_span_larger_than_twice_the_displacement(draft):
    ledger(draft)["displacement"][4, 1] = 100.0


# ----------------------------------------------------------------------------------------------------- the certificate


@lie("ledger", "not the certification ids in their order")
def swapped_sample_ids(draft):
    ids = list(certificate(draft)["ids"])
    certificate(draft)["ids"] = [ids[1], ids[0], *ids[2:]]


@lie("ledger", "about 13 classes, results.json 12")
def a_certificate_of_more_classes(draft):
    certificate(draft)["classes"] = 13


@lie("results", "is of schema 1")
def results_of_another_schema(draft):
    draft.json["results.json"]["schema"] = 1


@lie("disagreement", "abstain.json is of schema 2")
def a_rule_file_of_another_schema(draft):
    draft.json["abstain.json"]["schema"] = 2


@lie("ledger", "not the certification ids in their order")
def an_id_too_many(draft):
    certificate(draft)["ids"] = draft.json["calibration.json"]["certification_ids"] = [
        *certificate(draft)["ids"], "train/999"
    ]  # fmt: skip


@lie("ledger", "is of schema 1")
def a_certificate_of_another_schema(draft):
    certificate(draft)["schema"] = 1


@lie("ledger", "the count of flipped samples is stated as 0")
def counts_raised(draft):
    certificate(draft)["counts"] = {"flipped": 0, "kept": 0, "certified": 40}


@lie("ledger", "sets aside 0.0, the recipe 0.01")
def a_reserve_left_out(draft):
    certificate(draft)["reserve"] = 0.0


@lie("ledger", "sets aside -0.01")
def a_negative_reserve(draft):
    draft.ask("certify", reserve=-0.01)
    draft.rederive()


@lie("ledger", "samples that the test span certifies")
def a_test_that_certifies_more(draft):
    certificate(draft)["tests"]["span"] += 1


@lie("ledger", "the count of right tuned labels")
def a_better_top1_in_the_certificate(draft):
    certificate(draft)["top1"]["tuned"] += 1


@lie("ledger", "flips_but_for of the stage tuned")
def blame_shifted_between_stages(draft):
    certificate(draft)["spent"][1]["flips_but_for"] += 1


@lie("ledger", "flips_primary of the stage pruned")
def blame_taken_from_a_stage(draft):
    certificate(draft)["spent"][0]["flips_primary"] = 0


@lie("ledger", "share_p99 of the stage pruned")
def a_smaller_share_spent(draft):
    certificate(draft)["spent"][0]["share_p99"] *= 0.5


@lie("ledger", "eps_inf_max of the stage pruned is stated as None")
def a_number_withheld(draft):
    certificate(draft)["spent"][0]["eps_inf_max"] = None


@lie("ledger", "flips_alone of the stage pruned is stated as True")
def a_truth_value_for_a_number(draft):
    certificate(draft)["spent"][0]["flips_alone"] = True


@lie("ledger", "lists other stages")
def a_stage_left_out_of_the_ledger(draft):
    certificate(draft)["spent"].pop(0)


@lie("ledger", "is about the stages")
def a_certificate_about_other_stages(draft):
    certificate(draft)["stages"] = ["dense", "tuned"]


@lie("ledger", "another n or T")
def a_certificate_of_more_samples(draft):
    certificate(draft)["samples"] = 400


@lie("ledger", "margin_median")
def a_wider_median_margin(draft):
    certificate(draft)["margin_median"] += 1


@lie("ledger", "slack_median")
def a_wider_median_slack(draft):
    certificate(draft)["slack_median"] += 1


@lie("ledger", "the reference is stated as float32")
def a_reference_in_single_precision(draft):
    certificate(draft)["reference"]["precision"] = "float32"


@lie("ledger", "stored as float32")
def a_reference_stored_in_single_precision(draft):
    ledger(draft)["reference"] = ledger(draft)["reference"].astype(np.float32)


@lie("ledger", r"stored as float64 of shape \(3, 4\)")
def a_reference_without_the_other_classes(draft):
    ledger(draft)["reference"] = np.ascontiguousarray(ledger(draft)["reference"][:, :-1])


@lie("ledger", "stored of 2; the recipe asks for 3")
def fewer_samples_in_the_reference(draft):
    ledger(draft)["reference"] = ledger(draft)["reference"][:2]


@lie("ledger", "a float64 logit of the dense network is not finite")
def nan_in_the_reference(draft):
    ledger(draft)["reference"][1, 1] = np.nan


@lie("ledger", "the reference states eps_inf_max")
def a_smaller_gap_to_the_reference(draft):
    certificate(draft)["reference"]["eps_inf_max"] = 0.0


@lie("ledger", "the reference states share_max", keep=16)
def a_larger_share_of_the_reference(draft):
    certificate(draft)["reference"]["share_max"] *= 2


@lie("ledger", "the reference states share_max as None")
def a_share_of_the_reference_withheld(draft):
    certificate(draft)["reference"]["share_max"] = None


@lie("ledger", "the reference states share_max as True")
def a_truth_value_in_the_reference(draft):
    certificate(draft)["reference"]["share_max"] = True


@lie("ledger", "the ledger is empty", "unchecked")
def an_empty_ledger(draft):
    for name, array in ledger(draft).items():
        ledger(draft)[name] = array[:0]
    samples(draft)[f"certification.{CPU}"] = samples(draft)[f"certification.{CPU}"][:0]
    certificate(draft).update(samples=0, ids=[], counts={"flipped": 0, "kept": 0, "certified": 0})
    draft.engine()["certified"].update(n=0, violations=0, violating_ids=[], kept_broken=0)
    draft.json["calibration.json"]["certification_ids"] = []
    drop_gates(draft, "min_certified", "max_violations")


@lie("ledger", "there is no certificate.json", "unchecked")
def a_certificate_that_is_not_there(draft):
    del draft.json["certificate.json"]


@lie("ledger", "there is no ledger.safetensors", "unchecked")
def a_ledger_that_is_not_there(draft):
    del draft.tensors["ledger.safetensors"]


# ------------------------------------------------------------------------------------------- what the certificate adds


@lie("objective", "about the stage dense")
def an_objective_about_nothing(draft):
    certificate(draft)["objective"]["stage"] = "dense"


@lie("objective", "fc.weight for one")
def a_changed_tensor_left_out_of_the_objective(draft):
    rows = certificate(draft)["objective"]["changed"]
    certificate(draft)["objective"]["changed"] = [row for row in rows if row["tensor"] != "fc.weight"]


@lie("objective", "other tensors than those that changed")
def a_changed_tensor_twice(draft):
    rows = certificate(draft)["objective"]["changed"]
    rows.append(rows[0])


@lie("objective", "fc.weight: frobenius")
def a_smaller_norm(draft):
    norms(draft, "fc.weight")["frobenius"] *= 0.9


@lie("objective", "mix.weight: l1")
def a_smaller_sum(draft):
    norms(draft, "mix.weight")["l1"] *= 0.9


@lie("objective", "mix.weight: spectral_upper is stated as .*, which is no upper bound")
def a_spectral_bound_just_too_small(draft):
    norms(draft, "mix.weight")["spectral_upper"] *= 1 - 1e-5


@lie("objective", "spectral_upper is stated as None")
def a_spectral_bound_that_is_none(draft):
    norms(draft, "mix.weight")["spectral_upper"] = None


@lie("objective", "spectral_upper is stated as -")
def a_negative_spectral_bound(draft):
    norms(draft, "mix.weight")["spectral_upper"] *= -2


@lie("proofs", "proofs .envelope., not redone", "unchecked")
def a_proof_nobody_redoes(draft):
    certificate(draft)["proofs"] = {"envelope": {}}


def norms(draft: Draft, tensor: str) -> dict:
    return next(row for row in certificate(draft)["objective"]["changed"] if row["tensor"] == tensor)


@lie("zero_budget", "fc has 8 inputs, zero_budget states 16")
def inputs_that_are_not_there(draft):
    certificate(draft)["zero_budget"]["fc"]["inputs"] = 16


@lie("zero_budget", "can't be removed at rank 6")
def more_inputs_removed_than_depend(draft):
    certificate(draft)["zero_budget"]["fc"]["dependent"] = 3


@lie("zero_budget", r"\[-1, 0, 1\] inputs of 8 can't be removed")
def fewer_inputs_than_none_removed(draft):
    certificate(draft)["zero_budget"]["fc"]["dead"] = -1


@lie("zero_budget", r"\[8, 0, 1\] inputs of 8 can't be removed")
def more_inputs_removed_than_there_are(draft):
    certificate(draft)["zero_budget"]["fc"]["dead"] = 8


@lie("zero_budget", "fc: allowance")
def a_larger_allowance(draft):
    certificate(draft)["zero_budget"]["fc"].update(allowance=1.0, residual=0.5)


@lie("zero_budget", "by more than rounding does")
def a_removal_that_costs_something(draft):
    certificate(draft)["zero_budget"]["fc"]["residual"] = 0.01


# --------------------------------------------------------------------------------------------------- results of engines


@lie(f"engine:{CPU}", "eps of the stage engine is not what the logits give")
def an_edited_engine_logit(draft):
    samples(draft)[f"engine.{CPU}"][:10] *= -1


@lie(f"engine:{CPU}", "has logits")
def an_engine_that_gives_whole_numbers(draft):
    samples(draft)[f"engine.{CPU}"] = samples(draft)[f"engine.{CPU}"].astype(np.int64)


@lie(f"engine:{CPU}", "eps of shape")
def an_engine_with_fewer_changes(draft):
    samples(draft)[f"engine.{CPU}.eps"] = samples(draft)[f"engine.{CPU}.eps"][1:]


@lie(f"engine:{CPU}", "top1: correct is stated as")
def a_better_top1(draft):
    draft.engine()["top1"]["correct"] += 1


@lie(f"engine:{CPU}", "top1: low is stated as")
def a_narrower_interval(draft):
    draft.engine()["top1"]["low"] += 0.01


@lie(f"engine:{CPU}", "agreement: high is stated as")
def a_changed_interval(draft):
    draft.engine()["agreement"]["high"] -= 1e-4


@lie(f"engine:{CPU}", "agreement: value is stated as")
def a_better_agreement(draft):
    draft.engine()["agreement"]["value"] = 1.0


@lie(f"engine:{CPU}", "dense_right_engine_wrong")
def flips_left_out(draft):
    draft.engine()["flips"]["dense_right_engine_wrong"] = 0


@lie(f"engine:{CPU}", "mcnemar_p")
def a_significance_left_out(draft):
    draft.engine()["flips"]["mcnemar_p"] = 0.5


@lie(f"engine:{CPU}", "the count of violations")
def a_certified_label_that_the_engine_lost(draft):
    first = int(np.flatnonzero(ledger(draft)["verdict"] == 2)[0])
    samples(draft)[f"certification.{CPU}"][first] *= -1


@lie(f"engine:{CPU}", "violating_ids are stated as")
def another_violating_image(draft):
    first = int(np.flatnonzero(ledger(draft)["verdict"] == 2)[0])
    draft.full["samples"][f"certification.{CPU}"][first] *= -1
    draft.rederive()
    draft.engine()["certified"]["violating_ids"] = ["train/139"]


@lie(f"engine:{CPU}", "the count of certified samples")
def fewer_certified_samples(draft):
    draft.engine()["certified"]["n"] -= 1


@lie(f"engine:{CPU}", "kept_broken")
def kept_labels_that_broke(draft):
    draft.engine()["certified"]["kept_broken"] += 1


@lie(f"engine:{CPU}", "finite is stated as True")
def nan_from_the_engine(draft):
    samples(draft)[f"certification.{CPU}"][int(np.flatnonzero(ledger(draft)["verdict"] == 0)[0])] = np.nan
    assert draft.engine()["finite"]


@lie(f"engine:{CPU}", "spent is stated for logits that are not finite")
def a_ledger_of_nan(draft):
    spent = draft.engine()["spent"]
    draft.full["samples"][f"engine.{CPU}"][0] = np.nan
    draft.rederive()
    draft.engine()["spent"] = spent


@lie(f"engine:{CPU}", "eps_inf_median of the stage engine")
def an_engine_that_spent_less(draft):
    draft.engine()["spent"][3]["eps_inf_median"] /= 10


@lie(f"engine:{CPU}", "has logits")
def an_engine_run_on_fewer_images(draft):
    samples(draft)[f"engine.{CPU}"] = samples(draft)[f"engine.{CPU}"][1:]


@lie(f"engine:{CPU}", "has shape")
def an_engine_run_on_fewer_certification_images(draft):
    samples(draft)[f"certification.{CPU}"] = samples(draft)[f"certification.{CPU}"][1:]


@lie(f"engine:{CPU}", "field is missing")
def a_row_without_flips(draft):
    del draft.engine()["flips"]


@lie("results", "the recipe asks for")
def an_engine_that_is_kept_quiet(draft):
    draft.json["results.json"]["engines"].pop(1)
    del draft.json[f"engines/{GPU}/engine.json"], draft.json[f"engines/{GPU}.dense/engine.json"]
    del draft.raw[f"engines/{GPU}/model.engine"], draft.raw[f"engines/{GPU}.dense/model.engine"]


@lie("results", "has the status 'fine'")
def a_status_of_its_own(draft):
    draft.engine(GPU)["status"] = "fine"


@lie("results", "does not say why")
def an_engine_not_run_without_a_reason(draft):
    draft.engine(GPU)["why_not"] = ""


@lie("results", "top-1 of dense: low")
def a_lower_reference(draft):
    draft.json["results.json"]["dense_top1"]["low"] -= 0.01


@lie("results", "top-1 of tuned: n")
def a_longer_validation(draft):
    draft.json["results.json"]["tuned_top1"]["n"] += 1


@lie("results", "is about 121 samples, stored are 120")
def results_of_more_samples(draft):
    draft.json["results.json"]["validation"]["samples"] = 121


@lie("results", "and 2 classes")
def results_of_other_classes(draft):
    draft.json["results.json"]["validation"]["classes"] = 2


@lie("results", "at confidence 0.1 has no interval")
def a_confidence_nobody_would_ask_for(draft):
    draft.ask("validate", confidence=0.1)
    draft.json["results.json"]["confidence"] = 0.1


@lie("results", "has the confidence 0.9, the recipe asks for 0.95")
def a_lower_confidence(draft):
    draft.json["results.json"]["confidence"] = 0.9


@lie("results", "share of the stage onnx is not what the logits give")
def an_export_that_cost_less(draft):
    samples(draft)["share"][3, 2] -= 1


@lie("results", "a winner is not among the kept classes")
def an_engine_s_winner_left_out(draft):
    row = samples(draft)[f"engine.{CPU}"][2]
    row[-1] = row[:-1].max() + 1


@lie("results", "1 validation ids are named and 120 samples stored")
def validation_ids_left_out(draft):
    draft.json["calibration.json"]["validation_ids"] = ["val/0"]


@lie("results", "engine.hidden is missing or unexplained")
def samples_of_an_engine_nobody_speaks_of(draft):
    samples(draft)["engine.hidden"] = samples(draft)[f"engine.{CPU}"]


@lie("results", "no validation image was run", "unchecked")
def an_empty_validation(draft):
    samples(draft)["labels"] = samples(draft)["labels"][:0]


@lie("results", "none of the 3 engines was run", "unchecked", keep=16)
def no_engine_measured(draft):
    draft.engine().clear()
    draft.json["results.json"]["engines"][0].update(id=CPU, status="not run", why_not="no time")
    for name in [name for name in samples(draft) if name.partition(".")[0] in ("engine", "certification", "latency")]:
        del samples(draft)[name]
    judge_as_unchecked(draft)


@lie("results", "there is no results.json", "unchecked")
def no_results(draft):
    del draft.json["results.json"]


@lie("results", "field is missing or of the wrong kind")
def results_that_are_a_list(draft):
    draft.json["results.json"] = []


def judge_as_unchecked(draft: Draft) -> None:
    for row in draft.json["verdict.json"]["gates"]:
        row.update(measured=None, low=None, high=None, verdict="unchecked")
    draft.json["verdict.json"]["verdict"] = "unchecked"


# ------------------------------------------------------------------------------------------- images that were not run


def unseen(draft: Draft) -> dict:
    return draft.json["disagreement.json"]


def rule(draft: Draft) -> dict:
    return unseen(draft)["rule"]


@lie("disagreement", "images are certification and validation samples")
def a_bound_on_images_that_were_used_before(draft):
    draft.json["calibration.json"]["certification_ids"][0] = "val/3"
    draft.rederive()


@lie("disagreement", "is of schema 2")
def a_bound_of_another_schema(draft):
    unseen(draft)["schema"] = 2


@lie("disagreement", "has the confidence 0.9, results.json 0.95")
def a_bound_at_less_confidence(draft):
    unseen(draft)["confidence"] = 0.9


@lie("disagreement", "has the confidence 0.1, results.json 0.1")
def a_bound_at_hardly_any_confidence(draft):
    draft.json["results.json"]["confidence"] = 0.1
    unseen(draft)["confidence"] = 0.1


@lie("disagreement", "0 candidates are stated, 1 engines were run")
def no_candidate_at_all(draft):
    unseen(draft)["candidates"] = 0


@lie("disagreement", "1.5 candidates are stated")
def one_and_a_half_candidates(draft):
    unseen(draft)["candidates"] = 1.5


@lie("disagreement", "upper is stated as")
def fewer_candidates_than_were_tried(draft):
    unseen(draft)["candidates"] = 1


@lie("disagreement", f"is not about {CPU}")
def a_bound_of_an_engine_that_was_not_run(draft):
    unseen(draft)["engines"][INT8] = unseen(draft)["engines"][CPU]


@lie("disagreement", "upper is stated as")
def a_lower_bound(draft):
    unseen(draft)["engines"][CPU]["upper"] *= 0.9


@lie("disagreement", "k is stated as 0")
def no_label_ever_differs(draft):
    unseen(draft)["engines"][CPU]["k"] = 0


@lie("disagreement", "n is stated as 1200")
def a_bound_from_more_images(draft):
    unseen(draft)["engines"][CPU]["n"] = 1200


@lie("disagreement", "counted by other clusters than the recipe's")
def clusters_that_nobody_asked_for(draft):
    unseen(draft)["engines"][CPU]["clusters"] = "(.)$"


@lie("disagreement", "k is stated as 5, the stored numbers give 4")
def images_counted_that_come_in_clusters(draft):
    draft.ask("validate", cluster="([0-9])$")


@lie("disagreement", "finds no cluster in an id")
def clusters_that_no_id_names(draft):
    draft.ask("validate", cluster="(x)")


@lie("disagreement", "no engine was run", "unchecked")
def a_bound_of_nothing(draft):
    no_engine_measured(draft)


@lie("disagreement", "there is no disagreement.json", "unchecked")
def no_bound(draft):
    del draft.json["disagreement.json"]


@lie("disagreement", "another confidence than disagreement.json")
def a_rule_at_more_confidence(draft):
    rule(draft)["confidence"] = 0.99


@lie("disagreement", "another candidates than disagreement.json")
def a_rule_among_more_candidates(draft):
    rule(draft)["candidates"] = 20


@lie("disagreement", "the rule allows the share 0.01, the recipe 0.05")
def a_rule_that_proves_more_than_was_asked(draft):
    rule(draft)["alpha"] = 0.01


@lie("disagreement", f"the rule is about {GPU}, the recipe releases {CPU}")
def a_rule_for_another_engine(draft):
    rule(draft)["engine"] = GPU


@lie("disagreement", "0 margins were tested")
def a_rule_without_tests(draft):
    rule(draft)["tested"] = []


@lie("disagreement", "23 margins were tested")
def a_rule_of_more_tests_than_there_are(draft):
    rule(draft)["tested"] = (rule(draft)["tested"] * 23)[:23]


@lie("disagreement", "a margin to test is stated as")
def margins_chosen_after_the_fact(draft):
    rule(draft)["tested"][1]["tau"] *= 0.9


@lie("disagreement", "was tested after one that was not rejected")
def one_more_try(draft):
    tested = rule(draft)["tested"]
    tested.append({**tested[-1], "tau": tested[-1]["tau"] / 2**0.5})


@lie("disagreement", "the tests stopped before one that is not rejected")
def a_test_left_out(draft):
    rule(draft)["tested"].pop()


@lie("disagreement", "errors is stated as 0")
def errors_left_out(draft):
    rule(draft)["tested"][-1]["errors"] = 0


@lie("disagreement", "n is stated as 60")
def a_test_of_fewer_images(draft):
    rule(draft)["tested"][0]["n"] = 60


@lie("disagreement", "p is stated as")
def a_smaller_p(draft):
    rule(draft)["tested"][-1]["p"] /= 10


@lie("disagreement", "rejected is stated as True")
def a_test_that_is_said_to_reject(draft):
    rule(draft)["tested"][-1]["rejected"] = True


@lie("disagreement", "the rule's margin is stated as")
def a_margin_that_was_not_rejected(draft):
    rule(draft)["tau"] = rule(draft)["tested"][-1]["tau"]


@lie("disagreement", "abstains")
def fewer_abstentions(draft):
    rule(draft)["abstains"] = 0


@lie("disagreement", "abstain.json has 0.0 as tau")
def another_margin_where_the_rule_is_run(draft):
    draft.json["abstain.json"]["tau"] = 0.0


@lie("disagreement", "abstain.json is about 10 classes")
def other_classes_where_the_rule_is_run(draft):
    draft.json["abstain.json"]["classes"] = 10


@lie("disagreement", "there is no abstain.json", "unchecked")
def a_rule_that_nobody_can_run(draft):
    del draft.json["abstain.json"]


# -------------------------------------------------------------------------------------------------------- noise floor


def noise(draft: Draft) -> dict:
    return draft.engine()["noise_floor"]


@lie("results", "asks for a noise floor, and one of the graphs")
def a_noise_floor_that_is_not_there(draft):
    draft.engine()["noise_floor"] = None
    for column in ("sigma", "error"):
        del samples(draft)[f"engine.{CPU}.{column}"]


@lie("noise:onnx", "noise floor: ratio_max")
def less_noise_in_the_export(draft):
    draft.json["results.json"]["export_noise"]["ratio_max"] *= 0.5


@lie(f"noise:{CPU}", "noise floor: ratio_rms")
def less_noise(draft):
    noise(draft)["ratio_rms"] *= 0.5


@lie(f"noise:{CPU}", "noise floor: pairs")
def more_pairs(draft):
    noise(draft)["pairs"] = 120


@lie(f"noise:{CPU}", "noise floor is stated as beyond")
def noise_called_too_much(draft):
    noise(draft)["verdict"] = "beyond"


@lie(f"noise:{CPU}", "noise floor is stated as within")
def noise_that_is_too_much_somewhere(draft):
    samples(draft)[f"engine.{CPU}.error"][0] = 8 * samples(draft)[f"engine.{CPU}.sigma"][0]
    draft.rederive()
    noise(draft)["verdict"] = "within"


@lie(f"noise:{CPU}", "noise floor is stated as within")
def noise_that_is_too_much_throughout(draft):
    samples(draft)[f"engine.{CPU}.error"] = 4 * samples(draft)[f"engine.{CPU}.sigma"]
    draft.rederive()
    noise(draft)["verdict"] = "within"


@lie(f"noise:{CPU}", "noise floor is stated as within")
def noise_where_none_is_possible(draft):
    samples(draft)[f"engine.{CPU}.sigma"][0] = 0.0
    draft.rederive()
    noise(draft)["verdict"] = "within"


@lie(f"noise:{CPU}", "noise floor: threshold")
def a_higher_threshold(draft):
    noise(draft)["threshold"] = 100.0


@lie(f"noise:{CPU}", "noise floor: rms_limit")
def a_higher_limit(draft):
    noise(draft)["rms_limit"] = 100.0


@lie(f"noise:{CPU}", "allows the chance 1.5")
def a_chance_above_all(draft):
    noise(draft)["delta"] = 1.5


@lie(f"noise:{CPU}", "sigma of shape")
def errors_of_other_pairs(draft):
    samples(draft)[f"engine.{CPU}.error"] = samples(draft)[f"engine.{CPU}.error"][1:]


@lie(f"noise:{CPU}", "sigma of shape")
def pairs_in_columns(draft):
    for column in ("sigma", "error"):
        samples(draft)[f"engine.{CPU}.{column}"] = samples(draft)[f"engine.{CPU}.{column}"][:, None]


@lie(f"noise:{CPU}", "sigma of shape")
def no_pairs_at_all(draft):
    for column in ("sigma", "error"):
        samples(draft)[f"engine.{CPU}.{column}"] = np.zeros(0)


@lie(f"noise:{CPU}", "sigma of shape")
def more_pairs_than_images(draft):
    for column in ("sigma", "error"):
        samples(draft)[f"engine.{CPU}.{column}"] = np.ones(121)


@lie(f"noise:{CPU}", "predicted error below zero, or none")
def a_negative_noise(draft):
    samples(draft)[f"engine.{CPU}.sigma"][0] = -1.0


@lie("gate:max_noise", "the limit is 0.1")
def an_honest_noisy_engine(draft):
    draft.ask("gates", max_noise=0.1)
    draft.rederive()


@lie("gate:max_noise", "measured inf")
def an_engine_of_endless_noise(draft):
    samples(draft)[f"engine.{CPU}.error"][0] = np.inf
    draft.rederive()


@lie("gate:max_noise", "nothing was measured", "unchecked")
def a_noise_nobody_measured(draft):
    draft.engine()["noise_floor"] = None


# -------------------------------------------------------------------------------------------------------------- latency


@lie(f"latency:{CPU}", "the ratio of the medians is stated as 2.5")
def an_inflated_speedup(draft):
    latency(draft)["ratio"]["value"] = 2.5


@lie(f"latency:{CPU}", "the ratio's low end")
def a_low_end_raised_to_the_value(draft):
    latency(draft)["ratio"]["low"] = latency(draft)["ratio"]["value"]


@lie(f"latency:{CPU}", "the ratio's high end")
def a_high_end_raised(draft):
    latency(draft)["ratio"]["high"] *= 1.1


@lie(f"latency:{CPU}", "median_ms")
def a_faster_median(draft):
    latency(draft)["median_ms"] /= 2


@lie(f"latency:{CPU}", "p99_ms")
def a_tail_cut_off(draft):
    latency(draft)["p99_ms"] = latency(draft)["p90_ms"]


@lie(f"latency:{CPU}", "twin_median_ms")
def a_slower_twin(draft):
    latency(draft)["twin_median_ms"] *= 2


@lie(f"latency:{CPU}", "calls is stated as 6000")
def more_calls_than_there_were(draft):
    latency(draft)["calls"] = 6000


@lie(f"latency:{CPU}", "is not same")
def another_word_for_the_speed(draft):
    latency(draft)["verdict"] = "same"


@lie(f"latency:{CPU}", "is not its dense twin")
def another_twin(draft):
    samples(draft)["latency.slow"] = samples(draft).pop(f"latency.{CPU}.dense") * 3
    latency(draft)["twin"] = "slow"


@lie(f"latency:{CPU}", "no positive number")
def a_call_that_took_no_time(draft):
    samples(draft)[f"latency.{CPU}"][0] = 0.0


@lie(f"latency:{CPU}", "of its twin are stored")
def a_twin_called_less_often(draft):
    samples(draft)[f"latency.{CPU}.dense"] = samples(draft)[f"latency.{CPU}.dense"][:-1]


@lie(f"latency:{CPU}", "of its twin are stored")
def calls_in_columns(draft):
    for name in (f"latency.{CPU}", f"latency.{CPU}.dense"):
        samples(draft)[name] = samples(draft)[name][:, None]


@lie(f"latency:{CPU}", "too few for an interval")
def a_fraction_of_blocks(draft):
    lock(draft)["validate"]["blocks"] = 6.0


@lie(f"latency:{CPU}", "was timed", "unchecked")
def no_call_at_all(draft):
    for name in (f"latency.{CPU}", f"latency.{CPU}.dense"):
        samples(draft)[name] = samples(draft)[name][:0]


@lie(f"latency:{CPU}", "too few for an interval")
def one_block_has_no_spread(draft):
    lock(draft)["validate"].update(blocks=1, calls=30)


@lie(f"latency:{CPU}", "60 calls of .* are stored, the recipe asks for 70")
def blocks_that_were_not_timed(draft):
    lock(draft)["validate"]["blocks"] = 7


@lie(f"latency:{CPU}", "batch 8 was timed, the recipe asks for 1")
def another_batch_than_asked(draft):
    latency(draft)["batch"] = 8


@lie(f"latency:{CPU}", "is outside of")
def a_batch_the_engine_was_not_built_for(draft):
    draft.ask("validate", batch=100)
    latency(draft)["batch"] = 100


@lie(f"latency:{CPU}", "threads are stated")
def more_threads_than_stated(draft):
    latency(draft)["threads"] = 4
