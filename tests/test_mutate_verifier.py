"""Each guard of verify.py is there for a forgery: a sample of them here, all of them by tools/mutate_verifier.py."""

import ast
import random
from pathlib import Path

import pytest
from conftest import loaded

TOOL = Path(__file__).parents[1] / "tools" / "mutate_verifier.py"
SAMPLE = 25


tool = loaded(TOOL)


@pytest.fixture(scope="module")
def tree():
    return ast.parse(tool.VERIFIER.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base(tree, tmp_path_factory):
    """Every forgery told to the checker as it is."""
    return tool.base_of(tree, tmp_path_factory.mktemp("lies"), lambda *_: None)


def test_every_guard_refuses_some_forgery_or_says_why_none_can_show_it(tree, base):
    silent = [guard.key for guard in tool.guards_of(tree) if not base.touching(guard)]
    assert set(silent) == set(tool.UNNEEDED)


def test_without_a_guard_some_forgery_is_no_longer_refused_for_its_reason(tree, base):
    guards = random.Random(0).sample([g for g in tool.guards_of(tree) if g.key not in tool.UNNEEDED], SAMPLE)
    left = [guard.key for guard, forgery in tool.survey(tree, guards, base) if not forgery]
    assert not left


def test_a_guard_that_no_forgery_needs_is_noticed(tree, base):
    """A condition said twice: neither of the two is needed, and the tool says so."""
    [guard, *_] = [g for g in tool.guards_of(tree) if g.function == "check_digest"]
    source = ast.unparse(tree).replace("must(own == expect", "must(own == expect.lower().removeprefix('sha256:'), f'{expect} expected was');    must(own == expect", 1)  # fmt: skip
    twice = ast.parse(source)
    own = next(g for g in tool.guards_of(twice) if g.function == "check_digest")
    at = next(i for i, lie in enumerate(base.lies) if lie.claim == "digest")
    module = tool.load(tool.without(twice, own), base.intervals)
    assert tool.refuses(tool.forgeries().findings_of(module, base.folders[at], base.lies[at]), base.lies[at])
    assert tool.needs(tree, guard, base) == base.lies[at].name


def test_the_guards_are_taken_out_one_by_one():
    source = "def f(a, b):\n    must(a and b, 'x')\n    if a or b:\n        raise ValueError('y')\n"
    tree = ast.parse(source)
    texts = []
    for guard in tool.guards_of(tree):
        texts.append(ast.unparse(tool.without(tree, guard)).split("\n", 1)[1])
    whole = "    must(a and b, 'x')\n    if a or b:\n        raise ValueError('y')"
    assert texts == [
        whole.replace("must(a and b, 'x')", "pass"),
        whole.replace("a and b", "True and b"),
        whole.replace("a and b", "a and True"),
        whole.replace("a or b", "False or b"),
        whole.replace("a or b", "a or False"),
        whole.replace("raise ValueError('y')", "pass"),
    ]
