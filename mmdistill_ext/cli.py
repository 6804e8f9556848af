"""What the tools share: options, reading configs, building runners."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import distributed as dist

from mmdistill_ext.compat import require_framework
from mmdistill_ext.distillers.build import FRAMEWORKS
from mmdistill_ext.error_keys import errors_of_modules, errors_of_parts
from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.hooks.validation_check_hook import ValidationCheckHook, networks_of
from mmdistill_ext.safe_loading import add_trust_argument, name_sources, trust


def config_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every tool: config, ``--cfg-options``, ``--trust``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file path')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. model.losses.sel.temperature=4. '
        'Lists: key="[a,b]" or key=a,b; nested: key="[(a,b),(c,d)]", quoted, without spaces',
    )
    add_trust_argument(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of tools that start a runner."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run were started',
    )
    # `--local-rank` is what torch.distributed.launch passes since PyTorch 2.0
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(path: str, options: dict | None = None, trusted: Sequence[str] = ()) -> Config:
    """Read a config, apply ``--cfg-options`` and register the framework of its default scope.

    Args:
        path: The file.
        options: What to override, dotted key -> value.
        trusted: Checkpoints that may run code while they are loaded.

    Raises:
        FileNotFoundError: There is no such config.
        ImportError: Its framework is not installed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`config` should be an existing file. Found '{path}'.")
    cfg = Config.fromfile(path)
    options = dict(options or {})
    if 'data_root' in options and 'data_root' in cfg:
        replace_root(cfg._cfg_dict, cfg.data_root, options['data_root'])
    cfg.merge_from_dict(options)
    scope = cfg.get('default_scope')
    if scope in FRAMEWORKS:
        require_framework(scope, f"`default_scope`='{scope}' of {path}")
        importlib.import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    name_sources(cfg._cfg_dict)
    trust(*trusted)
    return cfg


def replace_root(node: object, old: str, new: str) -> object:
    """Let ``--cfg-options data_root=...`` reach every path that the config built from it.

    Args:
        node: A config's dict or a part of it; changed in place.
        old: The config's ``data_root``.
        new: The option's.

    Returns:
        The node; a string that is or begins with the old root has the new one instead.
    """
    if isinstance(node, str):
        if node == old:
            return new
        inside = node.startswith(f'{old.rstrip("/")}/')
        return os.path.join(new, node[len(old) :].lstrip('/')) if inside else node
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = replace_root(value, old, new)
    elif isinstance(node, list):
        node[:] = [replace_root(item, old, new) for item in node]
    return node


def set_run_options(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options of :func:`add_run_arguments`; the folder is option, config, file name."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('./work_dirs', Path(args.config).stem)
    if args.launcher != 'none' and get_device() == 'cpu':
        use_gloo(cfg)


def is_first_process(launcher: str) -> bool:
    """Whether this is the first process of its run, before the processes know each other."""
    ranks = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
    return launcher == 'none' or os.environ.get(ranks[launcher], '0') == '0'


def use_gloo(cfg: Config) -> None:
    """Let processes without accelerators train together; mmengine's defaults are for GPUs."""
    cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config asks for, a ``FlexibleRunner`` perhaps.

    Raises:
        ValueError: A part of the config cannot be built; the message names its key.
    """
    with errors_of_parts(cfg):
        return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def train(runner: Runner) -> None:
    """Check at the start what the first validation needs, and train.

    Raises:
        ValueError: A part that the run builds at its start cannot be built, or a metric does not
            exist; the message names its key.
    """
    if not any(isinstance(hook, ValidationCheckHook) for hook in runner.hooks):
        runner.register_hook(ValidationCheckHook())
    model = unwrapped_model(runner)
    preprocessors = {
        f'{key}.data_preprocessor': network.data_preprocessor for key, network in networks_of(model)
    }
    with errors_of_parts(runner.cfg), errors_of_modules(preprocessors):
        runner.train()


def leave_process_group() -> None:
    """End the work with other processes, when the runner of a distributed run is not used any more.

    A runner holds its model in circles, the model's wrapper holds the group, and a group that is
    alive has threads. A process that exits with them is aborted now and then, after all its work.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # nobody closes a connection that another process waits for
        dist.destroy_process_group()
        gc.collect()
