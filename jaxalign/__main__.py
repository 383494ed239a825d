"""`python -m jaxalign VERB ...`, where the command itself is not on the path."""

from jaxalign.cli.main import run

if __name__ == "__main__":
    run()
