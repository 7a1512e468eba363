"""The five-minute demo: captioned shapes at 32 px."""
from config import Config, ModelConfig

config = Config(out="out/demo", augment="", model=ModelConfig(width=128, depth=6, heads=4, patch=4))
