"""Several processes under torchrun: process 0 runs the command, the others wait until tuning needs them.

    torchrun --nproc-per-node 8 -m mpdeploy run RECIPE

Nobody but process 0 touches the store's locks, runs another stage or prints. Orders go through torchrun's own key-value
store, where waiting costs nothing: what to tune, or that the run is over. Tuning then happens in a process group, by
the same code on every process. Several machines therefore need the store and the images on a disk that all of them
see, under the same path.

The result, the message and the exit code are process 0's. A process that fails writes down why and ends with code 0:
that closes its connections, so that process 0 notices and raises the same error, and torchrun, which kills all others
as soon as one ends with another code, lets process 0 say so first. torchrun itself turns every code but 0 into 1.
"""

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from mpdeploy.errors import CorruptArtifact, MpdeployError, RecipeError, StageFailed, Unavailable

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

ERRORS = {kind.__name__: kind for kind in (RecipeError, Unavailable, StageFailed, CorruptArtifact)}
JOIN = timedelta(minutes=5)  # what importing torch on a busy machine may take
STEP = timedelta(minutes=30)  # longer than any single step; a process that hangs must not hang the others for ever
ORDER = timedelta(days=30)  # process 0 may be pruning or building for long


def rank() -> int:
    """Return the number of this process, 0 where there is one process."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    """Return how many processes a launcher started that also says where they meet."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def local_rank() -> int:
    """Return the number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


@contextlib.contextmanager
def crew(order: Mapping[str, Any]) -> Iterator[None]:
    """On process 0: let every process do `order` in one process group; with one process this does nothing.

    Args:
        order: what `serve` hands to the stage, as JSON values.

    Raises:
        StageFailed: the other processes are not there, or one of them ended.
        MpdeployError: what went wrong on the first process that failed.
    """
    if world() == 1:
        yield
        return
    if rank():
        raise StageFailed(
            f"Process {rank()} of {world()} reached tuning by itself.",
            hint="under torchrun start mpdeploy by its command line: torchrun ... -m mpdeploy run RECIPE.",
        )
    import torch.distributed as dist

    store = _store()
    _wait_for_all(store)
    turn = _give(order)
    try:
        _join(store, turn)
        yield
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as error:
        if store.check([f"failed/{turn}"]):
            raise _read_error(store.get(f"failed/{turn}")) from error
        if "onnection" in str(error):
            raise StageFailed(f"Another process ended while tuning: {error}") from error
        raise


def serve() -> None:
    """On every other process: do what process 0 orders until it is done, print nothing, raise nothing."""
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    # A connection that breaks means that process 0 or the launcher is gone: there is nobody left to tell.
    with contextlib.suppress(RuntimeError, dist.DistError):
        store = _store()
        store.set(f"here/{rank()}", "")
        for turn in itertools.count():
            store.wait([f"order/{turn}"], ORDER)
            order = json.loads(store.get(f"order/{turn}"))
            if order is None or not _obey(order, store, turn):
                return


def dismiss() -> None:
    """On process 0, last of all: let the others end."""
    if world() == 1 or rank():
        return
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError, dist.DistError):
        _give(None)


def _give(order: Mapping[str, Any] | None) -> int:
    """Put an order, or None for the end, where the others wait for it; returns its number."""
    store = _store()
    turn: int = store.add("turns", 1) - 1
    store.set(f"order/{turn}", json.dumps(order))
    return turn


def _obey(order: Mapping[str, Any], store: "Store", turn: int) -> bool:
    """Do what is ordered; if that fails, tell process 0 why and return False."""
    import torch.distributed as dist

    try:
        from mpdeploy.stages.tune import obey

        _join(store, turn)
        obey(order)
    except Exception as error:  # noqa: BLE001 - process 0 raises it
        # Later failures follow from the first. Leaving the group could wait for the others, ending the process can't.
        if store.add(f"failures/{turn}", 1) == 1:
            store.set(f"failed/{turn}", _written_error(error))
        return False
    dist.destroy_process_group()
    return True


@cache
def _store() -> "Store":
    """Connect to the launcher's key-value store."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    made: Store = store
    return made


def _wait_for_all(store: "Store") -> None:
    import torch.distributed as dist

    try:
        store.wait([f"here/{other}" for other in range(1, world())], JOIN)
    except (RuntimeError, dist.DistError) as error:
        raise StageFailed(
            f"Not all of the {world()} processes that WORLD_SIZE announces came within {JOIN}.",
            hint="start them all by torchrun, or unset WORLD_SIZE and RANK.",
        ) from error


def _join(store: "Store", turn: int) -> None:
    """Enter a process group of all processes; CPU tensors go by gloo, GPU tensors by NCCL where there are GPUs."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"group/{turn}", store),
        rank=rank(),
        world_size=world(),
        timeout=STEP,
    )


def _written_error(error: Exception) -> str:
    """Spell an error for process 0; one that isn't ours is named by its type."""
    what = getattr(error, "what", None) or f"{type(error).__name__}: {error}"
    hint = getattr(error, "hint", "")
    return json.dumps({"kind": type(error).__name__, "what": f"Process {rank()} of {world()}: {what}", "hint": hint})


def _read_error(text: bytes) -> MpdeployError:
    told = json.loads(text)
    return ERRORS.get(told["kind"], StageFailed)(told["what"], told["hint"])
