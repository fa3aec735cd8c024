/* refusals.c - a system that refuses the n-th call of one kind, and all others never.
 *
 * Preloaded into a process, which says by refuse() what is to fail next.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

void *__libc_calloc(size_t, size_t);
void *__libc_memalign(size_t, size_t);

static __thread const char *refused;
static __thread int countdown, error;

/* From now on the n-th call of `kind` in this thread fails; n 0: none does. */
void refuse(const char *kind, int n, int number) {
    refused = n == 0 ? 0 : kind;
    countdown = n;
    error = number;
}

/* Whether a call has been refused since. */
int has_refused(void) { return refused != 0 && countdown <= 0; }

static int is_refused(const char *kind) {
    if (refused == 0 || strcmp(kind, refused) != 0 || --countdown != 0) return 0;
    errno = error;
    return 1;
}

#define REAL(name, type)            \
    static __typeof__(type) real;   \
    if (real == 0) *(void **)&real = dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        REAL(name, int (*)(const char *, int, ...));                 \
        va_list list;                                                \
        va_start(list, flags);                                       \
        mode_t mode = va_arg(list, mode_t);                          \
        va_end(list);                                                \
        return is_refused("open") ? -1 : real(path, flags, mode);    \
    }
OPEN(open)
OPEN(open64)

#define FALLOCATE(name)                                              \
    int name(int file, off_t from, off_t bytes) {                    \
        REAL(name, int (*)(int, off_t, off_t));                      \
        return is_refused("fallocate") ? error : real(file, from, bytes); \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)

#define MMAP(name)                                                   \
    void *name(void *at, size_t bytes, int may, int flags, int file, off_t from) { \
        REAL(name, void *(*)(void *, size_t, int, int, int, off_t)); \
        return is_refused("mmap") ? MAP_FAILED : real(at, bytes, may, flags, file, from); \
    }
MMAP(mmap)
MMAP(mmap64)

#define PREAD(name)                                                  \
    ssize_t name(int file, void *into, size_t bytes, off_t from) {   \
        REAL(name, ssize_t (*)(int, void *, size_t, off_t));         \
        return is_refused("pread") ? -1 : real(file, into, bytes, from); \
    }
PREAD(pread)
PREAD(pread64)

#define SEEK(name)                                                   \
    off_t name(int file, off_t from, int whence) {                   \
        REAL(name, off_t (*)(int, off_t, int));                      \
        return is_refused("lseek") ? -1 : real(file, from, whence);  \
    }
SEEK(lseek)
SEEK(lseek64)

#define LOCK(name)                                                   \
    int name(int file, int command, ...) {                           \
        REAL(name, int (*)(int, int, ...));                          \
        va_list list;                                                \
        va_start(list, command);                                     \
        void *argument = va_arg(list, void *);                       \
        va_end(list);                                                \
        return is_refused("fcntl") ? -1 : real(file, command, argument); \
    }
LOCK(fcntl)
LOCK(fcntl64)

#define STAT(name, type)                                             \
    int name(const char *path, type *into) {                  \
        REAL(name, int (*)(const char *, type *));            \
        return is_refused("lstat") ? -1 : real(path, into);          \
    }
STAT(lstat, struct stat)
STAT(lstat64, struct stat64)

#define FSTAT(name, type)                                            \
    int name(int file, type *into) {                          \
        REAL(name, int (*)(int, type *));                     \
        return is_refused("fstat") ? -1 : real(file, into);          \
    }
FSTAT(fstat, struct stat)
FSTAT(fstat64, struct stat64)

int madvise(void *at, size_t bytes, int advice) {
    REAL(madvise, int (*)(void *, size_t, int));
    return is_refused("madvise") ? -1 : real(at, bytes, advice);
}

int rename(const char *from, const char *to) {
    REAL(rename, int (*)(const char *, const char *));
    return is_refused("rename") ? -1 : real(from, to);
}

int unlink(const char *path) {
    REAL(unlink, int (*)(const char *));
    return is_refused("unlink") ? -1 : real(path);
}

ssize_t write(int file, const void *from, size_t bytes) {
    REAL(write, ssize_t (*)(int, const void *, size_t));
    return is_refused("write") ? -1 : real(file, from, bytes);
}

void *calloc(size_t count, size_t bytes) {
    return is_refused("malloc") ? 0 : __libc_calloc(count, bytes);
}

void *aligned_alloc(size_t unit, size_t bytes) {
    return is_refused("malloc") ? 0 : __libc_memalign(unit, bytes);
}
