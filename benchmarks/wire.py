"""The wire: how small, how fast, and beside others' codes at equal squared error.

Speeds are of one thread. Real updates are what one client of the demo learns in its first round,
at the demo's rank 8 on query and value, and at rank 16 on every linear layer. Our messages are
counted whole, with manifest and signature; the others' by their payload alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    RecordDict,
)
from torch import Tensor

from anabranch.client.lora import read_adapter, write_adapter
from anabranch.client.session import open_session
from anabranch.client.task import TrainPlan
from anabranch.coordinator.admission import examine
from anabranch.coordinator.registry import enrol
from anabranch.coordinator.start import Start
from anabranch.coordinator.trust import Planned, Trust
from anabranch.simulation.engine.identity import server_identity
from anabranch.vectors import Adapter, LoraFactors, seeded_start
from anabranch.vectors.sparse import SparseTernary, ternarise
from anabranch.wire import CodecConfig, UpdateMeta, encode_update, read_manifest
from anabranch.wire.codecs.codec import Form
from anabranch.wire.codecs.registry import packing_numbered
from anabranch.wire.codecs.ternary import TERNARY
from anabranch.wire.codecs.ternary_runs import TernaryRuns
from anabranch.wire.keys import seeded_key
from anabranch.wire.plan import UPDATE_STYPE, RoundPlan
from benchmarks import wire_rivals as rivals
from benchmarks.harness import Row, main

ENTRIES, QUICK_ENTRIES = 10_000_000, 1_000_000
RATIOS = {0.05: 47.0, 0.1: 27.8, 0.2: 17.1}
"""The least ratio to fp16 at each density."""
SPEEDS = {"encode_mentries_s": 400, "decode_mentries_s": 1500, "select_and_encode_mentries_s": 150}
"""The least millions of entries a second at 10%."""

TASK = "anabranch.simulation.partitioned_text:PartitionedText"
ALL_LINEAR = ("query", "key", "value", "dense")
UPDATES: dict[str, tuple[dict[str, Any], float]] = {
    "demo, r8 on query and value": ({}, 24.0),
    "r16 on all linear layers": ({"rank": 16, "target_modules": ALL_LINEAR}, 27.0),
}
"""Parameters of the task, and the least ratio to fp16 at 10%."""

DENSITY = 0.1
KEY = seeded_key("client", 0)
ADMIT_BYTES, ADMIT_MS = 2_000_000, 15.0


def meta_of(**changes: Any) -> UpdateMeta:
    """Whose update it is, as long as in a federation."""
    given = {
        "kind": "update", "base_hash": "ab" * 32, "start_hash": "cd" * 32, "federation": "clinics",
        "run": "quickstart-1", "round": 1, "client": "client", "nonce": bytes(range(16)), "seed": 1,
        "examples": 80, "issued_s": int(time.time()),
    }  # fmt: skip
    return UpdateMeta(**{**given, **changes})


def seconds(work: Callable[[], object], runs: int = 15) -> float:
    """Median wall seconds of a call, after one that is not counted."""
    work()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def placed(forms: Sequence[Form]) -> list[SparseTernary]:
    """Positions and signs of frames that hold runs."""
    return [form.sparse() for form in forms if isinstance(form, TernaryRuns)]


def speeds(entries: int) -> Iterator[Row]:
    """Sparse ternary of independent normal entries."""
    x = torch.randn(entries, generator=torch.Generator().manual_seed(0))
    for density, least in RATIOS.items():
        yield from speed(x, density, least)


def speed(x: Tensor, density: float, least: float) -> Iterator[Row]:
    """One density: the ratio, and at ``DENSITY`` each speed by itself."""
    millions = x.numel() / 1e6
    scenario = f"{millions:.0f}M normal entries, one thread"
    form = ternarise(x, density)
    blob = encode_update({"x": x}, meta_of(), CodecConfig(density=density), KEY).blob
    manifest = read_manifest(blob)
    (frame,) = manifest.frames
    payload = memoryview(blob)[manifest.payload_start :]
    _, packing = packing_numbered(frame.codec)
    found = {
        "density": density,
        "ratio": 2e6 * millions / frame.payload_bytes,
        "encode_mentries_s": millions / seconds(lambda: TERNARY.pack([form])),
        # To positions and signs; what the coordinator admits is checked and stays run bytes.
        "decode_mentries_s": millions
        / seconds(lambda: placed(packing.unpack(payload, frame, len))),
        "check_mentries_s": millions / seconds(lambda: packing.unpack(payload, frame, len)),
        "select_and_encode_mentries_s": millions
        / seconds(lambda: TERNARY.pack([ternarise(x, density)])),
    }
    yield Row(
        f"ternary {density:.0%}", found["ratio"], None, "", scenario,
        "times smaller than fp16, payload", detail=found, least={"ours": least},
    )  # fmt: skip
    if density == DENSITY:
        for what, bar in SPEEDS.items():
            yield Row(what, found[what], None, "", scenario, "Mentries/s", least={"ours": bar})


def real_update(params: Mapping[str, Any], quick: bool) -> dict[str, Tensor]:
    """What a client of the demo learns in its first round: A - A0 and B, by name."""
    session = open_session(TASK, json.dumps({"train_examples": 700, "max_length": 32, **params}))
    start = seeded_start(session.template, 1)
    plan = TrainPlan(steps=1 if quick else 5, batch_size=16, learning_rate=6e-3, seed=1)
    write_adapter(session.model, start)
    session.task.train(session.model, 0, plan)
    end = read_adapter(session.model, session.base_hash).tensors()
    return {name: tensor - start.tensors()[name] for name, tensor in end.items()}


def message(tensors: Mapping[str, Tensor], codec: CodecConfig) -> tuple[int, float]:
    """Bytes of our whole signed message, and the squared error."""
    encoded = encode_update(tensors, meta_of(), codec, KEY)
    lost = (tensor.double() - encoded.sent[name].double() for name, tensor in tensors.items())
    return len(encoded.blob), sum(float(part.square().sum()) for part in lost)


def smallest(tensors: Mapping[str, Tensor], error: float) -> tuple[int, str]:
    """Our smallest message whose squared error is not above this one, and its codec."""
    tried = [CodecConfig(name="rotated", bits=bits) for bits in range(1, 9)]
    tried += [CodecConfig(name="dense", dtype=dtype) for dtype in ("int8", "fp16", "fp32")]
    found = {}
    for codec in tried:
        size, lost = message(tensors, codec)
        if lost <= error:
            found[f"{codec.name} {codec.bits if codec.name == 'rotated' else codec.dtype}"] = size
    entries = sum(tensor.numel() for tensor in tensors.values())
    norm = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    if 1e-10 < error / norm < 0.1:
        # An even step loses a twelfth of its square: its own loss is that, or a little more.
        for loss in (0.9 * error / norm, error / norm, 0.997 * error / norm):
            size, lost = message(tensors, CodecConfig(name="axes", loss=loss))
            if lost <= error:
                found["axes"] = min(size, found.get("axes", size))
    for name in ("ternary", "two-bit"):
        low, high = 0.0, 0.4 * entries
        best = None
        for _ in range(12):
            middle = (low + high) / 2
            try:
                codec = CodecConfig.model_validate({"name": name, "budget": f"{int(middle)} B"})
                size, lost = message(tensors, codec)
            except ValueError:
                low = middle
                continue
            if lost <= error:
                high, best = middle, size
            else:
                low = middle
        if best is not None:
            found[f"{name}, densities chosen"] = best
    codec_name = min(found, key=lambda one: found[one])
    return found[codec_name], codec_name


def real(quick: bool) -> Iterator[Row]:
    """Real updates: their size, and others' at equal squared error."""
    for scenario, (params, least) in UPDATES.items():
        tensors = real_update(params, quick)
        entries = sum(tensor.numel() for tensor in tensors.values())
        size, error = message(tensors, CodecConfig(density=DENSITY))
        yield Row(
            "ternary 10%", 2 * entries / size, None, "", scenario,
            "times smaller than fp16, whole message", least={"ours": least},
            detail={"entries": entries, "bytes": size},
        )  # fmt: skip
        parts = [tensor.reshape(-1).numpy() for tensor in tensors.values()]
        x_n = np.concatenate(parts)
        mine = min((size, "ternary 10%"), smallest(tensors, error))
        sparse = {
            "ComPEFT, Golomb": rivals.at_error(partial(rivals.compeft, x_n), error),
            "FLASC, fp16 top-k": rivals.at_error(partial(rivals.flasc, x_n), error),
        }
        for rival, (theirs, _) in sparse.items():
            yield Row(
                "bytes at 10%'s error", mine[0], theirs, rival, scenario, mine[1],
                most={"ratio": 1.0},
            )  # fmt: skip
        for rival, (theirs, lost) in {
            "int8": rivals.int8(parts),
            "zstd of fp16": rivals.zstd_fp16(x_n),
        }.items():
            ours, codec = smallest(tensors, lost)
            yield Row(
                "bytes at its error", ours, theirs, rival, scenario, codec, most={"ratio": 1.0}
            )


