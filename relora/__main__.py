"""`python -m relora` is the same program as `relora`."""

from relora.cli import program

if __name__ == "__main__":
    program()
