"""`python -m moe_serve` is the command `moe-serve`."""

from moe_serve.cli import main

if __name__ == "__main__":
    main()
