"""`python -m snapstone` is the `snapstone` command."""

from .cli import main

if __name__ == "__main__":
    main()
