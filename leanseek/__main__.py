import os
import sys

# `python -m` puts the current folder first, where a struct.py of somebody's would stand for Python's own.
if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from leanseek.cli import main

main()