def admission(quick: bool) -> Iterator[Row]:
    """Verify, decode and admit a signed update of 2 MB, to what the merge takes it from."""
    codecs = {
        "fp32": (CodecConfig(name="dense"), 3.4),
        "int8": (CodecConfig(name="dense", dtype="int8"), 0.98),
        "ternary 10%": (CodecConfig(density=DENSITY), 0.0719),
    }
    for name, (codec, bytes_an_entry) in codecs.items():
        entries = ADMIT_BYTES / bytes_an_entry / (10 if quick else 1)
        yield admit(name, codec, entries)


def admit(name: str, codec: CodecConfig, entries: float) -> Row:
    """An update of modules of rank 16 on 4096 x 4096, as a model of seven billion has them."""
    generator = torch.Generator().manual_seed(1)
    modules = max(1, round(entries / (2 * 16 * 4096)))
    a_rn, b_mr = (torch.randn(shape, generator=generator) for shape in ((16, 4096), (4096, 16)))
    factors = LoraFactors(a_rn, b_mr, 16.0)
    start = Adapter({f"layers.{n}": factors for n in range(modules)}, base_hash="ab" * 32)
    meta = meta_of()
    plan = RoundPlan(
        federation=meta.federation, run=meta.run, round=1, base_hash=meta.base_hash,
        start_hash=meta.start_hash, seed=1, codec=codec,
    )  # fmt: skip
    changes = {
        key: 1e-3 * torch.randn(part.shape, generator=generator)
        for key, part in start.tensors().items()
    }
    blob = encode_update(changes, meta, codec, KEY).blob
    record = ArrayRecord({"update": Array("uint8", (len(blob),), UPDATE_STYPE, blob)})
    content = RecordDict({"update": record, "client": ConfigRecord({"client": "client"})})
    with server_identity():
        reply = Message(content, reply_to=Message(RecordDict(), 7, MessageType.TRAIN))
    handed = Start(plan, start, {}, None)
    with tempfile.TemporaryDirectory() as folder:
        enrol(Path(folder), [KEY.public])
        planned = Planned(meta.issued_s, time.time() - time.monotonic())
        trust = Trust(Path(folder), KEY, 300.0, rounds={1: (planned, None)})
        took = seconds(lambda: examine(reply, handed, "client", 1e9, trust))
    return Row(
        "verify, decode, admit", 1e3 * took, None, "", f"{len(blob) / 1e6:.1f} MB, {name}", "ms",
        detail={"entries": sum(part.numel() for part in changes.values())},
        most={"ours": ADMIT_MS},
    )  # fmt: skip


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """All rows."""
    torch.set_num_threads(1)
    yield from speeds(QUICK_ENTRIES if quick else ENTRIES)
    yield from admission(quick)
    torch.set_num_threads(2)
    yield from real(quick)


if __name__ == "__main__":
    main("wire", measure)
