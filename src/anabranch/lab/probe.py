"""What `lab check` runs inside a lab: plain sockets and a busy loop. Only the standard library; run by path.

- `sink HOST PORT SECONDS` prints "ready", then the megabits a second that arrived
- `source HOST PORT` sends until the sink hangs up
- `spin SECONDS` prints the cores it got
"""

import socket
import sys
import time

CHUNK_BYTES = 1 << 18
PATIENCE_S = 10.0
# The first bytes find a full bucket and a closed congestion window: they are not counted.
WARM_UP_S = 0.2


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def sink(host: str, port: int, seconds: float) -> None:
    """Take one connection and time what arrives."""
    buffer = bytearray(CHUNK_BYTES)
    with socket.create_server((host, port)) as server:
        server.settimeout(PATIENCE_S)
        _say("ready")
        with server.accept()[0] as link:
            link.settimeout(PATIENCE_S)
            link.recv_into(buffer)
            began_s = _receive(link, buffer, time.perf_counter() + WARM_UP_S)[1]
            received, ended_s = _receive(link, buffer, began_s + seconds)
    _say(f"{received * 8e-6 / (ended_s - began_s):.6g}")


def _receive(link: socket.socket, buffer: bytearray, until_s: float) -> tuple[int, float]:
    """Bytes received, and when the last of them came: the first time at or after `until_s`."""
    received = 0
    while True:
        received += link.recv_into(buffer)
        if (now_s := time.perf_counter()) >= until_s:
            return received, now_s


def source(host: str, port: int) -> None:
    """Send as fast as the link takes it, until the other end has seen enough."""
    chunk = bytes(CHUNK_BYTES)
    with socket.create_connection((host, port), timeout=PATIENCE_S) as link:
        try:
            while True:
                link.sendall(chunk)
        except (ConnectionResetError, BrokenPipeError):
            return


def spin(seconds: float) -> None:
    """Take all the CPU there is to get."""
    began_s, used_s = time.perf_counter(), time.process_time()
    while (passed_s := time.perf_counter() - began_s) < seconds:
        pass
    _say(f"{(time.process_time() - used_s) / passed_s:.6g}")


def main() -> None:
    """Play the part that the command line names."""
    part, *arguments = sys.argv[1:]
    if part == "sink":
        sink(arguments[0], int(arguments[1]), float(arguments[2]))
    elif part == "source":
        source(arguments[0], int(arguments[1]))
    else:
        spin(float(arguments[0]))


if __name__ == "__main__":
    main()
