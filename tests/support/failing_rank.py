"""``hyperformer-fast train`` of two processes, one of which is killed, or raises, at its third step.

Arguments: ``kill`` or ``raise``, then those of the command.
"""

from __future__ import annotations

import os
import signal
import sys

from transformers import TrainerCallback

from hyperformer_fast.cli import main
from hyperformer_fast.training.arguments import RunArguments


class Failing(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            if sys.argv[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("bad row")


if __name__ == "__main__":
    callbacks = RunArguments.callbacks
    RunArguments.callbacks = lambda self: [*callbacks(self), Failing()]
    sys.exit(main(sys.argv[2:]))
