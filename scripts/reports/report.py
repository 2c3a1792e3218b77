"""Write one HTML page about a run: config, curves, groups of images over time, evaluations, environment.

    python scripts/report.py runs/quickstart                          # runs/quickstart/report.html
    python scripts/report.py runs/a --compare=runs/b --out=ab.html    # two runs side by side
    python scripts/report.py runs/quickstart --figures=figures        # and every curve as an SVG file

The page is one file and loads nothing from elsewhere. WORKDIR may be in a bucket. A run writes its page by
itself when it ends.
"""

from collections.abc import Sequence

from dtm_jax import report
from dtm_jax.errors import OptionError
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.report import page
from dtm_jax.storage import paths, writing


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("workdir", metavar="WORKDIR", help="workdir of a run")
  parser.add_argument("--compare", metavar="WORKDIR", help="another run to show beside it")
  parser.add_argument("--out", metavar="FILE", help="file to write (default: WORKDIR/report.html)")
  parser.add_argument("--figures", metavar="FOLDER", help="folder for the curves as SVG files")
  args = parser.parse_args(argv)
  runs = report.read_runs([args.workdir] + ([args.compare] if args.compare else []))
  out = paths.resolve(args.out) if args.out else paths.resolve(args.workdir) / report.FILE
  if not paths.is_remote(out):
    if out.is_dir():
      raise OptionError(f"--out={args.out} is a folder; name a file, such as {out / report.FILE}.")
    writing.make_writable_folder(out.parent, "the folder of --out")
  if args.figures:
    writing.make_writable_folder(args.figures, "--figures")
  text = page.make(runs)
  writing.write_whole(out, text)
  print(f"{out}: {len(text.encode()) / 1e3:.0f} kB")
  for note in (note for run in runs for note in run.notes):
    print(note)
  if args.figures:
    figures = page.figures(runs)
    with writing.local_folder_for(args.figures) as folder:
      for name, content in figures.items():
        (folder / name).write_text(content)
    print(f"{args.figures}: {len(figures)} figures")


if __name__ == "__main__":
  run_script(main)
