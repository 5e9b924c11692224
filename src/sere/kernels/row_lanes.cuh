// The specification once more, for decode batches: a row is some lanes of a warp, whose slots tell
// each other by shuffles what the form in reroute.cu writes to shared memory between barriers.
//
// Included by reroute.cu with -DROW_LANES=1; K, E and the number of threads are known then. Every
// row is read once (again only where a block takes several turns), nothing is written to memory but
// the result. Barriers: clear | vote | look up | move, and three more with a tolerance.
//
// -DJOINED: how the blocks of a launch vote as one. ALONE: one block. CLUSTER: the blocks of one
// cluster, sm_90 and later, which read each other's shared memory. TICKET: blocks vote in global
// memory, and the last to take a ticket goes on with all rows.

#define ALL (~0u)
#define ALONE 0  // of cuda_variants.py
#define CLUSTER 1
#define TICKET 2
// Lanes of a row: a power of two, so that a row stays in one warp.
enum { ROW = SLOTS_K <= 1 ? 1 : SLOTS_K <= 2 ? 2 : SLOTS_K <= 4 ? 4 : SLOTS_K <= 8 ? 8 : SLOTS_K <= 16 ? 16 : 32 };
enum { WORDS = (EXPERTS + 31) / 32, WARPS = THREADS / 32, ROWS_A_TURN = THREADS / ROW };
enum { LISTS = (EXPERTS + WARPS - 1) / WARPS };  // a warp's

struct Known {
    int first_rank[EXPERTS];
    int share[EXPERTS];
    short target[EXPERTS], place[EXPERTS];
    int loss[EXPERTS];
    unsigned critical[WORDS], added[WORDS];
    int any_fast, independent, last;
};

struct Slot {
    int e;  // or FOREIGN
    WEIGHT weight;
    int kind;
    bool fast, own, counts;  // own: of an INDEPENDENT row
};

#ifndef ON_HOST
__device__ static void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ static int cluster_blocks() {
    int blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}
template <class T>
__device__ static T* in_block(T* own, int block) {
#if JOINED == CLUSTER
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(block));
    return there;
#else
    return own;
#endif
}
// PDL: what was read before this may have been read while the kernel before ran; it writes ids and
// weights, and no plan.
__device__ static void wait_for_the_kernel_before() {
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

__device__ static int lane_id() { return threadIdx.x % 32; }
__device__ static int slot_id() { return threadIdx.x % ROW; }

// The bits of a row's lanes among those of the warp.
__device__ static unsigned of_row(unsigned bits) {
    return ROW == 32 ? bits : bits >> (lane_id() & ~(ROW - 1)) & ((1u << ROW % 32) - 1);
}

__device__ static Slot slot_at(const Batch& batch, int t, int stop) {
    Slot slot{FOREIGN, 0, VOID, false, false, false};
    const int k = slot_id();
    if (t >= stop) return slot;
    slot.kind = batch.rows ? batch.rows[t] : FAST;
    slot.fast = slot.kind == FAST || slot.kind > EXACT;
    slot.own = slot.kind == INDEPENDENT;
    if (k >= SLOTS_K) return slot;
    const long long e = expert_at(batch, t, k);
    slot.weight = weight_at(batch, t, k);
    if (in_range(batch, e)) slot.e = (int)e;
    slot.counts = slot.e >= 0 && slot.weight != 0;
    return slot;
}

__device__ static void clear(Known& known) {
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        known.first_rank[e] = NEVER;
        known.share[e] = 0;
    }
    for (int i = threadIdx.x; i < WORDS; i += THREADS) known.critical[i] = known.added[i] = 0;
    if (threadIdx.x == 0) known.any_fast = known.independent = 0;
}

// Of this slot in its row, in units of 1 / FRACTION. Every lane of the warp takes part.
__device__ static int share_of(const Slot& slot) {
    const WEIGHT size = slot.weight < 0 ? -slot.weight : slot.weight;
    const long long whole =
        slot.e < 0 ? 0 : (long long)((size < LARGEST_WEIGHT ? size : LARGEST_WEIGHT) * WEIGHT_FRACTION);
    long long total = whole;
    for (int step = 1; step < ROW; step *= 2) total += __shfl_xor_sync(ALL, total, step, ROW);
    return total ? (int)(whole * FRACTION / total) : 0;
}

