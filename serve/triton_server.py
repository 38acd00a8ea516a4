"""Starts a real tritonserver on this machine, on 127.0.0.1 unless told otherwise, and stops it again.

Whoever reaches the ports may ask for vectors. What changes the server (loading models, shared memory, tracing, logging) needs
the key in SIMCLR_TRITON_KEY; without that variable nobody has it.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from serve.errors import EncoderUnavailable, SimclrError, TritonStartError
from serve.ports import HOST, busy_reason, free_port
from serve.triton.model_control import KEY_NAME, KEY_VARIABLE, ModelControl
from serve.triton.runtime import find_runtime, install_runtime, runtime_folder

START_TIMEOUT_S = 300.0
"""Large graphs and TensorRT engines take their time."""
DRAIN_S, STOP_TIMEOUT_S = 10, 15.0
"""On SIGTERM Triton takes no more and finishes what it has, within the first; after the second it is killed."""
_RESTRICTED = "model-repository,shared-memory,trace,logging"
_LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
"""prctl(PR_SET_PDEATHSIG, SIGTERM), then become tritonserver: the server does not outlive us, not even our kill -9.
A launcher, because subprocess's preexec_fn is unsafe in a program with threads."""


class TritonServer:
    """A tritonserver for the time of a `with` block; port 0 takes a free one.

    Linux ties the server to the thread that starts it: when that thread ends, so does the server.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = HOST,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
    ) -> None:
        self.repository = repository
        self.host = host
        self.key = os.environ.get(KEY_VARIABLE) or secrets.token_urlsafe(24)
        self.ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def reachable(self) -> str:
        """The address at which this machine finds it."""
        return HOST if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104  # compared, not bound

    @property
    def url(self) -> str:
        """Its gRPC address; add /NAME for an encoder."""
        return f"grpc://{self.reachable}:{self.ports['grpc']}"

    @property
    def http_url(self) -> str:
        """Its HTTP address."""
        return f"http://{self.reachable}:{self.ports['http']}"

    @property
    def metrics_url(self) -> str:
        """Its Prometheus metrics."""
        return f"http://{self.reachable}:{self.ports['metrics']}/metrics"

    def start(self) -> None:
        """Start, and return when every model is ready. Raises: TritonStartError."""
        _require_models(self.repository)
        self.ports = {kind: port or free_port() for kind, port in self.ports.items()}
        for kind, port in self.ports.items():
            _require_free(self.host, kind, port)
        self._folder = Path(tempfile.mkdtemp(prefix="simclr-triton-"))
        try:
            command, environment = self._plan(self._folder)
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            self._wait_until_ready(self._process)
        except BaseException:  # a Ctrl-C too must not leave a server behind
            self.stop()
            raise

    def stop(self, *, drain: bool = True) -> None:
        """Ask it to finish what it is doing and end; after 15 s, or at once without `drain`, end it. May be called twice."""
        process, self._process = self._process, None
        try:
            if process is not None and drain:
                self._drain(process)
                process.terminate()
                process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its Python stubs too, should it have left some
                process.wait()
            if self._folder is not None:
                _clean_up(self._folder)

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        """Let ensembles finish: on SIGTERM Triton would refuse the next step of one that is under way."""
        endings = ("_embed", "_embed_dali", "_classify")
        ensembles = [folder.name for folder in self.repository.glob("*_*") if folder.name.endswith(endings)]
        deadline = time.monotonic() + DRAIN_S
        control = ModelControl(self.http_url, self.key, timeout_s=DRAIN_S)
        with suppress(EncoderUnavailable):  # it is dead or stuck: nothing to wait for
            for name in ensembles:
                control.unload(name)
            while process.poll() is None and time.monotonic() < deadline:
                busy = {model for model, state in control.states().items() if state == "UNLOADING"}
                if not any(model.startswith(f"{name}/") for model in busy for name in ensembles):
                    return
                time.sleep(0.05)

    def wait(self) -> None:
        """Block while the server runs. Raises: TritonStartError if it ends by itself."""
        raise TritonStartError(str(self.ended_within(None)))

    def ended_within(self, seconds: float | None) -> str | None:
        """Wait so long (None: for ever); what is known of a server that ended by itself meanwhile, else None."""
        assert self._process is not None, "start() comes first"
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return f"the Triton server ended by itself (exit status {code}): {_tail(self._read_log())}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Of the running server."""
        return self._process.pid if self._process else None

    @property
    def _log(self) -> Path:
        assert self._folder is not None
        return self._folder / "triton.log"

    def _read_log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _plan(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        """Command and environment: a tritonserver on PATH with its own backends, else the pip runtime with ours."""
        options = [f"--model-repository={self.repository.resolve()}", "--disable-auto-complete-config"]
        options += [f"--exit-timeout-secs={DRAIN_S}", _shared_memory("python", folder)]
        for kind, port in self.ports.items():
            options += [f"--{kind}-address={self.host}", f"--{kind}-port={port}"]
        options += ["--model-control-mode=explicit", "--load-model=*"]
        options += [f"--http-restricted-api={_RESTRICTED}:{KEY_NAME}={self.key}"]
        options += [f"--grpc-restricted-protocol={_RESTRICTED}:{KEY_NAME}={self.key}"]
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
        installed = shutil.which("tritonserver")
        if installed is not None:
            return [*launcher, installed, *options], dict(os.environ)
        runtime = find_runtime(runtime_folder())
        backends = runtime.assemble_backends(folder / "backends")
        launcher[0] = str(runtime.folder / "bin" / "python")
        options += [f"--backend-directory={backends}", _shared_memory("onnxruntime", folder)]
        return [*launcher, str(runtime.server), *options], runtime.environment()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(f"{self.http_url}/v2/health/ready"):
            if process.poll() is not None:
                raise TritonStartError(_why(self._read_log(), self.repository))
            if time.monotonic() > deadline:
                raise TritonStartError(f"the Triton server is not ready after {START_TIMEOUT_S:g} s: {_tail(self._read_log())}")
            time.sleep(0.1)


def _require_models(repository: Path) -> None:
    if not any(repository.glob("*/config.pbtxt")):
        raise TritonStartError(
            f"{repository}: no Triton models (folders with a config.pbtxt) there; write some with `simclr export`"
        )


def _require_free(host: str, kind: str, port: int) -> None:
    if reason := busy_reason(host, port):
        raise TritonStartError(f"port {port} cannot be used ({reason}); choose another with --{kind}-port")


def _shared_memory(backend: str, folder: Path) -> str:
    return f"--backend-config={backend},shm-region-prefix-name={folder.name}-"


def _clean_up(folder: Path) -> None:
    """Our scratch folder, and the shared memory that a server leaves when it is cut short (open HTTP clients suffice)."""
    for region in Path("/dev/shm").glob(f"{folder.name}-*"):  # noqa: S108  # not temporary files: where Linux keeps it
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310  # our own http:// address
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _why(log: str, repository: Path) -> str:
    """The server's reason in one line, out of its log."""
    if "KIND_GPU but" in log:
        return f"{repository}: its models want a GPU and this machine has none that works; export again with --target cpu"
    if failed := re.search(r"failed to load '([^']+)' version \d+: (.+)", log):
        reason = re.split(r"\\n|;", failed[2])[0].strip('" ')
        return f"{repository}: model {failed[1]} does not load ({reason}); export the run again"
    if foreign := re.search(r"for model directory '([^']+)': (.+)", log):
        reason = foreign[2].strip('" ')
        return f"{repository}: folder {foreign[1]} is not a model ({reason}); move it elsewhere or export the run again"
    return f"the Triton server did not start: {_tail(log)}"


def _tail(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip() and line[0] not in "|+"]
    return " / ".join(lines[-3:]) or "it wrote nothing"


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.triton_server", description="Install the pip runtime of Triton.")
    parser.add_argument("--install", nargs="?", type=Path, default=runtime_folder(), const=runtime_folder(), metavar="FOLDER")
    folder = parser.parse_args().install
    try:
        find_runtime(folder)
    except TritonStartError:
        print(f"installing Triton into {folder}")
        install_runtime(folder)
    print(f"{folder}: a Triton runtime is there")


if __name__ == "__main__":
    try:
        _main()
    except SimclrError as failure:
        sys.exit(str(failure))
