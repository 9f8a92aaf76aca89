"""What threads freed goes back to the system, on glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading
from pathlib import Path
from anabranch.coordinator.memory import give_back

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

if sys.argv[1] == "yes":
    assert give_back()
# A freed buffer of 24 MiB teaches malloc to take as large ones from its heaps.
bytearray(24 << 20)
before = resident()

def work(held):
    parts = [bytearray(b"x") * (2 << 20) for _ in range(10)]
    # What is small and still in use keeps a heap from shrinking.
    held.append([bytes(1000 + number) for number in range(50)])
    del parts

held = []
for _ in range(3):
    threads = [threading.Thread(target=work, args=(held,)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_large_buffers_go_back() -> None:
    kept = {}
    for given in ("no", "yes"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, given], check=True, capture_output=True, text=True
        )
        kept[given] = float(done.stdout)
    assert kept["yes"] < 8
    assert kept["no"] > 16
