// Runs src/sere/kernels/reroute.cu on a CPU: a block is a handful of threads with a barrier, a warp
// is one thread, blocks run one after another. Built as a library by tests/kernels/cuda_on_host.py:
// threads are then fibers of one OS thread, which take turns at barriers, each time in another
// order. With -DRACES -fsanitize=thread it is a program with OS threads that fails if two race.

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#define LANES 1
#define __device__
#define __global__
#define __launch_bounds__(threads)
#define SHARED(type, name) static type name

struct Index {
    unsigned x;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim;

#ifdef RACES
static std::barrier<>* block_barrier;
static void __syncthreads() { block_barrier->arrive_and_wait(); }
#else
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    bool done;
};
static std::vector<Fiber> fibers(8);
static ucontext_t scheduler;
static std::function<void()> body;

static void __syncthreads() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

static void run_fiber() {
    body();
    fibers[threadIdx.x].done = true;
    __syncthreads();
}
#endif
static unsigned __ballot_sync(unsigned, bool value) { return value; }
static int __shfl_sync(unsigned, int value, int) { return value; }
#include "cuda_arithmetic_on_host.h"

template <class T>
static void atomicMin(T* where, T value) {
    std::atomic_ref<T> shared(*where);
    T old = shared.load();
    while (value < old && !shared.compare_exchange_weak(old, value)) {
    }
}

template <class T>
static void atomicMax(T* where, T value) {
    std::atomic_ref<T> shared(*where);
    T old = shared.load();
    while (value > old && !shared.compare_exchange_weak(old, value)) {
    }
}

template <class T>
static void atomicAdd(T* where, T value) {
    std::atomic_ref<T>(*where).fetch_add(value);
}

template <class T>
static void atomicOr(T* where, T value) {
    std::atomic_ref<T>(*where).fetch_or(value);
}

template <class T>
static T atomicAnd(T* where, T value) {
    return std::atomic_ref<T>(*where).fetch_and(value);
}

#include "reroute.cu"

#ifdef RACES
template <class Kernel>
static void run_block(int block, int threads, Kernel kernel) {
    std::barrier<> barrier(threads);
    block_barrier = &barrier;
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
        running.emplace_back([=] {
            threadIdx.x = thread;
            blockIdx.x = block;
            kernel();
        });
    for (auto& thread : running) thread.join();
}
#else
template <class Kernel>
static void run_block(int block, int threads, Kernel kernel) {
    static std::mt19937 chance(0);
    blockIdx.x = block;
    body = kernel;
    std::vector<unsigned> left(threads);
    for (int thread = 0; thread < threads; ++thread) {
        left[thread] = thread;
        Fiber& fiber = fibers.at(thread);
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_fiber, 0);
    }
    while (!left.empty()) {  // a turn: everybody to the next barrier
        std::shuffle(left.begin(), left.end(), chance);
        for (unsigned thread : left) {
            threadIdx.x = thread;
            swapcontext(&scheduler, &fibers[thread].context);
        }
        std::erase_if(left, [](unsigned thread) { return fibers[thread].done; });
    }
}
#endif

template <class Kernel>
static void launch(int blocks, int threads, Kernel kernel) {
    blockDim.x = threads;
    for (int block = 0; block < blocks; ++block) run_block(block, threads, kernel);
}

#define ON_BATCH                                                                                  \
    const auto batch = [&](auto kernel, auto... more) {                                           \
        return [=] {                                                                              \
            kernel(ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, K, E,     \
                   more...);                                                                      \
        };                                                                                        \
    };                                                                                            \
    const int blocks = share ? (T + share - 1) / share : 1

extern "C" void host_vote(int share, int threads, int* votes, BATCH_PARAMETERS, const int* settings,
                          const int* pool) {
    ON_BATCH;
    launch(blocks, threads, batch(reroute_vote, share, votes, settings, pool));
}

// given: votes, or null: this batch's own.
extern "C" void host_reroute(int share, int threads, const int* given, BATCH_PARAMETERS, DECISION_PARAMETERS) {
    ON_BATCH;
    if (share == 0) {
        launch(1, threads,
               batch(reroute_at_once, neighbours, errors, scales, settings, pool, out, counters));
        return;
    }
    std::vector<int> votes(2 * E + 1, NEVER);
    if (given)
        std::copy(given, given + votes.size(), votes.begin());
    else
        host_vote(share, threads, votes.data(), ids, ids_row, ids_slot, weights, weights_row,
                  weights_slot, rows, T, K, E, settings, pool);
    launch(blocks, threads,
           batch(reroute_move, share, votes.data(), neighbours, errors, scales, settings, pool, out,
                 counters));
}

#ifdef RACES
int main() {
    std::mt19937 random(0);
    const int T = 37, K = 4, E = 32;
    std::vector<int> neighbours(E * (E - 1)), errors(E * (E - 1)), settings{1, 4, 12, -1, 0, 0, 0};
    std::vector<int> pool(3 * E);
    std::vector<float> scales(E * (E - 1), 0.5f);
    std::vector<ID> ids(T * K), out(T * K);
    std::vector<WEIGHT> weights(T * K);
    std::vector<signed char> rows(T);
    std::vector<unsigned long long> counters(COUNTERS);
    for (int round = 0; round < 30; ++round) {
        for (auto& n : neighbours) n = (int)(random() % (E + 4)) - 4;
        for (auto& n : neighbours) n = n < 0 ? -1 : n;
        for (auto& error : errors) error = random() % FRACTION;
        for (int e = 0; e < E; ++e) {  // the odd ones, one after the other; the next odd one stands in
            pool[e] = e % 2 ? e / 2 : E;
            pool[E + e] = e % 2 ? -1 : 0;
            pool[2 * E + e] = e % 2 ? 0 : random() % FRACTION;
            if (e % 2 == 0) neighbours[e * (E - 1)] = e % 8 + 1;
        }
        settings[POOL] = round % 4 == 1 ? E / 2 : 0;
        settings[OWN_POOL] = round % 5 == 1 ? E / 4 : 0;
        settings[TAU] = round % 2 ? FRACTION : -1;
        settings[SCALES] = round % 2;
        settings[MIN_ACTIVE] = round % 3 ? 4 : 1;
        for (auto& id : ids) id = (int)(random() % (E + 2)) - 1;
        for (auto& weight : weights) weight = (random() % 5) / 4.0f;
        for (auto& row : rows) row = round % 3 ? (int)(random() % 4) - 1 : VOID;
        if (round % 3 == 0) rows[0] = FAST;  // fewer active experts than a row has slots
        for (int share : {0, 8})
            host_reroute(share, 6, nullptr, ids.data(), K, 1, weights.data(), K, 1, rows.data(), T, K, E,
                         neighbours.data(), errors.data(), scales.data(), settings.data(), pool.data(),
                         out.data(), counters.data());
    }
}
#endif
