"""BERT4Rec at several sizes: data, training, cost and measurement. Importing this does no work."""

import sys

# Commands that had a module of their own: `python -m reclib.grid` says what it is called now.
_FORMER = {
    "study": "", "data": "data", "fit": "fit", "grid": "grid", "scoring": "score", "scaling": "predict",
    "tune": "tune", "planner": "plan", "hardware": "device", "model": "sizes", "pictures": "pictures",
}  # fmt: skip
if sys.argv[:1] == ["-m"]:  # while Python looks for the module to run
    for _name in sys.orig_argv[1:4]:
        if _name.startswith("reclib.") and _name[7:] in _FORMER:
            sys.exit(f"{_name} is now: python -m reclib {_FORMER[_name[7:]]}".rstrip())
