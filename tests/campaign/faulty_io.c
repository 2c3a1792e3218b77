/* Makes calls of the C library fail, as a file system in trouble does. Loaded with LD_PRELOAD.

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

#define OPEN(name)                                          \
  int name(const char *path, int flags, ...) {              \
    mode_t mode = 0;                                        \
    if (flags & (O_CREAT | O_TMPFILE)) {                    \
      va_list list;                                         \
      va_start(list, flags);                                \
      mode = va_arg(list, mode_t);                          \
      va_end(list);                                         \
    }                                                       \
    REAL(name);                                             \
    return wanted_open(path, flags) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                        \
  int name(int folder, const char *path, int flags, ...) {  \
    mode_t mode = 0;                                        \
    if (flags & (O_CREAT | O_TMPFILE)) {                    \
      va_list list;                                         \
      va_start(list, flags);                                \
      mode = va_arg(list, mode_t);                          \
      va_end(list);                                         \
    }                                                       \
    REAL(name);                                             \
    return wanted_open(path, flags) ? -1 : real(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int fd, void *buffer, size_t size) {
  REAL(read);
  return wanted_fd(fd, "read") ? -1 : real(fd, buffer, size);
}
ssize_t pread(int fd, void *buffer, size_t size, off_t offset) {
  REAL(pread);
  return wanted_fd(fd, "read") ? -1 : real(fd, buffer, size, offset);
}
ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset) {
  REAL(pread64);
  return wanted_fd(fd, "read") ? -1 : real(fd, buffer, size, offset);
}
ssize_t write(int fd, const void *buffer, size_t size) {
  REAL(write);
  return wanted_fd(fd, "write") ? -1 : real(fd, buffer, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  return wanted_fd(fd, "write") ? -1 : real(fd, parts, count);
}
ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset) {
  REAL(pwrite);
  return wanted_fd(fd, "write") ? -1 : real(fd, buffer, size, offset);
}
ssize_t pwrite64(int fd, const void *buffer, size_t size, off64_t offset) {
  REAL(pwrite64);
  return wanted_fd(fd, "write") ? -1 : real(fd, buffer, size, offset);
}
int fsync(int fd) {
  REAL(fsync);
  return wanted_fd(fd, "write") ? -1 : real(fd);
}
int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return wanted(path, "write") ? -1 : real(path, mode);
}
