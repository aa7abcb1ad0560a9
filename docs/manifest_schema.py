"""Print the JSON Schema of manifest.json: `python docs/manifest_schema.py > docs/manifest.schema.json`."""

import json

from zerolith.checkpoint.manifest import Manifest


def manifest_schema() -> str:
    """What docs/manifest.schema.json holds."""
    schema = Manifest.model_json_schema()
    schema["title"] = "manifest.json of a zerolith checkpoint"
    schema["description"] = "Without the trailing member xxh3, which docs/checkpoint-format.md describes."
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(manifest_schema(), end="")
