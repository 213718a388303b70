/* A file system that can't do one thing: loaded before libc (LD_PRELOAD).
   FAULT_CALL   lock, symlink, flushdir (fsync of one), fsync or read
   FAULT_ERRNO  what the call fails with (read: it comes short instead)
   FAULT_PATH   only for paths that contain this
   FAULT_TIMES  only so often; without it always */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int fails(const char *call, const char *path) {
    static long times = -2;
    const char *wanted = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH"), *number = getenv("FAULT_TIMES");
    if (!wanted || !strstr(wanted, call) || !path || (part && !strstr(path, part))) return 0;
    if (times == -2) times = number ? atol(number) : -1;
    if (times == 0) return 0;
    if (times > 0) times--;
    errno = getenv("FAULT_ERRNO") ? atoi(getenv("FAULT_ERRNO")) : 0;
    return 1;
}

static const char *path_of(int fd) {
    static __thread char path[4096];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return NULL;
    path[n] = 0;
    return path;
}

static int fcntl_(int fd, int cmd, void *argument) {
    if ((cmd == F_SETLK || cmd == F_SETLKW) && fails("lock", path_of(fd))) return -1;
    return REAL(fcntl)(fd, cmd, argument);
}
int fcntl(int fd, int cmd, ...) { va_list a; va_start(a, cmd); void *p = va_arg(a, void *); va_end(a); return fcntl_(fd, cmd, p); }
int fcntl64(int fd, int cmd, ...) { va_list a; va_start(a, cmd); void *p = va_arg(a, void *); va_end(a); return fcntl_(fd, cmd, p); }

int symlink(const char *target, const char *path) { return fails("symlink", path) ? -1 : REAL(symlink)(target, path); }
int symlinkat(const char *target, int at, const char *path) {
    return fails("symlink", path) ? -1 : REAL(symlinkat)(target, at, path);
}

int fsync(int fd) {
    struct stat s;
    const char *call = fstat(fd, &s) == 0 && S_ISDIR(s.st_mode) ? "flushdir" : "fsync";
    return fails(call, path_of(fd)) ? -1 : REAL(fsync)(fd);
}

static size_t less(int fd, size_t n) { return n > 1 && fails("read", path_of(fd)) ? n / 2 : n; }
ssize_t read(int fd, void *to, size_t n) { return REAL(read)(fd, to, less(fd, n)); }
ssize_t pread(int fd, void *to, size_t n, off_t at) { return REAL(pread)(fd, to, less(fd, n), at); }
ssize_t pread64(int fd, void *to, size_t n, off64_t at) { return REAL(pread64)(fd, to, less(fd, n), at); }
