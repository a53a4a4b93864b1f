"""Evaluate a bucketed model on a GLUE task beside torch and transformers' pipeline: the same as ``hf-bucket eval``.

python scripts/eval.py --task mrpc --model org/model --buckets 64,128

Exit status: 0 when all labels are torch's, 1 when a label flipped or the evaluation failed, 2 for wrong usage.
"""

import sys

from hf_bucket.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
