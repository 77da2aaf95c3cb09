"""How the tiny checkpoint is made; kept out of the installed package. See ``python -m training.train --help``."""
