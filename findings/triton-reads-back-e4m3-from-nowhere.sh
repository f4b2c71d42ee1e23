#!/usr/bin/env bash
# Question: a kernel looks numbers up in a table, rounds them to e4m3, stores the rounded numbers, and beside them what
# the rounding took away, which is the number less the rounded one. Triton 3.6 compiles it for an H100 or H200. Does the
# machine code subtract the rounded numbers?
#
# One would guess: yes, all of them.
# Behaviour: of 16 pairs of numbers that are turned back from e4m3, 8 are read from a register that was never given a
# rounded number (the stack's pointer). PTX is right; the assembler that comes with Triton 3.6 (ptxas 12.8.93) merges two
# pairs into one register for the store and loses the pair that is read back. Triton 3.9 (12.9.86) reads 16 of 16 rightly.
# Why it matters: half of the numbers are wrong, in silence, and under Triton's interpreter all are right. It takes a GPU
# to see it run, and none to see it in the code.
# Seen on 2026-11-30 with triton 3.6.0 and 3.9.0, on a CPU; on an NVIDIA H200 with Triton 3.6.0 products that were made
# of such numbers were 0.7 of their size off.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import re
import subprocess
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def rounded_and_lost(codes, table, factors, rounded, lost, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    chosen = tl.load(factors + column).to(tl.int32)
    code = tl.load(codes + row[:, None] * stride + chosen[None, :]).to(tl.int32) & 15
    exact = tl.load(table + code) * tl.load(factors + row)[:, None]
    eight = exact.to(tl.float8e4nv)
    at = row[:, None] * stride + column[None, :]
    tl.store(lost + at, (exact - eight.to(tl.float32)).to(tl.float8e4nv))
    tl.store(rounded + at, eight)


kinds = {"codes": "*u8", "table": "*fp32", "factors": "*fp32", "rounded": "*fp8e4nv", "lost": "*fp8e4nv", "stride": "i32"}
source = ASTSource(
    rounded_and_lost, signature={**kinds, "ROWS": "constexpr", "COLUMNS": "constexpr"},
    constexprs={(6,): 32, (7,): 64}, attrs={(place,): [["tt.divisibility", 16]] for place in range(6)},
)
compiled = triton.compile(
    source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2, "enable_fp_fusion": False}
)
binary = Path("kernel.cubin")
binary.write_bytes(compiled.asm["cubin"])
tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
code = subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True).stdout
written, read, wrong = {}, 0, 0
for line in re.sub(r"/\*.*?\*/", "", code).splitlines():
    found = re.match(r"\s*(?:@!?U?P\d+ )?(\S+) (R\d+), (.*) ;", line)
    if not found:
        continue
    operation, register, operands = found.groups()
    if "UNPACK_B" in operation:
        before = written.get(re.search(r"R\d+", operands).group(), "nothing")
        read += 1
        if "PACK_AB" not in before and "PRMT" not in before:
            wrong += 1
            example = f"{line.strip()} where before stands: {before.strip()}"
    written[register] = line
print(f"triton {triton.__version__}: {read} pairs of e4m3 turned back, {wrong} of no rounded numbers")
if wrong:
    print(f"  {example}")
Path("counts").write_text(f"{read} {wrong}")
PYTHON
seen=""
for version in 3.6.0 3.9.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "triton==$version"
  (cd "$work" && TRITON_CACHE_DIR="$work/cache-$version" PYTHONWARNINGS=ignore "$work/$version/bin/python" look.py)
  seen="$seen$(cut -d' ' -f2 < "$work/counts") "
done
if [ "$seen" = "8 0 " ]; then echo "as seen on 2026-11-30"; else echo "CHANGED since 2026-11-30: $seen"; exit 1; fi
