"""`python -m fedpress` is the command line, where its script is not on the path."""

from fedpress.cli import main

if __name__ == "__main__":
    main()
