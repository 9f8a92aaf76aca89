"""Error feedback: what a lossy codec left out of one round is added to the next.

1-bit SGD (Seide et al., 2014) has the idea, 1901.09847 the proof that it restores the rate of
uncompressed descent. A round is::

    compensated = compensate(delta, residual, decay)
    encoded = encode_update(compensated, meta, codec)
    residual = remainder(compensated, encoded.sent)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def compensate(
    delta: Mapping[str, Tensor], residual: Mapping[str, Tensor], decay: float = 1.0
) -> dict[str, Tensor]:
    """What to encode this round: delta + decay · residual, in fp32.

    Args:
        delta: The round's change, by name.
        residual: ``remainder`` of the last round, of the same names and shapes; empty before the
            first round, or after a reset.
        decay: Share of the residual that is kept, in [0, 1]: below 1, what was left out long ago
            is forgotten, which helps where the model has moved on meanwhile.

    Raises:
        ValueError: Names or shapes differ, or ``decay`` is out of range.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; give the share of the residual to keep, in [0, 1]")
    if not residual:
        return {name: tensor.float() for name, tensor in delta.items()}
    _check_same(delta, residual, "residual")
    return {
        name: tensor.float() + decay * residual[name].to(tensor.device)
        for name, tensor in delta.items()
    }


def remainder(compensated: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The next round's residual: what was to be sent less what was.

    Args:
        compensated: What ``compensate`` returned.
        sent: ``Encoded.sent`` of encoding it.

    Raises:
        ValueError: Names or shapes differ.
    """
    _check_same(compensated, sent, "sent")
    return {name: tensor - sent[name].to(tensor.device) for name, tensor in compensated.items()}


def _check_same(mine: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    if sorted(mine) != sorted(other):
        odd = sorted(set(mine) ^ set(other))[:3]
        raise ValueError(f"{what} and update do not name the same tensors; they differ in {odd}")
    for name, tensor in mine.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, in {what} {tuple(other[name].shape)}; "
                "reset the residual when the layout changes"
            )
