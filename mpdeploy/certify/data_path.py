"""L2, the paper's data-path certificate: L_s ||R psi(s)||_inf of every changed operator, and what follows from it.

Two twins: the same operators, other constants. Operators whose constants differ are the steps j = 1..M, in the order
of the graph. The intermediate network j has the other network's constants up to step j and the dense ones after it, so
psi_j, the input of step j, is that of the other network's own forward, and the tail is dense. Step j displaces its
operator's output by R_j psi_j, biases included.

Two proved bounds of what that does to the logits, both on the whole box |d_i| <= |(R_j psi_j)_i| around the operator's
output in network j, which holds the segment between both networks: L_s, a Lipschitz constant on it from the maximum
norm to the maximum norm, for statements along the path A_theta; and the smaller of L_s ||R_j psi_j||_inf and the
enclosure of the logits, `eta`, for statements about its two ends. For a single known change the paired forward is
exact and costs less; these bounds also speak for every other displacement within the box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpdeploy.certify import objective
from mpdeploy.certify.box_rules import DOWN, UP, Box, Prepared, Value
from mpdeploy.certify.boxes import ball, propagate, step
from mpdeploy.certify.objective import NO_CHANGE, Change, Claim, Penalty, change_between
from mpdeploy.certify.program import Op, Program, evaluate, run
from mpdeploy.errors import StageFailed

_NOTHING = 1e-200  # a displacement below it is zero but for the allowance for underflow


@dataclass(frozen=True)
class Step:
    """One changed operator; arrays are float64 [n] over the samples.

    Attributes:
        op: its name.
        change: of its constants, all of them together.
        displaced: bound of ||R_j psi_j||_inf.
        lipschitz: L_s of the tail on the box of all displacements as large; inf where there is no bound.
        eta: bound of ||z^(j) - z^(j-1)||_inf.
        measured: the same, as float64 computed it.
        norms: largest ||psi_j||_2 that one row of the weights meets; NaN where the operator is no product.
        places: how many outputs a row of the weights makes per sample.
        rows: outputs of the weights.
        columns: inputs of the weights.
        deviation: root mean square of the entries of R_j's weights.
    """

    op: str
    change: Change
    displaced: Tensor
    lipschitz: Tensor
    eta: Tensor
    measured: Tensor
    norms: Tensor
    places: int
    rows: int
    columns: int
    deviation: float


@dataclass(frozen=True)
class DataPath:
    """What was bounded and measured on the samples T.

    Attributes:
        steps: the changed operators in order; step 1 starts from the dense network.
        dense: float64 [n, K], its logits.
        other: float64 [n, K], those of the other network.
        labels: int64 [n], true classes.
        slope: float64 [2]: derivative of CE along -R_1 at the dense network, and <A_1, R_1>, <sign A_1, R_1> follow.
        why: operators for which there is no rule.
    """

    steps: tuple[Step, ...]
    dense: Tensor
    other: Tensor
    labels: Tensor
    slope: tuple[float, float, float]
    why: tuple[str, ...]

    @cached_property
    def change(self) -> Change:
        """Of all steps together."""
        return sum((step.change for step in self.steps), NO_CHANGE)

    @cached_property
    def eta(self) -> Tensor:
        """Sum over the steps of the bound of the largest change of a logit, float64 [n] (Corollary 8)."""
        return _total([step.eta for step in self.steps], len(self.dense))

    @cached_property
    def budget(self) -> float:
        """Sum over the steps of B_j, for the full removal (Theorem 7)."""
        return objective.budget(self.eta)

    @cached_property
    def ranges(self) -> Tensor:
        """Largest minus smallest dense logit, float64 [n]."""
        return self.dense.amax(1) - self.dense.amin(1)

    @property
    def vacuous(self) -> bool:
        """Whether the budget reaches the trivial range; see `objective.trivial_range`."""
        return not self.budget < objective.trivial_range(self.ranges, self.dense.shape[1])

    @property
    def vacuous_samples(self) -> int:
        """Samples whose 2 eta reaches the range of their logits: no margin could have been certified."""
        return int((~(2 * self.eta < self.ranges)).sum())

    def cross_entropy_change(self) -> float:
        """CE of the other network minus that of the dense one, measured."""
        before, after = (objective.cross_entropy(z, self.labels).mean() for z in (self.dense, self.other))
        return float(after - before)

    def objectives(self, penalty: Penalty) -> tuple[float, float]:
        """J of the dense and of the other network, penalties over the changed tensors."""
        before, after = (float(objective.cross_entropy(z, self.labels).mean()) for z in (self.dense, self.other))
        change = self.change
        return before + penalty.of(change.before2, change.before1), after + penalty.of(change.after2, change.after1)

    def claims(self, penalty: Penalty, delta: float = 0.05) -> tuple[Claim, ...]:
        """Every statement of the paper, each with what was measured beside it.

        Args:
            penalty: lambda2 and lambda1 of J.
            delta: probability that the Gaussian budgets may be violated with.
        """
        before, after = self.objectives(penalty)
        plain = self.objectives(Penalty(penalty.lambda2))
        change, spent, moved = self.change, self.budget, self.cross_entropy_change()
        margin, kept = _margin(self.dense), self.dense.argmax(1) == self.other.argmax(1)
        oneshot = (self.other - self.dense).abs().amax(1)
        farthest = float(self.eta.max()) if self.steps else 0.0
        claims = [
            objective.epsilon_form(self.eta, change, penalty, after - before),
            objective.lemma_1(spent, abs(moved)),
            objective.mask_form(spent, change, penalty, after - before),
            objective.additive_form(spent, change, penalty.lambda2, plain[1] - plain[0]),
            objective.update_form(spent, change, penalty, after - before),
            Claim(
                "telescoped", float(oneshot.max()), farthest, bool((oneshot <= self.eta * UP).all()), "proved",
                float(oneshot.max()), "the largest change of a logit is at most the sum of the steps' bounds",
            ),
        ]  # fmt: skip
        claims = [_or_vacuous(claim, self.vacuous) for claim in claims]
        margins = objective.margin_form(self.eta, margin, kept)
        claims.append(_or_vacuous(margins, self.vacuous_samples == len(margin)))
        claims.append(self._zero_budget())
        claims += [self._a_posteriori(margin, kept, oneshot, moved)]
        return (*claims, *self._first_step(penalty), *self._models(delta))

    def _zero_budget(self) -> Claim:
        """R psi = 0 on every sample: the logits are the same, and J falls by exactly its penalty."""
        left = max((float(step.displaced.max()) for step in self.steps), default=0.0)
        same = float((self.other - self.dense).abs().max())
        return Claim(
            "zero_budget", left, 0.0, left <= _NOTHING, "proved", same, "R psi = 0, so every logit stays as it is"
        )

    def _a_posteriori(self, margin: Tensor, kept: Tensor, oneshot: Tensor, moved: float) -> Claim:
        """The measured displacement as eta: for the executed numbers only, and weaker than looking at the labels."""
        open_ = int((~(2 * oneshot < margin)).sum())
        meaning = (
            "samples whose margin is no larger than twice the measured displacement; measured: labels that changed"
        )
        return Claim("a_posteriori", open_, 0.0, open_ == 0, "observed", float((~kept).sum()), meaning)

    def _first_step(self, penalty: Penalty) -> list[Claim]:
        """What the slope at the dense network says of the first step, removed alone."""
        if not self.steps:
            return []
        first = self.steps[0]
        spent = objective.budget(first.lipschitz * first.displaced * UP)
        ce, squares, sizes = self.slope
        slopes = (ce - 2 * penalty.lambda2 * squares - penalty.lambda1 * sizes, ce - 2 * penalty.lambda2 * squares)
        claims = [
            objective.stationarity(spent, first.change, penalty, slopes[0]),
            objective.l2_collapse(spent, first.change, penalty.lambda2, slopes[1]),
        ]
        trivial = objective.trivial_range(self.ranges, self.dense.shape[1])
        return [_or_vacuous(claim, not spent < trivial) for claim in claims]

    def _models(self, delta: float) -> list[Claim]:
        """The Gaussian and the MP budget of all steps that are products; the delta is shared among them."""
        steps = [step for step in self.steps if bool(step.norms.isfinite().all()) and step.deviation > 0]
        if not steps:
            return []
        each, gauss, edges, spent = delta / len(steps), 0.0, 0.0, 0.0
        for s in steps:
            edge = s.deviation * (s.rows**0.5 + s.columns**0.5)
            gauss += objective.gaussian_budget(s.lipschitz, s.norms, s.deviation, s.rows, s.places, each)
            edges += objective.mp_budget(s.lipschitz, s.norms, edge, s.rows, s.columns, s.places, each)
            spent += objective.budget(s.lipschitz * s.displaced)
        claims = [objective.model_form("gaussian", gauss, spent), objective.model_form("mp", edges, spent)]
        trivial = objective.trivial_range(self.ranges, self.dense.shape[1])
        return [_or_vacuous(claim, not claim.right < trivial) for claim in claims]

    def facts(self, penalty: Penalty, delta: float = 0.05) -> dict[str, Any]:
        """Return everything for JSON; None where a number is not finite."""
        before, after = self.objectives(penalty)
        two, one = objective.critical_lambdas(self.budget, self.change)
        return {
            "samples": len(self.dense),
            "steps": [
                {
                    "op": s.op,
                    "displaced_max": _finite(s.displaced.max()),
                    "lipschitz_median": _finite(s.lipschitz.median()),
                    "eta_max": _finite(s.eta.max()),
                    "measured_max": _finite(s.measured.max()),
                    "budget": _finite(objective.budget(s.eta)),
                    "removed2": s.change.removed2,
                    "removed1": s.change.removed1,
                }
                for s in self.steps
            ],
            "budget": _finite(self.budget),
            "lambda2": penalty.lambda2,
            "lambda1": penalty.lambda1,
            "critical_lambda2": _finite(two),
            "critical_lambda1": _finite(one),
            "objective": {"dense": before, "other": after},
            "vacuous_samples": self.vacuous_samples,
            "no_rule_for": list(self.why),
            "claims": [claim.facts() for claim in self.claims(penalty, delta)],
        }


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _total(parts: Sequence[Tensor], samples: int) -> Tensor:
    return torch.stack([torch.zeros(samples, dtype=torch.float64), *parts]).sum(0) * UP


def _margin(logits: Tensor) -> Tensor:
    top = logits.topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]) * DOWN


def _or_vacuous(claim: Claim, vacuous: bool) -> Claim:
    if not vacuous:
        return claim
    return Claim(claim.name, claim.left, claim.right, False, "vacuous", claim.measured, claim.meaning)


def prune_restore_claims(
    restored: DataPath, masked: DataPath, restoring: Change, penalty: Penalty
) -> tuple[Claim, ...]:
    """Theorem 5 for A = S + Q + P: P removed and Q restored, against both removed.

    Args:
        restored: from A to S + Q.
        masked: from A to S.
        restoring: Q, the change from S + Q to S; `change_between` of each tensor, added up.
        penalty: the elastic net.
    """
    dense, kept = restored.objectives(penalty)
    start, least = masked.objectives(penalty)
    claims = (
        objective.prune_restore_form(restored.budget, restored.change, penalty, kept - dense),
        # Both differences are to the same A, so the tensors that only one of them counts cancel.
        objective.restoring_form(restored.budget, masked.budget, restoring, penalty, (kept - dense) - (least - start)),
    )
    return tuple(_or_vacuous(claim, restored.vacuous) for claim in claims)


def data_path(dense: Program, other: Program, images: Tensor, labels: Tensor) -> DataPath:
    """Bound and measure every step from `dense` to `other` on the samples.

    Args:
        dense: the network before.
        other: its twin: the same operators, some of them with other constants (weights, biases, norms).
        images: [n, C, H, W].
        labels: [n], true classes.

    Raises:
        StageFailed: the two are no twins.
    """
    changed = changed_ops(dense, other)
    one, two = Prepared(dense), Prepared(other)
    samples = [_sample(one, two, changed, image[None]) for image in images]
    n = len(samples)
    columns = [[sample.steps[j] for sample in samples] for j in range(len(changed))]
    steps = tuple(_collected(one, two, op, column) for op, column in zip(changed, columns, strict=True))
    logits = [torch.stack([sample.logits[k] for sample in samples]) if n else torch.zeros(0, 1) for k in (0, 1)]
    slope = _slope(one, two, changed[0], images, labels) if changed and n else (0.0, 0.0, 0.0)
    why = tuple(sorted({sample.why for sample in samples} - {""}))
    return DataPath(steps, logits[0], logits[1], torch.as_tensor(labels).long().cpu(), slope, why)


def changed_ops(dense: Program, other: Program) -> tuple[Op, ...]:
    """The operators whose constants differ, in the order of the graph.

    Raises:
        StageFailed: an operator, its attributes or the shape of a constant differs: the two are no twins.
    """
    hint = "certify a network against the one it was pruned from, exported with the same settings"
    if [(op.name, op.kind, op.inputs, op.outputs) for op in dense.ops] != [
        (op.name, op.kind, op.inputs, op.outputs) for op in other.ops
    ]:
        raise StageFailed("The two graphs do not have the same operators in the same order.", hint=hint)
    found = []
    for op, twin in zip(dense.ops, other.ops, strict=True):
        if str(sorted(op.attributes.items())) != str(sorted(twin.attributes.items())):
            raise StageFailed(f"The operator {op.name} ({op.kind}) has other attributes in the two graphs.", hint=hint)
        pairs = [(dense.constants[name], other.constants[name]) for name in op.inputs if name in dense.constants]
        if any(a.shape != b.shape for a, b in pairs):
            raise StageFailed(f"A constant of the operator {op.name} ({op.kind}) has another shape.", hint=hint)
        if any(not np.array_equal(a, b) for a, b in pairs):
            if all(name in dense.constants for name in op.inputs if name):
                raise StageFailed(
                    f"The operator {op.name} ({op.kind}) changes constants before they meet the data, "
                    "so there is no step to bound.",
                    hint="compare the float32 graphs, before they are quantised",
                )
            found.append(op)
    return tuple(found)


@dataclass(frozen=True)
class _SampleStep:
    displaced: float
    lipschitz: float
    eta: float
    measured: float
    norm: float
    places: int


@dataclass(frozen=True)
class _Sample:
    steps: tuple[_SampleStep, ...]
    logits: tuple[Tensor, Tensor]
    why: str


def _sample(dense: Prepared, other: Prepared, changed: Sequence[Op], image: Tensor) -> _Sample:
    program = dense.program
    ahead = propagate(other, image)
    before = _box(propagate(dense, image)[program.output])
    first, why = before.centre[0], before.why
    span = float(first.max() - first.min())
    position = {op.name: index for index, op in enumerate(program.ops)}
    steps = []
    for op in changed:
        known = _prefix(other.program, ahead, position[op.name])
        pushed = displacement(dense, other, op, ahead)
        radius = float(pushed.max())
        known[op.outputs[0]] = ball(_box(ahead[op.outputs[0]]), pushed)
        reached = _box(propagate(dense, image, known=known, gains=True)[program.output])
        known[op.outputs[0]] = ahead[op.outputs[0]]
        assert reached.gain is not None
        lipschitz, farthest = float(reached.gain.max()), float(reached.radius.max())
        # z^(j-1) and z^(j) are both in this enclosure; where that says something, a closer one of z^(j) is worth a run.
        after, apart = reached, 2 * farthest * UP
        if apart < span:
            after = _box(propagate(dense, image, known=known)[program.output])
            apart = float((reached.radius + after.radius).max()) * UP
        eta = min(lipschitz * radius * UP if radius > 0 else 0.0, apart)
        measured = float((after.centre - before.centre).abs().max())
        norm, places = _input_norm(other, op, ahead)
        steps.append(_SampleStep(radius, lipschitz, eta, measured, norm, places))
        before, why = after, why or reached.why
    return _Sample(tuple(steps), (first, _box(ahead[program.output]).centre[0]), why)


def _box(value: Value) -> Box:
    assert isinstance(value, Box)
    return value


def _prefix(program: Program, values: Mapping[str, Value], last: int) -> dict[str, Value]:
    """The values that operators up to number `last` make."""
    return {name: values[name] for op in program.ops[: last + 1] for name in op.outputs if name}


def displacement(dense: Prepared, other: Prepared, op: Op, values: Mapping[str, Value]) -> Tensor:
    """Proved bound of |op(psi; dense constants) - op(psi; other constants)|, psi from the other network's values.

    The smaller of two: the difference of what float64 computes and both roundings; and |R| |psi|, for products, which
    is 0 where R meets only zeros.
    """
    constants = set(other.constants)
    theirs = [None if not name else values[name] for name in op.inputs]
    ours = [
        dense.constants[name] if name in constants else value for name, value in zip(op.inputs, theirs, strict=True)
    ]
    a, b = _box(step(dense, op, ours)[0]), _box(step(other, op, theirs)[0])
    computed = ((a.centre - b.centre).abs() + a.radius + b.radius) * UP
    removed = [
        (x - y).abs()
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x.magnitude
        if isinstance(x, Box)
        else None
        for x, y in zip(ours, theirs, strict=True)
    ]
    if op.kind not in ("Conv", "Gemm", "MatMul") or sum(isinstance(x, Box) for x in ours) != 1:
        return computed
    absolute = Op(op.name, op.kind, op.inputs, op.outputs, _positive(op.attributes))
    return torch.minimum(computed, evaluate(absolute, removed)[0] * UP)


def _positive(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: abs(value) if name in ("alpha", "beta") else value for name, value in attributes.items()}


def _input_norm(other: Prepared, op: Op, values: Mapping[str, Value]) -> tuple[float, int]:
    """Largest 2-norm of what one row of the weights meets, and how many such rows of inputs there are; NaN if none."""
    if op.kind not in ("Conv", "Gemm", "MatMul") or op.inputs[1] not in other.constants:
        return float("nan"), 0
    psi = _box(values[op.inputs[0]]).centre
    ones = torch.ones_like(other.constants[op.inputs[1]])
    plain = Op(op.name, op.kind, op.inputs[:2], op.outputs, {**op.attributes, "alpha": 1.0})
    squares = evaluate(plain, [psi.square(), ones])[0]
    rows = len(ones) if op.kind == "Conv" or op.attributes.get("transB", 0) else ones.shape[-1]
    return float(squares.max().sqrt()), squares.numel() // rows


def _collected(dense: Prepared, other: Prepared, op: Op, samples: Sequence[_SampleStep]) -> Step:
    names = [name for name in op.inputs if name in dense.constants]
    pairs = [(dense.constants[name], other.constants[name]) for name in names]
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    weight = floats[0][0] - floats[0][1] if floats else torch.zeros(1, 1)
    rows = len(weight) if op.kind == "Conv" or op.attributes.get("transB", 0) else weight.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Step(
        op=op.name,
        change=sum((change_between(a, b) for a, b in floats if not torch.equal(a, b)), NO_CHANGE),
        displaced=column([s.displaced for s in samples]),
        lipschitz=column([s.lipschitz for s in samples]),
        eta=column([s.eta for s in samples]),
        measured=column([s.measured for s in samples]),
        norms=column([s.norm for s in samples]),
        places=max((s.places for s in samples), default=0),
        rows=rows,
        columns=max(1, weight.numel() // rows),
        deviation=float(weight.square().mean().sqrt()),
    )


def _slope(dense: Prepared, other: Prepared, op: Op, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Derivative of CE along -R_1 at the dense network, <A_1, R_1> and <sign A_1, R_1>.

    Where an entry of A_1 is 0 and R_1 is not, |A - hR| rises along -R: it counts as -|R|.
    """
    names = [name for name in op.inputs if name in dense.constants and dense.constants[name].is_floating_point()]
    leaves = {name: dense.constants[name].clone().requires_grad_() for name in names}

    def each(at: Op, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if at.name == op.name:
            inputs = [leaves.get(name, value) for name, value in zip(at.inputs, inputs, strict=True)]
        return evaluate(at, inputs)

    logits = run(dense.program, images, dtype=torch.float64, each=each)[dense.program.output]
    loss = objective.cross_entropy(logits, torch.as_tensor(labels)).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    ce = squares = sizes = 0.0
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        a, r = leaf.detach(), (leaf - other.constants[name]).detach()
        ce -= float((gradient * r).sum())
        squares += float((a * r).sum())
        sizes += float((a.sign() * r).sum() - r[a == 0].abs().sum())
    return ce, squares, sizes


def rank_layers(
    program: Program, images: Tensor, proposals: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
) -> dict[str, float]:
    """Estimate, without running a changed network, how much each proposed change costs the margin to the runner-up.

    One forward and one backward pass of the unchanged network give every operator's adjoint a, the gradient of
    z_j - z_y with respect to its output, y the label and j the runner-up. The score is the mean over the samples of
    sum_i |a_i| |(R psi)_i|: first order, signs dropped, psi of the unchanged network. It is an estimate to rank
    layers and masks by, never a bound: no remainder is counted.

    Args:
        program: the network that would be changed.
        images: [n, C, H, W].
        proposals: operator name -> constant name -> the array that would replace it.

    Returns:
        Operator name -> score in logits, for each proposal.

    Raises:
        StageFailed: a proposal names an operator or a constant that the program does not have.
    """
    ops = {op.name: op for op in program.ops}
    for name, arrays in proposals.items():
        if name not in ops or not set(arrays) <= set(ops[name].inputs):
            raise StageFailed(f"There is no operator {name} with the constants {', '.join(arrays)} in the graph.")
    outputs: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}

    def each(op: Op, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        results = evaluate(op, inputs)
        if op.name in proposals:
            arrays = {name: torch.from_numpy(np.array(array)).to(images) for name, array in proposals[op.name].items()}
            with torch.no_grad():
                changed = [arrays.get(name, value) for name, value in zip(op.inputs, inputs, strict=True)]
                moved[op.name] = (evaluate(op, changed)[0] - results[0]).abs()
            outputs[op.name] = results[0]
        return results

    with torch.enable_grad():
        source = images.detach().requires_grad_()
        logits = run(program, source, dtype=images.dtype, each=each)[program.output]
        top = logits.topk(2, dim=1).values
        adjoints = torch.autograd.grad((top[:, 1] - top[:, 0]).sum(), list(outputs.values()))
    return {
        name: float((adjoint.abs() * moved[name]).sum() / len(images))
        for name, adjoint in zip(outputs, adjoints, strict=True)
    }
