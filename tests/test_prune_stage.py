"""What the prune stage writes, beside the weights: orders, proofs, reconstruction; and that they are true."""

import copy

import pytest
import torch
from conftest import QUICKSTART, SMALL
from safetensors.torch import load_file
from torch import nn

import mpdeploy
from mpdeploy.models import rebuild
from mpdeploy.pruning.capture import capture
from mpdeploy.pruning.layers import choose
from mpdeploy.pruning.zero_budget import reduce_network
from mpdeploy.stages.prune import fold_orders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sets = (*SMALL, "prune.zero_budget=true", "prune.reconstruct=10")
    return mpdeploy.run(QUICKSTART, to="certify", sets=sets, store=tmp_path_factory.mktemp("store"))


def test_the_folded_orders_leave_the_dense_logits_as_they_are(run):
    source, pruned = run.artifacts["source"], run.artifacts["prune"]
    state = load_file(source.path("dense.safetensors"))
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = rebuild(source.json("model.json"), {k: v.clone() for k, v in state.items()})(images)
        fold_orders(state, pruned.json("orders.json"))
        after = rebuild(source.json("model.json"), state)(images)
    orders = pruned.json("orders.json")
    assert orders["folded"] and orders["logit_change"] < 1e-5
    assert (after - before).abs().max() < 1e-5 * (before.max() - before.min())
    # They did move something: the function is the same, the weights are not.
    moved = orders["folded"][0]["coupling"]["consumers"][0]["tensor"]
    assert not torch.equal(state[moved], load_file(source.path("dense.safetensors"))[moved])


def test_every_order_kept_lowered_the_held_out_error_and_every_other_says_why(run):
    tried = run.artifacts["prune"].json("orders.json")["tried"]
    kinds = {row["kind"] for row in tried}
    assert {"residual", "attention value", "hidden"} <= kinds
    for row in tried:
        assert row["kept_after"] >= row["kept_before"]
        assert (row["error_after"] < row["error_before"]) == row["order"] == (row["reason"] == "")


def test_the_certificate_holds_the_proof_of_the_zero_budget(run):
    layers = {row["name"]: row for row in run.artifacts["prune"].json("layers.json")}
    proofs = run.artifacts["certify"].json("certificate.json")["zero_budget"]
    assert set(proofs) == {name for name, row in layers.items() if row["pattern"]}
    for proof in proofs.values():
        assert proof["residual"] <= proof["allowance"] < 1e-4
        assert proof["rank"] <= proof["inputs"]
    # Behind a LayerNorm the inputs sum to a constant once they are rescaled: one direction is missing.
    assert proofs["blocks.1.mlp.fc1"]["rank"] == proofs["blocks.1.mlp.fc1"]["inputs"] - 1


def test_reconstruction_never_raises_a_blocks_held_out_error_and_keeps_the_pattern(run):
    blocks = run.artifacts["prune"].json("reconstruction.json")
    assert [name for block in blocks for name in block["layers"]] == [
        row["name"] for row in run.artifacts["prune"].json("layers.json") if row["pattern"]
    ]
    assert all(block["error_after"] <= block["error_before"] for block in blocks)


class Dead(nn.Module):
    """Its second layer gets inputs of which the first four are always zero and the next two never change."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight[:6] = 0
            self.first.bias[:4], self.first.bias[4:6] = -1, 2

    def forward(self, images):
        return self.head(torch.relu(self.second(torch.relu(self.first(images.flatten(1))))))


def test_dead_and_constant_inputs_are_removed_and_the_outputs_stay():
    torch.manual_seed(0)
    model, images = Dead().eval(), torch.randn(256, 3, 2, 2)
    before = copy.deepcopy(model)
    layers = [layer for layer in choose(model, "2:4", [], (3, 2, 2)) if layer.name == "second"]
    found = reduce_network(model, capture(model, (3, 2, 2)), [images], layers, progress=lambda done, total: None)
    assert (found["second"].dead, found["second"].constant, found["second"].inputs) == (4, 2, 16)
    assert not model.second.weight[:, :6].any()
    assert before.second.weight[:, :6].all()
    assert torch.allclose(model(images), before(images), atol=1e-6)
    assert not torch.equal(model.second.bias, before.second.bias)
