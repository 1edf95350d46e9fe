import json
import tomllib

import pytest
from conftest import QUICKSTART, ROOT

from mpdeploy.errors import RecipeError
from mpdeploy.recipe import Recipe, load_recipe


def written(tmp_path, change):
    """The quickstart recipe with `change` applied to its text, beside its data."""
    text = change(QUICKSTART.read_text())
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


def test_every_shipped_recipe_parses():
    recipes = sorted((ROOT / "recipes").glob("*.toml"))
    assert QUICKSTART in recipes
    for path in recipes:
        load_recipe(path)


def test_all_mistakes_are_reported_at_once_with_the_nearest_key(tmp_path):
    path = written(
        tmp_path,
        lambda text: (
            text.replace('pattern = "2:4"', 'patern = "2:4"\nmethod = "activations"')
            .replace("epochs = 1", "epochs = 9")
            .replace("[certify]\nreserve = 0.01\n", "")
        ),
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert "prune.patern: no such key (did you mean pattern?)" in text
    assert "prune.pattern: missing" in text
    assert "tune.epochs" in text and "not 9" in text
    assert "prune.method" in text
    assert "certify: missing" in text
    assert str(path) in text


@pytest.mark.parametrize("pattern", ["4:2", "2-4", "0:4", "2:2", "two:four"])
def test_a_bad_pattern_is_refused(tmp_path, pattern):
    path = written(tmp_path, lambda text: text.replace('pattern = "2:4"', f'pattern = "{pattern}"'))
    with pytest.raises(RecipeError, match=r"prune\.pattern: must be N:M"):
        load_recipe(path)


def test_deploy_must_name_an_engine_that_is_built():
    with pytest.raises(RecipeError, match="did you mean onnxruntime-cpu-fp32"):
        load_recipe(QUICKSTART, ['validate.deploy="onnxruntime-cpu-fp23"'])


def test_an_engine_needs_its_precision_exported():
    with pytest.raises(RecipeError, match=r"tensorrt_rtx-sm80-fp16 needs export\.precision to hold fp16"):
        load_recipe(QUICKSTART, ['export.precision=["fp32"]'])


def test_engines_are_distinct_and_there_is_one():
    with pytest.raises(RecipeError, match="at least one engine"):
        load_recipe(QUICKSTART, ["build.engines=[]"])
    with pytest.raises(RecipeError, match="onnxruntime-cpu-fp32 more than once"):
        load_recipe(QUICKSTART, ['build.engines=[{runtime="onnxruntime"},{runtime="onnxruntime"}]'])


def test_set_overrides_take_toml_values_and_bare_words():
    file = load_recipe(QUICKSTART, ["tune.lr=0.5", "prune.method=magnitude", "prune.skip=['a.*']"])
    assert file.recipe.tune.lr == 0.5
    assert file.recipe.prune.method == "magnitude"
    assert file.recipe.prune.skip == ("a.*",)


@pytest.mark.parametrize(
    ("item", "match"), [("tune.lr", "expected table"), ("=3", "expected table"), ("name.x=1", "not a table")]
)
def test_a_bad_override_is_a_sentence(item, match):
    with pytest.raises(RecipeError, match=match):
        load_recipe(QUICKSTART, [item])


def test_paths_are_resolved_against_the_recipes_folder_and_kept_as_written():
    file = load_recipe(QUICKSTART)
    assert file.written.data.path == "quickstart/fashion_mnist_slice.npz"
    assert file.recipe.data.path == str(QUICKSTART.parent / "quickstart" / "fashion_mnist_slice.npz")
    assert file.recipe.source.weights == str(QUICKSTART.parent / "quickstart" / "vit.safetensors")


def test_missing_file_and_broken_toml(tmp_path):
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(RecipeError, match="is not TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_the_lock_says_every_default_and_round_trips():
    locked = load_recipe(QUICKSTART).written.locked()
    assert locked["prune"]["damping"] == [0.03, 0.1]
    assert Recipe.model_validate_json(json.dumps(locked)).locked() == locked


def test_the_schema_names_every_table_of_the_quickstart():
    schema = Recipe.model_json_schema(by_alias=True)
    assert set(tomllib.loads(QUICKSTART.read_text())) <= set(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        (["prune.pattern=mixed"], r'"mixed" and the table prune\.allocate need each other'),
        (["prune.allocate={budget=0.6}"], r'"mixed" and the table prune\.allocate need each other'),
        (["prune.pattern=mixed", "prune.allocate={budget=1.0}"], r"prune\.allocate\.budget: .* less than 1, not 1\.0"),
        (["prune.pattern=mixed", 'prune.allocate={budget=0.6,patterns=["4:2"]}'], "0 < N < M, .* not 4:2"),
        (["prune.pattern=mixed", 'prune.allocate={budget=0.6,patterns=["2:4","2:4"]}'], "names a pattern twice"),
        (["prune.pattern=mixed", "prune.allocate={budjet=0.6}"], r"no such key \(did you mean budget\?\)"),
        (["prune.pattern=unstructured", "prune.method=seb"], r"prune\.sparsity need each other"),
        (["prune.sparsity=0.5"], r"prune\.sparsity need each other"),
        (["prune.pattern=unstructured", "prune.sparsity=0.5"], '"seb" or "magnitude", not "admm"'),
        (["prune.method=seb"], 'set pattern = "unstructured"'),
        (
            ["prune.pattern=unstructured", "prune.sparsity=0.5", "prune.method=seb", "tune.refresh=5"],
            r"tune\.refresh: masks are searched by N:M groups",
        ),
    ],
)
def test_mixed_and_unstructured_keys_go_together(sets, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(QUICKSTART, sets)


def test_a_mixed_and_an_unstructured_recipe_lock_and_round_trip():
    mixed = load_recipe(QUICKSTART, ["prune.pattern=mixed", "prune.allocate={budget=0.6}"]).written
    assert mixed.prune.allocate.patterns == ("12:16", "2:4") and mixed.prune.allocate.ranking == "error"
    anywhere = load_recipe(QUICKSTART, ["prune.pattern=unstructured", "prune.sparsity=0.5", "prune.method=seb"]).written
    for recipe in (mixed, anywhere):
        assert Recipe.model_validate_json(json.dumps(recipe.locked())).locked() == recipe.locked()
