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
 * for a number of batches and unary calls, so that a tenant which is gone does
 * not keep the others out, and only as long as the guarantee covers it.
 *
 * Claims are in the books. Accounts are derived, and counted anew at attach and
 * when the policy changes. A pool whose policy limits nobody keeps none.
 */
#include <string.h>

#include "arena.h"

enum { NO_ACCOUNT, NOT_NAMED = ODMA_TENANTS + 1 }; /* else 1 + index in the policy */

static uint32_t share_of(const odma_arena *arena, double share) {
    return (uint32_t)(share * arena->geometry.blocks);
}

static bool within(double value, double least, double most) {
    return value >= least && value <= most; /* false for NaN */
}

/* The rule that a policy's tenants break, or NULL. */
const char *tenants_fault(const odma_policy *policy) {
    if (policy->tenant_count > ODMA_TENANTS) return "tenant_count: at most 16";
    double sum = policy->safety_share;
    for (uint32_t i = 0; i < policy->tenant_count; i++) {
        const odma_tenant *tenant = &policy->tenants[i];
        if (tenant->name[0] == 0) return "tenants: a name is not empty";
        for (uint32_t j = 0; j < i; j++)
            if (memcmp(tenant->name, policy->tenants[j].name, sizeof tenant->name) == 0)
                return "tenants: each is named once";
        if (!within(tenant->maximum_share, 1e-9, 1)) return "maximum_share: above 0, at most 1";
        if (!within(tenant->guaranteed_share, 0, tenant->maximum_share))
            return "guaranteed_share: 0 to maximum_share";
        sum += tenant->guaranteed_share;
    }
    if (policy->tenant_count > 0 && !(sum <= 1 + 1e-9))
        return "tenants: guaranteed shares and safety_share are at most 1 together";
    return NULL;
}

/* --- accounts --- */

