"""Checks what a run starts from: the checkpoint that it loads first, and its teacher."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmdistill_ext.checkpoint import load_exactly, weights_of
from mmdistill_ext.checkpoint_content import check_values
from mmdistill_ext.distillers.teacher_student import DistilledModel
from mmdistill_ext.safe_loading import locate, name_sources


class CheckFirstCheckpoint(Hook):
    """Stops a run whose first checkpoint is damaged or of another model.

    mmengine only warns about keys that are missing or differ in shape, and runs on. The hook looks
    at what the runner has read, so the file is read once.

    Args:
        source: File or URL, for errors.
        key: The option or config key that names it.
        partial: Accept a start that fits in part: most of the file's tensors are used, or most of
            the model's are filled. Otherwise everything that the model has must be there, a
            distiller's connectors too.
    """

    def __init__(self, source: str, key: str, partial: bool = False) -> None:
        self.source, self.key, self.partial = source, key, partial
        self.is_checked = False

    def after_load_checkpoint(self, runner: Runner | FlexibleRunner, checkpoint: dict) -> None:
        """Check the first checkpoint that the runner loads.

        Raises:
            ValueError: It is damaged or of another model.
        """
        if self.is_checked:
            return
        self.is_checked = True
        check_checkpoint(runner.model, checkpoint, self.source, self.key, self.partial)
        if runner._resume:
            check_resumable(checkpoint, self.source, self.key)


def check_before_loading(runner: Runner | FlexibleRunner, hook: CheckFirstCheckpoint) -> None:
    """Let a hook check what the runner loads first; a missing file is refused at once.

    Raises:
        FileNotFoundError: There is no such file.
    """
    name_sources(hook.source, hook.key)
    if '://' not in hook.source:
        locate(hook.source, hook.key)
    runner.register_hook(hook, priority='HIGHEST')  # before EMAHook, which changes the content


def check_checkpoint(
    model: nn.Module, content: Mapping, source: str, key: str, partial: bool = False
) -> None:
    """Refuse a checkpoint that does not fit; arguments as of :class:`CheckFirstCheckpoint`.

    Args:
        model: The model to be filled, possibly wrapped.
        content: What the checkpoint holds.
        source: File or URL, for errors.
        key: The option or config key that names it.
        partial: Accept one that fits in part.

    Raises:
        ValueError: The checkpoint is damaged or of another model.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule('module')
    state = weights_of(content, source, key, connectors=not partial)['state_dict']
    what = f"`{key}` '{source}'"
    check_values(state, what)
    own = model.state_dict()
    if partial:
        fitting = sum(k in own and own[k].shape == value.shape for k, value in state.items())
        if 2 * fitting < min(len(own), len(state)):
            raise ValueError(
                f'{what} is of another model: only {fitting} of its {len(state)} '
                f"tensors fit the {len(own)} of the config's model."
            )
        return
    load_exactly(model, state, what, more=True)


def check_resumable(content: Mapping, source: str, key: str) -> None:
    """Refuse a checkpoint without what a run needs to go on.

    Raises:
        ValueError: It holds weights only.
    """
    meta = content.get('meta') or {}
    missing = [f'meta.{name}' for name in ('epoch', 'iter') if name not in meta]
    missing += [name for name in ('message_hub',) if name not in content]
    if missing:
        raise ValueError(
            f'`{key}` should be a checkpoint of a training run. '
            f"'{source}' has no {', '.join(missing)}: start from its weights by `load_from`."
        )


def load_teachers(model: nn.Module | dict) -> None:
    """Read the weights of a model's teachers before the run does, so that errors come at once.

    Args:
        model: The runner's, possibly wrapped; a config that is not built yet is left to the run.
    """
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(part, DistilledModel):
            part.distillation.start()
