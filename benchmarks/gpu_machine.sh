#!/bin/bash
# The GPU suite on a machine that can download nothing: what it lacks comes in pieces (gpu_pieces.py) in the folder .gpu.
#
#   bash benchmarks/gpu_machine.sh first  [SECONDS]    # the seam and the ceilings; keeps the pieces that came along
#   bash benchmarks/gpu_machine.sh ours   [SECONDS]    # the demo and SD 1.5 through ONNX Runtime, eager torch beside them
#   bash benchmarks/gpu_machine.sh ways   [SECONDS]    # other ways to run the same engines; then what is left
#   bash benchmarks/gpu_machine.sh peers  [SECONDS]    # torch and diffusers, compiled too
#   bash benchmarks/gpu_machine.sh rtx    [SECONDS]    # TensorRT for RTX
#   bash benchmarks/gpu_machine.sh rehearse [SECONDS]  # the same flow on a processor
#   bash benchmarks/gpu_machine.sh parts  SECONDS NAMES  # parts by name, see gpu_suite.py
#
# Pieces are moved to KEPT (default /tmp/p) and joined there once all of a set have come; bundles and engines are kept there
# too, and what an earlier call measured is in the later ones' tables. Results go to OUT: gpu.json, gpu.md and log.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-python3} KEPT=${KEPT:-/tmp/p} OUT=${OUT:-$PWD/.cache/gpu} PIECES=${PIECES:-.gpu}
export PYTHONUNBUFFERED=1
OURS="sd15 bench cuda,sd15 bench cuda launched,sd15 verify cuda,sd15 profile cuda,sd15 kernels cuda,demo pictures cuda"
OURS="$OURS,demo bench cuda,demo verify cuda,sd15 torch recorded"
OURS="$OURS,sd15 torch eager,sd15 bench"
LARGER="turbo bench cuda,turbo verify cuda,turbo torch recorded,sdxl cuda,sdxl torch recorded"

said() { echo "[$SECONDS s] $*"; }

join() { # joins a set whose pieces have all come, once
  for name in "$@"; do
    [ -f "$KEPT/$name.json" ] && [ ! -d "$KEPT/site/$name" ] || continue
    if missing=$("$PYTHON" benchmarks/gpu_pieces.py join "$KEPT" "$name" "$KEPT/site/$name" 2>&1); then
      said "$name is unpacked"
    else
      said "$missing"
    fi
  done
}

paths() { # what was joined comes before what is installed, and CUDA's libraries are found beside torch
  PYTHONPATH=$PWD/src
  for name in wheels ort rtx; do [ -d "$KEPT/site/$name" ] && PYTHONPATH=$PYTHONPATH:$KEPT/site/$name; done
  export PYTHONPATH
  libraries=$("$PYTHON" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib")))')
  export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

found() { # whether the product finds CUDA's libraries itself, where nothing says where they are
  env -u LD_LIBRARY_PATH "$PYTHON" -c '
import pathlib, tempfile, onnx
from latentrt.engines.onnxruntime import session
node = onnx.helper.make_node("MatMul", ["x", "x"], ["y"])
x, y = (onnx.helper.make_tensor_value_info(name, 1, [2, 2]) for name in "xy")
model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 23)])
path = pathlib.Path(tempfile.mkdtemp()) / "model.onnx"
onnx.save(model, path)
print(session.open_session(path, session.session_options(threads=1), "cuda").get_providers())' 2>&1 | tail -1
}

suite() { # SECONDS PARTS
  said "parts: $2"
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/gpu_suite.py ${3:-} --work "$KEPT/work" --bundles "$KEPT/site/bundles" --seconds "$1" \
    ${2:+--parts "$2"} --after "$KEPT/gpu.json" --output "$OUT/gpu.json"
  code=$?
  [ -f "$OUT/gpu.json" ] && cp "$OUT/gpu.json" "$KEPT/gpu.json"
  said "exit code $code"
  return $code
}

run() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.draw --format=csv,noheader 2>&1
  [ -d "$PIECES" ] && for piece in "$PIECES"/*.*; do [ -f "$piece" ] && mv "$piece" "$KEPT/"; done
  join wheels ort rtx bundles larger
  [ -d "$KEPT/site/larger" ] && mkdir -p "$KEPT/site/bundles" && ln -f "$KEPT"/site/larger/* "$KEPT/site/bundles/"
  paths
  said "ready: $("$PYTHON" -c 'import sys, onnxruntime; print(sys.version.split()[0], onnxruntime.__version__, onnxruntime.get_available_providers())' 2>&1 | tail -1)"
  said "without LD_LIBRARY_PATH: $(found)"
  case $1 in
    first) suite "${2:-120}" "seam,ceilings" ;;
    ours) suite "${2:-240}" "$OURS" ;;
    ways) suite "${2:-240}" "$OURS,$LARGER,sd15 diffusers eager,sd15 torch compiled" ;;
    peers) suite "${2:-240}" "ceilings,sd15 torch,sd15 diffusers eager,sdxl torch eager" ;;
    rtx) suite "${2:-240}" "demo tensorrt-rtx,sd15 tensorrt-rtx" ;;
    rehearse) suite "${2:-900}" "" --cpu ;;
    parts) suite "$2" "$3" ;;
    *) sed -n '2,14p' "${BASH_SOURCE[0]}"; return 2 ;;
  esac
}

mkdir -p "$KEPT" "$OUT"
run "$@" 2>&1 | tee "$OUT/log"
