"""The account: rows of any noise compose as a numeric accountant says, and none is left out."""

import math
from pathlib import Path

import pytest

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.privacy.accountant import epsilon_spent, squared_mu_of
from anabranch.coordinator.privacy.budget import (
    check_account,
    next_release,
    spent_with,
    why_spent,
)
from anabranch.coordinator.privacy.ledger import RELEASE_KEY, Ledger, Release, read_ledger
from anabranch.coordinator.store import FolderStore, Publication

RECIPE = {"method": "fedit"}


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Balle and Wang (1805.06530), theorem 8: delta of noise of sigma on a sensitivity of 1."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2  # exact far out in the tail

    a, b = 1 / (2 * sigma), epsilon * sigma
    return phi(a - b) - math.exp(epsilon) * phi(-a - b)


def ledger(*multipliers: float) -> Ledger:
    return Ledger(tuple(Release(clip=1.0, noise_multiplier=one, divisor=4) for one in multipliers))


def published(number: int, multiplier: float | None, adapter: str = "") -> Publication:
    report = {}
    if multiplier is not None:
        release = Release(clip=0.5, noise_multiplier=multiplier, divisor=4)
        report = {RELEASE_KEY: release.model_dump()}
    name = adapter or f"adapter {number}"
    return Publication(round=number, digest="0" * 64, adapter_hash=name, report=report)


def config(**privacy: object) -> FederationConfig:
    given = {"clip": 0.5, "epsilon": 8.0, "delta": 1e-5, **privacy}
    return FederationConfig.model_validate(
        {"name": "f", "run": "r", "rounds": 8, "clients": 4, "recipe": RECIPE, "privacy": given}
    )


@pytest.mark.parametrize("multiplier", [0.8, 1.7, 5.0])
@pytest.mark.parametrize("rounds", [1, 8, 100])
def test_equal_rounds_are_one_gaussian_mechanism(multiplier: float, rounds: int) -> None:
    epsilon = ledger(*[multiplier] * rounds).epsilon(1e-5)
    assert gaussian_delta(multiplier / math.sqrt(rounds), epsilon) == pytest.approx(1e-5, rel=1e-3)


def test_rounds_of_different_noise_compose_as_the_numeric_accountant_says() -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    rows = (1.7, 1.7, 3.0)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    for multiplier in rows:
        accountant.compose(GaussianDpEvent(multiplier))
    assert ledger(*rows).epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)
    assert ledger().epsilon(1e-5) == 0.0
    # What the configuration of the last round alone would have said.
    assert ledger(*rows).epsilon(1e-5) > 1.3 * ledger(3.0, 3.0, 3.0).epsilon(1e-5)


def test_a_budget_is_what_its_epsilon_costs() -> None:
    for epsilon, delta in ((0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-5), (50.0, 1e-3)):
        spent = epsilon_spent(squared_mu_of(epsilon, delta), delta)
        assert epsilon * (1 - 1e-5) < spent <= epsilon


def test_the_least_noise_lasts_for_the_planned_rounds_and_no_longer(tmp_path: Path) -> None:
    store, cfg = FolderStore(tmp_path), config()
    multipliers = []
    for number in range(1, 9):
        release = next_release(cfg, store, number)
        assert release is not None
        multipliers.append(release.noise_multiplier)
        publication = published(number, release.noise_multiplier)
        facts = spent_with(cfg, store, publication)
        assert facts["privacy"]["rounds_left"] == 8 - number
        store.publish(publication, facts)
    assert multipliers == pytest.approx([multipliers[0]] * 8)
    assert 7.99 < facts["privacy"]["epsilon"] <= 8.0
    assert "one more would go beyond" in str(why_spent(cfg, store, 9))


