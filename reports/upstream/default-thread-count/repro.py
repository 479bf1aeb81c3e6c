"""On x86 the runtime takes half of the logical processors for cores, whether or not they are.

    python repro.py

Prints the processors, the threads per core that Linux knows of, and the threads TVM starts.
"""

import os
from pathlib import Path

for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.pop(name, None)

import tvm  # noqa: E402  (the variables are read by the runtime)

siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
print("processors this process may use:", len(os.sched_getaffinity(0)))
print("siblings of processor 0:", siblings.read_text().strip() if siblings.exists() else "unknown")
print("threads of tvm.runtime.num_threads:", tvm.runtime.num_threads())
