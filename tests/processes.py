"""Several processes of one program on this machine, joined by torchrun over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Two processes by accelerate, which starts several only with --multi_gpu; a configuration says that they use the CPU.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]


def environment(**more: str) -> dict[str, str]:
    """What a process of this repository's code needs in its environment."""
    paths = filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run_python(arguments: list, timeout: float = 600, **more: str) -> None:
    """`python ARGUMENTS` with this repository on its path.

    Raises:
        AssertionError: with what it printed to stderr, if it fails.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**more), check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-8000:]


def run_processes(arguments: list, logs: Path, processes: int = 2) -> None:
    """The same in several processes at once; `logs` is a folder for what each of them prints.

    They meet on the loopback interface, so that the name of this machine need not resolve to any address.

    Raises:
        AssertionError: with the stderr of every process, if one fails.
    """
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone"]
    launch += ["--local-addr", "127.0.0.1", "--redirects", "3", "--log-dir", logs]
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    try:
        run_python([*launch, *arguments], GLOO_SOCKET_IFNAME=loopback)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        printed = [f"{path}:\n{path.read_text()[-4000:]}" for path in sorted(logs.rglob("stderr.log"))]
        raise AssertionError("\n".join([str(error)[-1000:], *printed])) from None
