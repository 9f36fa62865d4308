"""capas: what the stages of the pipeline share. One noun per module; the stages tell the story."""

from pathlib import Path

# `dvc exp run --temp` runs stages in a copy of the repository, whose code may be another than that of the
# checkout which is installed: a stage uses the modules that lie beside its dvc.yaml.
_beside = Path.cwd() / "capas"
if (_beside / "__init__.py").exists() and (_beside.parent / "dvc.yaml").exists():
    __path__ = [str(_beside)]
