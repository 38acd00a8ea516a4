"""Triton without a container: NVIDIA's server binary from the wheel `nvidia-pytriton`, in a venv of its own.

Of its own, because Triton's Python stub needs numpy<2: with numpy 2 it returns every tensor empty, and says nothing. The
wheel has no onnxruntime backend; serve/triton/onnxruntime_backend.py takes that place.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from serve.errors import TritonStartError
from serve.files import atomic_folder

VARIABLE = "SIMCLR_TRITON_ENV"
NEEDS = ("numpy<2", "onnxruntime", f"pillow=={metadata.version('pillow')}")
"""Pillow as it is here: another version may resize to other pixels."""
PYTRITON = "nvidia-pytriton==0.7.0"
"""Carries tritonserver 2.51. Installed without its dependencies: only the binaries in it are used."""
_INSTALL = "install it with `make triton-runtime`, or use a container that has tritonserver on its PATH"
_PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, sysconfig
def folder(module):
    spec = util.find_spec(module)
    return spec and spec.submodule_search_locations[0]
print(json.dumps({
    "pytriton": folder("pytriton"), "numpy": folder("numpy") and metadata.version("numpy"),
    "onnxruntime": folder("onnxruntime"), "pillow": folder("PIL"), "python": sysconfig.get_python_version(),
    "library_folder": sysconfig.get_config_var("LIBDIR") or "", "packages": sysconfig.get_path("purelib"),
}))
"""


@dataclass(frozen=True)
class PipRuntime:
    """A venv that can run Triton, and where its pieces are."""

    folder: Path
    triton: Path
    """pytriton's `tritonserver` folder: bin, backends, stubs."""
    stub: Path
    packages: Path
    library_folder: str
    """Of the running Python: the stub links libpython and would take another one of the same version."""

    @property
    def server(self) -> Path:
        """The tritonserver binary."""
        return self.triton / "bin" / "tritonserver"

    def environment(self) -> dict[str, str]:
        """What tritonserver and its stubs are started with; the stub's interpreter is the `python3` found on PATH."""
        libraries = [str(self.packages / "nvidia_pytriton.libs"), self.library_folder, os.environ.get("LD_LIBRARY_PATH", "")]
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "VIRTUAL_ENV")}
        return kept | {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "PATH": os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": str(self.packages),
        }

    def assemble_backends(self, folder: Path) -> Path:
        """Fill `folder` for --backend-directory; with copies, because Triton refuses links that lead out of it."""
        shutil.copytree(self.triton / "backends" / "python", folder / "python", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(self.stub, folder / "python")
        (folder / "onnxruntime").mkdir()
        shutil.copyfile(Path(__file__).with_name("onnxruntime_backend.py"), folder / "onnxruntime" / "model.py")
        return folder


def runtime_folder() -> Path:
    """Where the runtime is looked for and installed: SIMCLR_TRITON_ENV, else `triton` inside the running environment."""
    return Path(os.environ.get(VARIABLE) or Path(sys.prefix) / "triton").absolute()


def find_runtime(folder: Path) -> PipRuntime:
    """Look at a venv and say what it lacks. Raises: TritonStartError."""
    _require_platform()
    python = folder / "bin" / "python"
    if not python.is_file():
        raise TritonStartError(f"{folder}: no Triton runtime there; {_INSTALL} ({VARIABLE} names another folder)")
    found = _probe(python)
    missing = [package for package in ("numpy", "onnxruntime", "pillow", "pytriton") if not found[package]]
    if missing:
        raise TritonStartError(f"{folder}: the Triton runtime lacks {', '.join(missing)}; {_INSTALL}")
    if int(found["numpy"].split(".")[0]) >= 2:
        why = "Triton's Python stub would return every tensor empty"
        raise TritonStartError(
            f"{folder}: has numpy {found['numpy']}, wanted numpy<2 ({why}); {python} -m pip install 'numpy<2'"
        )
    triton = Path(found["pytriton"]) / "tritonserver"
    stub = triton / "python_backend_stubs" / found["python"] / "triton_python_backend_stub"
    if not stub.is_file():
        versions = sorted(
            (entry.name for entry in stub.parent.parent.glob("*")), key=lambda name: [int(n) for n in name.split(".")]
        )
        raise TritonStartError(
            f"{folder}: runs Python {found['python']}, Triton has stubs for {', '.join(versions) or 'none'}; "
            "install the runtime with one of these"
        )
    return PipRuntime(folder, triton, stub, Path(found["packages"]), found["library_folder"])


def install_runtime(folder: Path) -> None:
    """Make the venv; it gets its name when it is complete. Raises: TritonStartError."""
    _require_platform()
    with atomic_folder(folder) as unfinished:  # found and run by its path, so it may be renamed; its pip script may not
        python = str(unfinished / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        for command in ([sys.executable, "-m", "venv", str(unfinished)], [*pip, *NEEDS], [*pip, "--no-deps", PYTRITON]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                did = " ".join(command[1:])
                raise TritonStartError(
                    f"{folder}: installing the Triton runtime failed at `{did}`; see the lines above"
                ) from error
        find_runtime(unfinished)


def _require_platform() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        here = f"{platform.system()} {platform.machine()}"
        do = "use a container, or give the repository itself as --encoder (ONNX Runtime, no server)"
        raise TritonStartError(f"the pip runtime of Triton exists for Linux x86_64, this is {here}; {do}")


def _probe(python: Path) -> dict[str, str]:
    try:
        done = subprocess.run([python, "-I", "-c", _PROBE], check=True, capture_output=True, text=True, timeout=60)
        return dict(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise TritonStartError(f"{python}: does not run ({error}); {_INSTALL}") from error
