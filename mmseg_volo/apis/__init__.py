"""The calls behind the tools."""

from .check_data import check_all_data
from .config import add_config_arguments
from .demo import demo
from .infer import infer
from .test import test
from .train import train

__all__ = ['add_config_arguments', 'check_all_data', 'demo', 'infer', 'test', 'train']
