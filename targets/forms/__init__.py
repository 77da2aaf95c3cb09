"""Legal forms that the shipped targets register, one concern a module; each relies on a contract alone."""
