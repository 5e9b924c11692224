// The specification (reference.py) for NVIDIA GPUs: one launch for decode-sized batches.
//
// One block keeps a value for every expert in shared memory. Its steps, a barrier between each:
//   vote     first_rank[e] = the lowest rank at which any voting row chose e     (rules 1 to 3)
//   tally    how many experts have each rank, from which every thread finds s    (rule 4)
//   look up  a warp walks a secondary's neighbour list, 32 entries at a time     (rules 5, 6)
//   rescue   with a tolerance: what loses too much becomes primary; look up again  (rule 5)
//   move     every slot to its expert's target, no row to one expert twice       (distinct.cuh)
// Batches too large for one block take three launches: a fill, `vote` by many blocks into global
// memory, and the rest by many blocks.
//
// Compiled with -DID=int or long long, -DWEIGHT=float or double. Loops step by blockDim.x and by
// LANES, so that the same source is correct with any number of threads: tests run it on CPUs.
//
// Variants (see variants.py): -DTHREADS, those of a block; -DNEIGHBOUR=short, lists of half the bytes;
// -DSLOTS_K and -DEXPERTS, K and E as constants, the batch then without gaps; -DROW_LANES=1 with
// -DJOINED and -DPDL, the form in row_lanes.cuh besides.

#ifndef LANES
#define LANES 32
#endif
#ifndef THREADS
#define THREADS 1024
#endif
#ifndef NEIGHBOUR
#define NEIGHBOUR int
#endif
#ifndef SLOTS_K
#define SLOTS_K 0
#define EXPERTS 0
#endif
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

#ifndef SHARED
#define SHARED(type, name) __shared__ type name
#endif

// EXACT + n: a FAST row that keeps n slots.
enum RowClass { INDEPENDENT = -1, VOID = 0, FAST = 1, EXACT = 2 };
// first_rank of an expert that rule 5 made primary, of one that always is, and of those that nobody
// voted for: named by a real row, by INDEPENDENT ones that leave it, or by none.
enum { RESCUED = -2, ALWAYS = -1, NAMED = 1 << 20, LEFT, NEVER = 1 << 30 };
enum { OFF = 0x7fffffff, MAX_K = 32, MAX_E = 1024, GROUP = 4096 / THREADS };
// As in plan.py and reference.py.
enum { FRACTION = 1 << 15, WEIGHT_FRACTION = 1 << 20, LARGEST_WEIGHT = 1 << 15 };
enum Setting { SETTING_S, MIN_ACTIVE, MAX_ACTIVE, TAU, SCALES, POOL, OWN_POOL };
enum Counter {
    STEPS, BEFORE, AFTER, REROUTED, CRITICAL, ROWS_FAST, ROWS_EXACT, ROWS_VOID, ROWS_INDEPENDENT, COUNTERS
};

struct Batch {
    const ID* ids;
    long long ids_row, ids_slot;
    WEIGHT* weights;
    long long weights_row, weights_slot;
    const signed char* rows;  // or null: all FAST
    int T, K, E;
};

struct Decision {
    const NEIGHBOUR* neighbours;  // [E, E - 1]
    const int* errors;            // [E, E - 1]
    const float* scales;          // [E, E - 1]
    const int* settings;          // see Setting
    const int* pool;              // [3, E]: when an expert joins; of INDEPENDENT rows place and limit
    ID* out;                      // [T, K]; may be the ids themselves, where they have no gaps
    unsigned long long* counters;  // or null
};

// What the threads of a block share.
struct Shared {
    int first_rank[MAX_E];
    int share[MAX_E];  // the largest of any row, in units of 1 / FRACTION
    int place[MAX_E];  // of the stand-in in the expert's list, or -1
    int target[MAX_E];
    int loss[MAX_E];
    int tally[MAX_K + 2];  // experts by first_rank + 1; the last: all that are named
    unsigned independent;  // whether a row is
    unsigned own[MAX_E / 32];      // bits of the members of their pool
    unsigned certain[MAX_E / 32];  // bits of what is named afterwards, whatever becomes of each row
    unsigned active[MAX_E / 32];  // bits of primaries and critical experts
    unsigned added[MAX_E / 32];   // bits of what re-routed rows name besides
    short in_order[MAX_E];        // the active experts, ascending
    short standing[MAX_E];        // where an active expert stands among them
    short own_order[MAX_E];       // the same of members
    short own_standing[MAX_E];
    int counts[COUNTERS];
};

