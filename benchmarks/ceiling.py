"""Measure the ceilings of a device: large matrix products of several types, and memory bandwidth.

    python -m benchmarks.ceiling --size=8192 --repeats=10

"bf16" is the ceiling that MFU is relative to. "float32, HIGHEST" is what matching uses for its similarities.
"float32 as three bf16 products" has 16 bits of precision. The bandwidth is that of y = x + 1, which reads and
writes every number once.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks import measuring

BF16, MEMORY = "bf16", "memory, GB/s"
PRODUCTS = {
  BF16: ("bfloat16", jax.lax.Precision.DEFAULT),
  "float32, HIGHEST": ("float32", jax.lax.Precision.HIGHEST),
  "float32 as three bf16 products": ("float32", jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3),
}


def parse(argv=None):
  """Return the options. Without --size and --gib, they suit the device."""
  parser = measuring.make_parser(__doc__, "ceiling", size=0, repeats=10, mib=0)
  args = parser.parse_args(argv)
  on_cpu = jax.default_backend() == "cpu"
  args.size, args.mib = args.size or (1024 if on_cpu else 8192), args.mib or (64 if on_cpu else 2048)
  return args


def calls(args):
  """Return the calls to time by name, and the operations or bytes of each."""
  size, amounts, functions = args.size, {}, {}
  for name, (dtype, precision) in PRODUCTS.items():
    left, right = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    functions[name] = lambda i, product=product, left=left, right=right: product(left, right)
    amounts[name] = 2 * size**3
  x = jnp.zeros(args.mib * 2**20 // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  functions[MEMORY] = lambda i: add(x)
  amounts[MEMORY] = 2 * x.nbytes
  return functions, amounts


def collect(args) -> dict:
  """Return TFLOP/s by type of product, and GB/s of memory. A product that the device lacks is left out."""
  functions, amounts = calls(args)
  rates = {}
  for name, call in functions.items():
    try:
      times, _ = measuring.interleaved({name: call}, args.repeats)
    except jax.errors.JaxRuntimeError as error:
      print(f"{name}: {str(error).splitlines()[0]}", flush=True)
      continue
    rates[name] = measuring.quartiles(amounts[name] / times[name] / (1e9 if name == MEMORY else 1e12))
  return rates


def main(argv=None):
  args = parse(argv)
  rates = collect(args)
  unit = lambda name: name if name == MEMORY else f"{name} product, TFLOP/s"
  rows = [[unit(name), measuring.spread(rate, ".4g")] for name, rate in rates.items()]
  body = (
    f"Products of {args.size} x {args.size} matrices and {args.mib} MiB of float32; median and quartiles of "
    f"{args.repeats} calls.\n\n" + measuring.table(["ceiling", "value"], rows)
  )
  print(measuring.report(
    args.out, args.name, title="Ceilings of the device", module="benchmarks.ceiling", note=args.note,
    body=body, record={"size": args.size, "mib": args.mib, "rates": rates},
  ))  # fmt: skip


if __name__ == "__main__":
  main()
