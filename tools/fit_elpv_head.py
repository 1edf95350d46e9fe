"""Fit the linear head of recipes/elpv.toml: logistic regression on the pretrained trunk's features of ELPV.

Only the training split is used, also to choose the l2 penalty and the pooling (five stratified folds). The
held-out accuracy is printed at the end, once, for the one head that was chosen.

    python tools/fit_elpv_head.py recipes/elpv_head.safetensors
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.special import expit

from mpdeploy.data import Split
from mpdeploy.data.packaged import open_packaged
from mpdeploy.data.splits import stratified
from mpdeploy.models.imgfocus import read_trunk, vit_small_dinov2
from mpdeploy.models.sources import preprocessing_of
from mpdeploy.recipe import Source

Floats = NDArray[np.float64]
PENALTIES = tuple(10.0**power for power in range(-5, 2))
FOLDS = 5
ENTRY = "mpdeploy.models.imgfocus:vit_small_dinov2"


def features(split: Split, pool: str, img_size: int) -> Floats:
    """Return the pooled features [n, 384] of every image of a split."""
    model = vit_small_dinov2(img_size, pool=pool, pretrained=False).eval()
    model.load_state_dict(read_trunk(img_size), strict=False)
    prepare = preprocessing_of(
        model,
        Source.model_validate({"kind": "python", "model": ENTRY, "weights": "random", "args": {"img_size": img_size}}),
    )
    rows = []
    with torch.inference_mode():
        for start in range(0, len(split), 32):
            batch = prepare.apply(split.load(range(start, min(start + 32, len(split)))))
            tokens = model.forward_features(torch.from_numpy(batch))  # type: ignore[operator]
            rows.append(model.forward_head(tokens, pre_logits=True).double().numpy())  # type: ignore[operator]
    return np.concatenate(rows)


def logistic(x: Floats, y: NDArray[np.int64], penalty: float) -> tuple[Floats, float]:
    """Minimise mean log-loss + penalty / 2 |w|^2 on standardised features; return (w, b) for the raw features."""
    centre, scale = x.mean(axis=0), x.std(axis=0)
    z = (x - centre) / scale
    sign = 2.0 * y - 1.0

    def loss(packed: Floats) -> tuple[float, Floats]:
        weight, margin = packed[:-1], sign * (z @ packed[:-1] + packed[-1])
        slope = -sign * expit(-margin) / len(y)
        value = np.logaddexp(0.0, -margin).mean() + 0.5 * penalty * weight @ weight
        return float(value), np.append(z.T @ slope + penalty * weight, slope.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    weight = found[:-1] / scale
    return weight, float(found[-1] - weight @ centre)


def accuracy(head: tuple[Floats, float], x: Floats, y: NDArray[np.int64]) -> float:
    """Return the share of right labels."""
    return float(((x @ head[0] + head[1] > 0) == (y == 1)).mean())


def folds(y: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a fold number per sample, stratified by label."""
    fold = np.full(len(y), FOLDS - 1)
    left = np.arange(len(y))
    for number in range(FOLDS - 1):
        taken = stratified(y[left].tolist(), 1.0 / (FOLDS - number), seed=number)
        fold[left[taken]] = number
        left = left[~taken]
    return fold


def main() -> None:
    """Fit, choose, write, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--img-size", type=int, default=98)
    args = parser.parse_args()
    data = open_packaged("elpv")
    y = data.train.labels
    fold = folds(y)
    inputs = {pool: features(data.train, pool, args.img_size) for pool in ("avg", "token")}
    scores = {}
    for pool, x in inputs.items():
        for penalty in PENALTIES:
            right = [
                accuracy(logistic(x[fold != k], y[fold != k], penalty), x[fold == k], y[fold == k])
                for k in range(FOLDS)
            ]
            scores[pool, penalty] = float(np.mean(right))
            print(f"{pool:>5}  l2 {penalty:<8g} five training folds: {scores[pool, penalty]:.4f}")
    pool, penalty = max(scores, key=lambda key: scores[key])
    weight, bias = logistic(inputs[pool], y, penalty)
    # Two logits, -s/2 and s/2, have the same softmax as the one of a binary logistic regression.
    rows = torch.from_numpy(np.stack([-weight, weight]) / 2).float()
    save_file(
        {"weight": rows, "bias": torch.tensor([-bias, bias]) / 2},
        args.out,
        metadata={"pool": pool, "l2": repr(penalty), "img_size": str(args.img_size), "data": data.identity()},
    )
    held_out = accuracy((weight, bias), features(data.val, pool, args.img_size), data.val.labels)
    print(f"{args.out}: pool {pool}, l2 {penalty:g}; {len(data.val)} held-out images: {held_out:.4f}")


if __name__ == "__main__":
    main()
