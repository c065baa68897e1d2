"""The calls behind the commands."""

from .demo import run_demo
from .inference import infer
from .testing import test
from .training import train

__all__ = ['infer', 'run_demo', 'test', 'train']
