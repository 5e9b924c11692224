// How a row comes to name no expert twice (rules 6 to 10), for some rows at a time, a slot a thread.
//
// Included by reroute.cu. Three steps, a barrier between each (four where experts can run out):
//   aim     where every slot goes
//   hold    more slots in the row than active experts: which of them stay where they are
//   carry   the first slot to name an expert takes the weights of all that go there
//   fill    every other slot names an active expert that the row does not, with weight 0
//
// K <= 32: what is true of a row's slots is a word of bits. A row needs no more experts than it has
// slots, so that of the active experts its fillers are among the first 32 from where they start.

enum { SLOTS = 1024, LEAVES = 1 << 12, NOWHERE = LEAVES - 1, FOREIGN = -1 };

// What the threads of a block share about the rows at hand.
struct Rows {
    short goes_to[SLOTS];  // an expert or NOWHERE, with LEAVES where that is another; or FOREIGN
    // Bits of slots, [rows].
    unsigned stays[SLOTS];
    unsigned freed[SLOTS];
    // Bits of active experts, from the one on at which the row's fillers start.
    unsigned named[SLOTS];
};

__device__ static float product(float weight, float scale) { return __fmul_rn(weight, scale); }
__device__ static double product(double weight, float scale) { return __dmul_rn(weight, scale); }
__device__ static float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ static double sum(double a, double b) { return __dadd_rn(a, b); }

__device__ static bool bit(const unsigned* words, int i) { return words[i / 32] >> (i % 32) & 1; }

// Whether slot j of a row comes before slot k when some have to stay.
__device__ static bool ahead(WEIGHT w_j, WEIGHT w_k, int j, int k) {
    if (w_j == 0 || w_k == 0) return w_j != 0 || (w_k == 0 && j < k);
    return w_j > w_k || (w_j == w_k && j < k);
}

// The experts of a set of bits in ascending order, and where each of them stands; others stand where
// no filler is looked for.
__device__ static void list(const unsigned* bits, int E, short* in_order, short* standing) {
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        standing[e] = MAX_K;
        if (!bit(bits, e)) continue;
        int place = __popc(bits[e / 32] & ((1u << e % 32) - 1));
        for (int word = 0; word < e / 32; ++word) place += __popc(bits[word]);
        in_order[place] = e;
        standing[e] = place;
    }
}

// Returns how many of this thread's slots are critical.
__device__ static int aim(
    const Batch& batch, const Decision& decision, const Shared& shared, Rows& rows, bool movable, int s, int first,
    int slots) {
    int critical = 0;
    for (int i = threadIdx.x; i < slots; i += blockDim.x) {
        const int row = i / batch.K, k = i % batch.K, t = first + row, kind = kind_of(batch, t);
        if (k == 0) rows.stays[row] = rows.freed[row] = rows.named[row] = 0;
        const long long e = expert_at(batch, t, k);
        if (kind == EXACT || !in_range(batch, e)) {
            rows.goes_to[i] = FOREIGN;
            continue;
        }
        const bool counts = kind != VOID && weight_at(batch, t, k) != 0;
        if (kind == INDEPENDENT) {
            const int place = decision.pool[batch.E + e];
            const bool leaves = leaves_pool(batch, decision.pool, t, k);
            rows.goes_to[i] = !leaves ? (int)e
                : LEAVES | (counts ? (int)decision.neighbours[e * (batch.E - 1) + place] : (int)NOWHERE);
            critical += counts && !leaves && !bit(shared.own, e) && decision.settings[OWN_POOL] > 0;
        } else if (!movable)
            rows.goes_to[i] = FOREIGN;
        else if (bit(shared.active, e)) {
            rows.goes_to[i] = e;
            critical += counts && (shared.first_rank[e] == RESCUED || shared.first_rank[e] >= s);
        } else
            rows.goes_to[i] = LEAVES | (counts ? shared.target[e] : (int)NOWHERE);
    }
    return critical;
}

