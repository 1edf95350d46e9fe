"""Train the quickstart network: a small ViT on all of Fashion-MNIST, and cut the slice of images that ships with it.

Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT licence) comes from Debian's package `dataset-fashion-mnist`:

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
    python tools/train_quickstart.py fashion/usr/share/datasets/fashion-mnist recipes/quickstart

It writes `vit.safetensors` (fp16), `vit.json` (how it was trained and what it scores on all 10,000 test images) and
`fashion_mnist_slice.npz` (4,000 training and 2,000 test images, class-balanced). Matrices inside the blocks are trained
with Muon (Jordan et al. 2024), everything else with AdamW. For the first three fifths of the epochs half of the tokens
are dropped at random, which halves the cost of a step. `--start-from` goes on from a checkpoint of an earlier run, with
all tokens from the first step; `vit.json` keeps both runs.
"""

import gzip
import json
import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

MODEL = "vit_tiny_patch16_224"
ARGS = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
    "class_token": False,
    "global_pool": "avg",
}
MEAN, STD = 0.2860, 0.3530
CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzipped IDX file of unsigned bytes (magic: 0, 0, 8, number of dimensions; big-endian sizes)."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape([int(n) for n in shape])


def read_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images [n, 28, 28] and labels [n] of `train` or `t10k`."""
    return read_idx(folder / f"{split}-images-idx3-ubyte.gz"), read_idx(folder / f"{split}-labels-idx1-ubyte.gz")


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """Return float32 [n, 1, 28, 28] with the data set's mean and standard deviation taken out."""
    return (torch.from_numpy(images.copy()).float().div(255).sub(MEAN).div(STD)).unsqueeze(1)


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image left to right with probability 1/2 and shift it by up to one pixel each way."""
    n = len(batch)
    flip = torch.rand(n, generator=generator) < 0.5
    batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
    padded = F.pad(batch, (1, 1, 1, 1), value=-MEAN / STD)
    dy, dx = torch.randint(0, 3, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(28)
    cols = dx[:, None] + torch.arange(28)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], cols[:, None, :]].unsqueeze(1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in [0, 1]."""
    model.eval()
    hits = sum(
        int((model(images[i : i + 500]).argmax(1) == labels[i : i + 500]).sum()) for i in range(0, len(labels), 500)
    )
    return hits / len(labels)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values pushed to about 1: five quintic Newton-Schulz steps, float32."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.T if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum 0.95 and AdamW-matched update size (0.2 sqrt(max dimension)).

    torch.optim.Muon runs the same steps in bfloat16, which a CPU without bf16 emulates twenty times slower.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW without weight decay for the rest."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and n.startswith("blocks.")]
    others = [p for n, p in named if not (p.ndim == 2 and n.startswith("blocks."))]
    return [Muon(matrices, lr=lr, weight_decay=0.05), torch.optim.AdamW(others, lr=lr, weight_decay=0.0)]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to one hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def balanced(labels: NDArray[np.uint8], count: int, seed: int) -> NDArray[np.int64]:
    """Return `count` shuffled indices with the same number of each of the ten classes."""
    rng = np.random.default_rng(seed)
    picks = [rng.permutation(np.flatnonzero(labels == c))[: count // 10] for c in range(10)]
    return rng.permutation(np.concatenate(picks))


def write_slice(path: Path, train: tuple[NDArray, NDArray], test: tuple[NDArray, NDArray]) -> None:  # type: ignore[type-arg]
    """Write the shipped slice: 4,000 training and 2,000 test images, uint8, NHW, with their indices in the full set."""
    a, b = balanced(train[1], 4000, seed=0), balanced(test[1], 2000, seed=1)
    np.savez_compressed(
        path,
        train_images=train[0][a],
        train_labels=train[1][a].astype(np.int64),
        train_ids=np.array([f"train/{i}" for i in a]),
        val_images=test[0][b],
        val_labels=test[1][b].astype(np.int64),
        val_ids=np.array([f"t10k/{i}" for i in b]),
        class_names=np.array(CLASSES),
    )


def main(
    data: Annotated[Path, typer.Argument(help="Folder with the four gzipped IDX files.")],
    out: Annotated[Path, typer.Argument(help="Where to write the checkpoint and the slice.")],
    epochs: int = 15,
    lr: float = 2e-3,
    batch: int = 128,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    start_from: Annotated[Path | None, typer.Option(help="Checkpoint of an earlier run to go on from.")] = None,
    history: Annotated[str, typer.Option(help="One line on that earlier run, kept in vit.json.")] = "",
) -> None:
    """Train, measure on all test images, and write the three files."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    train, test = read_split(data, "train"), read_split(data, "t10k")
    write_slice(out / "fashion_mnist_slice.npz", train, test)
    images, labels = normalise(train[0]), torch.from_numpy(train[1].astype(np.int64))
    test_images, test_labels = normalise(test[0]).to(device), torch.from_numpy(test[1].astype(np.int64)).to(device)

    model = timm.create_model(MODEL, **ARGS, patch_drop_rate=0.5).to(device)
    dropping = epochs * 3 // 5
    if start_from is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(start_from).items()})
        dropping = 0
    opts = optimisers(model, lr)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema)
    per_epoch = len(images) // batch
    steps, started, curve = epochs * per_epoch, time.perf_counter(), []
    for epoch in range(epochs):
        model.train()
        if epoch == dropping:
            model.patch_drop.prob = 0.0
        order = torch.randperm(len(images), generator=generator)
        for i in range(per_epoch):
            step = epoch * per_epoch + i
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = lr * schedule(step, steps, warmup=per_epoch // 2)
            pick = order[i * batch : (i + 1) * batch]
            x = augment(images[pick], generator).to(device)
            loss = F.cross_entropy(model(x), labels[pick].to(device), label_smoothing=0.05)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            averaged.update_parameters(model)
        curve.append(round(accuracy(averaged.module, test_images[:2000], test_labels[:2000]), 4))
        print(f"epoch {epoch + 1}/{epochs}  top-1 {curve[-1]:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
        half = {k: v.half().cpu().contiguous() for k, v in averaged.module.state_dict().items()}
        save_file(half, out / "vit.safetensors")

    averaged.module.load_state_dict({k: v.float() for k, v in half.items()})
    with np.load(out / "fashion_mnist_slice.npz") as shipped:
        slice_images, slice_labels = normalise(shipped["val_images"]), torch.from_numpy(shipped["val_labels"])
    record = {
        "model": MODEL,
        "args": ARGS,
        "mean": MEAN,
        "std": STD,
        "classes": CLASSES,
        "top1_on_10000": accuracy(averaged.module, test_images, test_labels),
        "top1_on_slice": accuracy(averaged.module.cpu(), slice_images, slice_labels),
        "top1_by_epoch_on_first_2000": curve,
        "started_from": history,
        "epochs": epochs,
        "lr": lr,
        "batch": batch,
        "seed": seed,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    (out / "vit.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"top-1 of the fp16 checkpoint on all test images: {record['top1_on_10000']:.4f}")


if __name__ == "__main__":
    typer.run(main)
