"""The one data type that flows between stages: a directory named by the SHA-256 of its own manifest."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdeploy.errors import CorruptArtifact

MANIFEST = "manifest.json"
SCHEMA = 1


def dumps(value: object) -> str:
    """Return JSON text with sorted keys; NaN and infinity are a ValueError, because no verdict may rest on one."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` as `dumps` spells it."""
    path.write_text(dumps(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CorruptArtifact: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"{path} can't be read as JSON: {error}.") from error


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(root: Path) -> dict[str, Path]:
    """Return every file below `root` by its relative posix name.

    Raises:
        CorruptArtifact: a link or another thing that is neither a plain file nor a folder.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CorruptArtifact(f"{path} is neither a plain file nor a folder; mpdeploy writes nothing else.")
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path
    return found


def describe_files(root: Path) -> dict[str, dict[str, Any]]:
    """Return {name: {sha256, size}} for every file below `root` but the manifest itself."""
    return {
        name: {"sha256": sha256_of(path), "size": path.stat().st_size}
        for name, path in list_files(root).items()
        if name != MANIFEST
    }


def check_files(root: Path, listed: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Compare a folder with the list in its manifest.

    Raises:
        CorruptArtifact: a listed file is missing or changed, or a file is there that nobody listed. All are named.
    """
    there = list_files(root)
    there.pop(MANIFEST, None)
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - there.keys())]
    wrong += [f"{name} is not listed" for name in sorted(there.keys() - listed.keys())]
    for name in sorted(listed.keys() & there.keys()):
        if there[name].stat().st_size != listed[name]["size"] or sha256_of(there[name]) != listed[name]["sha256"]:
            wrong.append(f"{name} is not what was written")
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CorruptArtifact(
            f"{what} at {root} was changed after it was written: {shown}.",
            hint=f"delete the folder {root} and run again: what it held is made anew.",
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    """An immutable result of one stage.

    Attributes:
        root: its folder, `<store>/objects/<digest>`.
        digest: hex SHA-256 of the bytes of its manifest.json, which lists the SHA-256 of every other file.
        manifest: stage, key, asked (what the key is a hash of), facts, files.
    """

    root: Path
    digest: str
    manifest: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return str(self.manifest["stage"])

    @property
    def facts(self) -> Mapping[str, Any]:
        """Small numbers a reader wants; never the source of a verdict."""
        facts: Mapping[str, Any] = self.manifest["facts"]
        return facts

    def path(self, name: str) -> Path:
        """Return the path of a listed file.

        Raises:
            CorruptArtifact: the manifest lists no such file.
        """
        if name not in self.manifest["files"]:
            raise CorruptArtifact(f"The {self.stage} artefact {self.digest[:12]} holds no file {name}.")
        return self.root / name

    def has(self, name: str) -> bool:
        """Tell whether the manifest lists the file."""
        return name in self.manifest["files"]

    def json(self, name: str) -> Any:
        """Read a listed JSON file."""
        return read_json(self.path(name))

    def check(self) -> None:
        """Re-hash everything.

        Raises:
            CorruptArtifact: anything differs from the manifest, or the manifest from the folder's name.
        """
        manifest = self.root / MANIFEST
        if not manifest.is_file() or sha256_of(manifest) != self.digest:
            raise CorruptArtifact(
                f"The manifest of the {self.stage} artefact at {self.root} was changed after it was written.",
                hint=f"delete the folder {self.root} and run again: what it held is made anew.",
            )
        check_files(self.root, self.manifest["files"], f"The {self.stage} artefact")


def open_artifact(root: Path) -> Artifact:
    """Open the artefact in a folder named by its digest, without re-hashing its files (`Artifact.check` does)."""
    manifest = read_json(root / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise CorruptArtifact(f"{root / MANIFEST} is not an artefact manifest of schema {SCHEMA}.")
    return Artifact(root, root.name, manifest)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename after it can't become visible before it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Write manifest.json into a finished folder, flush all of it, and return the digest that names it."""
    files = describe_files(folder)
    text = dumps({**manifest, "schema": SCHEMA, "files": files})
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for name in [*files, MANIFEST]:
        sync(folder / name)
    sync(folder)
    return hashlib.sha256(text.encode()).hexdigest()
