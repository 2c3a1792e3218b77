"""Prints the numbers of a pre-training run: loss at both ends, and kNN before and after, beside the teacher.

python scripts/summarize.py runs/quickstart
"""

import json
import sys
from pathlib import Path


def main(workdir: str) -> None:
  lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  trained = [line for line in lines if "loss" in line]
  evaluated = [line for line in lines if "knn/student_accuracy" in line]
  first, last = evaluated[0], evaluated[-1]
  print(
    f"\n{workdir}: {trained[-1]['step']} steps, loss {trained[0]['loss']:.4f} -> {trained[-1]['loss']:.4f}"
  )
  print("kNN accuracy on CIFAR-10 (frozen features, mean of the patch tokens)")
  print(f"  untrained student   {100 * first['knn/student_accuracy']:5.1f} %")
  print(f"  student             {100 * last['knn/student_accuracy']:5.1f} %   (step {last['step']})")
  print(f"  teacher             {100 * last['knn/teacher_accuracy']:5.1f} %")
  print(f"picture: {Path(workdir) / 'groups.png'}")


if __name__ == "__main__":
  main(*sys.argv[1:])
