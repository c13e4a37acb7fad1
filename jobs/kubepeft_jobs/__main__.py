"""python -m kubepeft_jobs prepare|train|infer: runs the stage whose document is in KUBEPEFT_STAGE."""

import sys

from kubepeft_jobs.supervisor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
