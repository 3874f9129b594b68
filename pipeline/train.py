"""The main command: `deepspeed pipeline/train.py RECIPE [key=value ...]`, or plain `python`, as one rank.

Exit codes: 0 done, 1 our fault (with a traceback), 2 the user's fault (one message), 75 stopped and ready to go on.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python pipeline/train.py` puts this folder first, where our file names could shadow a library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import traceback

from data_prep.errors import UserError
from pipeline.recipe import Recipe
from pipeline.stopping import STOPPED_EXIT_CODE, Stopped, StopRequest


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="deepspeed pipeline/train.py", description="Learn a stream of tasks as a recipe says, and report it."
    )
    parser.add_argument("recipe", help="a recipe file, such as recipes/tiny_t5_order1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as method=seqlora zero=3 seed=1")
    parser.add_argument("--plan", action="store_true", help="print what a run would do, and train nothing")
    parser.add_argument("--share", action="store_true", help="take equal stages over from the runs beside this one")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher appends it
    options = parser.parse_intermixed_args()
    stop = StopRequest()  # before anything slow, so that no signal finds its default action
    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe = Recipe.load(options.recipe, options.overrides)
        if options.plan:
            from pipeline.plan import format_plan

            if first:
                print(format_plan(recipe, world=int(os.environ.get("WORLD_SIZE", "1"))))
            return 0
        # Not at the top: a typing error in a recipe is told at once, before DeepSpeed takes seconds to load.
        from pipeline.runs import run

        run(recipe, stop, share=options.share)
    except UserError as error:
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Stopped as reason:
        if first:
            print(f"stopped: {reason}; run the same command again to go on", file=sys.stderr, flush=True)
        return STOPPED_EXIT_CODE
    except KeyboardInterrupt:
        return STOPPED_EXIT_CODE
    except Exception:
        if stop.reason():  # another rank, told to stop as well, was gone first
            return STOPPED_EXIT_CODE
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Other ranks may wait in a collective that this one will never enter: no orderly farewell then.
        os._exit(code)
    sys.exit(0)
