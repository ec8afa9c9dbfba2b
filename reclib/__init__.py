"""BERT4Rec at several sizes: data, training, cost and measurement.

The names of `_NAMES` are imported when they are first used: `import reclib` itself loads no other module.
"""

import importlib
from typing import Any

_NAMES = {
    "DataConfig": "config:DataConfig",
    "ModelConfig": "config:ModelConfig",
    "TrainConfig": "config:TrainConfig",
    "prepare": "data.prepare:prepare",
    "Bert4Rec": "model.bert4rec:Bert4Rec",
    "fit": "train.fit:fit_recommender",
    "evaluate": "evaluate:",  # the package `reclib.evaluate` itself, which can be called
    "add_ilora": "model.ilora:add_ilora",
    "plan": "cost.planner:plan_size",
    "load": "train.saving:load_model",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'reclib' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    value = importlib.import_module(f"reclib.{module}")
    return getattr(value, attribute) if attribute else value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
