// Rules 6 to 10 for one row in the lanes of a warp, and the kernel around it (see row_lanes.cuh).

// Rule 8: whether this slot stays where it is, the row having more slots than there are active experts.
__device__ static bool stays(const Slot& slot, bool leaves, unsigned in_row, const Active& active) {
    const unsigned leaving = of_row(__ballot_sync(ALL, leaves));
    const WEIGHT mine = slot.fast ? slot.weight : 0;
    int before = 0;
    for (int j = 0; j < SLOTS_K; ++j) {
        const WEIGHT other = __shfl_sync(ALL, mine, j, ROW);
        before += leaving >> j & ahead(other, mine, j, slot_id());
    }
    return leaves && before < __popc(in_row) - active.total;
}

struct Moved {
    bool rerouted, critical;
    int added;  // an expert that was not certain to be named, or -1
};

// What every row of a step finds.
struct Step {
    bool movable, scales, pooled;
    int s, own_pool;
    Active active, own;
    Active certain;  // named afterwards, whatever becomes of each row; where there is a pool
};

// Every lane of the warp takes part; t < stop is a row of the batch.
__device__ static Moved move(
    const Batch& batch, const Decision& decision, Known& known, const Slot& slot, const Step& step, int t,
    int stop) {
    const Active &active = step.active, &own = step.own;
    const int k = slot_id(), e = slot.e < 0 ? 0 : slot.e;
    const bool rerouted = slot.fast || slot.own, counts = rerouted && slot.counts;
    bool part = slot.e >= 0 && slot.kind != EXACT && (step.movable || slot.own);
    bool stands = active.has(e), critical = false;
    int place = 0, target = 0;
    if (step.own_pool > 0) {
        const bool member = own.has(e);
        const int share = share_of(slot);
        if (slot.own) {
            stands = !leaves_pool(slot, decision.pool, share);
            critical = !member;
            place = decision.pool[EXPERTS + e];
            if (!stands) target = decision.neighbours[e * (EXPERTS - 1) + place];
        }
    } else
        part = part && !slot.own;
    bool leaves = part && !stands;
    const int rank = known.first_rank[e];
    if (!slot.own) {
        critical = rank == RESCUED || rank >= step.s;
        if (leaves) place = known.place[e], target = known.target[e];
    }
    Moved moved{false, part && stands && counts && critical, -1};
    const int goes = !part ? -1 : stands ? e : counts ? target : (int)NOWHERE;
    WEIGHT weight = slot.weight;
    if (leaves && counts && step.scales) weight = product(weight, decision.scales[e * (EXPERTS - 1) + place]);
    if (active.total < SLOTS_K) {
        const bool held = stays(slot, leaves, of_row(__ballot_sync(ALL, part)), active) && !slot.own;
        if (held && slot.fast) moved.added = slot.e;
        part = part && !held;
        leaves = leaves && !held;
    }
    const bool moves = of_row(__ballot_sync(ALL, leaves)) != 0 && part;
    const unsigned taking = of_row(__ballot_sync(ALL, moves));
    moved.rerouted = leaves && rerouted;

    bool alone = true;
    for (int j = 0; j < SLOTS_K; ++j) {
        const int other = __shfl_sync(ALL, goes, j, ROW);
        const WEIGHT theirs = __shfl_sync(ALL, weight, j, ROW);
        if (!(taking >> j & 1) || other != goes) continue;
        if (j < k) alone = false;
        if (j > k) weight = sum(weight, theirs);  // told to others in turn k, before this
    }
    const bool freed = moves && (goes == NOWHERE || !alone), carries = moves && !freed;
    const int turn = active.total && !slot.own ? t % active.total : 0;
    int from_start = active.standing(carries ? goes : 0) - turn;
    if (from_start < 0) from_start += active.total;
    if (step.own_pool > 0) {
        const int standing = own.standing(carries ? goes : 0);
        const bool member = own.has(carries ? goes : 0);
        if (slot.own) from_start = member ? standing : 32;
    }
    unsigned named = carries && from_start < 32 ? 1u << from_start : 0;
    for (int width = 1; width < ROW; width *= 2) named |= __shfl_xor_sync(ALL, named, width, ROW);
    const unsigned all_freed = of_row(__ballot_sync(ALL, freed));
    unsigned open = ~named;
    for (int taken = __popc(all_freed & ((1u << k) - 1)); taken > 0; --taken) open &= open - 1;
    int at = turn + __ffs(open) - 1;
    if (!slot.own && at >= active.total) at -= active.total;
    int filler = active.at(freed && !slot.own ? at : 0);
    if (step.own_pool > 0) {
        const int lowest = own.at(freed && slot.own ? at : 0);
        if (slot.own) filler = lowest;
    }
    if (step.pooled) {
        const int now = !moves ? e : freed ? filler : goes;
        const bool certain = step.certain.has(now);
        moved.added = rerouted && slot.e >= 0 && !certain ? now : -1;
    }

    if (t >= stop || k >= SLOTS_K) return moved;
    ID* out = &decision.out[(long long)t * SLOTS_K + k];
    if (moves) {
        *out = (ID)(freed ? filler : goes);
        if (rerouted) weight_at(batch, t, k) = freed ? 0 : weight;
    } else if (decision.out != batch.ids)
        *out = (ID)expert_at(batch, t, k);
    return moved;
}

