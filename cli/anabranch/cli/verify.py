"""``anabranch verify`` and ``anabranch receipts``: what became of a federation's rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.output import human_bytes, print_json, stdout

if TYPE_CHECKING:
    from anabranch.coordinator.federation import FederationConfig
    from anabranch.coordinator.store import Store
    from anabranch.coordinator.verification import Verdict

FALSE, UNDECIDED = 1, 3
"""Exit codes of ``anabranch verify``."""
MARKS = {"ok": "[green]ok    [/]", "failed": "[bold red]failed[/]", "open": "[yellow]open  [/]"}

receipts_app = typer.Typer(
    name="receipts", help="Show what became of a federation's rounds.", no_args_is_help=True
)

Federation = Annotated[
    Path, typer.Argument(metavar="FEDERATION", help="The federation's folder, at the coordinator.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@receipts_app.callback()
def _root() -> None:
    """Show what became of a federation's rounds."""


@receipts_app.command("list")
def list_command(federation: Federation, as_json: Json = False) -> None:
    """List the receipts, oldest first."""
    from anabranch.wire.receipt import decode_receipt, receipt_hash

    with opened(federation) as (_, store):
        found = [(receipt_hash(data), decode_receipt(data, None)) for data in store.receipts()]
    rows: list[dict[str, Any]] = [
        {
            "round": receipt.round,
            "kind": receipt.kind,
            "time_s": receipt.time_s,
            "inputs": len(receipt.inputs),
            "exclusions": len(receipt.exclusions),
            "adapter_hash": receipt.output.adapter_hash if receipt.output else None,
            "signer": receipt.signer,
            "hash": name,
        }
        for name, receipt in found
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        adapter = f"adapter {row['adapter_hash'][:12]}" if row["adapter_hash"] else "no adapter"
        stdout.print(
            f"{row['round']:>5}  {row['kind']:<10}  {row['inputs']:>4} in  "
            f"{row['exclusions']:>4} out  {adapter:<20}  receipt {row['hash'][:12]}",
            soft_wrap=True, markup=False,
        )  # fmt: skip


@receipts_app.command("show")
def show_command(
    federation: Federation,
    receipt: Annotated[str, typer.Argument(help="Its round, its hash's beginning, or last.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write its bytes to a file instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a receipt, or write it to a file for anabranch verify."""
    from anabranch.wire.receipt import decode_receipt, receipt_hash

    with opened(federation) as (_, store):
        data = chosen(store, receipt)
    if out is not None:
        with out.open("xb") as file:
            file.write(data)
        return
    if as_json:
        print_json(json.loads(data))
        return
    read = decode_receipt(data, None)
    facts = read.model_dump(mode="json", exclude={"inputs", "exclusions", "output", "restored"})
    facts = {"hash": receipt_hash(data), **facts, **{f"output {k}": v for k, v in _output(read)}}
    for key, value in facts.items():
        if value not in (None, "", [], {}):
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            stdout.print(f"{key.replace('_', ' '):>22}  {text}", soft_wrap=True, markup=False)
    for one in read.inputs:
        weight = "" if one.weight is None else f"  weight {one.weight:.4g}"
        stdout.print(
            f"{'in':>22}  {one.client}  {human_bytes(one.size_bytes)}{weight}  {one.artifact}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    for left in read.exclusions:
        stdout.print(
            f"{'out':>22}  {left.client}  {left.code}: {left.reason}",
            soft_wrap=True, markup=False,
        )  # fmt: skip


def verify_command(
    receipt: Annotated[
        str,
        typer.Argument(help="A receipt's file; or, in the store, its round, hash, last or all."),
    ],
    store: Annotated[
        Path, typer.Option(metavar="FEDERATION", help="The federation's folder, or a restored one.")
    ],
    key: Annotated[
        Path | None,
        typer.Option(metavar="PUB", help="The coordinator's .pub file; the folder's by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a receipt is true: its signature, its chain, every input, and the merge itself.

    The merge is done again from the updates as they came, and must give the published adapter bit
    by bit, on the software and the kind of machine that the receipt names. Exit codes: 0 it is
    true, 1 it is not, 2 it is no receipt, 3 something that would decide it is missing.
    """
    from anabranch.coordinator.federation import START_FOLDER
    from anabranch.coordinator.registry import client_keys
    from anabranch.coordinator.verification import Verifier, worst
    from anabranch.vectors.peft_folder import read_adapter
    from anabranch.wire.signing import KeyRing

    with opened(store) as (config, kept):
        blobs = _blobs(kept, receipt)
        clients = KeyRing(client_keys(store).enrolled) if config.signed else None
        verifier = Verifier(
            kept, config, read_adapter(store / START_FOLDER), _ring(store, key), clients
        )
        verdicts = [verifier.verify(data) for data in blobs]
    if as_json:
        print_json([_told(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            _say(verdict)
    code = {"true": 0, "false": FALSE, "undecided": UNDECIDED}[worst(verdicts)]
    raise typer.Exit(code)


@contextmanager
def opened(federation: Path) -> Iterator[tuple[FederationConfig, Store]]:
    """A federation's configuration and its store."""
    from anabranch.coordinator.federation import load_federation
    from anabranch.coordinator.store import open_store

    config = load_federation(federation)
    store = open_store(
        config.store, federation, federation=config.name, run=config.run, durable=config.durable
    )
    with closing(store):
        yield config, store


def chosen(store: Store, which: str) -> bytes:
    """A receipt of the store: by round (its newest), by the beginning of its hash, or ``last``.

    Raises:
        ValueError: There is none, or more than one.
    """
    from anabranch.wire.receipt import decode_receipt, receipt_hash

    chain = store.receipts()
    if which == "last" and chain:
        return chain[-1]
    if which.isdecimal() and len(which) < 7:
        found = [data for data in chain if decode_receipt(data, None).round == int(which)][-1:]
    else:
        found = [data for data in chain if receipt_hash(data).startswith(which.lower())]
    if len(found) != 1:
        many = "no" if not found else "more than one"
        raise ValueError(f"{which[:80]}: {many} receipt of the store; `anabranch receipts list`")
    return found[0]


def _blobs(store: Store, which: str) -> list[bytes]:
    from anabranch.wire.receipt import LIMIT_BYTES

    if Path(which).is_file():
        with Path(which).open("rb") as file:
            # One byte more tells that it is too large, whatever it is.
            return [file.read(LIMIT_BYTES + 1)]
    if which == "all":
        return store.receipts()
    return [chosen(store, which)]


def _ring(federation: Path, named: Path | None) -> Any:
    """The coordinator's public key: the file named, else what the folder holds of it."""
    from anabranch.coordinator.registry import COORDINATOR, KEYS_FOLDER, coordinator_key
    from anabranch.wire.keys import by_id, read_public
    from anabranch.wire.signing import KeyRing

    public = named or federation / KEYS_FOLDER / f"{COORDINATOR}.pub"
    if named is not None or public.exists():
        return KeyRing(by_id(read_public(public)))
    if public.with_suffix(".key").exists():
        return KeyRing(by_id([coordinator_key(federation).public]))
    return None


def _output(receipt: Any) -> list[tuple[str, Any]]:
    return list(receipt.output.model_dump().items()) if receipt.output else []


def _told(verdict: Verdict) -> dict[str, Any]:
    return {
        "receipt": verdict.hash,
        "round": verdict.receipt.round,
        "kind": verdict.receipt.kind,
        "outcome": verdict.outcome,
        "checks": [vars(check) for check in verdict.checks],
    }


def _say(verdict: Verdict) -> None:
    from rich.markup import escape

    for check in verdict.checks:
        about = f"{check.what} {check.about}".strip()
        stdout.print(
            f"{MARKS[check.status]}  {escape(about)}: {escape(check.text)}", soft_wrap=True
        )
    words = {"true": "is true", "false": "is NOT true", "undecided": "cannot be decided"}
    receipt = verdict.receipt
    stdout.print(
        f"{verdict.hash[:12]}  {receipt.kind} of round {receipt.round} {words[verdict.outcome]}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
