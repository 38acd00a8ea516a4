"""cli, commands, app -> export -> train -> serve, and no torch where a server runs. import-linter reads packages alone."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("cli", "commands", "app", "export", "train", "serve")
HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "safetensors", "tensorboard")
IN_TRITON = "serve/triton/onnxruntime_backend.py"
"""Runs inside Triton, whose own module it imports."""

BLOCKED = """
import importlib, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy} or name == "export" or (name.startswith("train.") and name != "train.config"):
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Wall())
for name in {modules}:
    importlib.import_module(name)
loaded = sorted(name for name in sys.modules if name.split(".")[0] in {heavy})
assert not loaded, loaded
"""


def sources(*packages):
    found = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    assert len(found) > 3 * len(packages)
    return sorted(found)


def module_name(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def imports(path, *, at_run_time_only=True):
    """(module, lazy) of every import; lazy ones stand inside a function. Blocks under TYPE_CHECKING are never run."""
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and at_run_time_only:
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, lazy) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, lazy))
            found.extend((f"{node.module}.{alias.name}", lazy) for alias in node.names)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def tops(path, **options):
    return {name.split(".")[0] for name, _ in imports(path, **options)}


def test_serve_app_and_cli_import_where_torch_and_training_are_blocked():
    modules = [module_name(path) for path in sources("serve") if str(path.relative_to(ROOT)) != IN_TRITON] + ["app", "cli"]
    code = BLOCKED.format(heavy=HEAVY, modules=modules)
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_wall_of_that_test_stands():
    for module in ("train.loss", "export.graph", "serve.encoder, torch"):
        code = BLOCKED.format(heavy=HEAVY, modules=module.split(", "))
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert "is blocked" in done.stderr


@pytest.mark.parametrize("path", sources("serve"), ids=module_name)
def test_serve_is_the_leaf(path):
    assert not tops(path, at_run_time_only=False) & {"cli", "commands", "app", "export", "train", *HEAVY}


@pytest.mark.parametrize("path", sources("train"), ids=module_name)
def test_train_knows_serve_alone(path):
    assert not tops(path) & {"cli", "commands", "app", "export"}


@pytest.mark.parametrize("path", sources("export"), ids=module_name)
def test_export_knows_train_and_serve(path):
    assert not tops(path) & {"cli", "commands"}
    eager = {name.split(".")[0] for name, lazy in imports(path) if not lazy}
    assert "app" not in eager
    assert "app" not in tops(path) or path.name == "demo.py", "the demo alone opens the web page, and late"


def test_the_app_knows_serve_alone():
    assert not tops(ROOT / "app.py", at_run_time_only=False) & {"cli", "commands", "export", "train", *HEAVY}


def test_the_command_line_imports_its_stages_late():
    eager = {name for path in [ROOT / "cli.py", *sources("commands")] for name, lazy in imports(path) if not lazy}
    ours = {name for name in eager if name.split(".")[0] in OURS}
    stages = {name for name in ours if name.startswith(("train", "export", "app"))}
    assert all(name.split(".")[:2] == ["train", "config"] for name in stages)
    assert not {name.split(".")[0] for name in eager} & {*HEAVY, "numpy", "onnxruntime", "faiss", "gradio", "pyarrow"}
    assert not {name.split(".")[0] for name, _ in imports(ROOT / "train" / "config.py")} & set(HEAVY)


def test_the_contract_needs_the_standard_library_and_pydantic():
    for name in ("contract.py", "errors.py", "files.py", "signals.py"):
        foreign = tops(ROOT / "serve" / name, at_run_time_only=False) - set(sys.stdlib_module_names)
        assert foreign <= {"pydantic", "serve"}


def test_what_travels_to_triton_needs_numpy_and_pillow():
    assert tops(ROOT / "serve" / "preprocess.py") <= {*sys.stdlib_module_names, "numpy", "PIL"}


def test_nothing_is_unpickled():
    for path in [*sources("serve", "train", "export", "commands"), ROOT / "app.py", ROOT / "cli.py"]:
        text = path.read_text()
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        for call in calls:
            if call.startswith("torch.load("):
                assert "weights_only=True" in call, f"{path}: {call}"
            if call.startswith("np.load("):
                assert "allow_pickle=False" in call, f"{path}: {call}"
            assert not call.startswith(("pickle.load", "joblib.load", "marshal.load", "eval(", "exec(")), f"{path}: {call}"


def test_every_module_is_installed():
    """Flat packages are listed by hand; one that is forgotten works here and nowhere else."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {module.parent.relative_to(ROOT) for module in sources("serve", "train", "export", "commands")}
    assert set(settings["packages"]) == {folder.as_posix().replace("/", ".") for folder in folders}
    assert {*settings["packages"], *settings["py-modules"]} >= set(OURS)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
