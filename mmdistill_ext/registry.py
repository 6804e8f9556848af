"""Child registries of mmengine's, scope ``mmdistill_ext``.

A config names a part of this package as ``type='mmdistill_ext.SelectiveLoss'`` whatever its
``default_scope`` is; between the parts themselves ``_scope_`` is filled in where it is missing.
"""

from mmengine import registry as _root
from mmengine.registry import Registry

SCOPE = 'mmdistill_ext'

MODELS = Registry('model', parent=_root.MODELS, scope=SCOPE, locations=['mmdistill_ext'])
HOOKS = Registry('hook', parent=_root.HOOKS, scope=SCOPE, locations=['mmdistill_ext'])
TRANSFORMS = Registry(
    'transform', parent=_root.TRANSFORMS, scope=SCOPE, locations=['mmdistill_ext']
)
EVALUATOR = Registry('evaluator', parent=_root.EVALUATOR, scope=SCOPE, locations=['mmdistill_ext'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=_root.OPTIM_WRAPPER_CONSTRUCTORS,
    scope=SCOPE,
    locations=['mmdistill_ext'],
)
CONNECTORS = Registry('connector', scope=SCOPE, locations=['mmdistill_ext'])
SECOND_PREDICTIONS = Registry('second prediction', scope=SCOPE, locations=['mmdistill_ext'])
FIT_FUNCTIONS = Registry('fit function', scope=SCOPE, locations=['mmdistill_ext'])
