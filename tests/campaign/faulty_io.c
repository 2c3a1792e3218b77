/* Makes calls of the C library fail, as on a broken file system. It is loaded with LD_PRELOAD.

   FAULT_PATH   only files whose path contains this text
   FAULT_CALLS  which calls: "read" (open for reading, read, pread), or "write" (create, write, pwrite, fsync, mkdir)
   FAULT_ERRNO  the error number
   FAULT_COUNT  how many calls fail before all is well again; -1: all
   FAULT_AFTER  a file that must exist before the first failure; empty: at once */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int failed;

static int wanted(const char *path, const char *calls) {
  const char *part = getenv("FAULT_PATH"), *which = getenv("FAULT_CALLS"), *after = getenv("FAULT_AFTER");
  const char *count = getenv("FAULT_COUNT");
  if (!path || !part || !which || strcmp(which, calls) || !strstr(path, part)) return 0;
  if (after && *after && faccessat(AT_FDCWD, after, F_OK, 0)) return 0;
  int most = count ? atoi(count) : -1;
  if (most >= 0 && atomic_fetch_add(&failed, 1) >= most) return 0;
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}

static int wanted_fd(int fd, const char *calls) {
  char link[64], path[4096];
  if (!getenv("FAULT_PATH")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return wanted(path, calls);
}

static int wanted_open(const char *path, int flags) {
  return wanted(path, flags & (O_WRONLY | O_RDWR | O_CREAT) ? "write" : "read");
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Defines a call that opens a file. `arguments` are its parameters before `flags`, and `passed` their names. */
#define OPEN(name, arguments, passed)                                  \
  int name(UNPACK arguments, int flags, ...) {                         \
    mode_t mode = 0;                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                               \
      va_list list;                                                    \
      va_start(list, flags);                                           \
      mode = va_arg(list, mode_t);                                     \
      va_end(list);                                                    \
    }                                                                  \
    REAL(name);                                                        \
    return wanted_open(path, flags) ? -1 : real(UNPACK passed, flags, mode); \
  }
#define UNPACK(...) __VA_ARGS__
OPEN(open, (const char *path), (path))
OPEN(open64, (const char *path), (path))
OPEN(openat, (int folder, const char *path), (folder, path))
OPEN(openat64, (int folder, const char *path), (folder, path))

/* Defines a call on an open file. `arguments` are its parameters after the file, and `passed` their names. */
#define ON_FILE(kind, type, name, arguments, passed)                   \
  type name(int fd UNPACK arguments) {                                 \
    REAL(name);                                                        \
    return wanted_fd(fd, kind) ? -1 : real(fd UNPACK passed);          \
  }
ON_FILE("read", ssize_t, read, (, void *buffer, size_t size), (, buffer, size))
ON_FILE("read", ssize_t, pread, (, void *buffer, size_t size, off_t offset), (, buffer, size, offset))
ON_FILE("read", ssize_t, pread64, (, void *buffer, size_t size, off64_t offset), (, buffer, size, offset))
ON_FILE("write", ssize_t, write, (, const void *buffer, size_t size), (, buffer, size))
ON_FILE("write", ssize_t, writev, (, const struct iovec *parts, int count), (, parts, count))
ON_FILE("write", ssize_t, pwrite, (, const void *buffer, size_t size, off_t offset), (, buffer, size, offset))
ON_FILE("write", ssize_t, pwrite64, (, const void *buffer, size_t size, off64_t offset), (, buffer, size, offset))
ON_FILE("write", int, fsync, (), ())

int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return wanted(path, "write") ? -1 : real(path, mode);
}