// Whether a slot of an INDEPENDENT row, of that share, leaves its expert (rule 10).
__device__ static bool leaves_pool(const Slot& slot, const int* pool, int share) {
    return slot.own && slot.e >= 0 && share < pool[2 * EXPERTS + slot.e];
}

__device__ static void vote(const Slot& slot, const int* pool, Known& known, bool tolerates, bool pooled) {
    const unsigned counting = of_row(__ballot_sync(ALL, slot.counts));
    int rank = 0;
    for (int j = 0; j < SLOTS_K; ++j) {
        const WEIGHT other = __shfl_sync(ALL, slot.weight, j, ROW);
        rank += counting >> j & (other > slot.weight || (other == slot.weight && j < slot_id()));
    }
    int value = slot.kind == EXACT ? (int)ALWAYS : slot.counts ? rank : (int)NAMED;
    if (value < slot.kind - EXACT) value = ALWAYS;  // what the row keeps
    const int share = tolerates || pooled ? share_of(slot) : 0;
    if (slot.own) value = leaves_pool(slot, pool, share) ? (int)LEFT : (int)ALWAYS;
    if (slot.kind != VOID && slot.e >= 0) atomicMin(&known.first_rank[slot.e], value);
    if (slot.fast && slot_id() == 0) known.any_fast = 1;
    if (slot.own && slot_id() == 0) known.independent = 1;
    if (tolerates && slot.fast && slot.counts && share) atomicMax(&known.share[slot.e], share);
}

// How many experts have a first rank below s, found by every warp for itself.
__device__ static int below(const Known& known, int s) {
    int size = 0;
    for (int word = 0; word < WORDS; ++word) {
        const int e = word * 32 + lane_id();
        size += __popc(__ballot_sync(ALL, e < EXPERTS && known.first_rank[e] < s));
    }
    return size;
}

// Rule 4; most steps keep S.
__device__ static int choose_s(const Known& known, const int* settings, int least, int* primaries) {
    const int S = settings[SETTING_S], min_active = settings[MIN_ACTIVE], max_active = settings[MAX_ACTIVE];
    *primaries = below(known, S);
    if (*primaries >= min_active && *primaries <= max_active) return S;
    int too_few = 0, within = 0;
#pragma unroll 1
    for (int s = 0; s <= SLOTS_K; ++s) {
        const int size = below(known, s);
        too_few += size < min_active;
        within += size <= max_active;
    }
    const int grown = too_few < SLOTS_K ? too_few : SLOTS_K, capped = within - 1 > least ? within - 1 : least;
    int s = S > grown ? S : grown;
    s = s < capped ? s : capped;
    *primaries = below(known, s);
    return s;
}

__device__ static void prefetch(const NEIGHBOUR* neighbours, int (&listed)[LISTS]) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < LISTS; ++i) {
        const int e = warp + i * WARPS;
        listed[i] = e < EXPERTS && lane_id() < EXPERTS - 1 ? neighbours[e * (EXPERTS - 1) + lane_id()] : -1;
    }
}

// Where the first primary stands in e's list from its entry `at` on, and who it is; or -1.
__device__ static int nearest(const NEIGHBOUR* list, const Known& known, int s, int at, int* who) {
#pragma unroll 1
    for (; at < EXPERTS - 1; at += 32) {
        const int entry = at + lane_id() < EXPERTS - 1 ? list[at + lane_id()] : -1;
        const unsigned hits = __ballot_sync(ALL, entry >= 0 && known.first_rank[entry] < s);
        *who = __shfl_sync(ALL, entry, hits ? __ffs(hits) - 1 : 0, 32);
        if (hits) return at + __ffs(hits) - 1;
        if (__ballot_sync(ALL, entry < 0)) return -1;
    }
    return -1;
}

// The heads of lists are in registers, hence unrolled; few searches go beyond them.
__device__ static void look_up(
    const NEIGHBOUR* neighbours, Known& known, int s, const int (&listed)[LISTS]) {
    const int warp = threadIdx.x / 32;
    unsigned beyond = 0;
#pragma unroll
    for (int i = 0; i < LISTS; ++i) {
        const int e = warp + i * WARPS;
        const int rank = e < EXPERTS ? known.first_rank[e] : (int)NEVER;
        if (rank < s || rank >= NAMED) continue;
        const unsigned hits = __ballot_sync(ALL, listed[i] >= 0 && known.first_rank[listed[i]] < s);
        if (hits) {
            if (lane_id() == __ffs(hits) - 1) {
                known.place[e] = lane_id();
                known.target[e] = listed[i];
            }
        } else
            beyond |= 1u << i;
    }
    for (; beyond; beyond &= beyond - 1) {
        const int e = warp + (__ffs(beyond) - 1) * WARPS;
        int who;
        const int found = nearest(neighbours + e * (EXPERTS - 1), known, s, 0, &who);
        if (lane_id() > 0) continue;
        known.place[e] = found;
        known.target[e] = who;
        if (found < 0) atomicOr(&known.critical[e / 32], 1u << e % 32);
    }
}

