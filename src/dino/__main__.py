"""`python -m dino`, also under torchrun."""

from dino.cli import main

if __name__ == "__main__":
    main()
