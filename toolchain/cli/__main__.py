"""``python -m toolchain.cli``."""

from toolchain.cli.app import main

if __name__ == "__main__":
    main()