__device__ static void add(const Decision& decision, Counter counter, bool mine) {
    const int sum = __popc(__ballot_sync(ALL, mine));
    if (lane_id() == 0 && sum) atomicAdd(&decision.counters[counter], (unsigned long long)sum);
}

__device__ static void count_row(const Decision& decision, const Slot& slot, int t, int stop) {
    const bool row = t < stop && slot_id() == 0;
    add(decision, ROWS_FAST, row && slot.fast);
    add(decision, ROWS_EXACT, row && slot.kind == EXACT);
    add(decision, ROWS_VOID, row && slot.kind == VOID);
    add(decision, ROWS_INDEPENDENT, row && slot.own);
}

// Whether this block goes on, its rows then being [*start, *stop). `known` holds all blocks' votes.
__device__ static bool join(Known& known, Known& own, int* votes, int T, int* start, int* stop) {
#if JOINED == CLUSTER
    // Before anybody passes: others tell block 0 what they added as soon as they know.
    for (int i = threadIdx.x; i < WORDS; i += THREADS) known.critical[i] = known.added[i] = 0;
    cluster_sync();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        int rank = NEVER, share = 0;
        for (int block = 0; block < cluster_blocks(); ++block) {
            const Known* other = in_block(&own, block);
            rank = other->first_rank[e] < rank ? other->first_rank[e] : rank;
            share = other->share[e] > share ? other->share[e] : share;
        }
        known.first_rank[e] = rank;
        known.share[e] = share;
    }
    if (threadIdx.x == 0) {
        known.any_fast = known.independent = 0;
        for (int block = 0; block < cluster_blocks(); ++block) {
            known.any_fast |= in_block(&own, block)->any_fast;
            known.independent |= in_block(&own, block)->independent;
        }
    }
#elif JOINED == TICKET
    // votes: as in reroute.cu, then how many blocks have voted; both as they were when this ends.
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        if (known.first_rank[e] < NEVER) atomicMin(&votes[e], known.first_rank[e]);
        if (known.share[e]) atomicMin(&votes[EXPERTS + 1 + e], -known.share[e]);
    }
    if (threadIdx.x == 0 && known.any_fast) atomicMin(&votes[EXPERTS], 0);
    if (threadIdx.x == 0 && known.independent) atomicMin(&votes[EXPERTS], -1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) known.last = atomicAdd(&votes[2 * EXPERTS + 1], 1) == (int)gridDim.x - 1;
    __syncthreads();
    if (!known.last) return false;
    __threadfence();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        known.first_rank[e] = votes[e];
        known.share[e] = share_in(votes[EXPERTS + 1 + e]);
    }
    if (threadIdx.x == 0) {
        known.any_fast = votes[EXPERTS] <= 0;
        known.independent = votes[EXPERTS] < 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i <= 2 * EXPERTS; i += THREADS) votes[i] = NEVER;
    if (threadIdx.x == 0) votes[2 * EXPERTS + 1] = 0;
    *start = 0;
    *stop = T;
#endif
    __syncthreads();  // the only one of a block alone
    return true;
}

