"""Where artefacts live: find what was made before, freeze what was made now, remember it last.

    <store>/objects/<digest>/   immutable artefacts
    <store>/keys/<key>.json     {"digest", "asked"}: what was asked -> what came of it
    <store>/last/<name>.json    {stage: key} of a recipe's last run, so that `plan` can say what changed
    <store>/resume/<key>/       what a stage needs to resume (checkpoints)
    <store>/tmp/                work in progress; nothing else looks there
    <store>/locks/<key>         held while a key is being made, so that two runs share one store

A crash at any moment leaves either the whole artefact or something under tmp/ that the next run sweeps away.
"""

import contextlib
import errno
import fcntl
import hashlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Artifact, dumps, open_artifact, read_json, seal, sync
from mpdeploy.errors import CorruptArtifact, RecipeError, StageFailed

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def key_of(asked: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of what is asked of a stage."""
    return hashlib.sha256(dumps(asked).encode()).hexdigest()


def is_full_disk(error: BaseException | None) -> bool:
    """Tell whether a full disk is behind an error; libraries in other languages put its number into their text."""
    while error is not None:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if (isinstance(error, OSError) and error.errno in NO_SPACE) or (number and int(number[1]) in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def space_errors_named(where: Path) -> Iterator[None]:
    """Turn a full disk into a sentence; every other error passes."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise StageFailed(
                f"The disk is full: {getattr(error, 'filename', None) or where} could not be written.",
                hint="free space or pass --store FOLDER on a larger disk; finished stages are kept.",
            ) from error
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(text, encoding="utf-8")
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def holding(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it when the process ends, however it ends.

    Args:
        lock: the file, made if it is not there and left behind.
        waiting: called once if another process holds it.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """A folder of artefacts.

    Args:
        root: the folder; made when first written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            RecipeError: the path can't be a store.
        """
        try:
            for name in ("objects", "keys", "last", "resume", "tmp", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            raise RecipeError(
                f"{self.root} can't be used as a store: {error.strerror}.", hint="pass --store FOLDER."
            ) from error

    @contextlib.contextmanager
    def lock(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold a key while it is looked up or made; `waiting` is called if another run holds it."""
        with holding(self.root / "locks" / key, waiting):
            yield

    def lookup(self, key: str) -> Artifact | None:
        """Return the artefact remembered for a key, without re-hashing it."""
        entry = self.root / "keys" / f"{key}.json"
        if not entry.is_file():
            return None
        folder = self.root / "objects" / str(read_json(entry)["digest"])
        return open_artifact(folder) if folder.is_dir() else None

    def find(self, key: str) -> Artifact | None:
        """Return the artefact remembered for a key after re-hashing all of it.

        Raises:
            CorruptArtifact: it is not what was written.
        """
        artifact = self.lookup(key)
        if artifact is not None:
            artifact.check()
            if artifact.manifest["key"] != key:
                raise CorruptArtifact(f"{artifact.root} was made for another key than {key[:12]}.")
        return artifact

    @contextlib.contextmanager
    def draft(self, key: str) -> Iterator[Path]:
        """Yield an empty folder to work in; call it only while holding the key's lock.

        What an earlier, killed run left for the same key is removed first, what this one leaves is removed last.
        """
        folder = self.root / "tmp" / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def freeze(self, folder: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Seal a finished draft and move it to its place under objects/."""
        digest = seal(folder, manifest)
        home = self.root / "objects" / digest
        try:
            folder.rename(home)
        except OSError as error:
            # Another key led to the very same bytes first: its copy is as good as ours.
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
        sync(home.parent)
        return open_artifact(home)

    def remember(self, key: str, asked: Mapping[str, Any], artifact: Artifact) -> None:
        """Bind a key to its artefact: the last step, after the stage's promise was checked."""
        write_whole(self.root / "keys" / f"{key}.json", dumps({"digest": artifact.digest, "asked": asked}))
        shutil.rmtree(self.root / "resume" / key, ignore_errors=True)

    def remembered(self, stage: str) -> Iterator[Artifact]:
        """Yield every artefact of a stage that is still here, without re-hashing any."""
        for entry in sorted((self.root / "keys").glob("*.json")):
            record = read_json(entry)
            folder = self.root / "objects" / str(record["digest"])
            if record["asked"].get("stage") == stage and folder.is_dir():
                yield open_artifact(folder)

    def discard(self, artifact: Artifact) -> None:
        """Remove an artefact whose stage broke its promise."""
        grave = self.root / "tmp" / uuid.uuid4().hex
        with contextlib.suppress(FileNotFoundError):
            artifact.root.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def workspace(self, key: str) -> Path:
        """Return the folder where a stage keeps what it needs to resume."""
        folder = self.root / "resume" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def last_asked(self, name: str, stage: str) -> Mapping[str, Any] | None:
        """Return what the recipe called `name` last asked of a stage, if that is known."""
        record = self.root / "last" / f"{name}.json"
        key = read_json(record).get(stage) if record.is_file() else None
        entry = self.root / "keys" / f"{key}.json"
        if key is None or not entry.is_file():
            return None
        asked: Mapping[str, Any] = read_json(entry)["asked"]
        return asked

    def note_last(self, name: str, keys: Mapping[str, str]) -> None:
        """Record the keys of a recipe's last run."""
        write_whole(self.root / "last" / f"{name}.json", dumps(dict(keys)))
