/* Preloaded into a process: ends it with SIGKILL at its k-th file operation, counted from arm(k, torn) on.
   A torn write leaves half of its bytes behind. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static volatile long left = -1;
static volatile int torn = 0;

void arm(long k, int half) { torn = half; left = k; }
long armed(void) { return left; }

static int due(void) { return left > 0 && __sync_sub_and_fetch(&left, 1) == 0; }
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }
static void count(void) { if (due()) die(); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (fd > 2 && due()) {
        if (torn && size > 1) REAL(write)(fd, data, size / 2);
        die();
    }
    return REAL(write)(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    count();
    return REAL(pwrite64)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    if (fd > 2 && due()) {
        if (torn && number > 0) REAL(write)(fd, parts[0].iov_base, parts[0].iov_len);
        die();
    }
    return REAL(writev)(fd, parts, number);
}

#define OPEN(name)                                              \
    int name(const char *path, int flags, ...) {                \
        va_list more; va_start(more, flags);                    \
        mode_t mode = va_arg(more, mode_t); va_end(more);       \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR)) count();     \
        return REAL(name)(path, flags, mode);                   \
    }
#define OPENAT(name)                                            \
    int name(int folder, const char *path, int flags, ...) {    \
        va_list more; va_start(more, flags);                    \
        mode_t mode = va_arg(more, mode_t); va_end(more);       \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR)) count();     \
        return REAL(name)(folder, path, flags, mode);           \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int fsync(int fd) { count(); return REAL(fsync)(fd); }
int ftruncate64(int fd, off64_t size) { count(); return REAL(ftruncate64)(fd, size); }
int rename(const char *from, const char *to) { count(); return REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { count(); return REAL(mkdir)(path, mode); }
int unlink(const char *path) { count(); return REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) { count(); return REAL(unlinkat)(folder, path, flags); }
int rmdir(const char *path) { count(); return REAL(rmdir)(path); }
