"""``python -m studies.bench``: the command line is in :mod:`studies.bench.command`."""

import os

if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # a process for each core; its threads would fight over it
    from studies.bench.command import main

    main()
