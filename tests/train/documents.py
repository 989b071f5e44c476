"""Documents of several lengths, and JSON lines that hold them."""

import json


def texts(count, prefix="doc"):
    return [f"{prefix} {i}: " + "gates open where sinks close, é\n" * (i % 10) for i in range(count)]


def write(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)
