"""The model card of a published adapter, from its receipt: ``README.md`` as the Hub reads it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import yaml

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import Publication
from anabranch.vectors import Adapter
from anabranch.wire.receipt import Receipt, decode_receipt, receipt_hash

_CARD = """\
---
{front}---

# {title}

{lead}

| | |
|---|---|
{facts}

{scores}## How it was merged

```json
{recipe}
```

## Loading it

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

## Where it comes from

{origin}
"""


def model_card(
    adapter: Adapter, config: FederationConfig, row: Publication, receipt: bytes | None
) -> str:
    """A card in Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        adapter: What it is about.
        config: The federation: of its recipe where there is no receipt.
        row: The publication.
        receipt: Its receipt's bytes; None where it has none.
    """
    read = None if receipt is None else decode_receipt(receipt, None)
    base = adapter.peft.get("base_model_name_or_path")
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "merge", "anabranch"]}
    if base:
        front["base_model"] = base
    recipe = config.recipe.model_dump(mode="json") if read is None else dict(read.recipe)
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=True, allow_unicode=True),
        title=f"{_text(config.name)}, round {row.round}",
        lead=_lead(read),
        facts="\n".join(f"| {key} | {_text(value)} |" for key, value in _facts(row, adapter, read)),
        scores=_scores(read),
        recipe=json.dumps(recipe or config.recipe.model_dump(mode="json"), indent=2),
        origin=_origin(read, receipt),
    )


def _lead(read: Receipt | None) -> str:
    if read is None:
        return "A LoRA adapter merged from the updates of a federation's clients."
    if read.restored is not None:
        return (
            f"A LoRA adapter that round {read.restored.round} of the federation made, put in "
            "service again by a rollback."
        )
    if read.kind == "withdrawal":
        return (
            f"A LoRA adapter merged from the updates of {len(read.inputs)} clients, all merges up "
            f"to round {read.redone} done again without {len(read.without)} who withdrew. "
            f"{read.reason}"
        )
    left = f"; {len(read.exclusions)} others were left out" if read.exclusions else ""
    return (
        f"A LoRA adapter merged from the updates of {_merged(read)} clients{left}. Their data "
        "never left them."
    )


def _merged(read: Receipt) -> int:
    """Clients that are in the merge; one that was suspected is an input and left out."""
    gone = [one.client for one in read.exclusions]
    return sum(one.client not in gone for one in read.inputs)


def _facts(row: Publication, adapter: Adapter, read: Receipt | None) -> list[tuple[str, object]]:
    base = adapter.peft.get("base_model_name_or_path")
    facts: list[tuple[str, object]] = [
        ("base", base or "not named"),
        ("base hash", f"`{adapter.base_hash}`"),
        ("adapter hash", f"`{row.adapter_hash}`"),
        ("modules", len(adapter.lora)),
        ("rank", max((factors.rank for factors in adapter.lora.values()), default=0)),
    ]
    if read is not None:
        when = datetime.fromtimestamp(read.time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        facts += [
            ("federation, run", f"{read.federation}, {read.run}"),
            ("clients merged", _merged(read)),
            ("clients left out", len(read.exclusions)),
            ("method", read.recipe.get("method", "rollback")),
            ("published", when),
            ("made by", read.software),
        ]
        if read.release:
            facts.append(("differential privacy", _privacy(read)))
    return facts


def _privacy(read: Receipt) -> str:
    """What is promised of the adapters up to this one; a seed's noise can be taken off again."""
    budget = read.settings.get("privacy")
    if read.release.get("seeded") or not isinstance(budget, dict):
        return "none: the noise came from a seed"
    return (
        f"within ε {budget.get('epsilon')} at δ {budget.get('delta')} over this run's adapters up "
        "to this one, for one client's updates against zeros in their place"
    )


def _scores(read: Receipt | None) -> str:
    """What is known in numbers: of the start, as the clients scored it, and of the merge."""
    if read is None or not read.scores:
        return ""
    words = {
        "cohort": "clients' training, mean",
        "gate": "validation at the gate",
        "start": "the adapter before it, mean",
    }
    lines = ["## What is known of it", "", "| | |", "|---|---|"]
    for name, value in sorted(read.scores.items()):
        of, _, what = name.rpartition(".")
        about = f"{what} ({words[of]})" if of in words else what
        lines.append(f"| {_text(about)} | {'none' if value is None else f'{value:.4g}'} |")
    return "\n".join(lines) + "\n\n"


def _origin(read: Receipt | None, receipt: bytes | None) -> str:
    if read is None or receipt is None:
        return "It was published without a receipt."
    signed = f"signed by key `{read.signer}`" if read.signer else "not signed"
    previous = f" It follows receipt `{read.previous}`." if read.previous else ""
    return (
        f"Receipt `{receipt_hash(receipt)}` ({signed}) is beside this file, as `receipt.json`."
        f"{previous} `anabranch verify receipt.json --store FEDERATION` merges again and compares "
        "every bit."
    )


def _text(value: object) -> str:
    """A value that cannot break out of a table's cell."""
    return " ".join(str(value).replace("|", "\\|").split())
