/* shares.c - what tenants hold, may hold, and have a claim to.
 *
 *   Rule 1   While the policy limits tenants, the account of each tenant with
 *            live regions counts them and their blocks; those of the tenants
 *            that the policy names are always there.
 *   Rule 2   A tenant that holds more than its guarantee borrows the rest. One
 *            that is not named has no guarantee.
 *   Rule 3   Guarantees and the safety pool fit into the arena together. So if
 *            nobody borrows, an allocate that a guarantee covers finds as many
 *            blocks as it needs.
 *
 * By rule 3 it is enough to take from borrowers. A covered allocate that is
 * refused leaves a claim; while one stands nobody else becomes a borrower, or
 * a larger one, by an allocate, so that what is freed comes to it. It stands
 * for a number of calls that changed something, or many that did not, so that a
 * tenant which is gone does not keep the others out, and those who only ask
 * again do not end it; and only as long as the guarantee covers it.
 *
 * Claims are in the books. Accounts are derived, and counted anew at attach and
 * when the policy changes. A pool whose policy limits nobody keeps none.
 */
#include <string.h>
#include <unistd.h>

enum { NO_ACCOUNT, NOT_NAMED = ODMA_TENANTS + 1 }; /* else 1 + index in the policy */

/* A tenant, in blocks, as it stands before an operation. */
struct standing {
    uint64_t tenant;      /* hash of its name */
    uint32_t index;       /* in the policy; NONE: not named there */
    uint32_t held, guaranteed, maximum;
};

/* Whole blocks of a share. */
static uint32_t share_of(const odma_arena *arena, double share) {
    return (uint32_t)(share * arena->geometry.blocks);
}

/* --- accounts --- */

/* Names come from outside, so each epoch has a key of its own for their hashes. An
 * epoch that an older version began has none, and keeps the hashes it has. */
static inline uint64_t tenant_hash(const odma_arena *arena, const char name[ODMA_NAME_BYTES]) {
    const uint64_t *key = arena->books->stats[ODMA_CLASS_POOL].key;
    if (name[0] == 0) return 0;
    return key[0] == 0 && key[1] == 0 ? hash_bytes(name, ODMA_NAME_BYTES)
                                      : keyed_hash(key, name, ODMA_NAME_BYTES);
}

/* Draw the key of a new epoch. */
static odma_status draw_key(odma_arena *arena) {
    uint64_t *key = arena->books->stats[ODMA_CLASS_POOL].key;
    uint64_t drawn[2];
    if (getentropy(drawn, sizeof drawn) != 0) return ODMA_IO;
    memcpy(key, drawn, sizeof drawn);
    books_mark(arena, key, sizeof drawn);
    return ODMA_OK;
}

/* The account of a tenant, or the empty place for it. */
static struct account *account_of(const odma_arena *arena, uint64_t tenant) {
    uint64_t i = mix(tenant) & arena->accounts_mask;
    while (arena->accounts[i].owner != NO_ACCOUNT && arena->accounts[i].tenant != tenant)
        i = (i + 1) & arena->accounts_mask;
    return &arena->accounts[i];
}

static struct account *open_account(odma_arena *arena, uint64_t tenant, uint32_t owner) {
    struct account *account = account_of(arena, tenant);
    if (account->owner == NO_ACCOUNT) {
        *account = (struct account){.tenant = tenant, .owner = owner};
        arena->account_count++;
    }
    return account;
}

static void credit(odma_arena *arena, uint32_t slot) {
    struct account *account = open_account(arena, arena->cells[slot].request.tenant, NOT_NAMED);
    account->regions++;
    account->blocks += arena->cells[slot].slot.length;
}

/* A tenant's own requests keep their order, whatever its guarantee. */
static void hold_up(odma_arena *arena, uint64_t tenant) {
    struct step *step = &arena->step;
    if (!arena->limits) return;
    struct account *account = account_of(arena, tenant);
    if (account->owner == NO_ACCOUNT || account->held_up_tick == step->tick) return;
    account->held_up_tick = step->tick;
    step->held_up[step->held_up_count++] = tenant;
}

static bool is_held_up(const odma_arena *arena, uint64_t tenant) {
    return arena->step.held_up_count > 0 &&
           account_of(arena, tenant)->held_up_tick == arena->step.tick;
}

/* Count all accounts anew, or none if the policy limits nobody. */
static void count_accounts(odma_arena *arena) {
    const odma_policy *policy = &arena->books->policy;
    bool limited = arena->limits;
    arena->limits = policy->tenant_count > 0 || policy->tenant_share < 1;
    if (!limited && !arena->limits) return;
    memset(arena->accounts, 0, ((size_t)arena->accounts_mask + 1) * sizeof *arena->accounts);
    arena->account_count = 0;
    if (!arena->limits) return;
    for (uint32_t i = 0; i < policy->tenant_count; i++) {
        uint64_t tenant = tenant_hash(arena, policy->tenants[i].name);
        arena->named[i] = (uint32_t)(open_account(arena, tenant, 1 + i) - arena->accounts);
    }
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        if (is_live(arena, i)) credit(arena, i);
    for (uint32_t i = 0; i < arena->step.held_up_count; i++)
        open_account(arena, arena->step.held_up[i], NOT_NAMED)->held_up_tick = arena->step.tick;
}

/* A region has begun. The accounts that have emptied go when the table is full
 * to three quarters. */
