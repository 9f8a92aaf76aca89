"""PEFT's adapter_config.json: what it says of rank and alpha, and what cannot be merged."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anabranch.vectors.adapter import Adapter

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20

SAID_BY_FACTORS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")

NOT_A_SUM = {
    "use_dora": "DoRA adds a magnitude per row, ΔW is not scaling·B·A; train with use_dora=False",
    "use_qalora": "QA-LoRA pools its inputs; train with use_qalora=False",
    "use_bdlora": "block-diagonal factors are not supported; train a plain LoRA",
    "lora_bias": "biases in LoRA layers are not supported; train with lora_bias=False",
    "target_parameters": "LoRA on bare parameters is not supported; use target_modules",
    "trainable_token_indices": "trained tokens are not supported; train without them",
    "layer_replication": "replicated layers are not supported; train on the base as it is",
    "kasa_config": "KaSA changes the base; train a plain LoRA",
    "monteclora_config": "MonteCLoRA is not supported; train a plain LoRA",
    "arrow_config": "Arrow routes between adapters; give the adapters themselves",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_LARGEST = 1_000_000_000

_COSTLY = re.compile(r"\)[*+{]")
"""A repeated group: on a hostile pattern it may take for ever."""


def read_peft_config(folder: Path) -> dict[str, Any]:
    """A folder's adapter_config.json, if it is that of a plain LoRA.

    Raises:
        ValueError: One line that names the folder, the key and the fix.
    """
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); name a folder that PEFT saved"
        ) from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: is over {MAX_CONFIG_BYTES} bytes; fetch it again")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no table of keys; name a folder that PEFT saved")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder}: peft_type: is {config.get('peft_type')!r}; only LORA adapters can be merged"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder}: bias: is {config['bias']!r}, trained biases are not merged; "
            "train with bias='none' or list their modules in modules_to_save"
        )
    for key, reason in NOT_A_SUM.items():
        if config.get(key):
            raise ValueError(f"{folder}: {key}: {reason}")
    started = config.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{folder}: init_lora_weights: {started!r} changes the base it is trained on; save it "
            "with path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    return config


def matched_value(
    folder: Path, config: Mapping[str, Any], pattern_key: str, default_key: str, module: str
) -> float:
    """A module's value: the first pattern that matches the end of its name (PEFT), or the default.

    Raises:
        ValueError: A value that is no number or out of range, a pattern that is no regular
            expression or costs too much to match.
    """
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{folder}: {pattern_key}: is no table of patterns; save it with PEFT")
    value = config.get(default_key)
    for pattern, special in patterns.items():
        if _COSTLY.search(pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise ValueError(
                f"{folder}: {pattern_key}: {pattern!r} repeats too much to be matched safely; "
                "write out the module names"
            )
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise ValueError(
                f"{folder}: {pattern_key}: {pattern!r} is no regular expression ({error})"
            ) from error
        if found:
            value = special
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise ValueError(
            f"{folder}: {default_key}: is {repr(value)[:20]} for {module}; "
            f"give a number above zero, {_LARGEST} at most"
        )
    return value


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json of an adapter.

    The commonest rank and alpha are the configuration's, others stand in its patterns, anchored
    and escaped so that each names one module.

    Raises:
        ValueError: No module, or rsLoRA in some modules only, which PEFT cannot say.
    """
    if not adapter.lora:
        raise ValueError("the adapter has no modules; there is nothing to write")
    rslora = {factors.rslora for factors in adapter.lora.values()}
    if len(rslora) > 1:
        raise ValueError("rsLoRA must be on for all modules or for none; refactor to one of them")
    ranks = {module: factors.rank for module, factors in adapter.lora.items()}
    alphas = {module: _number(factors.alpha) for module, factors in adapter.lora.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "bias": "none",
        "target_modules": sorted(adapter.lora),
        "inference_mode": True,
        **adapter.peft,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": rslora.pop(),
    }
    if adapter.dense and not config.get("modules_to_save"):
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in adapter.dense})
    return config


def _commonest(values: Iterable[float]) -> float:
    """The value most modules have; of equals, the smallest."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    return {
        "^" + re.escape(module): value
        for module, value in sorted(values.items())
        if value != default
    }


def _number(value: float) -> float:
    """Whole numbers as ``int``, as PEFT writes them."""
    return int(value) if value == int(value) else value
