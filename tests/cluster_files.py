"""The files of cluster/ and docker/ that the templates make from the default config: `make cluster-files`."""

from __future__ import annotations

from pathlib import Path

import raytune_ds
from raytune_ds.config import Config
from raytune_ds.deploy.render import TARGETS, render

TEMPLATES = Path(raytune_ds.__file__).parent / "deploy" / "templates"
PROJECT = Path(__file__).parents[1]
SHIPPED = {name: PROJECT / t.file for name, t in TARGETS.items() if (TEMPLATES / t.template).exists()}


def main() -> None:
    """Writes them all anew."""
    for target, path in SHIPPED.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(render(Config(), target)[0], encoding="utf-8")
        if path.suffix == ".sh":
            path.chmod(0o755)
        print(path.relative_to(PROJECT))


if __name__ == "__main__":
    main()
