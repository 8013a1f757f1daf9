"""Running the system's own tools: ip, tc, nsenter."""

import subprocess
from dataclasses import dataclass

from anabranch.errors import AnabranchError


@dataclass(frozen=True)
class Tools:
    """held: open files that a running tool inherits. The owner of a lab hands in its end of the watchdog's
    pipe: should the owner be killed while `ip` makes something, the watchdog waits for `ip` too.
    """

    held: tuple[int, ...] = ()

    def __call__(self, *command: str) -> str:
        """What the tool prints. Raises AnabranchError with its complaint where it fails."""
        ran = self.attempt(*command)
        if ran.returncode:
            raise AnabranchError(f"`{' '.join(command)}` failed: {ran.stderr.strip()}", setting="lab")
        return ran.stdout

    def attempt(self, *command: str) -> subprocess.CompletedProcess[str]:
        """For a tool whose failure is an answer."""
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=self.held
        )
