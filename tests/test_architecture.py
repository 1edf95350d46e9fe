"""The dependency rules of the design, read from the imports, and how light the package is to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mpdeploy"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, top_level_only=False):
    """Dotted names that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path, **kind):
    return {name.split(".")[0] for name in imports(path, **kind)}


def test_the_checker_imports_nothing_of_mpdeploy_and_only_numpy():
    foreign = roots(PACKAGE / "verify.py") - set(sys.stdlib_module_names)
    assert foreign == {"numpy"}


@pytest.mark.parametrize("folder", ["pruning", "certify"])
def test_the_mathematics_touches_no_disk(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not roots(path) & {"pathlib", "os", "shutil", "tempfile", "io", "json", "safetensors", "onnx"}, path
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert "open" not in calls, path


def test_nothing_imports_cli_or_report():
    for path in MODULES:
        if name_of(path) == "mpdeploy.__main__":
            continue
        # The two front doors draw the page; nothing behind them knows that there is one.
        allowed = {"mpdeploy.report"} if name_of(path) in ("mpdeploy.cli", "mpdeploy.api") else set()
        assert not (imports(path) & {"mpdeploy.cli", "mpdeploy.report"}) - allowed, path


def test_only_their_own_rooms_import_the_big_libraries():
    rooms = ("mpdeploy.runtimes", "mpdeploy.graph", "mpdeploy.models", "mpdeploy.stages", "mpdeploy.doctor")
    for path in MODULES:
        heavy = roots(path) & {"onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "timm", "torchvision", "onnxscript"}
        assert not heavy or name_of(path).startswith(rooms), (path, heavy)


def test_only_cli_and_show_print_and_only_cli_exits():
    for path in MODULES:
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if name_of(path) not in ("mpdeploy.cli", "mpdeploy.show", "mpdeploy.verify"):
            assert not {"print", "sys.exit", "exit", "typer.echo"} & set(calls), path


def test_nothing_is_pickled():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pickle."):
                assert ast.unparse(node) == "pickle.UnpicklingError", path
            if isinstance(node, ast.Call):
                call = ast.unparse(node)
                assert not call.startswith("torch.save("), path
                assert not call.startswith("torch.load(") or "weights_only=True" in call, path


@pytest.mark.parametrize(
    "module",
    ["mpdeploy", "mpdeploy.cli", "mpdeploy.pipeline", "mpdeploy.report", "mpdeploy.targets", "mpdeploy.doctor"],
)
def test_importing_stays_light(module):
    code = f"import {module}, sys; print(sorted({{'torch', 'timm', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'scipy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"mpdeploy.report": "['scipy']"}.get(module, "[]")
    assert done.stdout.strip() in ("[]", heavy)


def test_help_imports_no_torch():
    code = "import sys; sys.argv = ['mpdeploy', '--help']\nfrom mpdeploy.cli import main\ntry: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_is_there():
    import mpdeploy

    for name in mpdeploy.__all__:
        assert getattr(mpdeploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mpdeploy.nonsense


def test_the_code_digest_covers_every_module_that_shapes_results():
    from mpdeploy.pipeline import NOT_PART_OF_THE_KEY

    for name in NOT_PART_OF_THE_KEY:
        assert Path(PACKAGE / name).is_file()
    for path in (PACKAGE / "stages").glob("*.py"):
        assert not imports(path) & {f"mpdeploy.{Path(n).stem}" for n in NOT_PART_OF_THE_KEY}
