"""`python -m pruneflow`."""

from pruneflow.cli import main

if __name__ == "__main__":
    main()
