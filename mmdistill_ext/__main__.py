"""Runs a script of another project, such as mmsegmentation's tools, with this package imported.

``_base_ = 'mmdistill_ext::...'`` and ``'mmseg::...'`` are then found, and checkpoints are loaded
without running code from them.

Example:
    python -m mmdistill_ext mmsegmentation/tools/train.py my_distilled.py --amp
    torchrun --nproc_per_node 2 -m mmdistill_ext mmdetection/tools/train.py my.py --launcher pytorch
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdistill_ext.safe_loading import add_trust_argument, trust


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script in place of this module, with its own arguments.

    Args:
        argv: ``[--trust SOURCE ...] SCRIPT ARGUMENT ...``; the command line's by default.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmdistill_ext',
        description="Run another project's script with mmdistill_ext imported before it",
    )
    add_trust_argument(parser, nargs=None)
    parser.add_argument('script', help='path of the script')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args(argv)
    if not Path(args.script).is_file():
        parser.error(f"`script` should be an existing file. Found '{args.script}'.")
    trust(*args.trust)
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(Path(args.script).resolve().parent))  # as Python does for a script
    runpy.run_path(args.script, run_name='__main__')


if __name__ == '__main__':
    main()
