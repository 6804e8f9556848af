"""Write a distilled student as a plain config and a weights-only checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import mmdistill_ext  # noqa: F401  before the config is read: `mmdistill_ext::` and `mmseg::` in it
from mmdistill_ext import cli
from mmdistill_ext.export import export_student


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = cli.config_parser(__doc__)
    parser.add_argument('checkpoint', help='training checkpoint, file or URL')
    parser.add_argument('out_dir', help='folder for student.py and student.pth')
    parser.add_argument(
        '--network', help='of several that learned together: the name of one, or best'
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Export."""
    args = parse_args(argv)
    cfg = cli.load_config(args.config, args.cfg_options, args.trust)
    for path in export_student(cfg, args.checkpoint, args.out_dir, args.network):
        print(path)


if __name__ == '__main__':
    main()
