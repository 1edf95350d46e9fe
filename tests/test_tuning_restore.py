"""A prune-restore cycle in the tune stage: refill free slots, over-prune, grow, restore by movement, tune."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import QUICKSTART, SMALL
from safetensors.torch import load_file
from tuning_networks import LABELS, PATTERN, PIXELS, SAMPLES, Killed, chain, killer, networks, same, tune

import mpdeploy
from mpdeploy.errors import RecipeError, StageFailed
from mpdeploy.pruning.patterns import as_rows, bad_groups
from mpdeploy.pruning.spectrum import fit
from mpdeploy.recipe import Tune, load_recipe
from mpdeploy.stage import Given
from mpdeploy.stages.tune import _Bench, _restored, layer_weights
from mpdeploy.tuning import grow
from mpdeploy.verify import overall

CHEAP = ('prune.method="magnitude"', "prune.refit=false", "prune.permute=0")


def some_of(student, names, seed=5):
    """Every third entry, or so, of some weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: student.get_parameter(f"{name}.weight").shape for name in names}
    return {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in shapes.items()}


def grown(student, teacher, moving, *, images=lambda some: PIXELS[some], progress=lambda done, total: None, **more):
    settings = {"steps": 4, "lr": 3e-3, "batch": 8, "seed": 3, **more}
    return grow(student, teacher, moving, images, LABELS, progress=progress, **settings)


@pytest.mark.parametrize("more", [{}, {"feature_weight": 0.5, "precision": "bf16", "flip": True}])
def test_only_the_given_entries_move_and_all_else_stays_bit_for_bit(more):
    student, teacher, masks = chain()
    student.head.bias.requires_grad_(False)
    start, dense = copy.deepcopy(student), copy.deepcopy(teacher)
    moving = some_of(student, list(masks)[:3])
    assert len(grown(student, teacher, moving, **more)) == 4
    before = start.state_dict()
    for name, value in student.state_dict().items():
        may_move = moving.get(name.removesuffix(".weight"), torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~may_move], before[name][~may_move])
        assert float((value != before[name])[may_move].float().mean() if may_move.any() else 1.0) > 0.9
    assert same(teacher, dense) and not student.training
    assert [name for name, value in student.named_parameters() if not value.requires_grad] == ["head.bias"]


