"""An emulated cluster that lives as long as a `with` block."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from anabranch.errors import AnabranchError
from anabranch.lab import cgroups, network
from anabranch.lab.agents import Job, inside
from anabranch.lab.cgroups import AGENTS, Hierarchy, find_hierarchy
from anabranch.lab.kernel import available
from anabranch.lab.ownership import clean, new_name, owning, remove
from anabranch.lab.spec import LabSpec
from anabranch.lab.tools import Tools

PACKAGES = Path(__file__).resolve().parents[2]


class Lab:
    """Nodes as network namespaces with shaped links, and a CPU quota for each rank.

    Entering the block
    1. removes what labs of dead owners have left,
    2. starts the watchdog, which takes this lab down however its owner ends,
    3. makes cgroups with quotas, then namespaces with links.
    Leaving it tells the watchdog to take everything down, and waits for it.

    Raises AnabranchError on entering where the machine cannot hold a lab; nothing is left then either.
    """

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self.name = new_name()
        self._runs = 0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if reason := available():
            raise AnabranchError(reason, setting="lab")
        clean()
        with ExitStack() as undo:
            lock = undo.enter_context(ExitStack())  # given up last
            held = self._watch(undo)
            self._folder = lock.enter_context(owning(self.name))
            self._hierarchy = _hierarchy()
            cgroups.create(self._hierarchy, self.name, self.spec.ranks, self.spec.cpu)
            network.build(self.name, self.spec, Tools((held,)))
            self._open = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(
        self,
        command: list[str],
        env: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> int:
        """Run `command` on every rank under torchrun; its exit status, as a shell tells it.

        The first rank to fail gives the status and ends the others: they get SIGTERM, and SIGKILL 5 s later.
        env: variables beside this process's own. A command that takes longer than `timeout_s` ends with 124.
        meanwhile: called many times a second as long as it runs. Ranks find the lab's shape in ANABRANCH_LAB.
        """
        job = Job(self._hierarchy, self.name, self.spec, self._folder, self._runs)
        self._runs += 1
        try:
            job.start(command, env or {})
            return job.wait(timeout_s, meanwhile)
        finally:
            job.end()

    def spawn(self, node: int, command: list[str], *, rank: int | None = None) -> subprocess.Popen[str]:
        """Start one process on a node, with its output piped; under the quota of `rank`, else under none."""
        group = AGENTS if rank is None else f"rank{rank}"
        line = inside(self._hierarchy, self.name, node, group, command)
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def _watch(self, undo: ExitStack) -> int:
        """Start the watchdog; our end of its pipe."""
        dog = subprocess.Popen(
            [sys.executable, "-P", "-m", "anabranch.lab.watchdog", self.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env=dict(os.environ) | {"PYTHONPATH": str(PACKAGES)},
        )  # fmt: skip
        undo.callback(_take_down, self.name, dog)
        assert dog.stdin is not None and dog.stdout is not None
        if dog.stdout.readline() != b"ready\n":
            raise AnabranchError("its watchdog does not start; the reason is above", setting="lab")
        return dog.stdin.fileno()


def _take_down(lab: str, dog: subprocess.Popen[bytes]) -> None:
    """Let the watchdog remove the lab; without a watchdog, do it here."""
    with dog:  # closes the pipe and waits
        pass
    if dog.returncode:
        remove(lab)


def _hierarchy() -> Hierarchy:
    found = find_hierarchy()
    assert found is not None, "available() has seen it"
    return found
