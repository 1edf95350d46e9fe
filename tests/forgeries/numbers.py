"""Lies about images, the ledger, the results and the latencies."""

import numpy as np

from forgeries.bundle import CLASSES, CPU, GPU, Draft
from forgeries.registry import drop_gates, latency, ledger, lie, samples, weights

# ---------------------------------------------------------------------------------------------------------- ids, ledger


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


@lie("ledger", "is not what the logits give")
def an_edited_dense_logit(draft):
    ledger(draft)["dense"][0] += np.float32([3, 0, 0, 0, 0])


@lie("ledger", "is not what the logits give, first for the sample train/105")
def a_flip_sold_as_certified(draft):
    ledger(draft)["tuned"][5] = -ledger(draft)["dense"][5]


@lie("ledger", "verdict is not what the logits give")
def a_verdict_raised(draft):
    verdict = ledger(draft)["verdict"]
    verdict[np.flatnonzero(verdict != 2)[0]] = 2


@lie("ledger", "slack is not what the logits give")
def a_slack_raised(draft):
    ledger(draft)["slack"][7] += 0.5


@lie("ledger", "margin is not what the logits give")
def a_column_cut_short(draft):
    ledger(draft)["margin"] = ledger(draft)["margin"][:-1]


@lie("ledger", "slack is not what the logits give")
def nan_in_a_column(draft):
    ledger(draft)["slack"][0] = np.nan


@lie("ledger", "the logits pruned hold NaN")
def nan_in_a_logit(draft):
    ledger(draft)["pruned"][0, 0] = np.nan


@lie("ledger", "not the certification ids in their order")
def swapped_sample_ids(draft):
    ids = list(draft.json["certificate.json"]["ids"])
    draft.json["certificate.json"]["ids"] = [ids[1], ids[0], *ids[2:]]


@lie("ledger", "the count of flipped samples is stated as 0")
def counts_raised(draft):
    draft.json["certificate.json"]["counts"] = {"flipped": 0, "kept": 0, "certified": 40}


@lie("ledger", "reserve is not what the logits give")
def a_reserve_left_out(draft):
    draft.json["certificate.json"]["reserve"] = 0.0


@lie("ledger", "sets aside a reserve of -0.01")
def a_negative_reserve(draft):
    draft.json["certificate.json"]["reserve"] = -0.01


@lie("ledger", "the count of right tuned labels")
def a_better_top1_in_the_certificate(draft):
    draft.json["certificate.json"]["top1"]["tuned"] += 1


@lie("ledger", "binds other tuned weights")
def a_certificate_of_other_weights(draft):
    weights(draft, "tuned")["fc.bias"] = weights(draft, "tuned")["fc.bias"] + 1


@lie("ledger", "flips_but_for of the stage tuned")
def blame_shifted_between_stages(draft):
    draft.json["certificate.json"]["spent"][1]["flips_but_for"] += 1


@lie("ledger", "share_p99 of the stage pruned")
def a_smaller_share_spent(draft):
    draft.json["certificate.json"]["spent"][0]["share_p99"] *= 0.5


@lie("ledger", "eps_inf_max of the stage pruned is stated as None")
def a_number_withheld(draft):
    draft.json["certificate.json"]["spent"][0]["eps_inf_max"] = None


@lie("ledger", "flips_alone of the stage pruned is stated as True")
def a_truth_value_for_a_number(draft):
    draft.json["certificate.json"]["spent"][0]["flips_alone"] = True


@lie("ledger", "lists other stages")
def a_stage_left_out_of_the_ledger(draft):
    draft.json["certificate.json"]["spent"].pop(0)


@lie("ledger", "is about the stages")
def a_certificate_about_other_stages(draft):
    draft.json["certificate.json"]["stages"] = ["dense", "tuned"]


@lie("ledger", "another n or K")
def a_certificate_of_more_samples(draft):
    draft.json["certificate.json"]["samples"] = 400


@lie("ledger", "margin_median")
def a_wider_median_margin(draft):
    draft.json["certificate.json"]["margin_median"] += 1


@lie("ledger", "slack_median")
def a_wider_median_slack(draft):
    draft.json["certificate.json"]["slack_median"] += 1


