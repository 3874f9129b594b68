"""`python docker/run_folder.py RECIPE [key=value ...]`: the folder of that run, or the fault of the recipe."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.errors import UserError
from pipeline.recipe import Recipe

if __name__ == "__main__":
    try:
        print(Recipe.load(sys.argv[1], [word for word in sys.argv[2:] if not word.startswith("--")]).run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