__device__ static void hold(const Batch& batch, Rows& rows, int first, int slots, int active) {
    for (int i = threadIdx.x; i < slots; i += blockDim.x) {
        const int row = i / batch.K, k = i % batch.K, t = first + row;
        const short* goes_to = &rows.goes_to[row * batch.K];
        if (goes_to[k] < LEAVES || kind_of(batch, t) == INDEPENDENT) continue;
        const bool fast = kind_of(batch, t) == FAST;
        const WEIGHT mine = fast ? weight_at(batch, t, k) : 0;
        int before = 0, excess = -active;
        for (int j = 0; j < batch.K; ++j) {
            excess += goes_to[j] != FOREIGN;
            before += goes_to[j] >= LEAVES && ahead(fast ? weight_at(batch, t, j) : 0, mine, j, k);
        }
        if (before < excess) atomicOr(&rows.stays[row], 1u << k);
    }
}

// Only weights of slots that carry are written: no other thread of the row reads those.
__device__ static void carry(
    const Batch& batch, const Decision& decision, const Shared& shared, Rows& rows, int first, int slots, int active) {
    const bool scales = decision.settings[SCALES] != 0;
    const int* own_place = decision.pool + batch.E;
    for (int i = threadIdx.x; i < slots; i += blockDim.x) {
        const int row = i / batch.K, k = i % batch.K, t = first + row;
        const short* goes_to = &rows.goes_to[row * batch.K];
        const int mine = goes_to[k] & NOWHERE;
        if (goes_to[k] == FOREIGN || rows.stays[row] >> k & 1) continue;
        const int kind = kind_of(batch, t);
        bool moves = false, alone = true;
        WEIGHT carried = 0;
        for (int j = 0; j < batch.K; ++j) {
            if (goes_to[j] == FOREIGN || rows.stays[row] >> j & 1) continue;
            const bool leaves = goes_to[j] >= LEAVES;
            moves |= leaves;
            if ((goes_to[j] & NOWHERE) != mine) continue;
            if (j < k) alone = false;
            if (j < k || mine == NOWHERE) continue;
            WEIGHT weight = weight_at(batch, t, j);
            if (leaves && scales) {
                const int e = (int)expert_at(batch, t, j);
                const int place = kind == INDEPENDENT ? own_place[e] : shared.place[e];
                weight = product(weight, decision.scales[e * (batch.E - 1) + place]);
            }
            carried = j == k ? weight : sum(carried, weight);
        }
        if (!moves) continue;
        if (mine == NOWHERE || !alone) {
            atomicOr(&rows.freed[row], 1u << k);
            continue;
        }
        if (kind != VOID) weight_at(batch, t, k) = carried;
        int from_start = kind == INDEPENDENT ? shared.own_standing[mine] : shared.standing[mine] - t % active;
        if (from_start < 0) from_start += active;
        if (from_start < 32) atomicOr(&rows.named[row], 1u << from_start);
    }
}

// Returns how many slots of this thread are re-routed; notes what is named that was not certain to be.
__device__ static int fill(
    const Batch& batch, const Decision& decision, Shared& shared, const Rows& rows, int first, int slots, int active) {
    int rerouted = 0;
    for (int i = threadIdx.x; i < slots; i += blockDim.x) {
        const int row = i / batch.K, k = i % batch.K, t = first + row;
        const int kind = kind_of(batch, t);
        long long e = expert_at(batch, t, k);
        if (rows.goes_to[i] >= LEAVES && !(rows.stays[row] >> k & 1)) {
            e = rows.goes_to[i] & NOWHERE;
            rerouted += kind != VOID;
        }
        if (rows.freed[row] >> k & 1) {
            unsigned open = ~rows.named[row];
            for (int taken = __popc(rows.freed[row] & ((1u << k) - 1)); taken > 0; --taken) open &= open - 1;
            if (kind == INDEPENDENT)
                e = shared.own_order[__ffs(open) - 1];
            else {
                const int place = t % active + __ffs(open) - 1;
                e = shared.in_order[place < active ? place : place - active];
            }
            if (kind != VOID) weight_at(batch, t, k) = 0;
        }
        if (rows.goes_to[i] != FOREIGN && kind != VOID && !bit(shared.certain, (int)e))
            atomicOr(&shared.added[e / 32], 1u << e % 32);
        decision.out[(long long)first * batch.K + i] = (ID)e;
    }
    return rerouted;
}
