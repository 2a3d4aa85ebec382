"""Compiling `kernel.cpp` and its headers for this machine: once, on first use, into the user's cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
COMPILERS = ("c++", "g++", "clang++")


def folder() -> Path:
    return Path.home() / ".cache" / "longpatch"


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled functions, or why there are none: what each compiler said that was tried."""
    if sys.platform != "linux":
        return f"it is compiled on Linux only, this is {sys.platform}"
    problems = []
    for found in filter(None, map(shutil.which, COMPILERS)):
        try:
            return ctypes.CDLL(str(_built(found)))
        except subprocess.CalledProcessError as error:  # a compiler that was killed says nothing
            problems.append(f"{found} failed: " + (error.stderr.strip().splitlines() or [str(error)])[-1])
        except OSError as error:
            problems.append(f"what {found} made cannot be kept or loaded: {error}")
    return "; ".join(problems) or "no C++ compiler found; looked for " + ", ".join(COMPILERS)


def _built(compiler: str) -> Path:
    """The shared library's path; its name holds all that it depends on: source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    parts = (*texts, " ".join(FLAGS), compiler, version, _processor())
    path = folder() / f"kernel_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / path.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(made, path)  # at once whole, whoever else compiles
    return path


def _processor() -> str:
    """What -march=native looks at."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
