"""Models: from the text of a config.json to the planes of one rank's memory.

config.py    reading a config: nested ones, defaults, types; the first unknown key refuses it
layers.py    kinds of layers and of attention: what each keeps for every token
families.py  which rule a model_type has (data/models.toml), and where the rule comes from
ranks.py     the layers and heads of one rank, as planes

A number that is too small is worse than a refusal: an engine would write past its memory.
"""

from odma_service.pool.models.config import MOST_CONFIG_BYTES
from odma_service.pool.models.ranks import (
    ModelGeometry,
    Parallel,
    from_model_config,
)

__all__ = ["MOST_CONFIG_BYTES", "ModelGeometry", "Parallel", "from_model_config"]
