"""Sources: timm, torchvision and Python networks; checkpoints that fit, differ, lie or carry code."""

import pickle
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mpdeploy.errors import CorruptArtifact, RecipeError, Unavailable
from mpdeploy.models import check_name, describe, identity, load, rebuild
from mpdeploy.models.checkpoints import read_state
from mpdeploy.preprocessing import Preprocessing
from mpdeploy.recipe import PreprocessingTable

TINY = {"model": "resnet10t", "args": {"num_classes": 5}}
TABLE = {
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}


def source(**changes):
    fields = {"kind": "timm", "weights": "random", "args": {}, "strict": True, "seed": 0, "preprocessing": None}
    return SimpleNamespace(**{**fields, **TINY, **changes})


def logits(module, prep, count=2, seed=0):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(count)]
    with torch.no_grad():
        return module(torch.from_numpy(prep.apply(images)))


def tiny_state():
    return load(source(seed=7)).module.state_dict()


def saved(tmp_path, state, name="weights.safetensors"):
    path = tmp_path / name
    save_file(state, path) if name.endswith(".safetensors") else torch.save(state, path)
    return str(path)


# ---- timm


def test_timm_random_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one, two, other = (load(source(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (m.module.state_dict()["conv1.0.weight"] for m in (one, two, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not one.module.training
    assert all(p.requires_grad for p in one.module.parameters())
    assert {t.dtype for t in one.module.state_dict().values()} == {torch.float32, torch.int64}
    assert one.architecture["num_classes"] == 5
    assert one.facts["parameters"] == sum(p.numel() for p in one.module.parameters())


@pytest.mark.parametrize(
    "model", ["resnet10t", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"]
)
def test_timm_preprocessing_is_the_models_own_evaluation_transform(model):
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    made = describe(source(model=model, args={}))
    config = resolve_model_data_config(made.module)
    image = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    theirs = create_transform(**config, is_training=False)(Image.fromarray(image)).numpy()
    assert np.abs(made.preprocessing.apply([image])[0] - theirs).max() < 1e-5


def test_img_size_and_in_chans_of_the_constructor_reach_the_preprocessing():
    args = {"img_size": 64, "in_chans": 1, "num_classes": 3}
    made = load(source(model="vit_tiny_patch16_224", args=args))
    assert made.preprocessing.input_size == (1, 64, 64)
    assert (made.preprocessing.color, made.preprocessing.mean) == ("gray", (0.5,))
    assert logits(made.module, made.preprocessing).shape == (2, 3)


def test_the_table_overrides_field_by_field():
    table = PreprocessingTable(crop_pct=0.5, interpolation="nearest", input_size=(3, 96, 64))
    made = load(source(preprocessing=table))
    own = load(source()).preprocessing
    assert (made.preprocessing.crop_pct, made.preprocessing.interpolation) == (0.5, "nearest")
    assert made.preprocessing.input_size == (3, 96, 64)
    assert (made.preprocessing.mean, made.preprocessing.crop_mode) == (own.mean, own.crop_mode)
    assert made.architecture["input_size"] == [3, 96, 64]


def test_a_table_that_the_network_cannot_take_is_refused():
    table = PreprocessingTable(input_size=(3, 64, 64))
    with pytest.raises(RecipeError, match=r"vit_tiny_patch16_224 fails on images of 3x64x64"):
        describe(source(model="vit_tiny_patch16_224", preprocessing=table))


def test_unknown_names_get_the_nearest():
    with pytest.raises(RecipeError, match=r"timm has no classifier 'resnet5O'\. Nearest: .*resnet50"):
        load(source(model="resnet5O"))
    with pytest.raises(RecipeError, match=r"torchvision has no classifier 'vit_b16'\. Nearest: .*vit_b_16"):
        load(source(kind="torchvision", model="vit_b16"))
    with pytest.raises(RecipeError, match="torchvision has no classifier 'fcn_resnet50'"):
        check_name("torchvision", "fcn_resnet50")
    check_name("timm", "resnet50")


def test_arguments_that_the_constructor_refuses():
    with pytest.raises(RecipeError, match=r"resnet10t can't be built with colour = 3: TypeError"):
        load(source(args={"colour": 3}))


def test_a_network_without_classifier_is_refused():
    with pytest.raises(RecipeError, match="has no classifier"):
        describe(source(args={"num_classes": 0}))


def test_offline_pretrained_says_what_to_do(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection and no cached file")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(Unavailable, match=r"pretrained weights of resnet10t.*hub can't be reached") as caught:
        load(source(weights="pretrained", args={}))
    assert "source.weights" in caught.value.hint
    assert caught.value.exit_code == 3


def test_a_real_hub_call_with_an_empty_cache_ends_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match=r"pretrained weights of resnet10t.*hub can't be reached"):
        load(source(weights="pretrained", args={"cache_dir": str(tmp_path)}))


def test_pretrained_from_a_local_hub_folder(tmp_path):
    from timm.models import save_for_hf

    original = timm.create_model("resnet10t", num_classes=5).eval()
    save_for_hf(original, tmp_path, safe_serialization=True)
    made = load(source(model=f"local-dir:{tmp_path}", weights="pretrained", args={}))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(made.module(x), original(x))
    assert made.architecture["num_classes"] == 5


# ---- checkpoints


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_local_weights_give_the_same_logits(tmp_path, suffix):
    original = load(source(seed=7))
    path = saved(tmp_path, original.module.state_dict(), f"weights.{suffix}")
    made = load(source(weights=path, seed=0))
    assert torch.equal(logits(made.module, made.preprocessing), logits(original.module, original.preprocessing))
    assert made.facts["weights"] == f"weights.{suffix}"
    assert made.facts["checkpoint"]["missing"] == made.facts["checkpoint"]["unexpected"] == []


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper, prefix):
    state = tiny_state()
    tree = {wrapper: {prefix + key: value for key, value in state.items()}, "epoch": 3, "optimizer": {"lr": 0.1}}
    read = read_state(tmp_path / saved(tmp_path, tree, "last.pth"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_averaged_weights_come_before_the_last_ones(tmp_path):
    state = {"a": torch.ones(2)}
    tree = {"state_dict": {"a": torch.zeros(2)}, "state_dict_ema": state}
    assert torch.equal(read_state(tmp_path / saved(tmp_path, tree, "x.pth"))["a"], state["a"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_state().items()}
    made = load(source(weights=saved(tmp_path, state)))
    weight = made.module.state_dict()["conv1.0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["conv1.0.weight"].float())


def test_strict_names_every_kind_of_difference(tmp_path):
    state = tiny_state()
    for key in [k for k in state if k.startswith("layer1.0.bn")]:
        del state[key]
    state["fc.weight"] = torch.zeros(9, 512)
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(RecipeError, match=r"8 missing: layer1\.0\.bn1\.bias.*1 unexpected: extra\.weight") as caught:
        load(source(weights=saved(tmp_path, state)))
    assert "1 of another shape: fc.weight [9, 512] for [5, 512]" in caught.value.what


def test_strict_lists_ten_and_the_count(tmp_path):
    state = tiny_state()
    few = dict(list(state.items())[:2])
    missing = len([k for k in state if not k.endswith("num_batches_tracked")]) - 2
    with pytest.raises(RecipeError, match=rf"{missing} missing: .* and {missing - 10} more") as caught:
        load(source(weights=saved(tmp_path, few)))
    assert caught.value.what.count(",") == 9


def test_not_strict_loads_what_fits_and_lists_the_rest(tmp_path):
    state = tiny_state()
    del state["conv1.0.weight"]
    state["fc.weight"], state["extra"] = torch.zeros(9, 512), torch.zeros(1)
    made = load(source(weights=saved(tmp_path, state), strict=False, seed=0))
    report = made.facts["checkpoint"]
    assert (report["missing"], report["unexpected"]) == (["conv1.0.weight"], ["extra"])
    assert report["wrong_shape"] == ["fc.weight [9, 512] for [5, 512]"]
    own, random = made.module.state_dict(), load(source(seed=0)).module.state_dict()
    assert torch.equal(own["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert torch.equal(own["conv1.0.weight"], random["conv1.0.weight"])


def test_not_strict_with_nothing_in_common_is_refused(tmp_path):
    path = saved(tmp_path, {"other": torch.zeros(3)})
    with pytest.raises(RecipeError, match="does not fit the network"):
        load(source(weights=path, strict=False))


def test_old_checkpoints_without_batch_counters_load(tmp_path):
    state = {k: v for k, v in tiny_state().items() if not k.endswith("num_batches_tracked")}
    assert load(source(weights=saved(tmp_path, state))).facts["checkpoint"]["missing"] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    state = tiny_state()
    state["layer2.0.conv1.weight"].view(-1)[3] = value
    with pytest.raises(RecipeError, match=r"layer2\.0\.conv1\.weight holds 1 values that are NaN or infinite"):
        load(source(weights=saved(tmp_path, state)))


class Bomb:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, suffix):
    victim = tmp_path / "victim"
    path = saved(tmp_path, {"state_dict": tiny_state(), "extra": Bomb(str(victim))}, f"evil.{suffix}")
    with pytest.raises(RecipeError, match="holds more than tensors, which is never unpickled"):
        load(source(weights=path))
    assert not victim.exists()
    (tmp_path / f"raw.{suffix}").write_bytes(pickle.dumps(Bomb(str(victim))))
    with pytest.raises(RecipeError, match="never unpickled"):
        load(source(weights=str(tmp_path / f"raw.{suffix}")))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.safetensors", b"garbage", "can't be read as safetensors"),
        ("a.safetensors", b"", "can't be read as safetensors"),
        ("a.pth", b"garbage", "is damaged"),
        ("a.pth", b"", "is damaged"),
        ("a.onnx", b"x", "ends in none of"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        load(source(weights=str(tmp_path / name)))


def test_a_cut_safetensors_file_is_refused(tmp_path):
    path = tmp_path / saved(tmp_path, tiny_state())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match="can't be read as safetensors"):
        load(source(weights=str(path)))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (torch.zeros(3), "holds a Tensor"),
        ([torch.zeros(3)], "holds a list"),
        ({}, "an empty dict"),
        ({"a": torch.zeros(3), "lr": 0.1}, "lr hold no tensor"),
        ({"state_dict": {"a": {"b": torch.zeros(1)}}}, "a hold no tensor"),
    ],
)
def test_other_pickles_are_no_state_dict(tmp_path, tree, said):
    with pytest.raises(RecipeError, match=said):
        load(source(weights=saved(tmp_path, tree, "a.pth")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.pth is not a file"):
        load(source(weights=str(tmp_path / "nothing.pth")))


# ---- torchvision and Python entry points


def test_torchvision_uses_the_presets_of_its_weights():
    import torchvision
    from PIL import Image

    made = describe(source(kind="torchvision", model="resnet18", args={}))
    preset = torchvision.models.get_model_weights("resnet18").DEFAULT.transforms()
    image = np.random.default_rng(0).integers(0, 256, (411, 300, 3), dtype=np.uint8)
    assert np.abs(made.preprocessing.apply([image])[0] - preset(Image.fromarray(image)).numpy()).max() < 1e-5
    assert made.architecture["num_classes"] == 1000


def test_every_torchvision_classifier_keeps_the_resized_edge():
    """crop_pct is a quotient: the floor of crop / crop_pct must be the preset's resize again."""
    import torchvision

    from mpdeploy.models.sources import _torchvision_config

    for name in torchvision.models.list_models(module=torchvision.models):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        config = _torchvision_config(name)
        assert int(config["input_size"][1] / config["crop_pct"]) == preset.resize_size[0], name


def test_torchvision_local_weights(tmp_path):
    made = load(source(kind="torchvision", model="squeezenet1_1", args={"num_classes": 4}, seed=3))
    again = load(
        source(
            kind="torchvision",
            model="squeezenet1_1",
            args={"num_classes": 4},
            weights=saved(tmp_path, made.module.state_dict()),
        )
    )
    assert torch.equal(logits(made.module, made.preprocessing), logits(again.module, again.preprocessing))


USER = """
import torch
from torch import nn

def net(width=4, classes=3):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

def with_config(pretrained=True, file=""):
    model = net()
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    if pretrained:
        nn.init.constant_(model[3].bias, 7.0)
    return model

class Pair(nn.Module):
    def forward(self, x):
        return x.mean(), x

class Map(nn.Conv2d):
    pass

def pair(): return Pair()
def feature_map(): return Map(3, 4, 3)
def lost_batch(): return nn.Sequential(nn.Flatten(0), nn.Linear(2 * 3 * 8 * 8, 3))
def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
def one_logit(): return net(classes=1)
def labels():
    class Labels(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 3, dtype=torch.int64)
    return Labels()
def number(): return 7
def raises(): raise OSError("no such thing")
answer = 42
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "user_nets.py").write_text(USER)
    (tmp_path / "user_broken.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "user_nets"
    sys.modules.pop("user_nets", None)


def python(model, **changes):
    table = PreprocessingTable(**TABLE) if changes.pop("table", True) else None
    return source(kind="python", model=model, **{"args": {}, "preprocessing": table, **changes})


def test_python_entry_point_with_args_and_table(user):
    made = load(python(f"{user}:net", args={"width": 6, "classes": 9}))
    assert made.architecture["num_classes"] == 9
    assert made.preprocessing == Preprocessing(**TABLE, color="rgb")
    meta = describe(python(f"{user}:net", args={"width": 6, "classes": 9}))
    assert meta.architecture == made.architecture
    assert next(meta.module.parameters()).device.type == "meta"


def test_pretrained_reaches_an_entry_point_that_has_the_parameter(user, tmp_path):
    args = {"file": str(tmp_path / "head.safetensors")}
    trained = load(python(f"{user}:with_config", table=False, weights="pretrained", args=args))
    random = load(python(f"{user}:with_config", table=False, weights="random"))
    assert bool((trained.module[3].bias == 7).all())
    assert not bool((random.module[3].bias == 7).all())
    assert trained.architecture["args"] == {"file": "head.safetensors"}, "no folder of this machine in the bundle"
    assert trained.preprocessing.input_size == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pair", "returned a tuple; expected logits"),
        ("feature_map", r"returned torch.float32 \[2, 4, 6, 6\]"),
        ("lost_batch", r"returned torch.float32 \[3\]"),
        ("lazy", r"lazy layers whose shapes are not decided yet \(1\.weight\)"),
        ("one_logit", r"returned torch.float32 \[2, 1\].*at least 2 classes"),
        ("labels", "returned torch.int64"),
        ("number", "returned int; expected a torch.nn.Module"),
        ("raises", "can't be built with no args: OSError: no such thing"),
        ("answer", "has no function 'answer'"),
        ("nett", r"has no function 'nett'\. Nearest: net"),
    ],
)
def test_python_networks_that_are_refused(user, name, said):
    with pytest.raises(RecipeError, match=said):
        load(python(f"{user}:{name}"))


def test_python_network_without_preprocessing_must_state_it(user):
    with pytest.raises(RecipeError, match=r"does not say how images are prepared; input_size, mean, std, .* missing"):
        load(python(f"{user}:net", table=False))


def test_python_modules_that_cannot_be_imported(user):
    with pytest.raises(RecipeError, match="there is no Python module nowhere_at_all"):
        load(python("nowhere_at_all.nets:net"))
    with pytest.raises(Unavailable, match="user_broken needs the module a_module_that_nobody_has"):
        load(python("user_broken:net"))
    with pytest.raises(RecipeError, match=r"is not package\.module:function"):
        load(python("user_nets.net"))


# ---- describe, rebuild, identity


@pytest.mark.parametrize("model", ["resnet50", "vit_base_patch16_224", "convnextv2_base"])
def test_describe_reads_and_allocates_nothing(model):
    started = time.process_time()
    made = describe(source(model=model, args={}, weights="/nowhere.pth"))
    assert time.process_time() - started < 10, "seconds of processor time; about 2 on an idle machine"
    assert {t.device.type for t in made.module.state_dict().values()} == {"meta"}
    assert made.architecture["num_classes"] == 1000


def test_describe_agrees_with_load():
    described, loaded = describe(source()), load(source())
    assert described.architecture == loaded.architecture
    assert described.preprocessing == loaded.preprocessing
    shapes = [{k: v.shape for k, v in m.module.state_dict().items()} for m in (described, loaded)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "vit_tiny_patch16_224", "args": {"img_size": 48, "num_classes": 7, "in_chans": 1}},
        {"kind": "torchvision", "model": "squeezenet1_1", "args": {"num_classes": 4}},
    ],
)
def test_rebuild_gives_exactly_the_same_logits(tmp_path, changes):
    import json

    made = load(source(**changes, seed=5))
    save_file(made.module.state_dict(), tmp_path / "dense.safetensors")
    architecture = json.loads(json.dumps(made.architecture, allow_nan=False))
    again = rebuild(architecture, load_file(tmp_path / "dense.safetensors"))
    assert not again.training
    assert torch.equal(logits(again, made.preprocessing), logits(made.module, made.preprocessing))


def test_rebuild_refuses_what_does_not_fit():
    made = load(source())
    state = made.module.state_dict()
    with pytest.raises(RecipeError, match=r"The state of resnet10t does not fit the network; 1 missing: fc\.weight"):
        rebuild(made.architecture, {k: v for k, v in state.items() if k != "fc.weight"})
    with pytest.raises(CorruptArtifact, match="lacks 'model'"):
        rebuild({"kind": "timm", "args": {}}, state)


def test_identity_follows_weights_args_and_code(user, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"one")
    spec = python(f"{user}:net", weights=str(path), args={"head": str(path)})
    before = identity(spec)
    assert re.fullmatch(r"[0-9a-f]{64}", before["weights"])
    assert before["weights"] == before["args.head"]
    path.write_bytes(b"two")
    after = identity(spec)
    assert {key for key in after if after[key] != before[key]} == {"weights", "args.head"}
    (tmp_path / "user_nets.py").write_text(USER + "\n# changed\n")
    assert identity(spec)["code"] != after["code"]
    with pytest.raises(RecipeError, match=r"gone\.pth is not a file"):
        identity(source(weights=str(tmp_path / "gone.pth")))
    with pytest.raises(RecipeError, match="there is no Python module nowhere_at_all"):
        identity(python("nowhere_at_all:net"))
