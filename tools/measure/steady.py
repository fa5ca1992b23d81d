"""A guest that writes 4 KiB at a fixed rate, in a process of its own, and what it says of the latencies.

    start, first write, "wrote" | a line on its standard input: go on | JSON of the percentiles

A write that is late because the one before took long counts from when it was due: a server that stands still for a second makes
all the writes of that second late, not one.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import nbd

from tools.kit.processes import FailedError

BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Steadiness:
    """Latencies in us."""

    p50: float
    p99: float
    p999: float
    longest: float


class Guest:
    """The process. It writes from `go` on."""

    def __init__(self, uri: str, *, size: int, rate: int, seconds: float) -> None:
        command = [sys.executable, "-m", "tools.measure.steady", uri, str(size), str(rate), str(seconds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "wrote":
            raise FailedError("the guest's first write failed")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        """The measured part begins."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        """Has it written all?"""
        return self.process.poll() is not None

    def found(self) -> Steadiness:
        """What it says at its end."""
        text = self._line()
        self.process.wait()
        if not text:
            raise FailedError("the guest ended without its figures")
        return Steadiness(**json.loads(text))

    def kill(self) -> None:
        """It ends now, if it has not ended."""
        self.process.kill()
        self.process.communicate()


def late(
    handle: nbd.NBD, *, blocks: int, rate: int, seconds: float, clock: Callable[[], float]
) -> list[float]:
    """Seconds that each write took, or was late."""
    chance, found = random.Random(1), []
    data = chance.randbytes(BLOCK)
    began = clock()
    for number in range(int(rate * seconds)):
        due = began + number / rate
        started = clock()
        if started < due:
            time.sleep(due - started)
            started = due = clock()
        handle.pwrite(data, chance.randrange(blocks) * BLOCK)
        found.append(clock() - due)
    return found


def main() -> None:
    """Entry point of `python -m tools.measure.steady URI SIZE RATE SECONDS`."""
    uri, size, rate, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(bytes(BLOCK), 0)
    print("wrote", flush=True)
    sys.stdin.readline()
    took = sorted(late(handle, blocks=size // BLOCK, rate=rate, seconds=seconds, clock=time.perf_counter))
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    values = {name: took[int(len(took) * share)] * 1e6 for name, share in shares.items()}
    print(json.dumps({**values, "longest": took[-1] * 1e6}), flush=True)
    handle.shutdown()


if __name__ == "__main__":
    main()