static void credit_region(odma_arena *arena, uint32_t slot) {
    if (!arena->limits) return;
    if (arena->account_count > arena->accounts_mask / 4 * 3)
        count_accounts(arena);
    else
        credit(arena, slot);
}

/* A live region is about to end. */
static void debit_region(odma_arena *arena, uint32_t slot) {
    if (!arena->limits) return;
    struct account *account = account_of(arena, arena->cells[slot].request.tenant);
    account->regions--;
    account->blocks -= arena->cells[slot].slot.length;
}

/* A live region had `before` blocks. */
static void resize_region(odma_arena *arena, uint32_t slot, uint32_t before) {
    if (!arena->limits) return;
    account_of(arena, arena->cells[slot].request.tenant)->blocks +=
        arena->cells[slot].slot.length - before;
}

/* --- guarantees --- */

static struct standing stands(const odma_arena *arena, const struct account *account) {
    const odma_policy *policy = &arena->books->policy;
    struct standing standing = {.tenant = account->tenant, .index = NONE, .held = account->blocks};
    if (account->owner == NO_ACCOUNT || account->owner == NOT_NAMED) {
        standing.maximum = share_of(arena, policy->tenant_share);
        return standing;
    }
    standing.index = account->owner - 1;
    standing.guaranteed = share_of(arena, policy->tenants[standing.index].guaranteed_share);
    standing.maximum = share_of(arena, policy->tenants[standing.index].maximum_share);
    return standing;
}

/* Where the policy limits nobody a tenant holds nothing and may hold all. */
static inline struct standing standing_of(const odma_arena *arena, uint64_t tenant) {
    if (!arena->limits)
        return (struct standing){.index = NONE, .maximum = arena->geometry.blocks};
    struct standing standing = stands(arena, account_of(arena, tenant));
    standing.tenant = tenant;
    return standing;
}

/* Whether its guarantee covers `more` blocks besides what a tenant holds. */
static bool is_covered(const struct standing *tenant, uint32_t more) {
    return (uint64_t)tenant->held + more <= tenant->guaranteed;
}

/* Blocks that the i-th tenant waits for, 0 if it has no claim. */
static uint32_t claimed(const odma_arena *arena, uint32_t i) {
    const struct books *books = arena->books;
    const struct claim *claim = &books->claims[i];
    if (claim->turn == 0 || books->turns - claim->turn >= ODMA_CLAIM_CALLS) return 0;
    struct standing tenant = stands(arena, &arena->accounts[arena->named[i]]);
    return is_covered(&tenant, claim->blocks) ? claim->blocks : 0;
}

/* Whether no claim stands but the tenant's own. */
static bool may_borrow(const odma_arena *arena, const struct standing *tenant) {
    for (uint32_t i = 0; i < arena->books->policy.tenant_count; i++)
        if (i != tenant->index && claimed(arena, i) > 0) return false;
    return true;
}

/* A named tenant asks, this turn, for `blocks` that its guarantee covers. */
static void set_claim(odma_arena *arena, const struct standing *tenant, uint32_t request,
               uint32_t blocks) {
    struct claim *claim = &arena->books->claims[tenant->index];
    *claim = (struct claim){.turn = arena->books->turns, .blocks = blocks, .request = request};
    books_mark(arena, claim, sizeof *claim);
}

/* A request of a tenant was let in. */
static void end_claim(odma_arena *arena, const struct standing *tenant, uint32_t request) {
    if (tenant->index == NONE) return;
    struct claim *claim = &arena->books->claims[tenant->index];
    if (claim->turn == 0 || claim->request != request) return;
    *claim = (struct claim){0};
    books_mark(arena, claim, sizeof *claim);
}

/* --- who makes way --- */

static bool borrows(const odma_arena *arena, uint64_t tenant) {
    struct standing standing = standing_of(arena, tenant);
    return standing.held > standing.guaranteed;
}

/* The youngest region, not pinned, of a tenant other than the asker that
 * borrows: a handle, or 0, also once the step has searched enough. */
static uint64_t borrower(odma_arena *arena, const struct standing *asker) {
    uint64_t birth = 0;
    uint32_t found = NONE;
    if (!may_search(arena)) return 0;
    for (uint32_t id = first_live(arena); id != NONE; id = next_live(arena, id)) {
        arena->steps++;
        const struct request *request = &arena->cells[id].request;
        if (request->birth < birth || request->tenant == asker->tenant ||
            note_of(arena, id)->pinned || !borrows(arena, request->tenant))
            continue;
        birth = request->birth;
        found = id;
    }
    return found == NONE ? 0 : handle_of(arena, found);
}

/* The youngest region that could make way for the asker's growth: never pinned,
 * never the oldest of all and, where there are guarantees, of the asker's own
 * tenant or of one that borrows. A handle, or 0, also once the step has searched enough. */
static uint64_t youngest(odma_arena *arena, const struct standing *asker) {
    bool guards = arena->books->policy.tenant_count > 0;
    uint64_t oldest = UINT64_MAX, birth = 0;
    uint32_t found = NONE;
    if (!may_search(arena)) return 0;
    for (uint32_t id = first_live(arena); id != NONE; id = next_live(arena, id)) {
        arena->steps++;
        const struct request *request = &arena->cells[id].request;
        if (request->birth < oldest) oldest = request->birth;
        if (request->birth < birth || note_of(arena, id)->pinned) continue;
        if (guards && request->tenant != asker->tenant && !borrows(arena, request->tenant))
            continue;
        birth = request->birth;
        found = id;
    }
    return found == NONE || birth == oldest ? 0 : handle_of(arena, found);
}