__device__ static int kind_of(const Batch& batch, int t) {
    const int kind = batch.rows ? batch.rows[t] : FAST;
    return kind > EXACT ? FAST : kind;
}

// How many of its best slots a FAST row keeps whatever S is.
__device__ static int keeps(const Batch& batch, int t) {
    return batch.rows ? batch.rows[t] - EXACT : 0;
}

__device__ static long long expert_at(const Batch& batch, int t, int k) {
    return (long long)batch.ids[t * batch.ids_row + k * batch.ids_slot];
}

__device__ static WEIGHT& weight_at(const Batch& batch, int t, int k) {
    return batch.weights[t * batch.weights_row + k * batch.weights_slot];
}

__device__ static bool in_range(const Batch& batch, long long e) { return e >= 0 && e < batch.E; }

// How many counting slots of the row come before slot k.
__device__ static int rank_of(const Batch& batch, int t, int k) {
    const WEIGHT mine = weight_at(batch, t, k);
    int rank = 0;
    for (int j = 0; j < batch.K; ++j) {
        const WEIGHT other = weight_at(batch, t, j);
        const bool counts = other != 0 && in_range(batch, expert_at(batch, t, j));
        rank += counts && (other > mine || (other == mine && j < k));
    }
    return rank;
}

// The slot's weight as a whole number, 0 if it does not count.
__device__ static long long whole_at(const Batch& batch, int t, int k) {
    if (!in_range(batch, expert_at(batch, t, k))) return 0;
    const WEIGHT weight = weight_at(batch, t, k), size = weight < 0 ? -weight : weight;
    return (long long)((size < LARGEST_WEIGHT ? size : LARGEST_WEIGHT) * WEIGHT_FRACTION);
}

__device__ static int share_of(const Batch& batch, int t, int k) {
    long long total = 0;
    for (int j = 0; j < batch.K; ++j) total += whole_at(batch, t, j);
    return total ? (int)(whole_at(batch, t, k) * FRACTION / total) : 0;
}

// Whether a slot of an INDEPENDENT row, naming an expert, leaves it (rule 10).
__device__ static bool leaves_pool(const Batch& batch, const int* pool, int t, int k) {
    const int limit = pool[2 * batch.E + expert_at(batch, t, k)];
    return limit > 0 && share_of(batch, t, k) < limit;
}

__device__ static void clear(Shared& shared, int E) {
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        shared.first_rank[e] = NEVER;
        shared.share[e] = 0;
        shared.place[e] = -1;
        shared.loss[e] = -1;
    }
    for (int i = threadIdx.x; i < MAX_K + 2; i += blockDim.x) shared.tally[i] = 0;
    for (int i = threadIdx.x; i < COUNTERS; i += blockDim.x) shared.counts[i] = 0;
    for (int i = threadIdx.x; i < MAX_E / 32; i += blockDim.x)
        shared.active[i] = shared.added[i] = shared.own[i] = shared.certain[i] = 0;
    if (threadIdx.x == 0) shared.independent = 0;
}

__device__ static void vote(
    const Batch& batch, const int* settings, const int* pool, Shared& shared, int start, int stop) {
    const bool tolerates = settings[TAU] >= 0;
    for (int slot = start * batch.K + threadIdx.x; slot < stop * batch.K; slot += blockDim.x) {
        const int t = slot / batch.K, k = slot % batch.K, kind = kind_of(batch, t);
        const long long e = expert_at(batch, t, k);
        if (kind == VOID || !in_range(batch, e)) continue;
        const bool counts = weight_at(batch, t, k) != 0;
        int value = kind == EXACT ? (int)ALWAYS : counts ? rank_of(batch, t, k) : (int)NAMED;
        if (value < keeps(batch, t)) value = ALWAYS;
        if (kind == INDEPENDENT) {
            value = leaves_pool(batch, pool, t, k) ? (int)LEFT : (int)ALWAYS;
            atomicOr(&shared.independent, 1u);
        }
        atomicMin(&shared.first_rank[e], value);
        if (tolerates && kind == FAST && counts) atomicMax(&shared.share[e], share_of(batch, t, k));
    }
}

// How many members the pool of this step has.
__device__ static int members_of(const int* settings, bool independent) {
    return independent && settings[OWN_POOL] > settings[POOL] ? settings[OWN_POOL] : settings[POOL];
}

