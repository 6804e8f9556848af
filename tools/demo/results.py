"""Reads what the demo's runs left behind, whatever the task."""

import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LIBRARIES = ('mmdistill-ext', 'torch', 'mmengine', 'mmcv')
OTHERS = ('numpy', 'scikit-learn')


@dataclass(frozen=True)
class Measure:
    """How a task's predictions are scored.

    Args:
        mean: What the mean over the classes is called.
        single: What the score of a class is called.
        key: Name of the mean in the logs.
        scale: Factor that makes it per cent.
    """

    mean: str
    single: str
    key: str
    scale: float = 1.0


@dataclass(frozen=True)
class Model:
    """What the page says of one model.

    Args:
        scalars: What its training logged, line by line.
        scores: Class -> score in per cent of the test; NaN for a class that is nowhere.
        mean: Their mean in per cent, as ``tools/test.py`` found it.
        last_mean: The same, as the last validation during training found it.
        step_ms: Median time of an iteration.
    """

    scalars: list[dict]
    scores: dict[str, float]
    mean: float
    last_mean: float
    step_ms: float


@dataclass(frozen=True)
class Demo:
    """Everything that was found in a demo's folder.

    Args:
        out: The folder.
        records: Step -> record, see :func:`steps.run_steps`.
        measure: How the models are scored.
        models: Name -> results, the teacher first.
        meta: ``metainfo`` of the data set.
        digits: The classes that are digits.
        mixed: Those among them that the teacher mixes up.
    """

    out: Path
    records: dict[str, dict]
    measure: Measure
    models: dict[str, Model]
    meta: dict
    digits: list[str]
    mixed: list[str]

    @property
    def students(self) -> dict[str, Model]:
        """The models without the teacher."""
        return {name: model for name, model in self.models.items() if name != 'teacher'}

    @property
    def others(self) -> list[str]:
        """The digits that the teacher does not mix up."""
        return [name for name in self.digits if name not in self.mixed]


def read_scalars(out: Path, name: str) -> list[dict]:
    """What the latest training of a model logged, line by line."""
    lines = latest_log(out, name, 'scalars.json').read_text().splitlines()
    return [json.loads(line) for line in lines]


def latest_log(out: Path, name: str, path: str) -> Path:
    """A file or folder that the latest training of a model wrote."""
    return max((out / 'runs' / name).glob(f'*/vis_data/{path}'))


def read_metrics(out: Path, name: str) -> dict[str, float]:
    """What the latest test of a model found."""
    return json.loads(max((out / 'tests' / name).glob('*/*.json')).read_text())


def make_model(
    scalars: list[dict], scores: Mapping[str, float], metrics: Mapping, measure: Measure
) -> Model:
    """Put the results of a model together.

    Args:
        scalars: As :func:`read_scalars` gives them.
        scores: Class -> score in per cent.
        metrics: As :func:`read_metrics` gives them.
        measure: How it is scored.
    """
    return Model(
        scalars=scalars,
        scores=dict(scores),
        mean=measure.scale * metrics[measure.key],
        last_mean=measure.scale * curve(scalars, measure.key)[1][-1],
        step_ms=1000 * statistics.median(line['time'] for line in scalars if 'loss' in line),
    )


def curve(scalars: list[dict], name: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """Return iterations and values of one scalar, from the lines that have it."""
    found = [(line['step'], scale * line[name]) for line in scalars if name in line]
    return [step for step, _ in found], [value for _, value in found]


def mean_score(scores: Mapping[str, float], names: list[str]) -> float:
    """Mean over some classes; those that are nowhere do not count."""
    values = [scores[name] for name in names if not math.isnan(scores[name])]
    return statistics.fmean(values) if values else math.nan


def busy_seconds(records: Iterable[dict]) -> float:
    """Return the time in which at least one of the steps ran, in seconds."""
    total = end = 0.0
    for record in sorted(records, key=lambda record: record['started']):
        stop = record['started'] + record['seconds']
        total += max(0.0, stop - max(end, record['started']))
        end = max(end, stop)
    return total


def versions(frameworks: Iterable[str]) -> dict[str, str]:
    """Return name -> version of what is at work, whichever family brings it."""
    found = {dist.metadata['Name']: dist.version for dist in metadata.distributions()}
    stems = (*LIBRARIES, *frameworks, *OTHERS)
    names = [name for stem in stems for name in (f'onedl-{stem}', stem) if name in found]
    return {'Python': platform.python_version(), **{name: found[name] for name in names}}
