"""The config of the model that is left when everything of this package is taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mmengine.config import Config, ConfigDict

from mmdistill_ext.distillers.build import resolve_model_cfg
from mmdistill_ext.distillers.extension import INNER_MODELS
from mmdistill_ext.package_types import is_of_this_package, registered_name
from mmdistill_ext.registry import MODELS, SCOPE
from mmdistill_ext.single_network import config_for_network

MODEL = 'model'


def is_distillation(cfg: Config) -> bool:
    """Whether the config's model is a distiller of this package, with a student to stand alone."""
    model = cfg.get(MODEL) or {}
    return is_of_this_package(model) and 'student' in model


def network_names(cfg: Config) -> list[str]:
    """Names of the networks that the config trains together; empty for a single model."""
    if not cfg.get(MODEL):
        return []
    *_, (model, _) = _layers(cfg.model, MODEL)
    return list(model['students']) if _is_collaborative(model) else []


def plain_config(cfg: Config, network: str | None = None) -> Config:
    """Return the config that trains or tests the student alone.

    A stack of extensions is peeled (perturbations over a distilled student, say): the model is the
    innermost one; hooks and imports of this package are gone. Everything else, data and schedule
    among them, is as it was.

    Args:
        cfg: Any config. One that extends no model comes back as it is.
        network: Name of the network, of several that learn together; without a name, their config
            comes back as it is.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: ``model.student`` names no model, or
            there is no such network.
    """
    names = network_names(cfg)
    if names and network is None:
        return cfg
    layers = _peel(cfg, network) if cfg.get(MODEL) else []
    if len(layers) < 2:
        return cfg
    plain = _without_this_package(cfg.to_dict())
    plain[MODEL] = _innermost(cfg, layers)
    if names and network is not None:
        plain = config_for_network(plain, network, names)
    return Config(plain, filename=cfg.filename)


def _layers(spec: dict | str, key: str) -> Iterator[tuple[ConfigDict, str]]:
    """Model and config key of each extension in a stack, from the outermost to the plain model."""
    while True:
        model: ConfigDict = resolve_model_cfg(spec, key) if key != MODEL else spec
        yield model, key
        name = registered_name(model.get('type'), MODELS)
        inner = INNER_MODELS.get(name) if name else None
        if inner not in model:
            return
        spec, key = model[inner], f'{key}.{inner}'


def _peel(cfg: Config, network: str | None) -> list[ConfigDict]:
    """The models of a stack; below several networks it goes on with the named one."""
    layers = list(_layers(cfg.model, MODEL))
    model, key = layers[-1]
    if _is_collaborative(model):
        if network not in model['students']:
            raise ValueError(
                f"`network` should be one of {', '.join(model['students'])}. Found '{network}'."
            )
        layers += _layers(model['students'][network], f'{key}.students.{network}')
    return [layer for layer, _ in layers]


def _innermost(cfg: Config, layers: list[ConfigDict]) -> dict:
    """The plain model's config; without a data preprocessor it gets that of an extension."""
    *extensions, model = layers
    preprocessor = cfg.get('data_preprocessor')
    for extension in extensions:
        preprocessor = extension.get('data_preprocessor') or preprocessor
    if preprocessor:
        model.setdefault('data_preprocessor', preprocessor)
    model = model.to_dict()
    if model['_scope_'] == cfg.get('default_scope'):
        del model['_scope_']
    return model


def _is_collaborative(model: Mapping) -> bool:
    return is_of_this_package(model) and 'students' in model


def _without_this_package(config: dict) -> dict:
    """Copy a config without hooks and imports of this package."""
    default_hooks = config.pop('default_hooks', None) or {}
    custom_hooks = config.pop('custom_hooks', None) or []
    kept = dict(
        default_hooks={
            k: hook for k, hook in default_hooks.items() if not is_of_this_package(hook)
        },
        custom_hooks=[hook for hook in custom_hooks if not is_of_this_package(hook)],
        custom_imports=_other_imports(config.pop('custom_imports', None) or {}),
    )
    return {**config, **{key: value for key, value in kept.items() if value}}


def _other_imports(imports: Mapping) -> dict:
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else names
    names = [name for name in names if name.partition('.')[0] != SCOPE]
    return {**imports, 'imports': names} if names else {}