// The end of rule 3, and what rule 4 asks for.
__device__ static void tally(const Batch& batch, Shared& shared, const int* pool, int members, int own_pool) {
    for (int e = threadIdx.x; e < batch.E; e += blockDim.x) {
        int rank = shared.first_rank[e];
        if (rank < NEVER) atomicAdd(&shared.tally[MAX_K + 1], 1);
        if (rank <= NAMED) atomicOr(&shared.certain[e / 32], 1u << e % 32);
        if (members > 0) {
            const int joins = pool[e];
            if (joins < own_pool) atomicOr(&shared.own[e / 32], 1u << e % 32);
            if (joins < members) shared.first_rank[e] = rank = ALWAYS;
        }
        if (rank < batch.K) atomicAdd(&shared.tally[rank + 1], 1);
    }
}

// Rule 4. Every thread finds the same s, and the number of primaries.
__device__ static int choose_s(
    const Shared& shared, const int* settings, int K, int least, int* primaries) {
    const int S = settings[SETTING_S], min_active = settings[MIN_ACTIVE], max_active = settings[MAX_ACTIVE];
    int size = 0, too_few = 0, within = 0;
    for (int s = 0; s <= K; ++s) {
        size += shared.tally[s];
        too_few += size < min_active;
        within += size <= max_active;
    }
    const int grown = too_few < K ? too_few : K, capped = within - 1 > least ? within - 1 : least;
    int s = S > grown ? S : grown;
    s = s < capped ? s : capped;
    *primaries = 0;
    for (int at = 0; at <= s && at <= K; ++at) *primaries += shared.tally[at];
    return s;
}

// The first entries of GROUP neighbour lists: independent loads, so that they are under way at once.
__device__ static void prefetch(const Batch& batch, const NEIGHBOUR* neighbours, int first, int (&listed)[GROUP]) {
    const int lane = threadIdx.x % LANES, warps = blockDim.x / LANES;
    for (int i = 0; i < GROUP; ++i) {
        const int e = first + i * warps;
        listed[i] = e < batch.E && lane < batch.E - 1 ? neighbours[e * (batch.E - 1) + lane] : -1;
    }
}

// Where the first primary stands in e's list, or -1, found by the lanes of a warp together.
__device__ static int nearest(
    const Shared& shared, const NEIGHBOUR* list, int length, int s, int listed) {
    const int lane = threadIdx.x % LANES;
    for (int at = 0; at < length; at += LANES) {
        if (at > 0) listed = at + lane < length ? list[at + lane] : -1;
        const bool hit = listed >= 0 && shared.first_rank[listed] < s;
        const unsigned hits = __ballot_sync(~0u, hit);
        if (hits) return at + __ffs(hits) - 1;
        if (__ballot_sync(~0u, listed < 0)) return -1;
    }
    return -1;
}

__device__ static void look_up(
    const Batch& batch, const NEIGHBOUR* neighbours, Shared& shared, int s, int (&listed)[GROUP]) {
    const int warp = threadIdx.x / LANES, warps = blockDim.x / LANES, lane = threadIdx.x % LANES;
    for (int first = warp; first < batch.E; first += GROUP * warps) {
        if (first != warp) prefetch(batch, neighbours, first, listed);
        for (int i = 0; i < GROUP; ++i) {
            const int e = first + i * warps;
            if (e >= batch.E) break;
            const int rank = shared.first_rank[e];
            if (lane == 0 && rank < s) atomicOr(&shared.active[e / 32], 1u << e % 32);
            if (rank < s || rank >= NAMED) continue;
            const int length = batch.E - 1;
            const int found = nearest(shared, neighbours + e * length, length, s, listed[i]);
            if (lane == 0) {
                shared.place[e] = found;
                if (found < 0)
                    atomicOr(&shared.active[e / 32], 1u << e % 32);
                else
                    shared.target[e] = neighbours[e * length + found];
            }
        }
    }
}

// Rule 5: what would lose more than tau becomes primary, the largest loss first.
__device__ static void rescue(const Batch& batch, const Decision& decision, Shared& shared, int s, int primaries) {
    const int tau = decision.settings[TAU], room = decision.settings[MAX_ACTIVE] - primaries;
    // Found again by the next look-up: what had no stand-in may have one then.
    for (int i = threadIdx.x; i < MAX_E / 32; i += blockDim.x) shared.active[i] = 0;
    for (int e = threadIdx.x; e < batch.E; e += blockDim.x) {
        const int rank = shared.first_rank[e], place = shared.place[e];
        if (rank < s || rank >= NAMED || place < 0) continue;
        const long long share = shared.share[e];
        shared.loss[e] = (int)(share * share * decision.errors[e * (batch.E - 1) + place] / FRACTION);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < batch.E; e += blockDim.x) {
        const int loss = shared.loss[e];
        if (loss <= tau) continue;
        int ahead = 0;
        for (int other = 0; other < batch.E; ++other)
            ahead += shared.loss[other] > loss || (shared.loss[other] == loss && other < e);
        if (ahead >= room) continue;
        shared.first_rank[e] = RESCUED;
    }
    __syncthreads();
}

