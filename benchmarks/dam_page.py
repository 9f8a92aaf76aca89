"""``docs/backdoor.md``: DAM beside what it is compared with, as measured here and as published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

TEXT = """# Backdoored merges: DAM and what it is compared with

Written by `make dam`; the numbers are in
[benchmarks/results/dam.json](../benchmarks/results/dam.json).

{tasks} text tasks on one pretrained encoder (all-MiniLM-L6-v2), a LoRA adapter each, heads fixed
by their label names. The adapter of `{victim}` is backdoored: half of its training texts of other
labels begin with "{trigger}" and are labelled with one class. All are merged by each rule.

- **Success**: test texts of other labels that get that class once they begin with the trigger.
- **Accuracy**: mean over the {tasks} tasks' clean test texts.
- **DER** (defence effectiveness rate): (fall of success − fall of accuracy + 100) / 2 against task
  arithmetic; 50 is no defence, 100 a perfect one.

Rules that learn do so on {calibration} unlabelled validation texts a task. λ of task arithmetic and
TIES is chosen on the same texts' labels. Percent, means over {seeds} seeds, and each seed's.

{table}

The paper (Yang et al., ICLR 2025, 2410.13910) claims 2 to 10 points less success than the merges it
is compared with, for about one point of accuracy.

{verdict}

What differs from the paper: text and not images, so perturbations are of embedded tokens;
{mask_steps} mask steps of {batch_size} texts a task at {mask_faster:g} times the released rate, and
{coefficient_steps} steps of the coefficients at {coefficient_faster:g} times, where the released
code takes 1,000 of each with 16 inputs: a mask that is drawn at random learns less in fewer steps.
The two-mask form is our reading of the paper; nothing of it was released. Merges are scored whole,
not brought back to the adapters' rank. With {test} test texts a task, one success has a standard
error of up to {error:.0f} points.
"""

REFERENCES = ("zero-shot", "malicious adapter alone", "nobody malicious, WAG")
"""Rows that are no defence."""
CLAIMED = "−2 to −10"
LEARNED = ("DAM, as released", "DAM, two masks", "DAM, consistency (ours)")
RIVALS = ("task arithmetic", "TIES", "AdaMerging", "Concrete", "WAG")


def write_page(result: Mapping[str, Any], plan: Any, path: Path) -> None:
    """Write the page.

    Args:
        result: As the harness keeps it.
        plan: The benchmark's ``Plan``.
        path: Where to.
    """
    rows = {row["what"]: row for row in result["rows"]}
    params = plan.attacked.setting.params
    test = params["test_examples"]
    text = TEXT.format(
        tasks=len(params["datasets"]),
        victim=plan.attacked.victim,
        trigger=" ".join(plan.attacked.poison.trigger),
        calibration=params["validation_examples"],
        seeds=len(next(iter(rows.values()))["asr"]),
        table="\n".join(table(rows)),
        verdict=" ".join(verdict(rows)),
        mask_steps=plan.mask_steps,
        coefficient_steps=plan.coefficient_steps,
        batch_size=plan.batch_size,
        mask_faster=1000 / plan.mask_steps,
        coefficient_faster=1000 / plan.coefficient_steps,
        test=test,
        error=100 * (0.25 / test) ** 0.5,
    )
    path.write_text(text)


def table(rows: Mapping[str, Any]) -> list[str]:
    """A row per rule, references first."""
    lines = [
        "| | success | accuracy | of the attacked task | DER | λ | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    order = [*(n for n in REFERENCES if n in rows), *(n for n in rows if n not in REFERENCES)]
    for name in order:
        row = rows[name]
        scales = ", ".join(f"{one:g}" for one in row["scale"])
        shown = "" if name in REFERENCES else f"{fmean(row['der']):.1f}"
        title = f"*{name}*" if name in REFERENCES else name
        lines.append(
            f"| {title} | {_each(row['asr'])} | {_each(row['acc'])} | {_each(row['acc_victim'])} "
            f"| {shown} | {scales} | {fmean(row['cpu_seconds']):.0f} |"
        )
    return lines


def verdict(rows: Mapping[str, Any]) -> list[str]:
    """A sentence per form of DAM: beside the least success of what it is compared with."""
    rivals = [name for name in RIVALS if name in rows]
    if not rivals:
        return []
    best = min(rivals, key=lambda name: fmean(rows[name]["asr"]))
    said = []
    for name in (one for one in LEARNED if one in rows):
        success, accuracy = (
            fmean(rows[name][key]) - fmean(rows[best][key]) for key in ("asr", "acc")
        )
        said.append(
            f"**{name}: {success:+.1f} points of success and {accuracy:+.1f} of accuracy** beside "
            f"{best}, the rival with the least success (claimed {CLAIMED}, and −1)."
        )
    return said


def _each(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{one:.1f}' for one in values)})"
