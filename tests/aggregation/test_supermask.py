"""FRL's vote on scores: against a loop, against what its published code does, and learning."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from anabranch.aggregation.methods.supermask import SUPERMASK, SupermaskConfig
from anabranch.client.edge_popup import SupermaskLinear
from anabranch.vectors.supermask import signed_constant, supermask

ENTRIES = 300


def scores(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common_D = torch.randn(ENTRIES, generator=generator)
    return common_D + torch.randn(count, ENTRIES, generator=generator)


@pytest.mark.parametrize("coarse", [False, True])
def test_places_add_up_and_are_given_scores_again(coarse: bool) -> None:
    scores_CD = scores(5)
    if coarse:
        scores_CD = scores_CD.round()
    rows = scores_CD.tolist()
    votes = [0.0] * ENTRIES
    for row in rows:
        ordered = sorted(row)
        for entry, value in enumerate(row):
            first = ordered.index(value)
            votes[entry] += first + (ordered.count(value) - 1) / 2
    curve = [median(values) for values in zip(*map(sorted, rows), strict=True)]
    ordered = sorted(votes)
    wanted = []
    for vote in votes:
        first, equals = ordered.index(vote), ordered.count(vote)
        wanted.append(sum(curve[first : first + equals]) / equals)
    assert SUPERMASK(scores_CD).tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    mask_D = SUPERMASK(scores_CD, None, SupermaskConfig(gives="mask", density=0.3))
    assert int(mask_D.sum()) == 90
    assert min(torch.tensor(wanted)[mask_D.bool()]) >= max(torch.tensor(wanted)[~mask_D.bool()])


def by_magnitude(scores_D: Tensor, density: float) -> Tensor:
    """The mask as FRL's published code has it: the highest |score|."""
    order_D = scores_D.abs().sort(stable=True).indices
    mask_D = torch.zeros(len(scores_D), dtype=torch.bool)
    mask_D[order_D[len(scores_D) - int(density * len(scores_D)) :]] = True
    return mask_D


def test_a_unanimous_vote_for_the_reverse_changes_all_of_the_mask() -> None:
    """And hardly any of it with the published code's mask, whose votes are on signed scores."""
    start_D = 2 * torch.rand(ENTRIES, generator=torch.Generator().manual_seed(0)) - 1
    sorted_D, order_D = start_D.sort()
    reversed_D = torch.empty(ENTRIES).scatter_(0, order_D, sorted_D.flip(0))
    voted_D = SUPERMASK(reversed_D.expand(25, -1))
    assert torch.equal(voted_D, reversed_D)
    changed_D = supermask(voted_D, 0.5) ^ supermask(start_D, 0.5)
    assert bool(changed_D.all())
    published_D = by_magnitude(voted_D, 0.5) ^ by_magnitude(start_D, 0.5)
    assert float(published_D.float().mean()) < 0.2


def test_masks_are_exact_and_weights_are_drawn_alike_by_all() -> None:
    assert supermask(torch.tensor([[0.0, -9], [0, 1]]), 0.5).tolist() == [
        [False, False],
        [True] * 2,
    ]
    assert int(supermask(torch.zeros(7), 0.01).sum()) == 1
    weight_mn = signed_constant((40, 50), 3, "first")
    assert torch.equal(weight_mn.abs(), torch.full((40, 50), (2 / 50) ** 0.5))
    assert abs(float(weight_mn.sign().mean())) < 0.06
    assert torch.equal(weight_mn, signed_constant((40, 50), 3, "first"))
    assert not torch.equal(weight_mn, signed_constant((40, 50), 3, "second"))


def test_only_scores_are_trained() -> None:
    layer = SupermaskLinear(6, 4, seed=1, name="only")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    layer(x).square().sum().backward()
    assert [name for name, _ in layer.named_parameters()] == ["scores_mn"]
    mask_mn = supermask(layer.scores_mn, 0.5)
    output = x @ (layer.get_buffer("weight_mn") * mask_mn).T
    expected_mn = (2 * output).T @ x * layer.get_buffer("weight_mn")
    torch.testing.assert_close(layer.scores_mn.grad, expected_mn)


def test_a_federation_of_scores_learns_and_outvotes_two_of_nine() -> None:
    generator = torch.Generator().manual_seed(5)
    direction_n = torch.randn(16, generator=generator)
    inputs = torch.randn(1200, 16, generator=generator)
    labels = (inputs @ direction_n > 0).long()
    network = torch.nn.Sequential(
        SupermaskLinear(16, 64, seed=2, name="first"),
        torch.nn.ReLU(),
        SupermaskLinear(64, 2, seed=3, name="second"),
    )

    def accuracy() -> float:
        with torch.no_grad():
            return float((network(inputs[900:]).argmax(1) == labels[900:]).float().mean())

    def trained(rows: slice) -> dict[str, Tensor]:
        optimiser = torch.optim.SGD(network.parameters(), lr=0.4, momentum=0.9)
        for _ in range(8):
            optimiser.zero_grad()
            functional.cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimiser.step()
        return {name: part.detach().clone() for name, part in network.named_parameters()}

    before = accuracy()
    for _ in range(5):
        start = {name: part.detach().clone() for name, part in network.named_parameters()}
        sent = []
        for client in range(9):
            network.load_state_dict(start, strict=False)
            mine = trained(slice(100 * client, 100 * client + 100))
            # Two send the reverse of what they trained, as large as they please.
            sent.append({n: -1e6 * s for n, s in mine.items()} if client < 2 else mine)
        voted = {n: SUPERMASK(torch.stack([one[n].flatten() for one in sent])) for n in start}
        network.load_state_dict(
            {n: voted[n].view_as(part) for n, part in start.items()}, strict=False
        )
    assert before < 0.6
    assert accuracy() > 0.85
