/* faults.c - a page of a mapped file that fails, as a status in the place of a signal.
 *
 * Compiled in where ODMA_OWN_FAULTS is set: a library must not own SIGBUS, a
 * service may. A store or load through a map fails where the file has shrunk, a
 * disk cannot be read, or a file system has no room for a copy of the page. The
 * handler puts empty memory in the place of that arena's whole map and marks the
 * arena broken. Its call goes on into the empty memory and ends as ODMA_BROKEN;
 * what the file says is decided by its next attach, as after a kill. A fault
 * anywhere else ends the process as it would have.
 */
#ifndef ODMA_OWN_FAULTS

#define MAPPED(arena) ((void)(arena))
#define UNMAPPING(arena) ((void)(arena))

#else

#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define MAPPED(arena) watch_map(arena)
#define UNMAPPING(arena) unwatch_map(arena)

enum { MOST_WATCHED = 4096 };

/* start is written last and cleared first: an entry with a start is whole. */
static struct watched {
    _Atomic(odma_arena *) arena;
    _Atomic uintptr_t start;
    _Atomic uint64_t bytes;
} watched[MOST_WATCHED];

static void watch_map(odma_arena *arena) {
    for (uint32_t i = 0; i < MOST_WATCHED; i++) {
        odma_arena *none = NULL;
        if (!atomic_compare_exchange_strong(&watched[i].arena, &none, arena)) continue;
        watched[i].bytes = arena->layout.file_bytes;
        watched[i].start = (uintptr_t)arena->map;
        return;
    }
}

static void unwatch_map(odma_arena *arena) {
    for (uint32_t i = 0; i < MOST_WATCHED; i++) {
        if (watched[i].arena != arena) continue;
        watched[i].start = 0;
        watched[i].arena = NULL;
        return;
    }
}

/* The thread that failed is in a call of that arena, so its entry stays. */
static void on_fault(int number, siginfo_t *info, void *context) {
    (void)context;
    uintptr_t at = (uintptr_t)info->si_addr;
    for (uint32_t i = 0; i < MOST_WATCHED; i++) {
        uintptr_t start = watched[i].start;
        uint64_t bytes = watched[i].bytes;
        if (start == 0 || at < start || at - start >= bytes) continue;
        void *map = mmap((void *)start, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (map == MAP_FAILED) break;
        odma_arena *arena = watched[i].arena;
        arena->broken = true;
        return;
    }
    signal(number, SIG_DFL); /* the instruction fails again, and ends the process */
}

/* Take SIGBUS for this process. 0, or -1 if the system refuses. */
int odma_own_faults(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, NULL);
}

#endif
