"""Training on the engine is tested where OLMo-core is installed, by `make test-engine`; files and plans everywhere."""

from importlib.util import find_spec
from pathlib import Path

_ANYWHERE = {"test_command.py", "test_plan.py", "test_run_file.py", "test_whole.py"}

collect_ignore = (
    []
    if find_spec("olmo_core")
    else [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in _ANYWHERE]
)
