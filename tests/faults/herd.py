"""``python -m tests.faults.herd COUNT STUDY STORAGE``: that many workers, attached all at once.

They are forked from one process when everything is imported, so that they begin at the same instant
and share the memory of what they have in common. Prints their exit codes and sizes as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import psycopg
import pymysql
import sqlalchemy.dialects.postgresql.psycopg

import hpsched.summary
import hpsched.worker
from hpsched.cli import main

IMPORTED = (psycopg, pymysql, sqlalchemy.dialects.postgresql.psycopg, hpsched.summary)


def herd(count: int, study: str, storage: str) -> None:
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages it shares
    wait, go = os.pipe()
    children = []
    for index in range(count):
        if (pid := os.fork()) == 0:
            os.close(go)
            os.read(wait, 1)  # until the parent closes its end
            os._exit(attach(index, study, storage))
        children.append(pid)
    os.close(go)
    ends = [os.wait4(pid, 0) for pid in children]
    codes = [os.waitstatus_to_exitcode(status) for _, status, _ in ends]
    sizes = sorted(usage.ru_maxrss // 1024 for _, _, usage in ends)
    figures = {"median MiB": sizes[len(sizes) // 2], "largest MiB": sizes[-1]}
    print(json.dumps({"codes": codes, **figures}))


def attach(index: int, study: str, storage: str) -> int:
    log = os.open(f"herd{index}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["hpsched", "worker", "attach", study, "--storage", storage]
    try:
        main()
        code: object = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    herd(int(sys.argv[1]), sys.argv[2], sys.argv[3])
