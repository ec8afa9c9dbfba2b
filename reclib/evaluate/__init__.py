"""Ranking metrics, baselines, and statistics of comparisons.

The package is callable: `reclib.evaluate(model, dataset)` is `metrics.evaluate`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    # Importing any module of this package sets `reclib.evaluate` to the package, which is therefore callable.
    def __call__(self, *arguments: Any, **options: Any) -> dict[str, float]:
        from reclib.evaluate import metrics

        return metrics.evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
