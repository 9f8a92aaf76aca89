"""Whether models or adapters can be merged, by what lies beside their weights. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
"""A tokenizer.json of 250,000 tokens is some 20 MB."""

ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
"""Keys of a config.json that say what the weights mean."""

Folders = Sequence[tuple[str, Path | None]]
"""Pairs of what to call a contribution and where its small files are."""


def check_architectures(folders: Folders) -> list[str]:
    """Compare the config.json of every folder with the first that has one.

    Returns:
        Warnings, one line each.

    Raises:
        ValueError: Two say different things of the architecture.
    """
    warnings = []
    first: tuple[str, Mapping[str, Any]] | None = None
    for name, folder in folders:
        config = _table(folder, "config.json")
        if config is None:
            warnings.append(f"{name}: has no config.json; only names and shapes are compared")
            continue
        # A model of text and images keeps what is said of its text part in a table of its own.
        text = config.get("text_config")
        facts = {**config, **text} if isinstance(text, dict) else config
        if first is None:
            first = name, facts
        for key in ARCHITECTURE:
            mine, theirs = facts.get(key), first[1].get(key)
            if mine != theirs:
                raise ValueError(
                    f"{name}: config.json: {key} is {mine!r}, in {first[0]} it is {theirs!r}; "
                    "merge fine-tunes of one base"
                )
    return warnings


def check_tokenizers(folders: Folders) -> list[str]:
    """Compare the tokenizers of all folders that have one with the first's.

    Files that are equal byte for byte, as they mostly are, are not parsed.

    Returns:
        Warnings, one line each: added or special tokens that differ.

    Raises:
        ValueError: One token has two numbers: rows of the embeddings would mean different tokens.
    """
    marked = [(name, folder, _fingerprint(folder)) for name, folder in folders]
    having = [(name, folder, mark) for name, folder, mark in marked if mark is not None]
    warnings: list[str] = []
    theirs = None
    for name, folder, mark in having[1:]:
        whose, first, their_mark = having[0]
        if mark == their_mark:
            continue
        theirs = _tokenizer(first) if theirs is None else theirs
        warnings += _differences(name, _tokenizer(folder), whose, theirs)
    return warnings


_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def _fingerprint(folder: Path | None) -> str | None:
    """Hash of a folder's tokenizer files, None where there are none."""
    files = [] if folder is None else [folder / name for name in _TOKENIZER_FILES]
    digest = hashlib.sha256()
    found = False
    for path in files:
        if path.is_file():
            found = True
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if found else None


@dataclass(frozen=True)
class _Tokenizer:
    """Numbers of the vocabulary's tokens and of those added later, and what is special."""

    vocabulary: Mapping[str, Any]
    added: Mapping[str, Any]
    special: Mapping[str, Any]


def _tokenizer(folder: Path | None) -> _Tokenizer:
    whole = _table(folder, "tokenizer.json") or {}
    return _Tokenizer(_vocabulary(whole, folder), _added(whole, folder), _special(folder))


def _differences(name: str, mine: _Tokenizer, whose: str, theirs: _Tokenizer) -> list[str]:
    """Warnings on how one tokenizer differs from another.

    Raises:
        ValueError: They give one token two numbers, or have different vocabularies.
    """
    for kind, my_numbers, their_numbers in (
        ("vocabulary", mine.vocabulary, theirs.vocabulary),
        ("added tokens", mine.added, theirs.added),
    ):
        shared = sorted(my_numbers.keys() & their_numbers.keys())
        moved = [token for token in shared if my_numbers[token] != their_numbers[token]]
        if moved:
            raise ValueError(
                f"{name}: tokenizer: {moved[0]!r} of the {kind} is number {my_numbers[moved[0]]}, "
                f"in {whose} it is {their_numbers[moved[0]]}; merge models of one tokenizer"
            )
    sizes = len(mine.vocabulary), len(theirs.vocabulary)
    if all(sizes) and sizes[0] != sizes[1]:
        raise ValueError(
            f"{name}: tokenizer: has {sizes[0]} tokens, {whose} has {sizes[1]}; "
            "merge models of one tokenizer"
        )
    warnings = []
    extra = sorted(mine.added.keys() ^ theirs.added.keys())
    if extra:
        shown = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
        warnings.append(
            f"{name}: adds other tokens than {whose} ({shown}); the result has {whose}'s"
        )
    if mine.special and theirs.special and mine.special != theirs.special:
        warnings.append(f"{name}: has other special tokens than {whose}; the result has {whose}'s")
    return warnings


def _vocabulary(whole: Mapping[str, Any], folder: Path | None) -> Mapping[str, Any]:
    """Numbers of the tokens: of tokenizer.json, or of vocab.json or vocab.txt."""
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        # Unigram models hold pairs of token and score, numbered by place.
        pairs = enumerate(vocabulary)
        return {str(pair[0]): number for number, pair in pairs if isinstance(pair, list) and pair}
    if vocabulary is None:
        vocabulary = _table(folder, "vocab.json")
    if isinstance(vocabulary, dict):
        return vocabulary
    lines = None if folder is None else folder / "vocab.txt"
    if lines is None or not lines.is_file() or lines.stat().st_size > MAX_BYTES:
        return {}
    text = lines.read_text(encoding="utf-8", errors="replace")
    return {token: number for number, token in enumerate(text.split("\n"))}


def _added(whole: Mapping[str, Any], folder: Path | None) -> Mapping[str, Any]:
    """Numbers of tokens that were added after the vocabulary was made."""
    added = dict(_table(folder, "added_tokens.json") or {})
    for entry in whole.get("added_tokens") or ():
        if isinstance(entry, dict) and "content" in entry:
            added[str(entry["content"])] = entry.get("id")
    return added


def _special(folder: Path | None) -> dict[str, Any]:
    """Which tokens begin, end and pad a text."""
    found = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, token in (_table(folder, file) or {}).items():
            if key.endswith("_token") and isinstance(token, str | dict):
                found[key] = token["content"] if isinstance(token, dict) else token
    return found


def _table(folder: Path | None, file: str) -> dict[str, Any] | None:
    """A JSON file's table, None where there is no such file.

    Raises:
        ValueError: Broken JSON, no table, or a file over the cap.
    """
    path = None if folder is None else folder / file
    if path is None or not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: is over {MAX_BYTES} bytes; fetch it again")
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds no table of keys; fetch it again")
    return table
