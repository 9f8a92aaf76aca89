"""The quality benchmark's page: ``docs/quality.md``, out of its result and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.quality_grid import SIZES, SKIPPED, UNSCALED, params_tried

PUBLISHED: Mapping[str, tuple[str, str]] = {
    "task_arithmetic": ("63.7", "70.8"),
    "ties": ("63.7", "75.1"),
    "knots_ties": ("68.0", ""),
    "consensus": ("", "75.0"),
    "tsv_m": ("", "85.9"),
    "iso_c": ("73.6", "86.3"),
    "iso_cts": ("73.7", "86.2"),
}
"""What papers report for CLIP ViT-B/32 on 8 vision tasks: LoRA r16, normalised accuracy in percent;
and full fine-tuning, absolute. Other model, other tasks: the order is what compares."""

ORDER = (
    (UNSCALED, "task_arithmetic"),
    ("task_arithmetic", "ties"),
    ("ties", "knots_ties"),
    ("ties", "tsv_m"),
    ("knots_ties", "iso_c"),
    ("tsv_m", "iso_c"),
    ("iso_c", "iso_cts"),
)
"""Worse, better: in the papers, in one setting or the other."""

REFERENCES = ("individual", "zero-shot")

COLUMNS = (
    "method",
    "normalised accuracy",
    "below the best",
    "size",
    "λ",
    "parameters",
    "papers, LoRA",
    "papers, full",
)

TEXT = """# Does merging pay?

Written by `make quality` (`python -m benchmarks.quality`) out of `benchmarks/results/quality.json`;
do not edit. What is measured, and how, stands in `benchmarks/quality.py`.

{tasks} text tasks, one LoRA adapter each (rank 16, all linear layers), trained apart from one base
(all-MiniLM-L6-v2) and merged into one model, as whole ΔW. Heads are fixed, made of the label names.
Normalised accuracy, in percent: the merged model's test accuracy over that of the task's own
adapter, averaged over the tasks; mean ± standard error over {seeds} seeds. A seed draws the start,
the order of training, and the texts, those of the test too: the error holds all of these.

λ and parameters were chosen on validation texts alone, from one small grid for all methods: the
merged task vector is brought to {sizes} times the mean norm of those merged
(*size*, by seed, with the λ that gives it), from the smallest on until validation accuracy falls;
then the parameters at the end of this page are tried at that size. Test texts score the choice.

{ranking}

Papers: CLIP ViT-B/32 on 8 vision tasks; LoRA r16 normalised, full fine-tuning absolute. Another
model and other tasks: the order compares, the numbers do not.

## What separates

{separation}

One standard error is a low bar, and few seeds leave the error itself uncertain: build nothing on
differences of less than a point. What we make of all this stands in [LOG.md](LOG.md).

## Beside the order that papers report

{order}

A difference is taken seed by seed, with its standard error; one smaller than that is *not
separated*.

## Accuracy by task

Test accuracy in percent, not normalised; mean over seeds.

{by_task}

## Grid

{grid}

The first is tried at all sizes. All other methods have no parameters to choose. Not scored:

{skipped}
"""


def spread(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None of a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def gap(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float | None]:
    """Mean difference, seed by seed, and its standard error."""
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    return fmean(differences), spread(differences)


def apart(difference: float, error: float | None) -> bool:
    """Whether a difference is larger than its standard error, as far as there is one."""
    return error is not None and difference > error


def percent(value: float, error: float | None = None) -> str:
    """``81.2``, or ``81.2 ± 0.4``."""
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def write_page(result: Mapping[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        result: As the harness keeps it.
        path: Where to.
    """
    path.write_text(_page(result))


def _page(result: Mapping[str, Any]) -> str:
    rows = {row["what"]: row for row in result["rows"]}
    seeds = {name: row["detail"]["seeds"] for name, row in rows.items()}
    methods = sorted((n for n in rows if n not in REFERENCES), key=lambda n: -rows[n]["ours"])
    tasks = list(rows["individual"]["detail"]["accuracy"])
    grid = params_tried(16)
    return TEXT.format(
        tasks=len(tasks),
        seeds=len(seeds[methods[0]]),
        sizes=", ".join(map(str, SIZES)),
        ranking="\n".join(_ranking(rows, seeds, methods)),
        separation=_separation(seeds, methods),
        order="\n".join(_order(seeds)),
        by_task="\n".join(_by_task(rows, methods, tasks)),
        grid="\n".join(
            f"- `{name}`: {' or '.join(map(_shown, tried))}"
            for name, tried in grid.items()
            if tried != ({},)
        ),
        skipped="\n".join(f"- `{name}`: {why}" for name, why in SKIPPED.items()),
    )


def _ranking(
    rows: Mapping[str, Any], seeds: Mapping[str, Sequence[float]], methods: Sequence[str]
) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name in methods:
        detail = rows[name]["detail"]
        chosen = detail["chosen"]
        lora, full = PUBLISHED.get(name, ("", ""))
        below, error = gap(seeds[methods[0]], seeds[name])
        sizes = ", ".join(f"{one['size']:g}" for one in chosen if one["size"] is not None)
        scales = ", ".join(f"{one['scale']:.3g}" for one in chosen)
        params = dict.fromkeys(_shown(one["params"]) for one in chosen if one["params"])
        lines.append(
            f"| {name} | {percent(rows[name]['ours'], detail['standard_error'])} "
            f"| {'' if name == methods[0] else percent(below, error)} | {sizes} | {scales} "
            f"| {'; '.join(params)} | {lora} | {full} |"
        )
    for name in REFERENCES:
        lines.append(f"| *{name}* | {percent(rows[name]['ours'])}{' |' * 7}")
    return lines


def _separation(seeds: Mapping[str, Sequence[float]], methods: Sequence[str]) -> str:
    best = methods[0]
    if len(seeds[best]) < 2:
        return "One seed: without a standard error nothing can be said to separate."
    near = [name for name in methods[1:] if not apart(*gap(seeds[best], seeds[name]))]
    if near:
        return (
            f"The top does not separate: {', '.join(near)} lie within one standard error of {best} "
            "(of the difference, seed by seed). "
            f"The other {len(methods) - 1 - len(near)} methods lie further below."
        )
    return f"{best} is above every other method by more than one standard error."


def _order(seeds: Mapping[str, Sequence[float]]) -> list[str]:
    lines = ["| in papers | here, better less worse | |", "|---|---|---|"]
    for worse, better in ORDER:
        if worse in seeds and better in seeds:
            difference, error = gap(seeds[better], seeds[worse])
            if apart(difference, error):
                verdict = "holds"
            else:
                verdict = (
                    "**the other way round**" if apart(-difference, error) else "not separated"
                )
            lines.append(f"| {worse} < {better} | {percent(difference, error)} | {verdict} |")
    return lines


def _by_task(rows: Mapping[str, Any], methods: Sequence[str], tasks: Sequence[str]) -> list[str]:
    lines = [f"| | {' | '.join(tasks)} | mean |", "|---|" + "---|" * (len(tasks) + 1)]
    for name in (*REFERENCES, *methods):
        accuracy = rows[name]["detail"]["accuracy"]
        cells = [percent(accuracy[task]) for task in tasks]
        lines.append(f"| {name} | {' | '.join(cells)} | {percent(fmean(accuracy.values()))} |")
    return lines


def _shown(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in params.items())
