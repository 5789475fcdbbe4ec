"""Configuration: where conf/ lies, the schema, and the checks. Imports neither torch nor vllm."""

from pathlib import Path

from powerflow_lit.config.resolvers import register_resolvers

register_resolvers()


def conf_dir() -> str:
    """conf/ of the source tree, or the copy inside an installed wheel."""
    packaged = Path(__file__).parents[1] / "conf"
    source = Path(__file__).parents[3] / "conf"
    return str(packaged if packaged.is_dir() else source)
