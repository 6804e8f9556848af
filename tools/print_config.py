"""Print a config with everything it inherits; ``--plain``: the exported student's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mmdistill_ext  # noqa: F401  before the config is read: `mmdistill_ext::` and `mmseg::` in it
from mmdistill_ext import cli
from mmdistill_ext.plain_config import network_names, plain_config

SUFFIXES = ('.py', '.json', '.yml', '.yaml')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = cli.config_parser('Print the whole config')
    parser.add_argument('--plain', action='store_true', help="the student's own config")
    parser.add_argument('--network', help='with --plain: which, of several that learn together')
    parser.add_argument('--save-path', help=f'also write it: a file that ends in {SUFFIXES}')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print."""
    args = parse_args(argv)
    if args.save_path and Path(args.save_path).suffix not in SUFFIXES:
        raise ValueError(
            f"`--save-path` should end in one of {SUFFIXES}. Found '{args.save_path}'."
        )
    cfg = cli.load_config(args.config, args.cfg_options, args.trust)
    if args.plain:
        names = network_names(cfg)
        if names and args.network is None:
            raise ValueError(f'`--network` should be one of {", ".join(names)}. Found none.')
        cfg = plain_config(cfg, args.network)
    print(f'Config:\n{cfg.pretty_text}')
    if args.save_path:
        Path(args.save_path).parent.mkdir(parents=True, exist_ok=True)
        cfg.dump(args.save_path)
        print(f'Config saved at {args.save_path}')


if __name__ == '__main__':
    main()