def test_a_network_with_batch_norm_grows_only_where_it_may():
    student, teacher, masks = networks("resnet10t")
    pixels = torch.randn(SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    start, last = copy.deepcopy(student.state_dict()), list(masks)[-1]
    grown(student, teacher, some_of(student, [last]), steps=2, images=lambda some: pixels[some])
    apart = [name for name, value in student.state_dict().items() if not torch.equal(value, start[name])]
    assert apart == [f"{last}.weight"]


def test_growing_sees_the_samples_that_tuning_sees_and_goes_round_as_often_as_its_steps_need():
    seen = {}
    for train in (grown, tune):
        student, teacher, masks = chain()
        seen[train] = []
        first = masks if train is tune else some_of(student, masks)
        more = {"epochs": 2} if train is tune else {"steps": 7}
        train(student, teacher, first, images=lambda some, own=seen[train]: own.append(some) or PIXELS[some], **more)
    assert len(seen[grown]) == 7
    assert all(np.array_equal(a, b) for a, b in zip(seen[grown], seen[tune], strict=False))


def test_a_killed_growth_is_repeated_and_a_finished_one_is_read_back(tmp_path):
    whole, teacher, masks = chain()
    moving = some_of(whole, masks)
    losses = grown(whole, teacher, moving)
    student, _, _ = chain()
    with pytest.raises(Killed):
        grown(student, teacher, moving, checkpoint=tmp_path, progress=killer(2))
    student, _, _ = chain()
    assert grown(student, teacher, moving, checkpoint=tmp_path) == losses and same(student, whole)
    student, _, _ = chain()
    assert grown(student, teacher, moving, checkpoint=tmp_path, images=None) == losses and same(student, whole)
    student, _, _ = chain()
    with pytest.raises(StageFailed, match="belongs to a run with other settings"):
        grown(student, teacher, some_of(student, masks, seed=6), checkpoint=tmp_path)


def test_wrong_steps_and_masks_are_refused():
    student, teacher, masks = chain()
    with pytest.raises(RecipeError, match=r"can.t start: steps must be at least 1\."):
        grown(student, teacher, masks, steps=0)
    with pytest.raises(StageFailed, match="no such weight"):
        grown(student, teacher, {"blocks.9.fc": torch.ones(2, 2, dtype=torch.bool)})


class Cycle:
    """A cycle of the tune stage on a small network, some of whose groups have free slots."""

    def __init__(self, folder, report=lambda *line: None):
        self.student, self.teacher, self.masks = chain()
        with torch.no_grad():
            for name, mask in self.masks.items():
                mask[:, ::8] = False
                self.student.get_parameter(f"{name}.weight").mul_(mask)
        self.thinned = {name: mask.clone() for name, mask in self.masks.items()}
        dense = self.teacher.state_dict()
        table = Tune(epochs=2, lr=3e-3, batch=8, seed=3, restore=0.1, restore_steps=4)
        given = Given({}, folder, report)
        patterns = dict.fromkeys(self.masks, PATTERN)
        self.bench = _Bench(
            table, given, self.student, self.teacher, patterns, lambda some: PIXELS[some], LABELS, "fp32", "cpu"
        )
        self.run = lambda: _restored(self.bench, self.masks, dense, rows_of(dense, self.masks))


def rows_of(dense, names):
    keys = ("sigma", "edge", "ks", "spikes", "bulk_fraction", "rows", "cols")
    laws = {name: fit(dense[f"{name}.weight"].double().flatten(1).numpy()) for name in names}
    return [{"name": name, "spectrum": {key: getattr(law, key) for key in keys}} for name, law in laws.items()]


def test_a_cycle_fills_free_slots_moves_masks_keeps_the_pattern_and_counts(tmp_path):
    cycle = Cycle(tmp_path)
    history, counts = cycle.run()
    slots = 0
    for name, mask in cycle.masks.items():
        weight = cycle.student.get_parameter(f"{name}.weight")
        assert bad_groups(weight, PATTERN) == 0
        assert (as_rows(weight != 0).reshape(-1, 4).sum(1) == 2).all()
        assert torch.equal(mask, cycle.thinned[name])
        slots += mask.numel() // 2
    assert len(history.losses) == 10
    assert counts["refilled"] == slots - sum(int(mask.sum()) for mask in cycle.masks.values()) > 0
    assert counts["dropped"] == counts["returned"] + counts["swapped"] == round(0.1 * slots)
    assert 0 < counts["swapped"] < counts["dropped"]
    assert len(counts["growing_loss"]) == 2


def test_a_cycle_killed_while_growing_or_tuning_resumes_to_the_same_bits(tmp_path):
    whole = Cycle(tmp_path / "whole")
    history, counts = whole.run()
    for doing, after in (("growing", 2), ("growing", 4), ("tuning", 3), ("tuning", 10)):

        def report(label, done, total, at=(doing, after)):
            if label.startswith(at[0]) and done == at[1]:
                raise Killed

        folder = tmp_path / f"{doing}-{after}"
        with pytest.raises(Killed):
            Cycle(folder, report).run()
        again = Cycle(folder)
        resumed, same_counts = again.run()
        assert same(again.student, whole.student)
        assert (resumed.losses, same_counts) == (history.losses, counts)


def test_layers_with_a_larger_edge_have_more_weights_at_stake():
    student, _, masks = chain()
    rows = rows_of(student.state_dict(), masks)
    weights = layer_weights([*rows, {"name": "stem", "spectrum": None}], masks)
    edges = {
        row["name"]: row["spectrum"]["edge"] * max(row["spectrum"]["rows"], row["spectrum"]["cols"]) for row in rows
    }
    assert sorted(weights, key=weights.get) == sorted(edges, key=edges.get)
    assert weights.keys() == masks.keys() and max(weights.values()) > 1 > min(weights.values())


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """The cut-down quickstart on a handful of images, with a cycle before one epoch."""
    home = tmp_path_factory.mktemp("restored")
    with np.load(QUICKSTART.parent / "quickstart" / "fashion_mnist_slice.npz") as data:
        few = {name: values[:360] if len(values) > 360 else values for name, values in data.items()}
    np.savez(home / "few.npz", **few)
    more = (f'data.path="{home / "few.npz"}"', *CHEAP, "tune.epochs=1")
    sets = (*SMALL, *more, "tune.restore=0.05", "tune.restore_steps=3")
    return home, mpdeploy.run(QUICKSTART, sets=sets, store=home / "store", out=home / "bundle")


def test_the_pipeline_restores_and_its_layers_state_the_new_masks(restored):
    _, result = restored
    tuned, pruned = result.artifacts["tune"], result.artifacts["prune"]
    counts = tuned.manifest["facts"]["restored"]
    assert counts == tuned.json("tune.json")["restored"]
    before, after = load_file(pruned.path("pruned.safetensors")), load_file(tuned.path("tuned.safetensors"))
    changed = 0
    for row in tuned.json("layers.json"):
        if not row["pattern"]:
            continue
        old, new = before[f"{row['name']}.weight"] != 0, after[f"{row['name']}.weight"] != 0
        assert bad_groups(new, PATTERN) == row["bad_groups"] == 0
        assert row["density"] == pytest.approx(float(new.double().mean()), abs=1e-12)
        changed += int((new & ~old).sum())
    assert counts["dropped"] == counts["returned"] + counts["swapped"]
    # Tuning may leave an exact zero, but hardly ever does.
    assert counts["refilled"] + counts["swapped"] == pytest.approx(changed, abs=3) and changed > 0


def test_the_independent_checker_accepts_a_restored_bundle(restored):
    home, _ = restored
    findings = mpdeploy.verify_bundle(home / "bundle")
    assert overall(findings) == "holds", [finding for finding in findings if finding.verdict != "holds"]


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (["tune.restore=0.1", "tune.epochs=0"], r"tune: restore needs epochs of at least 1"),
        (["tune.restore=0.1", "tune.refresh=5"], r"tune: restore and refresh both change the masks"),
        (["tune.restore=1.0"], r"tune\.restore: input should be less than 1"),
        (["tune.restore_steps=0"], r"tune\.restore_steps: input should be greater than or equal to 1"),
        (
            ["tune.restore=0.1", "prune.pattern=unstructured", "prune.sparsity=0.5", "prune.method=seb"],
            r"tune\.restore: weights return inside N:M groups",
        ),
    ],
)
def test_a_restore_that_cannot_be_is_one_sentence(sets, sentence):
    with pytest.raises(RecipeError, match=sentence) as caught:
        load_recipe(QUICKSTART, sets)
    assert len(caught.value.what.splitlines()) == 1


def test_restoring_is_off_unless_asked_for():
    table = load_recipe(QUICKSTART).recipe.tune
    assert (table.restore, table.restore_steps) == (0.0, 50)
    assert json.loads(table.model_dump_json())["restore"] == 0
