import json
import os
import threading

import pytest

from mpdeploy.artifact import check_files, dumps, list_files, open_artifact, read_json, seal, sha256_of
from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed
from mpdeploy.store import Store, key_of, space_errors_named

ASKED = {"stage": "prune", "params": {"pattern": "2:4"}}


def store_with(tmp_path, content="hello"):
    store = Store(tmp_path / "store")
    store.prepare()
    key = key_of(ASKED)
    with store.lock(key, lambda: None), store.draft(key) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(content)
        artifact = store.freeze(folder, {"stage": "prune", "key": key, "asked": ASKED, "facts": {}})
    store.remember(key, ASKED, artifact)
    return store, key, artifact


def test_an_artefact_is_named_by_its_manifest_which_names_every_file(tmp_path):
    _, _, artifact = store_with(tmp_path)
    assert artifact.digest == sha256_of(artifact.root / "manifest.json") == artifact.root.name
    assert artifact.manifest["files"]["sub/a.txt"]["sha256"] == sha256_of(artifact.path("sub/a.txt"))
    artifact.check()


def test_equal_work_has_an_equal_digest(tmp_path):
    assert store_with(tmp_path / "a")[2].digest == store_with(tmp_path / "b")[2].digest
    assert store_with(tmp_path / "c", "other")[2].digest != store_with(tmp_path / "d")[2].digest


def edit(root):
    (root / "sub" / "a.txt").write_text("hellx")


def add(root):
    (root / "extra").write_text("x")


def drop(root):
    (root / "sub" / "a.txt").unlink()


def edit_manifest(root):
    (root / "manifest.json").write_text((root / "manifest.json").read_text().replace("prune", "prone"))


def link(root):
    (root / "sub" / "a.txt").unlink()
    (root / "sub" / "a.txt").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (edit, "sub/a.txt is not what was written"),
        (add, "extra is not listed"),
        (drop, "sub/a.txt is missing"),
        (edit_manifest, "The manifest of the .* was changed"),
        (link, "neither a plain file nor a folder"),
    ],
)
def test_a_changed_artefact_is_refused_by_name(tmp_path, damage, match):
    store, key, artifact = store_with(tmp_path)
    damage(artifact.root)
    with pytest.raises(CorruptArtifact, match=match):
        store.find(key)


def test_a_key_pointing_at_another_keys_artefact_is_refused(tmp_path):
    store, key, artifact = store_with(tmp_path)
    other = key_of({"stage": "other"})
    store.remember(other, {}, artifact)
    with pytest.raises(CorruptArtifact, match="another key"):
        store.find(other)
    assert store.find(key) is not None


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path):
    store, _, _ = store_with(tmp_path)
    stale = store.root / "tmp" / "k"
    stale.mkdir()
    (stale / "half").write_text("x")
    with store.draft("k") as folder:
        assert list(folder.iterdir()) == []
    assert not folder.exists()


def test_a_lock_makes_the_second_run_wait_and_says_so(tmp_path):
    store, key, _ = store_with(tmp_path)
    order = []

    def second():
        with store.lock(key, lambda: order.append("waiting")):
            order.append("second")

    with store.lock(key, lambda: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        while not order:
            thread.join(0.01)
        order.append("first done")
    thread.join()
    assert order == ["waiting", "first done", "second"]


def test_the_same_bytes_frozen_twice_are_one_artefact(tmp_path):
    store, key, artifact = store_with(tmp_path)
    with store.draft(key) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("hello")
        again = store.freeze(folder, {"stage": "prune", "key": key, "asked": ASKED, "facts": {}})
    assert again.root == artifact.root
    again.check()


def test_discard_takes_an_artefact_away(tmp_path):
    store, _, artifact = store_with(tmp_path)
    store.discard(artifact)
    assert not artifact.root.exists()
    store.discard(artifact)


def test_a_full_disk_is_a_sentence_and_other_errors_pass(tmp_path):
    with pytest.raises(StageFailed, match="disk is full"), space_errors_named(tmp_path):
        raise OSError(28, os.strerror(28), "x")
    with pytest.raises(PermissionError), space_errors_named(tmp_path):
        raise PermissionError(13, "no")


def test_a_file_in_the_way_of_the_store_is_a_recipe_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="can't be used as a store"):
        Store(tmp_path / "file").prepare()


def test_json_refuses_nan_and_garbage(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"a": float("nan")})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="can't be read as JSON"):
        read_json(tmp_path / "x.json")


def test_a_manifest_of_another_schema_is_refused(tmp_path):
    seal(tmp_path, {})
    text = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**text, "schema": 99}))
    with pytest.raises(CorruptArtifact, match="schema"):
        open_artifact(tmp_path)


def test_many_differences_are_counted(tmp_path):
    listed = {f"f{i}": {"sha256": "0", "size": 1} for i in range(9)}
    with pytest.raises(CorruptArtifact, match="and 4 more"):
        check_files(tmp_path, listed, "It")
    assert list_files(tmp_path) == {}