@lie("ledger", "a label is no class")
def a_label_that_is_no_class(draft):
    ledger(draft)["labels"][0] = CLASSES


@lie("ledger", "tuned has shape")
def logits_of_other_samples(draft):
    ledger(draft)["tuned"] = ledger(draft)["tuned"][1:]


@lie("ledger", "holds logits of shape")
def one_class_only(draft):
    for name in ("dense", "pruned", "tuned"):
        ledger(draft)[name] = ledger(draft)[name][:, :1]
    draft.json["certificate.json"]["classes"] = 1


@lie("ledger", "the ledger is empty", "unchecked")
def an_empty_ledger(draft):
    for name, array in ledger(draft).items():
        ledger(draft)[name] = array[:0]
    samples(draft)[f"certification.{CPU}"] = samples(draft)[f"certification.{CPU}"][:0]
    draft.json["certificate.json"].update(samples=0, ids=[], counts={"flipped": 0, "kept": 0, "certified": 0})
    draft.engine()["certified"].update(n=0, violations=0, violating_ids=[], kept_broken=0)
    draft.json["calibration.json"]["certification_ids"] = []
    drop_gates(draft, "min_certified", "max_violations")


@lie("ledger", "there is no ledger.safetensors", "unchecked")
def a_ledger_that_is_not_there(draft):
    del draft.tensors["ledger.safetensors"]


# --------------------------------------------------------------------------------------------------- results of engines


@lie(f"engine:{CPU}", "top1: correct is stated as")
def an_edited_engine_logit(draft):
    samples(draft)[f"engine.{CPU}"][:10] *= -1


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
    samples(draft)[f"certification.{CPU}"][first] *= -1
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
    samples(draft)[f"engine.{CPU}"][0] = np.nan
    draft.rederive()
    draft.engine()["spent"] = spent


@lie(f"engine:{CPU}", "eps_inf_median of the stage engine")
def an_engine_that_spent_less(draft):
    draft.engine()["spent"][2]["eps_inf_median"] /= 10


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
    draft.json["results.json"]["engines"].pop()
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


@lie("results", "another n or K")
def results_of_other_classes(draft):
    draft.json["results.json"]["validation"]["classes"] = 10


@lie("results", "at confidence 0.1 has no interval")
def a_confidence_nobody_would_ask_for(draft):
    draft.json["results.json"]["confidence"] = 0.1


@lie("results", "1 validation ids are named and 120 samples stored")
def validation_ids_left_out(draft):
    draft.json["calibration.json"]["validation_ids"] = ["val/0"]


@lie("results", "engine.hidden is missing or unexplained")
def samples_of_an_engine_nobody_speaks_of(draft):
    samples(draft)["engine.hidden"] = samples(draft)[f"engine.{CPU}"]


@lie("results", "no validation image was run", "unchecked")
def an_empty_validation(draft):
    samples(draft)["labels"] = samples(draft)["labels"][:0]


@lie("results", "none of the 2 engines was run", "unchecked")
def no_engine_measured(draft):
    draft.engine().update(status="not run", why_not="no time")
    for name in (f"engine.{CPU}", f"certification.{CPU}", f"latency.{CPU}", f"latency.{CPU}.dense"):
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


@lie(f"latency:{CPU}", "was timed", "unchecked")
def no_call_at_all(draft):
    for name in (f"latency.{CPU}", f"latency.{CPU}.dense"):
        samples(draft)[name] = samples(draft)[name][:0]


@lie(f"latency:{CPU}", "too few for an interval")
def one_block_has_no_spread(draft):
    draft.json["recipe.lock.json"]["validate"]["blocks"] = 1


@lie(f"latency:{CPU}", "don't divide into 7 blocks")
def blocks_that_do_not_fit(draft):
    draft.json["recipe.lock.json"]["validate"]["blocks"] = 7


@lie(f"latency:{CPU}", "is outside of")
def a_batch_the_engine_was_not_built_for(draft):
    latency(draft)["batch"] = 128


@lie(f"latency:{CPU}", "threads are stated")
def more_threads_than_stated(draft):
    latency(draft)["threads"] = 4
