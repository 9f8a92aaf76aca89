"""How far attackers came: the success rate of each band that wants one thing of the model."""

from __future__ import annotations

from anabranch.client.session import Session
from anabranch.simulation.attackers import Plot
from anabranch.simulation.attacks.kinds import resolve_kind
from anabranch.simulation.attacks.poison import PoisonableTask
from anabranch.simulation.attacks.turn import poisoned


def split_of(band: int) -> str:
    """Where a band's success stands among an adapter's scores."""
    return f"attack-{band}"


def victims(session: Session, plot: Plot) -> dict[int, dict[str, tuple[PoisonableTask, int]]]:
    """By band that wants one thing, the poisoned task and the client to ask, per group attacked.

    Raises:
        ValueError: A kind or a parameter is wrong, or the task's data cannot be poisoned so.
    """
    found: dict[int, dict[str, tuple[PoisonableTask, int]]] = {}
    for index, band in enumerate(plot.bands):
        kind, config = resolve_kind(band.attackers, f"attackers.{index}")
        if kind.poison is not None:
            try:
                task = poisoned(session.task, kind.poison(config))
                for partition in band.partitions:
                    task.check_partition(partition)
            except ValueError as error:
                raise ValueError(f"attackers.{index}: {error}") from error
            groups = [task.groups[partition] for partition in band.partitions]
            found[index] = {
                group: (task, task.scored_partitions[group]) for group in dict.fromkeys(groups)
            }
    return found


def success_rates(session: Session, plot: Plot) -> dict[str, dict[str, dict[str, float]]]:
    """Share of the test inputs of other labels that the loaded adapter gives the target, triggered.

    Args:
        session: The task, with an adapter loaded.
        plot: Who attacks how.

    Returns:
        By band (``split_of``) and group attacked, the metrics of the poisoned test data, whose
        accuracy is the success.
    """
    return {
        split_of(index): {
            group: {
                name: float(value)
                for name, value in task.evaluate(session.model, partition, "test").items()
            }
            for group, (task, partition) in groups.items()
        }
        for index, groups in victims(session, plot).items()
    }
