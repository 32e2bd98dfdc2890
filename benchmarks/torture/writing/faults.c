/* A layer between a process and libc, loaded with LD_PRELOAD: what it does to files below one folder is counted, and
 * the n-th of those calls fails. Python, ONNX Runtime and safetensors all write through these functions.
 *
 * $TORTURE_ROOT is the folder. $TORTURE_BLOCK is a file that all processes of a run share (see `layer.py`), in which
 * the driver says what is to fail, and this layer says how much it saw. $TORTURE_LOG gets a line for each call.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct block {
    atomic_long armed;  /* 0: nothing is counted */
    atomic_long fail;   /* the number of the call that fails, from 1; 0: none */
    atomic_long error;  /* with this errno */
    atomic_long stays;  /* 1: so do the later calls that take room: the disk stays full */
    atomic_long seen;   /* calls so far */
    atomic_long failed; /* how many failed */
};

static struct block *block;
static const char *root;
static int log_handle = -1;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("TORTURE_BLOCK"), *log = getenv("TORTURE_LOG");
    root = getenv("TORTURE_ROOT");
    if (!path || !root || !log) return;
    int handle = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (handle < 0) return;
    void *found = mmap(0, sizeof *block, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
    syscall(SYS_close, handle);
    int wanted = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    log_handle = fcntl(wanted, F_DUPFD_CLOEXEC, 500); /* out of the way of what closes low ones */
    if (found != MAP_FAILED) block = found;
}

/* Count a call; return -1 with errno set if it is the one that fails, 0 if it goes on. */
static int passes(const char *kind, const char *path, int takes_room) {
    if (!block || !block->armed || !path || strncmp(path, root, strlen(root))) return 0;
    long number = ++block->seen;
    int is_it = number == block->fail || (block->stays && block->fail && number > block->fail && takes_room);
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, kind, path);
    if (syscall(SYS_write, log_handle, line, length) < 0) return 0;
    if (!is_it) return 0;
    block->failed++;
    errno = block->error;
    return -1;
}

static int passes_at(const char *kind, int folder, const char *path, int takes_room) {
    char whole[PATH_MAX * 2], place[64];
    if (!path || path[0] == '/') return passes(kind, path, takes_room);
    ssize_t length;
    if (folder == AT_FDCWD)
        length = syscall(SYS_getcwd, whole, PATH_MAX) - 1;
    else {
        snprintf(place, sizeof place, "/proc/self/fd/%d", folder);
        length = syscall(SYS_readlinkat, AT_FDCWD, place, whole, PATH_MAX);
    }
    if (length < 0) return 0;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return passes(kind, whole, takes_room);
}

static int passes_handle(const char *kind, int handle, int takes_room) {
    char place[64], path[PATH_MAX];
    if (!block || !block->armed) return 0;
    int before = errno;
    snprintf(place, sizeof place, "/proc/self/fd/%d", handle);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, place, path, PATH_MAX - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return passes(kind, path, takes_room);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define IS_NEW(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))

static int opens(int folder, const char *path, int flags) {
    if (flags & O_DIRECTORY) return 0;
    return IS_NEW(flags) ? passes_at("create", folder, path, 1) : passes_at("open", folder, path, 0);
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        REAL(name);                                                                                                    \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        return opens(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode);                                            \
    }
#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        REAL(name);                                                                                                    \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        return opens(folder, path, flags) ? -1 : real(folder, path, flags, mode);                                      \
    }
#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        REAL(name);                                                                                                    \
        return opens(AT_FDCWD, path, mode[0] == 'r' ? 0 : O_CREAT) ? NULL : real(path, mode);                          \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

/* A full disk takes a part first: half of it is written, and the call fails all the same. */
ssize_t write(int handle, const void *bytes, size_t count) {
    REAL(write);
    if (!passes_handle("write", handle, 1)) return real(handle, bytes, count);
    int error = errno;
    if (real(handle, bytes, count / 2) >= 0) errno = error;
    return -1;
}

#define WRITES(kind, type, name, parameters, ...)                                                                      \
    type name parameters {                                                                                             \
        REAL(name);                                                                                                    \
        return passes_handle(kind, handle, 1) ? -1 : real(__VA_ARGS__);                                                \
    }
WRITES("write", ssize_t, pwrite, (int handle, const void *bytes, size_t count, off_t at), handle, bytes, count, at)
WRITES("write", ssize_t, pwrite64, (int handle, const void *bytes, size_t count, off64_t at), handle, bytes, count, at)
WRITES("write", ssize_t, writev, (int handle, const struct iovec *parts, int count), handle, parts, count)
WRITES("write", ssize_t, sendfile, (int handle, int from, off_t *at, size_t count), handle, from, at, count)
WRITES("write", ssize_t, sendfile64, (int handle, int from, off64_t *at, size_t count), handle, from, at, count)
WRITES("write", int, ftruncate, (int handle, off_t length), handle, length)
WRITES("write", int, ftruncate64, (int handle, off64_t length), handle, length)
WRITES("sync", int, fsync, (int handle), handle)
WRITES("sync", int, fdatasync, (int handle), handle)

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t count, unsigned flags) {
    REAL(copy_file_range);
    return passes_handle("write", to, 1) ? -1 : real(from, from_at, to, to_at, count, flags);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return passes_at("rename", AT_FDCWD, to, 1) ? -1 : real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    return passes_at("rename", to_folder, to, 1) ? -1 : real(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned int flags) {
    REAL(renameat2);
    return passes_at("rename", to_folder, to, 1) ? -1 : real(from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to) {
    REAL(link);
    return passes_at("link", AT_FDCWD, to, 1) ? -1 : real(from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    REAL(linkat);
    return passes_at("link", to_folder, to, 1) ? -1 : real(from_folder, from, to_folder, to, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return passes_at("mkdir", AT_FDCWD, path, 1) ? -1 : real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    return passes_at("mkdir", folder, path, 1) ? -1 : real(folder, path, mode);
}