uint64_t tenant_hash(const char name[ODMA_NAME_BYTES]) {
    return name[0] == 0 ? 0 : hash_bytes(name, ODMA_NAME_BYTES);
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

/* Count all accounts anew, or none if the policy limits nobody. */
void count_accounts(odma_arena *arena) {
    const odma_policy *policy = &arena->books->policy;
    bool limited = arena->limits;
    arena->limits = policy->tenant_count > 0 || policy->tenant_share < 1;
    if (!limited && !arena->limits) return;
    memset(arena->accounts, 0, ((size_t)arena->accounts_mask + 1) * sizeof *arena->accounts);
    arena->account_count = 0;
    if (!arena->limits) return;
    for (uint32_t i = 0; i < policy->tenant_count; i++) {
        uint64_t tenant = tenant_hash(policy->tenants[i].name);
        arena->named[i] = (uint32_t)(open_account(arena, tenant, 1 + i) - arena->accounts);
    }
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        if (arena->cells[i].slot.state == ODMA_REGION_LIVE) credit(arena, i);
}

/* The rule that the accounts break, or NULL. */
const char *accounts_fault(odma_arena *arena) {
    uint64_t regions = 0, blocks = 0;
    if (!arena->limits) return NULL;
    for (uint32_t i = 0; i <= arena->accounts_mask; i++) {
        regions += arena->accounts[i].regions;
        blocks += arena->accounts[i].blocks;
    }
    if (regions != arena->live ||
        blocks != arena->geometry.blocks - arena->free_blocks - arena->waiting_blocks)
        return "the accounts of tenants are wrong";
    const char *fault = NULL;
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        if (arena->cells[i].slot.state == ODMA_REGION_LIVE) debit_region(arena, i);
    for (uint32_t i = 0; i <= arena->accounts_mask; i++)
        if (arena->accounts[i].regions != 0 || arena->accounts[i].blocks != 0)
            fault = "the account of a tenant is wrong";
    count_accounts(arena);
    return fault;
}

/* A region has begun. The accounts that have emptied go when the table is full
 * to three quarters. */
void credit_region(odma_arena *arena, uint32_t slot) {
    if (!arena->limits) return;
    if (arena->account_count > arena->accounts_mask / 4 * 3)
        count_accounts(arena);
    else
        credit(arena, slot);
}

/* A live region is about to end. */
void debit_region(odma_arena *arena, uint32_t slot) {
    if (!arena->limits) return;
    struct account *account = account_of(arena, arena->cells[slot].request.tenant);
    account->regions--;
    account->blocks -= arena->cells[slot].slot.length;
}

/* A live region had `before` blocks. */
void resize_region(odma_arena *arena, uint32_t slot, uint32_t before) {
    if (!arena->limits) return;
    account_of(arena, arena->cells[slot].request.tenant)->blocks += arena->cells[slot].slot.length - before;
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
struct standing standing_of(const odma_arena *arena, uint64_t tenant) {
    if (!arena->limits)
        return (struct standing){.index = NONE, .maximum = arena->geometry.blocks};
    struct standing standing = stands(arena, account_of(arena, tenant));
    standing.tenant = tenant;
    return standing;
}

/* Whether its guarantee covers `more` blocks besides what a tenant holds. */
bool is_covered(const struct standing *tenant, uint32_t more) {
    return (uint64_t)tenant->held + more <= tenant->guaranteed;
}

/* Blocks that the i-th tenant waits for, 0 if it has no claim. */
static uint32_t claimed(const odma_arena *arena, uint32_t i) {
    const struct books *books = arena->books;
    const struct claim *claim = &books->claims[i];
    if (claim->turn == 0 || books->turns - claim->turn >= ODMA_CLAIM_TURNS) return 0;
    struct standing tenant = stands(arena, &arena->accounts[arena->named[i]]);
    return is_covered(&tenant, claim->blocks) ? claim->blocks : 0;
}

/* Whether no claim stands but the tenant's own. */
bool may_borrow(const odma_arena *arena, const struct standing *tenant) {
    for (uint32_t i = 0; i < arena->books->policy.tenant_count; i++)
        if (i != tenant->index && claimed(arena, i) > 0) return false;
    return true;
}

/* A named tenant asks, this turn, for `blocks` that its guarantee covers. */
void set_claim(odma_arena *arena, const struct standing *tenant, uint32_t request,
               uint32_t blocks) {
    struct claim *claim = &arena->books->claims[tenant->index];
    *claim = (struct claim){.turn = arena->books->turns, .blocks = blocks, .request = request};
    mark(arena, claim, sizeof *claim);
}

/* A request of a tenant was let in. */
void end_claim(odma_arena *arena, const struct standing *tenant, uint32_t request) {
    if (tenant->index == NONE) return;
    struct claim *claim = &arena->books->claims[tenant->index];
    if (claim->turn == 0 || claim->request != request) return;
    *claim = (struct claim){0};
    mark(arena, claim, sizeof *claim);
}

/* --- who makes way --- */

static bool borrows(const odma_arena *arena, uint64_t tenant) {
    struct standing standing = standing_of(arena, tenant);
    return standing.held > standing.guaranteed;
}

/* The youngest region, not pinned, of a tenant other than the asker that
 * borrows: a handle, or 0. */
uint64_t borrower(odma_arena *arena, const struct standing *asker) {
    uint64_t birth = 0;
    uint32_t found = NONE;
    for (uint32_t id = arena->first_run; id != NONE; id = arena->runs[id].next) {
        if (is_free_run(arena, id) || arena->cells[id].slot.state != ODMA_REGION_LIVE) continue;
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
 * tenant or of one that borrows. A handle, or 0. */
uint64_t youngest(odma_arena *arena, const struct standing *asker) {
    bool guards = arena->books->policy.tenant_count > 0;
    uint64_t oldest = UINT64_MAX, birth = 0;
    uint32_t found = NONE;
    for (uint32_t id = arena->first_run; id != NONE; id = arena->runs[id].next) {
        if (is_free_run(arena, id) || arena->cells[id].slot.state != ODMA_REGION_LIVE) continue;
        const struct request *request = &arena->cells[id].request;
        if (request->birth < oldest) oldest = request->birth;
        if (request->birth < birth || note_of(arena, id)->pinned) continue;
        if (guards && request->tenant != asker->tenant && !borrows(arena, request->tenant)) continue;
        birth = request->birth;
        found = id;
    }
    return found == NONE || birth == oldest ? 0 : handle_of(arena, found);
}

odma_status odma_arena_tenants(odma_arena *arena, odma_tenant_use *uses, uint32_t *count) {
    if (uses == NULL || count == NULL) return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    const odma_policy *policy = &arena->books->policy;
    *count = policy->tenant_count;
    for (uint32_t i = 0; i < policy->tenant_count; i++) {
        const struct account *account = &arena->accounts[arena->named[i]];
        struct standing tenant = stands(arena, account);
        uses[i] = (odma_tenant_use){.regions = account->regions,
                                    .held = tenant.held,
                                    .guaranteed = tenant.guaranteed,
                                    .maximum = tenant.maximum,
                                    .claimed = claimed(arena, i)};
        memcpy(uses[i].name, policy->tenants[i].name, sizeof uses[i].name);
    }
    return leave(arena, ODMA_OK);
}
