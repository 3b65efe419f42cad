"""`python -m relora.config` prints docs/config.md."""

from relora.config.reference import markdown

if __name__ == "__main__":
    print(markdown(), end="")
