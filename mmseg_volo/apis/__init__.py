"""The calls behind the tools."""

from .config import add_config_arguments
from .demo import demo
from .infer import infer
from .test import test
from .train import train

__all__ = ['add_config_arguments', 'demo', 'infer', 'test', 'train']