KERNEL reroute_lanes(BATCH_PARAMETERS, int share, int* votes, DECISION_PARAMETERS) {
    SHARED(Known, own);
#if JOINED == CLUSTER
    SHARED(Known, known);
#else
    Known& known = own;
#endif
    const Batch batch = BATCH;
    const Decision decision = DECISION;
    int start = blockIdx.x * share, stop = start + share < T ? start + share : T;
    const int row = threadIdx.x / ROW;
    int listed[LISTS];
    prefetch(neighbours, listed);
    clear(own);
    wait_for_the_kernel_before();
    int rules[OWN_POOL + 1];
#pragma unroll
    for (int i = 0; i <= OWN_POOL; ++i) rules[i] = settings[i];
    Slot slot = slot_at(batch, start + row, stop);
    __syncthreads();  // below the loads, so that they are under way at once
    const int S = rules[SETTING_S];
    const bool in_place = out == ids, counts = counters && !is_off(rules), tolerates = rules[TAU] >= 0;
    if (S >= SLOTS_K && !counts && in_place && rules[OWN_POOL] == 0) return;
    const bool reads_again = stop - start > ROWS_A_TURN || JOINED == TICKET;
#pragma unroll 1
    for (int first = start;;) {
        vote(slot, pool, own, tolerates, rules[OWN_POOL] > 0);
        first += ROWS_A_TURN;
        if (first >= stop) break;
        slot = slot_at(batch, first + row, stop);
    }
    if (!join(known, own, votes, T, &start, &stop)) return;

    const bool independent = known.independent;
    const int members = members_of(rules, independent);
    int before = 0;
    Step step{};
    step.pooled = members > 0;
    if (members > 0) {  // the end of rule 3
        before = counted(up_to(known, NEVER - 1)).total;
        step.certain.word = up_to(known, NAMED);
        __syncthreads();
        for (int e = threadIdx.x; e < EXPERTS; e += THREADS)
            if (pool[e] < members) known.first_rank[e] = ALWAYS;
        __syncthreads();
    }
    int primaries = 0, s = S;
    if (S < SLOTS_K) s = choose_s(known, rules, members > 0 ? 0 : 1, &primaries);
    const bool movable = S < SLOTS_K && primaries > 0;
#pragma unroll 1
    for (int again = movable && tolerates; movable; --again) {
        look_up(neighbours, known, s, listed);
        __syncthreads();
        if (again <= 0) break;
        rescue(decision, rules, known, s, primaries);
    }
    if (movable) step.active = active_of(known, s);
    if (movable) step.certain.word &= step.active.word;
    if (independent && rules[OWN_POOL] > 0) {
        step.own_pool = rules[OWN_POOL];
        step.own = joined(pool, step.own_pool);
    }
    step.movable = movable, step.scales = rules[SCALES], step.s = s;
#pragma unroll 1
    for (int first = start; first < stop; first += ROWS_A_TURN) {
        const int t = first + row;
        if (reads_again) slot = slot_at(batch, t, stop);
        if (movable || step.own_pool > 0) {
            const Moved moved = move(batch, decision, known, slot, step, t, stop);
            if (moved.added >= 0)
                atomicOr(&in_block(&known, 0)->added[moved.added / 32], 1u << moved.added % 32);
            if (counts) {
                add(decision, REROUTED, moved.rerouted);
                add(decision, CRITICAL, moved.critical);
            }
        } else if (!in_place && t < stop && slot_id() < SLOTS_K)
            out[(long long)t * SLOTS_K + slot_id()] = (ID)expert_at(batch, t, slot_id());
        if (counts) count_row(decision, slot, t, stop);
    }
    if (JOINED == CLUSTER)
        cluster_sync();  // nobody leaves while another reads its votes, or tells block 0 what it added
    else if (counts && (step.pooled || (movable && step.active.total < SLOTS_K)))
        __syncthreads();
    if (!counts || threadIdx.x >= 32 || (JOINED == CLUSTER && blockIdx.x)) return;
    if (!known.any_fast && !independent) return;
    if (!step.pooled) before = below(known, NEVER);
    int after = step.pooled ? counted(step.certain.word).total : movable ? step.active.total : before;
    for (int word = 0; word < WORDS; ++word) after += __popc(known.added[word]);
    if (lane_id() > 0) return;
    atomicAdd(&counters[STEPS], 1ull);
    atomicAdd(&counters[BEFORE], (unsigned long long)before);
    atomicAdd(&counters[AFTER], (unsigned long long)after);
}
