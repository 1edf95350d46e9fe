import pytest
import torch

from mpdeploy.errors import StageFailed
from mpdeploy.pruning import refit as module
from mpdeploy.pruning.patterns import Pattern, project
from mpdeploy.pruning.refit import refit_rows

KEEP = Pattern(2, 4)


def problem(rows, inputs, samples=2000, seed=0):
    """Correlated inputs, the dense weights, outputs that are wanted beyond them, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    mix *= torch.arange(1, inputs + 1, dtype=torch.float64)[:, None] ** -0.7
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    y = x @ weight.T + 0.3 * torch.randn(samples, rows, generator=generator, dtype=torch.float64)
    mask = project(weight.abs() * x.square().mean(dim=0).sqrt(), KEEP)
    return x, y, weight, mask


@pytest.mark.parametrize("direct", [True, False])
def test_the_refit_is_the_least_squares_solution(direct):
    x, y, weight, mask = problem(7, 32)
    ridge = 0.01 * float(x.square().sum(dim=0).mean())
    eye = torch.eye(32, dtype=torch.float64)
    gram = x.T @ x + ridge * eye
    fitted = refit_rows(y.T @ x + ridge * weight, mask, gram, direct=direct)
    for row in range(7):
        kept = mask[row].nonzero()[:, 0]
        left = torch.cat([x[:, kept], ridge**0.5 * eye[:, kept]])
        right = torch.cat([y[:, row], ridge**0.5 * weight[row]])
        best = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        assert torch.allclose(
            fitted.weight[row, kept], best, rtol=1e-8 if direct else 1e-2, atol=1e-9 if direct else 2e-3
        )
    assert not fitted.weight[~mask].any()


def test_the_refit_meets_its_optimality_condition_and_reports_the_residual_truthfully():
    x, y, _, mask = problem(40, 96)
    gram, target = x.T @ x + torch.eye(96, dtype=torch.float64), y.T @ x
    for direct, tolerance in ((True, 1e-10), (False, 1e-4)):
        fitted = refit_rows(target, mask, gram, direct=direct)
        gradient = (fitted.weight @ gram - target) * mask
        relative = (gradient.norm(dim=1) / (target * mask).norm(dim=1)).max()
        assert fitted.residual == pytest.approx(float(relative), rel=1e-9)
        assert fitted.residual <= tolerance
        assert (fitted.iterations == 0) == direct


@pytest.mark.parametrize(("tolerance", "more"), [(1e-3, 2e-2), (1e-4, 2e-4), (1e-5, 2e-6)])
def test_what_conjugate_gradient_leaves_above_the_minimum_falls_with_the_square_of_its_tolerance(tolerance, more):
    x, y, weight, mask = problem(64, 320)
    gram = x.T @ x
    gram += 0.01 * gram.diagonal().mean() * torch.eye(320, dtype=torch.float64)
    target = y.T @ x
    ideal = torch.linalg.solve(gram, target.T).T

    def error(candidate):
        change = candidate - ideal
        return float(((change @ gram) * change).sum())

    exact = error(refit_rows(target, mask, gram, direct=True).weight)
    iterative = error(refit_rows(target, mask, gram, direct=False, tolerance=tolerance).weight)
    assert -1e-12 <= iterative / exact - 1 < more
    assert exact < 0.8 * error(weight * mask)


def test_a_good_start_saves_iterations_and_a_perfect_one_all_of_them():
    x, y, _, mask = problem(30, 96)
    gram, target = x.T @ x + torch.eye(96, dtype=torch.float64), y.T @ x
    cold = refit_rows(target, mask, gram, direct=False)
    near = cold.weight * (1 + 1e-3)
    warm = refit_rows(target, mask, gram, start=near, direct=False)
    assert warm.iterations < cold.iterations
    assert warm.residual <= 1e-4
    exact = refit_rows(target, mask, gram, direct=True).weight
    done = refit_rows(target, mask, gram, start=exact, direct=False)
    assert done.iterations == 0
    assert torch.equal(done.weight, exact)
    # What a start holds outside the mask is not used.
    noisy = refit_rows(target, mask, gram, start=near + 7.0 * ~mask, direct=False)
    assert torch.equal(noisy.weight, warm.weight)


def test_float32_gives_the_solution_of_float64():
    x, y, _, mask = problem(20, 64)
    gram, target = x.T @ x + 10 * torch.eye(64, dtype=torch.float64), y.T @ x
    for direct in (True, False):
        wide = refit_rows(target, mask, gram, direct=direct, tolerance=1e-5)
        narrow = refit_rows(target.float(), mask, gram.float(), direct=direct, tolerance=1e-5)
        assert narrow.weight.dtype == torch.float32
        assert narrow.residual < 1e-4
        assert torch.allclose(narrow.weight.double(), wide.weight, atol=1e-3 * float(wide.weight.abs().max()))


def test_factors_in_small_batches_give_the_same_weights(monkeypatch):
    x, y, _, mask = problem(11, 32)
    gram, target = x.T @ x, y.T @ x
    whole = refit_rows(target, mask, gram, direct=True).weight
    monkeypatch.setattr(module, "BATCHED", 3 * 16**2)
    assert torch.allclose(refit_rows(target, mask, gram, direct=True).weight, whole, rtol=1e-12, atol=1e-14)


def test_the_solver_follows_the_number_of_inputs(monkeypatch):
    x, y, _, mask = problem(3, 16)
    assert refit_rows(y.T @ x, mask, x.T @ x).iterations == 0
    monkeypatch.setattr(module, "DIRECT_INPUTS", 15)
    assert refit_rows(y.T @ x, mask, x.T @ x).iterations > 0


def test_rows_that_ask_for_nothing_stay_zero():
    x, y, _, mask = problem(6, 32)
    target = y.T @ x
    target[2] = 0.0
    for direct in (True, False):
        fitted = refit_rows(target, mask, x.T @ x, direct=direct)
        assert not fitted.weight[2].any()
        assert fitted.residual < 1e-3


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_row_that_is_solved_at_once_does_not_spoil_itself_or_others(kind):
    x, _, _, _ = problem(1, 16)
    gram = torch.eye(32, dtype=kind)
    gram[16:, 16:] = (x.T @ x / 2000).to(kind) + 0.01 * torch.eye(16, dtype=kind)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[0, :8], mask[1, 16:24] = True, True
    # The first row's inputs are uncorrelated, so one step solves it exactly; the second takes several.
    target = torch.ones(2, 32, dtype=kind)
    target[1, 16:] = torch.linspace(-2, 3, 16, dtype=kind)
    exact = refit_rows(target, mask, gram, direct=True)
    iterative = refit_rows(target, mask, gram, direct=False)
    assert iterative.residual <= 1e-4
    assert torch.allclose(iterative.weight, exact.weight, atol=1e-2)


def test_a_singular_second_moment_is_refused():
    target, mask = torch.ones(2, 4), torch.tensor([[True, True, False, False]] * 2)
    with pytest.raises(StageFailed, match="singular") as caught:
        refit_rows(target, mask, torch.ones(4, 4, dtype=torch.float64).float())
    assert "raise the damping" in caught.value.hint


def test_what_is_nan_is_not_reported_as_solved():
    x, y, _, mask = problem(5, 32)
    target = y.T @ x
    target[3, mask[3].nonzero()[0, 0]] = float("nan")
    for direct in (True, False):
        fitted = refit_rows(target, mask, x.T @ x, direct=direct)
        assert not fitted.residual <= 1e6