def test_a_round_that_published_nothing_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    store, cfg = FolderStore(tmp_path), config()
    store.publish(published(1, 4.0), {})
    total, left = squared_mu_of(8.0, 1e-5), squared_mu_of(8.0, 1e-5) - 1 / 16
    third, fourth = next_release(cfg, store, 3), next_release(cfg, store, 4)
    assert third is not None
    assert fourth is not None
    assert third.noise_multiplier == pytest.approx(math.sqrt(6 / left))
    assert fourth.noise_multiplier == pytest.approx(math.sqrt(5 / left))
    assert 1 / 16 + 5 * fourth.noise_multiplier**-2 == pytest.approx(total)


def test_a_run_that_goes_on_otherwise_pays_for_what_it_published(tmp_path: Path) -> None:
    """Three rounds of little noise, then a configuration with much: its ε is theirs and its own."""
    store = FolderStore(tmp_path)
    for number in (1, 2, 3):
        store.publish(published(number, 1.0), {})
    cfg = config(noise_multiplier=5.0, epsilon=10.0)
    spent = spent_with(cfg, store, published(4, 5.0))["privacy"]
    assert spent["epsilon"] == pytest.approx(ledger(1.0, 1.0, 1.0, 5.0).epsilon(1e-5))
    assert spent["epsilon"] > 3 * ledger(5.0, 5.0, 5.0, 5.0).epsilon(1e-5)
    # What is left of the budget, and no more, is what its rounds may spend.
    left = squared_mu_of(10.0, 1e-5) - 3
    assert spent["rounds_left"] == math.floor((left - 1 / 25) * 25)
    assert why_spent(config(noise_multiplier=5.0, epsilon=8.0), store, 4) is not None


def test_an_adapter_put_in_service_again_spends_nothing() -> None:
    rows = [published(1, 2.0, "first"), published(2, 2.0, "second"), published(3, None, "first")]
    assert read_ledger(rows) == read_ledger(rows[:2])


def test_a_round_torn_by_a_crash_was_never_out_and_its_account_is_open(tmp_path: Path) -> None:
    """The publication's line without the one of facts that follows it: nobody was told of it."""
    store, cfg = FolderStore(tmp_path), config()
    store.publish(published(1, 2.0), {"round": 1})
    journal = tmp_path / "metrics.jsonl"
    first, second = journal.read_text().splitlines()
    journal.write_text(first + "\n" + second[:20])
    again = FolderStore(tmp_path)
    assert again.publications() == again.notes("round") == []
    assert read_ledger(again.publications()).squared_mu == 0
    again.publish(published(1, 2.0), {"round": 1})
    again = FolderStore(tmp_path)
    assert read_ledger(again.publications()).squared_mu == 0.25
    assert spent_with(cfg, again, published(2, 2.0))["privacy"]["epsilon"] == pytest.approx(
        ledger(2.0, 2.0).epsilon(1e-5)
    )


def test_what_has_no_account_is_refused_in_one_line(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.publish(published(1, 2.0), {})
    check_account(config(), store)
    with pytest.raises(ValueError, match=r"round 1 .* with noise, and what it promised would end"):
        check_account(FederationConfig(name="f", run="r"), store)
    with pytest.raises(ValueError, match=r"noise_seed: .* their noise from the system; keep to"):
        check_account(config(noise_seed=1), store)
    store.publish(published(2, None), {})
    with pytest.raises(ValueError, match="round 2 of this run was published without noise"):
        check_account(config(), store)
    strange = published(3, 2.0)
    strange.report[RELEASE_KEY]["sampling"] = "poisson"
    with pytest.raises(ValueError, match=r"round 3 .* is not understood"):
        read_ledger([strange])


def test_seeded_rounds_have_no_epsilon(tmp_path: Path) -> None:
    release = Release(clip=0.5, noise_multiplier=2.0, divisor=4, seeded=True)
    row = published(1, 2.0).model_copy(update={"report": {RELEASE_KEY: release.model_dump()}})
    facts = spent_with(config(noise_seed=1), FolderStore(tmp_path), row)["privacy"]
    assert facts["epsilon"] is None
    assert facts["seeded"]
