"""Adapters as PEFT folders: adapter_config.json beside adapter_model.safetensors.

What ``PeftModel.save_pretrained`` writes is read, what is written here
``PeftModel.from_pretrained`` reads. PEFT itself is not needed, and pickle is never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.vectors.adapter import Adapter, LoraFactors
from anabranch.vectors.new_folder import new_folder, write_text
from anabranch.vectors.peft_config import (
    CONFIG_FILE,
    NOT_A_SUM,
    SAID_BY_FACTORS,
    matched_value,
    peft_config,
    read_peft_config,
)
from anabranch.vectors.safetensors_file import read_tensors, write_tensors
from anabranch.vectors.safetensors_header import read_header

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
BASE_HASH_KEY = "anabranch.base_hash"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter saved by PEFT or by ``write_adapter``.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The adapter: factors per module, ``modules_to_save`` as dense parameters by the base's
        names, the base hash if the file states one.

    Raises:
        ValueError: One line that names the folder, the key and the fix: a file missing or broken,
            pickle, another kind of adapter than plain LoRA on linear layers, factors that do not
            fit together or the configuration.
    """
    config = read_peft_config(folder)
    return _adapter(folder, config, *read_tensors(_weights_file(folder)))


def adapter_layout(folder: Path) -> Adapter:
    """What ``read_adapter`` would return, on torch's meta device: everything but the numbers.

    Reads the configuration and the header of the weights, whatever their size.

    Raises:
        ValueError: As ``read_adapter``.
    """
    config = read_peft_config(folder)
    weights = _weights_file(folder)
    stored, metadata = read_header(weights)
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in stored.items()
    }
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{weights}: {name} holds {tensor.dtype}; give floating-point weights")
    return _adapter(folder, config, tensors, metadata)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as a folder PEFT loads. Nothing half-written is ever seen under its name.

    Args:
        adapter: What to write.
        folder: A folder that does not exist yet, or is empty: files of others are never replaced.

    Raises:
        ValueError: The folder holds files, or the adapter cannot be said in PEFT's words.
        OSError: The disk refuses.
    """
    config = peft_config(adapter)
    tensors = {_PREFIX + name: tensor for name, tensor in adapter.dense.items()}
    for module, factors in adapter.lora.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.a_rn
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.b_mr
    metadata = {"format": "pt"}
    if adapter.base_hash is not None:
        metadata[BASE_HASH_KEY] = adapter.base_hash
    with new_folder(folder) as partial:
        write_tensors(partial / WEIGHTS_FILE, tensors, metadata)
        write_text(partial / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _weights_file(folder: Path) -> Path:
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        return weights
    if (folder / PICKLE_FILE).exists():
        raise ValueError(
            f"{folder}: {PICKLE_FILE} is pickle, which runs code when it is opened; "
            "save it again with save_pretrained(..., safe_serialization=True)"
        )
    raise ValueError(f"{folder}: has no {WEIGHTS_FILE}; name a folder that PEFT saved")


def _adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Adapter:
    """Tensors by PEFT's names as an adapter."""
    sides: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(name)
        if name == key:
            raise ValueError(f"{folder}: {key}: does not begin with {_PREFIX}; save it with PEFT")
        if factor is not None:
            if tensor.ndim != 2:
                raise ValueError(
                    f"{folder}: {key}: has shape {tuple(tensor.shape)}; "
                    "only LoRA on linear layers is supported, leave convolutions out"
                )
            sides.setdefault(factor["module"], {})[factor["side"]] = tensor
        elif "lora_" in name or "trainable_tokens" in name:
            raise ValueError(f"{folder}: {key}: {_why_refused(name)}")
        else:
            dense[name] = tensor
    if not sides:
        raise ValueError(f"{folder}: holds no LoRA factors; name a folder that PEFT saved")
    lora = {module: _factors(folder, module, pair, config) for module, pair in sides.items()}
    peft = {key: value for key, value in config.items() if key not in SAID_BY_FACTORS}
    return Adapter(lora, dense, metadata.get(BASE_HASH_KEY), peft)


def _factors(
    folder: Path, module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LoraFactors:
    """One module's factors, once they agree with each other and with the configuration."""
    where = f"{folder}: {_PREFIX}{module}"
    if len(pair) < 2:
        raise ValueError(
            f"{where}: has lora_{'A' if 'A' in pair else 'B'} only; save the adapter again"
        )
    a_rn, b_mr = pair["A"], pair["B"]
    rank = matched_value(folder, config, "rank_pattern", "r", module)
    alpha = matched_value(folder, config, "alpha_pattern", "lora_alpha", module)
    if not a_rn.shape[0] == b_mr.shape[1] == rank:
        raise ValueError(
            f"{where}: lora_A {tuple(a_rn.shape)} and lora_B {tuple(b_mr.shape)} do not have the "
            f"rank {rank} that the configuration gives; correct r or rank_pattern"
        )
    return LoraFactors(a_rn, b_mr, float(alpha), bool(config.get("use_rslora", False)))


def _why_refused(name: str) -> str:
    """What a key that is neither a factor nor a dense parameter stands for."""
    if "lora_magnitude_vector" in name:
        return NOT_A_SUM["use_dora"]
    if "lora_embedding" in name:
        return "LoRA on embeddings is not supported; list the embedding in modules_to_save"
    if "trainable_tokens" in name:
        return NOT_A_SUM["trainable_token_indices"]
    if name.endswith(".bias"):
        return NOT_A_SUM["lora_bias"]
    return "is no factor of a plain LoRA; save the adapter with PEFT's save_pretrained"
