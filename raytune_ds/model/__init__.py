"""Models: their weights, how they are held, and what is trained of them."""

import logging

# bitsandbytes, which peft imports wherever it is installed, misses optional kernels aloud.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
