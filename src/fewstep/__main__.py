"""`python -m fewstep` is `fewstep`: the form that torchrun takes (torchrun -m fewstep train ...)."""

import sys

from fewstep.cli import main

if __name__ == "__main__":
    sys.exit(main())
