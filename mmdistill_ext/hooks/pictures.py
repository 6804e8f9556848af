"""Pictures that never end a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import print_log


class Pictures:
    """Guards what a hook draws: an error (a full disk, say) costs the picture and not the run.

    The first error is logged as a warning; later ones are passed over, and drawing goes on, since
    a disk may have room again. Hooks draw after checkpoints are saved: at priority ``LOWEST``, in
    ``after_val``, or in the next iteration.

    Args:
        name: The hook, for the warning.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._warned = False

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Draw inside of this."""
        try:
            yield
        except Exception as error:
            if self._warned:
                return
            self._warned = True
            print_log(
                f'{self.name} could not draw: {error!r}. The run goes on; further pictures that '
                'fail are left out without a warning.',
                logger='current',
                level=logging.WARNING,
            )
