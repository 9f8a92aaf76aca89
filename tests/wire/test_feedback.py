import pytest
import torch

from anabranch.wire import CodecConfig, UpdateMeta, compensate, encode_update, remainder


def test_what_was_left_out_is_sent_later(meta: UpdateMeta) -> None:
    generator = torch.Generator().manual_seed(4)
    delta = {"x": torch.randn(50, 40, generator=generator)}
    residual: dict[str, torch.Tensor] = {}
    total = torch.zeros(50, 40)
    without = torch.zeros(50, 40)
    rounds = 60
    for _ in range(rounds):
        compensated = compensate(delta, residual)
        encoded = encode_update(compensated, meta, CodecConfig(density=0.1))
        residual = remainder(compensated, encoded.sent)
        total += encoded.sent["x"]
        without += encode_update(delta, meta, CodecConfig(density=0.1)).sent["x"]
    # Everything meant is either sent or still in the residual.
    assert torch.allclose(total + residual["x"], rounds * delta["x"], atol=1e-3)
    scale = rounds * delta["x"].norm()
    assert (total - rounds * delta["x"]).norm() / scale < 0.12
    assert (without - rounds * delta["x"]).norm() / scale > 0.7


def test_a_residual_decays() -> None:
    delta = {"x": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    out = compensate(delta, {"x": torch.tensor([4.0, -4.0])}, decay=0.25)
    assert out["x"].tolist() == [2.0, 1.0]
    assert out["x"].dtype == torch.float32
    assert compensate(delta, {})["x"].tolist() == [1.0, 2.0]


def test_a_residual_of_another_layout_is_refused() -> None:
    delta = {"x": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"they differ in \['x', 'y'\]"):
        compensate(delta, {"y": torch.zeros(3)})
    with pytest.raises(ValueError, match="reset the residual when the layout changes"):
        compensate(delta, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="do not name the same tensors"):
        remainder(delta, {})


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"give the share of the residual to keep, in \[0, 1\]"):
        compensate({"x": torch.zeros(1)}, {}, decay)