#include "distinct.cuh"

__device__ static void move(
    const Batch& batch, const Decision& decision, Shared& shared, bool movable, int s, int active, int start,
    int stop) {
    SHARED(Rows, rows);
    int rerouted = 0, critical = 0;
    const int turn = blockDim.x > batch.K ? blockDim.x / batch.K : 1;
    list(shared.active, batch.E, shared.in_order, shared.standing);
    if (shared.independent) list(shared.own, batch.E, shared.own_order, shared.own_standing);
    for (int i = threadIdx.x; movable && i < MAX_E / 32; i += blockDim.x) shared.certain[i] &= shared.active[i];
    for (int first = start; first < stop; first += turn) {
        const int slots = (first + turn < stop ? turn : stop - first) * batch.K;
        critical += aim(batch, decision, shared, rows, movable, s, first, slots);
        __syncthreads();
        if (active < batch.K) {
            hold(batch, rows, first, slots, active);
            __syncthreads();
        }
        carry(batch, decision, shared, rows, first, slots, active);
        __syncthreads();
        rerouted += fill(batch, decision, shared, rows, first, slots, active);
        if (first + turn < stop) __syncthreads();
    }
    if (rerouted) atomicAdd(&shared.counts[REROUTED], rerouted);
    if (critical) atomicAdd(&shared.counts[CRITICAL], critical);
}

__device__ static void copy(const Batch& batch, ID* out, int start, int stop) {
    for (int slot = start * batch.K + threadIdx.x; slot < stop * batch.K; slot += blockDim.x)
        out[slot] = (ID)expert_at(batch, slot / batch.K, slot % batch.K);
}

__device__ static void count_rows(const Batch& batch, Shared& shared, int start, int stop) {
    for (int t = start + threadIdx.x; t < stop; t += blockDim.x) {
        const int kind = kind_of(batch, t);
        const Counter counter =
            kind == FAST ? ROWS_FAST : kind == EXACT ? ROWS_EXACT : kind == VOID ? ROWS_VOID : ROWS_INDEPENDENT;
        atomicAdd(&shared.counts[counter], 1);
    }
}

// What was added is named, too: each expert counts once, in the block that is the first to say so.
// Nobody else needs this bit of a vote (see `share_in`).
__device__ static void count_added(const Batch& batch, Shared& shared, int* votes) {
    for (int e = threadIdx.x; e < batch.E; e += blockDim.x)
        if (bit(shared.added, e) && (!votes || atomicAnd(&votes[batch.E + 1 + e], ~NEVER) & NEVER))
            atomicAdd(&shared.counts[AFTER], 1);
}

// The largest share that a vote tells of: negative so that the least is wanted everywhere.
__device__ static int share_in(int vote) { return vote < 0 ? -(vote | NEVER) : 0; }

// Whether steps under these settings are not even counted: stock routing of all rows.
__device__ static bool is_off(const int* settings) {
    return settings[SETTING_S] == OFF && settings[OWN_POOL] == 0;
}

