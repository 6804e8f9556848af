"""The metric that several networks are compared by (COL-7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmdistill_ext.hooks.metric_names import check_metric

METRICS = ('mIoU', 'coco/bbox_mAP', 'pascal_voc/mAP')
"""What networks are compared by when no metric is named: the first of these that is evaluated."""


class ComparedMetric:
    """Chooses what networks are compared by from what an evaluator gives (COL-7).

    Args:
        named: Config key -> the metric that it names, as the evaluator names it; networks are
            compared by the first. May be empty.
        networks: Names that stand before the metrics, the ensemble's among them.
    """

    def __init__(self, named: Mapping[str, str], networks: Sequence[str]) -> None:
        self.named = dict(named)
        self.networks = tuple(networks)

    def check_prefixes(self, prefixes: Sequence[str | None]) -> None:
        """Refuse names that no metric of an evaluator can have, before there are results.

        Args:
            prefixes: Of the evaluator's metrics; without any nothing is refused.

        Raises:
            ValueError: A name has the prefix of no metric, or that of a network.
        """
        for key, name in self.named.items():
            of_network = name.partition('/')[0] in self.networks
            possible = [
                name.startswith(f'{prefix}/') if prefix else not of_network for prefix in prefixes
            ]
            if prefixes and not any(possible):
                raise ValueError(
                    f"`{key}` should be a metric's name with its prefix and without a network's. "
                    f"Found '{name}', prefixes are {list(prefixes)}."
                )

    def check_names(self, known: set[str] | None) -> None:
        """Refuse names that the evaluator's metrics are known not to give.

        Args:
            known: What they give, without a network's name; None if that is not known.

        Raises:
            ValueError: A name is that of no metric.
        """
        for key, name in self.named.items():
            check_metric(key, name, known)

    def choose(self, metrics: Mapping[str, float]) -> str:
        """The metric to compare by, after a validation.

        Args:
            metrics: ``<network>/<metric>`` -> value; others are ignored.

        Returns:
            The first that is named, else the first of :data:`METRICS` that there is, else any.

        Raises:
            ValueError: There are metrics, and a named one is not among those of the networks.
        """
        parts = [name.partition('/') for name in metrics]
        known = {metric for network, _, metric in parts if network in self.networks}
        for key, name in self.named.items():
            if metrics and name not in known:
                raise ValueError(
                    f"`{key}` should be a metric of each network's validation. Found '{name}', "
                    f'there are {sorted(known) or "none (see NetworksEvaluator)"}.'
                )
        default = next((name for name in METRICS if name in known), min(known, default='none'))
        return next(iter(self.named.values()), default)
