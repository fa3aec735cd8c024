/* odma.c - the library in one file: compile this, and nothing else.
 *
 * All that is not in a public header is static, so an engine that compiles this
 * file into itself gets odma_* and no other name. Nothing is declared ahead of
 * where it is defined: a file uses only those above it in this list, and the
 * compiler refuses a circle.
 *
 * Doors stand last in the room of the arena: they take the lock, and those that
 * write commit.
 */
#define _GNU_SOURCE
#include "odma.h"
#include "odma_features.h"
#include "odma_lpddr.h"

#include "arena/arena.h"

#include "arena/base.c"
#include "arena/defaults.c"

#include "arena/ids.c"
#include "arena/bins.c"
#include "arena/runs.c"
#include "arena/keys.c"
#include "arena/slots.c"
#include "arena/keep.c"
#include "arena/waits.c"

#include "arena/learn.c"
#include "arena/shares.c"
#include "arena/policy.c"
#include "arena/index.c"
#include "arena/plan.c"

#include "arena/check.c"
#include "arena/reuse.c"
#include "arena/ops.c"
#include "arena/record.c"

#include "arena/digest.c"
#include "arena/prefetch.c"
#include "arena/batch.c"
#include "arena/faults.c"
#include "arena/file.c"

#include "arena/read.c"
#include "arena/change.c"

#include "arena/limits.c"

#include "features.c"

#include "lpddr/lpddr.h"
#include "lpddr/mapping.c"
#include "lpddr/channel.c"
#include "lpddr/device.c"
#include "lpddr/estimate.c"
