"""The C++ step as a library: compiled at its first use, for this machine, and kept.

The level is what the processor offers, best first. A library is named by its sources, level and compiler, so that a
change of any builds anew.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from anabranch.errors import BuildError

HERE = Path(__file__).parent
CACHE = Path("~/.cache/anabranch/native").expanduser()
BUILD_S = 300
# Compiler options by level; a level needs all of its flags in /proc/cpuinfo.
LEVELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_bf16": (
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"),
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
    ),
    "avx512_vnni": (
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
        ("-march=x86-64-v4", "-mavx512vnni"),
    ),
    "avx512": (("avx512f", "avx512bw", "avx512dq", "avx512vl"), ("-march=x86-64-v4",)),
    "avx2": (("avx2", "fma", "f16c"), ("-march=x86-64-v3",)),
    "plain": ((), ()),
}


def processor_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The best level that this processor has all instructions of."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return next(level for level, (needed, _) in LEVELS.items() if flags.issuperset(needed))


def build(level: str | None = None, cache: Path = CACHE) -> ctypes.CDLL:
    """Load the library of `level` (the processor's best), compiling it where it is not kept yet.

    Raises BuildError where there is no C++ compiler or it fails.
    """
    level = level or processor_level()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise BuildError("no C++ compiler: install g++ or clang++, or name one in CXX")
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wno-psabi", *LEVELS[level][1]]
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])
    key = hashlib.sha256("\0".join([*command, *(s.read_text() for s in sources)]).encode()).hexdigest()[:20]
    library = cache / f"{level}-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Compiled beside and moved: another process never loads half a library.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / "library.so"
            _compile([*command, str(HERE / "library.cpp"), "-o", str(made)])
            made.replace(library)
    return ctypes.CDLL(str(library))


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"the compiler took more than {BUILD_S} s: {' '.join(command)}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
