"""Ends a training at the first loss that is not finite, before the weights take it in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.logging import MessageHub
from torch import Tensor

SKIP_HINT = (
    "dict(type='mmdistill_ext.SkipNonFiniteHook') in `custom_hooks` leaves such steps out instead"
)


class LossGuard:
    """Looks at the loss of every step between its backward pass and the optimizer's step.

    Whether the loss is finite is worked out on the device and copied to the host without waiting.
    The host reads the answer at the end of the backward pass, when all of that pass has been
    launched: a GPU that is behind goes on with it while the host waits for the forward pass alone,
    so the check leaves no gap in the GPU's work. Ranks share one answer, and stop together.

    What is looked at is the loss itself, before a ``GradScaler`` multiplies it: gradients that
    overflow while the scale is searched for are the scaler's affair.

    Attributes:
        defers: Somebody else asks for :meth:`failure` before each step of the optimizer; the guard
            then raises nothing.
    """

    def __init__(self) -> None:
        self.defers = False
        self._batch: _Batch | None = None
        self._steps: list[_Step] = []

    def see(self, inputs: Tensor | Mapping[str, Tensor], data_samples: Sequence | None) -> None:
        """Note the batch of the step that begins, to name it should its loss not be finite.

        Args:
            inputs: ``(B, ...)``, or those of each network by its name.
            data_samples: The batch's data samples, which may name the files of its images.
        """
        tensors = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
        self._batch = _Batch(tuple(tensors), _names(data_samples or ()))

    def watch(self, loss: Tensor, log_vars: Mapping[str, Tensor]) -> None:
        """Have the loss looked at when its backward pass ends.

        Args:
            loss: Sum of all losses, as ``parse_losses`` gives it.
            log_vars: Its terms by name, as ``parse_losses`` gives them.
        """
        batch, self._batch = self._batch, None
        if not loss.requires_grad:
            return
        terms = {name: value.detach() for name, value in log_vars.items() if 'loss' in name}
        iteration = MessageHub.get_current_instance().get_info('iter', 0) + 1
        step = _Step(_Answer(loss.detach()), terms, batch, iteration)
        loss.register_hook(lambda gradient: self._at_end_of_backward(step))

    def failure(self) -> str | None:
        """What was not finite in the steps since the last call, the same on every rank.

        Returns:
            Terms, iteration and images, for an error; None when all losses were finite.
        """
        steps, self._steps = self._steps, []
        failed = [step for step in steps if step.answer.is_bad()]
        if not failed:
            return None
        reports = [text for step in failed if (text := step.report())]
        if get_world_size() > 1:
            own = [f'rank {get_rank()}: {text}' for text in reports]
            reports = [text for texts in all_gather_object(own) for text in texts]
        return '; '.join(reports)

    def _at_end_of_backward(self, step: _Step) -> None:
        self._steps.append(step)
        # Asked for at the start of a backward pass, as DistributedDataParallel does, for its end.
        torch.autograd.Variable._execution_engine.queue_callback(self._ask)

    def _ask(self) -> None:
        failure = None if self.defers else self.failure()
        if failure is not None:
            raise FloatingPointError(
                f'Losses should be finite. Found {failure}. The weights are as they were before '
                f'this iteration. ({SKIP_HINT}.)'
            )


class _Answer:
    """Whether a loss is not finite on some rank, on its way from the device to the host."""

    def __init__(self, loss: Tensor) -> None:
        bad = (~loss.isfinite()).float()
        all_reduce(bad, 'max')
        self._event = None
        if bad.is_cuda:
            self._flag = torch.empty_like(bad, device='cpu', pin_memory=True)
            self._flag.copy_(bad, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._flag = bad

    def is_bad(self) -> bool:
        """Wait for the answer."""
        if self._event is not None:
            self._event.synchronize()
        return self._flag.item() > 0


@dataclass(frozen=True)
class _Batch:
    inputs: tuple[Tensor, ...]
    names: list[str]

    def __str__(self) -> str:
        text = 'images ' + (', '.join(f"'{name}'" for name in self.names) or 'without a file name')
        broken = sorted(
            {i for x in self.inputs for i, image in enumerate(x) if not image.isfinite().all()}
        )
        if not broken:
            return text
        listed = (f"'{self.names[i]}'" if i < len(self.names) else f'number {i}' for i in broken)
        return f'{text}, of which {", ".join(listed)} have pixels that are not finite'


@dataclass(frozen=True)
class _Step:
    answer: _Answer
    terms: dict[str, Tensor]
    batch: _Batch | None
    iteration: int

    def report(self) -> str:
        """What is not finite on this rank; empty when that is on other ranks only."""
        values = {name: float(value) for name, value in self.terms.items()}
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if len(bad) > 1:
            bad.pop('loss', None)  # their sum
        if not bad:
            return ''
        listed = ', '.join(f"{value} in '{name}'" for name, value in bad.items())
        return f'{listed} at iteration {self.iteration}, {self.batch or "batch unknown"}'


def _names(data_samples: Sequence) -> list[str]:
    return [
        str(name)
        for sample in data_samples
        if (name := getattr(sample, 'metainfo', {}).get('img_path')) is not None
    ]
