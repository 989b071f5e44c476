"""The engine's tests run where OLMo-core is installed: `make test-engine`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("olmo_core") else ["*"]
