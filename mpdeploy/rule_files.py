"""The deployment rule as two files that run beside an engine: abstain.py and abstain.json."""

from importlib.resources import files

from mpdeploy.artifact import dumps
from mpdeploy.certify.deployment import Rule
from mpdeploy.errors import StageFailed

SCHEMA = 1


def rule_files(rule: Rule, classes: int, engine_id: str) -> dict[str, str]:
    """Return file name -> text: the stand-alone check and the rule that it reads, strict JSON.

    Args:
        rule: without a tau the check never keeps a label.
        classes: logits per sample.
        engine_id: the engine that the rule was proved for.

    Raises:
        StageFailed: fewer than two classes.
    """
    if classes < 2:
        raise StageFailed(f"A rule on margins needs two classes; {engine_id} has {classes}.")
    values = {
        "schema": SCHEMA,
        "engine": engine_id,
        "classes": classes,
        "tau": rule.tau,
        "alpha": rule.alpha,
        "confidence": rule.confidence,
        "candidates": rule.candidates,
        "abstains": rule.abstains,
        "statement": rule.statement,
    }
    check = files("mpdeploy").joinpath("abstain.py").read_text(encoding="utf-8")
    return {"abstain.py": check, "abstain.json": dumps(values)}
