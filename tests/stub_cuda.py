"""CUDA's libraries as stubs: memory is the host's, and no kernel does anything.

ONNX Runtime's CUDA provider, the real one of its wheel, opens sessions on them on a machine without a GPU: it chooses
kernels, lays graphs out, and says which nodes it would leave to the CPU. What a session computes there is nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

NEEDED = ("libcuda.so.1", "libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13", "libcurand.so.10")
# What must do more than say that all went well. cudaDeviceProp is CUDA 13's: name, memory, limits, version, processors.
TRUE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaDriverGetVersion(int *n) { *n = 13000; return 0; }
int cudaRuntimeGetVersion(int *n) { *n = 13000; return 0; }
int cudaMalloc(void **p, size_t n) { *p = 0; return posix_memalign(p, 256, n ? n : 256) ? 2 : 0; }
int cudaMallocHost(void **p, size_t n) { return cudaMalloc(p, n); }
int cudaHostAlloc(void **p, size_t n, unsigned f) { return cudaMalloc(p, n); }
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemcpy(void *d, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }
int cudaMemcpyAsync(void *d, const void *s, size_t n, int k, void *t) { memcpy(d, s, n); return 0; }
int cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }
int cudaMemsetAsync(void *d, int v, size_t n, void *t) { memset(d, v, n); return 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = (size_t)80 << 30; return 0; }
static int make(void **p) { *p = calloc(1, 64); return 0; }
int cudaStreamCreate(void **p) { return make(p); }
int cudaStreamCreateWithFlags(void **p, unsigned f) { return make(p); }
int cudaEventCreate(void **p) { return make(p); }
int cudaEventCreateWithFlags(void **p, unsigned f) { return make(p); }
int cudaMemPoolCreate(void **p, void *q) { return make(p); }
int cudaStreamIsCapturing(void *s, int *is) { *is = 0; return 0; }
const char *cudaGetErrorString(int e) { return "a stub's error"; }
const char *cudaGetErrorName(int e) { return "stub"; }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : 1024; return 0; }
int cudaGetDeviceProperties(char *p, int d) {
    memset(p, 0, 1008);
    strcpy(p, "Stub");
    *(size_t *)(p + 288) = (size_t)80 << 30;
    *(size_t *)(p + 296) = 49152;
    *(int *)(p + 304) = 65536;
    *(int *)(p + 308) = 32;
    *(int *)(p + 320) = 1024;
    ((int *)(p + 324))[0] = ((int *)(p + 324))[1] = 1024, ((int *)(p + 324))[2] = 64;
    ((int *)(p + 336))[0] = 2147483647, ((int *)(p + 336))[1] = ((int *)(p + 336))[2] = 65535;
    *(int *)(p + 360) = 9;
    *(int *)(p + 384) = 132;
    return 0;
}
void **__cudaRegisterFatBinary(void *f) { return calloc(1, 64); }
int __cudaGetKernel(void **k, void *f) { *k = f; return 0; }
"""


def make_stubs(provider: Path, folder: Path) -> None:
    """Write stubs of the libraries that ONNX Runtime's CUDA provider is linked with. Needs a C compiler and nm."""
    made = {line.split("(")[0].split()[-1].lstrip("*") for line in TRUE.splitlines() if line.endswith("}")}
    made |= {"cudaGetDeviceProperties"}
    for library, names in _undefined(provider).items():
        source = folder / f"{library}.c"
        empty = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names if name not in made)
        source.write_text(empty + (TRUE if "cudart" in library else ""))
        version = folder / f"{library}.map"
        version.write_text(f"{library} {{ global: *; }};\n")
        options = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", f"-Wl,--version-script={version}"]
        subprocess.run(["cc", *options, "-o", str(folder / library), str(source)], check=True)


def available() -> bool:
    """Tell whether stubs can be made here."""
    return all(shutil.which(tool) for tool in ("cc", "nm"))


def _undefined(provider: Path) -> dict[str, list[str]]:
    """Return the functions that a library takes from others, by library."""
    told = subprocess.run(["nm", "-D", "--undefined-only", str(provider)], check=True, capture_output=True, text=True)
    found: dict[str, list[str]] = defaultdict(list, {library: [] for library in NEEDED})
    for symbol in (line.split()[-1] for line in told.stdout.splitlines()):
        name, _, library = symbol.partition("@")
        if library.lstrip("@") in NEEDED:
            found[library.lstrip("@")].append(name)
        elif not library and name.startswith("cu"):
            found["libcuda.so.1"].append(name)
    return found
