"""Commands forked from one warm interpreter, each with its own arguments, environment and folder.

All pytest workers of a run share one server process. The server imports what commands import, runs no tensor
operation, and forks one child per command. A child exits as a separate interpreter does, exit handlers included. Every
child has the server's hash seed. Commands whose output must not depend on that seed also run as real processes.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
IMPORTS = (
    *(
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for package in ("cli", "comparison", "models", "runs")
        for path in sorted((ROOT / "src" / "hftlight" / package).rglob("[a-z]*.py"))
    ),
    "hftlight.defenses",
    "hftlight.report.html.page",
    "matplotlib.backends.backend_svg",
    "tests.helpers.killed",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.serialization",
    "peft",
    "peft.utils.transformers_weight_conversion",
    "transformers.models.llama.modeling_llama",
    *(f"tests.defenses.rows.{path.stem}" for path in (ROOT / "tests" / "defenses" / "rows").glob("[a-z]*.py")),
)
REQUEST_BYTES, QUEUE = 2**17, 64


class Command:
    """One command that runs in a child of the warm interpreter, with the part of ``Popen`` that tests need.

    Args:
        arguments: what follows ``python``: a script, ``-m module`` or ``-c code``, then its own arguments.
        cwd: the child's working directory; this process's by default.
        env: the child's whole environment; this process's by default.
    """

    def __init__(
        self, arguments: Sequence[str], cwd: str | Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.arguments = list(arguments)
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (read after the end)
        self._told, status_pipe = os.pipe()
        request = {"arguments": self.arguments, "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as channel:
            channel.connect(server())
            socket.send_fds(
                channel, [json.dumps(request).encode()], [self._out.fileno(), self._err.fileno(), status_pipe]
            )
        os.close(status_pipe)
        self._lines = b""
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """Process id of the child."""
        self._read_until(1, None)
        return int(self._lines.split()[0])

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the command runs."""
        if self.returncode is None and self._read_until(2, 0.0):
            self.returncode = int(self._lines.split()[1])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status and return it. Raise ``TimeoutExpired`` after ``timeout`` seconds."""
        if not self._read_until(2, timeout):
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0, self.stdout, self.stderr)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the child if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the child if it still runs."""
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self) -> str:
        """What the child has written to its standard output."""
        return _text(self._out)

    @property
    def stderr(self) -> str:
        """What the child has written to its standard error."""
        return _text(self._err)

    def _read_until(self, lines: int, timeout: float | None) -> bool:
        """Read the child's id (line 1) and exit status (line 2). Return whether ``lines`` lines have arrived."""
        until = None if timeout is None else time.monotonic() + timeout
        while self._lines.count(b"\n") < lines:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._told], [], [], left)[0]:
                return False
            read = os.read(self._told, 64)
            if not read:
                raise RuntimeError(f"The warm interpreter lost a command: {self.arguments}\n{self.stderr[-2000:]}")
            self._lines += read
        return True

    def __del__(self) -> None:
        os.close(self._told)


def _text(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode()


def run(
    arguments: Sequence[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, as ``subprocess.run`` does with captured text. A timeout kills the command."""
    command = Command(arguments, cwd, env)
    try:
        status = command.wait(timeout)
    except subprocess.TimeoutExpired:
        command.kill()
        raise
    done = subprocess.CompletedProcess(command.arguments, status, command.stdout, command.stderr)
    if check:
        done.check_returncode()
    return done


def run_ranks(
    arguments: Sequence[str], count: int, cwd: str | Path | None = None, timeout: float = 400.0
) -> list["subprocess.CompletedProcess[str]"]:
    """Run a command in ``count`` processes with the environment that ``torchrun`` gives its ranks."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "warm", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        Command(arguments, cwd, {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    until = time.monotonic() + timeout
    try:
        for rank in ranks:
            rank.wait(until - time.monotonic())
    finally:
        for rank in ranks:
            rank.kill()
    return [subprocess.CompletedProcess(r.arguments, r.wait(), r.stdout, r.stderr) for r in ranks]


@cache
def server() -> str:
    """Return the address of this test run's warm interpreter. The first caller starts the interpreter."""
    from filelock import FileLock

    label = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    address = Path(tempfile.gettempdir()) / f"hftlight-warm-{label[:16]}"
    with FileLock(f"{address}.lock"):
        if not address.exists():
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(str(address))
            listener.listen(QUEUE)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
            command = [sys.executable, "-m", "tests.helpers.warm", str(listener.fileno()), str(address), str(owner)]
            with Path(f"{address}.log").open("w") as log:
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log,
                )  # fmt: skip
            listener.close()
    return str(address)


def serve(listener: socket.socket, address: Path, owner: int) -> dict[str, Any] | None:
    """Fork a child per request until the owner is gone. Return the request in a child, None in the server."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if not select.select([listener], [], [], 1.0)[0]:
            if not alive(owner):
                for path in (address, Path(f"{address}.lock"), Path(f"{address}.log")):
                    path.unlink(missing_ok=True)
                return None
            continue
        channel, _ = listener.accept()
        message, descriptors, *_ = socket.recv_fds(channel, REQUEST_BYTES, 3)
        channel.close()
        if os.fork() == 0:
            listener.close()
            return watched(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def alive(pid: int) -> bool:
    """Tell whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def watched(request: dict[str, Any], out: int, err: int, status_pipe: int) -> dict[str, Any]:
    """Fork the command's own process, report its id and exit status, and exit. Only that process returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status_pipe)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(source, target)
            os.close(source)
        return request
    os.write(status_pipe, f"{pid}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status_pipe, f"{status}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], paths: Sequence[str]) -> None:
    """Turn this process into the command: environment, folder, import path, arguments, then code."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    first, *rest = request["arguments"]
    sys.path[:] = [*filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep)), *paths]
    if first == "-m":
        sys.argv = rest
        sys.path.insert(0, request["cwd"])
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def main(descriptor: str, address: str, owner: str) -> None:
    """Import, listen, fork."""
    from importlib import import_module

    paths = [p for p in sys.path if p not in ("", str(ROOT), str(ROOT / "src"))] + [str(ROOT / "src"), str(ROOT)]
    for name in IMPORTS:
        import_module(name)
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # compiles patterns
    for path in (ROOT / "src" / "hftlight").rglob("*.py"):
        import_module("hftlight.provenance").imported(path)  # each child would read every file again
    gc.collect()
    gc.freeze()
    request = serve(socket.socket(fileno=int(descriptor)), Path(address), int(owner))
    if request is not None:
        become(request, paths)


if __name__ == "__main__":
    main(*sys.argv[1:])
