"""Whose lab it is: a locked folder per lab, and the removal of labs whose owner is gone.

The folder /run/anabranch/<lab> is locked by the owner, and the kernel drops the lock when the owner ends,
however it ends. The folder is made before anything else of a lab and removed after everything else, so what
bears a lab's name and has no locked folder belongs to nobody.
"""

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple

from anabranch.errors import AnabranchError
from anabranch.lab import cgroups, network
from anabranch.lab.cgroups import Hierarchy, find_hierarchy
from anabranch.lab.tools import Tools

FOLDERS = Path("/run/anabranch")
NAME = re.compile(r"(anab\d+-[0-9a-f]{6})(-hub|-n\d+)?")
REMOVAL_S = 20.0


class Cleaned(NamedTuple):
    """removed: labs whose owner was gone. running: labs that their owners still use."""

    removed: list[str]
    running: list[str]


def new_name() -> str:
    """A name that tells the owner's process id, and that no other lab has."""
    return f"anab{os.getpid()}-{secrets.token_hex(3)}"


@contextmanager
def owning(lab: str) -> Generator[Path]:
    """The lab's folder, made and locked."""
    folder = FOLDERS / lab
    with _alone():
        folder.mkdir()
        lock = _lock(folder, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        os.close(lock)


def clean() -> Cleaned:
    """Remove what labs without an owner have left. Raises AnabranchError where the kernel refuses."""
    removed: list[str] = []
    running: list[str] = []
    with _alone():
        for lab in _known():
            if _owned(lab):
                running.append(lab)
            else:
                remove(lab)
                removed.append(lab)
    return Cleaned(removed, running)


def remove(lab: str) -> None:
    """End every process of a lab and delete its namespaces, cgroups and folder, whatever is left of them.

    Raises AnabranchError where something is still there after REMOVAL_S.
    """
    hierarchy, tools = find_hierarchy(), Tools()
    deadline_s = time.monotonic() + REMOVAL_S
    while not _removed(lab, hierarchy, tools):
        if time.monotonic() > deadline_s:
            raise AnabranchError(f"{lab} resists removal; try `anabranch lab clean` again", setting="lab")
        time.sleep(0.01)
    shutil.rmtree(FOLDERS / lab, ignore_errors=True)


def _removed(lab: str, hierarchy: Hierarchy | None, tools: Tools) -> bool:
    """One attempt. Namespaces keep their names until no process is in them, else nobody finds those again."""
    alive = network.processes(lab)
    if hierarchy:
        alive |= cgroups.processes(hierarchy, lab)
    cgroups.send(alive, SIGKILL)
    if alive:
        return False
    gone = network.delete(lab, tools)
    return (hierarchy is None or cgroups.remove(hierarchy, lab)) and gone


def _known() -> list[str]:
    """Every lab of which something is there. One that has cgroups alone is another container's, whose folders are not
    seen here: a lab's own folder goes after its cgroups."""
    seen = [*(os.listdir(FOLDERS) if FOLDERS.exists() else []), *network.names()]
    return sorted({match[1] for name in seen if (match := NAME.fullmatch(name))})


def _owned(lab: str) -> bool:
    """Whether somebody holds the lab's lock."""
    try:
        os.close(_lock(FOLDERS / lab, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


@contextmanager
def _alone() -> Generator[None]:
    """One process at a time: a folder that is made but not yet locked looks like one that nobody owns."""
    FOLDERS.mkdir(parents=True, exist_ok=True)
    lock = _lock(FOLDERS, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path, operation: int) -> int:
    """An open file that holds a folder's lock until it is closed. Raises BlockingIOError where asked to."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, operation)
    except OSError:
        os.close(file)
        raise
    return file
