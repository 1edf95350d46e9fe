"""The README is kept true: its commands exist, its Python runs, its files are there."""

import os
import re
import tomllib

import pytest
from conftest import ROOT, SMALL

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_set_up_commands_are_what_pyproject_offers():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    commands = blocks("sh")
    assert len(commands) == 2
    for command in commands:
        for extra in re.findall(r"\.\[([\w,]+)\]", command)[0].split(","):
            assert extra in extras
    assert (ROOT / re.findall(r"mpdeploy run (\S+)", commands[0])[0]).is_file()


def test_the_test_command_is_the_one_that_ci_runs():
    assert "<!-- test command -->\n```sh\npip install '.[dev]' && pytest\n```" in README
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def test_every_command_is_documented_and_every_documented_command_exists():
    from typer.main import get_command

    from mpdeploy.cli import app

    commands = set(get_command(app).commands)
    assert commands == set(re.findall(r"^### `mpdeploy (\w+)", README, re.MULTILINE))
    assert set(re.findall(r"`mpdeploy (\w+)", README)) <= commands


def test_every_recipe_is_listed_and_every_listed_recipe_exists():
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.toml")}
    assert shipped == set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))


def test_the_python_lines_run(small_run, tmp_path, monkeypatch, capsys):
    """As printed, but for the overrides that make it a matter of seconds."""
    import mpdeploy

    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPDEPLOY_STORE", os.fspath(small_run.artifacts["source"].root.parents[1]))
    full = mpdeploy.run
    monkeypatch.setattr(mpdeploy, "run", lambda recipe: full(recipe, sets=SMALL), raising=False)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "holds bundles/small/report.html" in out
    assert "files holds" in out


def test_links_and_named_files_exist():
    for name in re.findall(r"`((?:tools|stages|recipes)/[\w./]+)`", README):
        assert (ROOT / name).exists() or (ROOT / "mpdeploy" / name).exists(), name
    for name in ("LICENSE", "CHANGELOG.md", ".ci/run"):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("code", ["0", "1", "2", "3", "4", "5", "70", "130"])
def test_every_exit_code_is_explained(code):
    assert re.search(rf"(^|· ){code} ", README.split("## Exit codes")[1], re.MULTILINE)
