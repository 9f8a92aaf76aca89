"""What threads freed is used again by others, or given back, on glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading
from pathlib import Path
from anabranch.coordinator.memory import few_heaps

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

if sys.argv[1] == "yes":
    assert few_heaps()
# A freed buffer of 24 MiB teaches malloc to take as large ones from its heaps.
bytearray(24 << 20)
before = resident()

turn, over = threading.Lock(), threading.Barrier(9)

def work(held):
    held.append(bytes(1000))
    with turn:
        parts = [bytearray(b"x") * (2 << 20) for _ in range(10)]
        # What is small and still in use keeps a heap from shrinking.
        held.append([bytes(1000 + number) for number in range(50)])
        del parts
    over.wait()

held = []
threads = [threading.Thread(target=work, args=(held,)) for _ in range(8)]
[thread.start() for thread in threads]
over.wait()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_threads_use_what_others_freed() -> None:
    kept = {}
    for given in ("no", "yes"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, given], check=True, capture_output=True, text=True
        )
        kept[given] = float(done.stdout)
    assert kept["yes"] < kept["no"] / 2


GIVEN_BACK = """
import sys, threading, time
from anabranch.coordinator.memory import GivingBack, few_heaps, resident_bytes

assert few_heaps()
giving = GivingBack(grown_bytes=8 << 20, look_s=0.05)
if sys.argv[1] == "yes":
    giving.start()

def work(held):
    # Too small for pages of their own; what is kept between them keeps the heap from shrinking.
    buffers = []
    for _ in range(640):
        buffers.append(bytearray(b"x") * 100_000)
        held.append(bytes(1000))

held = []
before = resident_bytes()
thread = threading.Thread(target=work, args=(held,))
thread.start()
thread.join()
grown = lambda: (resident_bytes() - before) >> 20
end = time.monotonic() + (20 if sys.argv[1] == "yes" else 0.5)
while grown() > 16 and time.monotonic() < end:
    time.sleep(0.05)
print(grown())
giving.stop()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own call")
def test_what_nobody_uses_is_given_back() -> None:
    kept = {}
    for given in ("no", "yes"):
        done = subprocess.run(
            [sys.executable, "-c", GIVEN_BACK, given], check=True, capture_output=True, text=True
        )
        kept[given] = int(done.stdout)
    assert kept["no"] > 40
    assert kept["yes"] <= 16
