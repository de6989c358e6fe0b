"""A Ray cluster of two CPUs whose workers are forked from a process that has imported what they need.

    with RayCluster(folder) as cluster:
        ...  # cluster.address
        pid = cluster.fork(["-m", "shardxform", "score", ...])

Ray starts a process for every worker of every job, which takes seconds to import torch and transformers. It lets one
name the program that prepares a worker: here that is this file, which has the template fork a child that takes its
place, and ends. From there on the child is the worker that Ray starts: its own `default_worker.py`, with its arguments
and its environment; the template has not imported ray, which reads that environment once. So is a driver that is
forked what the shell starts, but for what it has imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator

# A worker waits until this file is read: what the test and the template need is imported there.

FOLDER = "_SHARDXFORM_TEST_RAY"
SOCKET = "template"
FRESH = "fresh"  # a file in the folder: workers are started as Ray does it
MODULES = [
    *("torch", "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe", "tokenizers"),
    *("shardxform.cli.score", "shardxform.cli.quantize", "shardxform.cluster.scoring", "shardxform.tuning.session"),
    *("google.protobuf.descriptor_pool", "google.protobuf.message", "jsonschema", "requests"),  # of ray
]


class RayCluster:
    """A cluster that wants no token, and its template; use as a context manager."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Start both."""
        import subprocess

        self.folder, self.address = os.fspath(folder), ""
        environment = {**os.environ, FOLDER: self.folder, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self._template, self._cluster = (
            subprocess.Popen(
                [sys.executable, __file__, word],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for word in ("--template", "--cluster")
        )

    def __enter__(self) -> RayCluster:
        """Wait until they are ready."""
        self._line(self._template)
        self.address = self._line(self._cluster)
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._cluster, self._template):
            process.communicate()

    def add(self) -> str:
        """Add a machine of one CPU, whose ID is returned."""
        return self._ask("add")

    def lose(self, workers: Iterable[str]) -> None:
        """Kill all processes of the machine that was added: its workers, and those of Ray itself."""
        self._ask(" ".join(("lose", *workers)))

    def _ask(self, word: str) -> str:
        assert self._cluster.stdin
        self._cluster.stdin.write(f"{word}\n")
        self._cluster.stdin.flush()
        return self._line(self._cluster)

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout
        line = process.stdout.readline()
        assert line, "the process has ended"
        return line.strip()

    @contextlib.contextmanager
    def as_ray_starts_them(self) -> Iterator[None]:
        """Have Ray start workers that have imported nothing."""
        path = os.path.join(self.folder, FRESH)
        with open(path, "w"):
            pass
        yield
        os.remove(path)

    def fork(self, arguments: list[str], out: int, err: int) -> int:
        """Start python with arguments, `-m` and a module first, by forking it, with descriptors for what it says."""
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            return ask(self.folder, arguments, [null, out, err])
        finally:
            os.close(null)


def ask(folder: str, arguments: list[str], files: list[int]) -> int:
    """Have the template fork: arguments as python takes them, and standard input, output and error."""
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(folder, SOCKET))
        socket.send_fds(connection, [b" "], files)
        connection.sendall(json.dumps(wanted).encode())
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(16))


def serve(folder: str) -> None:
    """Import, and fork whenever it is asked for; in the child, return when it has become what was asked for."""
    import gc
    import importlib
    import select
    import signal

    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    if os.path.exists("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "what has threads is not to be forked"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    with socket.socket(socket.AF_UNIX) as server:
        path = os.path.join(folder, SOCKET)
        server.bind(f"{path}.tmp")
        server.listen(64)
        os.rename(f"{path}.tmp", path)
        print(flush=True)
        while True:
            if 0 in select.select([0, server], [], [])[0]:  # nobody is there any more
                os._exit(0)
            with server.accept()[0] as connection:
                _, files, _, _ = socket.recv_fds(connection, 1, 3)
                wanted = json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
                if not (pid := os.fork()):
                    break
                connection.sendall(str(pid).encode())
            for file in files:
                os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    become(wanted["arguments"])


def become(arguments: list[str]) -> None:
    """Do what python does with arguments."""
    import runpy

    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


def run() -> None:
    """Run the cluster until standard input ends; its lines add another machine, and have the last one fail."""
    import signal

    from ray.cluster_utils import Cluster

    machine = {"object_store_memory": 100 << 20, "setup_worker_path": __file__, "include_log_monitor": False}
    head = {**machine, "include_dashboard": False, "no_monitor": True, "num_cpus": 2}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, flush=True)
    added = []
    for line in sys.stdin:
        word, *workers = line.split()
        if word == "add":
            added.append(cluster.add_node(**machine, num_cpus=1))
            print(added[-1].node_id, flush=True)
        else:
            for worker in workers:
                os.kill(int(worker), signal.SIGKILL)
            cluster.remove_node(added.pop(), allow_graceful=False)
            print(flush=True)
    cluster.shutdown()


def start(folder: str, arguments: list[str]) -> None:
    """Start the worker that Ray wants here: arguments of `setup_worker.py`, those of this cluster's jobs."""
    at = next(at for at, word in enumerate(arguments) if word.endswith(".py"))
    worker = [word for word in arguments[at:] if not word.startswith(("--language=", "--serialized-runtime-env"))]
    if os.path.exists(os.path.join(folder, FRESH)):
        os.execv(sys.executable, [sys.executable, *worker])
    ask(folder, worker, [0, 1, 2])


if __name__ == "__main__":
    if sys.argv[1] == "--template":
        serve(os.environ[FOLDER])
    elif sys.argv[1] == "--cluster":
        run()
    else:
        start(os.environ[FOLDER], sys.argv[1:])
