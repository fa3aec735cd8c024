/* fuse.c - a library that dies at a store into the file of a pool.
 *
 * Compiled in as its ODMA_STORE_HOOK. The environment's TORTURE_FUSE names a file
 * of one 64-bit word: how many stores are left, 0: any number.
 */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

void burn_fuse(void);

/* Every caller maps it at its first store, one after the other or at once. */
static _Atomic int64_t *fuse(void) {
    static _Atomic(_Atomic int64_t *) mapped;
    _Atomic int64_t *word = atomic_load(&mapped);
    if (word != NULL) return word;
    const char *path = getenv("TORTURE_FUSE");
    int file = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    void *map = file < 0 ? MAP_FAILED
                         : mmap(NULL, sizeof *word, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) abort();
    close(file);
    atomic_store(&mapped, (_Atomic int64_t *)map);
    return map;
}

void burn_fuse(void) {
    _Atomic int64_t *left = fuse();
    if (atomic_load(left) > 0 && atomic_fetch_sub(left, 1) == 1) kill(getpid(), SIGKILL);
}