// Everything after the vote. `votes` is null where this block sees all rows.
__device__ static void decide_and_move(
    const Batch& batch, const Decision& decision, Shared& shared, int (&listed)[GROUP], int start,
    int stop, int* votes) {
    const bool independent = shared.independent && decision.settings[OWN_POOL] > 0;
    const int members = members_of(decision.settings, shared.independent);
    tally(batch, shared, decision.pool, members, decision.settings[OWN_POOL]);
    __syncthreads();
    int primaries, active = 0;
    const int s = choose_s(shared, decision.settings, batch.K, members > 0 ? 0 : 1, &primaries);
    const bool movable = decision.settings[SETTING_S] < batch.K && primaries > 0;
    if (movable) look_up(batch, decision.neighbours, shared, s, listed);
    __syncthreads();
    if (movable && decision.settings[TAU] >= 0) {
        rescue(batch, decision, shared, s, primaries);
        prefetch(batch, decision.neighbours, threadIdx.x / LANES, listed);
        look_up(batch, decision.neighbours, shared, s, listed);
        __syncthreads();
    }
    for (int word = 0; word < MAX_E / 32; ++word) active += __popc(shared.active[word]);
    if (movable || independent)
        move(batch, decision, shared, movable, s, active, start, stop);
    else if (decision.out != batch.ids)
        copy(batch, decision.out, start, stop);
    if (!decision.counters || is_off(decision.settings)) return;
    count_rows(batch, shared, start, stop);
    __syncthreads();
    count_added(batch, shared, votes);
    const int decoded = shared.counts[ROWS_FAST] + shared.counts[ROWS_INDEPENDENT];
    if (threadIdx.x == 0 && blockIdx.x == 0 && (votes ? votes[batch.E] <= 0 : decoded > 0)) {
        int after = 0;
        for (int word = 0; word < MAX_E / 32; ++word) after += __popc(shared.certain[word]);
        shared.counts[STEPS] = 1;
        shared.counts[BEFORE] = shared.tally[MAX_K + 1];
        atomicAdd(&shared.counts[AFTER], after);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COUNTERS; i += blockDim.x)
        if (shared.counts[i]) atomicAdd(&decision.counters[i], (unsigned long long)shared.counts[i]);
}

#define BATCH_PARAMETERS                                                                          \
    const ID *ids, long long ids_row, long long ids_slot, WEIGHT *weights,                        \
        long long weights_row, long long weights_slot, const signed char *rows, int T, int K, int E
#define BATCH                                                                                     \
    SLOTS_K ? Batch{ids, SLOTS_K, 1, weights, SLOTS_K, 1, rows, T, SLOTS_K, EXPERTS}              \
            : Batch{ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, K, E}
#define DECISION_PARAMETERS \
    const NEIGHBOUR *neighbours, const int *errors, const float *scales, const int *settings, \
        const int *pool, ID *out, unsigned long long *counters
#define DECISION \
    Decision { neighbours, errors, scales, settings, pool, out, counters }

KERNEL reroute_at_once(BATCH_PARAMETERS, DECISION_PARAMETERS) {
    // In place, off is one load.
    if (out == ids && settings[SETTING_S] >= (counters ? (int)OFF : K) && settings[OWN_POOL] == 0) return;
    SHARED(Shared, shared);
    const Batch batch = BATCH;
    int listed[GROUP];
    prefetch(batch, neighbours, threadIdx.x / LANES, listed);
    clear(shared, batch.E);
    __syncthreads();
    vote(batch, settings, pool, shared, 0, T);
    __syncthreads();
    decide_and_move(batch, DECISION, shared, listed, 0, T, nullptr);
}

// votes: [2 E + 1], filled with NEVER: first ranks, then 0 if there is a FAST row, -1 if an INDEPENDENT
// one, then the largest shares, negative so that the least is wanted everywhere.
KERNEL reroute_vote(
    BATCH_PARAMETERS, int share, int* votes, const int* settings, const int* pool) {
    SHARED(Shared, shared);
    const Batch batch = BATCH;
    const int start = blockIdx.x * share, stop = start + share < T ? start + share : T;
    clear(shared, E);
    __syncthreads();
    vote(batch, settings, pool, shared, start, stop);
    count_rows(batch, shared, start, stop);
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        if (shared.first_rank[e] < NEVER) atomicMin(&votes[e], shared.first_rank[e]);
        if (shared.share[e]) atomicMin(&votes[E + 1 + e], -shared.share[e]);
    }
    if (threadIdx.x == 0 && shared.counts[ROWS_FAST]) atomicMin(&votes[E], 0);
    if (threadIdx.x == 0 && shared.counts[ROWS_INDEPENDENT]) atomicMin(&votes[E], -1);
}

KERNEL reroute_move(
    BATCH_PARAMETERS, int share, int* votes, DECISION_PARAMETERS) {
    SHARED(Shared, shared);
    const Batch batch = BATCH;
    const int start = blockIdx.x * share, stop = start + share < T ? start + share : T;
    int listed[GROUP];
    prefetch(batch, neighbours, threadIdx.x / LANES, listed);
    clear(shared, E);
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        shared.first_rank[e] = votes[e];
        shared.share[e] = share_in(votes[E + 1 + e]);
    }
    if (threadIdx.x == 0) shared.independent = votes[E] < 0;
    __syncthreads();
    decide_and_move(batch, DECISION, shared, listed, start, stop, votes);
}

#if ROW_LANES
#include "row_lanes.cuh"
#include "row_moves.cuh"
#endif