// Rule 5, as in reroute.cu.
__device__ static void rescue(
    const Decision& decision, const int* settings, Known& known, int s, int primaries) {
    const int tau = settings[TAU], room = settings[MAX_ACTIVE] - primaries;
    for (int i = threadIdx.x; i < WORDS; i += THREADS) known.critical[i] = 0;
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        const int rank = known.first_rank[e], place = known.place[e];
        const bool lost = rank >= s && rank < NAMED && place >= 0;
        const long long share = known.share[e];
        known.loss[e] =
            lost ? (int)(share * share * decision.errors[e * (EXPERTS - 1) + place] / FRACTION) : -1;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        const int loss = known.loss[e];
        if (loss <= tau) continue;
        int ahead = 0;
#pragma unroll 4
        for (int other = 0; other < EXPERTS; ++other)
            ahead += known.loss[other] > loss || (known.loss[other] == loss && other < e);
        if (ahead < room) known.first_rank[e] = RESCUED;
    }
    __syncthreads();
}

// A set of experts, the active ones above all: lane i of every warp holds word i of their bits, and how
// many come before.
struct Active {
    unsigned word;
    int before, total;

    __device__ bool has(int e) const { return __shfl_sync(ALL, word, e / 32, 32) >> e % 32 & 1; }
    __device__ int standing(int e) const {
        const unsigned bits = __shfl_sync(ALL, word, e / 32, 32);
        return __shfl_sync(ALL, before, e / 32, 32) + __popc(bits & ((1u << e % 32) - 1));
    }
    // The expert at a place among them, [0, total).
    __device__ int at(int place) const {
        int i = 0;
        for (int step = 16; step > 0; step /= 2) {
            const int start = __shfl_sync(ALL, before, i + step, 32);
            if (i + step < WORDS && start <= place) i += step;
        }
        unsigned bits = __shfl_sync(ALL, word, i, 32);
        int left = place - __shfl_sync(ALL, before, i, 32), e = i * 32;
        for (int step = 16; step > 0; step /= 2) {
            const int low = __popc(bits & ((1u << step) - 1));
            if (left < low) continue;
            left -= low;
            bits >>= step;
            e += step;
        }
        return e;
    }
};

// lane i: word i.
__device__ static Active counted(unsigned word) {
    Active active{word, 0, 0};
    int sum = __popc(active.word);
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_sync(ALL, sum, lane_id() - step, 32);
        if (lane_id() >= step) sum += other;
    }
    active.before = sum - __popc(active.word);
    active.total = __shfl_sync(ALL, sum, 31, 32);
    return active;
}

__device__ static Active active_of(const Known& known, int s) {
    Active active{0, 0, 0};
    for (int word = 0; word < WORDS; ++word) {
        const int e = word * 32 + lane_id();
        const unsigned bits = __ballot_sync(ALL, e < EXPERTS && known.first_rank[e] < s);
        if (lane_id() == word) active.word = bits | known.critical[word];
    }
    return counted(active.word);
}

// The first members to join.
__device__ static Active joined(const int* joins, int members) {
    unsigned mine = 0;
    for (int word = 0; word < WORDS; ++word) {
        const int e = word * 32 + lane_id();
        const unsigned bits = __ballot_sync(ALL, e < EXPERTS && joins[e] < members);
        if (lane_id() == word) mine = bits;
    }
    return counted(mine);
}

// Those with a first rank of at most `rank`, before the pool counts.
__device__ static unsigned up_to(const Known& known, int rank) {
    unsigned mine = 0;
    for (int word = 0; word < WORDS; ++word) {
        const int e = word * 32 + lane_id();
        const unsigned bits = __ballot_sync(ALL, e < EXPERTS && known.first_rank[e] <= rank);
        if (lane_id() == word) mine = bits;
    }
    return mine;
}
