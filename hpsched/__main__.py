"""``python -m hpsched``: the command line."""

from hpsched.cli import main

if __name__ == "__main__":
    main()
